"""Projection, time, alignment, losses and fusion of keys and values: goldens, identities, slow loops, gradients, bad
input."""

import json, subprocess, sys
import pytest, torch
from rcid.align import map_layers
from rcid.core.tensors import save_tensors
from rcid.kv.aligner import KVShape, MapProjectionAligner, layer_matrix, pretrain_aligner, profile_alignment
from rcid.kv.aligner import target_health
from rcid.kv.attention import AttentionWeighting, attention_weights, gather_weights, kv_attention, uniform_weights
from rcid.kv.diagnosis import diagnose_losses
from rcid.kv.fusion import Router, fuse, masked_share
from rcid.kv.losses import MercatorKVLoss, StructuralKVLoss, cka_loss, codi_loss, kv_cosine, kv_regression
from rcid.kv.project import FlatProjector, HeadwiseMapProjector, load_projector, match_heads, uniform_head_weights
from rcid.kv.warp import TimeWarper, check_segments, find_segments, share_places
from rcid.kv.zspace import fit_zspace

BIG, SMALL = KVShape(6, 4, 8, 8), KVShape(3, 2, 6, 4)
OFFSETS = torch.tensor([[(0, 2), (2, 4), (4, 6)]])      # of the characters of three tokens


def rand(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture
# full, right- and left-padded
def mask(): return torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [0] * 3 + [1] * 4]).bool()


@pytest.fixture
def student(): return rand(3, 3, 2, 7, 6, seed=1), rand(3, 3, 2, 7, 6, seed=2), rand(3, 3, 4, 7, 6, seed=3)


@pytest.fixture
def teacher(): return rand(3, 6, 4, 7, 8, seed=4), rand(3, 6, 4, 7, 8, seed=5), rand(3, 6, 8, 7, 8, seed=6)


@pytest.mark.parametrize("h_t", range(1, 17))
def test_no_student_head_starts_dead(h_t):
    for h_s in range(1, 17):
        w = uniform_head_weights(h_t, h_s)
        slow = torch.tensor(
            [
                [max(0.0, min((s + 1) * h_t / h_s, t + 1) - max(s * h_t / h_s, t)) for t in range(h_t)]
                for s in range(h_s)
            ]
        )
        assert (
            torch.allclose(w, slow / slow.sum(1, keepdim=True), atol=1e-6)
            and (w.sum(1) > 0.999).all()
            and (w.sum(0) > 0).all()
        )


@pytest.mark.parametrize("share", (True, False))
@pytest.mark.parametrize("h_t, h_s, d_t, d_s", [(4, 2, 8, 6), (2, 6, 6, 8), (3, 2, 8, 8)])
def test_headwise_is_a_slow_loop(share, h_t, h_s, d_t, d_s):
    p, x = HeadwiseMapProjector(h_t, h_s, d_t, d_s, 2, share, init_uniform=False, seed=3), rand(2, 2, h_t, 3, d_t)
    with torch.no_grad(): p.dims.add_(rand(*p.dims.shape))
    y = p(x)
    for l in range(2):
        for s in range(h_s):
            want = sum(p.mixer[l, s, t] * x[:, l, t] for t in range(h_t)) @ p.dims[l, 0 if share else s]
            assert torch.allclose(y[:, l, s], want, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: HeadwiseMapProjector(4, 2, 8, 6, 3, share_dim_proj=False, frozen=True),
        *[lambda i=i: FlatProjector(3, 4, 8, 2, 2, 6, i) for i in ("xavier", "orthogonal", "identity")],
    ],
)
def test_projectors_survive_a_file(make, tmp_path):
    p, x = make(), rand(2, 3, 4, 5, 8)
    back = load_projector(p.save(tmp_path/"p.safetensors"))
    assert torch.equal(back(x), p(x)) and back.frozen == p.frozen and type(back) is type(p)
    # the same seed gives the same projector
    assert torch.equal(make()(x), p(x))


def test_matched_heads_undo_a_shuffle():
    x, order, mask = rand(2, 5, 60, 6), torch.tensor([3, 0, 4, 1, 2]), torch.ones(2, 60).bool()
    weight, _ = match_heads(x, x[:, order] @ torch.linalg.qr(rand(6, 6))[0], mask)
    assert torch.equal(weight, torch.eye(5)[order])


def test_warp_equal_segments_and_different_samples():
    x, src = rand(1, 2, 2, 12, 4).expand(2, -1, -1, -1, -1), torch.tensor([[0, 4, 9, 12], [0, 2, 8, 12]])
    assert torch.equal(TimeWarper()(x, src, src)[0], x)
    y, _ = TimeWarper()(x, src, torch.tensor([[0, 3, 6, 8]] * 2))
    assert not torch.allclose(y[0], y[1])


@pytest.mark.parametrize("smooth", ({}, dict(prompt=1., reasoning=2., answer=.5)))
@pytest.mark.parametrize("lengths", (None, [9, 5, 20]))
def test_warp_padded_is_row_by_row(smooth, lengths):
    warper = TimeWarper(smoothness=smooth) if lengths is None else TimeWarper.reasoning_focused(smoothness=smooth)
    x, src = rand(3, 2, 2, 14, 3), torch.tensor([[0, 3, 9, 14], [2, 5, 8, 11], [6, 8, 13, 14]])
    tgt = torch.tensor([[0, 2, 6, 7], [0, 1, 5, 9], [0, 4, 5, 6]]) if lengths is None else None
    y, mask = warper(x, src, tgt, lengths)
    for i in range(3):
        a, b, n = src[i, 0], src[i, 3], int(mask[i].sum())
        alone, _ = warper(
            x[i : i + 1, :, :, a:b],
            src[i : i + 1] - a,
            None if tgt is None else tgt[i : i + 1],
            None if lengths is None else lengths[i : i + 1],
        )
        assert (
            alone.shape[3] == n
            and torch.allclose(y[i : i + 1, :, :, :n], alone, atol=1e-6)
            and (y[i, :, :, n:] == 0).all()
        )
        # sample 1 has one place for its prompt: it takes the last token
        ends = [-1] if i == 1 else [0, -1]
        assert torch.allclose(alone[0][:, :, ends], x[i][:, :, a:b][:, :, ends])


@pytest.mark.parametrize("call, message", [
    (lambda x: TimeWarper()(x, [[0, 2, 4, 9]], [[0, 1, 2, 3]]), "longer than its sequence of 6"),
    (lambda x: TimeWarper()(x, [[0, 3, 3, 6]], [[0, 1, 2, 3]]), "empty reasoning segment"),
    (lambda x: TimeWarper()(x, [[0, 4, 3, 6]], [[0, 1, 2, 3]]), "must ascend"),
    (lambda x: TimeWarper()(x, [[0, 2, 4, 6]], lengths=[0]), "places"),
    (lambda x: TimeWarper()(x, [[0, 2, 4, 6]], [[0, 1, 2, 3]], seq=2), "longer than its sequence of 2"),
    (lambda x: find_segments(OFFSETS, torch.ones(1, 3), [4], [4]), "empty reasoning"),
    (lambda x: find_segments(OFFSETS, torch.ones(1, 3), [2], [9]), "empty answer"),
    (lambda x: find_segments(OFFSETS, torch.ones(1, 3), [-1], [2]), "empty prompt"),
    (lambda x: find_segments(OFFSETS, torch.tensor([[1, 0, 1]]), [2], [4]), "unbroken"),
    (lambda x: check_segments([[0, 4, 9, 13]], 12), "longer than its sequence of 12"),
    (lambda x: check_segments([[0, 5, 4, 9]], 12), "must ascend"),
    (lambda x: check_segments([[0, 4, 9]], 12), r"needs \(batch, 4\)"),
    (lambda x: check_segments([[3, 3, 3, 3]], 12), "no tokens"),
    (lambda x: share_places([1, 1, 1], 2), "2 places for 3 segments"),
    (lambda x: TimeWarper()(x, [[0, 3, 3, 6]], [[0, 1, 4, 5]]),
        "sample 0 has an empty reasoning segment in the teacher and 3 places"),
    (lambda x: TimeWarper.reasoning_focused()(x, [[0, 3, 3, 6]], lengths=[5]), "empty reasoning segment, but ratio"),
    (lambda x: TimeWarper()(x, [[0, 2, 4, 6]]), "one of them"),
    (lambda x: TimeWarper()(torch.cat([x, x]), [[0, 2, 4, 6]], [[0, 1, 2, 3]]), "2 samples, but segments of 1 and 1"),
    (lambda x: TimeWarper(ratio=dict(prompt=.5, reasoning=.5, answer=.5)), "sum to 1"),
    (lambda x: TimeWarper(smoothness=dict(thought=1.)), "unknown segments"),
    (lambda x: TimeWarper(smoothness=dict(answer=-1.)), "must not be negative"),
    (lambda x: layer_matrix([4], 4), "teacher layer 4"),
    (lambda x: layer_matrix([[(0, .5), (1, .2)]], 4), "sum to 1"),
    (lambda x: MapProjectionAligner(BIG, SMALL, "dense"), "unknown mode"),
    (lambda x: MapProjectionAligner(BIG, SMALL, layer_map=[0]), "1 entries"),
    (lambda x: MapProjectionAligner(BIG, KVShape(3, 2, 6), parts="kvq"), "n_heads of both"),
    (lambda x: MapProjectionAligner(BIG, SMALL, parts="k"), "unknown parts"),
    (lambda x: target_health(x, torch.tensor([[1, 0, 0, 0, 0, 0]]).bool()), "at least 2"),
    (lambda x: uniform_head_weights(0, 2), "at least 1"),
    (lambda x: match_heads(x[:, 0, :, :5], x[:, 1], torch.ones(1, 6)), "align time first"),
    (lambda x: HeadwiseMapProjector(2, 2, 4, 4, n_layers=3)(x), r"layer, head, head_dim = \(3, 2, 4\)"),
    (lambda x: HeadwiseMapProjector(2, 2, 4, 4, n_layers=2)(x[0]), "layer, head, head_dim"),
    (lambda x: HeadwiseMapProjector(4, 0, 8, 8), "at least 1"),
    (lambda x: HeadwiseMapProjector(4, 2, 8, 8, head_weights=torch.eye(4)), "head_weights"),
    (lambda x: FlatProjector(2, 2, 4, 2, 2, 6, init="he"), "unknown init"),
    (lambda x: FlatProjector(2, 2, 4, 2, 2, 6)(x[:, :, :1]), "layer, head, head_dim"),
    (lambda x: fit_zspace([rand(40, 7), rand(30, 7)], rand(40, 6), 3), r"views of .40, 30. tokens"),
    (lambda x: fit_zspace([rand(40, 7)], rand(40, 6), 500), "Z of 500 dimensions"),
    (lambda x: MapProjectionAligner(BIG, SMALL)(x, x, torch.ones(1, 6)), "the teacher and the mask say"),
    (lambda x: HeadwiseMapProjector(3, 2, 4, 4)(x), "layer, head, head_dim"),
    (lambda x: kv_cosine(x, x[..., :3], torch.ones(1, 6)), "align first"),
    (lambda x: kv_regression(x, x, torch.zeros(1, 6)), "no valid tokens"),
    (lambda x: kv_cosine(x[:, :1], x, torch.ones(1, 6)), "align first"),
    (lambda x: kv_regression(x, x, torch.ones(1, 6), kind="huber"), "unknown kind"),
    (lambda x: kv_attention(x[:, :, :1], x, torch.ones(1, 6)), "do not fit"),
    (lambda x: kv_attention(x, x, torch.ones(1, 6), temperature=0), "above 0"),
    (lambda x: AttentionWeighting("both"), "source='both'"),
    (lambda x: AttentionWeighting()(0, torch.ones(1, 6)), "teacher's attention was not given"),
    (lambda x: attention_weights(torch.ones(1, 5), torch.ones(1, 6)), r"needs \(b,h,q,k\)"),
    (lambda x: attention_weights(-torch.ones(1, 6), torch.ones(1, 6)), "not negative"),
    (lambda x: attention_weights(torch.zeros(1, 6), torch.ones(1, 6)), "sample 0 has no attention"),
    (lambda x: StructuralKVLoss()(x, x, x, x, torch.ones(1, 6)), "needs queries"),
    (lambda x: StructuralKVLoss(0, 0, 0)(x, x, x, x, torch.ones(1, 6)), "every weight is 0"),
    (lambda x: cka_loss(x, x, torch.ones(1, 6), [2]), r"0\.\.1"),
    (lambda x: cka_loss(x, x, torch.ones(1, 6), "first"), "unknown layers"),
    (lambda x: codi_loss(x[:, :, 0, 0], x[:, :1, 0, 0]), "codi_loss"),
    (lambda x: diagnose_losses(dict, [dict(ce=1)], dict(ce=1)), "at least 2"),
    (lambda x: diagnose_losses(dict, [dict(ce=1)] * 2, dict(mse=1)), "each weight its part"),
    (lambda x: fuse([x, x], [torch.ones(1, 6)] * 2, weights=[1.]), "for 2 teachers"),
    (lambda x: fuse([x, x], [torch.zeros(1, 6)] * 2), "no teacher is left for sample 0")])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message): call(rand(1, 2, 2, 6, 4))


def test_an_aligner_names_what_it_was_not_made_for(teacher, mask, student):
    k, v, q = teacher
    broken = k.clone()
    broken[1, 2, 0, 3, 0] = torch.nan
    plain = MapProjectionAligner(BIG, SMALL)
    segments = torch.tensor([[0, 2, 4, 7]] * 3)
    for call, message in [
        (lambda: plain(broken, v, mask), "sample 1, layer 2"),
        (lambda: plain(k[:, :5], v, mask), r"k is \(3, 5, 4, 7, 8\)"),
        (lambda: plain(k, v, mask, q), r"\['q'\]"),
        (lambda: plain(k, v, mask, source=segments), "no warper"),
        (lambda: MapProjectionAligner(BIG, SMALL, warper=TimeWarper())(k, v, mask), "needs the teacher's segments"),
        (lambda: profile_alignment({"a": plain}, dict(k=k, v=v, mask=mask), student[0][:, :2], student[1]),
            "the student has"),
    ]:
        with pytest.raises(ValueError, match=message): call()


def test_a_file_without_a_projector(tmp_path):
    whole = HeadwiseMapProjector(4, 2, 8, 6).save(tmp_path/"p.safetensors")
    (tmp_path/"cut").write_bytes(whole.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a whole file of tensors"): load_projector(tmp_path/"cut")
    with pytest.raises(FileNotFoundError, match="no file"): load_projector(tmp_path/"none")
    save_tensors(tmp_path/"other", {"a": torch.ones(1)})
    with pytest.raises(ValueError, match="holds no projector"): load_projector(tmp_path/"other")


def test_what_cannot_be_fused():
    teachers, student = [rand(5, 2, 3, 6, 4, seed=i) for i in range(3)], rand(5, 2, 3, 6, 4, seed=3)
    mask = torch.ones(5, 6).bool()
    gone = mask.clone()
    gone[3] = False
    masks, asked = [mask] * 3, dict(features=rand(5, 8), prototypes=rand(3, 8))
    for call, message in [
        (lambda: fuse(teachers, [gone] * 3), "no teacher is left for sample 3"),
        (lambda: fuse(teachers, masks, weights=[0.5, 0.5]), "for 3 teachers"),
        (lambda: fuse(teachers, masks, weights=[0.5, 0.7, -0.2]), "not negative"),
        (lambda: fuse(teachers, [mask, gone, gone], weights=[0, 1, 1]), "sample 3 all have weight 0"),
        (lambda: fuse(teachers, masks, "mean"), "unknown how"),
        (lambda: fuse(teachers, masks, "similarity"), "needs features"),
        (lambda: fuse(teachers, masks, "similarity", **asked, temperature=0), "above 0"),
        (lambda: fuse(teachers, masks, "learnable", **asked), "needs router"),
        (lambda: fuse(teachers, masks, "govern"), "needs the student's"),
        (lambda: fuse(teachers, masks, "govern", student=student, vote="all"), "unknown vote"),
        (lambda: fuse(teachers, masks[:2]), "one mask each"),
        (lambda: fuse([], []), "at least one teacher"),
        (lambda: fuse([teachers[0], teachers[1][:, :1]], [mask] * 2), "teacher 1 has targets"),
        (lambda: fuse([teachers[0] * torch.nan], [mask]), "teacher 0 has NaN"),
    ]:
        with pytest.raises(ValueError, match=message): call()


@pytest.mark.parametrize(
    "kw",
    (
        dict(),
        dict(mode="flat"),
        dict(layer_map=[[(0, 0.3), (1, 0.7)], 2, 5]),
        dict(share_dim_proj=False, init_uniform=False),
    ),
)
def test_aligner_shapes_and_rows(kw, teacher, mask):
    aligner = MapProjectionAligner(BIG, SMALL, parts="kvq", **kw)
    out = aligner(*teacher[:2], mask, teacher[2])
    assert out.k.shape == out.v.shape == (3, 3, 2, 7, 6) and out.q.shape == (3, 3, 4, 7, 6)
    for i in range(3):
        at = mask[i]
        row = aligner(*(x[i:i+1][:, :, :, at] for x in teacher[:2]), mask[i:i+1, at], teacher[2][i:i+1][:, :, :, at])
        for a, b in ((row.k, out.k), (row.v, out.v), (row.q, out.q)):
            assert torch.allclose(a, b[i : i + 1][:, :, :, at], atol=1e-5) and (b[i][:, :, ~at] == 0).all()


def test_layer_maps_of_map_layers():
    assert layer_matrix(map_layers(3, 6), 6).argmax(1).tolist() == [1, 3, 5]
    assert torch.allclose(layer_matrix(map_layers(3, 6, "cka", cka=rand(3, 6).abs(), top_k=2), 6).sum(1), torch.ones(3))


@pytest.mark.parametrize("mode", ("structured", "flat"))
def test_trivial_target_is_detected(mode, teacher, mask):
    for frozen in (True, False):
        aligner, k = MapProjectionAligner(BIG, SMALL, mode, frozen=frozen), torch.zeros(
            1, 3, 2, 1, 6, requires_grad=True
        )
        start = target_health(aligner(*teacher[:2], mask).k, mask)
        optimizer = torch.optim.Adam([k, *(p for p in aligner.parameters() if p.requires_grad)], .03)
        for _ in range(200):
            loss = (aligner(*teacher[:2], mask).k - k).square().mean()
            optimizer.zero_grad(); loss.backward(); optimizer.step()
        assert ("trivial target" in target_health(aligner(*teacher[:2], mask).k, mask, start).collapsed) != frozen


def test_pretrained_projectors_are_better_and_frozen(teacher, mask):
    true, aligner = MapProjectionAligner(BIG, SMALL, seed=9), MapProjectionAligner(BIG, SMALL)
    student = true(*teacher[:2], mask)
    history = pretrain_aligner(
        aligner, [(dict(k=teacher[0], v=teacher[1], mask=mask), (student.k, student.v))], steps=60, lr=0.03
    )
    assert history[-1] < .3 * history[0] and not any(p.requires_grad for p in aligner.parameters())
    rows = profile_alignment(
        {"a": aligner, "true": true},
        dict(k=teacher[0], v=teacher[1], mask=mask),
        student.k,
        student.v,
        rand(3, 3, 4, 7, 6),
    )
    assert (
        json.dumps(rows)
        and rows[2]["cosine"] > 0.999
        and abs(rows[2]["kl"]) < 1e-6
        and all(r["nan"] == 0 for r in rows)
    )


def test_attention_is_the_models_own(mask):
    q, k, n = rand(3, 1, 4, 7, 6), rand(3, 1, 2, 7, 6), 7
    see = torch.ones(n, n).tril().bool() & mask[:, None]
    want = torch.nn.functional.scaled_dot_product_attention(
        q[:, 0], k[:, 0].repeat_interleave(2, 1), torch.eye(n).expand(3, 4, n, n), attn_mask=see[:, None]
    )
    assert torch.allclose(
        kv_attention(q, k, mask)[:, 0][mask[:, None].expand(3, 4, n)], want[mask[:, None].expand(3, 4, n)], atol=1e-6
    )


@pytest.mark.parametrize("kind", ("mse", "smooth_l1"))
def test_uniform_weights_are_the_masked_mean(kind, student, mask):
    s, t, _ = student
    assert abs(kv_regression(s, t, mask, uniform_weights(mask), kind) - kv_regression(s, t, mask, kind=kind)) < 1e-7
    assert abs(kv_cosine(s, t, mask, 5. * mask) - kv_cosine(s, t, mask)) < 1e-7
    e = (s - t).square().mean((1, 2, 4))
    if kind == "mse":
        assert torch.isclose(kv_regression(s, t, mask), torch.stack([e[i][mask[i]].mean() for i in range(3)]).mean())


def test_attention_weights_in_every_form(mask):
    a = kv_attention(rand(3, 2, 4, 7, 6), rand(3, 2, 2, 7, 6), mask).mean(1)
    w = attention_weights(a, mask)
    assert torch.allclose(w.sum(1), torch.ones(3)) and (w >= 0).all() and (w[~mask] == 0).all()
    for other in (a.mean(1), w): assert torch.allclose(attention_weights(other, mask), w, atol=1e-6)
    assert torch.allclose(gather_weights(w, torch.arange(7).expand(3, 7), mask), w)
    weighting = AttentionWeighting("student", warmup=2)
    assert torch.equal(weighting(1, mask, student=a), uniform_weights(mask)) and torch.equal(
        weighting(2, mask, student=a), w
    )


def test_losses_of_a_model_with_itself_are_zero(student, mask):
    k, v, q = student
    for parts in (MercatorKVLoss()(k, v, k, v, mask), StructuralKVLoss(a_norm=1.)(k, v, k, v, mask, q_s=q, q_t=q)):
        assert all(abs(p) < 1e-6 for p in parts.values())
    assert abs(cka_loss(k, k, mask)) < 1e-5 and codi_loss(k[:, :, 0, 0], k[:, :, 0, 0]) == 0


@pytest.mark.parametrize("mode", ("structured", "flat"))
def test_gradients_reach_the_student_only(mode, student, teacher, mask):
    (k, v, q), (k_s, v_s, q_s) = ([x.clone().requires_grad_() for x in side] for side in (teacher, student))
    aligner = MapProjectionAligner(BIG, SMALL, mode, parts="kvq")
    attention = torch.rand(3, 4, 7, 7, requires_grad=True)
    target = aligner(k, v, mask, q)
    loss = StructuralKVLoss(a_norm=0.1)(
        k_s, v_s, target.k, target.v, mask, attention_weights(attention, mask), q_s, target.q
    )["total"]
    (loss + cka_loss(k_s, target.k, mask) + kv_regression(v_s, target.v, mask, layer_std=True)).backward()
    for x in (k_s, v_s, q_s): assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    assert all(x.grad is None for x in (k, v, q, attention, *aligner.parameters()))


@pytest.mark.parametrize("how", ("fixed", "similarity", "learnable", "govern"))
def test_fusion_identities(how, student, mask):
    k, features, prototypes = student[0], rand(3, 5), rand(2, 5)
    kw = dict(
        fixed=dict(weights=[0.9, 0.1]),
        similarity=dict(features=features, prototypes=prototypes),
        learnable=dict(features=features, prototypes=prototypes, router=Router(5)),
        govern=dict(student=student[1]),
    )[how]
    same = fuse([k, k], [mask, mask], how, **kw)
    assert (same.target - torch.where(mask[:, None, None, :, None], k, 0)).abs().max() < 1e-6 and torch.allclose(
        same.weights.sum(1), torch.ones(3)
    )
    gone = mask.clone(); gone[1] = False
    out, other = (
        fuse(
            [k, rand(*k.shape)][::d],
            [mask, gone][::d],
            how,
            **(
                kw
                | {n: kw[n][::d] for n in ("weights",) if n in kw}
                | {n: kw[n].flip(0) if d < 0 else kw[n] for n in ("prototypes",) if n in kw}
            ),
        )
        for d in (1, -1)
    )
    assert (
        out.weights[1].tolist() == [1, 0]
        and torch.allclose(out.weights, other.weights.flip(1), atol=1e-6)
        and torch.allclose(out.target, other.target, atol=1e-6)
    )


def test_govern_is_a_slow_loop():
    teachers, student, masks = (
        [rand(2, 1, 2, 3, 4, seed=s) for s in range(3)],
        rand(2, 1, 2, 3, 4, seed=7),
        torch.tensor([[[1, 1, 1], [1, 1, 1]], [[1, 1, 0], [1, 1, 1]], [[1, 1, 1], [0, 0, 0]]]).bool(),
    )
    out = fuse(teachers, list(masks), "govern", student=student)
    for at in torch.cartesian_prod(*map(torch.arange, student.shape)).tolist():
        b, *_, t, _ = at = tuple(at)
        values = [x[at] for x, m in zip(teachers, masks) if m[b, t]]
        total = sum(torch.sign(student[at] - x) for x in values)
        counted = [x for x in values if total == 0 or torch.sign(student[at] - x) == torch.sign(total)]
        assert abs(out.target[at] - sum(counted) / len(counted)) < 1e-6


def test_masked_share():
    assert masked_share(torch.tensor([[1.0, 5.0, 1.0]]), torch.tensor([[True, False, True]])).tolist() == [
        [0.5, 0, 0.5]
    ]


def test_diagnosis_says_what_is_out_of_scale():
    d = diagnose_losses(
        dict, [dict(ce=1.0, kv=9.0, kv_plain=8.0, cka=0.5 + i / 10) for i in range(4)], dict(ce=1.0, kv=1.0, cka=0.05)
    )
    assert abs(sum(r["share"] for r in d.rows) - 1) < 1e-9 and "kv" in d.table() and len(d.figure().axes) == 2
    assert [
        any(w in a for a in d.advice) for w in ("1-10 %", "above 50 %", "attention weighting changes kv by +12.5%")
    ] == [True] * 3


def test_no_heavy_imports():
    """matplotlib and the modelling code of transformers come only when they are used; the name `transformers` alone is
    a lazy module (its version is in the key of cached targets)."""
    code = (
        "import sys, rcid.kv.losses, rcid.kv.fusion; print([m for m in ('matplotlib', 'transformers.modeling_utils',"
        " 'transformers.models.auto.modeling_auto') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
