"""Three outcomes and what could have been seen: against numbers of statsmodels, noncentral t, and frequencies."""
import numpy as np
import pytest
from scipy.stats import norm, t
from rcid.eval.power import OUTCOMES, at_level, equivalence, smallest_detectable, tost, verdict

DIFFERS, EQUAL, OPEN = OUTCOMES


def test_words(): assert OUTCOMES == ("differs", "equal within the bound", "not resolved")


@pytest.mark.parametrize(
    "interval, level, outcome",
    [
        ((.00, -.04, .04), .9, EQUAL),
        ((.00, -.06, .06), .9, OPEN),
        ((.10, .06, .14), .9, DIFFERS),
        ((-.10, -.14, -.06), .9, DIFFERS),
        ((.02, .01, .03), .9, EQUAL),              # there, and too small to matter
        ((.06, .004, .116), .9, OPEN),             # above 0 at 90 %, not at 95 %
        ((.06, .004, .116), .95, DIFFERS),
        ((.00, -.055, .055), .95, EQUAL),          # the 90 % interval ends at 0.046
        ((float("nan"), 0., 1.), .9, OPEN),
    ],
)
def test_of_intervals(interval, level, outcome): assert equivalence(interval, .05, level) == outcome


def test_tost_goldens():
    "statsmodels 0.14.6, ttost_paired(values, zeros, -bound, bound)."
    assert tost(np.array([.01, .02, -.01]), .1) == pytest.approx(.004405372216647914, rel=1e-9)
    assert tost(np.array([.3, -.1, .2, .05, .4]), .25) == pytest.approx(.20948612977799316, rel=1e-9)


def test_of_values_is_tost():
    rng = np.random.default_rng(0)
    seen = set()
    for mean in (0, .05, .1, .2):
        for _ in range(30):
            d = rng.normal(mean, .08, 5)
            equal = tost(d, .1) < .05
            half = t(4).ppf(.95) * d.std(ddof=1) / np.sqrt(5)
            assert equal == (-.1 < d.mean() - half and d.mean() + half < .1)       # the 90 % interval is inside
            outcome = equivalence(list(d), .1)
            assert (outcome == EQUAL) == equal
            seen.add(outcome)
    assert seen == set(OUTCOMES)


def test_few_and_equal_values():
    assert equivalence([], .1) == equivalence([.3], .1) == equivalence([.3, np.nan], .1) == OPEN
    assert equivalence([.02, .02, .02], .1) == equivalence([0, 0], .1) == EQUAL
    assert equivalence([.2, .2, .2], .1) == DIFFERS
    assert equivalence(np.array([.2, .21, np.nan, .19]), .1) == DIFFERS


def test_intervals_of_another_level():
    assert at_level((1., 0., 4.), .9, .9) == pytest.approx((0., 4.))
    low, high = at_level((0., -norm.ppf(.95), 2 * norm.ppf(.95)), .9, .95)
    assert (low, high) == pytest.approx((-norm.ppf(.975), 2 * norm.ppf(.975)))


def test_smallest_detectable_difference():
    assert smallest_detectable(.1) == pytest.approx(.28016, abs=1e-5)
    assert smallest_detectable(.1, power=.9, alpha=.01) == pytest.approx((norm.ppf(.995) + norm.ppf(.9)) * .1)
    draws = np.random.default_rng(1).normal(2, .1, 500)
    with_gap = np.append(draws, np.nan)
    assert smallest_detectable(draws) == smallest_detectable(with_gap) == pytest.approx(.28016, rel=.1)
    assert np.isnan(smallest_detectable(np.array([.1]))) and np.isnan(smallest_detectable(float("nan")))
    # of a few seeds: a t test finds that difference four times in five
    rng = np.random.default_rng(2)
    for n in (3, 5, 10, 40):
        means = rng.normal(smallest_detectable(1 / np.sqrt(n), df=n - 1), 1, (20_000, n))
        found = abs(means.mean(1) / means.std(1, ddof=1) * np.sqrt(n)) > t(n - 1).ppf(.975)
        assert abs(found.mean() - .8) < .015
    # statsmodels 0.14.6, TTestPower().solve_power(nobs=5, alpha=.05, power=.8) * sqrt(5)
    assert smallest_detectable(1., df=4) == pytest.approx(3.761059816267204, rel=1e-6)


def test_verdicts_say_it_in_words():
    v = verdict((.3, .25, .35), .05, .95)
    assert v.outcome == DIFFERS and v.interval == pytest.approx((.25, .35))
    assert str(v).startswith("differs (+0.30 [+0.25, +0.35], bound 0.05, could see 0.07")
    values = verdict([.1, .12, .11, .13], .2)
    assert values.outcome == EQUAL and values.difference == pytest.approx(.115) and values.smallest > 0
    assert str(verdict((np.nan, np.nan, np.nan), .1)) == "not resolved (undefined)"
    single = verdict([.1], .2)
    assert single.outcome == OPEN and np.isnan(single.smallest) and "power is unknown" in str(single)
    assert verdict([], .2).outcome == OPEN


def test_bad_input():
    for call, words in (
        (lambda: equivalence([.1, .2], 0), "bound=0 must be above 0"),
        (lambda: equivalence([.1, .2], float("nan")), "must be above 0"),
        (lambda: equivalence((.1, .2), .1), r"a tuple of 2, expected \(estimate, low, high\)"),
        (lambda: smallest_detectable(-1.), "below 0"),
        (lambda: smallest_detectable(1., power=80), "must lie between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=words) as e: call()
        assert "\n" not in str(e.value)
