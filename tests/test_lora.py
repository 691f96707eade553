"""Students with LoRA: measured as they are, trained in nothing but LoRA, saved as those, and refused in one
line where the base is not at hand. All models are the small random ones of the families' tests."""
import copy, json, re, shutil, subprocess, sys
from pathlib import Path
import peft, pytest, torch
from conftest import ROOT, environment
from rcid.causal import PartSite, Site, all_parts, answer_logit_diff, naive_effects, read, write
from rcid.core import read_json
from rcid.core.paths import CHECKSUMS
from rcid.distill import DistillConfig, distill
from rcid.distill.language import train_language
from rcid.distill.teacher_cache import changed_by_hand, computes_hash, model_hash
from rcid.distill.trainer import plain_distill
from rcid.distill.training import trainable, training
from rcid.eval import compare
from rcid.eval.accuracy import answer_logits
from rcid.eval.decode import greedy_decode
from rcid.eval.handmade import counting_model
from rcid.models import byte_tokenizer, get_adapter, load_model, plain_generation, save_model, shrink
from rcid.models.before_loading import look_at
from rcid.models.lora import has_lora, lora_parameters, plain_model
from rcid.models.rewrite import permuted_heads
from rcid.pipeline.command_line import main
from test_families import CASES, fast, made, scale_of
from test_families import pairs as pairs                     # a fixture

FAMILIES = ("llama", "qwen3", "gpt2", "gpt_neox", "phi3", "gemma2", "gemma3", "granite")
ENDS = ("llama", "granite", "gemma3")                        # with LoRA at the embeddings and the head as well


def base_of(case: str) -> torch.nn.Module:
    model_type, more = CASES[case]
    return made(model_type, **more)


def with_lora(model, where="all-linear", **more) -> peft.PeftModel:
    "LoRA that changes what the model says: neither of its factors is zero."
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=where, init_lora_weights=False, **more)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return peft.get_peft_model(model, config).eval()


def at_the_ends(case: str) -> peft.PeftModel:
    model = base_of(case)
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    inside = [n for n, m in model.named_modules() if n.endswith(("q_proj", "down_proj"))]
    return with_lora(model, [head, "embed_tokens", *inside])


def values_of(model) -> dict: return {n: p.detach().clone() for n, p in model.named_parameters()}


def state_of(model) -> tuple:
    "All that a training lends and gives back, and not the values."
    return [(n, p.dtype, p.requires_grad, p.grad is None) for n, p in model.named_parameters()], [
        (type(m).__name__, m.training, len(m._forward_hooks)) for m in model.modules()]


def refused(kind, words, f, *args, **kw):
    with pytest.raises(kind, match=words) as e: f(*args, **kw)
    assert "\n" not in str(e.value) and len(str(e.value)) < 700
    return str(e.value)


# measuring

@pytest.mark.parametrize("case", FAMILIES)
def test_effects_are_those_of_the_merged_model_by_the_fast_engine(case, pairs):
    plain, model = base_of(case), with_lora(base_of(case))
    merged = copy.deepcopy(model).merge_and_unload()
    before, status = values_of(model), state_of(model)
    scale, sites = scale_of(merged, pairs), all_parts(model, pairs, "head")
    got = fast(model, pairs)
    assert torch.allclose(got, naive_effects(model, pairs), atol=1e-4 * scale)
    assert torch.allclose(got, naive_effects(merged, pairs), atol=1e-4 * scale)
    assert not torch.allclose(got, naive_effects(plain, pairs), atol=1e-2 * scale)         # LoRA is in it
    by_head = fast(model, pairs, sites, "denoising")
    assert torch.allclose(by_head, naive_effects(merged, pairs, sites, "denoising"), atol=1e-4 * scale)
    after = values_of(model)
    assert all(torch.equal(after[n], before[n]) for n in before) and state_of(model) == status
    assert get_adapter(model).model is model.base_model.model is plain_model(model)


@pytest.mark.parametrize("case", ENDS)
def test_at_the_embeddings_and_the_head(case, pairs):
    model, i = at_the_ends(case), torch.arange(len(pairs))
    a = get_adapter(model)
    assert has_lora(a.lm_head) and has_lora(a.embed) and not has_lora(get_adapter(base_of(case)).lm_head)
    with torch.no_grad():
        logits = model(pairs.clean_ids, attention_mask=pairs.attention_mask).logits[i, pairs.answer_pos]
        with model.disable_adapter(): bare = model(pairs.clean_ids).logits[i, pairs.answer_pos]
        states = model(pairs.clean_ids, output_hidden_states=True).hidden_states[0]
    start = a.start(pairs.clean_ids, torch.arange(pairs.clean_ids.shape[1])[None])
    assert torch.allclose(start, states, atol=1e-5)
    want = logits[i, pairs.correct_token_id] - logits[i, pairs.wrong_token_id]
    assert torch.allclose(answer_logit_diff(model, pairs)[0], want, atol=1e-4 * float(want.abs().mean()))
    said = answer_logits(model, pairs.clean_ids, pairs.attention_mask, pairs.answer_pos)
    assert torch.allclose(said, logits, atol=1e-4) and not torch.allclose(bare, logits, atol=1e-2)
    assert torch.allclose(fast(model, pairs), naive_effects(model, pairs), atol=1e-4 * scale_of(model, pairs))


@pytest.mark.parametrize("how", ("dora", "added", "two", "copied head", "mixed dtypes"))
def test_other_ways_to_have_it(how, pairs):
    base = base_of("llama")
    if how == "added":                                       # by transformers itself, without a wrapper
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
        base.add_adapter(config)
        model = base.eval()
    elif how == "copied head": model = with_lora(base, ["v_proj"], modules_to_save=["lm_head"])
    elif how == "mixed dtypes": model = with_lora(base.to(torch.bfloat16))
    else: model = with_lora(base, use_dora=how == "dora")
    if how == "two":
        model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["k_proj"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "second"])
    if how == "copied head":
        with torch.no_grad(): model.get_output_embeddings().weight.mul_(-1)                # the copy, not the original
    a, i = get_adapter(model), torch.arange(len(pairs))
    with torch.no_grad(): logits = model(pairs.clean_ids, attention_mask=pairs.attention_mask).logits
    logits = logits[i, pairs.answer_pos].float()
    want = logits[i, pairs.correct_token_id] - logits[i, pairs.wrong_token_id]
    near = dict(atol=(.05 if how == "mixed dtypes" else 1e-4) * float(want.abs().mean()))
    assert torch.allclose(answer_logit_diff(model, pairs)[0], want, **near)
    assert torch.allclose(fast(model, pairs), naive_effects(model, pairs), **near)
    assert a.family == "llama" and lora_parameters(model)


def test_read_and_write(pairs):
    model = with_lora(base_of("qwen3"))
    merged, ids, other = copy.deepcopy(model).merge_and_unload(), pairs.clean_ids[:1, :9], pairs.clean_ids[2:, :9]
    sites = [Site(1), Site(0, 4), PartSite(1, None, "head", 2), PartSite(0, None, "mlp"), PartSite(1, 3, "group", 1)]
    here, there = read(model, ids, sites), read(merged, ids, sites)
    assert all(torch.allclose(here[s], there[s], atol=1e-4) for s in sites)
    with torch.no_grad():
        logits, of_other = model(ids).logits, model(other).logits
        with write(model, here): assert torch.allclose(model(ids).logits, logits, atol=1e-4)
        with write(model, read(model, other, [Site(1)])):
            assert torch.allclose(model(ids).logits, of_other, atol=1e-4)
        assert torch.equal(model(ids).logits, logits)                                      # no hook is left


def test_what_is_switched_off_is_not_measured(pairs):
    model, plain = with_lora(base_of("llama")), base_of("llama")
    on = fast(model, pairs)
    with model.disable_adapter(): off = fast(model, pairs)
    assert torch.allclose(off, naive_effects(plain, pairs), atol=1e-4 * scale_of(plain, pairs))
    assert torch.equal(fast(model, pairs), on) and not torch.allclose(on, off, atol=1e-2)


def test_text_and_its_settings():
    model = with_lora(base_of("llama"))
    ids, own = torch.arange(5, 11)[None], model.generation_config
    grown = ids
    for token in greedy_decode(model, ids, torch.ones_like(ids), 4)[0]:
        assert int(model(grown).logits[0, -1].argmax()) == token
        grown = torch.cat([grown, torch.tensor([[token]])], 1)
    with plain_generation(model):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert out[0].tolist()[:len(grown[0])] == grown[0].tolist()[:len(out[0])]
    assert model.generation_config is own is plain_model(model).generation_config
    assert "generation_config" not in vars(model)


def test_a_hash_sees_it():
    model = with_lora(base_of("llama"))
    assert not changed_by_hand(model)
    before = model_hash(model), computes_hash(model)
    assert before == (model_hash(model), computes_hash(model))
    with model.disable_adapter(): assert computes_hash(model) != before[1]
    with torch.no_grad(): next(iter(lora_parameters(model).values())).add_(1)
    assert model_hash(model) != before[0]


# training

CONFIG = DistillConfig(
    steps=4, batch=3, lr=1e-2, sites=(Site(0, "s2"), Site(1, "s2")), layer_map={0: 0, 1: 1, 2: 2}, warmup=0, log_every=1
)


@pytest.mark.parametrize("method", ("standard_kd", "rcid_identity", "interchange"))
@pytest.mark.parametrize("case", ("llama", "gpt2"))
def test_nothing_else_is_trained(case, method, pairs):
    teacher, student = base_of(case), with_lora(base_of(case), lora_dropout=.5)
    before, status = values_of(student), state_of(student)
    own = set(lora_parameters(student))
    result = distill(student, teacher, pairs, method, CONFIG)
    after = values_of(student)
    assert {n for n in before if not torch.equal(before[n], after[n])} == own            # and the base bit by bit
    assert state_of(student) == status and result.student is student
    losses = [h["loss"] for h in result.history]
    assert losses[-1] < losses[0]
    if method == "interchange": return
    again = with_lora(base_of(case), lora_dropout=.5)
    slow = plain_distill(again, teacher, pairs, method, CONFIG)
    assert torch.allclose(torch.tensor(losses[1:]), torch.tensor(slow), rtol=1e-3)


def test_lora_at_the_ends_is_trained_whatever_is_said_of_embeddings(pairs):
    student = at_the_ends("llama")
    names = {n for n in lora_parameters(student) if "embed_tokens" in n or "lm_head" in n}
    assert len(names) == 4 and names <= set(trainable(student)) == set(trainable(student, True))
    student = with_lora(base_of("llama"), ["v_proj"], modules_to_save=["lm_head"])
    assert "base_model.model.lm_head.modules_to_save.default.weight" in trainable(student)


def test_a_base_in_sixteen_bits_stays_so(pairs):
    student = with_lora(base_of("llama").to(torch.bfloat16))
    before, status, own = values_of(student), state_of(student), set(lora_parameters(student))
    assert {before[n].dtype for n in own} == {torch.float32}                             # as peft makes them
    with training(student) as chosen:
        kinds = {n: p.dtype for n, p in student.named_parameters()}
    assert set(chosen) == own and all((kinds[n] == torch.float32) == (n in own) for n in kinds)
    teacher = base_of("llama")
    losses = [h["loss"] for h in distill(student, teacher, pairs, "standard_kd", CONFIG).history]
    after = values_of(student)
    assert {n for n in before if not torch.equal(before[n], after[n])} == own
    assert state_of(student) == status and losses[-1] < losses[0]


def test_an_interrupted_run_goes_on(pairs, tmp_path):
    from safetensors import safe_open
    teacher, want = base_of("llama"), with_lora(base_of("llama"))
    distill(want, teacher, pairs, "standard_kd", CONFIG)
    student = with_lora(base_of("llama"))
    config = DistillConfig(**{**vars(CONFIG), "checkpoint_dir": str(tmp_path/"c"), "checkpoint_every": 2})
    def killed(model, step):
        if step == 3: raise KeyboardInterrupt
        return {}
    with pytest.raises(KeyboardInterrupt): distill(student, teacher, pairs, "standard_kd", config, killed)
    with safe_open(tmp_path/"c"/"tensors.safetensors", "pt") as f: kept = [k for k in f.keys() if "weight." in k[:7]]
    assert {k.removeprefix("weight.") for k in kept} == set(lora_parameters(student))      # nothing of the base
    fresh = with_lora(base_of("llama"))
    result = distill(fresh, teacher, pairs, "standard_kd", config)
    got, right = values_of(fresh), values_of(want)
    assert result.steps == 4 and all(torch.equal(got[n], right[n]) for n in right)
    assert not (tmp_path/"c").exists()


@pytest.fixture
def saved(tmp_path) -> Path:
    "A base and a student on it, side by side on disk."
    save_model(base_of("llama"), byte_tokenizer(), tmp_path/"base")
    base, tokenizer = load_model(tmp_path/"base", dtype="float32", device="cpu")
    save_model(with_lora(base), tokenizer, tmp_path/"student")
    return tmp_path


def test_saved_and_read_back_and_trained_on(saved, pairs):
    folder = saved/"student"
    student, tokenizer = load_model(str(folder), dtype="float32", device="cpu")
    assert isinstance(student, peft.PeftModel) and not student.training and len(tokenizer)
    assert not (folder/"config.json").exists() and not (folder/"model.safetensors").exists()
    teacher = load_model(saved/"base", dtype="float32", device="cpu")[0]
    distill(student, teacher, pairs, "standard_kd", CONFIG)
    save_model(student, tokenizer, saved/"trained")
    again, _ = load_model(saved/"trained", dtype="float32", device="cpu")
    ids = pairs.clean_ids
    assert torch.equal(again(ids).logits, student(ids).logits)
    assert not torch.allclose(load_model(folder, dtype="float32", device="cpu")[0](ids).logits, again(ids).logits)
    bare, own = teacher(ids).logits, set(lora_parameters(again))
    with again.disable_adapter(): assert torch.equal(again(ids).logits, bare)
    assert own == {n for n, p in again.named_parameters() if p.requires_grad}


def test_lora_that_transformers_put_there_is_saved_alike(saved, pairs):
    base, tokenizer = load_model(saved/"base", dtype="float32", device="cpu")
    base.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    save_model(base.eval(), tokenizer, saved/"added")
    again, _ = load_model(saved/"added", dtype="float32", device="cpu")
    assert torch.equal(again(pairs.clean_ids).logits, base(pairs.clean_ids).logits)


def test_a_base_is_found_beside_its_weights(saved, pairs, monkeypatch):
    said = read_json(saved/"student"/"adapter_config.json")
    (saved/"student"/"adapter_config.json").write_text(json.dumps({**said, "base_model_name_or_path": "../base"}))
    (saved/"student"/CHECKSUMS).unlink()
    want = load_model(saved/"base", dtype="float32", device="cpu")[0]
    got = load_model(saved/"student", dtype="float32", device="cpu")[0]
    with got.disable_adapter(): assert torch.equal(got(pairs.clean_ids).logits, want(pairs.clean_ids).logits)


def test_the_estimate_counts_them(saved):
    seen, base = look_at(str(saved/"student"), "bfloat16", "cpu"), look_at(str(saved/"base"), "bfloat16", "cpu")
    model, _ = load_model(saved/"student", dtype="bfloat16", device="cpu")
    assert seen.bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert seen.parameters == sum(p.numel() for p in model.parameters()) and seen.layers == base.layers
    assert str(seen).startswith(f"{saved/'student'} (LoRA on {saved/'base'}): llama")


# the command line

def test_a_comparison_with_a_student_of_lora_alone(tmp_path, tokenizers, capsys):
    tok = tokenizers["qwen3"]
    save_model(counting_model(tok, {3: .6, 4: .4}), tok, tmp_path/"teacher")
    save_model(counting_model(tok, {1: .6, 2: .4}, seed=2), tok, tmp_path/"other")
    for name, base in (("same", "teacher"), ("far", "other")):
        model, _ = load_model(tmp_path/base, dtype="float32", device="cpu")
        student = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))          # changes nothing
        save_model(student, None, tmp_path/name)
        out = tmp_path/f"{name}.html"
        options = ("-n", "64", "--out", str(out), "--dtype", "float32", "--device", "cpu")
        assert main(["compare", str(tmp_path/"teacher"), str(tmp_path/name), *options]) == 0
        assert f"(LoRA on {tmp_path/base})" in capsys.readouterr().err
        distance = read_json(out.with_suffix(".json"))["route"]["distance"]
        assert distance < 1e-3 if name == "same" else distance > .3


# bad input

def test_a_model_that_is_also_its_teacher(pairs, tokenizers):
    base = base_of("llama")
    student = with_lora(base)
    words = "teacher and student are one model: get_peft_model .* load the teacher once more"
    refused(ValueError, words, distill, student, base, pairs, "standard_kd", CONFIG)
    refused(ValueError, words, compare, base, student, pairs)
    refused(ValueError, words, train_language, student, pairs.clean_ids, steps=1, batch=1, lr=0., teacher=base)


@pytest.mark.parametrize(
    "config, words",
    [
        (peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "kind PROMPT_TUNING cannot be read"),
        (peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), "kind IA3"),
        (peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM"), "waits for a"),
    ],
)
def test_other_adapters_are_refused(config, words, pairs):
    model = peft.get_peft_model(base_of("llama"), config)
    refused(ValueError, words, get_adapter, model)
    refused(ValueError, words, fast, model, pairs)


def test_frozen_weights_cannot_be_trained(saved, pairs):
    base, _ = load_model(saved/"base", dtype="float32", device="cpu")
    frozen = peft.PeftModel.from_pretrained(base, str(saved/"student"))
    words = "nothing to train: the LoRA weights are frozen .* is_trainable=True"
    refused(ValueError, words, distill, frozen, base_of("llama"), pairs, "standard_kd", CONFIG)


def test_a_student_plus_is_not_cut_or_rewritten():
    model = with_lora(base_of("llama"))
    before = values_of(model)
    for change in (lambda m: shrink(m, 2), permuted_heads):
        refused(ValueError, "merge its adapters first", change, model)
    after = values_of(model)
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_a_base_without_a_name_is_not_lost(tmp_path):
    model = with_lora(base_of("llama"))
    refused(ValueError, "base was never saved: save_model", save_model, model, None, tmp_path/"s")
    assert not (tmp_path/"s").exists()


def broken(folder: Path, how: str):
    "One fault in a folder of LoRA weights."
    file = folder/"adapter_config.json"
    said = read_json(file)
    if how == "no json": file.write_text("{")
    elif how == "kind": file.write_text(json.dumps({**said, "peft_type": "IA3"}))
    elif how == "no name": file.write_text(json.dumps({**said, "base_model_name_or_path": None}))
    elif how == "gone": file.write_text(json.dumps({**said, "base_model_name_or_path": str(folder.parent/"gone")}))
    elif how == "itself": file.write_text(json.dumps({**said, "base_model_name_or_path": str(folder)}))
    elif how == "pickle": (folder/"adapter_model.safetensors").rename(folder/"adapter_model.bin")
    elif how == "damaged": (folder/"adapter_model.safetensors").write_bytes(b"no tensors")
    (folder/CHECKSUMS).unlink()


@pytest.mark.parametrize(
    "how, words",
    [
        ("no json", "adapter_config.json is no JSON: save the adapters again"),
        ("kind", "holds an adapter of kind IA3: LoRA is read"),
        ("no name", "does not name its base: write its folder or hub id"),
        ("gone", "is LoRA on .*gone, which (is not at hand|cannot be used)"),
        ("itself", "is LoRA on LoRA"),
        ("pickle", "has no weights: there is no adapter_model.safetensors"),
        ("damaged", "could not put the LoRA weights|adapter_model.safetensors is damaged"),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line(how, words, saved, capsys):
    folder = saved/"student"
    broken(folder, how)
    refused((ValueError, FileNotFoundError, RuntimeError), words, load_model, folder, dtype="float32", device="cpu")
    assert main(["map", str(folder), "--out", str(saved/"m.html")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("rcid: ") and re.search(words, said[-1]) and not (saved/"m.html").exists()


def test_weights_of_another_model_are_one_line(saved):
    from safetensors.torch import load_file, save_file
    folder, file = saved/"student", saved/"student"/"adapter_model.safetensors"
    tensors = load_file(file)
    first = next(iter(tensors))
    def written(new):
        save_file(new, file)
        (folder/CHECKSUMS).unlink(missing_ok=True)
        return refused(RuntimeError, "LoRA weights of .*student", load_model, folder, dtype="float32", device="cpu")
    strange = first.replace("layers.0", "layers.9")
    assert first.split(".lora_")[0] in written({k: v for k, v in tensors.items() if k != first})       # it is missing
    assert "has no place in the base" in written({**tensors, strange: tensors[first].clone()})
    assert "size mismatch" in written({**tensors, first: tensors[first][:, :-1].contiguous()})
    save_file(tensors, file)
    said = read_json(folder/"adapter_config.json")
    (folder/"adapter_config.json").write_text(json.dumps({**said, "target_modules": ["query"]}))
    refused(RuntimeError, "could not put the LoRA weights", load_model, folder, dtype="float32", device="cpu")


def test_changed_weights_are_seen_by_their_hash(saved):
    file = saved/"student"/"adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    refused(RuntimeError, "does not match its SHA-256", load_model, saved/"student", dtype="float32", device="cpu")


def test_lora_on_the_hub(saved):
    "Both repositories as a download leaves them in the cache; nothing is asked of a network."
    cache = saved/"cache"
    for name in ("base", "student"):
        repo = cache/f"models--someone--{name}"
        shutil.copytree(saved/name, repo/"snapshots"/("0" * 40))
        (repo/"refs").mkdir()
        (repo/"refs"/"main").write_text("0" * 40)
    file = cache/"models--someone--student"/"snapshots"/("0" * 40)/"adapter_config.json"
    said = read_json(file)
    file.write_text(json.dumps({**said, "base_model_name_or_path": "someone/base"}))
    (file.parent/CHECKSUMS).unlink()
    code = (
        "from rcid.models import load_model; from rcid.models.before_loading import look_at;"
        "from rcid.models.lora import lora_parameters;"
        "m, t = load_model('someone/student', dtype='float32', device='cpu');"
        "print(look_at('someone/student', 'float32', 'cpu')); print(len(lora_parameters(m)), type(m).__name__)"
    )
    env = environment(ROOT, HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE="1")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "someone/student (LoRA on someone/base): llama, 3 layers" in done.stdout and "PeftModel" in done.stdout
