"""Latent places, KV methods in the one trainer, greedy decoding: identities, resume, gradients, causal evaluation,
bad input."""

import ast, itertools, json
from dataclasses import replace
from types import SimpleNamespace
import pytest, torch
from conftest import ARCHS
from rcid.align import map_layers
from rcid.causal import Site, causal_effects, naive_effects
from rcid.core import load_params
from rcid.data import build_pairs
from rcid.data.pairs import pad_mask
from rcid.data.reasoning import encode_problems, without_last_step, word_problems
from rcid.data.reasoning_pairs import reasoning_rows
from rcid.distill import DistillConfig, distill, model_hash
from rcid.eval import causal_consistency, task_accuracy
from rcid.eval.decode import greedy_decode, solve
from rcid.eval.shares import check_competent
from rcid.kv import KV_METHODS, Kept, KVObjective, KVMethod, LatentModel, MercatorKVLoss, RegressionKVLoss
from rcid.kv import ABLATIONS, ablate_places, answer_texts, answered, method_of, think
from rcid.kv import StructuralKVLoss, AttentionWeighting, Warped, forward_kv, kv_method, with_latents
from rcid.kv import ThoughtProjector, load_latent, save_latent
from rcid.kv.ablation import run_places
from rcid.kv.inside import Thinker
from rcid.models import load_model, save_model, train_tokenizer
from rcid.models.adapters import get_adapter, model_device

CONFIG = DistillConfig(steps=8, batch=8, lr=3e-3, log_every=1, checkpoint_every=4, seed=0)
SMALL = {n: replace(m, fit_steps=4, latents=4) for n, m in KV_METHODS.items()}


@pytest.fixture(scope="module")
def world():
    """Tokenizer, 48 problems, a teacher of four layers and a maker of students of two, with other heads and another
    head_dim."""
    problems = list(
        itertools.islice(word_problems("train", style="equation", steps=(2,), operations="+-", largest=9), 48)
    )
    tokenizer = train_tokenizer(
        [p.text for p in problems]
        + [r.clean for r in itertools.islice(reasoning_rows(train_tokenizer([], 259), largest=9), 200)],
        vocab=700,
    )
    make = lambda **sizes: load_model(dict(vocab=len(tokenizer), d_mlp=64) | sizes, dtype="float32", device="cpu")[0]
    teacher = make(arch="qwen3", layers=4, d_model=48, heads=4, kv_heads=4, head_dim=16, seed=1)
    student = lambda t=2, arch="llama": LatentModel(
        make(arch=arch, layers=2, d_model=32, heads=4, kv_heads=2, head_dim=8, seed=2), tokenizer.bos_token_id, t
    )
    return tokenizer, encode_problems(problems, tokenizer), teacher, student


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("places", (1, 3, 6))
def test_enough_iterations_are_sequential_decoding(world, arch, places):
    tokenizer, data, _, student = world
    latent, short = tokenizer.bos_token_id, with_latents(data[:3], places, tokenizer.bos_token_id)
    plain = student(0, arch).plain[0]
    size = plain.model.embed_tokens.weight.square().mean().sqrt()
    with torch.no_grad():
        hidden = {
            t: LatentModel(plain, latent, t).model(short.input_ids, short.attention_mask).last_hidden_state
            for t in (places, places + 4)
        }
        for i, n in enumerate(short.segments[:, 3].tolist()):
            x = torch.zeros(1, 0, plain.config.hidden_size)
            for token in short.input_ids[i, :n]:
                new = plain.model.embed_tokens(token[None, None])
                if token == latent:
                    new = size * torch.nn.functional.rms_norm(
                        plain.model(inputs_embeds=x).last_hidden_state[:, -1:], (x.shape[2],)
                    )
                x = torch.cat([x, new], 1)
            want = plain.model(inputs_embeds=x).last_hidden_state[0]
            for h in hidden.values(): assert (h[i, :n] - want).abs().max() < 1e-4
        if places > 1:
            assert (
                LatentModel(plain, latent, places - 1).model(short.input_ids, short.attention_mask).last_hidden_state
                - hidden[places]
            ).abs().max() > 1e-5


def test_without_places_it_is_the_plain_model(world):
    _, data, _, student = world
    model = student(5)
    for d in (data[:3], with_latents(data[:3], 0, model.model.latent_id)):
        assert torch.equal(
            model(d.input_ids, d.attention_mask).logits,
            model.plain[0](d.input_ids, attention_mask=d.attention_mask).logits,
        )
    assert model_hash(model) == model_hash(model.plain[0])


@pytest.mark.parametrize("arch", ARCHS)
def test_soft_thoughts_of_a_certain_model_are_its_words(world, arch):
    "With all of the probability on one word and as many rounds as places, the places read what decoding says."
    tokenizer, data, _, student = world
    plain = student(0, arch).plain[0]
    with torch.no_grad(): plain.model.norm.weight.mul_(1e4)
    soft = LatentModel(plain, tokenizer.bos_token_id, 3, "soft")
    short = with_latents(data[:3], 3, tokenizer.bos_token_id)
    for i, (_, asks, answers, _) in enumerate(short.segments.tolist()):
        ids = short.input_ids[i:i + 1, :answers]
        said = greedy_decode(plain, ids[:, :asks], torch.ones(1, asks), 3)[0]
        with torch.no_grad(): x = soft.model.thoughts(ids == tokenizer.bos_token_id, ids, None, None)
        assert torch.allclose(x[0, asks:], plain.model.embed_tokens(torch.tensor(said)), atol=1e-4)


@pytest.mark.parametrize("arch", ARCHS)
def test_greedy_decoding_is_argmax_step_by_step(world, arch):
    tokenizer, data, _, student = world
    model, short = student(2, arch), with_latents(data[:5], 4, tokenizer.bos_token_id)
    prompts = [
        ids[:n]
        for ids, n in [
            *zip(data.input_ids, data.segments[:3, 1].tolist()),
            *zip(short.input_ids, (short.cue_pos + 1).tolist()),
        ]
    ]
    slow = []
    with torch.no_grad():
        for ids in prompts:
            new = []
            for _ in range(5):
                new.append(
                    int(model(torch.cat([ids, torch.tensor(new, dtype=torch.long)])[None]).logits[0, -1].argmax())
                )
            slow.append(new)
    batch = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    assert greedy_decode(model, batch, pad_mask([len(p) for p in prompts]), 5) == slow
    for p, want in zip(prompts, slow):
        assert greedy_decode(model, p[None], torch.ones(1, len(p)), 5) == [want]
        assert greedy_decode(model, p[None], torch.ones(1, len(p)), 5, eos_id=want[3]) == [want[:want.index(want[3])]]


@pytest.mark.parametrize("name", KV_METHODS)
def test_gradients_reach_the_student_only(world, name):
    _, data, teacher, student = world
    before, s = model_hash(teacher), student()
    objective = KVObjective(SMALL[name], s, teacher, data, CONFIG)
    state = objective.start()
    base, own, parts = objective.terms(torch.arange(8), 0, state)
    (base + (0 if own is None else own)).backward()
    grads = {n for n, p in s.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any(n.endswith("k_proj.weight") for n in grads) and all(x.isfinite() for x in parts.values())
    assert model_hash(teacher) == before and all(p.grad is None for p in teacher.parameters())
    if state is not None:
        assert all(not p.requires_grad and p.grad is None for p in state.parameters()) and not any(
            t[:2].requires_grad for t in objective.targets.values()
        )


@pytest.mark.parametrize("name", KV_METHODS)
def test_what_is_fitted_is_what_a_start_fits(world, name, monkeypatch):
    """`fit` alone gives the state of `start`, and reads of the teacher no more than the rows that it is fitted to; a
    method that asks no teacher fits nothing."""
    _, data, teacher, student = world
    method = replace(SMALL[name], fit_rows=40)
    asked, of_teacher = [], KVObjective.of_teacher
    def noted(self, rows):
        asked.extend(rows)
        return of_teacher(self, rows)
    monkeypatch.setattr(KVObjective, "of_teacher", noted)
    alone = KVObjective(method, student(), teacher, data, CONFIG)
    fitted = alone.fit()
    assert alone.targets == {} and asked == (list(range(40)) if method.asks else [])
    whole = KVObjective(method, student(), teacher, data, CONFIG)
    started = whole.start()
    assert (fitted is None) == (started is None) == (whole.targets == {}) == (not method.asks)
    if method.asks:
        assert len(asked) == 40 + 40 + len(data)
        kept = started.state_dict()
        assert fitted.state_dict().keys() == kept.keys()
        for part, x in fitted.state_dict().items(): assert torch.equal(x, kept[part]), part


@pytest.mark.parametrize("name", KV_METHODS)
def test_every_method_learns(world, name):
    _, data, teacher, student = world
    result = distill(student(), teacher, data, SMALL[name], CONFIG)
    assert (
        result.history[-1]["loss"] < result.history[0]["loss"]
        and result.history[-1]["ce"] < result.history[0]["ce"]
        and all(h["grad_norm"] > 0 for h in result.history[1:])
    )


def test_flat_and_structured_have_equal_budgets(world):
    _, data, teacher, student = world
    budgets = {
        n: distill(student(), teacher, data, SMALL[n], replace(CONFIG, steps=1))
        for n in ("kv_flat", "kv_structured", "kv_structured_random", "kv_structured_heads")
    }
    assert len({(b.tokens, b.flops) for b in budgets.values()}) == 1


def test_resume_is_bit_exact(world, tmp_path, capsys):
    _, data, teacher, student = world
    method = SMALL["kava"]
    whole = distill(student(), teacher, data, method, CONFIG)
    def trip(model, step):
        if step == 6: raise KeyboardInterrupt
        return {}
    config = replace(CONFIG, checkpoint_dir=str(tmp_path/"run"), targets_dir=str(tmp_path/"targets"))
    with pytest.raises(KeyboardInterrupt): distill(student(), teacher, data, method, config, probe=trip)
    again = distill(student(), teacher, data, method, config)
    assert (
        "resumed from step 4 of 8" in "".join(capsys.readouterr())
        and model_hash(again.student) == model_hash(whole.student)
        and len([f for f in (tmp_path / "targets").iterdir() if f.is_dir()]) == 1
    )
    for a, b in zip(again.history, whole.history, strict=True): assert a == pytest.approx(b, rel=1e-7)


def test_a_projector_is_trained_saved_and_resumed(world, tmp_path, capsys):
    tokenizer, data, teacher, student = world
    plain = student().plain[0]
    save_model(plain, tokenizer, tmp_path/"base")
    def thinker(width=16):
        projector = ThoughtProjector(32, width) if width else None
        return LatentModel(student().plain[0], tokenizer.bos_token_id, 2, "soft", projector, MARKS)
    method = replace(SMALL["latent_sft"], thought_projector=16, marks=True)
    whole = distill(thinker(), teacher, data, method, CONFIG)
    trained = whole.student.model.projector
    assert trained.down.weight.any() and not torch.equal(trained.up.weight, ThoughtProjector(32, 16).up.weight)
    assert trained.up.weight.requires_grad and trained.up.weight.dtype == torch.float32
    without = distill(thinker(0), teacher, data, replace(method, thought_projector=0), CONFIG)
    assert without.history[0]["loss"] == whole.history[0]["loss"], "a projector begins with nothing"
    assert without.history[-1]["loss"] != whole.history[-1]["loss"]
    size = sum(p.numel() for p in trained.parameters())
    assert whole.flops - without.flops == pytest.approx(8 * 8 * 4 * 2 * 6 * size) and whole.tokens == without.tokens

    def trip(model, step):
        if step == 6: raise KeyboardInterrupt
        return {}
    config = replace(CONFIG, checkpoint_dir=str(tmp_path/"run"))
    with pytest.raises(KeyboardInterrupt): distill(thinker(), teacher, data, method, config, probe=trip)
    again = distill(thinker(), teacher, data, method, config)
    assert "resumed from step 4 of 8" in "".join(capsys.readouterr())
    assert model_hash(again.student) == model_hash(whole.student) != model_hash(without.student)

    loaded, _ = load_latent(
        save_latent(whole.student, tokenizer, tmp_path/"student", tmp_path/"base"), dtype="float32", device="cpu"
    )
    short = with_latents(data, 4, tokenizer.bos_token_id, MARKS)
    assert torch.equal(loaded(short.input_ids).logits, whole.student(short.input_ids).logits)
    assert answered(loaded, short) == answered(whole.student, short)
    with pytest.raises(FileNotFoundError, match="use load_model"): load_latent(tmp_path/"base")


def test_without_options_a_thinker_is_the_one_it_was(world):
    "Bit for bit: the same tokens, the same weights, the same losses; and a projector of nothing changes no logit."
    tokenizer, data, teacher, student = world
    short = with_latents(data, 4, tokenizer.bos_token_id)
    marked = with_latents(data, 4, tokenizer.bos_token_id, MARKS)
    keep = ~torch.isin(marked.input_ids, torch.tensor(MARKS))
    for i, n in enumerate(short.segments[:, 3]):
        assert torch.equal(marked.input_ids[i][keep[i]][:n], short.input_ids[i, :n])
    assert torch.equal(marked.segments - short.segments, torch.tensor([0, 0, 2, 2]).expand(48, 4))
    assert torch.equal(marked.cue_pos, short.cue_pos + 2)
    model = student()
    assert list(model.state_dict()) == list(model.plain[0].state_dict()) and model.own_parameters() == []
    beside = LatentModel(model.plain[0], tokenizer.bos_token_id, 2, projector=ThoughtProjector(32, 8))
    assert torch.equal(beside(short.input_ids).logits, model(short.input_ids).logits)
    rounds = model.with_rounds(5)
    assert rounds.model.iterations == 5 and rounds.plain[0] is model.plain[0] and rounds.model.marks is None


def test_marks_have_no_counterpart_in_the_teachers_text(world):
    _, data, teacher, student = world
    targets = []
    for model in (student(), with_options(student(), "hidden", 0)):
        objective = KVObjective(replace(SMALL["kava"], fit_steps=0), model, teacher, data, CONFIG)
        objective.start()
        targets.append((objective.target([0, 1], objective.thought[:2].input_ids.shape[1]), objective.thought))
    (own, short), (marked, long) = targets
    asks = short.segments[:2, 1]
    for i, a in enumerate(asks.tolist()):
        assert own.mask[i, a:a + 4].all() and own.mask[i].sum() == marked.mask[i].sum() == 4
        assert marked.mask[i, a + 1:a + 5].all() and long.input_ids[i, a] == MARKS[0]
        assert torch.equal(own.k[i, ..., a:a + 4, :], marked.k[i, ..., a + 1:a + 5, :])


def test_a_teacher_whose_last_step_is_dropped_teaches_shorter_words(world):
    "Both peers train so: what the last step would say is the answer. A short run, and what it reads."
    tokenizer, data, teacher, student = world
    cut = encode_problems([without_last_step(p) for p in data.problems], tokenizer)
    shorter = data.segments.diff(dim=1) - cut.segments.diff(dim=1)
    assert (shorter[:, 1] > 0).all() and not shorter[:, [0, 2]].any(), "reasoning alone is shorter"
    method, results = SMALL["kava"], {}
    for name, some in (("whole", data), ("cut", cut)):
        results[name] = distill(student(), teacher, some, method, replace(CONFIG, steps=40))
        short = KVObjective(method, student(), teacher, some, CONFIG).thought
        # after its places the student is asked for the same answers
        assert short.content_hash() == with_latents(data, 4, tokenizer.bos_token_id).content_hash()
    for result in results.values(): assert result.history[-1]["answer"] < .9 * result.history[0]["answer"]
    saved = float(shorter[:, 1].float().mean()) * CONFIG.batch * 40
    assert results["whole"].tokens - results["cut"].tokens == pytest.approx(saved, abs=1)
    assert results["cut"].history[0]["cot"] != results["whole"].history[0]["cot"]
    assert model_hash(results["cut"].student) != model_hash(results["whole"].student)


def test_nan_stops(world, tmp_path):
    _, data, teacher, student = world
    def poison(model, step):
        if step == 5: model.model.norm.weight.data.fill_(float("nan"))
        return {}
    with pytest.raises(FloatingPointError, match="at step 5"):
        distill(
            student(),
            teacher,
            data,
            SMALL["kv_mse"],
            replace(CONFIG, checkpoint_dir=str(tmp_path / "run")),
            probe=poison,
        )


def test_padded_batch_gives_the_loss_of_its_rows(world):
    _, data, teacher, student = world
    for kv in (Warped(), Kept(loss=RegressionKVLoss("smooth_l1"))):
        objective = KVObjective(KVMethod(latents=4, fit_steps=4, kv=kv), student(), teacher, data, CONFIG)
        state = objective.start()
        rows = [0, 1, 2]
        with torch.no_grad():
            together, alone = objective.parts(rows, 0, state), [objective.parts([r], 0, state) for r in rows]
        for part in ("kv_k", "kv_v"): assert abs(together[part] - sum(a[part] for a in alone) / 3) < 1e-4


MARKS = (3, 4)                                   # bytes that no problem has


def with_options(student: LatentModel, thought: str = "soft", width: int = 16, marks=MARKS) -> LatentModel:
    "The same model with a projector that says something already, and marks around its places."
    projector = None
    if width:
        projector = ThoughtProjector(student.config.hidden_size, width, seed=1)
        torch.nn.init.normal_(projector.down.weight, generator=torch.Generator().manual_seed(2))
    return LatentModel(student.plain[0], student.model.latent_id, student.model.iterations, thought, projector, marks)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "name", ("latent_sft", "soft", "no_places", "pause", "kv_structured", "kava", "kava options", "kv_mse options")
)
def test_a_question_read_once_gives_the_losses_of_the_plain_form(world, arch, name, monkeypatch):
    _, data, teacher, student = world
    name, _, options = name.partition(" ")
    method = KV_METHODS["latent_sft" if name == "soft" else name]
    method = replace(method, fit_steps=4, latents=min(method.latents, 4))
    s, losses, gradients = student(0 if name == "pause" else 2, arch), [], []
    if name == "soft": s = LatentModel(s.plain[0], s.model.latent_id, 2, "soft")
    if options: s = with_options(s)
    objective = KVObjective(method, s, teacher, data, CONFIG)
    state = objective.start()
    for fast in (True, False):
        if not fast: monkeypatch.setattr(think, "one_run", lambda student: False)
        s.zero_grad()
        parts = objective.parts([3, 1, 4, 5, 9], 0, state)
        sum(parts.values()).backward()
        losses.append({part: float(x) for part, x in parts.items()})
        gradients.append(torch.cat([p.grad.flatten() for p in s.parameters() if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[1].norm()


@pytest.mark.parametrize("options", (False, True))
def test_answers_after_own_places_are_those_of_decoding(world, options):
    tokenizer, data, teacher, student = world
    model = with_options(student()) if options else student()
    distill(model, teacher, data, SMALL["latent_sft"], replace(CONFIG, steps=40))
    short = with_latents(data, 4, tokenizer.bos_token_id, MARKS if options else None)
    _, right = solve(model, short, tokenizer, "cue", 6)
    found = ablate_places(model, short, tokenizer, 6)
    assert found["none"]["right"] == right and list(found) == list(ABLATIONS)
    exact = answered(model, short)
    assert all(r for r, e in zip(right, exact) if e), "what is said exactly is right"
    ids, mask = short.input_ids, torch.arange(short.input_ids.shape[1]) <= short.cue_pos[:, None]
    new = greedy_decode(model, torch.where(mask, ids, 0), mask.long(), 6, tokenizer.eos_token_id)
    said = [tokenizer.decode(n, skip_special_tokens=True, clean_up_tokenization_spaces=False) for n in new]
    assert answer_texts(model, short, tokenizer, "none", 6) == said


def test_places_that_are_ablated_say_something_else(world):
    "Only the places change, and keys are turned to where they then stand."
    tokenizer, data, _, student = world
    model, short = student(), with_latents(data[:6], 4, tokenizer.bos_token_id)
    from rcid.kv.ablation import ablated
    run = run_places(model, short)
    own, zeroed = (ablated(model, run, how, []) for how in ("none", "zeroed"))
    n = run.question.ids.shape[1]
    for (k, v), (k0, v0) in zip(own, zeroed):
        assert torch.equal(k[:, :, :n], k0[:, :, :n]) and not k0[:, :, n:].any() and not v0[:, :, n:].any()
    swapped = ablated(model, run, "other", [1, 0, 2, 3, 4, 5])
    for (k, v), (k1, v1) in zip(own, swapped):
        assert torch.equal(v1[0, :, n:], v[1, :, n:]) and torch.allclose(k1[2], k[2], atol=1e-5)
        same_place = run.places.at[0, 0] == run.places.at[1, 0]
        assert same_place == torch.allclose(k1[0, :, n:], k[1, :, n:], atol=1e-5), "keys are turned to where they stand"


def test_places_that_are_ablated_are_those_that_are_traced(world):
    "The question bit for bit; a place to rounding, as a tracer leaves out those that no longer change."
    tokenizer, data, _, student = world
    model, short = student().eval(), with_latents(data[:6], 4, tokenizer.bos_token_id)
    run, thinker = run_places(model, short), Thinker(model, 4, tokenizer.bos_token_id)
    with torch.no_grad():
        question = thinker.read(short)
        places = thinker.think(question, run.places)[-1]
    for both, *parts in zip(run.keys_values, question.keys_values, places.keys_values, strict=True):
        for x, asked, thought in zip(both, *parts, strict=True):
            n = asked.shape[2]
            assert torch.equal(x[:, :, :n], asked) and torch.allclose(x[:, :, n:], thought, atol=1e-5)


def test_problems_go_to_the_student_and_its_mode_stays(world):
    "A stage's problems are on the CPU, its student is not; it is in eval mode while its places are read."
    tokenizer, data, _, student = world
    model, short, asked, modes = student(), with_latents(data[:6], 4, tokenizer.bos_token_id), [], []

    class Elsewhere:
        def to(self, device):
            asked.append(device)
            return short

    expected = run_places(model.eval(), short)
    get_adapter(model).layers[0].register_forward_pre_hook(lambda layer, _: modes.append(layer.training))
    found = run_places(model.train(), Elsewhere())
    assert model.training and asked == [model_device(model)] and modes and not any(modes)
    for layer, own in zip(found.keys_values, expected.keys_values):
        for x, y in zip(layer, own): assert torch.equal(x, y)


def test_another_problems_teacher_is_never_the_own_one(world):
    _, data, teacher, student = world
    methods = SMALL["kava"], replace(SMALL["kava"], shuffled=True)
    own, other = (KVObjective(method, student(), teacher, data, CONFIG) for method in methods)
    states = own.start(), other.start()
    for a, b in zip(*(s.state_dict().values() for s in states)): assert torch.equal(a, b), "fitted to the right ones"
    assert not (own.targets["hidden"][:] == other.targets["hidden"][:]).flatten(1).all(1).any()
    rows = list(range(8))
    ours, theirs = own.target(rows, 40), other.target(rows, 40)
    assert torch.equal(ours.mask, theirs.mask) and not torch.equal(ours.k, theirs.k)


def test_variants_are_methods_with_fields_changed():
    kv = load_params().kv
    kv = kv.model_copy(update=dict(variants={"few": dict(method="kava", latents=2), "lost": dict(method="kavaa")}))
    assert method_of("few", kv) == replace(KV_METHODS["kava"], latents=2, fit_steps=kv.train.fit_steps)
    assert method_of("no_places", kv).latents == 0 and method_of("kava", kv).latents == kv.train.latents
    for name, unknown in (("many", "many"), ("lost", "kavaa")):
        with pytest.raises(ValueError, match=f"unknown KV method '{unknown}'"): method_of(name, kv)


def test_a_teacher_below_the_gate_stops_its_stage(root, monkeypatch):
    "Before it is saved, with its accuracy on validation problems; a student may be as bad as it is."
    nb = json.loads((root/"nbs"/"experiments"/"kv_models.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code"]
    trains = next(source for source in cells if "check_competent({" in source)
    saves = next(i for i, source in enumerate(cells) if source.startswith("save_model("))
    assert cells.index(trains) < saves
    made, kv = SimpleNamespace(steps=0), load_params().kv
    given = dict(made=made, kv=kv, model=None, tokenizer=None, val="val", test="test", check_competent=check_competent)
    given["solve"] = lambda model, problems, *_, **__: ({"val": kv.gate - .01, "test": .9}[problems], [])
    with pytest.raises(ValueError, match=r"teacher of experiment 6 is right on 0\.49 of the prompts, below the gate"):
        exec(trains, given | dict(role="teacher"))
    exec(trains, student := given | dict(role="student"))
    assert student["accuracy"] == .9


def test_there_is_one_loop(root):
    tree = ast.parse((root/"rcid"/"kv"/"objective.py").read_text(encoding="utf-8"))
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in ("backward", "zero_grad")]


def test_causal_evaluation_applies_unchanged(world):
    tokenizer, _, teacher, student = world
    pairs, model = build_pairs(reasoning_rows(tokenizer, largest=9), tokenizer, n=12, task="reasoning"), student()
    sites = [Site(0, "number"), Site(1, "number"), Site(2, "end")]
    report = causal_consistency(teacher, model, pairs, sites, map_layers(4, 2), n_boot=100, n_shuffles=100)
    same = causal_consistency(teacher, model.plain[0], pairs, sites, map_layers(4, 2), n_boot=100, n_shuffles=100)
    assert report == same or report.pearson == pytest.approx(same.pearson, abs=1e-5, nan_ok=True)
    assert (
        causal_consistency(teacher, teacher, pairs, sites, list(range(4)), n_boot=100, n_shuffles=100).consistency
        > 0.999
        and task_accuracy(model, pairs)["n"] == 12
    )


def test_several_passes_take_the_slow_path(world):
    """A restart after a layer would leave the places as they were: with places in the input the reference runs, and it
    alone sees them change."""
    tokenizer, _, _, student = world
    pairs, model = build_pairs(reasoning_rows(tokenizer, largest=9), tokenizer, n=6), student()
    # without places the fast path is found to be right first
    causal_effects(model, pairs, [Site(0, "end")])
    add = lambda ids: torch.cat([ids, torch.full((len(ids), 2), tokenizer.bos_token_id)], 1)
    keep = pairs.attention_mask.sum(1) == pairs.attention_mask.sum(1)[0]
    some = pairs[keep.nonzero()[:, 0]].trimmed()
    some = replace(
        some,
        clean_ids=add(some.clean_ids),
        corrupt_ids=add(some.corrupt_ids),
        attention_mask=torch.ones_like(add(some.clean_ids)),
        answer_pos=some.answer_pos + 2,
        key_positions=some.key_positions | {"end": some.answer_pos + 2},
    )
    sites = [Site(0, "number"), Site(1, "number"), Site(0, "end")]
    with pytest.warns(UserWarning, match="several passes"): effects = causal_effects(model, some, sites)
    assert torch.equal(effects, naive_effects(model, some, sites)) and effects[:, 0].abs().max() > 0
    assert (
        effects - causal_effects(LatentModel(model.plain[0], tokenizer.bos_token_id, 0), some, sites)
    ).abs().max() > 1e-6


@pytest.mark.parametrize("wrong, message", [
    (lambda: Kept("newest"), "'kava', 'rkv'"),
    # kept tokens differ between heads: there is no attention to compare or to weigh by
    (lambda: Kept(loss=StructuralKVLoss()), "Kept\nloss"),
    (lambda: Kept(weighting=AttentionWeighting("teacher")), "Unexpected keyword argument"),
    (lambda: Warped(loss="mse"), "loss"),
    (lambda: Warped(places="answer"), "'all' or 'latents'"),
    (lambda: Warped(weight=0), "greater than 0"),
    (lambda: KVMethod(latents=-1), "greater than or equal to 0"),
    (lambda: KVMethod(latents=0, kv=Kept("crop")), "no places to match"),
    (lambda: KVMethod(latents=0, kv=Warped(places="latents")), "no places to match"),
    (lambda: KVMethod(a_answer=0, a_cot=0), "nothing to learn"),
    (lambda: KVMethod(a_codl=1.0), "Unexpected keyword argument"),
    (lambda: KVMethod(kv=StructuralKVLoss()), "kv"),
    (lambda: KVMethod(iterations=-1), "greater than or equal to 0"),
    (lambda: KVMethod(codi_hidden="embedding"), "'residual' or 'normed'"),
    (lambda: kv_method("kv"), "unknown KV method 'kv'")])
def test_what_cannot_be_written(wrong, message):
    with pytest.raises(ValueError, match=message): wrong()


@pytest.mark.parametrize("kv", (
    Kept("rkv"), Kept("rkv", loss=MercatorKVLoss(), places="all"), Kept("kava", loss=None, cka=0.1),
    Warped(loss=RegressionKVLoss("mse"), weighting=AttentionWeighting("student"), cka=0.1), Warped(places="latents")))
def test_parts_that_no_named_method_has_learn_too(world, kv):
    _, data, teacher, student = world
    result = distill(student(), teacher, data, KVMethod(latents=4, fit_steps=4, kv=kv), CONFIG)
    last, first = result.history[-1], result.history[0]
    assert last["loss"] < first["loss"] and ("kv" in last) == (kv.loss is not None) and ("cka" in last) == (kv.cka > 0)


def test_bad_input(world):
    tokenizer, data, teacher, student = world
    with pytest.raises(ValueError, match="pass LatentModel"):
        KVObjective(SMALL["kava"], student().plain[0], teacher, data, CONFIG)
    with pytest.raises(ValueError, match="occurs in a problem"): with_latents(data, 2, int(data.input_ids[0, 3]))
    with pytest.raises(ValueError, match="must not be negative"): with_latents(data, -1, tokenizer.bos_token_id)
    with pytest.raises(ValueError, match="a token below"): LatentModel(student().plain[0], 10_000, 1)
    with pytest.raises(ValueError, match="unknown thought 'words': use hidden or soft"):
        LatentModel(student().plain[0], tokenizer.bos_token_id, 1, "words")
    with pytest.raises(ValueError, match="begins with a latent place"):
        student()(torch.full((1, 3), tokenizer.bos_token_id))
    with pytest.raises(ValueError, match="at least 1"): greedy_decode(teacher, data.input_ids, data.attention_mask, 0)
    with pytest.raises(ValueError, match="padded on the right"):
        greedy_decode(teacher, data.input_ids, data.attention_mask.flip(1), 2)
    broken = load_model(dict(arch="llama", vocab=len(tokenizer), seed=3), dtype="float32", device="cpu")[0]
    with torch.no_grad(): broken.model.layers[1].self_attn.v_proj.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or inf"):
        KVObjective(SMALL["kava"], student(), broken, data, CONFIG).start()
    # more than padding
    other = load_model(dict(arch="llama", vocab=len(tokenizer) + 1031), dtype="float32", device="cpu")[0]
    with pytest.raises(ValueError, match="vocabulary mismatch"):
        KVObjective(SMALL["kava"], student(), other, data, CONFIG)


def test_what_cannot_be_ablated(world):
    tokenizer, data, _, student = world
    with pytest.raises(ValueError, match="no places: nothing can be ablated"):
        answer_texts(student(), with_latents(data[:2], 0, tokenizer.bos_token_id), tokenizer)
    short = with_latents(data[:2], 3, tokenizer.bos_token_id)
    with pytest.raises(ValueError, match="unknown ablation 'noise'"): answer_texts(student(), short, tokenizer, "noise")
    from rcid.kv.ablation import others_of
    with pytest.raises(ValueError, match="all 3 problems have the answer 4"): others_of(["4"] * 3)


def test_options_that_do_not_fit(world):
    tokenizer, data, teacher, student = world
    latent, model = tokenizer.bos_token_id, student()
    for marks in ((latent, 3), (3, 3), (3, latent)):
        with pytest.raises(ValueError, match="three different tokens"): with_latents(data, 4, latent, marks)
    used = int(data.input_ids[0, 0])
    with pytest.raises(ValueError, match=f"token {used} occurs"): with_latents(data, 4, latent, (3, used))
    for marks in ((3,), (3, 10**6), (3, None)):
        with pytest.raises(ValueError, match="two tokens below"): LatentModel(model.plain[0], latent, 2, marks=marks)
    with pytest.raises(ValueError, match="a projector of 8 for a model of 32"):
        LatentModel(model.plain[0], latent, 2, projector=ThoughtProjector(8, 4))
    with pytest.raises(ValueError, match="width 0: needs at least 1"): ThoughtProjector(8, 0)
    for changes, what in ((dict(thought_projector=4), "a projector of thoughts"), (dict(marks=True), "marks around")):
        with pytest.raises(ValueError, match=f"this method has {what}"):
            KVObjective(replace(SMALL["latent_sft"], **changes), model, teacher, data, CONFIG)


def test_solve_counts_right_numbers(world):
    tokenizer, data, teacher, _ = world
    share, right = solve(teacher, data[:6], tokenizer, max_new=3)
    assert share == sum(right) / 6
    with pytest.raises(ValueError, match="unknown upto"): solve(teacher, data, tokenizer, "end")
