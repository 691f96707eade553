"""A model that is copied, cast, loaded or offloaded computes as the one it came from, or one line says why not."""
import copy
from pathlib import Path
import pytest, torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from rcid.align.cka import layer_cka
from rcid.causal import causal_effects, naive_effects, read, score_sites, Site
from rcid.distill import SignalRequest, model_hash, teacher_targets
from rcid.eval import perplexity, task_accuracy
from rcid.eval.decode import greedy_decode
from rcid.kv import LatentModel, forward_kv
from rcid.models import get_adapter, load_model, save_model, shrink, to_qwen3

SCALINGS = {
    "default": None, "linear": dict(rope_type="linear", factor=2.), "dynamic": dict(rope_type="dynamic", factor=2.),
    "yarn": dict(rope_type="yarn", factor=2., original_max_position_embeddings=256),
    "llama3": dict(rope_type="llama3", factor=8., low_freq_factor=1., high_freq_factor=4.,
        original_max_position_embeddings=256)}
CASES = [(arch, "default") for arch in ("llama", "qwen2", "qwen3")] + [("llama", s) for s in list(SCALINGS)[1:]]


def loaded(folder, arch="llama", dtype=torch.bfloat16, **spec):
    "A model as a checkpoint gives it: float32 on disk, read by `from_pretrained`."
    model, tokenizer = load_model({"arch": arch, "layers": 3, **spec}, dtype="float32", device="cpu")
    save_model(model, tokenizer, folder)
    return load_model({"path": str(folder)}, dtype=dtype, device="cpu")[0]


def text(rows, n=24):
    "Token ids that are always the same."
    return torch.randint(3, 200, (rows, n), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, n=16): return model(text(2, n)).logits


@pytest.mark.parametrize("arch, scaling", CASES)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_a_copy_with_all_layers_is_the_teacher(tmp_path, arch, scaling, dtype):
    teacher = loaded(tmp_path/"m", arch, dtype, rope=SCALINGS[scaling])
    before = model_hash(teacher)
    student = shrink(teacher, 3)
    for n in (16, 600): assert torch.equal(logits(student, n), logits(teacher, n)), n
    assert student.dtype == dtype and model_hash(teacher) == before


def test_a_copy_is_of_the_teacher_as_it_is_now(tmp_path):
    "Frequencies that grew with a long text, another attention, a rounded teacher, a dtype of one part, generation."
    grown = loaded(tmp_path/"a", rope=SCALINGS["dynamic"])
    logits(grown, 700)
    assert torch.equal(shrink(grown, 3).model.rotary_emb.inv_freq, grown.model.rotary_emb.inv_freq)
    assert torch.equal(logits(shrink(grown, 3), 600), logits(grown, 600))
    eager = loaded(tmp_path/"b"); eager.set_attn_implementation("eager"); eager.generation_config.max_new_tokens = 7
    student = shrink(eager, 3)
    assert student.config._attn_implementation == "eager" and student.generation_config.max_new_tokens == 7
    assert torch.equal(logits(student, 600), logits(eager, 600))
    rounded = loaded(tmp_path/"c", dtype=torch.float32).to(torch.bfloat16)
    assert torch.equal(logits(shrink(rounded, 3), 600), logits(rounded, 600))
    mixed = loaded(tmp_path/"d"); mixed.lm_head.weight = torch.nn.Parameter(mixed.lm_head.weight.detach().float() * 1.5)
    student = shrink(mixed, 3)
    assert (student.lm_head.weight.dtype, student.model.embed_tokens.weight.dtype) == (torch.float32, torch.bfloat16)
    tied = shrink(loaded(tmp_path/"e"), 2)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight and all(p.requires_grad for p in tied.parameters())


def test_shrinking_draws_no_random_number(tmp_path):
    teacher = loaded(tmp_path/"m")
    torch.manual_seed(0); before = torch.get_rng_state()
    shrink(teacher, 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_new_model_in_sixteen_bits_is_the_rounded_one(tmp_path, scaling):
    "`{arch: ...}` in bfloat16 is what a checkpoint of the same model gives in bfloat16."
    whole = loaded(tmp_path/"m", rope=SCALINGS[scaling])
    new, _ = load_model({"arch": "llama", "layers": 3, "rope": SCALINGS[scaling]}, dtype="bfloat16", device="cpu")
    assert torch.equal(logits(new, 600), logits(whole, 600))


def test_a_converted_model_turns_positions_as_its_original(tmp_path):
    original, ids = loaded(tmp_path/"m"), text(4)
    new, _ = to_qwen3(original, ids)
    at, x = torch.arange(400)[None], torch.zeros(1, dtype=torch.bfloat16)
    for a, b in zip(get_adapter(new).rotary(x, at), get_adapter(original).rotary(x, at)): assert torch.equal(a, b)
    assert new.dtype == torch.bfloat16


def test_scales_are_measured_without_dropout(tmp_path):
    original, ids = loaded(tmp_path/"m", dtype=torch.float32), text(4)
    for layer in original.model.layers: layer.self_attn.attention_dropout = .5
    quiet = to_qwen3(original, ids)[1]
    original.train(); original.model.layers[1].eval()
    before = [m.training for m in original.modules()]
    assert torch.equal(to_qwen3(original, ids)[1], quiet) and [m.training for m in original.modules()] == before


def test_a_student_brought_to_float32_has_exact_positions(tmp_path):
    "What the heal stage does on an accelerator: a teacher in bfloat16, a student of it in float32."
    teacher = loaded(tmp_path/"m")
    whole = shrink(loaded(tmp_path/"n", dtype=torch.float32), 3)
    assert torch.equal(shrink(teacher, 3).float().model.rotary_emb.inv_freq, whole.model.rotary_emb.inv_freq)


class Adapted(torch.nn.Module):
    "A Linear with something beside it."
    def __init__(self, base): super().__init__(); self.base_layer = base
    def forward(self, x): return self.base_layer(x)


def test_a_teacher_with_adapters_is_refused_in_one_line(tmp_path):
    teacher = loaded(tmp_path/"m")
    teacher.model.layers[0].self_attn.q_proj = Adapted(teacher.model.layers[0].self_attn.q_proj)
    with pytest.raises(Exception) as e: shrink(teacher, 3)
    assert isinstance(e.value, ValueError) and "merge its adapters first" in str(e.value) and "\n" not in str(e.value)


# a folder, in any form


def test_a_path_is_a_folder_in_every_form(tmp_path, monkeypatch):
    model = loaded(tmp_path/"home"/"m", dtype=torch.float32)
    monkeypatch.setenv("HOME", str(tmp_path/"home")); monkeypatch.chdir(tmp_path)
    failed = {}
    here = tmp_path/"home"/"m"
    for spec in (here, Path("home/m"), "home/m", "./home/m", "~/m", Path("~/m"), {"path": "~/m"}, {"path": here}):
        try: assert torch.equal(logits(load_model(spec, dtype="float32", device="cpu")[0]), logits(model))
        except (TypeError, OSError, RuntimeError) as e: failed[repr(spec)] = e
    assert not failed


@pytest.mark.parametrize("spec", ("artifacts/models/none/teacher", "./none", "../none", "~/no/model", "/no/model",
    "my models/none", Path("none"), Path("artifacts/none"), {"path": "none"}), ids=repr)
def test_a_folder_that_is_not_there_is_no_hub_id(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path); monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Exception) as e: load_model(spec, device="cpu")
    said = str(e.value)
    assert "no such folder" in said and "make repro" in said and "models@llama" in said and "\n" not in said
    assert isinstance(e.value, FileNotFoundError)


# weights that are not in memory


def offloaded(model, how, folder):
    "A copy of `model` whose weights accelerate keeps elsewhere, and fetches for every forward."
    model = copy.deepcopy(model)
    if how == "cpu": return cpu_offload(model, execution_device="cpu")
    if how == "disk": return disk_offload(model, str(folder), execution_device="cpu")
    places = {"model.embed_tokens": "disk", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "disk"}
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(get_adapter(model).n_layers)}
    return dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def measured(model, pairs, ids):
    "Every kind of measurement: whole forwards, restarts, hooks, gradients, greedy text, kept targets."
    sites = [Site(0, "s2"), Site(2, "end")]
    ones, place = torch.ones_like(ids), Site(1, 3)
    out = dict(effects=causal_effects(model, pairs), naive=naive_effects(model, pairs, sites),
        atp=score_sites(model, pairs, "atp"), norm=score_sites(model, pairs, "norm"),
        read=read(model, ids, [place])[place],
        accuracy=task_accuracy(model, pairs), perplexity=perplexity(model, ids.flatten(), window=16, stride=8),
        cka=layer_cka(model, model, [dict(input_ids=ids)]), text=greedy_decode(model, ids, ones, 4),
        keys=forward_kv(model, ids, ones, pre_rope=True)[1].k,
        latent=LatentModel(model, int(ids[0, 5]), 2)(ids).logits.detach())
    targets = teacher_targets(model, pairs, SignalRequest(corrupt=True, sites=tuple(sites)))
    return out | {f"targets_{k}": v for k, v in targets.items()}


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
@pytest.mark.parametrize("how", ("cpu", "disk", "parts"))
def test_an_offloaded_model_measures_the_same(models, pairs, tmp_path, how, attention):
    model, some, ids = copy.deepcopy(models["llama"]), pairs["llama"]["unequal"], text(2)
    model.set_attn_implementation(attention)
    away = offloaded(model, how, tmp_path)
    assert any(p.is_meta for p in away.parameters())
    try: got = measured(away, some, ids)
    except (RuntimeError, NotImplementedError, ValueError, AttributeError, AssertionError, IndexError) as e: got = e
    want = measured(model, some, ids)
    assert not isinstance(got, Exception), got
    def same(x, y): # excluded sites are NaN
        return torch.equal(x.nan_to_num(99), y.nan_to_num(99)) if isinstance(x, torch.Tensor) else x == y
    assert [k for k in want if not same(got[k], want[k])] == []
    assert any(p.is_meta for p in away.parameters())                       # and is offloaded still


@pytest.mark.parametrize("how", ("cpu", "disk", "parts"))
def test_an_offloaded_model_is_hashed_and_copied_whole(models, tmp_path, how):
    model, ids = models["llama"], text(2)
    away = offloaded(model, how, tmp_path)
    def both():
        student = shrink(away, 4)
        equal = torch.equal(student(ids).logits, model(ids).logits)
        here = not any(p.is_meta for p in student.parameters())
        return model_hash(away), equal and here, to_qwen3(away, ids)[1]
    try: got = both()
    except (RuntimeError, NotImplementedError) as e: got = e
    assert not isinstance(got, Exception), got
    assert got[0] == model_hash(model) and got[1] and torch.equal(got[2], to_qwen3(model, ids)[1])


def test_a_model_without_weights_says_so(pairs, models):
    with torch.device("meta"): empty = type(models["llama"])(models["llama"].config)
    some = pairs["llama"]["equal"]
    for work in (lambda: task_accuracy(empty, some), lambda: model_hash(empty), lambda: shrink(empty, 2),
                 lambda: causal_effects(empty, some)):
        with pytest.raises(Exception) as e: work()
        said = str(e.value)
        assert isinstance(e.value, ValueError) and "no weights (device meta)" in said and "\n" not in said
