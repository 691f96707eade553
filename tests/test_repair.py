"""Experiments 2a and 2b: who teaches whom, what is closed of a distance, and what the params may not ask for."""
import copy
from dataclasses import replace
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from conftest import page
from pydantic import ValidationError
from rcid.causal.mediation import Mediation, mediation
from rcid.core import load_params
from rcid.core.planted_params import Planted, Variant
from rcid.core.real_params import Real
from rcid.data import load_pairs
from rcid.distill import METHODS, DistillConfig, distill
from rcid.distill.config import plan_sites
from rcid.eval.kept import least_apart
from rcid.eval.plant import doses
from rcid.eval.repair import REDRAWN, apart, carriers, layers_of, method_of, over_runs, pairings, redraw_closed
from rcid.eval.repair import roles_to_judge, share_closed
from rcid.models import get_adapter

SETTINGS = dict(
    architectures=["qwen3"],
    directions=["later"],
    routes={"later": {"student": "moved at 1", "teacher": "moved at 4"}},
    methods=["standard_kd_pairs"],
    kinds=["s2"],
    held_kinds=["names", "io_new"],
    roles=["s2", "end"],
    reach={"methods": ["standard_kd_pairs"], "kinds": [["s2", "io_new"]], "roles": [["end"]]},
    train_pairs=8,
    pairs=16,
    choose_pairs=16,
    answer_pairs=16,
    steps=2,
    batch=4,
    lr=1e-3,
    log_every=1,
)


@pytest.mark.parametrize("change, why", (
    (dict(directions=["sooner"]), r"directions names 'sooner', routes has \['later'\]"),
    (dict(routes={"later": {"student": "moved at 1", "teacher": "moved at 1"}}), "both are 'moved at 1': no repair"),
    (dict(held_kinds=["names", "s2"]), r"held_kinds has \['s2'\], which kinds trains on: hold out another"),
    (dict(reach={"kinds": [["io_new", "s2"]]}), r"reach.kinds has .*: the classic kind 's2' comes first"),
    (dict(reach={"kinds": [["s2", "s1_new"]]}), r"reach.kinds names \['s1_new'\]"),
    (dict(reach={"kinds": [["s2", "io_new", "names"]]}), "no kind is left that judges"),
    (dict(reach={"roles": [["io"]]}), r"reach.roles has \['io'\]: it takes some of \['s2', 'end'\]"),
    (dict(reach={"roles": [[]]}), r"reach.roles has \[\]"),
    (dict(reach={"roles": [["s2", "end"]]}), "it takes some of"),
    (dict(controls=["rcid"]), r"controls names \['rcid'\], methods has \['standard_kd_pairs'\]"),
    (dict(variants={"standard_kd_pairs": {"method": "rcid"}}), "variants.standard_kd_pairs is one of methods"),
    (dict(variants={"same": {"method": "rcid_m"}}), "variants.same is rcid_m itself: say what is other"),
    (
        dict(variants={"x": {"method": "rcid_m", "choice": "all", "random_sites": True}}),
        "beside all sites there are none",
    ),
    (dict(variants={"x": {"method": "rcid_m", "layers": "upside down"}}), "'same', 'reversed' or 'shifted'"),
    (dict(variants={"x": {"method": "rcid_m", "choice": "best"}}), "'top', 'mediating' or 'all'"),
    (dict(runs=0), "greater than or equal to 1"),
    (dict(lr=0), "greater than 0"),
))
def test_params_that_make_no_experiment_are_refused(change, why):
    Planted(**SETTINGS)
    with pytest.raises(ValidationError, match=why): Planted(**SETTINGS | change)


def test_the_default_names_plants_that_the_calibration_makes():
    "Each route of a direction is one of `calibrate.plan`, and the roles and kinds are those of the task."
    from rcid.data import corruptions
    p = load_params()
    c = p.planted
    for architecture in c.architectures:
        plan, made = p.calibrate.plan[architecture], set()
        for some in (plan["moved"].develop, plan["moved"].judge):
            made |= {(f"moved at {at}", some is plan["moved"].develop) for live in some for at in live[1:]}
        for some in (plan["rerouted"].develop, plan["rerouted"].judge):
            name = "rerouted at "
            made |= {(name + "-".join(map(str, live)), some is plan["rerouted"].develop) for live in some}
        for name in c.directions:
            route = c.routes[name]
            assert {(route.teacher, route.develop), (route.student, route.develop)} <= made, name
    assert set(c.kinds) | set(c.held_kinds) <= set(corruptions("ioi"))
    assert any(c.routes[name].develop for name in c.directions)


def test_no_plant_is_taught_by_its_own_training():
    "Two ends of a dose are one training with other gates: a seed never meets itself, and none is used twice early on."
    def plants(*seeds): return [dict(seed=seed) for seed in seeds]
    found = pairings(plants(200, 201, 202), plants(201, 202, 203), 99)
    assert all(s["seed"] != t["seed"] for s, t in found) and len(found) == 7
    first = [(s["seed"], t["seed"]) for s, t in found[:3]]
    assert len({s for s, _ in first}) == len({t for _, t in first}) == 3
    assert [(s["seed"], t["seed"]) for s, t in pairings(plants(0, 1), plants(0, 1), 9)] == [(0, 1), (1, 0)]
    assert pairings(plants(7), plants(7), 9) == pairings([], plants(7), 9) == pairings(plants(7), [], 9) == []


def test_carriers_are_where_the_recipe_put_them():
    assert carriers(dict(cls="moved", live=[0, 1, 4], at=1)) == [(1, "end")]
    assert carriers(dict(cls="rerouted", live=[0, 2, 4])) == [(2, "s2+1"), (4, "end")]


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def ends(request, make_model, tokenizers):
    "Both ends of a short dose whose layers 1 and 3 of 4 hand over: one's layer 3 is closed, the other's layer 1."
    tokenizer = tokenizers[request.param]
    train, held = (load_pairs("ioi", tokenizer, split="train", seed=seed, n=16) for seed in (0, 1))
    teacher = make_model(request.param, layers=4, d_model=32, heads=2, kv_heads=1, d_mlp=64)
    config = DistillConfig(steps=3, batch=8, lr=3e-3, log_every=1000)
    found = doses(teacher, train, (0, 1, 3), (0., 1.), held=held, config=config)
    return [plant.model for plant in found], teacher, held


def attention_of(model, layer: int) -> dict:
    "Every weight that only the attention of a layer uses, its output projection apart."
    parts = get_adapter(model).parts(layer)
    found = {name: getattr(parts, name).weight for name in ("attention_norm", "q", "k", "v")}
    attention = get_adapter(model).attention(layer).named_parameters()
    return found | {name: p for name, p in attention if not name.startswith("o_proj")}


def test_redrawn_attention_leaves_answers_and_routes_as_they_were_and_nothing_of_what_slept(ends):
    "To the bit: what is behind a projection of zero says nothing, before and after."
    (early, late), _, held = ends
    for model, slept, awake in ((early, 3, 1), (late, 1, 3)):
        redrawn = copy.deepcopy(model)
        assert redraw_closed(redrawn, REDRAWN) == sorted({slept, 2})
        with torch.no_grad(): assert torch.equal(redrawn(held.clean_ids).logits, model(held.clean_ids).logits)
        before, after = (mediation(m, {"s2": held}) for m in (model, redrawn))
        assert torch.equal(before.effects["s2"], after.effects["s2"])
        assert torch.equal(before.gaps["s2"], after.gaps["s2"])
        old, new = (attention_of(m, slept) for m in (model, redrawn))
        assert not any(torch.equal(old[name], new[name]) for name in ("attention_norm", "q", "k", "v"))
        assert not get_adapter(redrawn).parts(slept).o.weight.any()
        for layer in (0, awake):
            old, new = (attention_of(m, layer) for m in (model, redrawn))
            assert all(torch.equal(old[name], new[name]) for name in old)


def test_a_redrawn_start_owes_nothing_to_the_dose(ends):
    "Whatever the other end had learned, the same seed gives the same attention; another seed another."
    (early, _), _, _ = ends
    spoilt = copy.deepcopy(early)
    with torch.no_grad():
        for p in attention_of(spoilt, 3).values(): p.add_(1)
    first, second, other = (copy.deepcopy(m) for m in (early, spoilt, early))
    for model, seed in ((first, REDRAWN), (second, REDRAWN), (other, REDRAWN + 1)): redraw_closed(model, seed)
    first, second, other = (attention_of(m, 3) for m in (first, second, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in ("q", "k", "v"))


def test_redrawn_attention_learns(ends):
    "It is open: the projection of zero gets a gradient at once, and what is behind it as soon as that is none."
    (early, late), _, held = ends
    model = copy.deepcopy(early)
    redraw_closed(model, REDRAWN)
    start = {name: p.clone() for name, p in attention_of(model, 3).items()}
    distill(model, late, held, "standard_kd_pairs", DistillConfig(steps=3, batch=8, lr=3e-3, log_every=1000))
    assert get_adapter(model).parts(3).o.weight.any()
    assert not any(torch.equal(start[name], p) for name, p in attention_of(model, 3).items() if name in "qkv")


def test_a_variant_changes_what_it_says_and_no_more(ends):
    "Sites and maps of the variants that the scales name, on a teacher and a student of four layers."
    (early, late), _, held = ends
    variants = {
        "top": Variant(method="rcid_m_interchange", choice="top"),
        "between": Variant(method="interchange", choice="mediating"),
        "random": Variant(method="rcid_m", choice="top", random_sites=True),
        "reversed": Variant(method="rcid_m", layers="reversed"),
        "shifted": Variant(method="interchange", layers="shifted"),
    }
    assert method_of("rcid_m", variants) == METHODS["rcid_m"]
    assert layers_of("rcid_m", variants, 4) == layers_of("top", variants, 4) == {0: 0, 1: 1, 2: 2, 3: 3}
    assert layers_of("reversed", variants, 4) == {0: 3, 1: 2, 2: 1, 3: 0}
    assert layers_of("shifted", variants, 4) == {0: 1, 1: 2, 2: 3, 3: 0}
    assert {term.choice for term in method_of("top", variants).terms} == {"top"}
    top, between = ((1, "s2"), (3, "s2")), ((2, "end"),)
    def sites(name):
        config = DistillConfig(sites=top, mediating=between, layer_map=layers_of(name, variants, 4))
        return plan_sites(early, late, held, method_of(name, variants), config)
    assert sites("top") == (top, top) and sites("between") == (between, between)
    assert not set(sites("random")[0]) & set(top) and {s.role for s in sites("random")[0]} == {"s2"}
    of_teacher, of_student = sites("reversed")
    assert [s.layer for s in of_student] == [3 - s.layer for s in of_teacher] and len(of_teacher) > len(top)
    assert all(s.layer == (t.layer + 1) % 4 for t, s in zip(*sites("shifted")))


def a_model(hands_over: int, kinds=("s2", "names"), gap=2., layers: int = 6, pairs: int = 8) -> Mediation:
    "S2 has all of the effect before a layer and END from it on, exactly."
    effects = torch.zeros(pairs, layers, 2)
    effects[:, :hands_over, 0] = gap
    effects[:, hands_over:, 1] = gap
    forced = torch.zeros(layers, 2, dtype=torch.bool)
    forced[-1] = True
    names = torch.arange(2 * pairs).view(pairs, 2)
    some = {kind: effects.clone() for kind in kinds}
    gaps = {kind: torch.full((pairs,), gap) for kind in kinds}
    return Mediation(some, gaps, {kind: forced for kind in kinds}, ["s2", "end"], names)


def test_the_share_that_is_closed_by_hand():
    "Hand-overs at layers 4 and 1 of 6: D is 3 layers of the 5 that are not forced; at 2 it is two, a third is closed."
    teacher, before = a_model(4), a_model(1)
    roles = roles_to_judge(teacher, before)
    assert roles == {"s2": ["s2", "end"], "names": ["s2", "end"]}
    start, end = apart(teacher, before, roles), apart(teacher, a_model(2), roles)
    assert start[0] / end[0] == pytest.approx(3 / 2)
    assert share_closed(start, end)[0] == pytest.approx(1 / 3)
    assert share_closed(start, apart(teacher, teacher, roles))[0] == 1
    assert share_closed(start, start)[0] == 0
    assert share_closed(start, apart(teacher, a_model(0), roles))[0] == pytest.approx(-1 / 3)    # farther than before
    assert np.isnan(share_closed(0., .1))                            # there was nothing to close


def test_a_lost_gap_is_undefined_and_not_a_repair():
    "A student that no longer answers has no route: what is left of its distance is not known, so nothing is closed."
    teacher, before = a_model(4), a_model(1)
    roles = roles_to_judge(teacher, before)
    broken = a_model(4, gap=.05)                                     # under a tenth of the teacher's gap
    assert np.isnan(apart(teacher, broken, roles)).all()
    part = replace(a_model(4), gaps={"s2": torch.full((8,), 2.), "names": torch.full((8,), .05)})
    assert np.isnan(apart(teacher, part, roles)).all()               # one of two kinds is enough
    assert apart(teacher, part, {"s2": roles["s2"]})[0] == 0
    assert np.isnan(apart(teacher, before, {}, np.ones((3, 8)))).tolist() == [True] * 3
    assert roles_to_judge(teacher, broken) == {}


def test_plants_are_drawn_again_with_the_variance_of_their_mean():
    "Of three plants two are drawn, so the mean's interval is that of all twos; a plant without a route is counted."
    runs = np.repeat(np.array([[.7], [.8], [.9]]), 4001, 1)
    mean = over_runs(runs)
    assert mean["diff"] == pytest.approx(.8) and mean["ci"] == pytest.approx([.7, .9]) and mean["n"] == 3
    lost = over_runs(np.concatenate([runs, np.full((1, 4001), np.nan)]))
    assert (lost["diff"], lost["n"], lost["undefined"]) == (mean["diff"], 3, 1)
    nothing = over_runs(np.full((2, 5), np.nan))
    assert (nothing["diff"], nothing["p"], nothing["ci"], nothing["undefined"]) == (None, None, [None, None], 2)
    one = over_runs(np.array([[.5, .4, .6, .5]]))                    # names alone
    assert one["diff"] == .5 and one["ci"] == pytest.approx([.405, .595], abs=.01)


REAL = dict(
    family="llama",
    cuts={"early": {"keep": [0, 1, 3]}, "released": {"keep": [0, 2, 3], "shut": [3]}},
    students=["early"],
    tasks=["ioi"],
    methods=["standard_kd_pairs", "rcid_m"],
    seeds=[0],
    kinds={"ioi": ["s2"]},
    teach_steps=2,
    steps=2,
    batch=4,
    lr=1e-3,
    val_pairs=8,
    log_every=1,
)


@pytest.mark.parametrize("change, why", (
    (dict(students=["late"]), r"students names \['late'\], cuts has \['early', 'released'\]"),
    (dict(cuts={"early": {"keep": [1, 0, 3]}}), "ascending order, each once"),
    (dict(cuts={"early": {"keep": [0, 0]}}), "each once"),
    (dict(cuts={"early": {"keep": [0, 1], "shut": [2]}}), r"shut has \[2\], keep is \[0, 1\]"),
    (dict(cuts={"early": {"keep": [0, 1], "shut": [0, 1]}}), "shut has every layer: nothing could move"),
    (dict(kinds={"factual": ["subject"]}), "kinds names no corruption of 'ioi' to train on"),
    (dict(methods=["rcid_m"]), "lacks standard_kd_pairs"),
    (dict(weights={"rcid": 2.}), r"weights names \['rcid'\]"),
    (dict(w="procrustes_after_warmup"), "Input should be 'procrustes', 'identity', 'random' or 'anchors'"),
    (dict(seeds=[]), "at least 1 item"),
))
def test_params_of_no_real_student_are_refused(change, why):
    Real(**REAL)
    with pytest.raises(ValidationError, match=why): Real(**REAL | change)


def settings(*overrides: str, folder):
    from rcid.pipeline.workspace import compose_params
    compose_params(folder/"params.yaml", *overrides)
    return load_params(folder/"params.yaml")


def test_real_students_are_for_a_larger_scale_and_fit_their_teacher(tmp_path):
    "One by default, at `gpu` all, with three seeds, of layers that SmolLM2 has, on kinds whose pairs are written."
    from rcid.data import corruptions
    few = load_params().real
    assert few.students == ["even"] and len(few.seeds) >= 3 and set(few.methods) == {
        "standard_kd_pairs", "rcid_m"}
    assert settings("scale=a100", folder=tmp_path).real.students == []         # its teacher has other layers
    p = settings("scale=gpu", folder=tmp_path)
    assert set(p.real.students) == set(p.real.cuts) and len(p.real.seeds) >= 3
    larger = {"standard_kd_pairs", "rcid_m", "rcid_norm", "hidden_m", "interchange", "effect_match"}
    assert larger <= set(p.real.methods)
    for cut in p.real.cuts.values(): assert len(cut.keep) == 10 and cut.keep[-1] == 29
    for task in p.real.tasks:
        written = [corruptions(task)[0], *p.data.corruptions[task]]
        assert set(p.real.kinds[task]) < set(written), "no kind is left that training does not use"
    with pytest.raises(ValueError, match="real.students are of the family 'llama', which families does not name"):
        alone = ("families=[qwen3]", "main_matrix.families=[qwen3]", "extra_matrix.families=[qwen3]")
        settings("scale=gpu", *alone, folder=tmp_path)


def test_the_kept_map_has_a_least_distance_that_no_student_beats():
    """Layers 0, 1 and 5 of six, hand-over at 4: from 1 to 5 the student has one F. Of the five that count it is one
    layer late at 5, and three early at 1; the least is the first."""
    teacher, keep = a_model(4), [0, 1, 5]
    roles = roles_to_judge(teacher, teacher)
    late, early = (apart(teacher, a_model(at, layers=3), roles, keep=keep)[0] for at in (2, 1))
    assert late == pytest.approx(1 / 5) and early == pytest.approx(3 / 5)
    assert least_apart(teacher, keep, roles) == pytest.approx(late)
    assert least_apart(teacher, [0, 4, 5], roles) == 0 == apart(teacher, a_model(1, layers=3), roles, keep=[0, 4, 5])[0]
    assert np.isnan(least_apart(a_model(4, gap=-1.), keep, roles)) and np.isnan(least_apart(teacher, keep, {}))
    assert np.isnan(apart(teacher, a_model(2, layers=3, gap=.05), roles, keep=keep)).all()
    with pytest.raises(ValueError, match="ascending layers"): apart(teacher, a_model(2, layers=3), roles, keep=[0, 1])


def test_the_method_is_chosen_where_kl_on_pairs_has_a_route():
    def of(val, accuracy=(.9, .9)): return dict(val=list(val), val_accuracy=list(accuracy))
    nan = float("nan")
    plain = {
        ("early", "ioi", "standard_kd_pairs"): of([.4, nan]),
        ("early", "ioi", "undistilled"): of([.1], [.9]),
        ("early", "ioi", "hidden_m"): of([.05, .05]),
        ("early", "ioi", "rcid_m"): of([.2, nan]),                   # lost where KL on pairs is lost, too
        ("early", "ioi", "interchange"): of([.1, .1], [.8, .8]),     # too much accuracy
        ("early", "ioi", "effect_match"): of([nan, .1]),             # lost where KL on pairs is not
        ("early", "ioi", "rcid"): of([.3, .3]),
    }
    choose = page("exp2b").choose
    assert choose(plain, .05) == "rcid_m"
    assert choose(plain, .2) == "interchange"
    assert choose({key: of([nan, nan]) for key in plain}, .05) is None and choose({}, .05) is None


def test_equal_means_less_than_half_of_what_could_be_closed():
    "A student .25 away before any method, .1 of it by its layers: the room is .15; within the floor there is none."
    say = page("exp2b")
    room = say.room_of(dict(trained=.1), dict(trained=dict(diff=.25)))
    assert room == pytest.approx(.15)
    assert say.room_of(dict(trained=None), dict(trained=dict(diff=.3))) is None
    assert say.room_of(dict(trained=.1), dict(trained=dict(diff=None))) is None
    assert say.has_room(room, .02) and not say.has_room(.01, .02) and not say.has_room(None, None)
    assert say.route_bound(.1, room) == pytest.approx(.075)
    assert say.route_bound(.05, room) == .05                         # never wider than the params


def test_as_many_pairs_as_the_teacher_was_read_on_kind_by_kind():
    kinds = {"s2": list(range(10)), "s2_new": list(range(10))}
    of = SimpleNamespace(effects={"s2": torch.zeros(6, 2, 3), "s2_new": torch.zeros(3, 2, 3)})
    assert page("real").as_many(kinds, of) == {"s2": [0, 1, 2, 3, 4, 5], "s2_new": [0, 1, 2]}
