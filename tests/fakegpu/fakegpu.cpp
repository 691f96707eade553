// Two devices that compute on the CPU but refuse what real accelerators refuse: numpy(), and tensors of two devices in one operation.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/Resize.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/CPUGeneratorImpl.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>
#include <set>
using namespace at;
constexpr auto P1 = c10::DeviceType::PrivateUse1;

constexpr c10::DeviceIndex COUNT = 2;
static thread_local c10::DeviceIndex now = 0;   // the device of this thread
static c10::Device numbered(c10::Device d) { return c10::Device(P1, d.has_index() ? d.index() : now); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return P1; }
  c10::Device exchangeDevice(c10::Device d) const override { auto old = getDevice(); setDevice(d); return old; }
  c10::Device getDevice() const override { return c10::Device(P1, now); }
  void setDevice(c10::Device d) const override {
    TORCH_CHECK(numbered(d).index() < COUNT, "FAKEGPU: there is no device ", d);
    now = numbered(d).index(); }
  void uncheckedSetDevice(c10::Device d) const noexcept override { now = numbered(d).index(); }
  c10::Stream getStream(c10::Device d) const override { return c10::Stream(c10::Stream::DEFAULT, numbered(d)); }
  c10::Stream getDefaultStream(c10::Device d) const override { return c10::Stream(c10::Stream::DEFAULT, numbered(d)); }
  c10::Stream exchangeStream(c10::Stream s) const override { return c10::Stream(c10::Stream::DEFAULT, s.device()); }
  c10::DeviceIndex deviceCount() const noexcept override { return COUNT; }
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex device_index, const c10::EventFlag flag) const override {}
  void block(void* event, const c10::Stream& stream) const override {}
  bool queryEvent(void* event) const override { return true; }
  void destroyEvent(void* event, const c10::DeviceIndex device_index) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Alloc final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override { void* p = c10::alloc_cpu(n ? n : 1); return {p, p, &c10::free_cpu, c10::Device(P1, now)}; }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* d, const void* s, std::size_t n) const override { std::memcpy(d, s, n); }
};
static Alloc alloc;
REGISTER_ALLOCATOR(P1, &alloc);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isAvailable() const override { return true; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { static auto g = at::make_generator<Gen>(); return g; }
  Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Gen>(); }
  struct Gen : at::CPUGeneratorImpl { Gen() { device_ = c10::Device(P1, 0); } };
};
static Hooks hooks;
static bool reg = [] { at::RegisterPrivateUse1HooksInterface(&hooks); return true; }();

// as a CPU tensor on the same memory
static Tensor cpu_view(const Tensor& t) {
  if (!t.defined() || t.device().type() != P1) return t;
  return at::from_blob(t.data_ptr(), t.sizes(), t.strides(), t.options().device(kCPU).requires_grad(false));
}
static Tensor empty_mf(c10::IntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device> device, std::optional<bool>, std::optional<c10::MemoryFormat> mf) {
  c10::OptionalDeviceGuard there(device);
  constexpr c10::DispatchKeySet ks(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &alloc, ks, c10::dtype_or_default(dtype), mf);
}
static Tensor empty_st(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device> device, std::optional<bool>) {
  c10::OptionalDeviceGuard there(device);
  constexpr c10::DispatchKeySet ks(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &alloc, ks, c10::dtype_or_default(dtype));
}
static Tensor copy_from(const Tensor& self, const Tensor& dst, bool) { auto d = cpu_view(dst); d.copy_(cpu_view(self)); return dst; }
static Tensor copy_from_resize(const Tensor& self, const Tensor& dst) {
  if (self.sizes() != dst.sizes()) dst.resize_(self.sizes());
  auto d = cpu_view(dst); d.copy_(cpu_view(self)); return dst; }
static Scalar local_scalar(const Tensor& self) { return cpu_view(self).item(); }
static Tensor& set_source(Tensor& r, Storage s, int64_t off, c10::IntArrayRef size, c10::IntArrayRef stride) {
  r.unsafeGetTensorImpl()->set_storage_offset(off);
  at::native::setStrided(r, size, stride, off); return r; }
// Attention by the kernel that the CPU would choose, so that the two agree to the last digit.
constexpr auto kFlash = static_cast<int64_t>(at::SDPBackend::flash_attention);
constexpr auto kOverrideable = static_cast<int64_t>(at::SDPBackend::overrideable);
static int64_t choice(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
                      double dropout, bool causal, std::optional<double> scale, bool gqa) {
  std::optional<Tensor> m; if (mask.has_value()) m = cpu_view(*mask);
  return at::_fused_sdp_choice(cpu_view(q), cpu_view(k), cpu_view(v), m, dropout, causal, scale, gqa) == kFlash
    ? kOverrideable : 0; }
namespace at::native { REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &choice) }
static Tensor on_device(const Tensor& t, c10::Device device) {
  if (!t.defined()) return t;
  auto d = at::empty_strided(t.sizes(), t.strides(), t.options().device(device)); cpu_view(d).copy_(t); return d; }
static void same_device(const Tensor& q, std::initializer_list<Tensor> others) {
  for (const Tensor& t : others) TORCH_CHECK(!t.defined() || t.device() == q.device(), "FAKEGPU: Expected all tensors"
    " to be on the same device, but found at least two devices, ", q.device(), " and ", t.device(), "! (attention)"); }
static std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor> attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask, double dropout, bool causal,
    bool, std::optional<double> scale) {
  same_device(q, {k, v, mask.has_value() ? *mask : Tensor()});
  std::optional<Tensor> m; if (mask.has_value() && mask->defined()) m = cpu_view(*mask);
  auto [out, sums] = at::_scaled_dot_product_flash_attention_for_cpu(
    cpu_view(q), cpu_view(k), cpu_view(v), dropout, causal, m, scale);
  const auto d = q.device();
  return {on_device(out, d), on_device(sums, d), Tensor(), Tensor(), q.size(2), k.size(2), Tensor(), Tensor(), Tensor()}; }
static std::tuple<Tensor, Tensor, Tensor, Tensor> attention_back(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask, std::array<bool, 4>,
    const Tensor& out, const Tensor& sums, const Tensor&, const Tensor&, c10::SymInt, c10::SymInt, double dropout,
    bool causal, const Tensor&, const Tensor&, std::optional<double> scale) {
  std::optional<Tensor> m; if (mask.defined()) m = cpu_view(mask);
  auto [gq, gk, gv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
    cpu_view(grad), cpu_view(q), cpu_view(k), cpu_view(v), cpu_view(out), cpu_view(sums), dropout, causal, m, scale);
  const auto d = q.device();
  return {on_device(gq, d), on_device(gk, d), on_device(gv, d), Tensor()}; }

// What is against the devices of an operation's arguments, as CUDA sees it: tensors of both, numbers excepted.
static void check_devices(const c10::OperatorHandle& op, const torch::jit::Stack& stack, size_t n) {
  static const std::set<std::string> loose = {
    "aten::index.Tensor", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_", "aten::index.Tensor_out",
    "aten::_unsafe_index.Tensor", "aten::copy_", "aten::_to_copy", "aten::_local_scalar_dense", "aten::masked_scatter"};
  bool mine = false, other = false, first_cpu = false, both = false;
  c10::DeviceIndex number = 0;
  auto look = [&](const Tensor& t) {
    if (!t.defined()) return;
    if (t.device().type() == P1) {
      both |= mine && t.device().index() != number;
      mine = true; number = t.device().index();
    } else if (t.dim() > 0) other = true; };
  int i = 0;
  for (const auto& v : torch::jit::last(stack, n)) {
    if (v.isTensor()) {
      look(v.toTensor());
      if (i == 0 && v.toTensor().defined() && v.toTensor().device().type() != P1) first_cpu = true;
    }
    else if (v.isList()) for (const c10::IValue& x : v.toListRef()) if (x.isTensor()) look(x.toTensor());
    ++i;
  }
  auto name = op.schema().name();
  if (!op.schema().overload_name().empty()) name += "." + op.schema().overload_name();
  TORCH_CHECK(!both, "FAKEGPU: Expected all tensors to be on the same device, but found at least two devices, fakegpu:0"
    " and fakegpu:1! (", name, ")");
  if (!mine || !other) return;
  TORCH_CHECK(loose.count(name) && !first_cpu, "FAKEGPU: Expected all tensors to be on the same device, but found at"
    " least two devices, fakegpu:0 and cpu! (", name, ")");
}

static c10::IValue on_cpu(const c10::IValue& v) {
  if (v.isTensor()) {
    const Tensor t = v.toTensor();                // an empty one may be an `out` that is to be resized
    return t.defined() && t.numel() == 0 ? at::empty_like(t, t.options().device(kCPU)) : cpu_view(t); }
  if (v.isDevice() && v.toDevice().type() == P1) return c10::Device(kCPU);
  if (v.isTensorList()) {
    c10::List<Tensor> out; for (const Tensor& t : v.toTensorVector()) out.push_back(cpu_view(t)); return out; }
  if (v.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> out;
    for (const std::optional<Tensor>& t : v.toOptionalTensorList())
      out.push_back(t.has_value() ? std::optional<Tensor>(cpu_view(*t)) : t);
    return out; }
  return v;
}

// Where an operation's result is: with its first tensor on a device, or where it is asked for.
static c10::Device place_of(const std::vector<c10::IValue>& given) {
  for (const c10::IValue& v : given) {
    if (v.isTensor() && v.toTensor().defined() && v.toTensor().device().type() == P1) return v.toTensor().device();
    if (v.isList()) for (const c10::IValue& x : v.toListRef())
      if (x.isTensor() && x.toTensor().defined() && x.toTensor().device().type() == P1) return x.toTensor().device();
  }
  for (const c10::IValue& v : given) if (v.isDevice() && v.toDevice().type() == P1) return numbered(v.toDevice());
  return c10::Device(P1, now);
}

// The CPU's kernel on the same memory and strides: the same numbers, to the last digit.
static void boxed(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto n = schema.arguments().size();
  check_devices(op, *stack, n);
  const auto begin = stack->size() - n;
  const std::vector<c10::IValue> given(stack->begin() + begin, stack->end());
  const auto place = place_of(given);
  for (size_t i = 0; i < n; ++i) (*stack)[begin + i] = on_cpu(given[i]);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  const auto& returns = schema.returns();
  for (size_t i = 0; i < returns.size(); ++i) {
    auto& value = (*stack)[stack->size() - returns.size() + i];
    const auto* alias = returns[i].alias_info();
    if (!alias) {
      if (value.isTensor()) value = on_device(value.toTensor(), place);
      else if (value.isTensorList()) {
        c10::List<Tensor> out; for (const Tensor& t : value.toTensorVector()) out.push_back(on_device(t, place)); value = out; }
      continue;
    }
    TORCH_CHECK(alias->isWrite(), "FAKEGPU: ", schema.name(), " is a view that this device does not know");
    for (size_t j = 0; j < n; ++j) {
      const auto* of = schema.arguments()[j].alias_info();
      if (!of || *of != *alias || !given[j].isTensor()) continue;
      const Tensor whole = given[j].toTensor(), now = value.isTensor() ? value.toTensor() : Tensor();
      if (now.defined() && now.sizes() != whole.sizes()) { whole.resize_(now.sizes()); cpu_view(whole).copy_(now); }
      value = whole;
      break;
    }
  }
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&boxed>()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  // else torch makes it of `mm.out`, and a kernel that a process put in the place of the CPU's `mm` is not asked
  m.impl("mm", torch::CppFunction::makeFromBoxedFunction<&boxed>());
  m.impl("empty.memory_format", &empty_mf);
  m.impl("empty_strided", &empty_st);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_resize);
  m.impl("_local_scalar_dense", &local_scalar);
  // torch would take it apart for a device that is not its own, and round otherwise
  m.impl("silu_backward", torch::CppFunction::makeFromBoxedFunction<&boxed>());
  m.impl("_scaled_dot_product_fused_attention_overrideable", &attention);
  m.impl("_scaled_dot_product_fused_attention_overrideable_backward", &attention_back);
  m.impl("set_.source_Storage_storage_offset", &set_source);
  m.impl("set_.source_Storage", [](Tensor& r, Storage s) -> Tensor& { return at::native::set_(r, s); });
  m.impl("as_strided", [](const Tensor& t, c10::SymIntArrayRef a, c10::SymIntArrayRef b, std::optional<c10::SymInt> o) { return at::native::as_strided_tensorimpl(t, C10_AS_INTARRAYREF_SLOW(a), C10_AS_INTARRAYREF_SLOW(b), o.has_value() ? std::optional<int64_t>(o->expect_int()) : std::nullopt); });
  m.impl("view", [](const Tensor& t, c10::SymIntArrayRef s) { return at::native::view(t, C10_AS_INTARRAYREF_SLOW(s)); });
  m.impl("_reshape_alias", [](const Tensor& t, c10::SymIntArrayRef a, c10::SymIntArrayRef b) { return at::native::_reshape_alias(t, C10_AS_INTARRAYREF_SLOW(a), C10_AS_INTARRAYREF_SLOW(b)); });
  m.impl("unfold", [](const Tensor& t, int64_t d, int64_t s, int64_t st) { return at::native::unfold(t, d, s, st); });
  m.impl("view_as_real", [](const Tensor& t) { return at::native::view_as_real(t); });
  m.impl("resize_", [](const Tensor& t, c10::SymIntArrayRef s, std::optional<c10::MemoryFormat> mf) -> const Tensor& {
    auto size = C10_AS_INTARRAYREF_SLOW(s); auto* impl = t.unsafeGetTensorImpl();
    int64_t n = 1; for (auto x : size) n *= x;
    size_t bytes = (n + t.storage_offset()) * t.dtype().itemsize();
    auto* st = t.storage().unsafeGetStorageImpl();
    if (st->nbytes() < bytes) { c10::DeviceGuard there(t.device()); auto p = alloc.allocate(bytes); if (st->nbytes()) std::memcpy(p.get(), st->data(), st->nbytes()); st->set_data_ptr_noswap(std::move(p)); st->set_nbytes(bytes); }
    impl->set_sizes_contiguous(size); return t; });
}
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(baddbmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(einsum, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(scaled_dot_product_attention, lower_precision_fp)
}
