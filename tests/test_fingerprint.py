"""Fingerprints: worked out by hand, blind to the size of logits but not to a shortcut, undefined where noise is all."""
import json
from dataclasses import replace
import numpy as np
import pytest
import torch
from rcid.align.monotone import depths
from rcid.causal.mediation import Mediation
from rcid.core.resampling import name_weights
from rcid.eval.fingerprint import fingerprint, matched_layers, spearman_brown, values
from rcid.eval.route import fit_warp

NAMES = np.random.default_rng(5).integers(0, 20, (400, 2))


def refused(words, f, *args, **kw):
    "The message of the error that `f` must raise: one line, not a screenful."
    with pytest.raises(ValueError, match=words) as e: f(*args, **kw)
    assert "\n" not in str(e.value) and 15 < len(str(e.value)) < 600


def model_of(curves: dict, pairs=80, gap=2., noise=.1, roles=("s2", "end"), seed=0, rows=None) -> Mediation:
    "A model whose effects are `{kind: (layer, role)}` in gaps of the classic kind; a kind's gap is its last number."
    rng = np.random.default_rng(seed)
    effects, gaps, forced = {}, {}, {}
    for kind, f in curves.items():
        f = np.asarray(f, float)                                         # (layer, role)
        n = (rows or {}).get(kind, pairs)
        size = gap * (1 + np.arange(n) % 3)
        wobble = rng.normal(0, 1, (n, *f.shape)) * noise * abs(gap)
        effects[kind] = torch.from_numpy(f * size[:, None, None] + wobble).float()
        gaps[kind] = torch.from_numpy(f[-1, -1] * size).float()
        forced[kind] = torch.zeros(f.shape, dtype=torch.bool)
        forced[kind][-1] = True
    return Mediation(effects, gaps, forced, list(roles), torch.from_numpy(NAMES[:pairs]))


def handover(layer: int, n_layers: int = 12) -> np.ndarray:
    "Effects over S2 and END where one layer moves everything."
    at_s2 = (np.arange(n_layers) < layer).astype(float)
    return np.stack([at_s2, 1 - at_s2], 1)


def test_three_layers_by_hand():
    # the last of three layers is forced, so there are four cells: S2 and END after layers 0 and 1.
    # V_T = 1, 0, 0.5, 0.5 and V_S = 0.5, 0, 0.5, 0; means 0.5 and 0.25, deviations .5 -.5 0 0 and .25 -.25 .25 -.25.
    # r = (0.125 + 0.125) / sqrt(0.5 * 0.25) = 0.7071
    teacher = model_of({"s2": [[1, 0], [.5, .5], [0, 1]]}, noise=0)
    student = model_of({"s2": [[.5, 0], [.5, 0], [0, 1]]}, noise=0, gap=7.)
    f = fingerprint(teacher, student)
    assert f.n_cells == 4 and f.raw == pytest.approx(.5**.5) and f.similarity == pytest.approx(.5**.5)
    assert (f.reliability_teacher, f.reliability_student) == (pytest.approx(1), pytest.approx(1))
    assert f.interval == pytest.approx((.5**.5, .5**.5)) and f.reason == "" and f.kinds == ["s2"]
    # the same with a second kind: V is in gaps of the first, whatever its own gap is
    two = [model_of({"s2": m, "b": b}, noise=0) for m, b in (
        ([[1, 0], [.5, .5], [0, 1]], [[3, 0], [0, 3], [0, 3]]), ([[.5, 0], [.5, 0], [0, 1]], [[0, 0], [0, 2], [0, 2]])
    )]
    x, y = np.array([1, 0, .5, .5, 3, 0, 0, 3]), np.array([.5, 0, .5, 0, 0, 0, 0, 2])
    assert fingerprint(*two).raw == pytest.approx(np.corrcoef(x, y)[0, 1]) and fingerprint(*two).n_cells == 8


def test_a_model_is_like_itself_and_logits_may_be_three_times_as_large():
    teacher, student = model_of({"s2": handover(8)}), model_of({"s2": handover(8)}, seed=1, gap=.7)
    own = fingerprint(teacher, teacher)
    assert own.raw == pytest.approx(1) and own.similarity == pytest.approx(1 / own.reliability_teacher)
    one = fingerprint(teacher, student)
    assert one.similarity > .98 and one.interval[0] < one.similarity < one.interval[1] + .01
    def threefold(by_kind): return {kind: 3 * t for kind, t in by_kind.items()}
    loud = replace(student, effects=threefold(student.effects), gaps=threefold(student.gaps))
    other = fingerprint(teacher, loud)
    assert other.similarity == pytest.approx(one.similarity, abs=1e-6)
    assert other.interval == pytest.approx(one.interval, abs=1e-6)


def test_a_shortcut_is_seen_by_the_kind_it_leaves_out():
    teacher = model_of({"s2": handover(8), "names": handover(6)})
    short = model_of({"s2": handover(8), "names": 0 * handover(6)}, seed=1)
    assert "no gap" in short.no_gap()["names"]                           # nothing undefined about it here
    f = fingerprint(teacher, short)
    assert f.similarity < .7 and f.interval[1] < .9 and f.reason == "" and f.n_cells == 44
    assert fingerprint(teacher, short, kinds=["s2"]).similarity > .98
    assert fingerprint(teacher, model_of({"s2": handover(8), "names": handover(6)}, seed=2)).similarity > .98


def test_another_place_is_seen_and_a_warp_forgives_it():
    teacher, moved = model_of({"s2": handover(8)}), model_of({"s2": handover(4)}, seed=1)
    warp = fit_warp(teacher, moved)
    assert fingerprint(teacher, moved).similarity < .5 < .95 < fingerprint(teacher, moved, warp=warp).similarity
    reverse = model_of({"s2": handover(8)[:, ::-1]}, seed=1)             # all that was at S2 is at END
    reverse.gaps["s2"].copy_(teacher.gaps["s2"])
    assert fingerprint(teacher, reverse).similarity < -.95               # and stays below 0


@pytest.mark.parametrize("seed", range(4))
def test_identity_blocks_are_seen_through_the_depth_of_the_student(seed):
    f = np.random.default_rng(seed).uniform(0, 1, (6, 2))
    f[-1] = [0, 1]
    origin = [0, 1, 1, 1, 1, 1, 2, 3, 4, 5, 5]                           # blocks after layers 1 and 5
    teacher, student = model_of({"a": f}, noise=0), model_of({"a": f[origin]}, noise=0)
    same = fingerprint(teacher, student, student_depth=depths(11, keep=origin, of=6))
    assert same.raw == pytest.approx(1) and same.n_cells == 10
    assert fingerprint(teacher, student).raw < .99
    back = fingerprint(student, teacher, teacher_depth=depths(11, keep=origin, of=6))
    assert back.n_cells == 18 and back.raw == pytest.approx(1)


def test_layers_are_matched_by_depth():
    def layers(n_t, at_s): return [x.tolist() for x in matched_layers(depths(n_t), at_s)]
    assert layers(6, depths(3)) == [[1, 2, 3, 4, 5], [0, 0, 1, 1, 2]]    # the teacher's first is before the student's
    assert layers(3, depths(6)) == [[0, 1, 2], [1, 3, 5]]
    assert layers(6, depths(3, keep=[0, 2, 4], of=6)) == [[0, 1, 2, 3, 4], [0, 0, 1, 1, 2]]


def test_v_of_a_kind_with_fewer_pairs_is_over_its_own_pairs():
    m = model_of({"s2": handover(8), "names": handover(6)}, rows={"names": 30}, noise=.3)
    v = values(m, ["s2", "names"], np.arange(12), np.ones((1, 80)))[0]
    assert np.allclose(v[1], (m.effects["names"].mean(0) / m.gaps["s2"][:30].mean()).numpy())
    assert np.allclose(v[0], m.fraction[0].numpy(), atol=1e-6)
    f = fingerprint(m, model_of({"s2": handover(8), "names": handover(6)}, rows={"names": 30}, noise=.3, seed=1))
    assert f.similarity > .95 and f.interval[0] > .9


def test_the_interval_is_that_of_v_under_drawn_names():
    teacher, student = (model_of({"s2": handover(n)}, noise=1, seed=n) for n in (8, 5))
    weights = name_weights(NAMES[:80], 1, seed=9)[0]
    v = []
    for m in (teacher, student):
        moved = (m.effects["s2"].double().numpy() * weights[:, None, None]).sum(0)
        v.append((moved / (m.gaps["s2"].double().numpy() * weights).sum())[:-1].ravel())
    one = fingerprint(teacher, student, n_boot=1, seed=9)
    want = np.corrcoef(*v)[0, 1] / np.sqrt(one.reliability_teacher * one.reliability_student)
    assert one.interval == pytest.approx((want, want)) and one.similarity != pytest.approx(want)
    many = fingerprint(teacher, student, n_boot=500)
    again = fingerprint(teacher, student, n_boot=500)
    assert many.interval[0] < many.similarity < many.interval[1] and many == again
    assert many.interval != fingerprint(teacher, student, n_boot=500, seed=1).interval


def test_what_noise_takes_is_given_back():
    "Two models of one mechanism, read with much noise: r is well below 1, the similarity is 1 on the average."
    raw, similarity = [], []
    for seed in range(12):
        teacher = model_of({"s2": handover(8), "names": handover(6)}, pairs=100, noise=4, seed=2 * seed)
        student = model_of({"s2": handover(8), "names": handover(6)}, pairs=100, noise=4, seed=2 * seed + 1)
        f = fingerprint(teacher, student, n_boot=1)
        raw.append(f.raw)
        similarity.append(f.similarity)
    assert np.mean(raw) < .9 and abs(np.mean(similarity) - 1) < .06 and max(similarity) > 1
    assert spearman_brown(.5) == pytest.approx(2 / 3) and spearman_brown(0.) == 0 and spearman_brown(-.4) == -.4


def test_what_is_not_known_is_not_compared():
    teacher = model_of({"s2": handover(8)})
    f = fingerprint(teacher, model_of({"s2": handover(8)}, noise=200, seed=3))
    assert np.isnan([f.similarity, *f.interval]).all() and not np.isnan(f.raw) and f.reliability_student < .5
    assert "student's reliability is" in f.reason and f.reliability_teacher > .9
    flat = model_of({"s2": np.full((12, 2), .5)}, noise=0)
    flat.gaps["s2"].fill_(1)
    flat.effects["s2"].fill_(.5)
    assert np.isnan(fingerprint(teacher, flat).raw) and "same in all cells" in fingerprint(teacher, flat).reason
    two = model_of({"s2": [[.5, .5], [0, 1]]})
    assert "2 cells are not forced" in fingerprint(two, two).reason
    assert json.loads(json.dumps(f.to_dict()))["n_cells"] == 22


def test_a_student_without_a_gap_has_no_fingerprint():
    teacher = model_of({"s2": handover(8)})
    for gap, words in ((-1.1, "negative"), (.05, "10 %")):
        f = fingerprint(teacher, model_of({"s2": handover(8)}, gap=gap))
        assert np.isnan([f.similarity, f.raw, f.reliability_student]).all()
        assert f.reason.startswith("s2: student: no gap") and words in f.reason
    assert fingerprint(model_of({"s2": handover(8)}, gap=-1.1), teacher).reason.startswith("s2: teacher: no gap")


def test_input_that_cannot_be():
    teacher = model_of({"s2": handover(8), "names": handover(8)})
    refused("n_boot=0", fingerprint, teacher, teacher, n_boot=0)
    refused("fingerprint: only one model was measured on names", fingerprint, teacher, model_of({"s2": handover(8)}))
    refused("fingerprint: kinds=.'order'.: both", fingerprint, teacher, teacher, kinds=["order"])
    refused("other roles", fingerprint, teacher, replace(teacher, roles=["s1", "end"]))
    refused("other pairs", fingerprint, teacher, replace(teacher, entities=teacher.entities.flip(0)))
    turned = model_of({"names": handover(8), "s2": handover(8)})
    refused("the first kinds are s2 and names", fingerprint, teacher, turned)
    refused("student's depth has shape", fingerprint, teacher, teacher, student_depth=[1.])
    refused("teacher's depth .* must rise", fingerprint, teacher, teacher, teacher_depth=np.zeros(12))
