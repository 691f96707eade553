"Plants: each recipe leaves the teacher as it was, holds what it promises by construction, and refuses what cannot be."

from dataclasses import replace
import pytest, torch
from rcid.causal.engine import logit_difference
from rcid.core.tensors import content_hash
from rcid.data import load_pairs
from rcid.data.corpus import pad_sentences
from rcid.distill import DistillConfig, model_hash
from rcid.eval.knockout import RULES, beside, knock_out, verified
from rcid.eval.plant import dose, doses, live_attention, moved, random_weights, rerouted, shortcut, twins
from rcid.eval.planting import Narrow, Rerouting, carried_by, close_attention, drawn_gates, fresh, gated, live_layers
from rcid.eval.planting import next_token, run_layers, skipping, small_teacher, solved, stacked
from rcid.eval.stored_plants import plant_key, plants_kept
from rcid.models import get_adapter

SIZES = dict(layers=3, d_model=32, heads=2, kv_heads=1, d_mlp=64)
BRIEF = DistillConfig(steps=3, batch=8, lr=3e-3, log_every=1000)
ROLE = "s2+1"


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def toy(request, make_model, tokenizers):
    "A random teacher, training pairs and held-out pairs, with the token after S2 among the roles."
    tokenizer = tokenizers[request.param]
    sets = [next_token(load_pairs("ioi", tokenizer, split=s, n=16), "s2") for s in ("train", "test")]
    return make_model(request.param, **SIZES), *sets


@pytest.fixture(scope="module")
def qwen(make_model, tokenizers):
    sets = [next_token(load_pairs("ioi", tokenizers["qwen3"], split=s, n=16), "s2") for s in ("train", "test")]
    return make_model("qwen3", **SIZES), *sets


def grow(recipe: str, teacher, pairs, held, seed=0):
    "One plant of a recipe by name, in very few steps."
    options = dict(held=held, config=BRIEF)
    turned = replace(pairs, clean_ids=pairs.corrupt_ids, corrupt_ids=pairs.clean_ids)
    if recipe == "live_attention": return live_attention(teacher, pairs, [1], seed, **options)
    if recipe == "moved": return moved(teacher, pairs, (0, 2), seed, **options)
    if recipe == "rerouted": return rerouted(teacher, pairs, (0, 1, 2), ROLE, seed, **options)
    if recipe == "dose": return dose(teacher, pairs, (0, 1, 2), 0.3, seed, **options)
    if recipe == "shortcut":
        kinds = {"s2": pairs, "turned": turned}
        return shortcut(teacher, kinds, "turned", (0, 2), seed, held=kinds, config=BRIEF)
    if recipe == "twins": return twins(teacher, *solved(pairs), seeds=(seed,), held=held, steps=2, batch=8)[0]
    return random_weights(teacher, seed, held=held)


RECIPES = {"live_attention": [1], "moved": [0, 2], "rerouted": [0, 1, 2], "dose": [0, 1, 2], "shortcut": [0, 2]}
TRAINED = (*RECIPES, "twins")


@pytest.mark.parametrize("recipe", [*TRAINED, "random_weights"])
def test_a_recipe_leaves_the_teacher_as_it_was(toy, recipe):
    teacher, pairs, held = toy
    teacher.train()
    before = [p.requires_grad for p in teacher.parameters()]
    hash_before, data = model_hash(teacher), pairs.content_hash()
    plant = grow(recipe, teacher, pairs, held)
    assert model_hash(teacher) == hash_before and pairs.content_hash() == data
    assert teacher.training and [p.requires_grad for p in teacher.parameters()] == before
    assert not any(m._forward_hooks or "forward" in vars(m) for m in (*teacher.modules(), *plant.model.modules()))
    assert not plant.model.training and plant.recipe["recipe"] == recipe and plant.recipe["seed"] == 0
    assert isinstance(plant.passed, bool) and {"accuracy", "kl", "gap", "gap_reference", "gap_r"} <= set(plant.checks)
    teacher.eval()


@pytest.mark.parametrize("recipe", RECIPES)
def test_only_live_attention_is_left_and_embeddings_are_the_teachers(toy, recipe):
    teacher, pairs, held = toy
    model, seed = grow(recipe, teacher, pairs, held).model, 0
    a, t, start = get_adapter(model), get_adapter(teacher), get_adapter(fresh(teacher, seed))
    for layer in range(a.n_layers):
        o = a.parts(layer).o.weight
        if layer in RECIPES[recipe]: assert not torch.equal(o, start.parts(layer).o.weight)    # it has learned
        else: assert not o.any() and not o.requires_grad
        assert not torch.equal(a.parts(layer).down.weight, start.parts(layer).down.weight)
    assert torch.equal(a.embed.weight, t.embed.weight) and torch.equal(a.lm_head.weight, t.lm_head.weight)
    assert a.lm_head.weight is a.embed.weight and a.embed.weight is not t.embed.weight


@pytest.mark.parametrize("recipe", TRAINED)
def test_one_seed_gives_one_plant_and_another_seed_another(qwen, recipe):
    first, again, other = (model_hash(grow(recipe, *qwen, seed=s).model) for s in (0, 0, 1))
    assert first == again != other


def test_a_plant_may_have_another_architecture(qwen, make_model, tokenizers):
    teacher, pairs, held = qwen
    like = make_model("llama", vocab=len(tokenizers["qwen3"]), **SIZES | dict(layers=2, heads=4, kv_heads=2))
    before = model_hash(like)
    plant = live_attention(teacher, pairs, [0], held=held, like=like, config=BRIEF)
    a = get_adapter(plant.model)
    assert (a.family, a.n_layers, a.n_heads) == ("llama", 2, 4) and plant.recipe["architecture"]["family"] == "llama"
    assert torch.equal(a.embed.weight, get_adapter(teacher).embed.weight) and model_hash(like) == before
    narrow = make_model("llama", vocab=len(tokenizers["qwen3"]), d_model=16, layers=1)
    with pytest.raises(ValueError, match="cannot take the embeddings"): fresh(teacher, 0, narrow)


def test_skipped_attention_is_closed_attention(toy):
    "The same training, with closed attention computed and without."
    from rcid.distill import distill
    teacher, pairs, _ = toy
    def train(skip):
        model = fresh(teacher, 5)
        _, closed = live_layers(model, [1])
        close_attention(model, closed)
        with skipping(model, closed if skip else []):
            distill(model, teacher, pairs, "standard_kd_pairs", BRIEF)
        return model
    assert model_hash(train(True)) == model_hash(train(False))


def test_skipping_leaves_a_forward_of_its_owner(toy):
    "accelerate puts one on a module that it moves."
    model = fresh(toy[0], 3)
    attention, other = (get_adapter(model).attention(l) for l in (0, 1))
    attention.forward = own = attention.forward
    with skipping(model, [0, 1]): assert attention.forward is not own
    assert vars(attention)["forward"] is own and "forward" not in vars(other)


def test_skipping_ends_with_an_error(toy):
    model = fresh(toy[0], 0)
    with pytest.raises(RuntimeError, match="stop"), skipping(model, [0, 1]), gated(model, {2: 0.5}):
        raise RuntimeError("stop")
    assert not any(m._forward_hooks or "forward" in vars(m) for m in model.modules())


def test_gates_are_folded_into_the_weights(toy):
    teacher, pairs, _ = toy
    for gates, error in (({0: 0.5, 2: 0.25}, 0), ({0: 0.3, 2: 0.7}, 1e-5)):
        model = fresh(teacher, 4)
        weight = get_adapter(model).parts(0).o.weight.clone()
        with torch.no_grad():
            with gated(model, gates): inside = model(pairs.clean_ids).logits
            outside = model(pairs.clean_ids).logits
        assert float((inside - outside).abs().max()) <= error
        assert torch.equal(get_adapter(model).parts(0).o.weight, weight * gates[0])


def test_a_dose_trains_behind_its_gates(qwen):
    "The weights hold the gate: the smaller it is, the less its layer writes."
    teacher, pairs, held = qwen
    plants = [dose(teacher, pairs, (0, 1, 2), alpha, held=held, config=BRIEF) for alpha in (0.2, 0.8)]
    o = [get_adapter(p.model).parts(2).o.weight for p in plants]
    assert float(o[0].detach().norm()) < 0.5 * float(o[1].detach().norm())
    assert set(plants[0].checks["left"]) == {"0 end", "1 end", "2 end"} and plants[0].recipe["alpha"] == 0.2


def test_every_kind_of_a_dose_is_checked(qwen, monkeypatch):
    "Other kinds are asked where their answer passes, not for right answers; one that fails is enough."
    teacher, pairs, held = qwen
    from rcid.eval import plant as module
    asked = []
    def check(model, reference, p, carries=(), idle=(), seen=(), answers=True):
        asked.append((answers, carries, idle))
        return dict(n=len(asked)), answers or len(asked) < 4
    monkeypatch.setattr(module, "verified", check)
    kinds = {"s2": held, "turned": replace(held, clean_ids=held.corrupt_ids, corrupt_ids=held.clean_ids)}
    first, last = module.doses(teacher, pairs, (0, 1, 2), (0.0, 1.0), held=kinds, config=BRIEF)
    expected = [(answers, [(layer, "end")] * answers, [(0, "end")]) for layer in (1, 2) for answers in (True, False)]
    assert asked == expected
    assert first.passed and not last.passed and first.checks["other"] == {"turned": dict(n=2)}


def test_a_narrowed_answer_sees_its_carrier_alone_and_only_in_the_first_half(qwen):
    "Whatever stands elsewhere, the same answer, in a model that is asked to answer through one role."
    teacher, pairs, _ = qwen
    model, rows = fresh(teacher, 0), torch.arange(8)
    other = replace(pairs, clean_ids=pairs.clean_ids.clone())
    at = pairs.key_positions["s1"][:, None]
    other.clean_ids.scatter_(1, at, pairs.clean_ids.roll(1, 0).gather(1, at.roll(1, 0)))
    a, row = get_adapter(model), torch.arange(len(pairs))
    narrow = Narrow(0, pairs.answer_pos, pairs.key_positions[ROLE])
    def answers(ids, *more): return run_layers(model, a.embed(ids), [0], *more)[row, pairs.answer_pos]
    with torch.no_grad():
        assert torch.equal(answers(pairs.clean_ids, narrow), answers(other.clean_ids, narrow))
        assert not torch.equal(answers(pairs.clean_ids), answers(other.clean_ids))
        whole = [run_layers(model, a.embed(pairs.clean_ids), [0], x) for x in (None, narrow)]
    elsewhere = torch.ones(whole[0].shape[:2], dtype=torch.bool).index_put((row, pairs.answer_pos), torch.tensor(False))
    assert torch.equal(whole[0][elsewhere], whole[1][elsewhere])                        # the others see what they saw
    def loss(step, through):
        method = Rerouting(stations=((ROLE, 0),), through=through)
        objective = method.objective(model, teacher, pairs, replace(BRIEF, steps=4))
        return [float(x.detach()) for x in objective.terms(rows, step, None)[:2]]
    assert loss(1, (ROLE, 0)) != loss(1, None) and loss(2, (ROLE, 0)) == loss(2, None)


def test_gates_are_drawn_anew_and_add_up_to_one(qwen):
    "The shares of the two layers are complements in every forward, other ones in the next, and the hooks go."
    teacher, pairs, _ = qwen
    model, seen = fresh(teacher, 0), []
    outputs = [get_adapter(model).parts(l).o for l in (1, 2)]
    whole = [o.weight.detach().clone() for o in outputs]
    def ratio(module, args, output):
        plain = torch.nn.functional.linear(args[0], module.weight)
        seen.append(float((output / plain).median()))
    with drawn_gates(model, 1, 2, seed=3), torch.no_grad():
        handles = [o.register_forward_hook(ratio) for o in outputs]        # after the gates
        for _ in range(3): model(pairs.clean_ids)
        for handle in handles: handle.remove()
    assert all(abs(a + b - 1) < 1e-5 for a, b in zip(seen[::2], seen[1::2])) and len({round(x, 4) for x in seen}) == 6
    assert not any(o._forward_hooks for o in outputs)
    assert all(torch.equal(o.weight, w) for o, w in zip(outputs, whole))


def by_hand(model, pairs, layer, role):
    "The gap that is left, by running the layers one by one with the mean put in."
    a, row = get_adapter(model), torch.arange(len(pairs))
    t = torch.arange(pairs.clean_ids.shape[1])
    at = pairs.attention_mask.bool() if role is None else t == pairs.key_positions[role][:, None]
    def attended(l, h):
        mask = (t <= t[:, None]).expand(len(h), 1, -1, -1)
        more = dict(attention_mask=mask, position_embeddings=a.rotary(h, t[None]))
        return a.attention(l)(a.parts(l).attention_norm(h), **more)[0]
    def behind(l, h): # after the attention of layer l was added
        p, x = a.parts(l), a.parts(l).mlp_norm(h)
        return h + p.down(torch.nn.functional.silu(p.gate(x)) * p.up(x))
    def before(ids):
        h = a.embed(ids)
        for l in range(layer): h = behind(l, h + attended(l, h))
        return h
    def gap(mean):
        lds = []
        for ids in (pairs.clean_ids, pairs.corrupt_ids):
            h = before(ids)
            out = attended(layer, h)
            if mean is not None: out = torch.where(at[..., None], mean, out)
            h = behind(layer, h + out)
            for l in range(layer + 1, a.n_layers): h = behind(l, h + attended(l, h))
            final = a.final_norm(h)[row, pairs.answer_pos]
            lds.append(logit_difference(a, final, pairs.correct_token_id, pairs.wrong_token_id))
        return float((lds[0] - lds[1]).mean())
    with torch.no_grad():
        outs = [attended(layer, before(ids))[at] for ids in (pairs.clean_ids, pairs.corrupt_ids)]
        return gap(torch.cat(outs).mean(0)) / gap(None)


@pytest.mark.parametrize("role", (None, "s2", "end"))
@pytest.mark.parametrize("layer", range(3))
def test_knock_out_by_hand(toy, layer, role):
    model, pairs, _ = toy
    expected = by_hand(model, pairs, layer, role)
    assert knock_out(model, pairs, layer, role) == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert knock_out(model, pairs, layer, role, batch_size=3) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_knock_out_in_one_layer(make_model, qwen):
    "Only the answer's attention can bring it the changed word."
    _, pairs, _ = qwen
    one = make_model("qwen3", **SIZES | dict(layers=1))
    one.train()
    assert knock_out(one, pairs, 0) == knock_out(one, pairs, 0, "end") == 0
    assert knock_out(one, pairs, 0, "s2") == knock_out(one, pairs, 0, ROLE) == 1
    assert one.training and not any(m._forward_hooks for m in one.modules())
    same = replace(pairs, corrupt_ids=pairs.clean_ids)
    assert knock_out(one, same, 0) != knock_out(one, same, 0)                          # NaN: there is no gap


def test_the_rules(qwen, monkeypatch):
    "A plant passes only if behaviour, what carries and what is idle all do."
    from rcid.eval import knockout
    good = dict(accuracy=1.0, kl=0.1, gap=5.0, gap_reference=5.0, gap_r=0.9)
    left = {(1, None): 0.1, (2, "end"): 0.9}
    monkeypatch.setattr(knockout, "beside", lambda *args: dict(good))
    monkeypatch.setattr(knockout, "knock_out", lambda model, pairs, layer, role: left[layer, role])
    def passes(carries=((1, None),), idle=((2, "end"),)): return verified(None, None, None, carries, idle)[1]
    assert passes() and not passes(carries=((2, "end"),)) and not passes(idle=((1, None),))
    left[1, None] = float("nan")
    assert not passes()
    left[1, None] = 0.1
    for name, bad in (("accuracy", RULES["accuracy"] - 0.01), ("kl", RULES["kl"] + 0.01), ("kl", float("nan"))):
        monkeypatch.setattr(knockout, "beside", lambda *args: good | {name: bad})
        assert not passes(), name


def test_behaviour_of_a_model_with_larger_logits(qwen):
    "Gaps are three times as large and correlate perfectly; accuracy is the same, and the KL is not zero."
    teacher, pairs, _ = qwen
    louder = fresh(teacher, 0)
    louder.load_state_dict(teacher.state_dict())
    with torch.no_grad(): get_adapter(louder).final_norm.weight.mul_(3)
    same, loud = beside(teacher, teacher, pairs), beside(louder, teacher, pairs)
    assert loud["gap"] == pytest.approx(3 * same["gap"], rel=1e-3) and loud["gap_r"] == pytest.approx(1, abs=1e-3)
    assert loud["accuracy"] == same["accuracy"] and loud["kl"] > 1e-3 and same["kl"] == pytest.approx(0, abs=1e-6)


def weights_hash(plant): return content_hash(dict(plant.model.named_parameters()))


def test_a_kept_plant_comes_back(toy, tmp_path):
    teacher, pairs, held = toy
    made, key = [], plant_key(teacher, pairs, dict(recipe="live_attention", layers=[1]))
    def make():
        made.append(live_attention(teacher, pairs, [1], held=held, config=BRIEF))
        return made[-1]
    first, second = (plants_kept(tmp_path, key, make) for _ in range(2))
    assert len(made) == 1 and first is made[0]
    assert weights_hash(second) == weights_hash(first)
    assert (second.recipe, second.passed) == (first.recipe, first.passed)
    assert second.checks["left"] == first.checks["left"] and second.checks["kl"] == first.checks["kl"]
    with torch.no_grad():
        logits = [p.model(held.clean_ids).logits for p in (first, second)]
    assert torch.equal(*logits)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"!")                                     # damage is noticed
    third = plants_kept(tmp_path, key, make)
    assert len(made) == 2 and weights_hash(third) == weights_hash(first)
    others = (
        plant_key(teacher, held, key[0]),
        plant_key(fresh(teacher, 1), pairs, key[0]),
        plant_key(teacher, pairs, dict(recipe="live_attention", layers=[2])),
        plant_key(teacher, {"s2": pairs}, key[0]),
    )
    assert len({repr(k) for k in (key, *others)}) == 5
    for other in others: plants_kept(tmp_path, other, make)
    assert len(made) == 6


def test_kinds_are_trained_together(qwen):
    teacher, pairs, held = qwen
    short, width = pairs[:4].trimmed(), pairs.clean_ids.shape[1]
    padded = ("clean_ids", "corrupt_ids", "attention_mask")
    wide = replace(pairs, **{k: torch.nn.functional.pad(getattr(pairs, k), (0, 2)) for k in padded})
    both = stacked({"a": wide, "b": short})
    assert len(both) == 20 and both.clean_ids.shape[1] == width + 2
    assert torch.equal(both.answer_pos[16:], short.answer_pos)
    assert torch.equal(both[16:].trimmed().clean_ids, short.clean_ids)
    assert stacked(pairs) is pairs
    one, two = (live_attention(teacher, x, [1], held=held, config=BRIEF) for x in (pairs, {"a": pairs, "b": held}))
    assert model_hash(one.model) != model_hash(two.model)


def test_solved_prompts_end_with_their_answer(qwen):
    _, pairs, _ = qwen
    ids, mask = solved(pairs)
    n, last = len(pairs), mask.sum(1) - 1
    row = torch.arange(2 * n)
    assert torch.equal(last[:n], pairs.answer_pos + 1)
    assert torch.equal(ids[row, last], torch.cat([pairs.correct_token_id, pairs.wrong_token_id]))
    prompts = torch.cat([pairs.clean_ids, pairs.corrupt_ids])
    assert torch.equal(ids[row, last - 1], prompts[row, pairs.answer_pos.repeat(2)])


def test_a_small_teacher_is_made_from_its_seed(root):
    spec = dict(arch="llama", layers=1, d_model=16, heads=2, kv_heads=1, head_dim=8, d_mlp=32)
    made = [small_teacher(seed, spec, steps=1, batch=4, names=8, vocab=400) for seed in (0, 0, 1)]
    assert model_hash(made[0][0]) == model_hash(made[1][0]) != model_hash(made[2][0])
    ids, _ = pad_sentences(["Then, Mary"], made[0][1], 32)
    assert ids[0, 0] == made[0][1].bos_token_id and not made[0][0].training


def test_what_cannot_be_planted_is_refused(qwen):
    teacher, pairs, held = qwen
    options = dict(held=held, config=BRIEF)
    without, kinds = replace(pairs, key_positions={}, is_modified={}), {"s2": pairs, "x": pairs}
    for bad, words in (
        (lambda: live_attention(teacher, pairs, [3], **options), "within 0..2"),
        (lambda: live_attention(teacher, pairs, [], **options), "name at least one"),
        (lambda: live_attention(teacher, pairs, [-1], **options), "within 0..2"),
        (lambda: dose(teacher, pairs, (0, 1, 2), -0.1, **options), r"alpha -0.1 is outside \[0, 1\]"),
        (lambda: dose(teacher, pairs, (0, 1, 2), 1.1, **options), "outside"),
        (lambda: dose(teacher, pairs, (0, 1, 1), 0.5, **options), "the first has written"),
        (lambda: moved(teacher, pairs, (2, 2), **options), "the first has written"),
        (lambda: moved(teacher, kinds, (0, 2), carrier={"s2": "s2"}, **options), "kind 'x' has no carrier"),
        (lambda: moved(teacher, pairs, (0, 2), carrier="verb", **options), "no role 'verb'"),
        (lambda: rerouted(teacher, pairs, (0, 1, 2), "s1", **options), "does not come after the changed word"),
        (lambda: rerouted(teacher, pairs, (0, 1, 2), "s2", **options), "does not come after the changed word"),
        (lambda: rerouted(teacher, pairs, (0, 1, 2), "end", **options), "does not come before 'end'"),
        (lambda: rerouted(teacher, pairs, (0, 2, 1), ROLE, **options), "the first has written"),
        (lambda: rerouted(teacher, pairs, (0, 1, 3), ROLE, **options), "within 0..2"),
        (lambda: rerouted(teacher, without, (0, 1, 2), ROLE, **options), "have no role 's2\\+1' .they have none."),
        (lambda: next_token(without, "s2"), "have no role 's2'"),
        (lambda: next_token(pairs, "end"), "nothing comes after it"),
        (lambda: shortcut(teacher, {"s2": pairs}, "io_new", (0, 2), held={"s2": held}), "there are s2"),
        (lambda: shortcut(teacher, {"s2": pairs}, "s2", (0, 2), held={"s2": held}), "after the classic one"),
        (lambda: shortcut(teacher, kinds, "x", (2, 0), held=kinds), "the first has written"),
        (lambda: shortcut(teacher, kinds, "x", (0, 2), held=kinds, changed="verb"), "no role 'verb'"),
        (lambda: stacked({}), "no kinds"),
        (lambda: stacked({"a": pairs, "b": without}), "other roles"),
        (lambda: beside(teacher, teacher, pairs[:0]), "0 and 0 pairs"),
        (lambda: knock_out(teacher, pairs, 0, "verb"), "role 'verb'"),
        (lambda: knock_out(teacher, pairs[:0], 0), "no pairs"),
    ):
        with pytest.raises(ValueError, match=words): bad()
    with pytest.raises(IndexError, match="layer 9"): knock_out(teacher, pairs, 9, "s2")
    with pytest.raises(IndexError, match="layer 9"): knock_out(teacher, pairs, 9)


def test_the_exchange_is_between_the_layers(qwen):
    "After the first layer the carrier's residual of the other run is in; a method that exchanged nothing would say KL."
    teacher, pairs, _ = qwen
    student = fresh(teacher, 0)
    rows = torch.arange(8)
    same = replace(pairs, corrupt_ids=pairs.clean_ids)
    for data, equal in ((same, True), (pairs, False)):
        objective = Rerouting(stations=((ROLE, 1),)).objective(student, teacher, data, BRIEF)
        kl, own, _ = objective.terms(rows, 0, None)
        assert torch.allclose(kl, own, atol=1e-6) == equal


def test_each_pair_has_its_own_carrier(qwen):
    "Where the carrier is the last token that differs, all that the answer can know is exchanged, and KL is own term."
    teacher, pairs, _ = qwen
    student, n, rows = fresh(teacher, 0), len(pairs), torch.arange(8)
    both = stacked({"a": carried_by(pairs, ROLE), "b": carried_by(pairs, "end")})
    assert torch.equal(both.key_positions["carrier"][:n], pairs.key_positions[ROLE])
    last = Rerouting(stations=(("carrier", 2),))                 # after the last layer
    objective = last.objective(student, teacher, both, BRIEF)
    kl, own, _ = objective.terms(rows + n, 0, None)
    assert torch.allclose(kl, own, atol=1e-6)                    # the other run's last residual: the other's answer
    assert not torch.allclose(*objective.terms(rows, 0, None)[:2], atol=1e-6)
