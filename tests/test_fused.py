"""Planted teachers and one student: competence, targets on pairs, whose route, and every sentence in each outcome."""

import numpy as np
import pytest
import torch
from conftest import page
from pydantic import ValidationError
from rcid.core import load_params
from rcid.core.fused_params import Fused
from rcid.data.reasoning import Problem, ReasoningDataset
from rcid.eval.shares import answered, check_competent, early_share, nearer, route_share
from rcid.kv.fusion_targets import FusionTargets
from rcid.kv.pair_fusion import PairFusion, PairFusionObjective, tokens_at
from rcid.report import sentences

EXP7 = page("exp7")


def refused(kind, words, f, *args, **kw):
    "The error that `f` must raise, in one line."
    with pytest.raises(kind, match=words) as e: f(*args, **kw)
    assert "\n" not in str(e.value)


# what is refused

def test_a_teacher_below_the_gate_is_refused_with_its_accuracy():
    check_competent(dict(first=.95, second=.9), .9)
    refused(ValueError, r"teacher second is right on 0\.52 of the prompts, below the gate of 0\.9: train it longer",
        check_competent, dict(first=.95, second=.5234), .9)
    refused(ValueError, "teacher first is right on nan", check_competent, dict(first=float("nan")), .5)


def test_other_pairs_are_refused():
    def one(prompt: str) -> ReasoningDataset:
        ids, segments = torch.zeros(1, 3, dtype=torch.long), torch.tensor([[0, 1, 2, 3]])
        return ReasoningDataset(ids, torch.ones_like(ids), segments, torch.tensor([1]), (Problem(prompt, "", "x"),))
    refused(ValueError, "pair 0 is 'Mary' for the student and 'John' for the teacher: give the same pairs",
        tokens_at, one("Mary"), one("John"), (None, None))


def test_answers_of_no_teacher_are_refused(monkeypatch):
    def start(self, method, student, targets, c): self.plan = None
    monkeypatch.setattr("rcid.kv.multi_teacher.FusionObjective.__init__", start)
    nobody = FusionTargets(None, {}, torch.zeros(1, 1), {})
    refused(ValueError, "answers=teachers, but there is no teacher",
        PairFusionObjective, PairFusion(answers="teachers"), None, nobody, None)


@pytest.mark.parametrize("change, words", [
    (dict(weights=[.25, .5]), "lack 0 or 1"),
    (dict(weights=[0, 1, 1.5]), "are shares: 0 to 1"),
    (dict(first=[0, 4, 1]), "first has layers"),
    (dict(live=[1, 1, 3]), "live has layers"),
    (dict(cases=["early"]), "first_early"),
])
def test_params_that_test_nothing_are_refused(change, words):
    with pytest.raises(ValidationError, match=words): Fused(**load_params().fused.model_dump() | change)


# shares, worked by hand

def test_shares_by_hand():
    assert route_share(.1, .3) == pytest.approx(.75)
    assert np.isnan(route_share(0, 0)) and np.isnan(route_share(np.nan, 1))
    # lost .2 and .8 in the first half, .5 and nothing in the second; below 0 counts as all, above 1 as nothing
    assert early_share([.8, .2, .5, 1.2]) == pytest.approx(1 / 1.5) and early_share([1, 1, -.4, 1]) == 0
    assert np.isnan(early_share([1, 1, 1, 1]))
    refused(ValueError, r"\(2,\) and \(3,\) runs", nearer, [1, 2], [1, 2, 3], .1)


def record(case: str, share: float, early: float, weights=(0, .5, 1), **more) -> dict:
    "A run as the stage writes it: the first teacher's share is its weight times `share`."
    rows = []
    for w in weights:
        s = w * share
        rows.append(dict(setting=f"fixed_{w:g}", accuracy=.9, share=s, early=early, to=dict(first=1 - s, second=s),
            weights=dict(first=dict(errs=w, rest=w))))
    return dict(case=case, run=0, rows=rows) | more


def test_knock_out_counts_the_half_of_the_first_teacher():
    assert EXP7.share_of(record("first_early", 1, .9), "fixed_1", "early") == .9
    assert EXP7.share_of(record("second_early", 1, .9), "fixed_1", "early") == pytest.approx(.1)


def test_a_student_of_one_teacher_alone_is_asked_for_both():
    runs = [record("first_early", s, .5) for s in (.9, .95, 1.)]
    first, second = (EXP7.nearer_test(runs, name, .1) for name in ("first", "second"))
    # alone, the first has distances 1 - s and s; the second 0 and 1
    assert first["difference"] == pytest.approx(.9) and second["difference"] == pytest.approx(1)
    assert first["outcome"] == "differs" and EXP7.nearer_test([], "first", .1) is None
    slope = EXP7.slope_test(runs, [0, .5, 1], .1)
    assert slope["difference"] == pytest.approx(.95) and EXP7.slope_test([], [0, 1], .1) is None


def erring(less: float, right: float) -> dict:
    on = dict(fixed=.5, learnable=right, oracle=.9)
    rows = []
    for name, accuracy in on.items():
        weights = dict(erring=dict(errs=.3 - less * (name == "learnable"), rest=.3))
        rows.append(dict(setting=name, on=dict(errs=accuracy, rest=1.), weights=weights))
    return dict(case="wrong", run=0, rows=rows)


def test_an_erring_teacher_is_found_and_pays():
    runs = [erring(x, y) for x, y in ((.2, .8), (.25, .7), (.3, .9))]
    assert EXP7.finds_test(runs, "learnable", .1)["difference"] == pytest.approx(.25)
    assert EXP7.pays_test(runs, "learnable", .05)["difference"] == pytest.approx(.3)
    assert EXP7.finds_test([], "learnable", .1) is None and EXP7.pays_test([], "learnable", .1) is None
    table = EXP7.erring_table(EXP7.erring_rows(runs))
    assert r"learnable & 0.80 & 1.00 & 0.05 & 0.30 \\" in table and EXP7.erring_rows([]) == []


def test_rows_and_figure_of_two_routes():
    found = {case: [record(case, s, .9) for s in (.8, 1.)] for case in ("first_early", "second_early")}
    rows = EXP7.fused_rows(found)
    table = EXP7.fused_table(rows)
    assert r"fixed, 1.00 & 0.90 & 0.90 & 0.90 & 0.50 & 1.00 \\" in table and EXP7.fused_rows({}) == []
    axes = EXP7.fused_figure(found, [0, .5, 1]).axes
    assert len(axes[0].get_lines()) == 1 + 2 * (2 + 1)


# sentences

VERDICTS = {
    "yes": ([.3, .32, .28, .31], "0.30"),
    "no": ([.001, -.001, .002, -.002], "0.00"),
    "unresolved": ([.5, -.4, .3, -.2], "0.05"),
}


def test_of(kind: str | None, **more) -> dict | None:
    from rcid.eval.power import verdict
    return None if kind is None else verdict(VERDICTS[kind][0], .1).to_dict() | more


test_of.__test__ = False


@pytest.mark.parametrize("kind", [*VERDICTS, None])
def test_each_outcome_is_said(kind):
    test = test_of(kind, setting="learnable")
    said = [EXP7.nearer_sentence(test, name) for name in ("first", "second")]
    said += [EXP7.said_of("fused.slope", test), EXP7.each_sentence("fused.finds", [test])]
    said.append(EXP7.each_sentence("fused.pays", [test]))
    for text in said:
        if kind is None: assert "in this run" in text
        else: assert VERDICTS[kind][1] in text
        assert ("would have been seen" in text) == (kind == "unresolved")
        assert ("not" in text.split()) == (kind != "yes")


def test_a_verdict_of_the_other_sign_is_no():
    from rcid.eval.power import verdict
    v = verdict([-.3, -.32, -.28], .1)
    assert answered(v.outcome, v.difference) == "no"


def test_no_template_of_fused_is_left_over(monkeypatch):
    asked, fill = set(), sentences.fill_template
    def noted(template, values, where):
        asked.add(where)
        return fill(template, values, where)
    monkeypatch.setattr(sentences, "fill_template", noted)
    for kind in (*VERDICTS, None): test_each_outcome_is_said(kind)
    row = dict(setting="govern", first_early=.7, second_early=.6)
    assert "gradient vote of three 0.70 and 0.60" in EXP7.routed_sentence([row], ["govern"])
    lost = EXP7.routed_sentence([row | dict(first_early=None)], ["govern"])
    assert "gradient vote of three undefined" in lost and "--" not in lost
    EXP7.routed_sentence([row], [])
    words = EXP7.words_sentence([dict(setting="gold", first_early=.5, second_early=.4)], ["gold", "uld"])
    assert words.endswith("words alone (GOLD) 0.50 and 0.40.")
    EXP7.words_sentence([row], [])
    written = {f"fused.yaml, {key}, {kind}" for key, of in sentences.templates("fused").items() for kind in of}
    assert asked == written
