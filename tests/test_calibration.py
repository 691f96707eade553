"""Calibration: what a reading must say of models with a known route, and how it is judged."""
import numpy as np
import pytest
from rcid.eval import calibration
from rcid.eval.calibration import BARS, CLASSES, EXPECTED, IGNORE, OTHERWISE, READINGS, REWRITES, SEE
from rcid.eval.calibration import Known, Told, Trend, balanced, choose_threshold, dose_trend, expected
from rcid.eval.calibration import judge_dose, judge_rewrite, judge_told
from rcid.eval.calibration import pairs_of_models, tell_apart, validated
from rcid.eval.same_behaviour import AT_CHANCE, auroc, match_behaviour


# the table


def test_every_cell_of_the_table_is_filled_and_reasoned():
    assert set(EXPECTED) == {(r, c) for r in READINGS for c in CLASSES}
    for cell in EXPECTED.values():
        assert cell.answer in ("see", "ignore", "-") and len(cell.why) > 10 and "\n" not in cell.why


def test_no_exception_is_dead():
    "An exception differs from what the lists would say, and names a reading and a class that there are."
    for (reading, cls), cell in OTHERWISE.items():
        assert reading in READINGS and cell.answer != ("ignore" if cls in IGNORE else "see")
    assert not set(SEE) & set(IGNORE) and set(SEE) | set(IGNORE) == set(CLASSES)


def test_the_first_definition_stands_in_the_same_table():
    assert EXPECTED["original", "moved"].answer == EXPECTED["original", "rerouted"].answer == "see"


def test_every_reading_must_see_something_and_ignore_something():
    for reading in READINGS:
        answers = {EXPECTED[reading, cls].answer for cls in CLASSES}
        assert {"see", "ignore"} <= answers, reading


def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match="unknown reading 'cka': there are route"): expected("cka", "moved")
    with pytest.raises(ValueError, match="unknown class 'pruned'"): expected("route", "pruned")


# pairs of models


def plants(routes="ab", each=3, first=100):
    return [Known(f"{r}{i}", "moved", r, first + each * k + i) for k, r in enumerate(routes) for i in range(each)]


def test_pairs_of_one_class():
    pairs = pairs_of_models(plants(), "moved")
    assert [p.relation for p in pairs].count("same") == 2 * 3 and [p.relation for p in pairs].count("other") == 9


def test_models_from_the_same_weights_make_no_pair():
    "One seed at two layers: the difference of the routes is mixed with what the first weights have in common."
    some = [Known("a", "moved", "a", 100), Known("b", "moved", "b", 100), Known("b2", "moved", "b", 101)]
    assert [(p.first, p.second) for p in pairs_of_models(some, "moved")] == [("a", "b2"), ("b", "b2")]


def test_a_partner_is_the_only_other_route():
    "A rerouted plant at layer b is told from moved plants at b, not from those at a: that would be the layer."
    some = plants() + [Known(f"r{i}", "rerouted", "r at b", 110 + i, partner="b") for i in range(2)]
    pairs = pairs_of_models(some, "rerouted")
    other = {frozenset(p[:2]) for p in pairs if p.relation == "other"}
    assert other == {frozenset((f"r{i}", f"b{j}")) for i in range(2) for j in range(3)}
    assert [p.relation for p in pairs].count("same") == 1 + 3       # of the two rerouted, and of their partners


def test_random_models_are_told_from_every_plant_and_never_from_each_other():
    some = plants() + [Known(f"n{i}", "nothing", f"random {i}", 110 + i, partner="*") for i in range(2)]
    pairs = pairs_of_models(some, "nothing")
    assert [p.relation for p in pairs].count("other") == 2 * 6
    assert not any({"n0", "n1"} <= set(p[:2]) for p in pairs)
    assert [p.relation for p in pairs].count("same") == 6           # of the plants


def test_held_out_is_decided_by_the_seed():
    assert not Known("a", "moved", "a", 99).held_out and Known("a", "moved", "a", 100).held_out


def test_a_class_without_plants_is_refused():
    with pytest.raises(ValueError, match=r"no plant of the class 'shortcut': there are \['moved'\]"):
        pairs_of_models(plants(), "shortcut")


# AUROC


def test_auroc_is_that_of_scipy():
    from scipy.stats import mannwhitneyu
    rng = np.random.default_rng(0)
    same, other = rng.integers(0, 6, 20).astype(float), rng.integers(2, 9, 30).astype(float)    # with ties
    u = mannwhitneyu(other, same).statistic
    assert auroc(same, other)[0] == pytest.approx(u / (20 * 30), abs=1e-12)


def test_a_weight_is_a_number_of_copies():
    rng = np.random.default_rng(1)
    same, other = rng.normal(size=7), rng.normal(.5, size=9)
    w_same, w_other = rng.integers(0, 4, (5, 7)), rng.integers(0, 4, (5, 9))
    weighted = auroc(same, other, (w_same.astype(float), w_other.astype(float)))
    for k in range(5):
        copies = auroc(np.repeat(same, w_same[k]), np.repeat(other, w_other[k]))[0]
        assert weighted[k] == pytest.approx(copies, abs=1e-12)


def test_an_undefined_reading_is_a_coin_toss():
    assert auroc([np.nan, np.nan], [1., 2.])[0] == .5 and auroc([0.], [np.nan])[0] == .5
    told = tell_apart([0., np.nan], [1.], pairs_of_models(plants(each=2), "moved")[:3], n_boot=50)
    assert told.n_undefined == 1 and told.auroc == .75


def pairs_and_values(separation, seed=0, each=5):
    "Pairs of two routes, same ones first, and a reading with one effect of each plant beside that of the route."
    some = plants(each=each)
    pairs = sorted(pairs_of_models(some, "moved"), key=lambda p: p.relation != "same")
    rng = np.random.default_rng(seed)
    own = {p.name: rng.normal() for p in some}
    values = [own[p.first] + own[p.second] + separation * (p.relation == "other") for p in pairs]
    n_same = sum(p.relation == "same" for p in pairs)
    return pairs, np.array(values[:n_same]), np.array(values[n_same:])


def test_plants_are_resampled_and_not_pairs():
    "Effects of plants make an interval over plants wider than one over pairs, which would take them for independent."
    pairs, same, other = pairs_and_values(1.)
    told = tell_apart(same, other, pairs, n_boot=2000)
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(2000):
        drawn.append(auroc(rng.choice(same, len(same)), rng.choice(other, len(other)))[0])
    low, high = np.quantile(drawn, [.025, .975])
    assert told.n_plants == 10 and told.high - told.low > high - low


def test_the_interval_is_the_same_every_time():
    pairs, same, other = pairs_and_values(1.)
    assert tell_apart(same, other, pairs, 200) == tell_apart(same, other, pairs, 200)
    assert tell_apart(same, other, pairs, 200, seed=1).auroc == tell_apart(same, other, pairs, 200).auroc


def test_what_cannot_be_told_is_refused():
    pairs, same, other = pairs_and_values(1.)
    with pytest.raises(ValueError, match="0 same-route and 25 other-route pairs"): tell_apart([], other, pairs[20:])
    with pytest.raises(ValueError, match="44 pairs of models for 20 .* 25 readings"): tell_apart(same, other, pairs[1:])


# behaviour


def test_matching_takes_the_advantage_of_behaviour_away():
    "Half of the other-route pairs behave otherwise: a reading of behaviour tells them, and not on matched pairs."
    rng = np.random.default_rng(0)
    same = rng.normal(0, 1, (40, 2))
    other = np.concatenate([rng.normal(0, 1, (40, 2)), rng.normal(4, 1, (40, 2))])
    assert auroc(same[:, 0], other[:, 0])[0] > .7
    m = match_behaviour(same, other)
    assert m.alike and all(AT_CHANCE[0] <= a <= AT_CHANCE[1] for a in m.behaviour)
    assert len(set(m.same)) == len(m.same) >= 20 and len(set(m.other)) == len(m.other) >= 20
    assert np.isclose(auroc(same[m.same, 0], other[m.other, 0])[0], m.behaviour[0])


def test_where_behaviour_is_alike_no_pair_is_lost():
    "Nine same-route and 27 other-route pairs, as of three routes with three plants each: all of them are used."
    rng = np.random.default_rng(0)
    values = rng.uniform(size=9)[:, None]
    m = match_behaviour(values, np.repeat(values, 3, axis=0) + .01 * rng.normal(size=(27, 1)))
    assert m.alike and len(m.same) == 9 and len(m.other) == 27


def test_behaviour_that_cannot_be_matched_is_said():
    m = match_behaviour(np.zeros((5, 1)) + np.arange(5)[:, None] / 100, np.ones((5, 1)))
    assert not m.alike
    told = Told(1., 1., 1., 5, 5, 6, 0)
    v = judge_told("route", "moved", told, m.alike)
    assert v.said == "not matched" and v.met is False


def test_a_pair_without_behaviour_is_not_matched():
    same, other = np.array([[0., 0.], [0., np.nan]]), np.array([[0., 0.], [0., 0.]])
    assert list(match_behaviour(same, other).same) == [0]


# verdicts


def test_a_reading_that_never_changes_misses():
    pairs, same, other = pairs_and_values(0.)
    told = tell_apart(0 * same, 0 * other, pairs, 200)
    assert told.auroc == told.low == told.high == .5
    v = judge_told("route", "moved", told)
    assert v.said == "missed" and v.missed_by == pytest.approx(BARS.auroc - .5)


def test_the_lower_end_counts():
    v = judge_told("route", "moved", Told(.99, .80, 1., 6, 6, 6, 0))
    assert v.said == "missed" and v.missed_by == pytest.approx(.05)
    assert judge_told("route", "moved", Told(.95, .85, 1., 6, 6, 6, 0)).said == "seen"
    assert not judge_told("route", "moved", Told(.99, np.nan, np.nan, 6, 6, 6, 0)).met


def test_to_ignore_is_to_be_at_chance_with_an_interval_that_says_so():
    def said(low, high): return judge_told("route_warped", "moved", Told(.5, low, high, 6, 6, 6, 0)).said
    assert said(.3, .7) == "ignored" and said(.6, .9) == "reacts" and said(.1, .4) == "reacts"
    assert said(.2, .97) == "not resolved"                      # it may as well have seen everything


def test_a_class_without_any_reading_is_undefined_and_not_met():
    v = judge_told("pairwise", "moved", Told(.5, .5, .5, 6, 6, 6, 12))
    assert v.said == "undefined" and v.met is False and np.isnan(v.missed_by)
    assert judge_told("pairwise", "moved", Told(.5, .5, .5, 6, 6, 6, 11)).said == "missed"


def test_what_an_exact_rewrite_may_come_to_is_no_difference():
    "Ranks among values that are all as small are not read; an undefined reading stays undefined."
    assert calibration.resolved([0., .02, .03]) == pytest.approx([0, 0, .01])
    assert np.isnan(calibration.resolved([np.nan])).all()
    same, other = np.array([.001, .002]), np.array([.003, .004])
    assert auroc(same, other)[0] == 1
    assert auroc(*map(calibration.resolved, (same, other)))[0] == .5


def test_what_is_not_measured_is_not_met():
    assert judge_told("route", "moved", None).said == "not measured"
    assert judge_rewrite("route", "rotated", [], []).said == "not measured"
    assert judge_rewrite("fingerprint", "rotated", [.99, np.nan], [0., 0.]).said == "not measured"
    assert judge_dose("route", Trend(np.nan, 9, 9)).said == "not measured"


def test_a_cell_outside_of_the_table_is_not_judged():
    v = judge_told("route_classic", "shortcut", Told(.1, 0., .2, 6, 6, 6, 0))
    assert v.said == "-" and v.met is None and judge_dose("pairwise", Trend(-1., 9, 0)).met is None


def test_rewrites_are_judged_by_the_worst_of_them():
    assert judge_rewrite("route", "rotated", [.021, .03], [.01, .01]).said == "ignored"
    v = judge_rewrite("route", "rotated", [.02, .05], [.01, .01])
    assert v.said == "reacts" and v.missed_by == pytest.approx(.02)
    assert judge_rewrite("pairwise", "identity_blocks", [.97], [0.]).missed_by == pytest.approx(.01)


def test_one_miss_is_enough():
    good, bad = judge_dose("route", Trend(1., 9, 0)), judge_told("route", "moved", Told(.7, .6, .8, 6, 6, 6, 0))
    kept = validated([good, bad])
    assert not kept["route"]["validated"] and kept["route"]["missed"] == ["moved"]
    assert kept["route"]["worst"] == pytest.approx(.25) and validated([good])["route"]["validated"]
    assert not any(kept[r]["validated"] for r in READINGS if r != "route"), "nothing was measured of the others"


def test_a_dose_without_a_reading_is_counted():
    t = dose_trend([0., np.nan, 2., 3.], [0, 1, 2, 3])
    assert t.tau == 1 and t.n == 4 and t.n_undefined == 1
    assert np.isnan(dose_trend([np.nan] * 4, range(4)).tau)


def test_a_threshold_is_chosen_where_the_pairs_are_told_best():
    same, other = [.1, .2, .3], [.25, .6, .7]
    t = choose_threshold(same, other)
    assert t in (pytest.approx(.225), pytest.approx(.45))
    best = max(balanced(same, other, x) for x in np.linspace(0, 1, 201))
    assert balanced(same, other, t) == pytest.approx(best)
    assert np.isnan(choose_threshold([np.nan], [np.nan]))


def test_the_classes_of_rewrites_are_made_by_functions_of_that_name():
    from rcid.models import rewrite
    assert all(callable(getattr(rewrite, name)) for name in REWRITES)
    assert calibration.FIRST_HELD_OUT == 100


# every reading of two models


@pytest.fixture(scope="module")
def swept(tokenizers, make_model):
    "Models made by hand that hand over in layers 3 and 4 (two) and in 1 and 2, and one with random weights."
    from rcid.data import load_kinds
    from rcid.eval.handmade import counting_model
    from rcid.eval.reading import subject
    tokenizer = tokenizers["llama"]
    to_read = [load_kinds("ioi", tokenizer, ["s2", "s2_new"], split=split, n=24) for split in ("test", "train")]
    late, early = {3: .6, 4: .4}, {1: .6, 2: .4}
    made = {name: counting_model(tokenizer, live, seed=i)
            for i, (name, live) in enumerate((("one", late), ("alike", late), ("early", early)))}
    made["random"] = make_model("llama", layers=6)
    return {name: subject(model, *to_read) for name, model in made.items()}, to_read


def test_the_route_is_told_where_the_first_definition_is_not(swept):
    from rcid.eval.reading import read_pair
    models, _ = swept
    same, other = (read_pair(models["one"], models[name]).values for name in ("alike", "early"))
    assert same["route"] < .1 < .3 < other["route"] and other["route_warped"] < .1
    assert same["original"] > .9 and other["original"] > .9


def test_a_model_without_a_gap_is_refused_with_the_reason(swept):
    from rcid.eval.reading import floor_of, read_pair
    models, _ = swept
    read = read_pair(models["one"], models["random"])
    for reading in ("route", "route_warped", "route_classic", "fingerprint"):
        assert np.isnan(read.values[reading]) and "no gap" in read.why[reading], reading
    assert np.isnan(read.shift) and np.isnan(floor_of(models["random"]))


@pytest.mark.parametrize("name", ("identity_blocks", "rotated"))    # a model made by hand has one head to permute
def test_no_reading_sees_an_exact_rewrite(swept, name):
    from rcid.eval.reading import floor_of, read_pair, subject
    from rcid.models import rewrite
    models, to_read = swept
    one, depth = models["alike"], None
    if name == "identity_blocks":
        new, depth = rewrite.identity_blocks(one.model, [0, 3, 3]), rewrite.blocks_map(6, [0, 3, 3]).depths
    else:
        new = rewrite.rotated(one.model, 1)
    values = read_pair(one, subject(new, *to_read), student_depth=depth).values
    for reading in READINGS:
        verdict = judge_rewrite(reading, name, [values[reading]], [floor_of(one)])
        assert verdict.said == "ignored", (reading, values[reading])


def test_kinds_are_named_with_the_classic_one_first(swept):
    from rcid.eval.reading import of_kinds
    models, _ = swept
    assert of_kinds(models["one"], ["s2"]).read.kinds == ["s2"]
    with pytest.raises(ValueError, match="the classic one, 's2', comes first"): of_kinds(models["one"], ["s2_new"])
    with pytest.raises(ValueError, match="no corruption 'names': there are s2, s2_new"):
        of_kinds(models["one"], ["s2", "names"])


def test_behaviour_of_two_models_is_symmetric(swept):
    from rcid.eval.reading import behave_apart
    models, _ = swept
    there, back = behave_apart(models["one"], models["early"]), behave_apart(models["early"], models["one"])
    assert there.kl == pytest.approx(back.kl) and there.gap == pytest.approx(back.gap)
    assert behave_apart(models["one"], models["one"]).kl == 0 and there.kl > 0
