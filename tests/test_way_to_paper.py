"""From metrics/*.json to the paper: its words and tables are what the pages make of the committed metrics."""
import re
from itertools import product
import numpy as np
import pytest
from conftest import ROOT, assert_shows, needs_results_of, nudged, page
from rcid.core import load_params, read_json
from rcid.eval import robustness_correlation
from rcid.eval.calibration import EXPECTED, READINGS
from rcid.report import lint_sentences, read_families, read_matrix, read_validated, read_values, sentence, templates
from rcid.report import verdict_of, word
from rcid.report.sentences import fields

PAGES = ("calibrate", "exp1", "exp2", "exp2a", "exp2b", "exp3", "exp4", "exp5", "paper")
METRICS = ROOT/"metrics"


def metrics(name: str) -> dict: return read_json(METRICS/f"{name}.json")


# tables


PAGE_OF = {    # file in paper/tables: the page that writes it, where that is not the page of its name
    "calibrate_main": "calibrate",
    "exp1_tests": "exp1",
    "natural": "exp2",
    "companions": "exp2",
    "tests": "exp2",
    "planted_summary": "exp2a",
    "planted": "exp2a",
    "planted_tests": "exp2a",
    "planted_reach": "exp2a",
    "real": "exp2b",
    "real_least": "exp2b",
    "real_tests": "exp2b",
    "exp3_tests": "exp3",
    "kv_tests": "exp6",
    "exp7_tests": "exp7",
    "fused": "exp7",
    "fused_erring": "exp7",
}


def judging() -> list:
    "Of the calibration: the rows of the architecture that judges, and what passed."
    record = metrics("calibrate")
    return [page("calibrate").of_first(record["rows"]), record["validated"]]


def table_of(name: str) -> tuple:
    "What makes a file of paper/tables, and from what of the committed metrics."
    p = load_params()
    models, heals, pilots = (read_families(METRICS, stage, p.families) for stage in ("models", "heal", "pilot"))
    plans = {f: read_json(METRICS/"sites"/f"{f}-{p.tasks[0]}.json") for f in p.families}
    files = {f: p.models[f].teacher.get("file", "") for f in p.families}
    paper = page("paper")
    def of(name, function, *keys):
        record = metrics(name)
        given = [record[key] for key in keys]
        return (lambda x: getattr(page(name), function)(*x)), given
    made = {
        "calibrate": lambda: of("calibrate", "calibration_table", "rows", "validated"),
        "calibrate_main": lambda: ((lambda x: page("calibrate").calibration_table(*x)), judging()),
        "exp1_tests": lambda: of("exp1", "comparisons_table", "tests"),
        "natural": lambda: of("exp2", "starred_table", "rows", "tests"),
        "exp2": lambda: of("exp2", "methods_table", "rows"),
        "companions": lambda: of("exp2", "companions_table", "rows"),
        "tests": lambda: of("exp2", "comparisons_table", "tests"),
        "planted_summary": lambda: of("exp2a", "summary_table", "closed", "tests"),
        "planted": lambda: of("exp2a", "planted_table", "rows", "kinds", "roles"),
        "planted_tests": lambda: of("exp2a", "planted_tests", "tests"),
        "planted_reach": lambda: of("exp2a", "reach_table", "reach", "every_kind"),
        "real": lambda: of("exp2b", "real_table", "rows"),
        "real_least": lambda: of("exp2b", "least_table", "cuts", "least"),
        "real_tests": lambda: of("exp2b", "real_tests", "tests"),
        "exp3": lambda: of("exp3", "robustness_table", "points"),
        "exp3_tests": lambda: of("exp3", "correlations_table", "report", "planted_report", "planted_p_holm"),
        "exp4": lambda: of("exp4", "purity_table", "rows"),
        "exp5": lambda: of("exp5", "architecture_table", "rows", "tests"),
        "models": lambda: ((lambda x: paper.models_table(*x, files)), [models, heals]),
        "budget": lambda: (paper.budget_table, read_matrix(METRICS, "distill", p)),
        "pilot": lambda: (paper.pilot_table, pilots),
        "sites": lambda: ((lambda plans: paper.sites_table(plans, p.sites.layer_map)), plans),
    }
    if name not in made: pytest.skip("test_kv_pages.py has the tables of experiments 6 and 7")
    return made[name]()


@pytest.mark.parametrize("name", sorted(f.stem for f in (ROOT/"paper"/"tables").glob("*.tex")))
def test_a_table_is_what_its_page_makes_of_the_metrics(name):
    of = PAGE_OF.get(name, name)
    if (ROOT/"nbs"/"experiments"/f"{of}.ipynb").exists(): needs_results_of(of)
    assert_shows((ROOT/"paper"/"tables"/f"{name}.tex").read_text(encoding="utf-8"), *table_of(name))


def test_a_cell_of_the_main_table_is_a_number_of_the_metrics():
    "Not the page's function, but its numbers: accuracy, D and both r of each row stand in the row's line."
    needs_results_of("exp2")
    lines = (ROOT/"paper"/"tables"/"exp2.tex").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line.startswith(r"\quad")]
    rows = metrics("exp2")["rows"]
    assert len(lines) == len(rows)
    for row, line in zip(rows, lines):
        accuracy, route, pairwise, trained, held_out = (cell.split()[0] for cell in line.split(" & ")[1:])
        assert accuracy == f"{row['accuracy']:.3f}"
        shown = [(route, row["route"]), (pairwise, row["pairwise"])]
        shown += [(trained, row["consistency"]["trained"]), (held_out, row["consistency"]["held_out"])]
        for cell, value in shown:
            if value is None: assert cell in ("--", "no")                # no gap
            else: assert float(cell.strip("$")) == pytest.approx(value, abs=.0051)


def test_a_star_is_a_test_that_says_differs():
    "A method that a test tells from RCID has one in its column, and no other has."
    say, rows = page("exp2"), [a_row(m, .9, .2) for m in ("standard_kd", "fitnets", "rcid")]
    tests = [a_route(("llama", "ioi"), ("rcid", m), metric, kind)
             for m, metric, kind in (("standard_kd", "route", "farther"), ("standard_kd", "accuracy", "equal"),
                                     ("fitnets", "route", "unresolved"))]
    lines = say.starred_table(rows, tests).splitlines()
    stars = [line.split(" & ")[0] for line in lines if "^{*}" in line]
    assert stars == ["StandardKD"] and lines[4].count("^{*}") == 1 and "0.200$^{*}$" in lines[4]


# sentences


def sentences_of(record: dict) -> dict[str, str]:
    "What the pages say of the metrics of the calibration and of experiments 1, 2, 2a, 4 and 5."
    return {
        **page("calibrate").calibrate_sentences(record["calibrate"]),
        **page("exp1").exp1_sentences(*(record["exp1"][key] for key in ("rows", "tests", "validated", "bounds"))),
        **page("exp2").exp2_sentences(record["exp2"]["tests"], record["exp2"]["validated"]),
        **page("exp2a").exp2a_sentences(record["exp2a"]),
        **page("exp2b").exp2b_sentences(record["exp2b"]),
        **page("exp4").exp4_sentences(record["exp4"]["rows"]),
        "claim.exp5.architectures": page("exp5").architecture_sentence(
            record["exp5"]["tests"], record["exp5"]["validated"]
        ),
    }


def test_a_sentence_is_what_its_page_makes_of_the_metrics():
    needs_results_of("calibrate", "exp1", "exp2", "exp2a", "exp2b", "exp4", "exp5")
    committed = read_values(ROOT/"paper"/"values.tex")
    record = {name: metrics(name) for name in ("calibrate", "exp1", "exp2", "exp2a", "exp2b", "exp4", "exp5")}
    versions = [sentences_of(nudged(record, by)) for by in (-6e-9, 0, 6e-9)]
    for key in versions[0]: assert committed[key] in [v[key] for v in versions], key


def test_no_digit_is_typed_into_a_sentence():
    assert lint_sentences(ROOT/"paper"/"sentences") == []


def test_a_digit_that_is_typed_is_found(tmp_path):
    text = (ROOT/"paper"/"sentences"/"exp3.yaml").read_text(encoding="utf-8")
    (tmp_path/"exp3.yaml").write_text(text.replace("{students} students", "95 students", 1), encoding="utf-8")
    found = lint_sentences(tmp_path)
    line = next(n for n, words in enumerate(text.splitlines(), 1) if "{students} students" in words)
    assert len(found) == 1 and found[0].startswith(f"exp3.yaml:{line}: 95 in: ")


def test_a_value_that_is_lacking_or_left_over_is_refused():
    with pytest.raises(KeyError, match="no sentence 'exp2.nothing'"): sentence("exp2", "exp2.nothing", "same")
    with pytest.raises(KeyError, match="no template for the outcome 'better', only for tested"):
        sentence("exp2", "exp2.pairs", "better", outcomes="")
    with pytest.raises(ValueError, match="exp2.pairs, tested: no value for outcomes"):
        sentence("exp2", "exp2.pairs", "tested")
    with pytest.raises(ValueError, match="the template has no place for r"):
        sentence("exp2", "exp2.pairs", "missing", r="0.5")
    with pytest.raises(TypeError, match="outcomes is the float 0.5"):
        sentence("exp2", "exp2.pairs", "tested", outcomes=.5)


# every template is reached by a page's own rule

PLACES = (
    [("llama", "ioi")],
    [("llama", "ioi"), ("qwen3", "ioi")],
    [("llama", "ioi"), ("llama", "factual")],
    [("llama", "ioi"), ("qwen3", "factual")],
    [("llama", "ioi"), ("qwen3", "ioi"), ("qwen2", "factual")],
)


ROUTES = {    # what a test of route distances can say of its first method: (difference, verdict)
    "nearer": (-.3, "differs"),
    "farther": (.3, "differs"),
    "equal": (.01, "equal within the bound"),
    "unresolved": (.05, "not resolved"),
    "untested": (None, "untested"),
}
PASSED, BOUNDS = {"route": True}, {"accuracy": .05, "route": .1}


def a_route(place, pair, metric, kind, seen=.2):
    diff, verdict = ROUTES[kind]
    test = dict(family=place[0], task=place[1], a=pair[0], b=pair[1], metric=metric, diff=diff, verdict=verdict)
    return test | dict(bound=.1, p=None if diff is None else .01, detectable=None if diff is None else seen)


def route_tests(pairs):
    "Lists of tests of `pairs` whose accuracies are equal: every combination of outcomes of the route."
    for places in PLACES:
        for kinds in product(ROUTES, repeat=len(places)):
            out = []
            for pair, at, kind in ((pair, at, kind) for pair in pairs for at, kind in zip(places, kinds)):
                out += [a_route(at, pair, "accuracy", "equal"), a_route(at, pair, "route", kind)]
            yield out


def a_row(method, accuracy, route, family="llama"):
    row = dict(family=family, task="ioi", method=method, accuracy=accuracy, route=route)
    return row | dict(route_ci=None if route is None else [route - .1, route + .1], route_floor=.05)


def said_of(cls, said, reading="route", met=None, architecture="qwen3", **measured):
    "A row of the calibration: what a reading said of a class."
    expected = EXPECTED[reading, cls].answer
    met = said in ("seen", "ignored") if met is None else met
    by = 0. if met else None if said == "undefined" or said.startswith("not m") else .25
    about = dict(architecture=architecture, reading=reading, cls=cls, expected=expected, said=said)
    return about | dict(met=met, missed_by=by) | measured


def cases_of_calibrate():
    say, told = page("calibrate"), dict(auroc=.7, low=.5, high=.9)
    plants = [dict(seed=99 + i, passed=True, read=True) for i in range(3)]
    failed = [{**q, "passed": False, "read": False} for q in plants]
    kept = [{**q, "read": True} for q in failed]
    for some in (plants, plants + failed[:1], plants + failed, kept): say.plants_sentence(some)
    pairs = dict(architecture="qwen3", cls="moved", held_out=True, kl=.4, gap_r=.6)
    for some in ([], [{**pairs, "alike": True}], [{**pairs, "alike": False}]): say.behaviour_sentence(some)
    good, bad = (said_of("rotated", said, value=.1) for said in ("ignored", "reacts"))
    for some in ([], [good], [good, bad]): say.rewrites_sentence(some)
    for n in range(4):
        say.used_sentence({r: dict(validated=i < n) for i, r in enumerate(("route", "pairwise", "original"))})
    for kept in ({}, dict(route=dict(validated=True)), dict(route=dict(validated=False))): say.route_sentence(kept)
    missed = [said_of("moved", "missed", **told), said_of("rerouted", "not matched", **told)]
    missed.append(said_of("dose", "missed", "fingerprint", tau=.5, n=9))
    missed.append(said_of("rotated", "reacts", "original", value=.9))
    missed.append(said_of("moved", "undefined", "pairwise", **told))
    for some in ([said_of("moved", "seen", **told)], missed): say.missed_sentence(some)
    for said in ("seen", "missed", "not measured"):
        say.one_cell("calibrate.original", [said_of("moved", said, "original", **told)], "original", "moved")
    for said in ("ignored", "reacts", "not resolved", "not matched", "undefined"):
        say.one_cell("calibrate.warp", [said_of("moved", said, "route_warped", **told)], "route_warped", "moved")
    doses = [said_of("dose", said, reading, tau=.9, n=9) for reading in ("route", "fingerprint")
             for said in ("seen", "missed")]
    for some in ([missed[0]], doses[::2], doses[1::2], [doses[0], doses[3]]): say.dose_sentence(some)
    for some in ([], [{r: .9 for r in READINGS}]): say.ceiling_sentence(some)
    other = [said_of("moved", said, architecture="llama", **told) for said in ("seen", "missed")]
    first = said_of("moved", "seen", **told)
    for some in ([first], [first, other[0]], [first, *other]): say.second_sentence(some)
    for some in ([], [good], [good, bad]): say.real_sentence([dict(family="llama", rewrites=dict(rows=some))])


def cases_of_exp1():
    rows = [a_row("undistilled", .5, None), a_row("fitnets", .95, .4), a_row("sft", .8, .3), a_row("rcid", .7, .1)]
    say, nothing = page("exp1"), a_row("fitnets", .9, None)
    for n in (2, 3, 4): say.competence_sentence(rows[:n])
    say.competence_sentence(rows[2:])
    for some in (rows, [nothing], [nothing, *rows]): say.gap_sentence(some)
    near = a_row("fitnets", .9, .06) | dict(route_ci=[.05, .08])
    for some in (rows[3:], [*rows, near], [nothing]): say.route_sentence(some, PASSED, .1)
    assert [say.from_teacher(r, .1) for r in (near, rows[1], rows[3])] == [
        "equal within the bound", "differs", "not resolved"
    ]
    for tests in (*route_tests(say.EXP1), []): say.exp1_sentences(rows, tests, PASSED, BOUNDS)
    pair, at = ("fitnets", "standard_kd"), ("llama", "ioi")
    for answers, route in (("equal", "equal"), ("unresolved", "farther"), ("equal", "untested")):
        tests = [a_route(at, pair, "accuracy", answers, .1), a_route(at, pair, "route", route)]
        say.exp1_sentences(rows, tests, PASSED, BOUNDS)
    say.power_sentence([a_route(at, pair, "accuracy", "equal", seen) for seen in (.1, .2)])
    say.exp1_sentences(rows, [], {}, BOUNDS)


def cases_of_exp2():
    say = page("exp2")
    for tests in (*route_tests(say.EXP2), []):
        for validated in (PASSED, {"route": False}): say.exp2_sentences(tests, validated)
    for kind in ROUTES: say.accuracy_sentence([a_route(("llama", "ioi"), say.EXP2[0], "accuracy", kind)])


def test_places_with_one_outcome_are_counted_and_a_single_one_is_named():
    say, pair = page("exp2"), ("rcid", "standard_kd_pairs")
    places = [("llama", "ioi"), ("qwen3", "ioi"), ("qwen3", "factual")]
    tests = [a_route(at, pair, "route", kind) for at, kind in zip(places, ("farther", "equal", "equal"))]
    told = say.exp2_sentences(tests, PASSED)["claim.exp2.pairs"]
    assert told.endswith("as far from the teacher's within 0.10 in two of three cases; farther from the teacher's in"
                         " one of three cases (LLaMA, IOI).")
    told = say.exp2_sentences(tests[1:], PASSED)["claim.exp2.pairs"]
    assert told.endswith("within 0.10 in both cases.")


def test_only_controls_that_were_run_are_named():
    say, at = page("exp2"), ("llama", "ioi")
    def told(*controls):
        tests = [a_route(at, ("rcid", f"rcid_{control}"), "route", "equal") for control in controls]
        return say.exp2_sentences(tests, PASSED)["claim.exp2.controls"]
    assert "with shuffled pairs, the route" in told("shuffled")
    assert "with shuffled pairs or random sites, the route" in told("random_sites", "shuffled")
    assert "with shuffled pairs, random sites or a random map, the" in told("shuffled", "random_sites", "random_w")


def a_share(mean, low=None, high=None):
    "Of a distance that is closed; None where nothing could be read."
    ends = [None, None] if mean is None else [mean - .1 if low is None else low, mean + .1 if high is None else high]
    seen = None if mean is None else .2
    return dict(diff=mean, ci=ends, n=0 if mean is None else 3, undefined=0, detectable=seen)


def planted_test(kind, metric="apart", pair=("rcid_m", "hidden_m")):
    "A test of the planted experiment by what it says; of accuracies `nearer` is lower and `farther` higher."
    diff, verdict = ROUTES[kind]
    p = None if diff is None else .01
    test = dict(a=pair[0], b=pair[1], metric=metric, diff=diff, ci=[diff, diff], verdict=verdict, bound=.1, p=p)
    return test | dict(p_holm=p, detectable=None if diff is None else .2)


# what a share of a distance is called at a bar of .8: (mean, lower end, upper end)
SHARES = {
    "closes": (.9, .85, .95), "partly": (.4, .3, .5), "unresolved": (.8, .6, .9), "nothing": (.1, -.2, .4),
    "missing": (None,),
}


def test_the_reach_that_is_told_is_the_chosen_method_s():
    told = page("exp2a").reach_told
    lines = [dict(method=m, kinds=kinds, first=m + "".join(kinds)) for m in "kr" for kinds in (["a"], ["a", "b"])]
    assert told(lines, "r", ["k", "r"], ["a"]) == dict(method="r", n=2, share="rab")
    assert told(lines, "x", ["k", "r"], ["a"]) == told(lines, None, ["k"], ["a"]) == dict(method="k", n=2, share="kab")
    none = dict(method=None, n=0, share=None)
    assert told(lines[::2], "r", ["k", "r"], ["a"]) == told([], None, [], ["a"]) == none


def cases_of_exp2a():
    say, route = page("exp2a"), {"route": True}
    for couples, directions in ((0, 3), (9, 3), (2, 1)): say.plants_sentence(couples, directions, 8)
    for chosen in (None, "rcid_m"): say.chosen_sentence(chosen, route)
    for kind, share in SHARES.items():
        assert say.bar_outcome(a_share(*share), .8) == kind
        say.repair_sentence("rcid_m", a_share(*share), route)
    for kind, share in {**SHARES, "unresolved": (.5, .3, .7), "partly": (.4, .3, .5)}.items():
        assert say.bar_outcome(a_share(*share), .6) == kind
        say.reach_sentence("rcid_m", a_share(*share), 2, route)
    say.repair_sentence(None, a_share(.9), route)
    for name in say.TITLES: say.directions_sentence({name: a_share(.9), "other": a_share(None)}, route)
    say.directions_sentence({}, route)
    told = say.directions_sentence({"rerouted": a_share(.05)}, route)
    assert "0.05 through another position, where 0.20 would have been seen" in told
    for knock in (None, a_share(.9), a_share(.05)): say.knockout_sentence("rcid_m", knock)
    for kind in (*ROUTES, None):
        test = None if kind is None else planted_test(kind)
        for key in ("exp2a.contrast", "exp2a.norms"): say.contrast_sentence(key, test, route)
        answers = [planted_test(kind, metric, ("rcid_m", say.CONTROL)) for metric in say.ANSWERS] if kind else []
        say.accuracy_sentence(answers)
        say.others_sentence([] if kind is None else [planted_test(kind, "apart", ("rcid", say.CONTROL))], route)
        say.keeps_sentence([] if kind is None else [planted_test(kind, "apart", pair) for pair in say.KEEP], route)
    for validated in (route, {"route": False}):
        say.exp2a_sentences(planted_record(validated))


def planted_record(validated):
    "What the page keeps of a run, as far as sentences are made of it."
    shares = dict(first=a_share(.9), trained=a_share(.95), knock=a_share(.8), directions={"early_late": a_share(.9)})
    tests = [planted_test("nearer"), planted_test("equal", "unseen", ("rcid_m", "standard_kd_pairs"))]
    tests += [planted_test("equal", "apart", (m, "undistilled")) for m in ("standard_kd_pairs", "rcid")]
    closed = {method: shares for method in ("standard_kd_pairs", "rcid", "rcid_m")}
    counts, reached = dict(couples=9, directions=3, methods=8), dict(method="rcid_m", n=2, share=a_share(.9))
    more = dict(closed=closed, counts=counts, reached=reached, validated=validated)
    return dict(chosen="rcid_m", tests=tests, **more)


def real_test(kind, metric, cell=("all", "all")):
    "A test of the real experiment by what it says; of accuracies `nearer` is lower and `farther` higher."
    test = planted_test(kind, metric, ("rcid_m", "standard_kd_pairs"))
    return test | dict(student=cell[0], task=cell[1])


def real_record(validated, kind="nearer"):
    "What the page keeps of a run, as far as sentences are made of it."
    tests = [planted_test("farther", "trained", ("rcid", "standard_kd_pairs")) | dict(student="all", task="all")]
    tests += [real_test(kind, metric) for metric in ("others", "trained", "accuracy")]
    tests += [real_test("unresolved", metric, ("early", "ioi")) for metric in ("others", "trained", "accuracy")]
    rows = [dict(student="early", task="ioi", method=m, trained=a_share(.3)) for m in ("undistilled", "rcid_m")]
    counts = dict(students=2, tasks=1, methods=3, seeds=1)
    more = dict(counts=counts, least=dict(ioi=dict(early=.2, late=None)), validated=validated)
    return dict(rows=rows, tests=tests, chosen="rcid_m", control=a_share(.3) | dict(least=.2),
                room=dict(cells=4, room=2), **more)


def cases_of_exp2b():
    say, route = page("exp2b"), {"route": True}
    for kind in ROUTES:
        for validated in (route, {"route": False}): say.exp2b_sentences(real_record(validated, kind))
    counts = dict(students=0, tasks=2, methods=7, seeds=3)
    nothing = dict(counts=counts, rows=[], tests=[], chosen=None, least={}, control=None, room=dict(cells=0, room=0))
    say.room_sentence(4, 0)
    assert "one of one" not in say.room_sentence(1, 1)
    say.exp2b_sentences(nothing | dict(validated=route))
    for n in (1, 2): say.students_sentence(n, n, 7, n)


def test_a_table_of_one_student_does_not_say_everything_twice():
    "With one student and one task, its comparisons are those over all."
    table = page("exp2b").real_tests
    over = [real_test("nearer", "others"), real_test("nearer", "trained")]
    one, two = ([real_test("nearer", m, (cut, "ioi")) for m in ("others", "trained")] for cut in ("even", "early"))
    assert table(over + one) == table(over) and table(over + one).count("all &") == 2
    both = table(over + one + two)
    assert both.count("all &") == 2 and "even, " in both and "early, " in both


def test_the_real_claim_is_of_the_chosen_method_over_all_students():
    "Neither a contrast that was asked for before it nor a single student speaks for it."
    say, record = page("exp2b"), real_record({"route": True}, "equal")
    test = say.test_of(record["tests"], "trained")
    assert (test["a"], test["student"], test["verdict"]) == ("rcid_m", "all", "equal within the bound")
    claims = say.exp2b_sentences(record)
    assert "does not close" in claims["claim.exp2b.repair"]
    assert "closes more" in say.exp2b_sentences(real_record({"route": True}))["claim.exp2b.repair"]
    none = say.exp2b_sentences(record | dict(chosen=None))
    assert none["claim.exp2b.repair"] == sentence("exp2b", "exp2b.repair", "missing")


def cases_of_exp3():
    say = page("exp3")
    def said(report, validated=PASSED):
        known = report.p_permutation == report.p_permutation
        p = dict.fromkeys(("lost", "kappa"), report.p_permutation if known else None)
        spread = dict(natural=None, planted=.2, p=None)
        say.exp3_sentences(report, dict(lost=report, kappa=report), p, spread, validated)
    for medians, p in (((.01, .2), .01), ((.2, .01), .01), ((.2, .2), .9)):
        say.spread_sentence(dict(natural=medians[0], planted=medians[1], p=p), PASSED)
    follows, unrelated = [0, 1, 2, 3], [1, 0, 0, 1]          # of four seeds in each of three groups
    for y in (follows, follows[::-1], unrelated):
        said(robustness_correlation(follows * 3, y * 3, [g for g in "abc" for _ in y], 500))
    one_seed = robustness_correlation(follows, follows, list("abcd"), 50)
    for validated in (PASSED, {"route": False}): said(one_seed, validated)
    said(robustness_correlation([.5] * 4, [.1] * 4, list("aabb"), 50))


def test_planted_students_that_err_with_their_teacher_the_more_the_nearer_they_are():
    "The direction of the sentence: a small distance and a large kappa go together."
    say, points = page("exp3"), []
    for group in "abc":
        for d in range(4): points.append(dict(group=group, route=.1 * d, lost=.05 * d, kappa=1 - .2 * d))
    lost, kappa = (say.planted_report(points, what, 500) for what in ("lost", "kappa"))
    assert np.isclose(lost.within.r, 1) and np.isclose(kappa.within.r, -1) and lost.n_groups == 3
    spread = say.spread_test(say.spreads(points, "group"), say.spreads(points, "group"))
    assert spread["n"] == [3, 3] and np.isclose(spread["natural"], np.std([0, .1, .2, .3], ddof=1)) and spread["p"] == 1
    p = dict(lost=lost.p_permutation, kappa=kappa.p_permutation)
    told = say.exp3_sentences(lost, dict(lost=lost, kappa=kappa), p, spread, PASSED)
    assert told["claim.exp3.planted_kappa"].startswith("The nearer the route is to the teacher's, the more does")
    assert "lose more accuracy on new names" in told["claim.exp3.planted_lost"]
    told = say.exp3_sentences(lost, dict(lost=lost, kappa=kappa), dict(lost=.06, kappa=.01), spread, PASSED)
    assert "is not resolved" in told["claim.exp3.planted_lost"]        # it is the corrected p that decides


def test_students_of_one_place_are_spread_as_far_as_their_distances():
    say = page("exp3")
    points = [dict(group=g, route=r) for g, r in (("a", .1), ("a", .3), ("b", .2), ("c", float("nan")), ("c", .1))]
    assert np.allclose(say.spreads(points, "group"), np.std([.1, .3], ddof=1))       # one student has no spread
    far = say.spread_test([.01, .02, .01, .02], [.2, .3, .2, .3])
    assert far["p"] < .05 and say.spread_sentence(far, PASSED).startswith("The routes of natural students lie closer")
    assert say.spread_test([.1], [.2, .3])["p"] is None


def cases_of_exp4():
    row = dict(family="llama", task="ioi", who="teacher", sites=4, higher=3, lower=0)
    row |= dict(template_lower=2, template_higher=0)
    with_template, without = dict(template_h=.9, template_d=.3), dict(template_h=None, template_d=None)
    for rows in ([], [row | with_template], [row | without]): page("exp4").exp4_sentences(rows)


def cases_of_exp5():
    for tests in route_tests(page("exp5").EXP5): page("exp5").architecture_sentence(tests, PASSED)
    page("exp5").architecture_sentence(tests, {"route": False})


def cases_of_paper():
    say = page("paper")
    own, pretrained = dict(source="trained here, 600 steps"), dict(source="a wheel")
    for n in (1, 2, 3): say.unit_sentence(n, "pairs", 1000)
    say.unit_sentence(3, "seeds", 1000)
    passed, failed = ({"gates": {"accuracy": dict(value=v, bound=.9)}} for v in (.95, .8))
    for pilots in ("p", "pp", "ppp", "pf", "ff"):
        say.pilot_sentence({f"family {i}": passed if kind == "p" else failed for i, kind in enumerate(pilots)})
    assert say.left_out_sentence({}) == ""
    gates = ("models", "data", "pilot")
    told = [say.left_out_sentence({"llama": gate}) for gate in gates]
    assert len(set(told)) == 3 and told[0].startswith("The LLaMA family is left out of this run: its weights")
    say.sites_sentence({"llama": dict(roles=["s2", "end"], score=[[3., 0.], [2., 0.], [0., 4.]])})
    right = {"test": {"teacher_right": dict(kept=96, dropped=32)}}
    for data in ({"llama": {"tasks": {"factual": right}}}, {}): say.filter_sentence(data)
    say.models_sentence(dict(llama=own, qwen3=pretrained, qwen2=pretrained), dict(qwen2="a.Q4_1.gguf"))
    cells = [dict(family="llama", task=t, method="rcid", seed=s) for t in ("ioi", "factual") for s in (1, 2)]
    for some in (cells, cells[:1]):
        for models in (dict(a=own), dict(a=own, b=own), dict(a=own, b=pretrained)): say.limits_sentence(models, some)
        say.setup_values(some, "tiny")
    say.setup_values(cells + [dict(family="qwen3", task="ioi", method="rcid", seed=1)], "tiny")
    say.span([4, 6])
    for name in ("entity", "or"): word("paper", name)      # said by the page's own cells, which need a run


@pytest.mark.parametrize("name", PAGES)
def test_every_template_has_a_case(name, monkeypatch):
    "The page's functions reach each template of its file, and fill it: no template is dead, no outcome without words."
    reached, say = set(), page(name)
    def recorded(where, key, outcome, /, **values):
        reached.add((key, outcome))
        return sentence(where, key, outcome, **values)
    monkeypatch.setattr(say, "sentence", recorded)
    def recorded_word(where, name, /, **values): return recorded(where, "words", name, **values)
    monkeypatch.setattr(say, "word", recorded_word, raising=False)
    globals()[f"cases_of_{name}"]()
    if name == "paper": reached |= {("words", "entity"), ("words", "or")}
    every = {(key, outcome) for key, outcomes in templates(name).items() for outcome in outcomes}
    assert every - reached == set(), "templates that no outcome reaches"


@pytest.mark.parametrize("name", PAGES)
def test_the_keys_of_a_page_are_literal(name):
    "grep finds the page of every sentence: its key stands in the notebook as it stands in the file."
    source = (ROOT/"nbs"/"experiments"/f"{name}.ipynb").read_text(encoding="utf-8")
    for key in templates(name):
        if key == "words": continue
        assert f'\\"{key}\\"' in source, f"{key} of paper/sentences/{name}.yaml is not in {name}.ipynb"


def test_a_template_says_what_it_needs():
    "A field is a plain name: no number format and no lookup can hide in a template."
    for name in PAGES:
        for key, outcomes in templates(name).items():
            for outcome, text in outcomes.items():
                assert all(field.isidentifier() for field in fields(text)), f"{name}.yaml, {key}, {outcome}"


def test_the_claims_of_the_paper_are_made_by_a_page():
    "Every key of the calibration and of experiments 1 to 5 that the text asks for is a sentence of its page."
    from rcid.report.paper import keys_used
    pages = tuple(f"claim.{name}." for name in PAGES if name != "paper")
    asked = {key for key in keys_used(ROOT/"paper") if key.startswith(pages)}
    made = {"claim." + key for name in PAGES for key in templates(name)}
    assert asked and asked <= made, asked - made


def test_the_abstract_says_no_result_of_its_own():
    "Its lines are sentences that a page chose, or say what is asked and what is done: no number, and no outcome."
    lines = (ROOT/"paper"/"sections"/"abstract.tex").read_text(encoding="utf-8").splitlines()
    claims = [line for line in lines if line.startswith("\\claim{") and line.endswith("}")]
    typed = " ".join(line for line in lines if line not in claims)
    outcomes = r"closes|moves?|keeps|differs?|equal|better|worse|nearer|farther|higher|lower|improves?|fails?"
    assert len(claims) >= 8 and not re.search(rf"\d|\b(?:{outcomes})\b", typed), typed


def test_what_is_read_has_ten_pages():
    "Text, figures and references; what comes behind them is looked up."
    needs_results_of("exp2b", "exp6", "exp7")
    import tempfile
    import typst
    from rcid.report.paper import fill, to_typst
    folder = ROOT/"paper"
    text = to_typst(fill(folder, read_values(folder/"values.tex")), folder)
    with tempfile.NamedTemporaryFile("w", suffix=".typ", dir=folder, prefix=".paper-", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        fonts = typst.Fonts(include_system_fonts=False)
        last = typst.query(f.name, "<body-ends>", field="value", one=True, root=str(folder), font_paths=fonts)
    assert 5 < int(last) <= 10


# what the calibration did not pass is not said


def test_a_reading_that_is_not_validated_makes_no_claim():
    "Whatever the route says, its sentences are those of a reading that nobody may believe."
    say, rows = page("exp1"), [a_row("undistilled", .5, .9), a_row("fitnets", .95, .4), a_row("rcid", .96, .1)]
    keys, said = ("route", "undistilled", "dissociation"), set()
    for tests in route_tests(say.EXP1):
        claims = say.exp1_sentences(rows, tests, {"route": False, "fingerprint": True}, BOUNDS)
        said.add(tuple(claims[f"claim.exp1.{key}"] for key in keys))
    assert said == {tuple(sentence("exp1", f"exp1.{key}", "unvalidated") for key in keys)}


def test_a_repair_is_not_claimed_by_a_reading_that_is_not_validated():
    "Knocking attention out is no reading under test: it still speaks."
    say = page("exp2a")
    claims = say.exp2a_sentences(planted_record({"route": False, "fingerprint": True}))
    for key in ("keeps", "repair", "directions", "reach", "contrast", "norms", "others"):
        assert claims[f"claim.exp2a.{key}"] == sentence("exp2a", f"exp2a.{key}", "unvalidated"), key
    assert claims["claim.exp2a.knockout"] == say.knockout_sentence("rcid_m", a_share(.8))


def test_the_chosen_method_is_the_nearest_that_still_answers():
    "Not a control, not one that lost a route, not one that answers worse than the bound allows."
    import numpy as np
    say = page("exp2a")
    def runs(*means): return np.array([[m, m] for m in means])
    left = dict(standard_kd_pairs=runs(.6, .6), rcid=runs(.5, .4), hidden_m=runs(.0, .0), interchange=runs(.1, .1),
                rcid_m=runs(.2, .2), rcid_norm=runs(.0, np.nan))
    right = {method: runs(.95, .95) for method in left}
    assert say.choose(left, right, .05) == "interchange"
    assert say.choose(left, right | dict(interchange=runs(.9, .85)), .05) == "rcid_m"
    assert say.choose({m: runs() for m in left}, {m: runs() for m in left}, .05) is None


def test_an_instrument_without_calibration_is_not_believed(tmp_path):
    assert not any(read_validated(tmp_path).values())
    (tmp_path/"calibrate.json").write_text('{"validated": {"route": true}}', encoding="utf-8")
    assert [name for name, passed in read_validated(tmp_path).items() if passed] == ["route"]
    (tmp_path/"calibrate.json").write_text('{"rows": []}', encoding="utf-8")
    with pytest.raises(ValueError, match="calibrate.json does not say what is validated: run `dvc repro calibrate`"):
        read_validated(tmp_path)


def test_three_outcomes_and_no_fourth():
    "A difference after Holm's correction, equality by its own test, or neither: what is not found is not absent."
    def test(diff, low, high, p): return dict(diff=diff, ci90=[low, high], p=p, p_holm=p)
    said = [verdict_of(test(*t), .1)["verdict"] for t in (
        (.3, .25, .35, .001), (.02, -.01, .05, .2), (.02, .01, .03, .01), (.2, .01, .39, .08), (.2, .02, .38, .04))]
    assert said == ["differs", "equal within the bound", "equal within the bound", "not resolved", "differs"]
    assert verdict_of(dict(diff=None, ci90=[None, None], p=None), .1)["verdict"] == "untested"
