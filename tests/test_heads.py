"""Heads matched by what they do: found again in a rewritten model, groups together, and not in noise."""
from dataclasses import replace
import numpy as np
import pytest, torch
from rcid.causal import all_parts, answer_logit_diff, naive_effects
from rcid.causal.mediation import Mediation
from rcid.data import load_kinds
from rcid.eval.heads import HeadMap, _pairing, fingerprint_by_head, head_map, match_heads
from rcid.models import shrink
from rcid.models.rewrite import head_orders, permuted_heads

SIZES = {"qwen3": dict(heads=8, kv_heads=4), "llama": dict(heads=4, kv_heads=4), "qwen2": dict(heads=4, kv_heads=1)}


@pytest.fixture(scope="module", params=SIZES)
def case(request, make_model, tokenizers):
    "A random model and pairs whose gap it has: the answer is what its own clean prompt speaks for."
    arch = request.param
    model = make_model(arch, layers=3, **SIZES[arch])
    kinds = load_kinds("ioi", tokenizers[arch], ["s2", "s2_new"], split="train", n=40)
    clean, corrupt = answer_logit_diff(model, kinds["s2"])
    for kind, p in kinds.items():
        one, other = p.correct_token_id, p.wrong_token_id
        right, wrong = torch.where(clean > corrupt, one, other), torch.where(clean > corrupt, other, one)
        kinds[kind] = replace(p, correct_token_id=right, wrong_token_id=wrong)
    return model, kinds


def test_a_map_holds_the_effects_of_all_heads(case):
    model, kinds = case
    m, p = head_map(model, kinds), kinds["s2"]
    clean, corrupt = answer_logit_diff(model, p)
    assert torch.allclose(m.read.gaps["s2"], clean - corrupt, atol=1e-4) and bool((m.read.gaps["s2"] > 0).all())
    want = naive_effects(model, p[:6], all_parts(model, p[:6]))
    assert torch.allclose(m.read.effects["s2"][:6].flatten(1), want, atol=1e-4)
    v, gap = m.values(), float((clean - corrupt).double().mean())
    end, io = p.roles.index("end"), p.roles.index("io")
    mean = float(m.read.effects["s2"][:, 1, 2 * len(p.roles) + end].double().mean())
    assert np.isclose(v[1, 2, end, 0], mean / gap) and v.shape == (3, m.n_heads, len(p.roles), 2)
    assert (v[:, :, io] == 0).all() and (v[-1, :, :end] == 0).all()                  # decided by identities
    forced = m.read.forced["s2"].view(3, m.n_heads, -1)
    assert forced[:, :, io].all() and not forced[:, :, end].any() and forced[-1, :, :end].all()


def test_a_rewritten_model_is_the_same_once_its_heads_are_matched(case):
    model, kinds = case
    of_model, of_other = head_map(model, kinds), head_map(permuted_heads(model, seed=4), kinds)
    report = fingerprint_by_head(of_model, of_other, n_boot=20)
    assert report.matched.raw >= .98 > report.by_number.raw and report.unmatched < 1e-9
    orders = head_orders(3, of_model.n_heads, of_model.n_groups, seed=4).tolist()
    assert report.layers == [(0, 0), (1, 1), (2, 2)]
    for order, heads in zip(orders, report.heads): assert sorted(heads) == sorted((t, s) for s, t in enumerate(order))
    assert report.n_chosen + report.n_read <= 40 and min(report.n_chosen, report.n_read) >= 2
    assert set(report.to_dict()["matched"]) == set(vars(report.matched))


def test_groups_are_matched_as_wholes(case):
    model, kinds = case
    other = permuted_heads(model, seed=1)
    groups = [head_map(m, kinds, "group") for m in (model, other)]
    assert groups[0].n_heads == groups[0].n_groups == SIZES[model.config.model_type]["kv_heads"]
    layers, found = match_heads(*groups)
    size = model.config.num_attention_heads // groups[0].n_heads
    for order, pairs in zip(head_orders(3, model.config.num_attention_heads, groups[0].n_heads, 1).tolist(), found):
        assert sorted(pairs) == sorted((order[s * size] // size, s) for s in range(groups[0].n_heads))
    assert fingerprint_by_head(*groups, n_boot=20).matched.raw >= .98


def test_a_shorter_model_is_matched_at_its_depth(case):
    model, kinds = case
    report = fingerprint_by_head(head_map(model, kinds), head_map(shrink(model, [0, 2]), kinds), n_boot=20)
    assert report.layers == [(1, 0), (2, 1)] and len(report.heads) == 2


def test_the_cheapest_pairing_by_hand():
    greedy_is_wrong = np.array([[1., 2.], [2., 10.]])
    assert sorted(_pairing(greedy_is_wrong, 2, 2)) == [(0, 1), (1, 0)]
    # one by one 0-0, 1-2, 2-1, 3-3 would cost nothing, and tear both groups apart
    cost = np.array([[0., 3, 9, 9], [9, 9, 0, 3], [3, 0, 9, 9], [9, 9, 3, 0]])
    assert sorted(_pairing(cost, 4, 4)) == [(0, 0), (1, 2), (2, 1), (3, 3)]
    # groups 0-0 and 1-1: 0-0, 1-1 (0 + 9) and 2-2, 3-3 (9 + 0); groups crossed: 0-3, 1-2 (9 + 0), 2-1, 3-0 (0 + 9)
    cost[0, 3] = 8
    assert sorted(_pairing(cost, 2, 2)) == [(0, 3), (1, 2), (2, 1), (3, 0)]
    assert _pairing(np.array([[5., 1., 4.]]), 1, 1) == [(0, 1)]                            # two heads stay alone


def made_map(v, groups=None, noise=0., pairs=64, seed=0, role="end") -> HeadMap:
    "A map of one kind and one role whose V is (layer, head), with noise from pair to pair."
    v, g = torch.as_tensor(np.asarray(v), dtype=torch.float32), torch.Generator().manual_seed(seed)
    effects = 2 * v.expand(pairs, *v.shape) + noise * torch.randn(pairs, *v.shape, generator=g)    # the gap is 2
    names = torch.arange(2 * pairs).view(pairs, 2)
    columns = [f"head {i} {role}" for i in range(v.shape[1])]
    forced = dict(s2=torch.zeros(v.shape, dtype=torch.bool))
    read = Mediation(dict(s2=effects), dict(s2=torch.full((pairs,), 2.)), forced, columns, names)
    return HeadMap(read, [role], v.shape[1], groups or v.shape[1])


def test_heads_without_a_partner_are_counted_by_hand():
    teacher, student = made_map([[.5, .1, .4, .2], [0] * 4]), made_map([[.4, .5], [0] * 2])
    report = fingerprint_by_head(teacher, student, n_boot=5)
    assert report.heads[0] == [(0, 1), (2, 0)]
    assert np.isclose(report.unmatched, (.1**2 + .2**2) / (.5**2 + .1**2 + .4**2 + .2**2))


def test_agreement_is_not_found_in_noise():
    "Maps of nothing but noise: matched and read on the same pairs they agree, on other names they do not."
    def read(seed, honest):
        teacher, student = (made_map(np.zeros((4, 12)), noise=1., seed=s) for s in (2 * seed, 2 * seed + 1))
        choose = None if honest else (teacher, student)
        return fingerprint_by_head(teacher, student, choose, n_boot=1).matched.raw
    assert np.mean([read(s, False) for s in range(10)]) > .8
    assert abs(np.mean([read(s, True) for s in range(10)])) < .15


def test_maps_that_do_not_belong_together_are_one_line(case):
    model, kinds = case
    ours, one = made_map([[.5, .1], [.3, .2]]), made_map([[.5, .1], [.3, .2]], role="s2")
    bad = [
        ("other roles: the teacher has end, the student s2", lambda: fingerprint_by_head(ours, one)),
        ("on other pairs", lambda: fingerprint_by_head(ours, made_map([[.5, .1], [.3, .2]], pairs=32))),
        ("halves of the names have", lambda: fingerprint_by_head(*[made_map([[.5, .1]], pairs=2)] * 2)),
        ("part='mlp': use head or group", lambda: head_map(model, kinds, "mlp")),
        ("no pairs given", lambda: head_map(model, {})),
    ]
    for words, ask in bad:
        with pytest.raises(ValueError, match=words) as e: ask()
        assert "\n" not in str(e.value)
