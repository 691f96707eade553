"""Experiments 6 and 7, from the files of single students to the paper: rows, tests, every table cell, every
sentence."""

from dataclasses import replace
import numpy as np
import pytest, torch
from safetensors.numpy import save_file
from conftest import ROOT, assert_shows, needs_results_of, page
from rcid.causal.mediation import Mediation
from rcid.core import load_params, read_json, write_json
from rcid.core.tensors import save_tensors
from rcid.kv import Inside, inside_tensors
from rcid.report import sentences
from rcid.report import holm, outcome

EXP6, EXP7 = page("exp6"), page("exp7")


def metrics(name: str): return read_json(ROOT/"metrics"/f"{name}.json")


def table(name: str) -> str: return (ROOT/"paper"/"tables"/f"{name}.tex").read_text(encoding="utf-8")


# tables: the committed ones are what the functions make of the committed metrics, cell by cell

def test_tables_of_experiment_6_are_its_metrics():
    record = metrics("exp6")
    assert_shows(table("exp6"), EXP6.kv_table, record["rows"])
    assert_shows(table("kv_tests"), EXP6.kv_tests_table, record["tests"])
    assert_shows(table("kv_profile"), EXP6.kv_profile_table, metrics("kv/diagnosis")["profile"])


def test_tables_of_experiment_7_are_its_metrics():
    needs_results_of("exp7")
    record = metrics("exp7")
    names = load_params().teachers.names
    assert_shows(table("exp7"), lambda rows: EXP7.several_table(rows, names), record["rows"])
    assert_shows(table("exp7_tests"), lambda tests: EXP7.teacher_tests_table(tests, names), record["tests"])
    models = {model: metrics(f"kv_base/{model}") for model in load_params().teachers.base_models}
    assert_shows(table("teachers"), EXP7.models_table, models)


def test_another_number_is_another_cell():
    rows = metrics("exp6")["rows"]
    rows[3]["accuracy"] += .01
    with pytest.raises(AssertionError, match=r"\(9, 2\)"): assert_shows(table("exp6"), EXP6.kv_table, rows)


def test_methods_without_a_group_come_last():
    rows = metrics("exp6")["rows"][:3]
    rows.append({**rows[0], "method": "my_method"})
    text = EXP6.kv_table(rows)
    assert text.index("emph{others}") > text.index("emph{controls}") and r"\quad my method &" in text
    assert len(EXP6.kv_figure(rows).axes[0].get_yticks()) == 3, "the figure shows the methods of the paper"


def test_every_line_of_the_figure_has_a_name_of_its_own():
    some = metrics("exp6")["rows"][0]
    every = [some | dict(method=m) for methods in EXP6.GROUPS.values() for m in methods]
    names = [t.get_text() for t in EXP6.kv_figure(every).axes[0].get_yticklabels()]
    assert len(names) == len(set(names)) == len(every)


def test_a_star_marks_what_is_detected():
    tests = [planted("accuracy", .1, .01, a="fixed", b="none"), planted("llama", .1, .5, a="fixed", b="none")]
    text = EXP7.teacher_tests_table(tests, ["llama"])
    assert text.count("$^*$") == 1 and r"0.10 [0.00, 0.20]$^*$ & 0.10 [0.00, 0.20] \\" in text


def test_benchmarks_are_a_column_where_they_were_run():
    row = dict(setting="fixed", accuracy=.9, consistency={"llama": .5}, weights={}, bench=None)
    assert "benchmarks" not in EXP7.several_table([row], ["llama"])
    assert r"benchmarks \\" in EXP7.several_table([row, {**row, "bench": .5}], ["llama"])


# rows and tests, of invented students

def kv_student(method: str, seed: int, right: str, consistency: float | None = .5, **more) -> dict:
    "A student of experiment 6 as its stage writes it."
    null = dict(mean=0., low=-.2, high=.2)
    report = dict(consistency=consistency, low=.4, high=.6, n_undefined=1, null=null, concordance_mean=.5, iia_mean=.9)
    student = dict(
        method=method,
        seed=seed,
        accuracy=right.count("1") / len(right),
        right=right,
        accuracy_words=.9,
        cosine=dict(k_all=.5, v_all=.4),
        consistency=report,
        reading=dict(accuracy=.9),
        projector_parameters=100,
        nan=0,
        grad_norm=dict(max=2. + seed),
        tokens=10,
        flops=1e9,
    )
    return student | more


def test_rows_average_seeds():
    students = [kv_student("kava", 1, "1100", .2), kv_student("kava", 2, "1111", .8, grad_norm=None)]
    row, = EXP6.kv_rows(students)
    assert (row["accuracy"], row["n_seeds"], row["undefined"], row["grad_norm"]) == (.75, 2, 2, 3.)
    assert row["consistency"] == pytest.approx(np.tanh((np.arctanh(.2) + np.arctanh(.8)) / 2))
    assert row["accuracy_ci"] == pytest.approx([(.15003899 + .51010922) / 2, (.84996101 + 1) / 2])
    assert [s["accuracy"] for s in row["seeds"]] == [.5, 1.]
    assert EXP6.kv_rows([kv_student("kava", 1, "10", .2), kv_student("kava", 2, "10", None)])[0]["consistency"] is None


def test_the_method_is_chosen_on_validation_problems():
    def row(method, **more): return row6(method, **({"places": 6, "accuracy_val": .5} | more))
    rows = [row("no_places", places=0, accuracy_val=.9), row("kava"), row("latent_sft", accuracy_val=.6)]
    assert EXP6.chosen_method(rows) == "latent_sft"
    # a control is never chosen, nor what was not measured
    assert EXP6.chosen_method([*rows, row("kava_shuffled", accuracy_val=.8)]) == "latent_sft"
    assert EXP6.chosen_method([row("kava", accuracy_val=None)]) is None


def test_curves_and_ablations_are_means_over_seeds():
    curves = [[dict(step=s, accuracy=a) for s, a in zip((0, 50, 100), some)] for some in ((0., .2, .4), (.2, .4, .8))]
    row, = EXP6.kv_rows([
        kv_student("kava", i, "10", curve=curve, ablations=dict(none=dict(right=hits)), accuracy_val=.5, places=6,
                   rounds={"0": .1, "10": i / 2})
        for i, (curve, hits) in enumerate(zip(curves, ("1100", "1111")))
    ])
    assert row["curve"] == [[0, .1], [50, pytest.approx(.3)], [100, pytest.approx(.6)]]
    assert row["ablations"] == {"none": {"right": .75}} and row["places"] == 6
    assert row["rounds"] == [[0, .1], [10, .25]]
    assert EXP6.last_quarter(row) == pytest.approx(.15)


def test_an_ablation_is_tested_against_students_without_places():
    hits = dict(right="0" * 20)
    students = [
        kv_student("kava", 1, "1" * 20, ablations={how: hits for how in ("none", *EXP6.ABLATIONS)}),
        kv_student("no_places", 1, "1" * 10 + "0" * 10),
    ]
    tests = EXP6.ablation_tests(students, "kava", list(range(20)), .05, 500)
    assert [t["how"] for t in tests] == list(EXP6.ABLATIONS) and all(t["diff"] == -.5 for t in tests)
    assert {t["verdict"] for t in tests} == {"differs"} and all(t["drop"]["diff"] == -1 for t in tests)
    assert EXP6.ablation_tests(students[1:], "kava", list(range(20)), .05, 500) == []


def inside_of_shares(first: list[float], last: list[float], ways=(1., 0.)) -> Inside:
    "Twelve problems of gap 2, in which every input carries these shares of both steps."
    effects = {f"step {s + 1}": 2 * torch.tensor(x).expand(12, 1, -1) for s, x in enumerate((first, last))}
    gaps, forced = {k: torch.full((12,), 2.) for k in effects}, torch.zeros(1, len(first), dtype=torch.bool)
    names, units = [str(j) for j in range(len(first))], torch.arange(12)[:, None]
    both = {k: 2 * torch.tensor(ways).expand(12, 1, 2) for k in effects}
    return Inside(
        Mediation(effects, gaps, dict.fromkeys(effects, forced), names, units),
        Mediation(both, gaps, dict.fromkeys(effects, torch.zeros(1, 2, dtype=torch.bool)), list("pq"), units),
    )


def test_steps_are_found_in_their_places():
    student = inside_of_shares([0., .6, 0.], [0., 0., 1.])
    teacher = inside_of_shares([0., 0., 1., 0., 0., 0.], [0.] * 6)
    found = EXP6.inside_test("kava", student, teacher, 50)
    assert found["later"] == dict(diff=1., ci=[1., 1.]) and found["ways"]["ci"] == [1., 1.]
    # the third of six words stands where the second of three places does; the last step is in no word
    assert [(s["place"], s["apart"]) for s in found["steps"]] == [(1., [0., 0.]), (2., [None, None])]
    assert found["undefined"] == {}
    # of other problems, or of nobody
    other = EXP6.mean_inside([teacher])
    others = Inside(replace(other.places, entities=torch.zeros(12, 1, dtype=int)), other.ways)
    for nobody in (others, None):
        assert all(s["apart"] == [None, None] for s in EXP6.inside_test("kava", student, nobody, 50)["steps"])
    said = EXP6.inside_sentence(EXP6.inside_test("kava", inside_of_shares([0.] * 3, [0., 1., 0.], (0., 1.)), None, 50))
    assert "from the question past them (1.00 [1.00, 1.00] of its effect)" in said and "no order is defined" in said


def test_the_best_of_those_looked_into_is_shown(tmp_path):
    def row(method, val): return row6(method, places=6, accuracy_val=val)
    rows = [row("latent_sft", .5), row("kava", .6), row("kv_flat", .9)]
    students = [
        kv_student("kava", 1, "10", inside=dict(pairs=2)),
        kv_student("latent_sft", 1, "10", inside=dict(pairs=2)),
        kv_student("kv_flat", 1, "10"),
    ]
    assert EXP6.inside_method(rows, students) == "kava"
    assert EXP6.inside_method(rows, [*students, kv_student("kava", 2, "10", inside=None)]) == "latent_sft"
    assert EXP6.inside_method(rows, students[2:]) is None and EXP6.inside_students(students, None, tmp_path) is None
    for seed, share in ((1, 0.), (2, 1.)):
        save_tensors(tmp_path/f"kava-{seed}.safetensors", inside_tensors(inside_of_shares([share, 0.], [0., 1.])))
    both = EXP6.inside_students([students[0], kv_student("kava", 2, "10")], "kava", tmp_path)
    assert both.places.fraction[0, 0].tolist() == [.5, 0.]
    figure = EXP6.inside_figure(both, both, ["\n", " $3"], "KaVa")
    assert [t.get_text() for t in figure.axes[1].get_xticklabels()] == ["new line", "3"]
    save_tensors(tmp_path/"kv_flat-1.safetensors", {"effects": torch.zeros(2, 3)})
    assert EXP6.read_inside(tmp_path/"kv_flat-1.safetensors") is None


def test_a_missing_student_is_named(tmp_path):
    write_json(tmp_path/"undistilled-0.json", {})
    with pytest.raises(FileNotFoundError, match=r"kava-1\.json is missing: run `dvc repro`"):
        EXP6.read_students(tmp_path, ["kava"], [1])


def test_problems_with_the_same_numbers_are_one_chain():
    one = dict(kind="+-", prompt="Emma has 5 apples and 13.")
    other = dict(kind="+-", prompt="Tom has 5 cards, 13.")
    assert EXP6.chain_clusters([one, other, {**one, "kind": "++"}]) == ["+-5 13", "+-5 13", "++5 13"]


def test_methods_are_compared_on_both_metrics(tmp_path):
    rng = np.random.default_rng(0)
    teacher = rng.normal(size=(40, 3))
    save_effects(tmp_path/"sites"/"teacher.safetensors", teacher)
    save_effects(tmp_path/"effects"/"kv_structured-1.safetensors", 2 * teacher)
    save_effects(tmp_path/"effects"/"kv_flat-1.safetensors", rng.normal(size=(40, 3)))
    students = [kv_student("kv_structured", 1, "1" * 40), kv_student("kv_flat", 1, "0" * 20 + "1" * 20)]
    tests = EXP6.kv_tests(students, list(range(40)), np.arange(40), tmp_path, n=500)
    assert [(t["a"], t["b"], t["metric"]) for t in tests] == [
        ("kv_structured", "kv_flat", "accuracy"),
        ("kv_structured", "kv_flat", "consistency"),
    ]
    assert tests[0]["diff"] == .5 and [outcome(t) for t in tests] == ["higher", "higher"]


def save_effects(path, effects: np.ndarray, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    ld = dict(ld_clean=np.full(len(effects), 2, np.float32), ld_corrupt=np.full(len(effects), -2, np.float32))
    save_file({"effects": effects.astype(np.float32), **ld, **more}, path)


def fused(setting: str, seed: int, effects: np.ndarray, teachers=("llama", "qwen3")) -> dict:
    "A student of experiment 7 as `read_students` gives it."
    weights = [1 / len(teachers) for _ in teachers]
    routing = dict(weight=weights, teachers=list(teachers), by_kind={"+": weights, "-": weights}) if teachers else {}
    return dict(
        setting=setting,
        seed=seed,
        effects=effects,
        floor=4e-4,
        right=np.arange(len(effects)) % 5 > 0,
        top1=.8,
        teachers=list(teachers),
        closeness=dict(llama=.5, qwen3=.4),
        routing=routing,
    )


@pytest.fixture
def family() -> tuple[list[dict], dict]:
    "Students that copied LLaMA's effects, that have nothing to do with either teacher, and that mix both."
    rng = np.random.default_rng(0)
    llama, qwen3 = rng.normal(size=(2, 60, 2))
    teachers = {
        "llama": dict(effects=llama, floor=4e-4, columns=[0, 1], clusters=np.arange(60)),
        "qwen3": dict(effects=qwen3, floor=4e-4, columns=[2, 3], clusters=np.arange(60)),
    }
    students = []
    for seed in (1, 2):
        noise = rng.normal(size=(60, 4))
        students.append(fused("none", seed, rng.normal(size=(60, 4)), []))
        students.append(fused("single_llama", seed, np.concatenate([llama, noise[:, 2:]], 1), ["llama"]))
        students.append(fused("fixed", seed, np.concatenate([llama, qwen3], 1) + .1 * noise))
    return students, teachers


def test_whose_mechanism_is_found(family):
    students, teachers = family
    rows = EXP7.student_rows(students, teachers, {"fixed-1": {"arc": {"n": 4, "acc": .5}}})
    assert [r["setting"] for r in rows] == ["none", "single_llama", "fixed"]
    assert rows[1]["consistency"]["llama"] > .999 and abs(rows[0]["consistency"]["llama"]) < .4
    assert [r["bench"] for r in rows] == [None, None, .5] and rows[2]["weights"] == dict(llama=.5, qwen3=.5)
    tests = EXP7.teacher_tests(students, teachers, n=500)
    found = {(t.get("setting", t["a"]), t["metric"]): outcome(t) for t in tests}
    assert found["single_llama", "llama"] == found["single_llama", "lean"] == "higher"
    assert found["none", "lean"] == found["fixed", "lean"] == "same"
    assert len(EXP7.teacher_tests(students, {"llama": teachers["llama"]}, n=100)) == 2 * 2, "one teacher, no lean"


def test_effects_below_their_floor_are_constant(family):
    students, teachers = family
    faint = [fused("none", 1, 1e-5 * students[0]["effects"])]
    assert np.isnan(EXP7.consistency_of(teachers["llama"], faint))
    assert not np.isnan(EXP7.consistency_of(teachers["llama"], [{**faint[0], "floor": 1e-6}]))


def test_a_student_without_effects_has_no_consistency(family):
    students, teachers = family
    still = [fused("none", 1, np.zeros((60, 4)))]
    assert np.isnan(EXP7.consistency_of(teachers["llama"], still))
    assert outcome(holm([EXP7.lean_test(still, teachers, np.arange(60), 100)])[0]) == "untested"


def test_single_stands_for_every_teacher():
    assert EXP7.comparisons(["none", "single_llama", "single_qwen3", "fixed"]) == [
        ("single_llama", "none"),
        ("single_qwen3", "none"),
        ("fixed", "single_llama"),
        ("fixed", "single_qwen3"),
    ]


def test_students_of_another_cost_or_without_effects_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"fixed-1\.json is missing: run `dvc repro`"):
        EXP7.read_students(["fixed"], [1], tmp_path)
    for setting, steps in (("fixed", 1), ("none", 2)):
        budget = dict(steps=steps, tokens=2, flops=3.)
        write_json(tmp_path/"metrics"/"kv_fuse"/f"{setting}-1.json", dict(setting=setting, seed=1, budget=budget))
    with pytest.raises(FileNotFoundError, match=r"effects\.safetensors is missing: run `dvc repro`"):
        EXP7.read_students(["fixed"], [1], tmp_path)
    for setting in ("fixed", "none"):
        file = tmp_path/"artifacts"/"kv_fuse"/f"{setting}-1"/"effects.safetensors"
        save_effects(file, np.ones((3, 4)), right=np.array([1, -1, 1]))
    assert EXP7.read_students(["fixed"], [1], tmp_path)[0]["right"].tolist() == [True, False, True]
    with pytest.raises(ValueError, match="fixed and none cannot be compared: they have 1 and 2 steps"):
        EXP7.read_students(["fixed", "none"], [1], tmp_path)


def test_a_teacher_is_read_at_its_sites(tmp_path):
    plan = dict(roles=["first", "end"], sites=[[2, "end"], [0, "first"]], layer_map=[0, 0, 1])
    write_json(tmp_path/"metrics"/"kv_teachers"/"llama.json", plan)
    effects = np.arange(12.).reshape(2, 6)
    save_effects(tmp_path/"artifacts"/"kv_teachers"/"llama"/"effects.safetensors", effects, clusters=np.array([0, 1]))
    teacher = EXP7.read_teacher("llama", tmp_path)
    assert teacher["columns"] == [3, 0] and teacher["effects"].tolist() == [[5, 0], [11, 6]]
    assert teacher["floor"] == pytest.approx(4e-4), "a ten-thousandth of the difference of 4 logits"


@pytest.mark.parametrize("name, printed", [
    ("none", "no teacher"),
    ("single_llama", "LLaMA alone"),
    ("learnable", "learnable"),
    ("fixed_k", "fixed (k)"),
    ("govern_teacher", "gradient vote of three (by teacher)"),
])
def test_settings_have_names(name, printed): assert EXP7.setting_name(name) == printed


def test_teachers_have_names(): assert EXP7.teacher_name("llama_prompted") == "LLaMA (prompted)"


def test_routing_figure_shows_weights_and_consistencies(family):
    students, teachers = family
    rows = EXP7.student_rows(students, teachers, {})
    left, right = EXP7.routing_figure(rows, students, list(teachers)).axes
    assert len(left.patches) == 2 * 2, "one setting with two teachers, two operations"
    assert [t.get_text() for t in right.get_yticklabels()] == ["no teacher", "LLaMA alone", "fixed"]


def test_losses_are_shown_before_distillation():
    losses = metrics("kv/diagnosis")["losses"]
    left, right = page("kv_diagnose").losses_figure(losses).axes
    assert [t.get_text() for t in left.get_yticklabels()] == [r["part"] for r in losses]
    assert [bar.get_width() for bar in right.patches] == [100 * r["share"] for r in losses]


def test_only_keys_have_an_attention():
    keys, values = [r for r in metrics("kv/diagnosis")["profile"] if r["aligner"] == "flat"]
    line = page("kv_diagnose").profile_line
    assert f"KL {keys['kl']:.3f}" in line(keys)
    assert "KL" not in line(values) and line(values).endswith(f"cosine {values['cosine']:.3f}")


# sentences: one case an outcome

def planted(metric: str, diff: float | None, p: float | None, a: str = "kava", b: str = "latent_sft", **more) -> dict:
    "A test with this result."
    ci = [None, None] if diff is None else [diff - .1, diff + .1]
    detectable = None if diff is None else .14
    return dict(a=a, b=b, metric=metric, diff=diff, ci=ci, p=p, p_holm=p, detectable=detectable) | more


RESULTS = {"higher": (.4, .001), "lower": (-.4, .02), "same": (.01, .6), "untested": (None, None)}
DIFFERENCES = {
    "higher": "is higher (difference 0.40 [0.30, 0.50], $p = 0.001$)",
    "lower": "is lower (difference $-0.40$ [$-0.50$, $-0.30$], $p = 0.020$)",
    "same": "differs is not resolved (difference 0.01 [$-0.09$, 0.11], $p = 0.60$; a difference of 0.14 would have been"
    " seen)",
    "untested": "could not be compared",
}


def row6(method: str = "kava", **more) -> dict:
    row = dict(method=method, accuracy=.5, consistency=.5, consistency_ci=[.3, .7], null=[-.2, .2], nan=0, grad_norm=2.)
    return row | more


def health(collapsed: str) -> dict:
    before = dict(size=1., rank=10., collapsed="")
    return {
        "frozen": dict(before=before, after=before, loss=.1),
        "trainable": dict(before=before, after=dict(size=.13, rank=9., collapsed=collapsed), loss=.0025),
    }


def against_6(kind: str) -> list[dict]:
    diff, p = RESULTS[kind]
    return [planted("accuracy", diff, p), planted("consistency", diff, p)]


def mechanism(kind: str | None, *rows: dict) -> str:
    return EXP6.mechanism_sentence(list(rows), against_6(kind) if kind else [])


MECHANISM = {
    "higher": "it is higher than with cross-entropy only for KaVa.",
    "lower": "it is lower than with cross-entropy only for KaVa.",
    "same": "it is not detectably different from cross-entropy only for KaVa.",
    "untested": "it is not comparable with cross-entropy only for KaVa.",
}
ABOVE = "Consistency lies above the shuffled-pair null for"
GONE = "A projector that was trained together with the student was"
KEPT = "its targets kept 13\\% of their size and 90\\% of their effective rank, while the distance fell to 0.0025 (0.1"
HIDDEN = row6(consistency_ci=[.1, .7])
UNDEFINED = row6(consistency=None)
STUDENT = dict(accuracy=.96)


BEFORE = "Before distillation the same student solves 85.0\\% of them after the same places"


def worth(verdict: str, diff: float = .31, **more) -> str:
    "The first line of the section for a test with this verdict."
    rows = [row6("no_places", accuracy=.254), row6("kava", accuracy=.254 + diff)]
    test = planted("accuracy", diff, .001, b="no_places", bound=.05, verdict=verdict, **more)
    return EXP6.worth_sentence(test, rows, .96)


def added(verdict: str, diff: float = .1) -> str:
    "What training adds, for a test with this verdict."
    test = planted("accuracy", diff, .001, b="undistilled", bound=.05, verdict=verdict)
    return EXP6.added_sentence(test, [row6("undistilled", accuracy=.85), row6("kava")])


def needed(*results: tuple[str, float], drop: str = "differs") -> str:
    "The sentence on ablations with these verdicts and differences to no places, and a drop of this verdict."
    shares = {how: dict(right=.3) for how in EXP6.ABLATIONS} | {"none": dict(right=.6)}
    shares["other"]["other"] = .5
    tests = [
        planted("accuracy", diff, .001, how=how, verdict=verdict, drop=dict(verdict=drop, diff=-.3), bound=.05)
        | dict(ci90=[diff - .04, diff + .04])
        for how, (verdict, diff) in zip(EXP6.ABLATIONS, results)
    ]
    return EXP6.ablation_sentence(tests, [row6(ablations=shares)])


def cases_of_places() -> list[tuple]:
    "What the places buy, whether training levelled off, whether the answer needs them."
    def solved(places):
        return ("Without places the students solve 25.4\\% of the test problems, with places"
            f" {places}\\% (KaVa, chosen on validation problems), in words 96.0\\%:")
    left = "30.0\\% (hidden), 30.0\\% (zeroed), 30.0\\% (their mean) and 30.0\\% (another problem's)"
    equal, lower, higher = ("equal within the bound", 0.), ("differs", -.1), ("differs", .1)
    flat = [dict(method="latent_sft", curve=[[0, .1], [75, .5], [100, last]]) for last in (.504, .55)]
    return [
        (worth("differs"), f"{solved('56.4')} the places buy 0.31 [0.21, 0.41] of exact match ($p = 0.001$)."),
        (worth("differs", .11), f"{solved('36.4')} the places buy 0.11 [0.01, 0.21] of exact match ($p = 0.001$), less"
         " than the 20 points that we asked for."),
        (worth("differs", -.11), f"{solved('14.4')} the places buy nothing, they cost ($-0.11$ [$-0.21$, $-0.01$],"
         " $p = 0.001$)."),
        (worth("equal within the bound", .01), f"{solved('26.4')} the places buy nothing, both are equal within 0.05"
         " (0.01 [$-0.09$, 0.11])."),
        (worth("not resolved", .01), f"{solved('26.4')} whether the places buy anything is not resolved (0.01 [$-0.09$,"
         " 0.11]; a difference of 0.14 would have been seen)."),
        (worth("not resolved", .01, detectable=None), f"{solved('26.4')} whether the places buy anything is not"
         " resolved (0.01 [$-0.09$, 0.11]; which difference would have been seen is unknown)."),
        (added("differs"), f"{BEFORE}; training adds 0.10 [0.00, 0.20] ($p = 0.001$)."),
        (added("differs", -.1), f"{BEFORE}; training takes away ($-0.10$ [$-0.20$, 0.00], $p = 0.001$)."),
        (added("equal within the bound", 0.), f"{BEFORE}: what the places buy comes from reasoning in words, and"
         " training adds nothing beyond 0.05 (0.00 [$-0.10$, 0.10])."),
        (added("not resolved", 0.), f"{BEFORE}; whether training adds to that is not resolved (0.00 [$-0.10$, 0.10]; a"
         " difference of 0.14 would have been seen)."),
        (EXP6.added_sentence(None, []), "What training adds to the places was not measured."),
        (EXP6.worth_sentence(None, [], .9), "This run does not say what the places buy."),
        (EXP6.levelled_sentence(flat[:1]), "Cross-entropy with places has levelled off (it gains 0.4 points in the last"
         " quarter of training)."),
        (EXP6.levelled_sentence(flat[1:]), "Cross-entropy with places has not levelled off (it gains 5.0 points in the"
         " last quarter of training)."),
        (EXP6.levelled_sentence([]), "Whether cross-entropy with places has levelled off was not measured."),
        (needed(equal, lower, lower, equal), "The answer needs its places: with those of KaVa ablated at test time,"
         f" exact match falls from 60.0\\% to {left}, not above students that never had places (by less than 0.05,"
         " one-sided); given another problem's places, the student gives that problem's answer in 50.0\\% of the"
         " cases."),
        (needed(*[equal] * 4, drop="not resolved"), "The places are decoration as far as can be seen: with those of"
         f" KaVa ablated at test time, exact match goes from 60.0\\% to {left}, which is no detectable drop; given"
         " another problem's places, the student gives that problem's answer in 50.0\\% of the cases."),
        (needed(equal, higher, ("not resolved", .03), lower), "With the places of KaVa ablated at test time, exact"
         f" match goes from 60.0\\% to {left}; in two of four ablations it drops to that of students that never had"
         " places, or below (above by less than 0.05, one-sided). Given another problem's places, the student gives"
         " that problem's answer in 50.0\\% of the cases."),
        (EXP6.ablation_sentence([], []), "Whether the answer needs its places was not measured."),
        (EXP6.rounds_sentence(row6(rounds=[[0, .1], [2, .5]])), "By the number of Jacobi rounds at test time, KaVa"
         " solves 10.0\\% with 0 and 50.0\\% with 2 of the test problems."),
        (EXP6.rest_sentence([]), "Random head mixing, a map per head, other losses, other evictions, KL at the answer"
         " and pause tokens are compared at a larger scale only."),
        (EXP6.compared_sentence([("kava", "kava_crop"), ("kava", "latent_sft")], against_6("untested")), "For KaVa"
         " against cross-entropy only, exact match after latent places could not be compared and consistency could not"
         " be compared."),
        (EXP6.rounds_sentence(None), "What more rounds would buy was not measured."),
        (EXP6.sentence("exp6", "exp6.thought", "hidden"), "A place's input is the final hidden state of the place"
         " before it (after the final norm)"),
        (EXP6.sentence("exp6", "exp6.thought", "soft"), "A place's input is the mean of all words' embeddings, weighted"
         " by how likely the place before it finds each word"),
        (EXP6.difference_phrase(planted("accuracy", *RESULTS["same"], verdict="equal within the bound", bound=.05)),
         "exact match after latent places is equal within 0.05 (difference 0.01 [$-0.09$, 0.11])"),
    ]


def within(ways=(.5, 1.), later=(2, 4), apart=((0, 0), (0, 0)), undefined=None) -> str:
    "What is said of the places with these intervals of both ways' difference and of the distance of the steps."
    steps = [
        dict(kind=f"step {s + 1}", place=float(3 * s), ci=[3. * s, 3. * s], teacher=3. * s, apart=list(ci))
        for s, ci in enumerate(apart)
    ]
    shares = dict(places=.9, places_ci=[.8, 1.], question=.1, question_ci=[0., .2], diff=.8, ci=list(ways))
    test = dict(method="kava", places=8, pairs=9, undefined=undefined or {}, steps=steps)
    return EXP6.inside_sentence(test | dict(later=dict(diff=3., ci=list(later)), ways=shares))


def cases_of_inside() -> list[tuple]:
    "Which place carries which step."
    none = (None, None)
    head = "Inside the places of KaVa: "
    through = (f"{head}the number of the first step acts on the answer through them (the other problem's places carry"
        " 0.90 [0.80, 1.00] of its effect) rather than from the question past them (0.10 [0.00, 0.20]).")
    carried = "the first is carried by place 1 of 8, the last by place 4"
    later = f"The steps stand one after the other: {carried} ([2, 4] places later)."
    same = "Each is carried where the teacher's word of that step stands (1 and 4)."
    return [
        (within(), f"{through} {later} {same}"),
        (within((-1., -.5)), f"{head}the number of the first step acts on the answer from the question past them (0.10"
         " [0.00, 0.20] of its effect) rather than through them (the other problem's places carry 0.90 [0.80, 1.00])."
         f" {later} {same}"),
        (within((-1., .5)), f"{head}whether the number of the first step acts on the answer through them (the other"
         " problem's places carry 0.90 [0.80, 1.00] of its effect) or from the question past them (0.10 [0.00, 0.20])"
         f" is not resolved. {later} {same}"),
        (within(none), f"{head}by which way the number of the first step acts on the answer is undefined. {later}"
         f" {same}"),
        (within(later=(-4, -2)), f"{through} The steps stand in another order: {carried} ([$-4$, $-2$] places later)."
         f" {same}"),
        (within(later=(-4, 2)), f"{through} Whether the steps stand one after the other is not resolved: {carried}"
         f" ([$-4$, 2] places later). {same}"),
        (within(later=none), f"{through} No single place carries half of the effect of every step, so that no order is"
         f" defined. {same}"),
        (within(apart=((0, 0), (1, 2))), f"{through} {later} The teacher's words of the steps stand elsewhere (1 and 4)"
         " for step 2."),
        (within(apart=((0, 0), (-1, 0))), f"{through} {later} Whether that is where the teacher's words of the steps"
         " stand (1 and 4) is not resolved."),
        (within(apart=((0, 0), none)), f"{through} {later} With the teacher's words it cannot be compared."),
        (within(apart=((0, 0),)), f"{through} No single place carries half of the effect of every step, so that no"
         " order is defined. Each is carried where the teacher's word of that step stands (1)."),
        (within(undefined={"step 1": "no gap"}), "What is in the places of KaVa is undefined: to change the number of a"
         " step does not change its answer enough."),
        (EXP6.inside_sentence(None), "What is in the places was not measured."),
    ]


def cases_of_exp6() -> list[tuple]:
    "(sentence, what it has to say), at least one a template of exp6.yaml."
    cases = []
    for kind, phrase in DIFFERENCES.items():
        first = "whether " if kind == "same" else ""
        said = f"{first}exact match after latent places {phrase} and {first}consistency {phrase}."
        said = f"For KaVa against cross-entropy only, {said}"
        cases.append((EXP6.against_sentence("kava", "latent_sft", against_6(kind)), said))
        cases.append((mechanism(kind, row6()), f"{ABOVE} one of one students distilled through keys and values;"
                      f" {MECHANISM[kind]}"))
    two = [planted("consistency", *RESULTS["higher"], a="kv_mse"), planted("consistency", *RESULTS["same"])]
    losses = [
        dict(part="kv_k", share=.4, weight=1.),
        dict(part="kv_v_plain", share=.9, weight=0),
        dict(part="codi", share=.3, weight=10.),
        dict(part="answer", share=.3, weight=1.),
    ]
    shape = dict(layers=6, heads=4, kv_heads=2, head_dim=32)
    rows = [row6(accuracy=.095), row6("kv_mse", accuracy=.168), row6("undistilled", accuracy=.99)]
    worked = "and the student before distillation 96.0\\%; after latent places the distilled students solve between"
    return cases + cases_of_places() + cases_of_inside() + [
        (EXP6.against_sentence("kv_mse", "kava", []), "This run does not compare squared error with KaVa."),
        (mechanism(None, UNDEFINED),
            "Consistency is defined for no student that was distilled through keys and values."),
        (mechanism(None, row6(), HIDDEN, row6("latent_kd")), f"{ABOVE} one of two students distilled through keys and"
         " values; this run does not compare them with cross-entropy only."),
        (mechanism("same", HIDDEN), f"{ABOVE} none of one students distilled through keys and values;"
         f" {MECHANISM['same']}"),
        (EXP6.mechanism_against(two), "higher than with cross-entropy only for squared error, and not detectably"
         " different from cross-entropy only for KaVa"),
        (EXP6.competence_sentence(dict(accuracy=.98), STUDENT, rows), f"In words the teacher solves 98.0\\% of the test"
         f" problems {worked} 9.5\\% (KaVa) and 16.8\\% (squared error)."),
        (EXP6.competence_sentence(dict(accuracy=.8), STUDENT, rows), f"In words the teacher solves 80.0\\% of the test"
         f" problems, which is below the 90\\% that we asked for, {worked} 9.5\\% (KaVa) and 16.8\\% (squared error)."),
        (EXP6.stability_sentence([row6(), row6("kv_mse", grad_norm=6.94)]), "No run met a loss that was not finite. The"
         " largest gradient norm before clipping was 6.9 (squared error)."),
        (EXP6.stability_sentence([row6(nan=2, grad_norm=None), row6("kv_mse", nan=1, grad_norm=None)]),
            "Training stopped"
         " at a loss that was not finite for KaVa and squared error."),
        (EXP6.trivial_sentence(health("size")), f"{GONE} reported as collapsed: {KEPT} with the frozen one)."),
        (EXP6.trivial_sentence(health("")), f"{GONE} not reported as collapsed: {KEPT} with the frozen one)."),
        (EXP6.scale_sentence(losses),
            "Before training the keys and values (with attention) make up 40\\% of a loss that"
         " holds all parts, CODI 30\\%, the CKA term -- and the cross-entropies 30\\%."),
        (EXP6.shape_phrase(shape), "six layers, 4 query and 2 key-value heads of dimension 32"),
        (EXP6.seeds_phrase([42]), "one seed"),
        (EXP6.seeds_phrase([42, 123]), "two seeds"),
        (EXP6.sites_phrase([[0, "end"], [2, "number"]]), "layer 0 end and layer 2 number"),
    ]


def compared(*kinds: str, what: str = "accuracy") -> str:
    "The sentence on comparisons of these outcomes, `fixed` against `none` first and `learnable` against it then."
    tests = [planted(what, *RESULTS[kind], a=a, b="none") for kind, a in zip(kinds, ("fixed", "learnable"))]
    return EXP7.compared_sentence(what, tests)


def leans(**settings: str) -> str:
    "The sentence on settings with these outcomes."
    tests = [planted("lean", *RESULTS[k], a="llama", b="qwen3", setting=s) for s, k in settings.items()]
    return EXP7.lean_sentence(tests)


def spread(p: float, *differences: float) -> str:
    names = ("fixed", "learnable", "similarity")
    tests = [planted("accuracy", d, p + .1 * (a == "fixed"), a=a, b="none") for d, a in zip(differences, names)]
    return EXP7.compared_sentence("accuracy", tests)


def cases_of_exp7() -> list[tuple]:
    "(sentence, what it has to say), at least one a template of exp7.yaml."
    none = "did not differ detectably between fixed and no teacher"
    two = f"Accuracy {none} or between learnable and no teacher"
    wins = [planted("accuracy", *RESULTS[k], a=a, b="none") for k, a in (("higher", "fixed"), ("same", "learnable"))]
    word = sentences.word
    return [
        (compared("higher", "lower"),
            "Accuracy was higher with fixed than with no teacher (difference 0.40 [0.30, 0.50],"
         " Holm-corrected $p = 0.001$); it was lower with learnable than with no teacher (difference $-0.40$ [$-0.50$,"
         " $-0.30$], Holm-corrected $p = 0.020$)."),
        (compared("same", "untested"),
            f"Accuracy {none} (difference 0.01 [$-0.09$, 0.11], Holm-corrected $p = 0.60$); it"
         " could not be compared (too few observations) between learnable and no teacher."),
        (spread(.348, .011, .012), f"{two} (difference 0.01 each, all Holm-corrected $p \\ge 0.34$)."),
        (spread(.348, .01, -.02), f"{two} (differences from $-0.02$ to 0.01, all Holm-corrected $p \\ge 0.34$)."),
        (compared(), "Accuracy was not compared: this run lacks one of the settings."),
        (EXP7.compared_sentence(word("exp7", "time"), []), "With segments rather than the same index, accuracy was not"
         " compared: this run lacks one of the settings."),
        (EXP7.compared_sentence(word("exp7", "layers"), []),
            "With CKA rather than proportional layers, accuracy was not"
         " compared: this run lacks one of the settings."),
        (word("exp7", "accuracy"), "accuracy"),
        (word("exp7", "mechanism", teacher="LLaMA"), "causal consistency with LLaMA"),
        (leans(), "Whose mechanism a student took was not tested: there is one teacher."),
        (leans(none="same", fixed="same"),
            "In none of the 2 settings did the students lean to one teacher detectably."),
        (leans(none="untested", single_llama="higher", fixed="lower", learnable="higher", govern="same"),
         "The students of LLaMA alone and learnable were more consistent with LLaMA than with Qwen3; the students of"
         " fixed were more consistent with Qwen3 than with LLaMA; the students of gradient vote of three leaned to"
         " neither teacher detectably; the students of no teacher could not be tested."),
        (EXP7.verdict_sentence(wins), "On accuracy, fixed beat no teacher."),
        (EXP7.verdict_sentence(wins[1:]), "No fusion beat what it was compared with on accuracy."),
    ]


@pytest.mark.parametrize("name, cases", [("exp6", cases_of_exp6), ("exp7", cases_of_exp7)])
def test_every_template_is_said_word_for_word(name, cases, monkeypatch):
    "Each sentence in each of its outcomes, and no template that nothing asks for."
    said = set()
    fill = sentences.fill_template
    def noted(template, values, where):
        said.add(where)
        return fill(template, values, where)
    monkeypatch.setattr(sentences, "fill_template", noted)
    for text, wanted in cases(): assert text == wanted
    written = {f"{name}.yaml, {key}, {kind}" for key, kinds in sentences.templates(name).items() for kind in kinds}
    assert said == written


def test_committed_sentences_are_said_of_the_committed_numbers():
    needs_results_of("exp6", "exp7")
    record = metrics("exp6")
    values = record["values"]
    for key, pairs in EXP6.COMPARISONS.items():
        assert values[f"claim.{key}"] == EXP6.compared_sentence(pairs, record["tests"])
    assert values["claim.exp6.rest"] == EXP6.rest_sentence(record["tests"])
    teacher, student, diagnosis = metrics("kv/teacher"), metrics("kv/student"), metrics("kv/diagnosis")
    assert values["claim.exp6.competence"] == EXP6.competence_sentence(teacher, student, record["rows"])
    assert values["claim.exp6.stability"] == EXP6.stability_sentence(record["rows"])
    assert values["claim.exp6.mechanism"] == EXP6.mechanism_sentence(record["rows"], record["tests"])
    assert values["claim.exp6.trivial"] == EXP6.trivial_sentence(diagnosis["health"])
    assert values["claim.exp6.scale"] == EXP6.scale_sentence(diagnosis["losses"])
    record = metrics("exp7")
    pairs = EXP7.comparisons([r["setting"] for r in record["rows"]])
    accuracy = EXP7.tests_of(record["tests"], EXP7.of_fusions(pairs), "accuracy")
    assert record["values"]["claim.several.fusions"] == EXP7.compared_sentence("accuracy", accuracy)
    assert record["values"]["claim.several.lean"] == EXP7.lean_sentence(record["tests"])
