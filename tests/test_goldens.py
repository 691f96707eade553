"""Golden numbers of CKA and of the divergences, each beside the data that it is of (formulas:
nbs/04_align/01_cka.ipynb, nbs/05_distill/00_losses.ipynb), and Procrustes against scipy."""

import numpy as np, pytest, torch
from scipy.linalg import orthogonal_procrustes
from rcid.align import hsic1, layer_cka, linear_cka, map_angle, map_layers, procrustes, random_orthogonal
from rcid.distill import divergence, rcid_floor, rcid_loss

S, T = torch.tensor([1., 2, 4]), torch.tensor([3., 2, 1])


@pytest.fixture(scope="module")
def xy():
    rng = np.random.RandomState(1337)
    x = rng.randn(100, 10)
    return torch.from_numpy(x), torch.from_numpy(rng.randn(100, 10) + x)


def test_cka_goldens(xy):
    x, y = xy
    assert float(linear_cka(x, y, debiased=False)) == pytest.approx(.55761, abs=1e-5)
    assert float(linear_cka(x, y)) == pytest.approx(.51346, abs=1e-5)
    assert float(hsic1(x, y)) == pytest.approx(9.895956, abs=1e-6)


@pytest.mark.parametrize("debiased", (True, False))
def test_cka_identities(xy, debiased):
    x, y = xy
    turn = random_orthogonal(10, 10, seed=3).double()
    assert float(linear_cka(x, x, debiased)) == pytest.approx(1)
    assert float(linear_cka(5 * x @ turn + 2, y, debiased)) == pytest.approx(
        float(linear_cka(x, y, debiased)), abs=1e-6
    )
    assert float(linear_cka(torch.ones(20, 3), x[:20].float(), debiased)) == 0           # no variance: guarded, not NaN


def test_hsic_is_the_formula(xy):
    x, y = (v[:30, :6] for v in xy)
    k, l = (v @ v.T for v in (x, y))
    k, l, n = k - k.diag().diag(), l - l.diag().diag(), 30
    want = ((k @ l).trace() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ l).sum()) / (n * (n - 3))
    assert float(hsic1(x, y)) == pytest.approx(float(want), rel=1e-9)


def test_cka_refuses_too_few_rows():
    with pytest.raises(ValueError, match="3 rows.*at least 4"): linear_cka(torch.randn(3, 2), torch.randn(3, 2))
    with pytest.raises(ValueError, match="64 and 63 rows"): linear_cka(torch.randn(64, 2), torch.randn(63, 2))


def test_cka_of_layers_refuses_short_batches_and_leaves_no_hook(models):
    a, b = models["llama"], models["qwen3"]
    ids = torch.arange(5, 11)[None]
    def hooks(): return sum(len(m._forward_hooks) for model in (a, b) for m in model.modules())
    before = hooks()
    with pytest.raises(ValueError, match="batch 0 has 2 tokens"): layer_cka(a, b, [dict(input_ids=ids[:, :3])])
    with pytest.raises(ValueError, match="no batches"): layer_cka(a, b, [])
    with pytest.raises(IndexError): layer_cka(a, b, [dict(input_ids=ids + 100_000)])
    assert hooks() == before


@pytest.mark.parametrize(
    "kind, golden",
    [
        (dict(kind="jsd", beta=0), 1.822630),
        (dict(kind="jsd", beta=0.1), 0.145486),
        (dict(kind="jsd", beta=0.5), 0.353154),
        (dict(kind="jsd", beta=0.9), 0.139909),
        (dict(kind="jsd", beta=1), 1.685124),
        (dict(kind="skew", skew=0.1), 1.199411),
        (dict(kind="forward"), 1.822630),
        (dict(kind="reverse"), 1.685124),
    ],
)
def test_divergence_goldens(kind, golden):
    assert float(divergence(S, T, **kind)) == pytest.approx(golden, abs=1e-5)
    assert float(divergence(T, T, **kind)) == pytest.approx(0, abs=1e-6)


def test_reversed_skew_golden(): assert float(divergence(T, S, "skew", skew=.1)) == pytest.approx(1.182269, abs=1e-5)


def test_temperature_scales_by_its_square():
    p, q = (T / 3).softmax(-1), (S / 3).softmax(-1)
    assert float(divergence(S, T, temperature=3.)) == pytest.approx(float(9 * (p * (p / q).log()).sum()), rel=1e-5)


@pytest.mark.parametrize("n, d_s, d_t", [(60, 8, 8), (60, 5, 8), (40, 3, 12)])
def test_procrustes_is_scipys_on_zero_padded_source(n, d_s, d_t):
    g = torch.Generator().manual_seed(n + d_s)
    s, t = torch.randn(n, d_s, generator=g, dtype=torch.float64), torch.randn(n, d_t, generator=g, dtype=torch.float64)
    w = procrustes(s, t, normalize=False)
    padded = np.hstack([s.numpy(), np.zeros((n, d_t - d_s))])
    r, _ = orthogonal_procrustes(padded, t.numpy())
    assert np.allclose(padded @ r, (s @ w.T).numpy(), atol=1e-9)
    assert torch.allclose(w.T @ w, torch.eye(d_s, dtype=torch.float64), atol=1e-9)
    best = float((t - s @ w.T).norm())
    for seed in range(5): assert float((t - s @ random_orthogonal(d_t, d_s, seed).double().T).norm()) > best


@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("d_s, d_t", [(6, 6), (6, 10)])
def test_procrustes_finds_a_planted_rotation(d_s, d_t, normalize):
    w, s = random_orthogonal(d_t, d_s, seed=1).double(), torch.randn(
        50, d_s, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    assert torch.allclose(procrustes(s, s @ w.T, normalize=normalize), w, atol=1e-6)
    shifted = procrustes(s + 3, s @ w.T - 7, center=True, normalize=False)
    assert torch.allclose(shifted, w, atol=1e-6)


def test_normalised_fit_has_the_best_mean_cosine():
    g = torch.Generator().manual_seed(0)
    s, t = torch.randn(80, 6, generator=g, dtype=torch.float64), torch.randn(80, 9, generator=g, dtype=torch.float64)
    cosine = lambda w: float(torch.cosine_similarity(s @ w.T, t).mean())
    best = cosine(procrustes(s, t))
    assert best > cosine(procrustes(s, t, normalize=False)) and all(
        best > cosine(random_orthogonal(9, 6, i).double()) for i in range(20)
    )


@pytest.mark.parametrize("n, d_s, d_t, words", [(50, 8, 5, "narrower"), (4, 8, 8, "4 rows cannot determine 8")])
def test_procrustes_refuses(n, d_s, d_t, words):
    s, t = torch.randn(n, d_s), torch.randn(n, d_t)
    with pytest.raises(ValueError, match=words): procrustes(s, t)
    assert torch.linalg.matrix_rank(procrustes(s, t, rank=3), atol=1e-4) == 3          # unless a rank is asked for


def test_procrustes_refuses_other_ranks_rows_and_numbers():
    s, t = torch.randn(50, 10), torch.randn(50, 12)
    with pytest.raises(ValueError, match="rank=11 is outside 1..10"): procrustes(s, t, rank=11)
    with pytest.raises(ValueError, match="same rows"): procrustes(s[:-1], t)
    with pytest.raises(ValueError, match="NaN"): procrustes(s * torch.nan, t)
    with pytest.warns(UserWarning, match="determine 3 of 10"): procrustes(s[:, :3] @ torch.randn(3, 10), t)
    with pytest.raises(ValueError, match="zeros"): map_angle(torch.zeros(3, 2), torch.eye(3)[:, :2])


CKA = torch.tensor([[.9, .2, .1], [.3, .6, .3], [.1, .2, .8], [-.1, -.2, -.1]])
ONES, HALF = torch.ones(4, 2), torch.ones(3, 2)


@pytest.mark.parametrize("call, message", [
    (dict(how="depth"), "unknown how='depth'"),
    (dict(how="kept"), "keep=None must be the 3 teacher layers"),
    (dict(how="kept", keep=[0, 4, 1]), "keep=.0, 4, 1. must be"),
    (dict(how="cka"), "CKA matrix .* is missing"),
    (dict(how="cka", cka=CKA.T), r"has shape \(3, 4\), expected \(4, 3\)"),
    (dict(how="cka", cka=CKA * torch.nan), "NaN"),
    (dict(how="cka", cka=CKA, top_k=4), "top_k=4 is outside 1..3"),
    (dict(top_k=2), "needs how='cka'"),
    (dict(how="effect"), "profiles .* missing"),
    (dict(how="effect", effects=(HALF, HALF)), r"shape \(3, 2\), expected \(4, roles\)"),
    (dict(how="effect", effects=(ONES, HALF[:, :1])), "2 and 1 roles"),
    (dict(how="effect", effects=(ONES, HALF * torch.nan)), "student's effect profile holds NaN"),
    (dict(how="effect", effects=(ONES * 0, HALF)), "teacher's effect profile is zero"),
], ids=str)
def test_layer_maps_refuse(call, message):
    with pytest.raises(ValueError, match=message) as e: map_layers(4, 3, **call)
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="at least 1"): map_layers(4, 0)


def test_rcid_loss_is_two_minus_two_cosine_and_has_its_floor():
    g = torch.Generator().manual_seed(5)
    w, d_s, d_t = random_orthogonal(8, 5), torch.randn(30, 5, generator=g), torch.randn(30, 8, generator=g)
    assert float(rcid_loss(d_s, d_t, w)) == pytest.approx(
        float(2 * (1 - torch.cosine_similarity(d_s @ w.T, d_t)).mean()), abs=1e-6
    )
    assert float(rcid_loss(d_t @ w, d_t, w)) == pytest.approx(float(rcid_floor(d_t, w)), abs=1e-6)
    assert rcid_loss(d_s, d_t, w) > rcid_floor(d_t, w) > 0


@pytest.mark.parametrize("n_t, n_s", [(6, 6), (30, 10), (36, 28), (32, 16), (4, 2), (5, 1)])
def test_proportional_map(n_t, n_s):
    m = map_layers(n_t, n_s)
    assert len(m) == n_t and m[-1] == n_s - 1 and sorted(m) == m and set(m) <= set(range(n_s))
    assert m == list(range(n_t)) or n_t != n_s
    assert all(abs((l + 1) / n_t - (x + 1) / n_s) <= .5 / n_s + 1e-9 or x == 0 for l, x in enumerate(m))


def test_maps_find_themselves():
    g = torch.Generator().manual_seed(0)
    profile = torch.rand(6, 4, generator=g)
    order = [4, 0, 5, 2, 1, 3]
    assert map_layers(6, 6, "effect", effects=(profile, profile[order])) == [order.index(l) for l in range(6)]
    assert map_layers(6, 6, "cka", cka=torch.eye(6)[:, order]) == [order.index(l) for l in range(6)]
    top = map_layers(4, 3, "cka", cka=torch.rand(4, 3, generator=g), top_k=2)
    assert all(abs(sum(w for _, w in row) - 1) < 1e-9 and row[0][1] >= row[1][1] for row in top)
