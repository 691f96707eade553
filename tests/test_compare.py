"""The whole comparison on models whose routes are known, with one tokenizer and with two, and what is refused."""
import copy, json
from dataclasses import replace
from itertools import islice
import numpy as np
import pytest
import torch
from rcid.core.tensors import content_hash
from rcid.data.ioi import ioi_rows
from rcid.data.pairs import build_pairs
from rcid.data.splits import load_kinds, load_pairs
from rcid.eval.behaviour import behaviour
from rcid.eval.compare import compare, layers_at, sites_by
from rcid.eval.handmade import counting_model
from rcid.eval.matched import by_kind, matched_pairs, name_halves
from rcid.eval.route_figure import two_routes
from rcid.models import get_adapter, shrink

QUICK = dict(n_boot=100)


def refused(words, f, *args, **kw):
    with pytest.raises(ValueError, match=words) as e: f(*args, **kw)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


@pytest.fixture(scope="module")
def tokenizer(tokenizers): return tokenizers["llama"]


@pytest.fixture(scope="module")
def kinds(tokenizer):
    "Train and test pairs of two kinds; the second kind has fewer rows."
    def some(split):
        both = load_kinds("ioi", tokenizer, ["s2", "s2_new"], split=split, n=48)
        return {"s2": both["s2"], "s2_new": both["s2_new"][:24]}
    return {split: some(split) for split in ("train", "test")}


@pytest.fixture(scope="module")
def made(tokenizer):
    def make(live, seed=0, **kw): return counting_model(tokenizer, live, seed=seed, **{"layers": 6} | kw)
    return make


@pytest.fixture(scope="module")
def teacher(made): return made({3: .6, 4: .4})


@pytest.fixture(scope="module")
def same(teacher, made, kinds):
    return compare(teacher, made({3: .6, 4: .4}, seed=1), kinds["test"], train=kinds["train"], **QUICK)


@pytest.fixture(scope="module")
def moved(teacher, made, kinds):
    return compare(teacher, made({1: .6, 2: .4}, seed=1), kinds["test"], train=kinds["train"], **QUICK)


def says(c, words): return any(words in w for w in c.warnings)


# what it sees

def test_the_same_route_in_another_model(same):
    assert same.route.distance < .1 and same.verdicts["distance"].outcome != "differs"
    assert same.fingerprint.similarity > .95 and same.interchange.agreement > .5
    assert abs(same.pairwise.r) < .5                        # shares vary from name to name, in each in its own way
    assert same.behaviour.gap_r > .99 and same.behaviour.accuracy == (1, 1)
    assert set(same.sites) <= {(3, "s2"), (3, "end")} and same.sites and same.student_sites == same.sites


def test_another_route_with_the_same_answers(same, moved):
    assert moved.route.distance > .3 > moved.route_warped.distance and moved.verdicts["distance"].outcome == "differs"
    assert moved.route_warped.shift == pytest.approx(-1 / 3, abs=.07)
    assert moved.fingerprint.raw < same.fingerprint.raw - .2
    assert moved.behaviour.gap_r > .99 and moved.behaviour.kl < 1e-3
    # the first definition reads behaviour, which is the same
    assert moved.original.consistency > .95 and moved.original_share > .7 and says(moved, "saturated")


def test_itself(teacher, kinds):
    c = compare(teacher, teacher, kinds["test"], train=kinds["train"], **QUICK)
    assert c.route.distance == c.route_warped.distance == 0 and c.behaviour.kl == 0
    assert c.interchange.agreement == c.interchange.raw == 1
    assert c.pairwise.r > .999 and c.original.consistency > .999
    assert c.verdicts["accuracy"].outcome == "equal within the bound"


def test_louder_logits_change_the_confidence_only(teacher, made, kinds, same):
    loud = made({3: .6, 4: .4}, seed=1)
    with torch.no_grad(): get_adapter(loud).lm_head.weight *= 3
    c = compare(teacher, loud, kinds["test"], train=kinds["train"], **QUICK)
    assert c.route.distance == pytest.approx(same.route.distance, abs=1e-4)
    assert c.route.interval == pytest.approx(same.route.interval, abs=1e-4)
    assert c.route_warped.distance == pytest.approx(same.route_warped.distance, abs=1e-4)
    assert c.fingerprint.similarity == pytest.approx(same.fingerprint.similarity, abs=1e-4)
    assert c.pairwise.r == pytest.approx(same.pairwise.r, abs=1e-2)
    assert c.original.consistency == pytest.approx(same.original.consistency, abs=1e-4)
    a, b = c.interchange.to_dict(), same.interchange.to_dict()
    assert a.pop("confidence")[1] > b.pop("confidence")[1] and a == b


def test_a_pruned_student_stands_where_it_was_cut_out(made, kinds):
    teacher = made({3: .6, 4: .4}, layers=8)
    student = shrink(teacher, [0, 3, 4, 7])
    fixed = compare(teacher, student, kinds["test"], train=kinds["train"], keep=[0, 3, 4, 7], **QUICK)
    assert fixed.route.distance < 1e-4 and fixed.pairwise.r > .99 and fixed.interchange.agreement == 1
    assert fixed.student_depth.tolist() == [1 / 8, 4 / 8, 5 / 8, 1]
    plain = compare(teacher, student, kinds["test"], train=kinds["train"], **QUICK)
    assert plain.route.distance > fixed.route.distance + .02


# what it says

def test_prints_short_lines(same, moved):
    for c in (same, moved):
        lines = str(c).splitlines()
        assert repr(c) == str(c) and 8 < len(lines) < 25 and max(map(len, lines)) < 160
    assert "first definition" in str(moved) and "earlier by 0.3" in str(moved)


def test_to_dict_is_plain(moved):
    d = moved.to_dict()
    again = json.loads(json.dumps(d))
    assert again["route"]["distance"] == moved.route.distance and again["sites"] == [list(s) for s in moved.sites]
    assert again["verdicts"]["distance"]["outcome"] == "differs" and again["warnings"] == moved.warnings


def test_warnings(teacher, made, kinds, same):
    assert says(same, "is not given (validated=)") and not says(same, "no train pairs")
    few = compare(teacher, teacher, kinds["test"]["s2"][:20], train=kinds["train"]["s2"], **QUICK)
    assert says(few, "20 pairs with")
    marked = dict(route=True, route_warped=True, fingerprint=False, pairwise=True, interchange=True)
    some = compare(teacher, teacher, kinds["test"]["s2"], train=kinds["train"]["s2"], validated=marked, **QUICK)
    assert says(some, "not to be used for a claim: fingerprint, original") and not says(some, "validated=")
    careless = copy.deepcopy(teacher)
    with torch.no_grad(): get_adapter(careless).lm_head.weight *= -1
    wrong = compare(careless, careless, kinds["test"]["s2"], train=kinds["train"]["s2"], **QUICK)
    assert says(wrong, "the teacher is right on 0%")


def test_no_mediating_site_leaves_the_route(made, kinds):
    "All in one layer: every site holds all or nothing."
    c = compare(made({3: 1.}), made({1: 1.}), kinds["test"], train=kinds["train"], **QUICK)
    assert c.sites == [] and c.pairwise is None and c.interchange is None and says(c, "no mediating site")
    assert c.route.distance > .3 and "partial r" not in str(c) and c.to_dict()["pairwise"] is None


def test_a_negative_gap_is_refused_in_words(teacher, kinds):
    "The curve of the student is a textbook; its gap has the other sign."
    student = copy.deepcopy(teacher)
    with torch.no_grad(): get_adapter(student).lm_head.weight *= -1
    c = compare(teacher, student, kinds["test"], train=kinds["train"], **QUICK)
    assert np.isnan(c.route.distance) and np.isnan(c.fingerprint.similarity) and c.pairwise is None
    assert c.verdicts["distance"].outcome == "not resolved" and says(c, "no gap: it is negative")
    assert set(c.route.missing) == {"s2", "s2_new"} and "undefined" in str(c) and c.behaviour.gap[1] < 0
    assert c.figure()._repr_png_()


def test_a_kind_without_gap_is_left_out_and_named(made, kinds):
    "Blind to a third name: under `s2_new` this student answers as before."
    teacher, both = made({3: .6, 4: .4}), kinds["test"]
    still = {"s2": both["s2"], "s2_new": replace(both["s2_new"], corrupt_ids=both["s2_new"].clean_ids)}
    train = kinds["train"]
    train = {"s2": train["s2"], "s2_new": replace(train["s2_new"], corrupt_ids=train["s2_new"].clean_ids)}
    c = compare(teacher, teacher, still, train=train, **QUICK)
    assert c.route.kinds == ["s2"] and c.route.distance == 0 and says(c, "kind 's2_new' is not read")


def test_without_train_pairs_names_are_halved(teacher, tokenizer):
    pairs = load_pairs("ioi", tokenizer, split="train", n=120)
    c = compare(teacher, teacher, pairs, **QUICK)
    assert says(c, "no train pairs") and c.route.distance == 0 and 8 <= len(c.teacher.entities) < 120
    refused("give more pairs, or train=", compare, teacher, teacher, pairs[:12], **QUICK)


def test_models_come_back_as_they_were(made, kinds):
    teacher, student = made({3: .6, 4: .4}), made({1: .6, 2: .4})
    student.train()
    get_adapter(teacher).lm_head.weight.requires_grad_(False)
    before = [content_hash(m.state_dict()) for m in (teacher, student)]
    compare(teacher, student, kinds["test"]["s2"], train=kinds["train"]["s2"], n_boot=20)
    assert [content_hash(m.state_dict()) for m in (teacher, student)] == before
    assert student.training and not teacher.training and not get_adapter(teacher).lm_head.weight.requires_grad
    assert all(p.requires_grad and p.grad is None for p in student.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())


def test_twice_is_the_same(teacher, made, kinds):
    args = teacher, made({1: .6, 2: .4}, seed=1), kinds["test"]["s2"]
    one, two = (compare(*args, train=kinds["train"]["s2"], n_boot=30) for _ in range(2))
    assert json.dumps(one.to_dict()) == json.dumps(two.to_dict()) and str(one) == str(two)


# the figure

def test_figure(moved):
    one, two = moved.figure(), moved.figure(kinds=["s2", "s2_new"])
    assert len(one.axes) == 2 and len(two.axes) == 4
    assert [ax.get_title(loc="left") for ax in one.axes] == ["Teacher, 6 layers", "Student, 6 layers"]
    said = one.get_suptitle()
    assert f"D = {moved.route.distance:.2f}" in said and "earlier by 0.3" in said
    assert moved.figure()._repr_png_() == one._repr_png_()
    refused("two_routes: no kind 'names'", moved.figure, kinds=["names"])
    refused("two_routes: no role 'verb'", two_routes, moved.teacher, moved.student, roles=["verb"])


def test_lines_of_the_figure_are_the_route(moved):
    ax = moved.figure().axes[0]
    drawn = {line.get_label(): line for line in ax.get_lines()}
    f = moved.teacher.fraction[0][:, moved.teacher.roles.index("end")].numpy()
    assert drawn["END"].get_xdata() == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert drawn["END"].get_ydata()[:-1] == pytest.approx(f[:-1])


# two tokenizers

@pytest.fixture(scope="module")
def other_tokenizer():
    "Without BOS, and every fifth name is several tokens."
    from rcid.core import embedded
    from rcid.models import train_tokenizer
    names = [n for i, n in enumerate(embedded("names")["first_names"]) if i % 5]
    return train_tokenizer([f" {n}" for n in names] * 3 + [t["text"] for t in embedded("ioi")["templates"]], vocab=1400)


@pytest.fixture(scope="module")
def two_sets(tokenizer, other_tokenizer):
    def both(split):
        rows = list(islice(ioi_rows(tokenizer, split), 140))
        return build_pairs(rows, tokenizer), build_pairs(rows, other_tokenizer)
    return {split: both(split) for split in ("train", "test")}


def test_two_tokenizers(teacher, tokenizer, other_tokenizer, two_sets):
    students = [counting_model(other_tokenizer, live, seed=1) for live in ({3: .6, 4: .4}, {1: .6, 2: .4})]
    options = dict(train=two_sets["train"], tokenizers=(tokenizer, other_tokenizer), **QUICK)
    same, moved = (compare(teacher, s, two_sets["test"], **options) for s in students)
    assert same.route.distance < .1 < .3 < moved.route.distance and same.interchange.agreement > .5
    assert says(same, "rows dropped that only one tokenizer has") and np.isnan(same.behaviour.kl)
    words = compare(teacher, students[0], two_sets["test"], train=two_sets["train"], **QUICK)
    assert words.interchange is None and says(words, "needs tokenizers=")
    assert words.route.distance == pytest.approx(same.route.distance, abs=.05)


@pytest.mark.parametrize("with_text", (True, False))
def test_rows_are_laid_beside_each_other(tokenizer, other_tokenizer, two_sets, with_text):
    t, s = two_sets["test"]
    order = torch.randperm(len(s), generator=torch.Generator().manual_seed(0))
    tokenizers = (tokenizer, other_tokenizer) if with_text else None
    m = matched_pairs(t, s[order], tokenizers)
    a, b = m.teacher["s2"], m.student["s2"]
    assert torch.equal(a.entity_ids, b.entity_ids) and torch.equal(a.template_id, b.template_id)
    assert m.dropped == (len(t) - len(a), len(s) - len(b)) and m.dropped[0] > 0
    def text(tok, p, i): return tok.decode(p.clean_ids[i], skip_special_tokens=True).strip()
    if with_text: assert all(text(tokenizer, a, i) == text(other_tokenizer, b, i) for i in range(len(a)))
    assert len(a) >= .9 * len(s)


def test_rows_of_a_shorter_kind_come_first(tokenizer):
    both = load_kinds("ioi", tokenizer, ["s2", "s2_new"], n=30)
    t = {"s2": both["s2"], "s2_new": both["s2_new"][:10]}
    back = list(range(29, -1, -1))
    s = {"s2": both["s2"][back], "s2_new": both["s2_new"][back][:25]}
    m = matched_pairs(t, s, (tokenizer, tokenizer))
    assert len(m.teacher["s2"]) == 30 and len(m.teacher["s2_new"]) == len(m.student["s2_new"]) == 5
    for side in (m.teacher, m.student): assert torch.equal(side["s2"].clean_ids[:5], side["s2_new"].clean_ids)
    assert torch.equal(m.teacher["s2"].clean_ids, m.student["s2"].clean_ids)


def test_rows_that_cannot_be_told_apart_are_dropped(tokenizer):
    p = load_pairs("ioi", tokenizer, n=12)
    twice = p[[0, 0, 1, 2, 3]]
    m = matched_pairs(twice, p[:4])
    assert len(m.teacher["s2"]) == 3 and m.dropped == (2, 1)


def test_names_are_apart():
    entities = torch.tensor([[a, b] for a in range(12) for b in range(12) if a != b])
    choose, read = name_halves(entities, seed=3)
    assert len(choose) == len(read) == 30 and not np.isin(entities[choose], entities[read]).any()
    one = name_halves(torch.arange(10)[:, None])
    assert len(one[0]) == len(one[1]) == 5


# choices and refusals

def test_sites(same, kinds):
    t, pairs = same.teacher, kinds["test"]["s2"]
    every = sites_by(t, pairs, "all")
    assert len(every) == int((~t.forced["s2"]).sum()) and (5, "end") not in every
    top = sites_by(t, pairs, "top", 4)
    assert len(top) == 4 and (3, "end") not in top[:2]
    assert sites_by(t, pairs, [(1, "end")]) == [(1, "end")] and len(sites_by(t, pairs, "mediating", 1)) == 1
    refused("sites='best': use mediating, top, all", sites_by, t, pairs, "best")
    assert layers_at([], t, t) == [] and layers_at([(0, "end"), (5, "end")][:0], t, t) == []
    assert layers_at(every[:1], t, t) == [every[0].layer]


def test_bad_input(teacher, tokenizer, other_tokenizer, kinds, two_sets, made):
    p, q = kinds["test"]["s2"], kinds["train"]["s2"]
    fewer = replace(p, key_positions={r: at for r, at in p.key_positions.items() if r != "s1"})
    refused("roles", compare, teacher, teacher, (p, fewer), train=(q, q), tokenizers=(tokenizer, tokenizer))
    refused("none of the teacher's 48 rows is among the student's 48", compare, teacher, teacher, (p, q), train=(q, q))
    refused("train pairs have kinds", compare, teacher, teacher, kinds["test"], train=q)
    refused("kinds .* for the teacher, .* for the student", compare, teacher, teacher, ({"s2": p}, {"names": p}))
    refused("no bounds for", compare, teacher, teacher, p, train=q, bounds={"route": .1})
    refused("no corruption kinds given", by_kind, {})
    refused("kind 's2' has 48 rows, 's2_new' only 24: put it first", by_kind, dict(reversed(kinds["test"].items())))
    refused("sites='best'", compare, teacher, teacher, p, train=q, sites="best", n_boot=20)
    refused("must be 6 ascending layers", compare, teacher, teacher, p, train=q, keep=[0, 1, 2])
    refused("0 and 0 pairs", behaviour, teacher, teacher, p[:0])
