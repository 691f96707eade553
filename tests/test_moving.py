"""Methods that ask for the mechanism: differences with their sizes, and what the answer becomes when a residual is the
other prompt's. Golden numbers by hand, the plain form of what is restarted, and what cannot be asked."""

import copy
from dataclasses import dataclass, replace
import pytest, torch
from rcid.causal import Site, excluded_sites
from rcid.causal.effects import first_difference
from rcid.data import load_kinds, load_pairs, stacked
from rcid.distill import METHODS, RCID, RCIDM, DistillConfig, EffectMatch, Interchange, PairMethod, RCIDNorm
from rcid.distill import StandardKD, Together, distill, divergence, plain_distill, run_cost
from rcid.distill import maps, objective as objectives, patch_targets
from rcid.distill.config import patch_sites, plan_signals
from rcid.distill.cost import restart_flops
from rcid.distill.methods import DIITO, FitNets
from rcid.distill.method import Signals
from rcid.distill.objective import PairObjective
from rcid.distill.patch_targets import drawn_sites
from rcid.distill.restart import exchanged_by_hooks
from rcid.distill.teacher_cache import model_hash
from rcid.models import shrink
from rcid.models.rewrite import rotated

SAME = {l: l for l in range(4)}
CONFIG = DistillConfig(layer_map={0: 0, 1: 0, 2: 1, 3: 1}, steps=6, batch=8, lr=3e-3, log_every=1, checkpoint_every=2)
TOP = (Site(1, "s2"), Site(2, "end"))
MATCHING = ("rcid_m", "rcid_norm", "hidden_m", "hidden_norm")
PATCHING = ("interchange", "effect_match", "rcid_m_interchange")


@pytest.fixture(scope="module")
def world(make_model, tokenizers):
    "A teacher of four layers that answers both prompts of its pairs, and these pairs, of several lengths."
    pairs = load_pairs("ioi", tokenizers["qwen3"], split="train", n=16)
    back = replace(
        pairs,
        clean_ids=pairs.corrupt_ids,
        corrupt_ids=pairs.clean_ids,
        correct_token_id=pairs.wrong_token_id,
        wrong_token_id=pairs.correct_token_id,
    )
    model = make_model("qwen3", d_model=32, heads=2, kv_heads=1, d_mlp=64)
    both = stacked({"there": pairs, "back": back})
    distill(model, copy.deepcopy(model), both, "sft", DistillConfig(steps=60, batch=32, lr=1e-2, log_every=60))
    return model, pairs


@pytest.fixture(scope="module")
def kinds(tokenizers):
    "Two kinds of corruption of the same rows, as one set."
    return stacked(load_kinds("ioi", tokenizers["qwen3"], ["s2", "names"], split="train", n=20))


def objective_of(world, method, student=None, config=CONFIG, pairs=None):
    teacher, own = world
    method = METHODS[method] if isinstance(method, str) else method
    return PairObjective(method, shrink(teacher, 2) if student is None else student, teacher,
        own if pairs is None else pairs, config)


# golden numbers

def sites_of(clean, corrupt=None):
    "Signals of residuals that are given as [site][pair][number]."
    clean = torch.tensor(clean, dtype=torch.float)
    return Signals(sites=clean, sites_corrupt=torch.zeros_like(clean) if corrupt is None else torch.tensor(corrupt))


# s_T^2 = (25 + 25) / 4, s_S^2 = (1 + 1 + 2) / 4: three of eight differences are zero
DIFFER_T = sites_of([[[3, 4], [0, 0]], [[0, 0], [0, 5]]])
DIFFER_S = sites_of([[[1, 0], [0, 1]], [[0, 0], [1, 1]]])
# one site, mean 1 in both models; student 0, 2, -1, -1 on a scale of sqrt(1.5), teacher 1, -1, 1, -1
WHOLE_S = sites_of([[[1.], [3.]]], [[[0.], [0.]]])
WHOLE_T = sites_of([[[2.], [0.]]], [[[2.], [0.]]])


@pytest.mark.parametrize("method, s, t, golden", [
    ("rcid_m", DIFFER_S, DIFFER_T, (1.302944 + 1 + 0 + 1.171573) / 4),
    ("rcid_norm", DIFFER_S, DIFFER_T, (0.171573 + 1 + 0 + 0) / 4),
    ("hidden_m", WHOLE_S, WHOLE_T, 2 + 1 / 1.224745),
    ("hidden_norm", WHOLE_S, WHOLE_T, 2 - 2 / 1.224745),
])
def test_golden_numbers_of_residuals(method, s, t, golden):
    m = METHODS[method]
    assert float(m.loss(s, t, m.start(s, t, 0))[0]) == pytest.approx(golden, abs=1e-5)


def test_scales_and_means_are_those_of_the_start():
    for method in MATCHING:
        m, s, t = METHODS[method], *((WHOLE_S, WHOLE_T) if "hidden" in method else (DIFFER_S, DIFFER_T))
        state = m.start(s, t, 0)
        doubled = s._replace(sites=2 * s.sites, sites_corrupt=2 * s.sites_corrupt)
        assert float(m.loss(doubled, t, state)[0]) != pytest.approx(float(m.loss(s, t, state)[0]), abs=1e-3)
        # a student that is larger from the start is no other student
        assert float(m.loss(doubled, t, m.start(doubled, t, 0))[0]) == pytest.approx(
            float(m.loss(s, t, state)[0]), abs=1e-5
        )


def test_a_refit_takes_the_map_and_leaves_the_scales():
    m = RCIDM(w="procrustes")
    g = torch.Generator().manual_seed(0)
    s, t, u = (Signals(*[None] * 3, *torch.randn(2, 3, 9, 4, generator=g).unbind()) for _ in range(3))
    state, new = m.start(s, t, 0), m.start(u._replace(sites=3 * u.sites), t, 0)
    scale = state.scale_s.clone()
    m.refit(state, new)
    assert torch.equal(state.w, new.w) and torch.equal(state.scale_s, scale) and not torch.equal(scale, new.scale_s)


def test_golden_interchange():
    s = Signals(patched=torch.tensor([[[[1., 2, 4]], [[3., 2, 1]]]]))      # (draw, swap, batch, vocab)
    t = Signals(patched=torch.tensor([[[[3., 2, 1]], [[3., 2, 1]]]]))
    assert float(Interchange().loss(s, t, None)[0]) == pytest.approx(1.822630 / 2, abs=1e-5)
    warm = Interchange(temperature=3.0).loss(s, t, None)[0]
    assert warm != Interchange().loss(s, t, None)[0]
    assert warm == Interchange().loss(s._replace(temperature=3.0), t, None)[0]          # the run's, where it has none


def test_golden_effect_match():
    # gaps: teacher (6 + 2) / 2 = 4, student (3 + 1) / 2 = 2
    t = Signals(ld=torch.tensor([3., 1]), ld_corrupt=torch.tensor([-3., -1]))
    s = Signals(ld=torch.tensor([2., 1]), ld_corrupt=torch.tensor([-1., 0]))
    t = t._replace(patched_ld=torch.tensor([[[-1., 1], [1., -1]]]))        # 4/4, 0/4; back 4/4, 0/4
    s = s._replace(patched_ld=torch.tensor([[[1., 0], [-1., 2]]]))         # 1/2, 1/2; back 0/2, 2/2
    m = EffectMatch()
    own, log = m.loss(s, t, m.start(s, t, 0))
    assert float(own) == pytest.approx((0.5**2 + 0.5**2 + 1**2 + 1**2) / 4) and float(log["gap"]) == 2
    # a student's gap counts as a tenth of the teacher's at least
    closed = s._replace(ld_corrupt=s.ld - 0.01)
    assert float(m.loss(closed, t, m.start(s, t, 0))[1]["gap"]) == pytest.approx(0.4)


@pytest.mark.parametrize("method, golden", [
    (StandardKD(kind="jsd", beta=0.0), 1.822630),
    (StandardKD(kind="jsd", beta=0.1), 0.145486),
    (StandardKD(kind="jsd"), 0.353154),
    (StandardKD(kind="jsd", beta=0.9), 0.139909),
    (StandardKD(kind="jsd", beta=1.0), 1.685124),
    (METHODS["skew_kl"], 1.199411),
    (METHODS["skew_reverse_kl"], 1.182269),
])
def test_beta_and_skew_are_fields(method, golden):
    s, t = Signals(logits=torch.tensor([[1., 2, 4]])), Signals(logits=torch.tensor([[3., 2, 1]]))
    assert float(method.answer_loss(s, t)) == pytest.approx(golden, abs=1e-5)
    assert float(method.answer_loss(t, t)) == pytest.approx(0, abs=1e-6)


# identities

@pytest.mark.parametrize("method", (*MATCHING, *PATCHING))
def test_a_student_that_is_its_teacher_has_nothing_to_learn(world, method):
    config = replace(CONFIG, layer_map=SAME)
    objective = objective_of(world, method, shrink(world[0], 4), config)
    state = objective.start()
    for step in range(3):
        kl, own, _ = objective.terms(torch.arange(8), step, state)
        assert float(kl) < 1e-6 and float(own) < 1e-6, step
    # and another one has
    objective = objective_of(world, method)
    losses = [float(objective.terms(torch.arange(8), step, objective.start())[1]) for step in range(4)]
    assert max(losses) > 1e-3


@pytest.mark.parametrize("method, blind", [
    ("interchange", True), ("effect_match", True), ("rcid_norm", True), ("rcid_m", False), ("rcid_m_interchange", False)
])
def test_the_students_basis_does_not_matter(world, method, blind):
    student = shrink(world[0], 2)
    said = []
    for model in (student, rotated(student, seed=1)):
        objective = objective_of(world, method, model)
        state = objective.start()
        said.append([float(objective.terms(torch.arange(8), step, state)[1]) for step in range(3)])
    assert (said[0] == pytest.approx(said[1], abs=1e-4, rel=1e-4)) == blind


@pytest.mark.parametrize("method", (*MATCHING, *PATCHING))
def test_no_gradient_reaches_the_teacher(world, method):
    teacher, _ = world
    assert all(p.requires_grad for p in teacher.parameters())
    objective = objective_of(world, method)
    kl, own, _ = objective.terms(torch.arange(8), 0, objective.start())
    (kl + own).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.student.parameters())


# fast = plain

def loss_and_gradients(world, method, config, pairs=None, steps=3):
    objective = objective_of(world, method, config=config, pairs=pairs)
    state, losses = objective.start(), []
    rows = torch.arange(8) * (len(objective.pairs) // 8)                    # of every kind
    for step in range(steps):
        kl, own, _ = objective.terms(rows, step, state)
        losses.append((kl + own).detach())
        (kl + own).backward()
    return losses, [p.grad for p in objective.student.parameters() if p.grad is not None]


@pytest.mark.parametrize("method, kl_at", [
    ("interchange", "answer"),
    ("effect_match", "answer"),
    ("rcid_m_interchange", "answer"),
    ("effect_match", "all"),
    (Interchange(span=3, source="attached"), "answer"),
    (Interchange(draws=2), "all"),
])
@pytest.mark.parametrize("many", (False, True))
def test_restarts_are_the_plain_runs(world, kinds, monkeypatch, method, kl_at, many):
    config, pairs = replace(CONFIG, kl_at=kl_at), kinds if many else None
    fast = loss_and_gradients(world, method, config, pairs)
    monkeypatch.setattr(objectives, "restarts", lambda model: False)
    monkeypatch.setattr(patch_targets, "why_not_restarted", lambda *_: "a test asks for the plain way")
    def refuse(*_, **__): raise AssertionError("not the plain way")
    monkeypatch.setattr(patch_targets, "sweep", refuse)
    monkeypatch.setattr(objectives, "exchanged", refuse)
    slow = loss_and_gradients(world, method, config, pairs)
    for x, y in zip(fast, slow):
        assert len(x) == len(y) and all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(x, y))
    assert max(float(x) for x in fast[0]) > 1e-3


def test_a_source_that_is_attached_has_another_gradient_and_the_same_loss(world):
    (a, of_a), (d, of_d) = (loss_and_gradients(world, Interchange(source=x), CONFIG) for x in ("attached", "detached"))
    assert torch.allclose(torch.stack(a), torch.stack(d))
    assert not all(torch.allclose(x, y, atol=1e-5) for x, y in zip(of_a, of_d))


@pytest.mark.parametrize("method", MATCHING)
def test_cached_targets_equal_the_plain_loop(world, method):
    config = replace(CONFIG, steps=4)
    fast = [h["loss"] for h in distill(shrink(world[0], 2), *world, method, config).history][1:]
    slow = plain_distill(shrink(world[0], 2), *world, method, config)
    assert fast == pytest.approx(slow, abs=1e-4) and len(set(slow)) == 4


@pytest.mark.parametrize("span", (1, 2))
def test_diito_swaps_consecutive_tokens(world, span):
    config, (teacher, pairs) = replace(CONFIG, sites=(Site(1, "s2"),)), world
    objective = objective_of(world, DIITO(span=span, temperature=2.0), config=config)
    s, t = objective.of_student(pairs[:8]), objective.of_teacher(torch.arange(8), pairs[:8])
    with torch.no_grad():
        for said, model, layer in ((s, objective.student, 0), (t, teacher, 1)):
            final = exchanged_by_hooks(model, pairs[:8], layer, "s2", span)[:, 0]
            assert torch.allclose(said.swapped, model.lm_head(final), atol=1e-5)
    own = objective.method.loss(s, t, None)[0]
    assert torch.isclose(own, divergence(s.swapped, t.swapped, temperature=2.0).mean())


def test_autocast_changes_little(world):
    "The student's restart in bf16 is that of its runs in bf16."
    for method in ("interchange", "effect_match"):
        plain, cast = (distill(shrink(world[0], 2), *world, method, replace(CONFIG, steps=3, lr=1e-4, bf16=b)).history
            for b in (False, True))
        for a, b in zip(plain, cast): assert a["method_loss"] == pytest.approx(b["method_loss"], rel=0.2, abs=0.02)


@pytest.mark.parametrize("method", ("rcid_m", "interchange", "rcid_m_interchange"))
@pytest.mark.parametrize("kl_at", ("answer", "all"))
def test_micro_batches_sum_up(world, method, kl_at):
    config = replace(CONFIG, steps=2, kl_at=kl_at, lr=1e-3)
    teacher, pairs = world
    whole = distill(shrink(teacher, 2), teacher, pairs, method, config)
    for more in (dict(micro_batch=3), dict(micro_batch=4, checkpoint_gradients=True)):
        parts = distill(shrink(teacher, 2), teacher, pairs, method, replace(config, **more))
        for a, b in zip(parts.history, whole.history): assert a == pytest.approx(b, abs=2e-5)


# the draw

def test_a_step_draws_from_all_sites_and_a_resumed_run_the_same(world, tmp_path):
    teacher, pairs = world
    whole = distill(shrink(teacher, 2), teacher, pairs, "rcid_m_interchange", CONFIG)
    def trip(student, step):
        if step == 5: raise KeyboardInterrupt
        return {}
    config = replace(CONFIG, checkpoint_dir=str(tmp_path/"run"), targets_dir=str(tmp_path/"targets"))
    with pytest.raises(KeyboardInterrupt):
        distill(shrink(teacher, 2), teacher, pairs, "rcid_m_interchange", config, probe=trip)
    resumed = distill(shrink(teacher, 2), teacher, pairs, "rcid_m_interchange", config)
    assert model_hash(resumed.student) == model_hash(whole.student)
    of_teacher, of_student = patch_sites(shrink(teacher, 2), teacher, pairs, METHODS["interchange"], CONFIG)
    # the student's last layer is not among them; layer 1 of the teacher is the deepest that layer 0 stands for
    assert of_student == (Site(0, "s2"), Site(0, "end")) and {s.layer for s in of_teacher} == {1}
    assert {drawn_sites(2, 1, step, 0)[0] for step in range(20)} == {0, 1}


def test_the_teachers_runs_of_a_plan_are_those_that_are_asked_for(world):
    "A step that is not in the plan is run when it is asked for, and says the same."
    planned, asked = (objective_of(world, "interchange", config=replace(CONFIG, steps=n)) for n in (6, 0))
    rows = torch.tensor([5, 2, 11])
    for step in range(2):
        drawn = drawn_sites(2, 1, step, CONFIG.seed)
        assert torch.allclose(planned.patches.finals(rows, drawn), asked.patches.finals(rows, drawn), atol=1e-5)
    assert len(planned.patches.numbers) > 0 == len(asked.patches.numbers)


# sites, kinds, maps

def test_which_sites_a_method_reads(world):
    teacher, pairs = world
    student, top, mediating = shrink(teacher, 2), (Site(0, "s2"),), (Site(2, "end"), Site(1, "s2"))
    config = replace(CONFIG, sites=top, mediating=mediating)
    def sites(method): return plan_signals(student, teacher, pairs, method, config)[0].sites
    assert sites(RCID()) == top and sites(RCID(choice="mediating")) == mediating
    every = sites(RCIDM())
    assert every == sites(RCID(choice="all")) and {s.layer for s in every} == {1, 3}
    excluded = excluded_sites(teacher, pairs).all(0)
    assert len(every) == int((~excluded[[1, 3]]).sum())
    control = sites(replace(RCIDM(choice="mediating"), random_sites=True))
    assert len(control) == 2 and not set(control) & set(mediating)


ANCHORED = Together(terms=(RCIDM(w="anchors"), EffectMatch(draws=2)), weights=(1.0, 0.5))
OTHERS = ("rcid_m_shuffled", "rcid_m_random_w", "skew_reverse_kl", "rcid", "fitnets", "cka", "diito", ANCHORED)

@pytest.mark.parametrize("method", (*MATCHING, *PATCHING, *OTHERS))
def test_several_kinds_are_one_training(world, kinds, method):
    teacher, _ = world
    student, config = shrink(teacher, 2), replace(CONFIG, sites=TOP, steps=20, batch=16, lr=2e-3)
    result = distill(student, teacher, kinds, method, config)
    def total(h): return h["kl"] + h.get("method_loss", 0)
    first, last = result.history[1:5], result.history[-4:]                  # sites differ from step to step
    assert sum(map(total, last)) < sum(map(total, first))


def test_a_kind_that_does_not_reach_a_role_asks_for_nothing_there(world, kinds):
    objective = objective_of(world, "rcid_m", pairs=kinds)
    roles = [s.role for s in objective.want_t.sites]
    assert "io" in roles                         # `names` changes it, `s2` does not
    with torch.no_grad(): t = objective.of_teacher(torch.arange(40), kinds)
    d = (t.sites - t.sites_corrupt)[roles.index("io")].norm(dim=-1)         # (pair,)
    classic = first_difference(kinds) == kinds.key_positions["s2"]
    assert classic.tolist() == [True] * 20 + [False] * 20
    assert (d[classic] == 0).all() and (d[~classic] > 0).all()


def test_shuffled_pairs_have_their_partners_targets(world):
    @dataclass(frozen=True)
    class Spy(RCIDM):
        def scaled(self, s, t, state):
            seen.append((t, super().scaled(s, t, state)[1] * state.scale_t + state.mean_t))
            return super().scaled(s, t, state)
    for of in ("difference", "hidden"):
        seen = []
        objective = objective_of(world, Spy(of=of, shuffled=True))
        objective.terms(torch.arange(8), 0, objective.start())
        t, rows = seen[-1]
        for i, shown in enumerate(rows.split(8, 1)):
            own = t.sites - t.sites_corrupt if of == "difference" else (t.sites, t.sites_corrupt)[i]
            assert torch.allclose(shown, own.roll(1, 1), atol=1e-5) and not torch.allclose(shown, own, atol=1e-3)


def test_anchors_lay_the_strongest_role_on_the_strongest(world, monkeypatch):
    "Of a turned teacher they find the turn; a role that is not the strongest there finds another map."
    teacher, pairs = world
    turned, config = rotated(teacher, seed=2), replace(CONFIG, layer_map=SAME)
    def loss(): # of a student that is its teacher in another basis
        objective = objective_of((teacher, pairs), RCIDM(w="anchors"), turned, config)
        return float(objective.terms(torch.arange(8), 0, objective.start())[1])
    right, find = loss(), maps.strongest_roles
    def guess(model, some): return find(model, some) if model is turned else dict.fromkeys(range(3), "s2")
    assert "s2" not in find(teacher, pairs).values()
    monkeypatch.setattr(maps, "strongest_roles", guess)
    wrong = loss()
    assert right < 0.1 * wrong, (right, wrong)


# bad input

def refused(message, call, *args, **kw):
    with pytest.raises(ValueError, match=message) as e: call(*args, **kw)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("call, message", [
    (lambda: RCIDM(choice="every"), "unknown choice 'every'.*top, mediating, all"),
    (lambda: Interchange(source="both"), "unknown source 'both'"),
    (lambda: StandardKD(kind="hellinger"), "unknown kind 'hellinger'"),
    (lambda: RCIDM(of="logits"), "unknown of 'logits'"),
    (lambda: RCIDNorm(w="random"), "norms have no map"),
    (lambda: Interchange(temperature=0.0), "temperature=0.0: it must be above 0"),
    (lambda: Interchange(span=0), "span=0"),
    (lambda: Interchange(pairs=False), "pairs=True"),
    (lambda: Interchange(shuffled=True), "shuffled pairs are a control"),
    (lambda: StandardKD(kind="jsd", beta=1.5), "beta=1.5"),
    (lambda: StandardKD(kind="skew", skew=0.0), "skew=0.0"),
    (lambda: Together(terms=(RCIDM(),)), "a sum of 1 methods"),
    (lambda: Together(terms=(RCIDM(), Interchange()), weights=(1.0,)), "give each a number above 0"),
    (lambda: Together(terms=(RCIDM(), Interchange()), weights=(1.0, float("nan"))), "above 0"),
    (lambda: Together(terms=(RCIDM(), Interchange(choice="top"))), r"have choice \['all', 'top'\]"),
    (lambda: Together(terms=(Interchange(), EffectMatch(span=2))), r"have span \[1, 2\]"),
    (lambda: Together(terms=(RCIDM(), DIITO(choice="all"))), "read sites or patch them"),
    (lambda: Together(terms=(FitNets(choice="all"), Interchange())), "read sites or patch them"),
])
def test_a_method_is_refused_that_says_nothing(call, message): refused(message, call)


def test_sites_without_any_difference_have_no_scale(world):
    config = replace(CONFIG, sites=(Site(1, "io"), Site(2, "s1")))          # before the change
    for method in (RCIDM(choice="top"), RCIDNorm(choice="top")):
        refused("student's residuals do not differ at any of the 2 sites", distill, shrink(world[0], 2), *world, method,
            config)


def test_a_gap_near_zero_is_refused(world, make_model):
    teacher, pairs = make_model("qwen3", d_model=32, heads=2, kv_heads=1, d_mlp=64), world[1]
    refused("gap is .* near zero", distill, shrink(teacher, 2), teacher, pairs, "effect_match", CONFIG)


def test_sites_that_are_not_there_are_refused(world):
    student = shrink(world[0], 2)
    refused("DistillConfig.mediating is empty", distill, student, *world, RCID(choice="mediating"), CONFIG)
    refused("DistillConfig.sites is empty", distill, student, *world, Interchange(choice="top"), CONFIG)
    refused("layer_map must say", distill, student, *world, "interchange", replace(CONFIG, layer_map={}))
    refused("past the student's 2 layers", distill, student, *world, "rcid_m", replace(CONFIG, layer_map=SAME))
    refused("past the teacher's 4 layers", distill, student, *world, "rcid_m", replace(CONFIG, layer_map={9: 1}))
    last = replace(CONFIG, sites=(Site(3, "s2"),))
    refused("no site to patch", distill, student, *world, Interchange(choice="top"), last)


def test_a_map_that_is_not_determined_is_refused(world, make_model, monkeypatch):
    teacher, pairs = world
    student = shrink(teacher, 2)
    wide = make_model("qwen3", layers=2, d_model=48, heads=2, kv_heads=1, d_mlp=64)
    narrow = make_model("qwen3", layers=2, d_model=16, heads=2, kv_heads=1, d_mlp=64)
    refused("unknown w 'magic'", distill, student, teacher, pairs, RCIDM(w="magic"), CONFIG)
    refused("equal widths", distill, narrow, teacher, pairs, RCIDM(), CONFIG)
    refused("narrower", distill, wide, teacher, pairs, RCIDM(w="anchors"), CONFIG)
    refused("smaller than d_s", distill, wide, teacher, pairs, RCIDM(w="random"), CONFIG)
    few = replace(CONFIG, batch=2)
    refused("rows cannot determine 32 directions", distill, student, teacher, pairs[:3], RCIDM(w="anchors"), few)
    monkeypatch.setattr(maps, "strongest_roles", lambda *_: {})
    refused("no mapped layer has a role with an effect", distill, student, teacher, pairs, RCIDM(w="anchors"), CONFIG)


def test_the_plain_loop_says_that_it_patches_nothing(world):
    refused("the plain loop patches nothing", plain_distill, shrink(world[0], 2), *world, "interchange", CONFIG)


def test_comparing_methods_need_one_process_and_batch(world):
    refused("compares the pairs of a batch", distill, shrink(world[0], 2), *world, "effect_match",
        replace(CONFIG, micro_batch=4))


# the price

def test_what_a_step_costs(world):
    "Restarts and sums are cheaper than the runs they are added to; the second term of a sum costs no run."
    teacher, pairs = world
    student = shrink(teacher, 4)
    config = replace(CONFIG, layer_map=SAME)
    def step_of(method):
        one, two = (run_cost(student, teacher, pairs, method, replace(config, steps=n))[1] for n in (1, 2))
        return two - one
    plain = step_of("standard_kd_pairs")
    for method in PATCHING[:2]: assert plain < step_of(method) < 1.5 * plain, method
    gained = step_of("rcid_m_interchange") - step_of("rcid_m")
    assert gained == pytest.approx(step_of("interchange") - plain, rel=1e-6)
    # later sites leave less to run again
    costs = [restart_flops(student, pairs, (Site(l, "s2"),), 1, True) for l in range(3)]
    assert costs[0] > costs[1] > costs[2]
    assert restart_flops(student, pairs, (Site(0, "end"),), 1, True) < costs[0]
