"""The identities of patching (nbs/03_causal/01_effects.ipynb states them), and the fast path against the reference."""
import re
import pytest, torch
from conftest import ARCHS, real
from rcid.causal import Site, all_positions, answer_logit_diff, causal_effects, naive_effects, read, write
from rcid.causal.effects import first_difference, run_logit_diff
from rcid.models import get_adapter, load_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MODES, LENGTHS = ("noising", "denoising"), ("equal", "unequal")
PATHS = {"fast": causal_effects, "naive": naive_effects}


@pytest.fixture(params=ARCHS)
def model(request, models): return models[request.param]


@pytest.fixture(params=LENGTHS)
def some(request, model, pairs): return pairs[get_adapter(model).family][request.param]


@pytest.fixture(params=MODES)
def mode(request): return request.param


def close(a, b, scale, share=1e-4): return float((a - b).abs().max()) <= share * float(scale)


def hooks(model): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_lengths_are_what_they_say(pairs):
    for both in pairs.values():
        assert (
            len(both["equal"].attention_mask.sum(1).unique()) == 1 < len(both["unequal"].attention_mask.sum(1).unique())
        )


def test_fast_equals_naive(model, some, mode):
    want, scale = naive_effects(model, some, mode=mode), answer_logit_diff(model, some)[0].abs().mean()
    assert want.abs().max() > 1e-3 * scale                                 # there is something to agree about
    for batch_size in (1, 3, None):
        assert close(causal_effects(model, some, mode=mode, batch_size=batch_size), want, scale), batch_size
    assert close(naive_effects(model, some[:2], mode=mode, batch_size=1), want[:2], scale)


def test_fast_equals_naive_at_every_position(model, some, mode):
    few, scale = some[:2].trimmed(), answer_logit_diff(model, some)[0].abs().mean()
    sites = all_positions(model, few)
    assert close(causal_effects(model, few, sites, mode=mode), naive_effects(model, few, sites, mode=mode), scale)


def test_bfloat16_is_as_close_to_float32_as_the_oracle_is(model, some, mode):
    half = type(model)(model.config).to(torch.bfloat16).eval()
    half.load_state_dict(model.state_dict())
    want, scale = naive_effects(model, some, mode=mode), answer_logit_diff(model, some)[0].abs().mean()
    off = [
        float((effects(half, some, mode=mode) - want).abs().max() / scale)
        for effects in (naive_effects, causal_effects)
    ]
    assert 0 < off[1] <= 3 * off[0] + 0.01


class LiveBytes(TorchDispatchMode):
    "Bytes of the tensors that operations make and that are alive at the same time, parameters aside."
    def __init__(self, model):
        super().__init__()
        self.old, self.live, self.peak = (
            {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())},
            {},
            0,
        )
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.live = {k: x for k, x in self.live.items() if not x[0].expired()}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.old:
                self.live[t.untyped_storage()._cdata] = (
                    StorageWeakRef(t.untyped_storage()),
                    t.untyped_storage().nbytes(),
                )
        self.peak = max(self.peak, sum(n for _, n in self.live.values()))
        return out


@pytest.mark.parametrize(
    "attention, dtype", (("sdpa", torch.float32), ("eager", torch.float32), ("sdpa", torch.bfloat16))
)
def test_sweep_keeps_to_its_memory(model, pairs, attention, dtype):
    other = type(model)(model.config).to(dtype).eval()
    other.load_state_dict(model.state_dict()), other.set_attn_implementation(attention)
    some = pairs[get_adapter(model).family]["unequal"][:3].trimmed()
    sites = all_positions(other, some)[::3]
    # also: from now on the engine knows the model
    free = causal_effects(other, some, sites)
    def peak(memory):
        with LiveBytes(other) as live: got = causal_effects(other, some, sites, memory=memory)
        assert torch.allclose(got, free, atol=1e-5 if dtype == torch.float32 else 0.1)
        return live.peak
    unbound = peak(2**30)
    with pytest.raises(ValueError, match="raise memory") as e: causal_effects(other, some, sites, memory=1000)
    least = int(re.search(r"needs (\d+)", str(e.value))[1])
    peaks = {memory: peak(memory) for memory in (least, 2 * least)}
    assert all(got <= memory for memory, got in peaks.items()), peaks
    assert peaks[least] < unbound


@pytest.mark.parametrize("path", PATHS)
def test_identities_of_places(model, some, mode, path):
    last, roles = get_adapter(model).n_layers - 1, some.roles
    effects = PATHS[path](model, some, mode=mode).view(len(some), last + 1, -1)
    clean, corrupt = answer_logit_diff(model, some)
    first = first_difference(some)
    assert (first == some.key_positions["s2"]).all()                       # by design the corruption changes S2 only
    for j, role in enumerate(roles):
        if (some.key_positions[role] < first).all():
            assert (effects[:, :, j] == 0).all(), f"{role} lies before the corruption"
        if role != "end": assert (effects[:, last, j] == 0).all(), f"{role} of the last layer cannot reach the answer"
    assert close(effects[:, last, roles.index("end")], clean - corrupt, (clean - corrupt).abs().mean())
    assert {"io", "s1"} <= {r for r in roles if (some.key_positions[r] < first).all()} and (
        some.key_positions["end"] == some.answer_pos
    ).all()


def test_whole_layer_reproduces_the_other_run(model, some, mode):
    clean, corrupt = answer_logit_diff(model, some)
    base, source, want = (
        (some.clean_ids, some.corrupt_ids, corrupt) if mode == "noising" else (some.corrupt_ids, some.clean_ids, clean)
    )
    with torch.no_grad():
        for layer in range(get_adapter(model).n_layers):
            value = read(model, source, [Site(layer)], some.attention_mask)
            with write(model, value): assert close(run_logit_diff(model, base, some), want, want.abs().mean())


@pytest.mark.parametrize("path", PATHS)
def test_own_value_changes_nothing(model, some, mode, path):
    from dataclasses import replace
    same = replace(some, corrupt_ids=some.clean_ids)
    scale = answer_logit_diff(model, some)[0].abs().mean()
    assert close(PATHS[path](model, same, mode=mode), torch.zeros(()), scale)
    assert not close(PATHS[path](model, some, mode=mode), torch.zeros(()), scale)


def test_reading_and_patching_leave_nothing_behind(model, some):
    before, state = hooks(model), {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad(): logits = model(some.clean_ids, attention_mask=some.attention_mask).logits
    causal_effects(model, some), naive_effects(model, some[:2]), read(model, some.clean_ids, [Site(0)])
    with pytest.raises(ZeroDivisionError):
        with write(model, {Site(0, 2): torch.ones(get_adapter(model).d_model)}): 1/0
    with torch.no_grad(): again = model(some.clean_ids, attention_mask=some.attention_mask).logits
    assert hooks(model) == before and torch.equal(logits, again)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_logit_difference_is_float32(model, some):
    half = type(model)(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    assert answer_logit_diff(half.eval(), some)[0].dtype == torch.float32 == causal_effects(half, some[:2]).dtype


def test_residual_is_taken_before_the_final_norm(model, some):
    a, last = get_adapter(model), get_adapter(model).n_layers - 1
    with torch.no_grad():
        out = model(some.clean_ids, attention_mask=some.attention_mask, output_hidden_states=True)
        h = read(model, some.clean_ids, [Site(last)], some.attention_mask)[Site(last)]
        real = some.attention_mask.bool()
        assert torch.allclose(a.final_norm(h)[real], out.hidden_states[-1][real], atol=1e-5) and not torch.allclose(
            h[real], out.hidden_states[-1][real], atol=1e-2
        )


@pytest.mark.slow
@pytest.mark.parametrize("mode_", MODES)
def test_real_weights(mode_):
    from rcid.data import load_pairs
    model, tokenizer = load_model({"path": str(real("SmolLM2"))}, dtype="float32", device="cpu")
    few = load_pairs("ioi", tokenizer, n=4).trimmed()
    n = get_adapter(model).n_layers
    sites = [Site(l, r) for l in (0, n//2, int(.7*n), n - 1) for r in ("s2", "end")] + [Site(n//2, "io")]
    clean, corrupt = answer_logit_diff(model, few)
    want = naive_effects(model, few, sites, mode=mode_)
    for batch_size in (1, None):
        assert close(
            causal_effects(model, few, sites, mode=mode_, batch_size=batch_size), want, clean.abs().mean(), 1e-3
        )
    assert (want[:, -1] == 0).all() and close(
        want[:, sites.index(Site(n - 1, "end"))], clean - corrupt, clean.abs().mean(), 1e-3
    )
