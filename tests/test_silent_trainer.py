"""A training moves what it is to move and gives both models back as they came: dtype, modes, frozen weights, hooks."""
import copy, itertools, json, math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
import pytest, torch
from accelerate import cpu_offload
from conftest import ROOT
from rcid.causal import Site
from rcid.causal.mediation import mediation
from rcid.causal.sites import attribution_effects, integrated_effects
from rcid.data import load_pairs
from rcid.data.reasoning import encode_problems, word_problems
from rcid.distill import DistillConfig, SignalRequest, distill, model_hash, plain_distill, teacher_targets
from rcid.distill import train_language
from rcid.eval.behaviour import behaviour
from rcid.eval.heads import head_map
from rcid.eval.knockout import knock_out
from rcid.kv import LatentModel, forward_kv, kv_method
from rcid.models import byte_tokenizer, load_model, shrink

CONFIG = DistillConfig(sites=(Site(0, "s2"), Site(1, "end"), Site(2, "end")), layer_map={0: 0, 1: 0, 2: 1, 3: 1},
    steps=6, batch=8, lr=1e-3, log_every=1)
SIZES = dict(d_model=32, heads=2, kv_heads=1, d_mlp=64)
TEXT = torch.randint(3, 200, (8, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def toy(make_model, tokenizers):
    "A random teacher (four layers) and sixteen pairs."
    return make_model("llama", **SIZES), load_pairs("ioi", tokenizers["llama"], split="train", n=16)


@pytest.fixture(scope="module")
def words():
    "Problems with their reasoning, a model that reads them, and the token of a latent place."
    tokenizer = byte_tokenizer()
    problems = word_problems("train", style="equation", steps=(2,), operations="+-", largest=9)
    problems = encode_problems(list(itertools.islice(problems, 12)), tokenizer)
    model, _ = load_model({"arch": "llama", "layers": 2, **SIZES}, dtype="float32", device="cpu")
    return model, problems, tokenizer.bos_token_id


def rounded(model, dtype=torch.bfloat16):
    "The user's model in 16 bits: its weights, as `from_pretrained` reads them."
    model = copy.deepcopy(model)
    for p in model.parameters(): p.data = p.data.to(dtype)
    return model


def learn(how, student, toy, words, config=CONFIG):
    "One of the trainings; the losses of its steps."
    teacher, pairs = toy
    if how in ("language", "heal"):
        return train_language(student, TEXT, steps=6, batch=4, lr=1e-3, teacher=teacher if how == "heal" else None,
            train_embeddings=config.train_embeddings)
    if how == "plain": return plain_distill(student, teacher, pairs, "rcid", config)
    if how == "kv":
        plain, data, latent = words
        method = kv_method("kv_structured", latents=3, fit_steps=2)
        config = replace(config, sites=(), layer_map={}, batch=4)
        return [h["loss"] for h in distill(LatentModel(student, latent, 1), plain, data, method, config).history]
    return [h["loss"] for h in distill(student, teacher, pairs, how, config).history]


WAYS = ("standard_kd", "rcid", "fitnets", "language", "heal", "plain", "kv")


def start(how, toy, words):
    "A student for this training."
    return copy.deepcopy(words[0]) if how == "kv" else shrink(toy[0], 2)


def state(model):
    "All that is the owner's, but for the weights."
    parameters = [(n, p.dtype, p.requires_grad, p.grad) for n, p in model.named_parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    recomputes = [getattr(m, "gradient_checkpointing", False) for m in model.modules()]
    buffers, modes = [(n, b.dtype) for n, b in model.named_buffers()], [m.training for m in model.modules()]
    return parameters, buffers, modes, hooks, recomputes, attributes(model)


def attributes(model):
    "What hangs on each module, functions and settings too, and all settings of its config."
    own = [{name: len(x) if isinstance(x, dict) else x for name, x in vars(m).items() if name != "config"}
           for m in model.modules()]
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    return own, [(c.to_dict(), c._attn_implementation) for c in configs]


# sixteen bits


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("how", WAYS)
def test_a_model_in_sixteen_bits_learns_as_its_float32_copy(toy, words, how, dtype):
    "The same losses, bit for bit, and the same weights in the end, rounded once."
    half = rounded(start(how, toy, words), dtype)
    whole = copy.deepcopy(half)
    for p in whole.parameters(): p.data = p.data.float()
    before = state(half)
    losses, want = learn(how, half, toy, words), learn(how, whole, toy, words)
    assert losses == want and state(half) == before and half.dtype == dtype
    for (n, p), q in zip(half.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(p, q.to(dtype)), n


def test_small_steps_are_not_rounded_away(toy):
    "The default learning rate, 5e-5, on a model in bfloat16: in the end many weights have moved, and the KL is lower."
    teacher, pairs = toy
    def kl(student):
        still = replace(CONFIG, steps=1, lr=0., batch=16)
        return distill(copy.deepcopy(student), teacher, pairs, "standard_kd", still).history[0]["kl"]
    student = rounded(shrink(teacher, 2))
    first, before = kl(student), copy.deepcopy(student)
    history = distill(student, teacher, pairs, "standard_kd", replace(CONFIG, steps=40, lr=5e-5)).history
    layers = list(zip(student.model.layers.parameters(), before.model.layers.parameters()))
    moved = sum(int((p != q).sum()) for p, q in layers) / sum(p.numel() for p, _ in layers)
    assert history[-1]["kl"] < history[0]["kl"] and kl(student) < .9 * first and moved > .8


# what the owner froze


class LoRA(torch.nn.Module):
    "A Linear with a low-rank part beside it, as peft puts it into a model."
    def __init__(self, base: torch.nn.Linear, rank: int = 2):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.base_layer = base
        self.lora_A = torch.nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = torch.nn.Linear(rank, base.out_features, bias=False)
        self.lora_A.weight.data.normal_(generator=g).mul_(.1); self.lora_B.weight.data.normal_(generator=g).mul_(.1)
    def forward(self, x): return self.base_layer(x) + self.lora_B(self.lora_A(x))


def with_lora(model, dtype=torch.float32):
    "The base frozen, adapters at queries and values of every layer."
    model = rounded(model, dtype).requires_grad_(False)
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"): setattr(layer.self_attn, name, LoRA(getattr(layer.self_attn, name)))
    return model


@pytest.mark.parametrize("embeddings", (False, True))
@pytest.mark.parametrize("how", WAYS)
def test_a_student_with_adapters_trains_its_adapters(toy, words, how, embeddings):
    student = with_lora(start(how, toy, words))
    before, weights = state(student), {n: p.clone() for n, p in student.named_parameters()}
    learn(how, student, toy, words, replace(CONFIG, train_embeddings=embeddings))
    moved = {n for n, p in student.named_parameters() if not torch.equal(p, weights[n])}
    assert moved == {n for n in weights if "lora_" in n} and state(student) == before


def test_adapters_in_float32_on_a_base_in_sixteen_bits(toy, words):
    student = with_lora(start("rcid", toy, words), torch.bfloat16)
    before, weights = state(student), {n: p.clone() for n, p in student.named_parameters()}
    try: said = learn("rcid", student, toy, words)
    except RuntimeError as e: said = str(e)
    assert isinstance(said, list), said
    moved = {n for n, p in student.named_parameters() if not torch.equal(p, weights[n])}
    assert moved == {n for n in weights if "lora_" in n} and state(student) == before


def test_a_frozen_layer_stays_and_embeddings_are_asked_for(toy, words):
    for embeddings in (False, True):
        student = start("rcid", toy, words)
        student.model.layers[0].requires_grad_(False)
        weights = {n: p.clone() for n, p in student.named_parameters()}
        learn("rcid", student, toy, words, replace(CONFIG, train_embeddings=embeddings))
        moved = {n for n, p in student.named_parameters() if not torch.equal(p, weights[n])}
        still = {n for n in weights if n.startswith("model.layers.0.")}
        assert moved == set(weights) - still - (set() if embeddings else {"model.embed_tokens.weight"})


@pytest.mark.parametrize("how", WAYS)
def test_nothing_to_train_is_said(toy, words, how):
    student = start(how, toy, words).requires_grad_(False)
    before = model_hash(student)
    try: learn(how, student, toy, words)
    except ValueError as e: said = str(e)
    else: said = "it trained"
    assert "nothing to train" in said and "requires_grad" in said and "\n" not in said and model_hash(student) == before


def test_a_checkpoint_keeps_the_trained_weights_and_is_of_them_alone(toy, tmp_path, capsys):
    teacher, pairs = toy
    config = replace(CONFIG, checkpoint_every=2, checkpoint_dir=str(tmp_path/"run"))
    def trip(student, step):
        if step == 5: raise KeyboardInterrupt
        return {}
    make = lambda: with_lora(shrink(teacher, 2))
    whole = distill(make(), teacher, pairs, "rcid", CONFIG)
    with pytest.raises(KeyboardInterrupt): distill(make(), teacher, pairs, "rcid", config, probe=trip)
    from safetensors import safe_open
    with safe_open(tmp_path/"run"/"tensors.safetensors", "pt") as f:
        kept = [k for k in f.keys() if k.startswith("weight.")]
    assert kept and all("lora_" in k for k in kept)
    resumed = distill(make(), teacher, pairs, "rcid", config)
    assert "resumed from step 4" in "".join(capsys.readouterr())
    assert model_hash(resumed.student) == model_hash(whole.student)
    with pytest.raises(KeyboardInterrupt): distill(make(), teacher, pairs, "rcid", config, probe=trip)
    other = make()                                   # the same weights, fewer of them trained: another run
    other.model.layers[0].requires_grad_(False)
    before = copy.deepcopy(other.model.layers[0])
    distill(other, teacher, pairs, "rcid", config)
    assert "resumed" not in "".join(capsys.readouterr())
    assert all(torch.equal(p, q) for p, q in zip(other.model.layers[0].parameters(), before.parameters(), strict=True))


def test_a_half_trained_run_in_sixteen_bits_goes_on_bit_for_bit(toy, tmp_path):
    teacher, pairs = toy
    config = replace(CONFIG, checkpoint_every=2, checkpoint_dir=str(tmp_path/"run"))
    def trip(student, step):
        if step == 5: raise KeyboardInterrupt
        return {}
    whole = distill(rounded(shrink(teacher, 2)), teacher, pairs, "rcid", CONFIG)
    broken = rounded(shrink(teacher, 2)); before = state(broken)
    with pytest.raises(KeyboardInterrupt): distill(broken, teacher, pairs, "rcid", config, probe=trip)
    assert state(broken) == before
    resumed = distill(rounded(shrink(teacher, 2)), teacher, pairs, "rcid", config)
    assert model_hash(resumed.student) == model_hash(whole.student)


# modes, hooks, gradients


def lent(student):
    "A model as somebody may lend it: modes of its own, a hook, a stale gradient, a frozen part."
    student.train(); student.model.layers[1].eval(); student.model.layers[0].mlp.eval()
    student.model.layers[0].register_forward_hook(lambda module, args, output: output)
    student.model.layers[0].mlp.gate_proj.weight.requires_grad_(False)
    return student


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("ends", ("well", "Ctrl-C", "error"))
def test_the_student_comes_back_as_it_was(toy, words, how, ends):
    student = lent(rounded(start(how, toy, words)))
    before, seen = state(student), []
    def stop(module, args, output):
        seen.append(1)
        if ends != "well" and len(seen) == 5: raise KeyboardInterrupt if ends == "Ctrl-C" else OSError("disk full")
    handle = student.model.layers[1].mlp.register_forward_hook(stop)       # somewhere in the middle of a step
    try: learn(how, student, toy, words, replace(CONFIG, checkpoint_gradients=how in ("rcid", "fitnets")))
    except (KeyboardInterrupt, OSError): assert ends != "well"
    else: assert ends == "well"
    handle.remove()
    assert state(student) == before


def test_a_stale_gradient_is_no_part_of_the_training(toy, words):
    clean, stale = start("rcid", toy, words), start("rcid", toy, words)
    stale(TEXT[:2]).logits.sum().backward()
    assert learn("rcid", stale, toy, words) == learn("rcid", clean, toy, words)
    assert model_hash(stale) == model_hash(clean) and all(p.grad is None for p in stale.parameters())


@pytest.mark.parametrize("trip", (None, KeyboardInterrupt), ids=("whole", "stopped"))
def test_recomputing_leaves_nothing_on_the_layers(toy, words, trip):
    "Neither the flag nor the function that recomputes, whatever ends the training."
    fresh, off = start("rcid", toy, words), start("rcid", toy, words)
    off.gradient_checkpointing_enable()
    off.gradient_checkpointing_disable()                                   # leaves a function of its owner's
    def probe(model, step):
        if trip and step: raise trip
        return {}
    for student in (fresh, off):
        before = state(student)
        with pytest.raises(trip) if trip else nullcontext():
            distill(student, *toy, "rcid", replace(CONFIG, checkpoint_gradients=True), probe=probe)
        assert state(student) == before


def test_recomputing_that_the_owner_turned_on_stays_on(toy, words):
    for asked in (False, True):
        student = start("rcid", toy, words)
        student.gradient_checkpointing_enable()
        before = state(student)
        learn("rcid", student, toy, words, replace(CONFIG, checkpoint_gradients=asked))
        assert state(student) == before


def test_recomputing_switches_no_dropout_on(toy, words):
    "A student in eval mode has no dropout, also where activations are recomputed."
    def student():
        s = start("rcid", toy, words)
        for layer in s.model.layers: layer.self_attn.attention_dropout = .5
        return s
    again = learn("rcid", student(), toy, words, replace(CONFIG, checkpoint_gradients=True))
    assert again == pytest.approx(learn("rcid", student(), toy, words), abs=1e-6)


# reading


READINGS = {
    "mediation": lambda model, pairs: mediation(model, pairs),
    "heads": lambda model, pairs: head_map(model, pairs),
    "behaviour": lambda model, pairs: behaviour(model, model, pairs),
    "attribution": lambda model, pairs: attribution_effects(model, pairs),
    "integrated": lambda model, pairs: integrated_effects(model, pairs, steps=2),
    "knock_out": lambda model, pairs: knock_out(model, pairs, 0),
    "cache": lambda model, pairs: forward_kv(model, pairs.clean_ids, pairs.attention_mask),
    "places": lambda model, pairs: LatentModel(model, 5, 1)(pairs.clean_ids),
}

@pytest.mark.parametrize("name", READINGS)
def test_a_reading_leaves_nothing_on_a_model(toy, name):
    model, pairs = copy.deepcopy(toy[0]).train(), toy[1][:4]
    model.model.layers[1].eval()
    model.lm_head.requires_grad_(False)
    before = state(model)
    READINGS[name](model, pairs)
    assert state(model) == before


# the teacher


def noisy(teacher):
    "The teacher in training mode, where it drops half of what it attends to."
    teacher = copy.deepcopy(teacher).train()
    for layer in teacher.model.layers: layer.self_attn.attention_dropout = .5
    teacher.model.layers[2].eval()
    return teacher


@pytest.mark.parametrize("kl_at", ("answer", "all"))
@pytest.mark.parametrize("how", [w for w in WAYS if w != "language"])
def test_a_teacher_teaches_in_eval_mode(toy, words, how, kl_at):
    quiet, loud, config = toy, (noisy(toy[0]), toy[1]), replace(CONFIG, kl_at=kl_at)
    quiet_words, loud_words = words, (copy.deepcopy(words[0]).train(), *words[1:])
    for layer in loud_words[0].model.layers: layer.self_attn.attention_dropout = .5
    before = state(loud[0]), state(loud_words[0])
    torch.manual_seed(0)
    got = learn(how, start(how, quiet, quiet_words), loud, loud_words, config)
    assert got == learn(how, start(how, quiet, quiet_words), quiet, quiet_words, config)
    assert (state(loud[0]), state(loud_words[0])) == before


def test_kept_targets_are_of_the_eval_mode(toy, tmp_path):
    teacher, pairs = toy
    loud, wanted = noisy(teacher), SignalRequest(corrupt=True, sites=CONFIG.sites)
    before, want = state(loud), teacher_targets(teacher, pairs, wanted)
    for folder in (None, tmp_path):
        got = teacher_targets(loud, pairs, wanted, folder)
        assert all(torch.equal(got[k], want[k]) for k in want) and state(loud) == before


def test_maps_are_fitted_without_dropout(toy):
    "W is fitted to what the student says, whatever its mode."
    teacher, pairs = toy
    def angle(mode):
        student = shrink(teacher, 2)
        for layer in student.model.layers: layer.self_attn.attention_dropout = .5
        return distill(student.train(mode), teacher, pairs, "rcid", replace(CONFIG, steps=1, lr=0.)).staleness
    assert angle(True) == angle(False) == 0


# where it cannot work


@pytest.mark.parametrize("how", WAYS)
def test_an_offloaded_student_is_refused_in_one_line(toy, words, how):
    student = cpu_offload(start(how, toy, words), execution_device="cpu")
    try: learn(how, student, toy, words)
    except Exception as e: said = f"{type(e).__name__}: {e}"
    else: said = "it trained"
    assert said.startswith("ValueError: cannot train a model whose weights are offloaded") and "\n" not in said


def test_an_offloaded_teacher_teaches_the_same(toy, words):
    away = (cpu_offload(copy.deepcopy(toy[0]), execution_device="cpu"), toy[1])
    for how in ("rcid", "heal"):
        try: got = learn(how, start(how, toy, words), away, words)
        except (RuntimeError, NotImplementedError) as e: got = str(e)
        assert got == learn(how, start(how, toy, words), toy, words)


# degrees


def test_staleness_in_degrees_is_in_degrees():
    "What the stage writes under a name that ends in `_degrees` is not the radians that `map_angle` gives."
    stage = json.loads((ROOT/"nbs"/"experiments"/"distill.ipynb").read_text(encoding="utf-8"))
    (cell,) = [code for c in stage["cells"] if "w_staleness_degrees" in (code := "".join(c["source"]))]
    written = []
    for staleness in (math.pi / 2, None):
        result = SimpleNamespace(student=None, history=[], steps=1, tokens=1, flops=1., staleness=staleness)
        def write_json(path, record): written.append(record["w_staleness_degrees"])
        exec(cell, dict(math=math, save_model=lambda *_: None, write_json=write_json, result=result, tokenizer=None,
            family="llama", task="ioi", method="rcid", seed=1))
    assert written == [pytest.approx(90), None]
