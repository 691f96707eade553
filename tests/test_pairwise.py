"""Pair by pair: partial correlations worked out by hand and by least squares, blind to what is behaviour."""
import numpy as np
import pytest
import torch
from scipy.linalg import hadamard
from rcid.causal.mediation import Mediation
from rcid.core.resampling import name_weights
from rcid.eval.pairwise import LEFT, partial_consistency, partial_r, residuals
from rcid.eval.stats import fisher_mean

H = hadamard(8).T[1:].astype(float)          # seven columns of +-1, orthogonal, each with mean 0
END = [(0, "end")]


def model(effects, gap, entities=None, kind="s2"):
    "A model with one role; `effects` are (pair, layer)."
    effects, gap = torch.tensor(np.asarray(effects)).float()[:, :, None], torch.tensor(np.asarray(gap)).float()
    n, layers = effects.shape[:2]
    names = torch.arange(n)[:, None] if entities is None else torch.as_tensor(entities)
    return Mediation({kind: effects}, {kind: gap}, {kind: torch.zeros(layers, 1, dtype=torch.bool)}, ["end"], names)


def one(effect, gap): return model(np.asarray(effect)[:, None], gap)


def refused(words, *args, **kw):
    with pytest.raises(ValueError, match=words) as e: partial_consistency(*args, **kw)
    assert "\n" not in str(e.value) and len(str(e.value)) < 300


def test_by_hand():
    "What is left is H2 in the teacher and H2 + H3 in the student, whatever is made of the two gaps."
    teacher = one(5 * H[0] - 3 * H[1] + H[2], H[0])
    student = one(2 * H[1] + H[2] + H[3], H[0] + H[1])
    r = partial_consistency(teacher, student, END, [0], n_boot=50)
    assert r.r == pytest.approx(1 / np.sqrt(2), abs=1e-6) and r.per_site == pytest.approx([1 / np.sqrt(2)], abs=1e-6)
    assert r.left[0] == pytest.approx((1 / 35, 2 / 6), abs=1e-6)
    plain = np.corrcoef(teacher.effects["s2"][:, 0, 0], student.effects["s2"][:, 0, 0])[0, 1]
    assert plain < -.2                                # without the gaps taken out it had the other sign


@pytest.mark.parametrize("of_gap", (1., .4, -2.))
def test_behaviour_is_not_seen(of_gap):
    gap_t, gap_s = 3 + H[0], 3 + H[0] + .3 * H[1]
    r = partial_consistency(one(of_gap * gap_t, gap_t), one(of_gap * gap_s, gap_s), END, [0], n_boot=50)
    assert np.isnan(r.r) and np.isnan(r.per_site[0]) and r.n_undefined == 1
    assert np.isnan(r.interval).all() and np.isnan(r.null["mean"])


@pytest.mark.parametrize("share, defined", ((.05, False), (.09, False), (.12, True), (1., True)))
def test_one_percent_must_be_left(share, defined):
    "share^2 / (1 + share^2) is what is left beside the gap."
    student = one(H[0] + H[1], H[0])
    r = partial_consistency(one(H[0] + share * H[1], H[0]), student, END, [0], n_boot=20)
    assert r.left[0][0] == pytest.approx(share**2 / (1 + share**2), abs=1e-5) and (r.left[0][0] >= LEFT) == defined
    assert r.n_undefined == (not defined) and np.isnan(r.r) != defined


def test_a_constant_effect_is_undefined_and_left_out_of_the_mean():
    gap, rng = 4 + H[0], np.random.default_rng(0)
    noise = 1e-6 * rng.normal(size=8)                 # rounding does not correlate
    teacher = model(np.stack([gap + H[1], 2 + noise, gap + H[2]], 1), gap)
    student = model(np.stack([gap + H[1], 2 + noise, gap - H[2] + H[3]], 1), gap)
    r = partial_consistency(teacher, student, [(l, "end") for l in range(3)], [0, 1, 2], n_boot=50)
    assert np.isnan(r.per_site[1]) and r.n_undefined == 1
    assert r.r == pytest.approx(fisher_mean([1., -1 / np.sqrt(2)]), abs=.01)


def test_weights_are_repeated_rows():
    rng = np.random.default_rng(1)
    columns = rng.normal(size=(3, 30, 4)) @ rng.normal(size=(4, 4))
    counts = rng.integers(0, 4, size=(6, 30))
    fast, left = partial_r(columns, counts.astype(float))
    for row, some in zip(fast, counts):
        again = np.repeat(columns, some, axis=1)
        for r, site in zip(row, again):
            e = residuals(site[:, 2:], site[:, :2])
            assert r == pytest.approx(np.corrcoef(e.T)[0, 1], abs=1e-9)
    assert left.shape == (6, 3, 2) and ((left > 0) & (left <= 1)).all()


def test_the_interval_is_the_bootstrap_over_names():
    rng, n = np.random.default_rng(2), 150
    gap, common = 3 + rng.normal(size=n), rng.normal(size=n)
    names = np.stack([rng.integers(20, size=n), rng.integers(20, 40, size=n)], 1)
    t, s = ((.5 * gap + common + .8 * rng.normal(size=n))[:, None] for _ in range(2))
    r = partial_consistency(model(t, gap, names), model(s, gap, names), END, [0], n_boot=400, seed=5)
    slow = []
    for w in name_weights(names, 400, 5).astype(int):
        rows = np.repeat(np.arange(n), w)
        e = residuals(np.concatenate([t, s], 1)[rows], np.stack([gap, gap], 1)[rows])
        slow.append(np.corrcoef(e.T)[0, 1])
    assert r.interval == pytest.approx(np.quantile(slow, [.025, .975]), abs=1e-4)
    assert r.interval[0] < r.r < r.interval[1] and r.null["low"] < 0 < r.null["high"] < r.r


def test_scale_and_repetition_change_nothing():
    rng = np.random.default_rng(3)
    gap = 3 + rng.normal(size=40)
    t, s = (.5 * gap[:, None] + rng.normal(size=(40, 2)) + rng.normal(size=(40, 1)) for _ in range(2))
    sites = [(0, "end"), (1, "end")]
    a = partial_consistency(model(t, gap), model(s, gap), sites, [1, 0], n_boot=100)
    assert a == partial_consistency(model(t, gap), model(s, gap), sites, [1, 0], n_boot=100)
    b = partial_consistency(model(t, gap), model(3 * s, 3 * gap), sites, [1, 0], n_boot=100)
    assert b.per_site == pytest.approx(a.per_site, abs=1e-5) and b.interval == pytest.approx(a.interval, abs=1e-5)
    assert a.student_sites == [(1, "end"), (0, "end")] and a.to_dict()["n_pairs"] == 40


def test_the_shuffled_null_is_centred_and_holds_what_is_unrelated():
    rng, inside = np.random.default_rng(4), 0
    gap = 3 + rng.normal(size=50)
    for seed in range(40):
        t, s = (rng.normal(size=(50, 1)) + gap[:, None] for _ in range(2))
        r = partial_consistency(model(t, gap), model(s, gap), END, [0], n_boot=200, seed=seed)
        assert abs(r.null["mean"]) < .06
        inside += r.null["low"] < r.r < r.null["high"]
    assert inside >= 33                               # of 40; 38 on average


def test_bad_input():
    m = one(H[1], 3 + H[0])
    refused("no sites given", m, m, [], [])
    refused("1 sites and 2 student layers", m, m, END, [0, 0])
    refused("no role 'io'", m, m, [(0, "io")], [0])
    refused("layer 3 of role 'end' is outside 0..0", m, m, [(3, "end")], [0])
    refused("layer 1 of role 'end' is outside 0..0", m, m, END, [1])
    refused("no corruption kind 'names': there are", m, m, END, [0], kind="names")
    refused("8 rows of the teacher, 7 of the student", m, one(H[1][:7], 3 + H[0][:7]), END, [0])
    few = one(H[1][:7], 3 + H[0][:7])
    refused("has 7 pairs: a partial correlation needs 8", few, few, END, [0])
