"""Differences of routes: what the pages test is what they show, and nothing is found in nothing."""
from dataclasses import replace
import numpy as np
import pytest
import torch
from rcid.causal.mediation import Mediation
from rcid.eval import route_difference
from rcid.eval.differences import accuracy_difference, common_roles
from rcid.eval.route import route_distance

KINDS, ROLES = ["s2", "names"], ["s1", "s2", "end"]


def model(layers: dict[str, int], seed: int, gap: float = 3., noise: float = .3, through: str = "s2") -> Mediation:
    "A model of eight layers: under each kind the role `through` hands over to END in the given layer."
    rng, effects, gaps, forced = np.random.default_rng(seed), {}, {}, {}
    for kind, layer in layers.items():
        curve = np.zeros((8, 3))
        curve[:layer, ROLES.index(through)] = 1
        curve[:, 2] = 1 - curve[:, ROLES.index(through)]
        own = gap * rng.uniform(.5, 1.5, 60)
        size = curve * own[:, None, None] + noise * rng.normal(size=(60, 8, 3))
        effects[kind], gaps[kind] = torch.from_numpy(size).float(), torch.from_numpy(own).float()
        forced[kind] = torch.zeros(8, 3, dtype=torch.bool)
        forced[kind][-1] = True
    names = torch.stack([torch.arange(60) // 3, 20 + torch.arange(60) % 20], 1)    # (pair, entity)
    return Mediation(effects, gaps, forced, ROLES, names)


TEACHER = model(dict(s2=5, names=5), 0)


def test_the_difference_is_that_of_the_distances():
    a, b = [model(dict(s2=5, names=4), seed) for seed in (1, 2)], [model(dict(s2=2, names=5), seed) for seed in (3, 4)]
    depth = np.array([.2, .3, .4, .5, .6, .7, .8, 1.])
    roles = common_roles(TEACHER, [*a, *b], KINDS)
    assert roles == {kind: ["s2", "end"] for kind in KINDS}
    test = route_difference(TEACHER, a, b, depth, n=200)
    def mean(some): return np.mean([route_distance(TEACHER, m, False, depth, roles, n_boot=1).distance for m in some])
    assert test["diff"] == pytest.approx(mean(a) - mean(b)) and test["diff"] < -.05 and test["p"] < .05
    assert test["kinds"] == KINDS and test["missing"] == {}
    assert test["ci"][0] <= test["ci90"][0] < test["diff"] < test["ci90"][1] <= test["ci"][1]


def test_a_kind_without_a_gap_is_read_of_none():
    "One student tells the names apart by nothing: both methods are compared on the other kind, and it is said."
    whole = model(dict(s2=5, names=2), 1)
    lost = model(dict(s2=5, names=5), 2)
    lost = replace(lost, gaps={**lost.gaps, "names": -lost.gaps["names"]})
    test = route_difference(TEACHER, [whole], [lost], n=100)
    assert test["kinds"] == ["s2"] and list(test["missing"]) == ["names"] and "negative" in test["missing"]["names"]
    assert abs(test["diff"]) < .05                                       # `names` alone would say more
    assert route_difference(TEACHER, [whole], [model(dict(s2=5, names=5), 2)], n=100)["diff"] > .1
    nothing = replace(lost, gaps={kind: -abs(gap) for kind, gap in lost.gaps.items()})
    test = route_difference(TEACHER, [whole], [nothing], n=100)
    assert test["p"] is None and test["detectable"] is None and test["kinds"] == [] and len(test["missing"]) == 2


def test_a_role_that_one_student_uses_counts_for_both():
    "A student that goes through S1 is far from its teacher there, and the other is not nearer by leaving S1 out."
    other = model(dict(s2=5, names=5), 3, through="s1")
    roles = common_roles(TEACHER, [model(dict(s2=5, names=5), 1), other], KINDS)
    assert roles == {kind: ROLES for kind in KINDS}
    same = [model(dict(s2=5, names=5), 1)]
    free = route_difference(TEACHER, [other], same, n=100)
    assert free == route_difference(TEACHER, [other], same, roles=roles, n=100)
    assert free["diff"] > .3
    assert route_difference(TEACHER, [other], same, roles={"s2": ["end"]}, n=100)["kinds"] == ["s2"]


def test_nothing_is_found_in_nothing():
    "Two students of one route and other noise: about one in twenty is called different, and an accuracy likewise."
    p = []
    for seed in range(60):
        a, b = ([model(dict(s2=5), 100 + 2 * seed + i)] for i in (0, 1))
        p.append(route_difference(replace_kinds(TEACHER), a, b, n=200, seed=seed)["p"])
    assert np.mean(np.array(p) < .05) < .15
    rng, names = np.random.default_rng(0), TEACHER.entities.numpy()
    p = [accuracy_difference(*([rng.random(60) < .8] for _ in "ab"), names, n=200)["p"] for _ in range(60)]
    assert np.mean(np.array(p) < .05) < .15


def replace_kinds(m: Mediation) -> Mediation:
    "Of the first kind alone."
    return replace(m, **{part: {"s2": getattr(m, part)["s2"]} for part in ("effects", "gaps", "forced")})


@pytest.mark.parametrize("change, words", [
    (dict(roles=["s1", "s2", "last"]), "route_difference: other roles"),
    (dict(entities=TEACHER.entities + 1), "route_difference: teacher and student were measured on other pairs"),
])
def test_models_that_do_not_compare_are_refused(change, words):
    with pytest.raises(ValueError, match=words) as e:
        route_difference(TEACHER, [replace(TEACHER, **change)], [TEACHER], n=100)
    assert "\n" not in str(e.value)
