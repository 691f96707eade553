"""Robustness and purity: what is planted is found, what is not there is not, and bad inputs say so."""
import json
from dataclasses import replace
import numpy as np
import pytest
import torch
from conftest import ARCHS
from rcid.causal import answer_logit_diff
from rcid.data import load_pairs
from rcid.eval import information_purity, ood_robustness, probe_purity, robustness_correlation, task_accuracy
from rcid.eval.consistency import consistency
from rcid.eval.purity import contrastive_features, control_labels, entity_split, task_label
from rcid.eval.robustness import newcombe
from rcid.eval.stats import fisher_mean, paired_test


def refused(kind, words, f, *args, **kw):
    "The message of the error that `f` must raise: one line, not a screenful."
    with pytest.raises(kind, match=words) as e: f(*args, **kw)
    assert "\n" not in str(e.value) and 15 < len(str(e.value)) < 600


@pytest.fixture(scope="module")
def ioi(tokenizers): return {arch: load_pairs("ioi", t, split="train", n=160, seed=3) for arch, t in tokenizers.items()}


@pytest.fixture(scope="module")
def planted():
    "Features (site pair width), class, type and template of each row: a direction in d, drowned in h."
    rng, n, width = np.random.default_rng(0), 500, 40
    types, label, template = rng.integers(30, size=n), rng.integers(10, size=n), rng.integers(3, size=n)
    direction, spell, sentence = (5 * rng.normal(size=(m, width)) for m in (10, 30, 3))
    d = direction[label] + .2 * rng.normal(size=(n, width))
    return dict(
        h=(d + 40 * spell[types] + 40 * sentence[template])[None],
        d=d[None],
        label=label,
        entities=types[:, None],
        template=template,
        splits=3,
        n_boot=500,
    )


# purity

def test_planted_label_is_recovered(planted):
    r = probe_purity(**planted)
    best = 1 - 1 / 10                                                      # ten classes: chance of the control
    assert (
        r.d["accuracy"][0] > 0.99
        and abs(r.d["selectivity"][0] / best - 1) < 0.1
        and r.d["selectivity_ci"][0][0] > 0.8 * best
    )
    assert (
        r.difference[0] > 0.1
        and r.difference_ci[0][0] > 0
        and r.h["template"][0] > 0.9
        and abs(r.d["template"][0] - 1 / 3) < 0.15
    )
    assert all(abs(x["control_unseen"][0] - .1) < .08 for x in (r.h, r.d))


def test_noise_is_at_chance(planted):
    noise = np.random.default_rng(1).normal(size=(2, 1, 500, 40))
    r = probe_purity(**planted | dict(h=noise[0], d=noise[1]))
    for x in (r.h, r.d):
        for score in ("accuracy", "accuracy_seen", "control", "control_unseen"):
            assert abs(x[score][0] - 0.1) < 0.08, score
        assert x["selectivity_ci"][0][0] < 0 < x["selectivity_ci"][0][1] and abs(x["template"][0] - 1 / 3) < .15
    assert r.difference_ci[0][0] < 0 < r.difference_ci[0][1]


def test_shuffled_label_is_at_chance(planted):
    label = np.random.default_rng(2).permutation(planted["label"])
    r = probe_purity(**planted | dict(label=label))
    assert abs(r.d["accuracy"][0] - .1) < .08 and abs(r.d["selectivity"][0]) < .1


def test_names_of_types_are_not_the_task(planted):
    "A feature that spells the type knows the control and nothing else."
    spelled = np.eye(30)[planted["entities"][:, 0]][None]
    r = probe_purity(**planted | dict(h=spelled, d=spelled))
    assert (
        r.d["control"][0] > 0.95
        and r.d["selectivity"][0] < -0.7
        and r.d["control_unseen"][0] < 0.3
        and r.difference == [0]
        and r.template_difference == [0]
    )


def test_probe_does_not_see_scale_or_basis(planted):
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 40)))[0]
    plain, scaled = probe_purity(**planted), probe_purity(**planted | dict(d=planted["d"] * 1e3))
    assert scaled.d == plain.d
    # more features than rows: rotated into the row space
    wide = np.concatenate([planted["d"], np.zeros((1, 500, 900))], 2)
    assert abs(probe_purity(**planted | dict(h=wide, d=wide)).d["accuracy"][0] - plain.d["accuracy"][0]) < .02
    assert abs(probe_purity(**planted | dict(d=planted["d"] @ turn)).d["accuracy"][0] - plain.d["accuracy"][0]) < .02


@pytest.mark.parametrize("seed", range(5))
def test_no_entity_on_both_sides(seed, ioi):
    e = ioi["llama"].entity_ids.numpy()
    train, test = entity_split(e, np.random.default_rng(seed))
    assert train.any() and test.any() and not set(e[train].ravel()) & set(e[test].ravel())
    assert .7 < len(set(e.ravel()) - set(e[test].ravel())) / len(set(e.ravel())) < .95


def test_control_is_by_type_and_as_frequent():
    types, y = np.repeat(np.arange(60), 5), np.arange(300) % 10 >= 7
    c = control_labels(types, y, np.random.default_rng(0))
    assert all(len(set(c[types == t])) == 1 for t in range(60)) and np.bincount(c).tolist() == [210, 90]
    assert (c != control_labels(types, y, np.random.default_rng(1))).any()


@pytest.mark.parametrize("arch", ARCHS)
def test_label_of_ioi_is_the_order_of_mention(arch, ioi):
    p = ioi[arch]
    name, y = task_label(p)
    assert (
        name == "order"
        and (y == (p.key_positions["io"] > p.key_positions["s1"]).numpy()).all()
        and 0.3 < y.mean() < 0.7
    )
    twice = replace(
        p,
        clean_ids=p.corrupt_ids,
        corrupt_ids=p.clean_ids,
        correct_token_id=p.wrong_token_id,
        wrong_token_id=p.correct_token_id,
    )
    assert (task_label(twice)[1] == 1 - y).all()                           # the corrupt prompt asks for the other one


@pytest.mark.parametrize("arch", ARCHS)
def test_purity_of_a_model(arch, ioi, models):
    r = information_purity(models[arch], ioi[arch], layers=[0, 3], splits=3, n_boot=200)
    assert (
        r.sites == [(0, "end"), (3, "end")]
        and r.label == "order"
        and r.n_pairs == 160
        and 0 < r.n_tested < 160
        and r.n_unlabelled == 0
    )
    for x in (r.h, r.d):
        for score in ("accuracy", "control", "selectivity", "template"):
            for v, (low, high) in zip(x[score], x[f"{score}_ci"]): assert low <= v <= high
    # h of a random model still tells the sentence
    assert r.h["template"][1] > .7 and json.dumps(r.to_dict())
    assert information_purity(models[arch], ioi[arch], layers=[0, 3], splits=3, n_boot=200) == r


def test_features_are_the_residuals(ioi, models):
    p = ioi["qwen3"][:6]
    h, d = contrastive_features(models["qwen3"], p, [(1, "end")], batch_size=4)
    with torch.no_grad():
        want = [
            models["qwen3"]
            .model(ids, attention_mask=p.attention_mask, output_hidden_states=True)
            .hidden_states[2][torch.arange(6), p.answer_pos]
            for ids in (p.clean_ids, p.corrupt_ids)
        ]
    assert np.allclose(h[0], want[0], atol=1e-4) and np.allclose(d[0], want[0] - want[1], atol=1e-4)


def test_bad_probes(planted, ioi, models):
    m, p = models["llama"], ioi["llama"]
    refused(
        ValueError,
        r"d is zero at \(0, 'end'\) in all 160 pairs",
        information_purity,
        m,
        replace(p, corrupt_ids=p.clean_ids),
    )
    refused(ValueError, "d is zero at .*'io'", information_purity, m, p, roles=["io"], layers=[1])
    refused(ValueError, "role 's2' is modified", information_purity, m, p, roles=["s2"])
    refused(ValueError, "no pairs", information_purity, m, p[:0])
    refused(ValueError, "unknown label 'colour'", information_purity, m, p, label="colour")
    refused(ValueError, "one class in 160 usable pairs", information_purity, m, p, label=np.zeros(160, int), layers=[1])
    refused(ValueError, "all need the same pairs", information_purity, m, p, label=np.zeros(7, int), layers=[1])
    refused(
        ValueError,
        "no class of 'order' occurs with 5 different types in 4 pairs",
        information_purity,
        m,
        p[:4],
        layers=[1],
    )
    refused(
        ValueError,
        "no class of 'answer' occurs with 5 different types",
        information_purity,
        m,
        p,
        label="answer",
        layers=[1],
    )
    refused(
        ValueError,
        "6 entities, an 80/20 split by entity needs at least 10",
        probe_purity,
        **planted | dict(entities=planted["entities"] % 6),
    )
    refused(ValueError, "types for 10 classes", probe_purity, **planted | dict(types=planted["entities"][:, 0] % 7))
    refused(FloatingPointError, "NaN", probe_purity, **planted | dict(d=planted["d"] * np.nan))


def test_pairs_without_a_split():
    "Every row joins two of the entities in such a way that no row lies on the test side alone."
    rng, hub = np.random.default_rng(0), np.arange(1, 41)
    x = rng.normal(size=(1, 40, 4))
    refused(
        ValueError,
        "leave no row on one side",
        probe_purity,
        x,
        x,
        hub % 2,
        np.stack([hub, hub * 0, hub + 100, hub + 200, hub + 300, hub + 400], 1),
        hub * 0,
        splits=1,
    )


# robustness

def with_share(model, pairs, share: float):
    "The pairs with answers swapped so that the model is right on this share of them."
    right = torch.arange(len(pairs)) < round(share * len(pairs))
    swap = right != (answer_logit_diff(model, pairs)[0] > 0)
    a, b = pairs.correct_token_id, pairs.wrong_token_id
    return replace(pairs, correct_token_id=torch.where(swap, b, a), wrong_token_id=torch.where(swap, a, b))


@pytest.mark.parametrize("arch", ARCHS)
def test_degradation_is_the_difference_of_accuracies(arch, ioi, models):
    m, p = models[arch], ioi[arch]
    inside, outside = with_share(m, p[:80], .9), with_share(m, p[80:], .4)
    r = ood_robustness(m, inside, {"far": outside, "itself": inside}, n_boot=1000)
    far, same = r["variants"]["far"], r["variants"]["itself"]
    assert far["degradation"] == pytest.approx(
        task_accuracy(m, inside)["accuracy"] - task_accuracy(m, outside)["accuracy"]
    ) and far["degradation"] == pytest.approx(0.5)
    assert (
        0 < far["degradation_ci"][0] < 0.5 < far["degradation_ci"][1]
        and 0 < far["degradation_boot_ci"][0] < 0.5 < far["degradation_boot_ci"][1]
    )
    assert (
        same["degradation"] == 0
        and same["degradation_boot_ci"] == [0, 0]
        and same["degradation_ci"][0] < 0 < same["degradation_ci"][1]
    )
    assert (
        r["mean_degradation"] == pytest.approx(0.25)
        and json.dumps(r)
        and r["both"] == pytest.approx(task_accuracy(m, inside)["both"])
    )


def test_newcombe_golden():
    assert np.allclose(newcombe(56, 70, 48, 80), (0.0524, 0.3339), atol=1e-4) and np.allclose(
        newcombe(9, 10, 3, 10), (0.1705, 0.8090), atol=1e-4
    )


def test_variants_of_ioi(tokenizers, models):
    inside = load_pairs("ioi", tokenizers["llama"], split="test", n=40)
    variants = {
        v: load_pairs("ioi", tokenizers["llama"], split="test", n=40, variant=v)
        for v in ("ood_names", "ood_templates", "ood_long")
    }
    r = ood_robustness(models["llama"], inside, variants, n_boot=500)
    assert list(r["variants"]) == list(variants)
    for v in r["variants"].values():
        for key in ("degradation_ci", "degradation_boot_ci"): assert v[key][0] <= v["degradation"] <= v[key][1]


def test_bad_variants(ioi, models, make_model):
    m, p = models["llama"], ioi["llama"]
    refused(ValueError, "no variants given", ood_robustness, m, p, {})
    refused(ValueError, "no pairs in variant 'x'", ood_robustness, m, p, {"x": p[:0]})
    refused(ValueError, "no pairs in the ID set", ood_robustness, m, p[:0], {"x": p})
    refused(
        ValueError,
        "variant 'x' is task 'facts', the ID set is 'ioi'",
        ood_robustness,
        m,
        p,
        {"x": replace(p, task="facts")},
    )
    broken = make_model("llama")
    with torch.no_grad(): broken.model.norm.weight.fill_(torch.nan)
    refused(FloatingPointError, "NaN", ood_robustness, broken, p, {"x": p})


# consistency against robustness

def test_method_confounds_the_pooled_correlation():
    rng, level = np.random.default_rng(0), np.repeat([.2, .5, .8], 10)
    r = robustness_correlation(
        level + 0.05 * rng.normal(size=30),
        0.3 * (1 - level) + 0.02 * rng.normal(size=30),
        np.repeat(["a", "b", "c"], 10),
    )
    assert (
        r.pooled.r < -0.9
        and r.within.low < 0 < r.within.high
        and r.p_permutation > 0.05
        and r.n_within == 30
        and r.within.df == 26
        and r.note == ""
    )


def test_within_is_found_where_it_is():
    rng, of = np.random.default_rng(1), np.repeat(np.arange(4), 6)
    x = rng.normal(size=24)
    r = robustness_correlation(x + 5 * of, -x + 5 * of + .3 * rng.normal(size=24), of)
    assert (
        r.pooled.r > 0.8
        and r.within.r < -0.9
        and r.within.high < -0.8
        and r.p_permutation < 0.001
        and all(v < -0.8 for v in r.by_group.values())
    )


def test_within_p_is_uniform_when_nothing_is_there():
    rng, of = np.random.default_rng(2), np.repeat(["a", "b", "c", "d"], 3)
    p = np.array(
        [
            (r.within.p, r.p_permutation)
            for r in (robustness_correlation(*rng.normal(size=(2, 12)), of, n_shuffles=300) for _ in range(200))
        ]
    )
    assert (abs((p < .05).mean(0) - .05) < .04).all() and (abs((p < .5).mean(0) - .5) < .11).all()


@pytest.mark.parametrize("x, y, groups, words", [
    ([.5, .6], [.1, .2], ["a", "b"], "a, b left out, one run each"),
    ([.5, .6, .7], [.1, .2, .3], ["a", "a", "b"], "needs at least 2 more runs than groups"),
    ([.5] * 6, [.1, .2, .3] * 2, ["a"] * 6, "consistency does not vary"),
    ([.5, .6, .7] * 2, [.1] * 3 + [.2] * 3, ["a"] * 3 + ["b"] * 3, "degradation does not vary inside any group"),
    ([np.nan] * 4, [.1, .2, .3, .4], ["a"] * 4, "4 of 4 runs with an undefined value"), ([], [], [], "0 points")])
def test_undefined_is_nan_with_a_reason(x, y, groups, words):
    r = robustness_correlation(x, y, groups)
    assert np.isnan([r.within.r, r.within.p, r.p_permutation]).all() and words in r.note and "\n" not in r.note
    assert r.n_runs + r.n_undefined == len(x)


def test_nan_is_counted_and_left_out():
    x, y, of = [.1, .2, np.nan, .4, .5, .3], [.3, .25, .2, np.nan, .1, .15], ["a"] * 6
    r, clean = robustness_correlation(x, y, of), robustness_correlation([.1, .2, .5, .3], [.3, .25, .1, .15], ["a"] * 4)
    assert (
        r.n_undefined == 2
        and (r.pooled, r.within, r.p_permutation) == (clean.pooled, clean.within, clean.p_permutation)
        and r.note.startswith("2 of 6 runs")
    )


def test_three_seeds_cannot_be_significant():
    r = robustness_correlation([.5, .6, .7], [.3, .2, .1], ["a"] * 3)
    assert r.p_smallest == pytest.approx(1 / 6) and r.p_permutation > .1


def test_lengths_differ():
    refused(
        ValueError, "3 consistencies, 2 degradations and 3 groups", robustness_correlation, [1, 2, 3], [1, 2], ["a"] * 3
    )


# undefined is NaN, counted, and says why

@pytest.mark.parametrize("constant", ("teacher", "student", "both"))
def test_effects_without_variance_are_undefined_and_counted(constant):
    rng = np.random.default_rng(0)
    t, ld = rng.normal(size=(40, 4)), (rng.uniform(3, 6, 40), -rng.uniform(3, 6, 40))
    s = t + .1 * rng.normal(size=t.shape)
    for side in (t, s):
        if constant == "both" or (side is t) == (constant == "teacher"): side[:, 1] = .7
    r = consistency(t, s, ld, ld, n_boot=200, n_shuffles=200)
    assert np.isnan([r.pearson[1], r.spearman[1], r.p[1], r.p_bh[1], r.sign_agreement[1]]).all() and r.n_undefined == 1
    # not 0 in the mean
    assert r.consistency == pytest.approx(fisher_mean([r.pearson[i] for i in (0, 2, 3)])) and r.consistency > .9
    nothing = consistency(t * 0, s, ld, ld, n_boot=200, n_shuffles=200)
    assert np.isnan([nothing.consistency, nothing.low, nothing.high]).all() and nothing.n_undefined == 4


@pytest.mark.parametrize("seeds, words", [(0, "0 pair"), (1, "1 pair")])
def test_fewer_seeds_than_a_paired_test_needs(seeds, words):
    r = paired_test(np.full(seeds, .9), np.full(seeds, .5))
    assert np.isnan([r.p_t, r.p_sign_flip, r.low, r.high]).all() and r.n == seeds and "\n" not in r.note
    assert words in r.note and "a paired test needs at least 2, run more seeds" in r.note


def test_two_seeds_say_what_they_cannot_show():
    r = paired_test([.9, .8], [.5, .5])
    assert r.p_smallest == .5 == r.p_sign_flip                               # no result of two seeds is significant
