"""Float32 products by oneDNN: where, for whom, and that nothing else changes."""

import json, re, sys
import pytest, torch
import rcid.core.products as products
from conftest import ROOT, run

has_operator = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="a torch without oneDNN's products")
TINY = {"bench", "calibrate", "fused", "fused_models", "kv_fuse", "planted", "plants"}    # stages
AMD, INTEL = "vendor_id\t: AuthenticAMD\n", "vendor_id\t: GenuineIntel\n"
FORCED = """
import rcid.core.products as products
import torch
products.mkl_is_slow = lambda: True
x, w = (torch.randn(s, generator=torch.Generator().manual_seed(0)) for s in ((512, 576), (576, 256)))
few, double = x[:4] @ w, x.double() @ w.double()
products.use_onednn()
first = products._library
products.use_onednn()
assert products._library is first                                  # a second call is none
wide = x @ w
assert torch.allclose(wide.double(), double, atol=1e-3) and wide.dtype == torch.float32
assert torch.equal(x @ w, wide)                                    # and always the same one
assert torch.equal(wide, torch.ops.mkldnn._linear_pointwise(x, w.t(), None, "none", [], ""))
assert torch.equal(x[:4] @ w, few)                                 # a small one goes as before
assert torch.equal(x.double() @ w.double(), double)                # others go as before
assert torch.allclose((x.T.contiguous().T @ w.T.contiguous().T).double(), double, atol=1e-3)       # transposed
assert (torch.zeros(0, 576) @ w).shape == (0, 256) and (torch.zeros(5, 0) @ torch.zeros(0, 3)).eq(0).all()
with torch.autocast("cpu", torch.bfloat16): assert (x @ w).dtype == torch.bfloat16
for a, b in ((x[:4], w), (x, w)):                                  # one that is too small, one that is not
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    (a @ b).square().sum().backward()
    c, d = a.detach().double().requires_grad_(), b.detach().double().requires_grad_()
    (c @ d).square().sum().backward()
    assert torch.allclose(a.grad.double(), c.grad, rtol=1e-3, atol=.1)
    assert torch.allclose(b.grad.double(), d.grad, rtol=1e-3, atol=.1)
def said(product) -> str:                                          # of what does not fit
    try: product()
    except (RuntimeError, IndexError) as e: return str(e)
    raise AssertionError("a product that cannot be")
for left, right in ((x, w[:5]), (x, w[:500]), (x, w[0]), (x[0], w)):
    assert said(lambda: torch.mm(left, right)) == said(lambda: torch.mm(left.double(), right.double()))
assert "512x576 and 500x256" in said(lambda: x @ w[:500])          # torch's line, not the library's
print("as it should be")
"""


@has_operator
@pytest.mark.parametrize(
    "text, capability, slow",
    [(AMD, "AVX512", True), (AMD, "AVX512_BF16", True), (AMD, "AVX2", False), (INTEL, "AVX512", False),
        (None, "AVX512", False)],
)
def test_only_where_mkl_is_slow(monkeypatch, tmp_path, text, capability, slow):
    if text: (tmp_path/"cpuinfo").write_text(text)
    monkeypatch.setattr(products, "CPUINFO", tmp_path/"cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for of in (torch.backends.mkl, torch.backends.mkldnn): monkeypatch.setattr(of, "is_available", lambda: True)
    assert products.mkl_is_slow() == slow
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not products.mkl_is_slow()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops, "mkldnn", object())                  # a torch without the operator
    assert not products.mkl_is_slow()


@has_operator
def test_the_kernel_changes_the_order_of_sums_and_nothing_else():
    done = run(ROOT, sys.executable, "-c", FORCED, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), PYTHONWARNINGS="default")
    assert done.returncode == 0 and done.stdout == "as it should be\n", done.stdout + done.stderr
    assert "kernel" not in done.stderr and "Warning" not in done.stderr, done.stderr


@has_operator
def test_only_rcid_in_a_shell_takes_another_kernel():
    "Called from a notebook, `rcid compare` and `rcid map` leave the process as it was."
    code = """
import rcid.core.products as products
from rcid.pipeline.command_line import main
import sys
products.mkl_is_slow = lambda: True
words = ["map", "/no/such/model", "--unfiltered"]
assert main(words) == 2 and products._library is None
sys.argv[1:] = words
assert main() == 2 and products._library is not None
"""
    done = run(ROOT, sys.executable, "-c", code, PYTHONPATH=str(ROOT))
    assert done.returncode == 0 and done.stderr.count("/no/such/model") == 2, done.stdout + done.stderr


def test_a_user_s_process_keeps_its_kernel():
    call = re.compile(r"^\s*(if own: )?use_onednn\(\)", re.M)
    files = [file for file in (ROOT/"rcid").rglob("*.py") if call.search(file.read_text())]
    said = f"only a process of ours may take another kernel: {files}"
    assert files == [ROOT/"rcid"/"pipeline"/"command_line.py"], said


def test_stages_of_wide_models_use_it():
    "All that load a model, but for those whose models are tiny: they have nothing to win."
    loading, using = set(), set()
    for file in sorted((ROOT/"nbs"/"experiments").glob("*.ipynb")):
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        if re.search(r"\bload_(model|latent)\(", code): loading.add(file.stem)
        if "use_onednn()" in code.split("\n"): using.add(file.stem)
    assert using and loading - using == TINY and using <= loading, (loading - using, using - loading)
