"""Shares of a gap worked out by hand on a model of two layers, the intervals over names, and the sites that mediate."""

import copy
from dataclasses import replace
import numpy as np
import pytest, torch
from conftest import ARCHS
from rcid.causal import Mediation, Site, answer_logit_diff, causal_effects, choose_sites, integrated_effects
from rcid.causal import all_positions, attribution_effects, load_mediation, mediation, naive_effects, read
from rcid.causal import integrated_fraction, score_sites
from rcid.causal.mediation import forced_cells
from rcid.causal.sites import _gradients_on_the_way
from rcid.core.resampling import band, name_weights
from rcid.core.tensors import save_tensors
from rcid.data import load_pairs
from rcid.data.pairs import ContrastiveDataset
from rcid.models import get_adapter, load_model

NAN, LARGE, SLOTS = float("nan"), 1e4, (2, 3)
ROWS = [(2, 5, 1), (1, 7, 3), (4, 6, 2), (3, 9, 1)]        # IO, S, tokens between S1 and S2


def hand_over(a: float, b: float):
    """Two layers that attend to all tokens alike: the first writes `a` times the mean value of the names so far into
    one slot, the second `b` times it into another; the answer reads both slots. Nothing else happens."""
    sizes = dict(layers=2, d_model=8, heads=1, kv_heads=1, head_dim=8, d_mlp=8)
    model, _ = load_model({"arch": "llama", **sizes}, dtype="float32", device="cpu")
    adapter = get_adapter(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name: weight.zero_()
        adapter.embed.weight[:, 0] = LARGE                 # the norms divide by this, whatever else is there
        adapter.embed.weight[1:10, 1] = torch.arange(1.0, 10.0)
        for token, sign in ((50, 1), (51, -1)): adapter.embed.weight[token, list(SLOTS)] = sign * 1000.0
        for layer, slot, weight in ((0, SLOTS[0], a), (1, SLOTS[1], b)):
            adapter.key_value_projections(layer)[1].weight[0, 1] = 1.0
            adapter.attention(layer).o_proj.weight[slot, 0] = weight * LARGE / 8**0.5
    return model


def sentences(io_s1_s2, keeps_answer: bool = False, rows=ROWS, width: int | None = None) -> ContrastiveDataset:
    "`20 IO S1 30 .. 30 S2 40`; `io_s1_s2` gives the three names of the corrupt prompt."
    width = width or max(n for _, _, n in rows) + 5
    clean, corrupt = torch.zeros(2, len(rows), width, dtype=torch.long)
    length = torch.tensor([n + 5 for _, _, n in rows])
    for i, (io, s, n) in enumerate(rows):
        for ids, (x, y, z) in ((clean, (io, s, s)), (corrupt, io_s1_s2(io, s))):
            ids[i, :n + 5] = torch.tensor([20, x, y, *[30] * n, z, 40])
    def at(position): return torch.zeros_like(length) + position
    positions = {"io": at(1), "s1": at(2), "s2": length - 2, "end": length - 1}
    modified = {r: bool((clean != corrupt).gather(1, p[:, None]).any()) for r, p in positions.items()}
    mask = (torch.arange(width) < length[:, None]).long()
    entities = torch.tensor([[io, s] for io, s, _ in rows])
    pairs = ContrastiveDataset(clean, corrupt, mask, length - 1, at(50), at(51), positions, modified, at(0), entities)
    object.__setattr__(pairs, "keeps_answer", keeps_answer)
    return pairs


def s2_is_io(io, s): return io, s, io


def names_exchanged(io, s): return s, io, io


def other_order(io, s): return s, io, s


@pytest.fixture(scope="module")
def kinds():
    return {
        "s2": sentences(s2_is_io),
        "names": sentences(names_exchanged),
        "order": sentences(other_order, keeps_answer=True),
    }


@pytest.fixture
def model(models): return models["qwen3"]


def ioi(arch, tokenizers, n=12): return load_pairs("ioi", tokenizers[arch], split="train", n=n)


def positive(model, pairs):
    "The same pairs, each in the direction in which this random model has a positive gap."
    clean, corrupt = answer_logit_diff(model, pairs)
    swap = (clean < corrupt)[:, None]
    ids = pairs.clean_ids, pairs.corrupt_ids
    return replace(pairs, clean_ids=ids[1].where(swap, ids[0]), corrupt_ids=ids[0].where(swap, ids[1]))


def made(effects, gaps, entities=None, roles=("s2", "end"), kind="s2") -> Mediation:
    "Effects (pair, layer, role) of one kind; the last layer is forced."
    effects = torch.as_tensor(effects, dtype=torch.float32)
    forced = torch.zeros(effects.shape[1:], dtype=torch.bool)
    forced[-1] = True
    if entities is None: entities = torch.arange(len(effects))[:, None]
    return Mediation({kind: effects}, {kind: torch.tensor(gaps)}, {kind: forced}, list(roles), entities)


def textbook(gaps, n_layers=6):
    "S2 has all of the gap up to the middle, END from there on, with a layer where each has half."
    gaps = torch.tensor(gaps)
    at_s2 = torch.tensor([1.0] * (n_layers // 2 - 1) + [0.5] + [0.0] * (n_layers // 2))
    return torch.stack([gaps[:, None] * at_s2, gaps[:, None] * (1 - at_s2)], -1)


# worked out by hand


@pytest.mark.parametrize("a, b", ((3.0, 1.0), (1.0, 3.0), (2.0, 0.0), (0.0, 1.0)))
def test_what_waits_at_s2_and_what_has_arrived(kinds, a, b):
    found = mediation(hand_over(a, b), kinds["s2"])
    share = b / (a + b)
    want = torch.tensor([[0, 0, share, 1 - share], [0, 0, 0, 1]])
    assert repr(found) == "Mediation(classic: 4 pairs; 2 layers x io, s1, s2, end)"
    assert found.kinds == ["classic"] and found.n_layers == 2 and found.roles == ["io", "s1", "s2", "end"]
    assert torch.allclose(found.fraction[0], want, atol=1e-5)
    m = min(share, 1 - share)
    assert torch.allclose(found.mediating()[0], torch.tensor([[NAN, NAN, m, m], [NAN] * 4]), atol=1e-5, equal_nan=True)


def test_the_effects_are_the_means_that_the_layers_move(kinds):
    found = mediation(hand_over(3.0, 1.0), kinds)
    length, io, s = kinds["s2"].answer_pos + 1, *kinds["s2"].entity_ids.T
    unit = 2000 * 8**0.5 / LARGE * (s - io) / length       # logits that one of the three names is worth
    assert torch.allclose(found.gaps["s2"], 4 * unit, rtol=1e-5)
    assert torch.allclose(found.gaps["names"], 4 * unit, rtol=1e-5)
    assert torch.equal(found.gaps["order"], found.gaps["s2"])              # keeps the answer: in units of the classic
    zero = 0 * unit
    first = dict(s2=[zero, zero, unit, 3 * unit], names=[-unit, unit, unit, 3 * unit], order=[-unit, unit, zero, zero])
    for kind, at_roles in first.items():
        assert torch.allclose(found.effects[kind][:, 0], torch.stack(at_roles, 1), atol=1e-5 * float(unit.max())), kind
    want = torch.tensor([[0, 0, 0.25, 0.75], [-0.25, 0.25, 0.25, 0.75], [-0.25, 0.25, 0, 0]])
    assert torch.allclose(found.fraction[:, 0], want, atol=1e-5)
    assert [(kind, site) for kind, site, _ in found.outside()] == [("names", (0, "io")), ("order", (0, "io"))]
    assert found.outside()[0][2] == pytest.approx(-0.25, abs=1e-5)
    forced = [[True, True, False, False], [False] * 4, [False] * 4]
    assert [found.forced[k][0].tolist() for k in found.kinds] == forced
    assert all(found.forced[k][1].all() for k in found.kinds)
    assert found.mediating()[1:, 0, 0].isnan().all() and found.mediating()[1, 0, 1] == pytest.approx(0.25, abs=1e-5)


def test_shares_of_all_positions_add_up_where_nothing_bends(kinds):
    model = hand_over(3.0, 1.0)
    for pairs in (kinds["s2"], kinds["names"]):
        effects = causal_effects(model, pairs, all_positions(model, pairs)).view(len(pairs), 2, -1)
        clean, corrupt = answer_logit_diff(model, pairs)
        assert torch.allclose(effects.sum(-1), (clean - corrupt)[:, None].expand(-1, 2), rtol=1e-4)


def test_a_kind_with_fewer_rows_and_other_padding(kinds):
    model = hand_over(3.0, 1.0)
    short = {"s2": kinds["s2"], "names": sentences(names_exchanged, rows=ROWS[:2], width=30)}
    found, full = mediation(model, short), mediation(model, kinds)
    assert len(found.effects["names"]) == 2 and torch.allclose(found.fraction, full.fraction[:2], atol=1e-5)
    assert torch.allclose(found.effects["names"], full.effects["names"][:2], atol=1e-5)
    few = {"s2": kinds["s2"], "order": sentences(other_order, True, ROWS[:3])}
    assert torch.equal(mediation(model, few).gaps["order"], full.gaps["s2"][:3])
    weights = np.array([[1.0, 0, 0, 0], [0, 0, 1, 1]])     # of no row that `names` has: undefined there
    by_weights = found.weighted(weights)
    assert by_weights.shape == (2, 2, 2, 4) and np.isnan(by_weights[1, 1]).all() and np.isfinite(by_weights[:, 0]).all()


def test_long_sentences_weigh_as_much_as_their_gap(kinds):
    "A ratio of means, not a mean of ratios: on two rows whose effects and gaps are 3 of 4 and 0 of 2 it is 1/2."
    two = made([[[3.0, 1.0], [0.0, 4.0]], [[0.0, 2.0], [0.0, 2.0]]], [4.0, 2.0])
    assert two.fraction[0].tolist() == [[0.5, 0.5], [0.0, 1.0]]
    assert two.weighted([[1, 3]])[0, 0, 0].tolist() == [0.3, 0.7]


# against the oracle, and what stays as it was


@pytest.mark.parametrize("arch", ARCHS)
def test_fraction_is_the_oracle_s_mean_effect_over_the_mean_gap(arch, models, tokenizers):
    model = models[arch]
    pairs = positive(model, ioi(arch, tokenizers))
    found, n, roles = mediation(model, {"s2": pairs}), get_adapter(model).n_layers, len(pairs.roles)
    want = naive_effects(model, pairs).view(len(pairs), n, roles)
    clean, corrupt = answer_logit_diff(model, pairs)
    scale = (clean - corrupt).mean()
    assert torch.allclose(found.effects["s2"], want, atol=float(1e-4 * scale))
    assert torch.allclose(found.gaps["s2"], clean - corrupt, atol=float(1e-4 * scale))
    assert not found.no_gap() and torch.allclose(found.fraction[0], want.mean(0) / scale, atol=1e-4)
    forced = forced_cells(pairs, n)
    assert torch.equal(found.forced["s2"], forced)
    ends = torch.zeros(n, roles)
    ends[-1, pairs.roles.index("end")] = 1.0
    assert torch.allclose(found.fraction[0][forced], ends[forced], atol=1e-5)
    for other in (mediation(model, pairs, batch_size=3), mediation(model, pairs, memory=3_000_000)):
        assert torch.allclose(other.fraction[0], found.fraction[0], atol=1e-4)


def test_the_slow_path_gives_the_gap_too(models, tokenizers):
    strange = copy.deepcopy(models["llama"])
    strange.config.layer_types = ["strange_attention"] * get_adapter(strange).n_layers
    pairs = ioi("llama", tokenizers, n=70)                 # more than the oracle takes at once
    with pytest.warns(UserWarning, match="slow path"): found = mediation(strange, pairs)
    clean, corrupt = answer_logit_diff(models["llama"], pairs)
    assert torch.allclose(found.gaps[found.kinds[0]], clean - corrupt, atol=1e-5)


def test_a_model_comes_back_as_it_was(models, tokenizers):
    model = copy.deepcopy(models["qwen3"]).to(torch.bfloat16).train()
    get_adapter(model).embed.weight.requires_grad_(False)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [p.requires_grad for p in model.parameters()]
    pairs = ioi("qwen3", tokenizers)
    def hooks(): return [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    before = hooks()                         # a library may have left its own
    found = mediation(model, pairs)
    integrated_effects(model, pairs), attribution_effects(model, pairs)
    assert all(e.dtype == torch.float32 and e.device.type == "cpu" for e in found.effects.values())
    assert model.training and all(m.training for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == grads and all(p.grad is None for p in model.parameters())
    assert hooks() == before
    assert all(torch.equal(v, state[k]) and v.dtype == state[k].dtype for k, v in model.state_dict().items())


def test_twice_is_the_same(model, tokenizers):
    pairs = ioi("qwen3", tokenizers)
    one, two = mediation(model, pairs), mediation(model, pairs)
    assert all(torch.equal(one.effects[kind], two.effects[kind]) for kind in one.kinds)
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(one.interval(50), two.interval(50)))


# no gap


def test_a_textbook_curve_on_a_negative_gap_is_refused():
    gaps = [-1.1 + 0.1 * (i % 5 - 2) for i in range(40)]
    effects = textbook(gaps)
    student = made(effects, gaps)
    ratio = effects.sum(0) / sum(gaps)
    assert ratio[:, 0].tolist() == pytest.approx([1, 1, 0.5, 0, 0, 0], abs=1e-5)          # what F would look like
    why = student.no_gap()["s2"]
    assert why.startswith("no gap: it is negative (-1.10 logits, 95 % interval -1.") and "\n" not in why
    assert student.fraction.isnan().all() and student.mediating().isnan().all() and student.outside() == []
    assert np.isnan(student.interval(50)[0]).all()
    right = made(textbook([-g for g in gaps]), [-g for g in gaps])
    assert right.no_gap() == {} and torch.allclose(right.fraction[0, :, 0], torch.tensor([1, 1, 0.5, 0, 0, 0]))


def test_reasons_for_no_gap():
    rng = np.random.default_rng(0)
    unsure = rng.normal(0.05, 1.0, 40).tolist()
    assert "its interval is not above 0" in made(textbook(unsure), unsure).no_gap()["s2"]
    small, large = [0.3] * 40, [4.0] * 40
    student, teacher = made(textbook(small), small), made(textbook(large), large)
    assert student.no_gap() == {} and teacher.no_gap(student) == {}
    assert student.no_gap(teacher) == {"s2": "no gap: 0.30 logits are less than 10 % of the teacher's 4.00"}
    enough = made(textbook([0.4] * 40), [0.4] * 40)
    assert enough.no_gap(teacher) == {}
    assert enough.no_gap(made(textbook(large), large, kind="names")) == {}                 # not a kind of the teacher


def test_a_kind_without_a_gap_does_not_touch_the_others(kinds):
    found = mediation(hand_over(3.0, 1.0), kinds)
    gaps = {**found.gaps, "names": -found.gaps["names"]}
    bad = replace(found, gaps=gaps)
    assert list(bad.no_gap()) == ["names"] and bad.fraction[1].isnan().all()
    assert torch.equal(bad.fraction[0], found.fraction[0]) and torch.equal(bad.fraction[2], found.fraction[2])


# names


def test_name_weights_by_hand():
    pairs, n = [(7, 3), (3, 9), (9, 9), (7, 9)], 20
    got = name_weights(torch.tensor(pairs), n, seed=5)
    counts = np.random.default_rng(5).multinomial(3, [1 / 3] * 3, size=n)
    for row, (c3, c7, c9) in zip(got, counts): assert row.tolist() == [c7 * c3, c3 * c9, c9, c7 * c9]
    assert np.array_equal(got, name_weights(np.array(pairs), n, seed=5))
    assert not np.array_equal(got, name_weights(pairs, n, seed=6))


def test_the_interval_of_f_by_hand(kinds):
    found = mediation(hand_over(3.0, 1.0), {"s2": kinds["s2"], "names": sentences(names_exchanged, rows=ROWS[:3])})
    noise = torch.randn(4, 2, 4, generator=torch.Generator().manual_seed(0)) * 0.02
    found = replace(found, effects={**found.effects, "s2": found.effects["s2"] + noise})
    weights, values = name_weights(found.entities, 200, seed=1), {k: [] for k in found.kinds}
    for w in weights:
        for kind in found.kinds:
            rows = range(len(found.effects[kind]))
            gap = sum(w[i] * float(found.gaps[kind][i]) for i in rows)
            moved = sum(w[i] * float(found.effects[kind][i, 0, 2]) for i in rows)
            if gap > 0: values[kind].append(moved / gap)
    low, high = found.interval(200, seed=1)
    for j, kind in enumerate(found.kinds):
        assert low[j, 0, 2] == pytest.approx(np.quantile(values[kind], 0.025), abs=1e-6)
        assert high[j, 0, 2] == pytest.approx(np.quantile(values[kind], 0.975), abs=1e-6)
    mean, low, high = found.gap_interval("s2", 200, seed=1)
    gap = found.gaps["s2"].double().numpy()
    means = [w @ gap / w.sum() for w in weights if w.sum()]
    assert mean == pytest.approx(gap.mean()) and low == pytest.approx(np.quantile(means, 0.025))
    assert high == pytest.approx(np.quantile(means, 0.975))


def test_names_that_matter_widen_the_interval():
    "Effects that belong to the names, many pairs a name: drawing pairs would be sure of what it cannot know."
    rng = np.random.default_rng(0)
    pairs = np.array([(i, j) for i in range(12) for j in range(12) if i != j])
    of_name = rng.normal(0.5, 0.2, 12)
    share = torch.tensor(of_name[pairs].mean(1), dtype=torch.float32)                      # of S2, in the first layer
    effects = torch.stack([torch.stack([share, 1 - share], 1), torch.tensor([[0.0, 1.0]]).expand(len(pairs), 2)], 1)
    width = {}
    for what, entities in {"names": pairs, "pairs": np.arange(len(pairs))[:, None]}.items():
        low, high = made(effects, [1.0] * len(pairs), torch.tensor(entities)).interval(500)
        width[what] = high[0, 0, 0] - low[0, 0, 0]
    assert width["names"] > 2 * width["pairs"] > 0


def test_band_and_bad_input():
    values = np.array([[1.0, NAN], [2.0, NAN], [NAN, NAN], [3.0, NAN]])
    low, high = band(values, 0.5)
    assert (low[0], high[0]) == (1.5, 2.5) and np.isnan(low[1]) and np.isnan(high[1])
    for call, why in (
        (lambda: band(np.zeros((0, 2))), "no resamples"),
        (lambda: band([1.0], 2), "level = 2"),
        (lambda: name_weights(np.zeros((0, 2))), "no pairs"),
        (lambda: name_weights([[1, 2]], n=0), "n = 0"),
    ):
        with pytest.raises(ValueError, match=why) as e: call()
        assert "\n" not in str(e.value)


# parts of it


def test_behavioural_share_is_r_squared():
    rng = np.random.default_rng(0)
    gap = rng.normal(3.0, 1.0, 50)
    columns = [0.8 * gap, rng.normal(size=50), np.full(50, 2.0), 0.3 * gap + 0.3 * rng.normal(size=50)]
    effects = np.stack([columns, columns], 0).transpose(2, 0, 1)                           # (pair, layer, role)
    found = made(effects, gap.astype(np.float32), roles="abcd")
    got = found.behavioural_share()[0]
    want = [np.corrcoef(c, gap)[0, 1] ** 2 if c.std() > 1e-9 else NAN for c in columns]
    assert got.shape == (2, 4) and np.allclose(got[0], want, atol=1e-5, equal_nan=True) and got[0, 2].isnan()
    assert made(effects, [1.0] * 50, roles="abcd").behavioural_share().isnan().all()       # a gap that does not vary
    tiny = effects * 0 + 1e-6 * rng.normal(size=effects.shape)                             # rounding is no variation
    assert made(tiny, gap.astype(np.float32), roles="abcd").behavioural_share().isnan().all()


def test_behavioural_share_of_the_answer_is_one(kinds):
    share = mediation(hand_over(3.0, 1.0), kinds["s2"]).behavioural_share()[0]
    assert share[1, 3] == pytest.approx(1, abs=1e-5) and share[0, 2:].tolist() == pytest.approx([1, 1], abs=1e-5)
    assert share[0, :2].isnan().all() and share[1, :3].isnan().all()


def test_m_and_what_is_outside():
    f = [[1.0, 0.0, 1.1, 1.11], [0.4, 0.6, -0.1, -0.11], [0.0, 1.0, 0.0, 0.0]]             # (layer, role)
    found = made(np.array([f] * 3) * 2, [2.0] * 3, roles="abcd")
    want = [[0, 0, 0, NAN], [0.4, 0.4, 0, NAN], [NAN] * 4]
    assert torch.allclose(found.mediating()[0], torch.tensor(want), atol=1e-6, equal_nan=True)
    assert [site for _, site, _ in found.outside()] == [Site(0, "d"), Site(1, "d")]


def test_take(kinds):
    found = mediation(hand_over(3.0, 1.0), {"s2": kinds["s2"], "names": sentences(names_exchanged, rows=ROWS[:2])})
    some = found.take([3, 1, 2])
    assert some.entities.tolist() == [[1, 7], [3, 9], [4, 6]]              # the row that both kinds have comes first
    assert torch.equal(some.effects["s2"], found.effects["s2"][[1, 3, 2]])
    assert torch.equal(some.effects["names"], found.effects["names"][[1]]) and len(some.gaps["names"]) == 1
    assert torch.equal(found.take(slice(None)).fraction, found.fraction)
    assert torch.equal(found.take(torch.tensor([True, False, True, False])).entities, found.entities[[0, 2]])
    none_left = found.take([2, 3])
    assert none_left.no_gap() == {"names": "no gap: none of its rows is left"} and none_left.fraction[1].isnan().all()
    assert none_left.behavioural_share()[1].isnan().all()
    with pytest.raises(ValueError, match="no rows"): found.take([])
    with pytest.raises(IndexError): found.take([4])


def test_save_and_load(kinds, tmp_path):
    found = mediation(hand_over(3.0, 1.0), kinds)
    path = found.save(tmp_path/"map.safetensors")
    again = load_mediation(path)
    assert again.kinds == found.kinds and again.roles == found.roles
    for part in ("effects", "gaps", "forced"):
        assert all(torch.equal(getattr(again, part)[k], getattr(found, part)[k]) for k in found.kinds)
    assert torch.equal(again.fraction, found.fraction) and again.mediating().isnan().any()
    assert all(np.array_equal(a, b) for a, b in zip(again.interval(50), found.interval(50)))
    before = path.read_bytes()
    assert found.save(path).read_bytes() == before
    other = save_tensors(tmp_path/"other.safetensors", {"entities": found.entities})
    with pytest.raises(ValueError, match="holds no mediation"): load_mediation(other)
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(ValueError, match="SHA-256"): load_mediation(path)


# bad input


def test_parts_that_do_not_fit():
    good = made(textbook([1.0] * 4), [1.0] * 4)
    effects, gaps, forced = good.effects["s2"], good.gaps["s2"], good.forced["s2"]
    for change, why in (
        (dict(effects={}), "no kind of corruption"),
        (dict(gaps={"names": gaps}), "parts of different kinds"),
        (dict(effects={"s2": effects[:, :, :1]}), r"have shape \(4, 6, 1\), not \(pair, 6, 2\)"),
        (dict(gaps={"s2": gaps[:2]}), "2 gaps for 4 rows of 's2'"),
        (dict(forced={"s2": forced[:2]}), "forced cells of 's2'"),
        (dict(entities=good.entities[:3]), "4 rows of 's2' for the names of 3 pairs"),
        (dict(effects={"s2": effects * NAN}), "NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=why) as e: replace(good, **change)
        assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match=r"weights of shape \(1, 3\)"): good.weighted(np.ones((1, 3)))


def test_kinds_that_are_not_of_the_same_rows(kinds):
    model, s2 = hand_over(3.0, 1.0), kinds["s2"]
    long = sentences(names_exchanged, rows=[(2, 5, 1), (1, 7, 2), (4, 6, 2), (3, 9, 1)])
    other_roles = replace(s2, key_positions={r: p for r, p in s2.key_positions.items() if r != "io"})
    for given, why in (
        ({}, "no pairs given"),
        ({"s2": s2, "names": kinds["names"][[0, 2, 1, 3]]}, "row 1 of 'names' is not row 1 of 's2'"),
        ({"s2": s2, "names": long}, "row 1 of 'names'"),
        ({"s2": s2, "names": replace(kinds["names"], wrong_token_id=s2.wrong_token_id + 1)}, "row 0 of 'names'"),
        ({"s2": s2[:2], "names": kinds["names"]}, "4 rows of 'names', 2 of 's2'"),
        ({"s2": s2, "names": other_roles}, "roles of 'names'"),
        ({"order": kinds["order"], "s2": s2}, "'order' keeps the answer"),
        (kinds["order"], "keeps the answer"),
        (s2[:0], "no pairs given"),
    ):
        with pytest.raises(ValueError, match=why) as e: mediation(model, given)
        assert "\n" not in str(e.value)


# sites


def test_choices_by_name(kinds):
    pairs = kinds["s2"]
    table = score_sites(hand_over(3.0, 1.0), pairs, "mediation")
    assert torch.allclose(table, torch.tensor([[NAN, NAN, 0.25, 0.25], [NAN] * 4]), atol=1e-5, equal_nan=True)
    chosen = choose_sites(table, pairs, 6, choice="mediating")
    assert sorted(chosen.selected) == [(0, "end"), (0, "s2")] and chosen.held_out == []
    every = choose_sites(table, pairs, choice="all")
    assert every.selected == [(0, "s2"), (0, "end"), (1, "s2")]            # zeros included, the answer not
    effect = score_sites(hand_over(3.0, 1.0), pairs)
    assert choose_sites(effect, pairs, 2, 0.0, 1, True) == choose_sites(effect, pairs, 2, held_out=True, choice="top")
    assert choose_sites(effect, pairs, choice="all") == every
    both = choose_sites(table, pairs, 1, held_out=True, choice="mediating")
    assert len(both.selected) == len(both.held_out) == 1 and both.selected != both.held_out


def test_mediating_sites_are_of_both_kinds_of_role(kinds):
    pairs = kinds["s2"]                                    # S2 is modified, END is not
    table = torch.full((6, 4), NAN)
    table[:5, 2], table[:5, 3] = torch.tensor([0.5, 0.4, 0.3, 0.2, 0.0]), torch.tensor([0.0, 0.1, 0.05, 0.0, 0.0])
    assert choose_sites(table, pairs, 4, choice="mediating").selected == [(0, "s2"), (1, "s2"), (1, "end"), (2, "end")]
    table[:, 3] = 0.0
    only = choose_sites(table, pairs, 4, choice="mediating").selected
    assert only == [(0, "s2"), (1, "s2"), (2, "s2"), (3, "s2")]            # no unmodified one has any


def test_no_mediating_site_is_said(kinds):
    pairs = kinds["s2"]
    table = score_sites(hand_over(0.0, 1.0), pairs, "mediation")                         # one layer moves all of it
    with pytest.raises(ValueError, match="no mediating site: .* use the route") as e:
        choose_sites(table, pairs, 2, choice="mediating")
    assert "\n" not in str(e.value)
    effect = score_sites(hand_over(3.0, 1.0), pairs) * 100
    for call, why in (
        (lambda: choose_sites(table, pairs, 2, choice="best"), "unknown choice 'best'"),
        (lambda: choose_sites(table, pairs, choice="mediating"), "k = None"),
        (lambda: choose_sites(table, pairs, 0), "k = 0"),
        (lambda: choose_sites(table, pairs, choice="all", held_out=True), "no site to hold out"),
        (lambda: choose_sites(effect, pairs, 2, choice="mediating"), "m is never above 0.5"),
        (lambda: choose_sites(table * NAN, pairs, 2), "no site has a score"),
        (lambda: score_sites(hand_over(-3.0, -1.0), pairs, "mediation"), "score 'mediation': no gap: it is negative"),
        (lambda: score_sites(hand_over(3.0, 1.0), pairs, "mediation", per_pair=True), "ratio of means"),
    ):
        with pytest.raises(ValueError, match=why) as e: call()
        assert "\n" not in str(e.value)


# the prefilter


def test_where_nothing_bends_the_estimate_is_the_effect(kinds):
    model = hand_over(3.0, 1.0)
    for kind, pairs in kinds.items():
        exact = causal_effects(model, pairs)
        scale = float(exact.abs().max())
        for steps in (1, 4):
            assert torch.allclose(integrated_effects(model, pairs, steps=steps), exact, atol=1e-3 * scale), kind
    found = score_sites(model, kinds["s2"], "integrated"), score_sites(model, kinds["s2"], "mediation")
    assert torch.allclose(*found, atol=1e-3, equal_nan=True)


def test_the_estimate_conserves_the_gap_at_the_answer(models, tokenizers):
    for arch in ARCHS:
        model, pairs = models[arch].requires_grad_(False), ioi(arch, tokenizers, n=5)
        clean, corrupt = answer_logit_diff(model, pairs)
        last = [Site(get_adapter(model).n_layers - 1, "end")]
        whole = integrated_effects(model, pairs, last, batch_size=2)[:, 0]
        assert torch.allclose(whole, clean - corrupt, atol=float(1e-2 * (clean - corrupt).abs().mean())), arch
        model.requires_grad_(True)


def test_the_start_of_the_way_is_attribution_patching(models, tokenizers):
    model, pairs = models["llama"], ioi("llama", tokenizers, n=5)
    layers = [Site(l) for l in range(get_adapter(model).n_layers)]
    clean, corrupt = (read(model, ids, layers, pairs.attention_mask) for ids in (pairs.clean_ids, pairs.corrupt_ids))
    gradients = _gradients_on_the_way(model, pairs, clean, corrupt, 0.0)
    want = attribution_effects(model, pairs).view(len(pairs), len(layers), -1)
    for l, site in enumerate(layers):
        every = ((clean[site] - corrupt[site]) * gradients[l]).sum(-1)
        at_roles = torch.stack([every.gather(1, p[:, None])[:, 0] for p in pairs.key_positions.values()], 1)
        assert torch.allclose(at_roles, want[:, l], atol=float(1e-4 * want.abs().max())), l


def test_a_layer_s_estimates_share_the_gap(models, tokenizers):
    for arch in ARCHS:
        model = models[arch]
        pairs = positive(model, ioi(arch, tokenizers, n=6))
        share = integrated_fraction(model, pairs, batch_size=4)
        every = integrated_effects(model, pairs, all_positions(model, pairs)).view(len(pairs), len(share), -1).sum(0)
        at_roles = integrated_effects(model, pairs).view(len(pairs), *share.shape).sum(0)
        want = at_roles / every.sum(-1, keepdim=True)
        known = (every.sum(-1) > 0)[:, None].expand_as(want)
        assert known[-1].all() and share.isnan().equal(~known), arch
        assert torch.allclose(share[known], want[known], atol=1e-3), arch
        assert torch.allclose(share[-1, pairs.roles.index("end")], torch.tensor(1.0), atol=1e-4)
