"""One trainer for every method: it learns, it resumes bit for bit, and it touches nothing but the student."""
import ast, json, shutil, sys
from dataclasses import dataclass, fields, replace
from functools import partial
import pytest, torch
from conftest import ROOT, run
from rcid.causal import Site
from rcid.core import load_params, read_json
from rcid.core.params import Distill
from rcid.data import load_pairs
from rcid.distill import (
    METHODS,
    RCID,
    DistillConfig,
    Method,
    PairMethod,
    SignalRequest,
    distill,
    get_method,
    model_hash,
    plain_distill,
    random_sites,
    run_cost,
    teacher_targets,
)
from rcid.distill import teacher_cache
from rcid.distill.method import Signals
from rcid.distill.training import _hooks_outside
from rcid.models import shrink

SITES = (Site(0, "s2"), Site(1, "end"), Site(2, "end"))
CONFIG = DistillConfig(
    sites=SITES, layer_map={0: 0, 1: 0, 2: 1, 3: 1}, steps=12, batch=16, lr=3e-3, log_every=1, checkpoint_every=4
)


@pytest.fixture(scope="module")
def toy(make_model, tokenizers):
    "A random teacher (four layers) and sixteen pairs."
    return make_model("qwen3", d_model=32, heads=2, kv_heads=1, d_mlp=64), load_pairs(
        "ioi", tokenizers["qwen3"], split="train", n=16
    )


def train(toy, method, config=CONFIG, **kw):
    teacher, pairs = toy
    return distill(shrink(teacher, 2), teacher, pairs, method, config, **kw)


# a random teacher has no gap, which `effect_match` divides by: tests/test_moving.py has one that answers
@pytest.mark.parametrize("method", [m for m in METHODS if m != "effect_match"])
def test_every_method_learns(toy, method):
    before = {n: p.clone() for n, p in shrink(toy[0], 2).state_dict().items()}
    result = train(toy, method)
    # both parts, also where the second one starts later
    def own(h): return h["kl"] + h.get("method_loss", 0)
    first, last = result.history[1], result.history[-1]
    assert [h["step"] for h in result.history] == list(range(13))
    assert own(last) < own(first) and last["kl"] < first["kl"]
    moved = {n for n, p in result.student.state_dict().items() if not torch.equal(p, before[n])}
    # embeddings are frozen
    assert moved and all(n.startswith("model.layers.") or n == "model.norm.weight" for n in moved)
    assert result.tokens > 0 and result.flops > 0
    assert ("method_loss" in last) == (get_method(method).reads != "nothing" or get_method(method).draws > 0)
    if get_method(method).reads == "sites" and isinstance(get_method(method), RCID):
        assert last["method_loss"] >= last["floor"] - 1e-5


@pytest.mark.parametrize("kl_at", ("answer", "all"))
@pytest.mark.parametrize("method", ("standard_kd", "standard_kd_pairs", "fitnets", "informed_fitnets", "rcid"))
def test_cached_targets_equal_the_plain_loop(toy, method, kl_at):
    config = replace(CONFIG, steps=4, batch=6, lr=1e-3, kl_at=kl_at)
    fast = [h["loss"] for h in train(toy, method, config).history][1:]
    slow = plain_distill(shrink(toy[0], 2), *toy, method, config)
    assert fast == pytest.approx(slow, abs=1e-4) and len(set(slow)) == len(slow)


def test_targets_are_read_back_and_damage_is_noticed(toy, tmp_path, monkeypatch):
    teacher, pairs = toy
    request = SignalRequest(corrupt=True, sites=SITES)
    # out of the mapped file, which is damaged below
    first = {k: v.clone() for k, v in teacher_targets(teacher, pairs, request, tmp_path).items()}
    (file,) = tmp_path.iterdir()
    def refuse(*_): raise AssertionError("the teacher ran again")
    monkeypatch.setattr(teacher_cache, "_code_hash", lambda code=teacher_cache._code_hash(): code)
    # not by a hook: a teacher with hooks is another one, and is never looked up
    monkeypatch.setattr(teacher_cache, "hidden_signals", refuse)
    again = teacher_targets(teacher, pairs, request, tmp_path)
    monkeypatch.undo()
    assert first.keys() == again.keys() and all(torch.equal(first[k], again[k]) for k in first)
    blob = bytearray(file.read_bytes()); blob[-5] ^= 0x40; file.write_bytes(blob)
    again = teacher_targets(teacher, pairs, request, tmp_path)
    assert all(torch.equal(first[k], again[k]) for k in first)


@pytest.mark.parametrize("kl_at", ("answer", "all"))
def test_recomputed_activations_and_buckets_change_no_loss(toy, kl_at):
    config = replace(CONFIG, steps=4, batch=6, lr=1e-3, kl_at=kl_at)
    losses = lambda **kw: [h["loss"] for h in train(toy, "rcid", replace(config, **kw)).history]
    assert losses(checkpoint_gradients=True) == pytest.approx(losses(), abs=1e-6)
    # one batch holds all pairs: an order inside it is all that buckets can change
    whole = dict(steps=2, batch=16)
    assert losses(buckets=2, **whole) == pytest.approx(losses(**whole), abs=1e-5)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float16, 2e-3), (torch.bfloat16, 1e-2)))
def test_targets_in_sixteen_bits(toy, tmp_path, dtype, tolerance):
    request = SignalRequest(corrupt=True, sites=SITES)
    half = teacher_targets(*toy, request, tmp_path/"half", dtype=dtype)
    whole = teacher_targets(*toy, request, tmp_path/"whole")
    def size(name): return sum(f.stat().st_size for f in (tmp_path/name).iterdir())
    assert size("half") < 0.6 * size("whole")
    for k in whole:
        assert half[k].dtype == dtype and torch.allclose(half[k].float(), whole[k], rtol=tolerance, atol=1e-4)


def test_kept_targets_are_mapped_and_belong_to_model_data_and_code(toy, tmp_path, monkeypatch):
    teacher, pairs = toy
    request, names = SignalRequest(corrupt=True), lambda: {f.name for f in tmp_path.iterdir()}
    teacher_targets(teacher, pairs, request, tmp_path)
    kept = teacher_targets(teacher, pairs, request, tmp_path)
    (first,) = names()
    # `kept` is alive: its rows stay on disk until they are used
    if sys.platform == "linux": assert first in open("/proc/self/maps").read() and kept
    for change in (
        lambda: teacher_targets(teacher, pairs[:8], request, tmp_path),
        lambda: teacher_targets(teacher, pairs, SignalRequest(), tmp_path),
        lambda: teacher_targets(shrink(teacher, 2), pairs, request, tmp_path),
        lambda: teacher_targets(teacher, pairs, request, tmp_path, dtype=torch.bfloat16),
    ):
        before = names(); change(); assert len(names() - before) == 1
    monkeypatch.setattr(teacher_cache, "_code_hash", lambda: "other code")
    before = names(); teacher_targets(teacher, pairs, request, tmp_path); assert len(names() - before) == 1


@pytest.mark.parametrize("method", ("standard_kd", "fitnets", "rcid"))
def test_teacher_is_untouched(toy, method):
    teacher, pairs = toy
    state = lambda: (
        model_hash(teacher),
        [p.requires_grad for p in teacher.parameters()],
        teacher.training,
        sum(len(m._forward_hooks) for m in teacher.modules()),
    )
    before, rows = state(), pairs.content_hash()
    train(toy, method, replace(CONFIG, steps=2))
    assert state() == before and pairs.content_hash() == rows and all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("method", ("standard_kd_pairs", "fitnets", "informed_fitnets", "rcid", "rcid_warmup"))
def test_resume_is_bit_exact(toy, tmp_path, method, capsys):
    whole = train(toy, method)
    def trip(student, step):
        if step == 10: raise KeyboardInterrupt
        return {}
    config = replace(CONFIG, checkpoint_dir=str(tmp_path/"run"))
    with pytest.raises(KeyboardInterrupt): train(toy, method, config, probe=trip)
    assert read_json(tmp_path/"run"/"progress.json")["step"] == 8
    resumed = train(toy, method, config)
    assert "resumed from step 8 of 12" in "".join(capsys.readouterr())
    assert model_hash(resumed.student) == model_hash(whole.student) and not (tmp_path/"run").exists()
    assert [h["step"] for h in resumed.history] == [h["step"] for h in whole.history]
    for a, b in zip(resumed.history, whole.history): assert a == pytest.approx(b, rel=1e-7)


def test_checkpoint_of_another_run_is_not_taken(toy, tmp_path, capsys):
    def trip(student, step):
        if step == 6: raise KeyboardInterrupt
        return {}
    config = replace(CONFIG, checkpoint_dir=str(tmp_path/"run"))
    with pytest.raises(KeyboardInterrupt): train(toy, "standard_kd", config, probe=trip)
    other = replace(config, lr=1e-3)
    alone = train(toy, "standard_kd", replace(other, checkpoint_dir=None))
    assert model_hash(train(toy, "standard_kd", other).student) == model_hash(alone.student)
    assert "resumed" not in "".join(capsys.readouterr())


def test_nan_stops_and_keeps_the_checkpoint(toy, tmp_path):
    def poison(student, step):
        if step == 6: student.model.norm.weight.data.fill_(float("nan"))
        return {}
    message = r"loss is nan at step 6 .*lower distill\.lr; the last good checkpoint is in"
    with pytest.raises(FloatingPointError, match=message) as e:
        train(toy, "rcid", replace(CONFIG, checkpoint_dir=str(tmp_path/"run")), probe=poison)
    assert "\n" not in str(e.value) and read_json(tmp_path/"run"/"progress.json")["step"] == 4


@pytest.mark.parametrize("method", ("informed_fitnets", "rcid", "rcid_identity", "rcid_random_w"))
def test_frozen_map_has_no_gradient(method):
    g = torch.Generator().manual_seed(0)
    def signal():
        sites = torch.randn(3, 20, 8, generator=g, requires_grad=True)
        return Signals(sites=sites, sites_corrupt=torch.randn(3, 20, 8, generator=g))
    s, t, m = signal(), signal(), METHODS[method]
    state = m.start(s, t, 0)
    m.loss(s, t, state)[0].backward()
    assert not list(state.parameters()) and state.w.grad is None and not state.w.requires_grad
    assert s.sites.grad.abs().sum() > 0


def test_a_method_is_refused_that_would_be_ignored(toy):
    with pytest.raises(TypeError, match="Untyped.reads is a field"):
        class Untyped(PairMethod): reads = "sites"
    with pytest.raises(ValueError, match="a budget of FLOPs is for methods that learn from pairs"):
        train(toy, Method(), replace(CONFIG, flops=1e12))
    with pytest.raises(ValueError, match="Unexpected keyword"): DistillConfig(learning_rate=1e-3)
    with pytest.raises(ValueError, match="kl_at"): replace(CONFIG, kl_at="everywhere")


def test_the_settings_of_a_run_are_those_of_params(root):
    p = load_params(root/"params.yaml")
    ours = {f.name for f in fields(DistillConfig)}
    assert {f.name for f in fields(Distill)} <= ours
    config = DistillConfig(**vars(p.distill), seed=3)
    assert {k: getattr(config, k) for k in vars(p.distill)} == vars(p.distill) and replace(config, seed=4).seed == 4


def test_frozen_map_stays_through_training(toy):
    kept = []
    @dataclass(frozen=True)
    class Spy(RCID):
        def start(self, student, teacher, seed):
            kept.append(super().start(student, teacher, seed))
            return kept[-1]
    result = train(toy, Spy(), replace(CONFIG, steps=6))
    student, teacher = (Signals(**x) for x in initial(toy))
    assert torch.equal(kept[0].w, METHODS["rcid"].start(student, teacher, 0).w) and result.staleness > 0


def initial(toy):
    "Signals of the undistilled student and of the teacher at the sites, on all pairs."
    teacher, pairs = toy
    for model, layers in ((shrink(teacher, 2), CONFIG.layer_map), (teacher, {i: i for i in range(4)})):
        sites = tuple(Site(layers[s.layer], s.role) for s in SITES)
        h = teacher_targets(model, pairs, SignalRequest(corrupt=True, sites=sites))
        yield {k: h[k].transpose(0, 1) for k in ("sites", "sites_corrupt")}


@pytest.mark.parametrize("kl_at", ("answer", "all"))
@pytest.mark.parametrize(
    "method", ("sft", "standard_kd", "standard_kd_pairs", "fitnets", "informed_fitnets", "rcid", "diito")
)
def test_micro_batches_sum_up_to_the_batch(toy, method, kl_at):
    config = replace(CONFIG, steps=3, batch=10, lr=1e-3, kl_at=kl_at)
    whole = train(toy, method, config)
    for small in (replace(config, micro_batch=4), replace(config, micro_batch=4, checkpoint_gradients=True)):
        parts = train(toy, method, small)
        for a, b in zip(parts.history, whole.history): assert a == pytest.approx(b, abs=2e-5)
        other = parts.student.state_dict()
        assert all(torch.allclose(p, other[n], atol=2e-4) for n, p in whole.student.state_dict().items())


def test_a_hook_is_outside_of_what_is_recomputed():
    "Also where transformers hands over a layer's call with its hooks (5.17): the hook is gone by the backward pass."
    layer, x = torch.nn.Linear(3, 3), torch.randn(2, 3)
    def gradient(run):
        layer.weight.grad, calls = None, []
        hook = layer.register_forward_hook(lambda module, args, out: calls.append(1) or out * out.exp())
        y = run(x)
        hook.remove()
        y.sum().backward()
        assert len(calls) == 1 and "forward" not in vars(layer)
        return layer.weight.grad
    assert torch.equal(gradient(lambda x: _hooks_outside(partial(layer.__call__), x)), gradient(layer))
    with pytest.raises(RuntimeError): _hooks_outside(partial(layer.__call__), torch.randn(2, 4))
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("method", ("cka", "rcid_shuffled"))
def test_methods_that_compare_pairs_need_the_whole_batch(toy, method):
    with pytest.raises(ValueError, match="compares the pairs of a batch.*micro_batch"):
        train(toy, method, replace(CONFIG, micro_batch=4))


def test_equal_flops_buy_more_of_a_cheaper_step(toy):
    teacher, pairs = toy
    student = shrink(teacher, 2)
    budget = run_cost(student, teacher, pairs, "standard_kd_pairs", CONFIG)[1]
    steps = {}
    for method in ("standard_kd_pairs", "standard_kd", "sft", "rcid"):
        result = train(toy, method, replace(CONFIG, steps=1, flops=budget))
        one_more = run_cost(student, teacher, pairs, method, replace(CONFIG, steps=result.steps + 1))[1]
        assert result.flops <= budget < one_more and result.history[-1]["step"] == result.steps
        assert (result.tokens, result.flops) == run_cost(
            student, teacher, pairs, method, replace(CONFIG, steps=result.steps)
        )
        steps[method] = result.steps
    assert steps["standard_kd_pairs"] == CONFIG.steps and steps["standard_kd"] == steps["sft"] > CONFIG.steps, steps
    with pytest.raises(ValueError, match="budget of 10 FLOPs does not pay for"):
        train(toy, "rcid", replace(CONFIG, flops=10.0))


def test_refits_follow_the_student(toy, tmp_path):
    """`refit_every` moves W, only where W is fitted; before the first refit nothing differs; a resumed run refits at
    the same steps."""
    once, often = (train(toy, "rcid", replace(CONFIG, refit_every=n)) for n in (0, 5))
    assert once.history[:6] == often.history[:6] and once.history[6:] != often.history[6:]
    assert often.flops > once.flops and 0 < often.staleness < once.staleness
    for method in ("standard_kd", "fitnets", "rcid_identity"):
        assert model_hash(train(toy, method).student) == model_hash(
            train(toy, method, replace(CONFIG, refit_every=5)).student
        ), method
    def trip(student, step):
        if step == 9: raise KeyboardInterrupt
        return {}
    config = replace(CONFIG, refit_every=5, checkpoint_dir=str(tmp_path/"run"))
    with pytest.raises(KeyboardInterrupt): train(toy, "rcid", config, probe=trip)
    assert model_hash(train(toy, "rcid", config).student) == model_hash(often.student)


def test_random_sites_are_beside_the_causal_ones(make_model, tokenizers):
    teacher, pairs = make_model("qwen3", layers=8, d_model=32, heads=2, kv_heads=1, d_mlp=64), load_pairs(
        "ioi", tokenizers["qwen3"], split="train", n=16
    )
    causal = [Site(0, "s2"), Site(3, "s2"), Site(2, "end"), Site(5, "end")]
    drawn = [random_sites(teacher, pairs, causal, seed) for seed in range(40)]
    for sites in drawn:
        assert sorted(s.role for s in sites) == ["end", "end", "s2", "s2"] and len(set(sites)) == 4
        assert not set(sites) & {*causal, Site(7, "end")}
    assert drawn[3] == random_sites(teacher, pairs, causal, 3) and len({tuple(s) for s in drawn}) > 20
    assert {s.layer for sites in drawn for s in sites} == set(range(8))
    # before the change there is no difference
    assert {s.role for s in random_sites(teacher, pairs, [*causal, Site(4, "io"), Site(4, "s1")], 0)} == {"s2", "end"}
    with pytest.raises(ValueError, match="no site beside"):
        random_sites(teacher, pairs, [Site(l, "end") for l in range(7)], 0)


@pytest.mark.parametrize("module", ("trainer", "objective", "config"))
def test_trainer_never_asks_which_method_it_is(root, module):
    tree = ast.parse((root/"rcid"/"distill"/f"{module}.py").read_text(encoding="utf-8"))
    named, asked = [], []
    for n in ast.walk(tree):
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and n.value in METHODS: named.append(n.value)
        if isinstance(n, ast.Call) and ast.unparse(n.func) in ("isinstance", "type"):
            if ast.unparse(n.args[0]) in ("method", "self.method"): asked.append(ast.unparse(n))
    assert not named and not asked, f"give the method object an attribute instead: {named + asked}"


PARALLEL = """
import json, sys
from accelerate import PartialState
from rcid.causal import Site
from rcid.core import seed_all
from rcid.data import load_pairs
from rcid.distill import DistillConfig, distill
from rcid.distill.teacher_cache import model_hash
from rcid.models import load_model, shrink
seed_all(0)
teacher, tok = load_model(dict(arch="llama", layers=4, d_model=32, heads=2, kv_heads=1, d_mlp=64,
    tokenizer=sys.argv[1]))
pairs = load_pairs("ioi", tok, split="train", n=24)
c = DistillConfig(sites=(Site(1, "s2"), Site(2, "end")), layer_map={0: 0, 1: 0, 2: 1, 3: 1}, steps=6, batch=8,
    lr=3e-3, log_every=1)
r = distill(shrink(teacher, 2), teacher, pairs, "rcid_identity", c)
state = PartialState()
json.dump(dict(n=state.num_processes, loss=[h["loss"] for h in r.history], hash=model_hash(r.student)),
    open(f"{sys.argv[2]}-{state.process_index}.json", "w"))
if state.num_processes > 1: state.destroy_process_group()
"""


def test_two_processes_train_like_one(tmp_path, tokenizers):
    folder = ROOT/"artifacts"/"test-parallel"                               # model specs must lie inside the workspace
    try:
        tokenizers["llama"].save_pretrained(folder)
        (tmp_path/"job.py").write_text(PARALLEL)
        words = [str(tmp_path/"job.py"), "artifacts/test-parallel"]
        run(ROOT, sys.executable, *words, str(tmp_path/"one"))
        run(
            ROOT,
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            *words,
            str(tmp_path / "two"),
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    one, a, b = (json.loads((tmp_path/f"{n}.json").read_text()) for n in ("one-0", "two-0", "two-1"))
    assert (one["n"], a["n"], b["n"]) == (1, 2, 2) and a["hash"] == b["hash"] and a["loss"] == b["loss"]
    assert a["loss"] == pytest.approx(one["loss"], abs=1e-5)
