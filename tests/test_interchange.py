"""Interchange: models whose patched answers are known, and what is refused."""
from itertools import islice
import numpy as np
import pytest
import torch
from rcid.core.tensors import content_hash
from rcid.data.ioi import ioi_rows
from rcid.data.pairs import build_pairs
from rcid.data.splits import load_pairs
from rcid.eval.handmade import counting_model
from rcid.eval.interchange import corrected, interchange_agreement, other_pairs, top_tokens, words_of
from rcid.models import get_adapter

N = 40


def agreement(*args, **kw): return interchange_agreement(*args, **{"n_boot": 100} | kw)


def refused(words, *args, **kw):
    with pytest.raises(ValueError, match=words) as e: interchange_agreement(*args, **kw)
    assert "\n" not in str(e.value) and len(str(e.value)) < 300


@pytest.fixture(scope="module")
def ioi(tokenizers): return load_pairs("ioi", tokenizers["llama"], split="train", n=N)


@pytest.fixture(scope="module")
def made(tokenizers):
    "A function: live layers -> a model of four layers that counts names."
    def make(live, seed=0): return counting_model(tokenizers["llama"], live, layers=4, vary=0., seed=seed)
    return make


def test_kappa_by_hand():
    own, other, flips = (np.array(v, float) for v in ([8, 0, 10, 3, 0], [3, 2, 0, 3, 0], [10, 10, 10, 3, 0]))
    assert corrected(own, other, flips)[:3] == pytest.approx([5 / 7, -.25, 1])
    assert np.isnan(corrected(own, other, flips)[3:]).all()


def test_a_model_agrees_with_itself_and_with_its_like(made, ioi):
    teacher, alike = made({1: .7, 2: .3}), made({1: .7, 2: .3}, seed=3)
    sites = [(1, "end"), (0, "s2")]                     # 0.7 of the change has arrived; all of it still waits
    for student in (teacher, alike):
        r = agreement(teacher, student, ioi, sites, [1, 0])
        assert r.agreement == r.raw == 1 and r.n_flips == 2 * N and r.interval == (1, 1)
        assert r.other_pair < .5 and r.n_pairs == N
    assert [s["n_flips"] for s in r.per_site] == [N, N] and r.per_site[0]["student_site"] == (1, "end")


def test_what_has_not_arrived_does_not_agree(made, ioi):
    "The student hands over one layer later: at layer 1 its END knows nothing, and it says the clean answer."
    r = agreement(made({1: .7, 2: .3}), made({2: .7, 3: .3}), ioi, [(1, "end")], [1])
    assert r.n_flips == N and r.raw == 0 and r.agreement <= 0
    mapped = agreement(made({1: .7, 2: .3}), made({2: .7, 3: .3}), ioi, [(1, "end")], [2])
    assert mapped.agreement == 1


def test_pairs_without_a_changed_word_do_not_count(made, ioi):
    "0.3 of the change is not enough to change the teacher's word."
    r = agreement(made({1: .3, 2: .7}), made({1: .7, 2: .3}), ioi, [(1, "end"), (2, "end")], [1, 2])
    assert [s["n_flips"] for s in r.per_site] == [0, N] and r.n_flips == N and r.agreement == 1
    assert np.isnan(r.per_site[0]["agreement"]) and "raw" not in r.per_site[0]
    none = agreement(made({1: .3, 2: .7}), made({1: .7, 2: .3}), ioi, [(1, "end")], [1])
    assert none.n_flips == 0 and np.isnan(none.agreement) and np.isnan(none.raw) and np.isnan(none.confidence).all()


def test_logits_change_the_confidence_only(made, ioi):
    teacher, soft, loud = (made({1: .7, 2: .3}) for _ in range(3))
    with torch.no_grad():
        get_adapter(soft).lm_head.weight *= .3
        get_adapter(loud).lm_head.weight *= .9
    a, b = (agreement(teacher, m, ioi, [(1, "end")], [1]) for m in (soft, loud))
    assert b.confidence[1] > a.confidence[1] + .01 and b.confidence[0] == a.confidence[0]
    assert {**a.to_dict(), "confidence": 0} == {**b.to_dict(), "confidence": 0}


def test_batches_and_repetition(made, ioi):
    args = made({1: .7, 2: .3}), made({1: .6, 3: .4}), ioi, [(1, "end"), (2, "end")], [1, 2]
    a = agreement(*args)
    b = agreement(*args, batch_size=7)
    assert agreement(*args).to_dict() == a.to_dict()
    assert (b.agreement, b.n_flips, b.other_pair) == (a.agreement, a.n_flips, a.other_pair)


def test_the_patched_word_is_that_of_a_run_by_hand(made, ioi):
    model = made({1: .7, 2: .3})
    token, sure = top_tokens(model, ioi, {}, batch_size=16)
    at = torch.arange(N), ioi.answer_pos
    with torch.no_grad(): logits = model(input_ids=ioi.clean_ids, attention_mask=ioi.attention_mask).logits[at]
    assert torch.equal(token, logits.argmax(-1)) and torch.equal(token, ioi.correct_token_id)
    assert torch.allclose(sure, logits.softmax(-1).max(-1).values, atol=1e-5)


def test_models_come_back_as_they_were(made, ioi):
    teacher, student = made({1: .7, 2: .3}), made({2: 1.})
    student.train()
    teacher.get_input_embeddings().weight.requires_grad_(False)
    before = [content_hash(m.state_dict()) for m in (teacher, student)]
    agreement(teacher, student, ioi, [(1, "end")], [1])
    assert [content_hash(m.state_dict()) for m in (teacher, student)] == before
    assert student.training and not teacher.training and not teacher.get_input_embeddings().weight.requires_grad
    assert all(p.requires_grad and p.grad is None for p in student.parameters())
    assert not any(m._forward_hooks for model in (teacher, student) for m in model.modules())


def test_two_tokenizers(tokenizers, made):
    one, two = tokenizers["llama"], tokenizers["qwen3"]          # BOS and none: other positions, other numbers
    rows = list(islice(ioi_rows(one, "train"), N))
    pairs = build_pairs(rows, one), build_pairs(rows, two)
    student = counting_model(two, {1: .7, 2: .3}, layers=4, vary=0.)
    r = agreement(made({1: .7, 2: .3}), student, pairs, [(1, "end")], [1], tokenizers=(one, two))
    assert r.agreement == 1 and r.n_flips == N
    tokens = torch.tensor([one.convert_tokens_to_ids("ĠMary")] * 2)
    assert words_of(tokens, one).tolist() == ["Mary", "Mary"]


@pytest.mark.parametrize("n", (2, 3, 50))
def test_another_pair_is_another(n):
    other = other_pairs(n, seed=n)
    assert sorted(other) == list(range(n)) and (other != np.arange(n)).all()


def test_bad_input(made, ioi):
    m = made({1: .7, 2: .3})
    refused("no sites given", m, m, ioi, [], [])
    refused("1 sites and 0 student layers", m, m, ioi, [(1, "end")], [])
    refused(r"two sets of pairs: pass tokenizers=", m, m, (ioi, ioi), [(1, "end")], [1])
    refused("40 and 3 pairs", m, m, (ioi, ioi[:3]), [(1, "end")], [1], tokenizers=(None, None))
    refused("1 and 1 pairs", m, m, ioi[:1], [(1, "end")], [1])
    refused("role 'nobody'", m, m, ioi, [(1, "nobody")], [1])
    with pytest.raises(IndexError, match="layer 9 is outside"): interchange_agreement(m, m, ioi, [(1, "end")], [9])
