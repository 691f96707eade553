"""Routes: distances worked out by hand, moves that a warp undoes, shortcuts that a second kind shows, bad input."""
import json
from dataclasses import replace
import numpy as np
import pytest
import torch
from rcid.align.monotone import STEPS, SHIFT_PRICE, SLOPE_PRICE, Warp, depths, fit_curves, layer_at, pieces
from rcid.causal.mediation import Mediation
from rcid.core.resampling import name_weights
from rcid.eval.route import counted_roles, fit_warp, halves, noise_floor, route_distance

NAMES = np.random.default_rng(5).integers(0, 10, (400, 2))


def refused(words, f, *args, **kw):
    "The message of the error that `f` must raise: one line, not a screenful."
    with pytest.raises(ValueError, match=words) as e: f(*args, **kw)
    assert "\n" not in str(e.value) and 15 < len(str(e.value)) < 600


def model_of(curves: dict, pairs=24, gap=2., noise=0., roles=("s2", "end"), seed=0, rows=None) -> Mediation:
    "A model with these F, `{kind: (layer, role)}`: pair by pair without noise, else on the average."
    rng = np.random.default_rng(seed)
    effects, gaps, forced = {}, {}, {}
    for kind, f in curves.items():
        f = np.asarray(f, float)                                         # (layer, role)
        n = (rows or {}).get(kind, pairs)
        gaps[kind] = torch.from_numpy(gap * (1 + np.arange(n) % 3)).float()
        wobble = rng.normal(0, noise * abs(gap), (n, *f.shape)) if noise else np.zeros((n, *f.shape))
        wobble[:, -1] = 0
        effects[kind] = torch.from_numpy(f * gaps[kind].numpy()[:, None, None] + wobble).float()
        forced[kind] = torch.zeros(f.shape, dtype=torch.bool)
        forced[kind][-1] = True
    return Mediation(effects, gaps, forced, list(roles), torch.from_numpy(NAMES[:pairs]))


def handover(layer: int, n_layers: int = 12) -> np.ndarray:
    "F over S2 and END where one layer moves everything."
    at_s2 = (np.arange(n_layers) < layer).astype(float)
    return np.stack([at_s2, 1 - at_s2], 1)


def detour(first: int, second: int, n_layers: int = 12) -> np.ndarray:
    "F over S2, the token after S1, and END: by way of the second from layer `first` to `second`."
    at = np.arange(n_layers)
    return np.stack([at < first, (at >= first) & (at < second), at >= second], 1).astype(float)


def random_route(rng, n_layers: int, n_roles: int = 2) -> np.ndarray:
    f = rng.uniform(-.2, 1.2, (n_layers, n_roles))
    f[-1] = [0] * (n_roles - 1) + [1]
    return f


# the integral

def test_two_layers_by_hand():
    # gaps 4 and 2, in sum 6. After the first layer S2 carries 3 + 1.5 of them: F = 0.75, and END 1 + 0.5: 0.25.
    # The student: gaps 2 and 2; S2 carries 1 + 0.6: F = 0.4, END 1 + 1.4: 0.6.
    # The last layer has no width, so D = (|0.75 - 0.4| + |0.25 - 0.6|) / 2 = 0.35.
    def model(s2, end, gaps):
        gaps = torch.tensor(gaps)
        first = torch.stack([torch.tensor(s2), torch.tensor(end)], 1)
        last = torch.stack([0 * gaps, gaps], 1)
        forced = torch.tensor([[False, False], [True, True]])
        names = torch.tensor([[0, 1], [2, 3]])
        return Mediation({"s2": torch.stack([first, last], 1)}, {"s2": gaps}, {"s2": forced}, ["s2", "end"], names)

    teacher = model([3., 1.5], [1., .5], [4., 2.])
    student = model([1., .6], [1., 1.4], [2., 2.])
    r = route_distance(teacher, student)
    assert r.distance == pytest.approx(.35) and r.by_kind == {"s2": pytest.approx(.35)}
    assert r.by_role == {"s2": pytest.approx(.35), "end": pytest.approx(.35)}
    assert (r.roles, r.kinds, r.missing, r.warp, r.shift, r.inside) == (["s2", "end"], ["s2"], {}, None, 0, 1)


def test_other_depths_and_two_kinds_by_hand():
    # Two layers against four: from 0.5 to 0.75 the teacher is in layer 0 and the student in 1, then in 0 and 2.
    # Kind a: S2 |0.8 - 0.6| / 2 + |0.8 - 0.2| / 2 = 0.4, END |0.2 - 0.4| / 2 + |0.2 - 0.8| / 2 = 0.4.
    # Kind b: S2 stays within 0.1 in both, so END alone counts: |1 - 0.5| / 2 + |1 - 1| / 2 = 0.25.
    # D = (0.4 + 0.25) / 2; at END (0.4 + 0.25) / 2, at S2 0.4 of the one kind in which it counts.
    teacher = model_of({"a": [[.8, .2], [0, 1]], "b": [[.05, 1], [0, 1]]})
    student = model_of({
        "a": [[.9, .1], [.6, .4], [.2, .8], [0, 1]],
        "b": [[0, .4], [0, .5], [0, 1], [0, 1]],
    })
    r = route_distance(teacher, student)
    assert r.by_kind == {"a": pytest.approx(.4), "b": pytest.approx(.25)} and r.distance == pytest.approx(.325)
    assert r.by_role == {"s2": pytest.approx(.4), "end": pytest.approx(.325)}
    assert r.counted == {"a": ["s2", "end"], "b": ["end"]}
    assert route_distance(teacher, student, kinds=["b"]).distance == pytest.approx(.25)
    assert route_distance(teacher, student, roles=["s2"], kinds=["b"]).distance == pytest.approx(.05)


@pytest.mark.parametrize("seed", range(6))
def test_the_integral_is_that_of_a_fine_grid(seed):
    rng = np.random.default_rng(seed)
    depth_t, depth_s = (np.append(np.sort(rng.uniform(.05, .95, n)), 1) for n in (6, 9))
    knots = np.sort(rng.uniform(-.3, 1.3, 5))
    warp = [None, Warp(np.linspace(0, 1, 5), knots)][seed % 2]
    f_t, f_s = rng.uniform(0, 1, (7,)), rng.uniform(0, 1, (10,))
    width, at_t, at_s = pieces(depth_t, depth_s, warp)
    start = max(depth_t[0], depth_s[0])
    u = start + (1 - start) * (np.arange(400_000) + .5) / 400_000
    fine = abs(f_t[layer_at(depth_t, u)] - f_s[layer_at(depth_s, u if warp is None else warp(u))]).mean()
    assert width.sum() == pytest.approx(1)
    assert (width * abs(f_t[at_t] - f_s[at_s])).sum() == pytest.approx(fine, abs=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_a_fixed_map_makes_a_metric(seed):
    rng = np.random.default_rng(seed)
    a, b, c = (model_of({"a": random_route(rng, n), "b": random_route(rng, n)}) for n in (6, 6, 6))
    def d(x, y): return route_distance(x, y, roles=["s2", "end"], n_boot=1).distance
    assert d(a, a) == 0 and d(a, b) > 0 and d(a, b) == d(b, a)
    assert d(a, c) <= d(a, b) + d(b, c) + 1e-12
    deep = model_of({kind: random_route(rng, 15) for kind in ("a", "b")})
    assert d(a, deep) == pytest.approx(d(deep, a))


def test_logits_three_times_as_large_change_nothing():
    rng = np.random.default_rng(1)
    teacher = model_of({"a": random_route(rng, 8)}, pairs=200, noise=.3)
    student = model_of({"a": random_route(rng, 6)}, pairs=200, noise=.3, seed=1)
    def threefold(by_kind): return {kind: 3 * t for kind, t in by_kind.items()}
    loud = replace(student, effects=threefold(student.effects), gaps=threefold(student.gaps))
    for warp in (False, True):
        one, other = route_distance(teacher, student, warp, n_boot=50), route_distance(teacher, loud, warp, n_boot=50)
        assert one.distance == pytest.approx(other.distance, abs=1e-6) and one.floor == pytest.approx(other.floor)
        assert one.interval == pytest.approx(other.interval, abs=1e-6) and one.shift == pytest.approx(other.shift)


def test_forced_cells_do_not_count():
    rng = np.random.default_rng(2)
    f = random_route(rng, 6)
    other = f.copy()
    other[-1] = [1, 0]                                                   # the last layer alone
    assert route_distance(model_of({"a": f}), model_of({"a": other})).distance == 0
    # handed over in the last layer: END is 0 before it, and the 1 in it is forced
    late = model_of({"a": handover(5, 6)})
    assert counted_roles(late, late) == {"a": ["s2"]} and route_distance(late, late).roles == ["s2"]
    assert counted_roles(late, model_of({"a": handover(2, 6)})) == {"a": ["s2", "end"]}
    # a role before the first change is 0 everywhere: it does not count, not even when it is asked for
    with_io = np.concatenate([np.zeros((6, 1)), f], 1)
    teacher = model_of({"a": with_io}, roles=("io", "s2", "end"))
    teacher.forced["a"][:, 0] = True
    student = model_of({"a": 1.2 * with_io}, roles=("io", "s2", "end"))
    student.forced["a"][:, 0] = True
    assert counted_roles(teacher, student) == {"a": ["s2", "end"]}
    r = route_distance(teacher, student, roles=["io", "s2", "end"])
    assert r.roles == ["s2", "end"] and r.distance == route_distance(teacher, student).distance
    nothing = route_distance(teacher, student, roles=["io"])
    assert np.isnan(nothing.distance) and "no role counts" in nothing.missing["a"]


# the warp

@pytest.mark.parametrize(
    "of_teacher, of_student, n_teacher, n_student",
    [(8, 4, 12, 12), (3, 9, 12, 12), (5, 1, 6, 6), (2, 5, 6, 6), (1, 4, 6, 6), (20, 5, 30, 10), (5, 20, 10, 30)],
)
def test_a_pure_move_is_undone_at_slope_one(of_teacher, of_student, n_teacher, n_student):
    teacher = model_of({"s2": handover(of_teacher, n_teacher)})
    student = model_of({"s2": handover(of_student, n_student)})
    moved = (of_student + 1) / n_student - (of_teacher + 1) / n_teacher
    fixed, warped = route_distance(teacher, student), route_distance(teacher, student, warp=True)
    assert fixed.distance > .8 * abs(moved) and fixed.shift == 0
    assert warped.distance == pytest.approx(0, abs=1e-6) and warped.shift == pytest.approx(moved, abs=1e-6)
    assert warped.reverse == pytest.approx(0, abs=1e-6) and fixed.reverse == fixed.distance
    assert warped.at_limit == 0 and np.allclose(np.diff(warped.warp.v), np.diff(warped.warp.u))
    assert warped.inside < 1


@pytest.mark.parametrize("pace", [2/3, 3/4, 4/3, 3/2])
def test_a_known_warp_is_recovered(pace):
    # events at a third, a half and two thirds of the teacher's 24 layers, and in the student at another pace around 1/2
    layers, places = 24, (8, 12, 16)
    moved = [12 + pace * (place - 12) for place in places]
    n_student = 72                                                       # every event on a layer
    def curves(at, n): return np.stack([np.arange(1, n + 1) < round(a * n / 24) for a in at]).astype(float)
    warp = fit_curves(curves(places, layers), curves(moved, n_student), depths(layers), depths(n_student))
    assert np.allclose(warp(np.array(places) / 24), np.array(moved) / 24) and warp.at_limit == 0
    slope = np.diff(warp.v) / np.diff(warp.u)
    inner = (warp.u[:-1] >= 1/3 - 1e-9) & (warp.u[1:] <= 2/3 + 1e-9)
    assert inner.any() and np.allclose(slope[inner], pace) and warp.shift == pytest.approx(0, abs=.01)


def test_the_limit_of_the_slope_is_said():
    # one layer of the teacher between the two events, eight of the student: at slope 2 only two can be caught up with
    teacher = model_of({"s2": detour(5, 6)}, roles=("s2", "s1+1", "end"))
    student = model_of({"s2": detour(2, 10)}, roles=("s2", "s1+1", "end"))
    r = route_distance(teacher, student, warp=True)
    slope = np.diff(r.warp.v) / np.diff(r.warp.u)
    assert r.at_limit > .2 and slope.max() == pytest.approx(2) and slope.min() >= .5 - 1e-9 and r.distance > .1
    even = route_distance(teacher, model_of({"s2": detour(5, 6)}, roles=("s2", "s1+1", "end")), warp=True)
    assert even.at_limit == 0 and even.distance == 0


def test_what_hardly_differs_moves_no_warp():
    level = np.ones((1, 12))
    near = level.copy()
    near[0, 1:] -= .0005                                                 # 1 only before and in the first layer
    still = fit_curves(level, near, depths(12), depths(12))
    assert still.shift == pytest.approx(0) and np.allclose(still.u, still.v)
    # a bump of 0.005 a layer later is not worth a slope, one of 0.5 is
    falls = (np.arange(12) < 8).astype(float)
    bends = []
    for size in (.005, .5):
        one, other = (np.stack([falls, size * (np.arange(12) >= at)]) for at in (3, 4))
        warp = fit_curves(one, other, depths(12), depths(12))
        bends.append(not np.allclose(warp.u, warp.v))
    assert bends == [False, True]


def test_another_order_of_events_stays_apart_under_any_warp():
    teacher = model_of({"s2": detour(6, 6)}, roles=("s2", "s1+1", "end"))                 # S2 -> END
    student = model_of({"s2": detour(4, 8)}, roles=("s2", "s1+1", "end"))                 # S2 -> S1+1 -> END
    assert route_distance(teacher, student, warp=True).distance > .1
    assert route_distance(student, teacher, warp=True).distance > .1
    # nothing happens in this teacher's depth: it can be laid before the student's detour. The reverse sees that
    late = route_distance(model_of({"s2": detour(11, 11)}, roles=("s2", "s1+1", "end")), student, warp=True)
    assert late.distance == pytest.approx(0, abs=1e-6) and late.inside < .5 and late.reverse > .2
    moved = model_of({"s2": detour(3, 3)}, roles=("s2", "s1+1", "end"))
    assert route_distance(teacher, moved, warp=True).distance == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_the_best_warp_is_not_worse_than_any_other(seed):
    "On random routes: the fixed map and random paths of the same steps never have a lower price."
    rng = np.random.default_rng(seed)
    n_t, n_s = ((6, 6), (6, 4), (5, 8), (10, 30))[seed % 4]
    t, s = rng.uniform(0, 1, (3, n_t)), rng.uniform(0, 1, (3, n_s))
    start = max(1 / n_t, 1 / n_s)

    def price(warp):
        width, at_t, at_s = pieces(depths(n_t), depths(n_s), warp)
        u = np.linspace(start, 1, 20_001)
        u = (u[1:] + u[:-1]) / 2
        slope = (warp(u + 1e-6) - warp(u - 1e-6)) / 2e-6
        dear = SLOPE_PRICE * np.log2(slope)**2 + SHIFT_PRICE * abs(warp(u) - u)
        return (width * abs(t[:, at_t] - s[:, at_s]).mean(0)).sum() + dear.mean()

    best = price(fit_curves(t, s, depths(n_t), depths(n_s)))
    assert best <= price(Warp(np.array([start, 1.]), np.array([start, 1.]))) + 1e-4
    for _ in range(40):
        u, v, k = [start], [rng.integers(-60, 120) / 120], rng.integers(len(STEPS))
        while u[-1] < 1:
            if rng.random() < .1: k = rng.integers(len(STEPS))
            u.append(u[-1] + STEPS[k][0] / 120)
            v.append(v[-1] + STEPS[k][1] / 120)
        assert best <= price(Warp(np.array(u), np.array(v))) + 1e-4


@pytest.mark.parametrize("seed", range(4))
def test_a_warp_of_training_pairs_is_used_on_others(seed):
    rng = np.random.default_rng(seed)
    teacher, student = (model_of({"a": random_route(rng, n)}, pairs=60, noise=.2, seed=n) for n in (8, 6))
    warp = fit_warp(teacher, student)
    r = route_distance(teacher, student, warp, n_boot=20)
    own = route_distance(teacher, student, True, n_boot=20)
    assert r.warp is warp and r.distance == own.distance <= route_distance(teacher, student, n_boot=20).distance + .02
    assert (r.shift, r.at_limit) == (warp.shift, warp.at_limit)


def test_identity_blocks_are_seen_through_the_depth_of_the_student():
    f = random_route(np.random.default_rng(3), 6)
    origin = [0, 1, 1, 2, 3, 3, 3, 4, 5, 5]                              # four blocks that do nothing
    teacher, student = model_of({"a": f}), model_of({"a": f[origin]})
    depth = depths(10, keep=origin, of=6)
    assert route_distance(teacher, student, student_depth=depth).distance == pytest.approx(0, abs=1e-9)
    between = np.array([1, 2, 2.5, 3, 4, 4.3, 4.6, 5, 6, 6]) / 6         # or anywhere before the next layer
    assert route_distance(teacher, student, student_depth=between).distance == pytest.approx(0, abs=1e-9)
    assert route_distance(student, teacher, teacher_depth=depth).distance == pytest.approx(0, abs=1e-9)
    assert route_distance(teacher, student).distance > .05


def test_kept_layers_stand_where_they_stood():
    kept = [0, 3, 7, 11]
    f = random_route(np.random.default_rng(4), 12)
    student = model_of({"a": f[kept]})
    r = route_distance(model_of({"a": f}), student, student_depth=depths(4, keep=kept, of=12))
    width, at_t, at_s = pieces(depths(12), depths(4, keep=kept, of=12))
    assert at_s.tolist() == [0] * 3 + [1] * 4 + [2] * 4 and np.allclose(width, 1 / 11) and r.distance > 0
    # a teacher that does nothing in the layers that were cut out
    still = f[[0, 0, 0, 3, 3, 3, 3, 7, 7, 7, 7, 11]]
    r = route_distance(model_of({"a": still}), student, student_depth=depths(4, keep=kept, of=12))
    assert r.distance == pytest.approx(0, abs=1e-9)


# kinds

def test_a_shortcut_is_seen_by_a_second_kind_only():
    teacher = model_of({"s2": handover(8), "names": handover(8)})
    student = model_of({"s2": handover(8), "names": handover(2)})
    assert route_distance(teacher, student, kinds=["s2"]).distance == 0
    both = route_distance(teacher, student)
    assert both.by_kind["s2"] == 0 and both.by_kind["names"] == pytest.approx(6 / 11)
    assert both.distance == pytest.approx(3 / 11)
    # one warp serves both kinds: it can hurry through what lies between their events, but not hide it
    assert route_distance(teacher, student, warp=True).distance > .1


def test_a_textbook_curve_over_a_negative_gap_is_refused():
    teacher = model_of({"s2": handover(8)})
    student = model_of({"s2": handover(8)}, gap=-1.1)                    # healed, not distilled
    for warp in (False, True):
        r = route_distance(teacher, student, warp=warp)
        assert np.isnan([r.distance, *r.interval, r.floor, r.shift]).all() and r.kinds == [] and r.warp is None
        assert r.missing["s2"].startswith("student: no gap") and "negative" in r.missing["s2"]
    refused("no kind to fit on.*student: no gap", fit_warp, teacher, student)
    weak = model_of({"s2": handover(8)}, gap=.1)                         # a twentieth of the teacher's
    assert "10 %" in route_distance(teacher, weak).missing["s2"]
    assert route_distance(student, teacher).missing["s2"].startswith("teacher: no gap")


def test_a_kind_without_gap_is_left_out_and_named():
    teacher = model_of({"s2": handover(8), "names": handover(8)})
    student = model_of({"s2": handover(4), "names": handover(4)})
    student.gaps["names"].neg_()
    r = route_distance(teacher, student)
    assert r.kinds == ["s2"] and list(r.missing) == ["names"]
    assert r.distance == route_distance(teacher, student, kinds=["s2"]).distance


def test_a_kind_may_have_fewer_pairs():
    curves = {"s2": handover(8), "names": handover(6)}
    teacher = model_of(curves, pairs=80, rows={"names": 20}, noise=.1)
    student = model_of(curves, pairs=80, rows={"names": 20}, noise=.1, seed=1)
    r = route_distance(teacher, student, n_boot=200)
    assert r.by_kind["names"] > r.by_kind["s2"] and 0 < r.interval[0] < r.interval[1] and r.floor > 0


# what is known, and how well

def test_the_interval_is_that_of_the_distance_under_drawn_names():
    rng = np.random.default_rng(6)
    teacher = model_of({"a": random_route(rng, 6)}, pairs=50, noise=.5)
    student = model_of({"a": random_route(rng, 4)}, pairs=50, noise=.5, seed=1)
    weights = name_weights(NAMES[:50], 1, seed=9)[0]
    f = []
    for m in (teacher, student):
        moved = (m.effects["a"].double().numpy() * weights[:, None, None]).sum(0)
        f.append(moved / (m.gaps["a"].double().numpy() * weights).sum())
    want = 0
    for low, high in ((.25, 1/3), (1/3, .5), (.5, 2/3), (2/3, .75), (.75, 5/6), (5/6, 1)):
        at_t, at_s = int((low + high) / 2 * 6) - 1, int((low + high) / 2 * 4) - 1
        want += (high - low) / .75 * abs(f[0][at_t] - f[1][at_s]).mean()
    one = route_distance(teacher, student, roles=["s2", "end"], n_boot=1, seed=9)
    assert one.interval == pytest.approx((want, want)) and one.distance != pytest.approx(want)
    many = route_distance(teacher, student, n_boot=500)
    assert many.interval[0] < many.distance < many.interval[1]
    again = route_distance(teacher, student, n_boot=500)
    assert (many.distance, many.interval, many.floor) == (again.distance, again.interval, again.floor)
    assert many.interval != route_distance(teacher, student, n_boot=500, seed=1).interval


def test_pairs_in_common_cancel():
    "A model against itself has no noise; against another of the same route only the noise of the two."
    teacher = model_of({"s2": handover(8)}, pairs=200, noise=.5)
    same = route_distance(teacher, teacher)
    assert same.distance == 0 and same.interval == (0, 0) and same.floor > .01
    twin = route_distance(teacher, model_of({"s2": handover(8)}, pairs=200, noise=.5, seed=1))
    assert 0 < twin.distance < twin.floor


@pytest.mark.parametrize("pairs", [100, 400])
def test_the_floor_falls_with_the_root_of_the_number_of_pairs(pairs):
    f = {"s2": handover(8)}
    floors = []
    for n in (pairs, 4 * pairs):
        own = torch.arange(2 * n).reshape(n, 2)                          # names of their own
        floors.append(np.mean([
            noise_floor(replace(model_of_many(f, n, seed), entities=own), {"s2": ["s2", "end"]}) for seed in range(5)
        ]))
    assert 1.6 < floors[0] / floors[1] < 2.5


def model_of_many(f, n, seed):
    "More pairs than there are names in NAMES."
    m = model_of(f, pairs=n if n <= len(NAMES) else len(NAMES), noise=.5, seed=seed)
    if n <= len(NAMES): return m
    several = [model_of(f, pairs=len(NAMES), noise=.5, seed=100 * seed + i) for i in range(n // len(NAMES))]
    return replace(
        m,
        effects={k: torch.cat([x.effects[k] for x in several]) for k in f},
        gaps={k: torch.cat([x.gaps[k] for x in several]) for k in f},
        entities=torch.cat([x.entities for x in several]),
    )


def test_halves_share_no_name_where_that_is_possible():
    split, by = halves(NAMES[:100], n=4)
    assert by == "names" and split.shape == (8, 100)
    for first, second in zip(split[0::2], split[1::2]):
        assert not set(NAMES[:100][first == 1].ravel()) & set(NAMES[:100][second == 1].ravel())
    single, by = halves(np.arange(30)[:, None], n=4)
    assert by == "names" and (single[0::2] + single[1::2] == 1).all()    # one name a pair: nothing is lost
    for entities in (np.zeros((30, 2), int), np.array([[0, 1]] * 30)):   # too few names to share out
        split, by = halves(entities, n=4)
        assert by == "pairs" and (split[0::2] + split[1::2] == 1).all() and (split.sum(1) == 15).all()
    assert np.array_equal(halves(NAMES[:100])[0], halves(NAMES[:100])[0])
    assert not np.array_equal(halves(NAMES[:100])[0], halves(NAMES[:100], seed=1)[0])


def test_a_report_can_be_written_as_json():
    teacher, student = model_of({"s2": handover(8)}), model_of({"s2": handover(4)})
    for warp in (False, True):
        d = route_distance(teacher, student, warp=warp).to_dict()
        assert json.loads(json.dumps(d))["roles"] == ["s2", "end"] and (d["warp"] is None) == (not warp)
    assert json.dumps(route_distance(teacher, model_of({"s2": handover(4)}, gap=-1.)).to_dict())


# bad input

def test_models_measured_on_other_things():
    teacher = model_of({"s2": handover(8)})
    other = model_of({"s2": detour(4, 8)}, roles=("s2", "s1+1", "end"))
    refused("other roles: the teacher has s2, end, the student s2, s1.1, end", route_distance, teacher, other)
    refused(r"other pairs \(24 and 20 pairs\)", route_distance, teacher, model_of({"s2": handover(8)}, pairs=20))
    names = replace(teacher, entities=teacher.entities + 1)
    refused("other pairs", route_distance, teacher, names)
    more = model_of({"s2": handover(8), "names": handover(8)})
    refused("only one model was measured on names", route_distance, teacher, more)
    refused("only one model was measured on names", route_distance, more, teacher)
    assert route_distance(teacher, more, kinds=["s2"]).distance == 0
    refused(r"kinds=\['names'\]: both models were measured on s2", route_distance, teacher, more, kinds=["names"])
    refused(r"kinds=\[\]", route_distance, teacher, teacher, kinds=[])
    short = model_of({"s2": handover(8), "names": handover(8)}, rows={"names": 10})
    refused("24 pairs of kind names of the teacher, 10 of the student", route_distance, more, short)


@pytest.mark.parametrize(
    "words, options",
    [
        ("n_boot=0", dict(n_boot=0)),
        (r"student's depth has shape \(3,\), but the student has 12 layers", dict(student_depth=[.1, .5, 1])),
        ("student's depth .* must rise", dict(student_depth=np.arange(12, 0, -1) / 12)),
        ("student's depth .* must rise", dict(student_depth=np.arange(12) / 12)),
        ("student's depth .* at most 1", dict(student_depth=np.arange(1, 13) / 11)),
        ("student's depth .* must rise", dict(student_depth=np.full(12, np.nan))),
        ("teacher's depth has shape", dict(teacher_depth=[1.])),
        ("share the depth", dict(student_depth=np.linspace(.01, .08, 12))),
        (r"unknown roles \['s1'\]: there are s2, end", dict(roles=["s1"])),
        ("names no roles for kind s2", dict(roles={"names": ["s2"]})),
    ],
)
def test_options_that_cannot_be(words, options):
    teacher = model_of({"s2": handover(8)})
    refused(words, route_distance, teacher, teacher, **options)


def test_depths_and_curves_that_cannot_be():
    refused("0 layers", depths, 0)
    refused("keep= and of= together", depths, 3, keep=[0, 1, 2])
    refused("must be 3 ascending layers within 0..5", depths, 3, keep=[0, 4, 2], of=6)
    refused("must be 3 ascending layers within 0..5", depths, 3, keep=[0, 4, 6], of=6)
    refused("must be 3 ascending layers", depths, 3, keep=[0, 4], of=6)
    curve = np.zeros((1, 4))
    refused("0 and 0 curves", fit_curves, curve[:0], curve[:0], depths(4), depths(4))
    refused("1 and 2 curves", fit_curves, curve, np.zeros((2, 4)), depths(4), depths(4))
    refused("NaN", fit_curves, curve * np.nan, curve, depths(4), depths(4))
    one = model_of({"s2": [[0., 1.]]})
    assert "no role counts" in route_distance(one, one).missing["s2"]
    refused("two layers of each", pieces, depths(1), depths(1))
