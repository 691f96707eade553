"""A model and its rewrites are the same to every reading of mechanism: a small model that was trained on IOI, and
SmolLM2."""

import pytest, torch
from conftest import real
from rcid.causal.effects import run_logit_diff
from rcid.causal.mediation import Mediation, mediation
from rcid.data import load_kinds
from rcid.eval.fingerprint import fingerprint
from rcid.eval.interchange import interchange_agreement
from rcid.eval.pairwise import partial_consistency
from rcid.eval.route import route_distance
from rcid.causal.hooks import Site
from rcid.models import blocks_map, get_adapter, identity_blocks, load_model, logits_differ, permuted_heads, rotated
from rcid.models.rewrite import SAME

KINDS = ("s2", "s2_new")
LAYERS, LIVE = 4, (1, 2)         # attention is live in these, so that names are handed over in the middle


def rewrites(n: int) -> dict:
    "By name: the rewrite, and where the layers of a model of `n` are in it."
    third, last = n // 3, n - 1
    some, none = [third, third, last - 1], []
    def deeper(model): return identity_blocks(model, some)
    def all_of_them(model): return rotated(permuted_heads(deeper(model), seed=3), seed=4)
    made = {"blocks": (deeper, some), "rotated": (rotated, none), "heads": (permuted_heads, none)}
    made |= {"all": (all_of_them, some)}
    return {name: (rewrite, blocks_map(n, after)) for name, (rewrite, after) in made.items()}


def trained(tokenizer, kinds, steps=80, batch=24, seed=0):
    "A model that answers the clean prompt and, on the classic kind, the corrupt one."
    spec = {"arch": "llama", "vocab": len(tokenizer), "layers": LAYERS, "seed": seed}
    model = load_model(spec, dtype="float32", device="cpu")[0]
    for layer in set(range(LAYERS)) - set(LIVE):                           # else all is done in the first layer
        get_adapter(model).parts(layer).o.weight.requires_grad_(False).zero_()
    classic, new = (kinds[kind] for kind in KINDS)
    free = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(free, lr=3e-3)
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(classic), (batch,), generator=g)
        a, b = classic[rows], new[rows]
        clean, corrupt = (run_logit_diff(model, ids, a) for ids in (a.clean_ids, a.corrupt_ids))
        third = run_logit_diff(model, b.corrupt_ids, b)                    # neither name is right here
        loss = torch.nn.functional.softplus(-torch.cat([clean, -corrupt])).mean() + third.square().mean() / 100
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def subject(tokenizers):
    "(the trained model, pairs by kind, its mediation)."
    torch.manual_seed(0)
    kinds = load_kinds("ioi", tokenizers["llama"], KINDS, split="train", n=96)
    model = trained(tokenizers["llama"], kinds)
    kinds = {kind: pairs[:48].trimmed() for kind, pairs in kinds.items()}
    found = mediation(model, kinds)
    assert not found.no_gap()                                              # there is something to read
    return model, kinds, found


def check_same(model, kinds, before: Mediation, rewrite, where, tolerance):
    "Effects, and every reading of them."
    new = rewrite(model)
    after = mediation(new, kinds)
    for kind in kinds:
        gap = float(before.gaps[kind].abs().mean())
        assert (after.gaps[kind] - before.gaps[kind]).abs().max() <= tolerance * gap
        assert (after.effects[kind] - before.effects[kind][:, where.old]).abs().max() <= tolerance * gap
    route = route_distance(before, after, student_depth=where.depths)
    assert route.distance <= route.floor + .02 and route.distance <= .01
    warped = route_distance(before, after, warp=True, student_depth=where.depths)
    assert warped.distance <= warped.floor + .02
    marks = fingerprint(before, after, student_depth=where.depths)
    assert marks.similarity >= .98
    m = before.mediating()[0].nan_to_num(0)                                # (layer, role)
    best = [divmod(int(i), len(before.roles)) for i in m.flatten().topk(3).indices if m.flatten()[i] > .1]
    sites = [Site(layer, before.roles[role]) for layer, role in best]
    layers = [where.new[layer] for layer, _ in best]
    pairwise = partial_consistency(before, after, sites, layers)
    assert pairwise.n_undefined == 0 and pairwise.r >= .98
    swapped = interchange_agreement(model, new, next(iter(kinds.values())), sites, layers)
    assert swapped.n_flips > 0 and swapped.agreement >= .98


@pytest.mark.parametrize("name", rewrites(LAYERS))
def test_a_rewrite_is_the_same(subject, name):
    check_same(*subject, *rewrites(LAYERS)[name], 1e-3)


def test_the_readings_can_tell(subject):
    "Depths that are not the rewrite's own, and a model that was trained from another start."
    model, kinds, before = subject
    rewrite, where = rewrites(LAYERS)["blocks"]
    after = mediation(rewrite(model), kinds)
    lost = route_distance(before, after)                                   # as if the blocks were layers like others
    assert lost.distance > lost.floor + .02
    random = mediation(load_model({"arch": "llama", "vocab": get_adapter(model).vocab, "seed": 9}, device="cpu",
        dtype="float32")[0], kinds)
    assert not route_distance(before, random).distance <= .02              # no gap, or another route


@pytest.mark.slow
def test_real_weights():
    "All rewrites at once: each of them alone is tried on the small model."
    model, tokenizer = load_model({"path": str(real("SmolLM2"))}, dtype="float32", device="cpu")
    kinds = load_kinds("ioi", tokenizer, KINDS, n=8)
    before = mediation(model, kinds)
    rewrite, where = rewrites(30)["all"]
    check_same(model, kinds, before, rewrite, where, 1e-3)
