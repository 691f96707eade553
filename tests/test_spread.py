"""A model on several devices: what can be seen on one. What is measured there, in tests/fakegpu/several_devices.py."""
from types import SimpleNamespace
import accelerate, pytest, torch
from accelerate.hooks import SequentialHook
from torch.utils._python_dispatch import TorchDispatchMode
from rcid.causal import causal_effects, score_sites
from rcid.causal.window import Window
from rcid.core import hardware
from rcid.core.hardware import pick_device
from rcid.distill.teacher_cache import SignalRequest, hidden_signals
from rcid.eval import task_accuracy
from rcid.kv import forward_kv
from rcid.models import get_adapter, load_model, model_device, save_model
from rcid.models import before_loading, spread as module
from rcid.models.spread import check_spread, devices_for, options_of, spread
from rcid.models.weights import device_of

CUDA = torch.device("cuda", 1)                   # a name; nothing is put there
SPEC = dict(arch="qwen3", layers=3)


class Moves(TorchDispatchMode):
    "Copies that only put a tensor on a device; those into another number format do not count."
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in (None, args[0].dtype):
            self.seen.append(args)
        return func(*args, **kwargs)


@pytest.mark.parametrize("arch", ("llama", "qwen3"))
def test_on_one_device_nothing_is_moved(models, pairs, arch):
    model, some = models[arch], pairs[arch]["unequal"]
    with Moves() as moves:
        causal_effects(model, some)
        score_sites(model, some, "atp")
        task_accuracy(model, some)
        hidden_signals(model, some, SignalRequest(corrupt=True))
        forward_kv(model, some.clean_ids, queries=True, pre_rope=True)
    assert moves.seen == []
    with Moves() as moves: some.clean_ids.to("meta")
    assert len(moves.seen) == 1


def test_a_window_elsewhere_is_the_same_window():
    w = Window(torch.tensor([0, 1]), torch.tensor([2, 4]), 4, {None: (torch.zeros(5, 2),) * 2}, torch.zeros(1))
    meta = torch.device("meta")
    there = w.on(meta)
    assert w.on(torch.device("cpu")) is w and w.on(meta) is there and there.on(meta) is there
    for name in ("pair", "start", "slots", "positions", "mask"):
        one, two = getattr(w, name), getattr(there, name)
        assert two.device == meta and (one.shape, one.dtype) == (two.shape, two.dtype)
    assert there.past == w.past and there.mask_of(2).device == there.rotations[None][0].device == meta
    assert w.mask_of(2).device == w.mask.device == torch.device("cpu")
    assert there.before([torch.zeros(2, 6, 1, 2, device=meta)] * 2, 1).before[0].shape == (1, 1, w.past, 2)


# where a part is

def hooked(part: torch.nn.Module, *devices) -> torch.nn.Module:
    "A part as accelerate leaves it between two forwards: its weights elsewhere, hooks that know where it computes."
    hooks = [accelerate.hooks.AlignDevicesHook(execution_device=d) for d in devices]
    part._hf_hook = hooks[0] if len(hooks) == 1 else SequentialHook(*hooks)
    return part.to("meta")


@pytest.mark.parametrize("devices", ((CUDA,), ("cuda:1",), (None, CUDA)))
def test_where_a_part_computes(devices):
    model, _ = load_model(SPEC, device="cpu")
    a = get_adapter(model)
    hooked(a.layers[1], *devices)
    assert get_adapter(model).devices == [torch.device("cpu"), CUDA, torch.device("cpu")]
    assert model_device(model) == a.home == torch.device("cpu")
    with pytest.raises(ValueError, match=r"no weights \(device meta\)"): device_of(a.layers[0].to("meta"))


# which devices

@pytest.mark.parametrize("device, words", (
    ({}, "names no part of the model"), ({"": "gpu0"}, "unknown device 'gpu0': use cpu, cuda or cuda:1"),
    ({"": "disk"}, "unknown device 'disk'"), ({"": 7}, "no device cuda:7 here: torch sees"),
))
def test_devices_that_are_not_there(device, words, tmp_path):
    for spec in (SPEC, {"path": tmp_path}):
        with pytest.raises(ValueError, match=words) as e: load_model(spec, device=device)
        assert "\n" not in str(e.value)


def test_a_part_without_a_device_and_one_that_is_not_there(tmp_path):
    model, tokenizer = load_model(SPEC, dtype="float32", device="cpu")
    save_model(model, tokenizer, tmp_path/"m")
    known = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    for device, why in (
        (known, "no device for model.layers.0.self_attn.q_proj.weight"),
        ({"": "cpu", "modell": "cpu"}, "no part 'modell'"),
    ):
        for spec in (SPEC, {"path": tmp_path/"m"}):
            with pytest.raises(ValueError, match=f"cannot be spread over these devices: .*{why}; name every") as e:
                load_model(spec, dtype="float32", device=device)
            assert "\n" not in str(e.value)


@pytest.mark.parametrize("how", ("layer", "head"))
def test_what_belongs_together_is_on_one_device(how):
    model, _ = load_model(SPEC, device="cpu")
    assert check_spread(model, "auto") is model
    if how == "layer": hooked(model.model.layers[2].mlp.up_proj, CUDA)
    else: model.lm_head._hf_hook = SimpleNamespace(execution_device=CUDA)
    words = dict(layer="layer 2 would be on cpu and cuda:1: name a device for whole layers",
                 head="the LM head is the embedding of this model: name the same device for both")
    with pytest.raises(ValueError, match=words[how]): check_spread(model, "auto")


# auto

def cards(monkeypatch, *free: float):
    "As if torch saw cards with so many GB free each, beside a CPU with ten."
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i=0: (int(free[i] * 1e9), int(2e9 * free[i])))
    for m in (module, before_loading, hardware): monkeypatch.setattr(m, "free_memory", lambda: 10.0)


def test_auto_is_the_cpu_where_there_is_no_card(monkeypatch, tmp_path):
    cards(monkeypatch)
    monkeypatch.setenv("RCID_DEVICE", "auto")
    assert pick_device() == pick_device("auto") == "cpu" and devices_for(None) == ("cpu", "cpu")
    assert options_of(devices_for(None)[0]) == {}
    ids = torch.arange(12).view(2, 6)
    (auto, _), (plain, _) = (load_model(SPEC, device=device) for device in (None, "cpu"))
    assert torch.equal(auto(ids).logits, plain(ids).logits) and not any(hasattr(m, "_hf_hook") for m in auto.modules())


def test_auto_leaves_room_on_each_card(monkeypatch):
    cards(monkeypatch, 10.0, 20.0)
    monkeypatch.setenv("RCID_DEVICE", "auto")
    assert devices_for(None) == ("auto", "auto") and hardware.pick_dtype(None, "auto") is torch.bfloat16
    most = {0: 7 * 10**9, 1: 14 * 10**9, "cpu": 7 * 10**9}
    assert options_of("auto") == dict(device_map="sequential", max_memory=most)
    assert before_loading.free_bytes() == 28 * 10**9


@pytest.mark.parametrize("free, used", (((1.0, 1.0), {0}), ((4e-4, 1.0), {0, 1}), ((4e-4, 4e-4), {0, 1, "cpu"})))
def test_auto_takes_the_first_card_alone_if_it_can(monkeypatch, free, used):
    model, _ = load_model(SPEC | dict(layers=6), dtype="float32", device="cpu")
    cards(monkeypatch, *free)
    found = []
    monkeypatch.setattr(accelerate, "dispatch_model", lambda model, places, **how: found.append(places) or model)
    spread(model, "auto")
    places, = found
    assert set(places.values()) == used
    assert all(name.count(".") <= 2 for name in places)                    # whole layers
