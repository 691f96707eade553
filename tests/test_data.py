"""Pairs say what they claim: roles at the right words, splits that share no entity, the same every time."""
import os, re, sys
import pytest, torch
from conftest import ARCHS, ROOT, real, run
from rcid.core import embedded
from rcid.data import (
    check_disjoint,
    general_text,
    load_pairs,
    load_saved_pairs,
    name_pool,
    names_of,
    pack_blocks,
    save_pairs,
    templated_sentences,
    without_test_entities,
)
from rcid.data.ioi import VARIANTS
from rcid.data.names import SPLITS, split_of

GOLDEN_SPLITS = {
    "Aaron": "train",
    "Albert": "train",
    "Amanda": "train",
    "Amy": "train",
    "Betty": "val",
    "Brandon": "val",
    "Brian": "val",
    "Christine": "val",
    "Adam": "test",
    "Alexander": "test",
    "Alice": "test",
    "Andrew": "test",
}


@pytest.fixture(params=[*ARCHS, "SmolLM2"])
def tokenizer(request, tokenizers):
    if request.param != "SmolLM2": return tokenizers[request.param]
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(real("SmolLM2"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_roles_are_at_the_right_words(tokenizer, variant):
    p = load_pairs("ioi", tokenizer, n=24, variant=variant)
    assert p.is_modified == {"io": False, "s1": False, "s1+1": False, "s2": True, "end": False}
    for i in range(len(p)):
        n = int(p.attention_mask[i].sum())
        word = lambda ids, role: tokenizer.decode(ids[i, p.key_positions[role][i]]).strip()
        io, s = (tokenizer.decode(x[i]).strip() for x in (p.correct_token_id, p.wrong_token_id))
        assert [word(p.clean_ids, r) for r in ("io", "s1", "s2")] == [io, s, s] and word(p.corrupt_ids, "s2") == io
        assert p.key_positions["end"][i] == p.answer_pos[i] == n - 1
        assert p.key_positions["s1+1"][i] == p.key_positions["s1"][i] + 1 < n - 1
        assert (p.clean_ids[i] != p.corrupt_ids[i]).nonzero()[:, 0].tolist() == [int(p.key_positions["s2"][i])]
        text = tokenizer.decode(p.clean_ids[i, :n], skip_special_tokens=True)
        assert (
            len(re.findall(rf"\b{s}\b", text)) == 2
            and len(re.findall(rf"\b{io}\b", text)) == 1
            and text.endswith(word(p.clean_ids, "end"))
        )
        assert [embedded("names")["first_names"][e] for e in p.entity_ids[i]] == [io, s]
    firsts = (p.key_positions["io"] < p.key_positions["s1"]).tolist()
    assert len(set(firsts)) == 2                                           # ABBA and BABA
    bos = tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    assert bool((p.clean_ids[:, 0] == tokenizer.bos_token_id).all()) == bos


def test_splits_share_no_entity_and_no_sentence(tokenizer):
    splits = {s: load_pairs("ioi", tokenizer, split=s, n=40) for s in SPLITS}
    check_disjoint(**splits)
    names = embedded("names")["first_names"]
    for s, p in splits.items():
        assert {split_of(names[e]) for e in p.entity_ids.flatten().tolist()} == {s}
        assert len({tuple(row) for row in p.clean_ids.tolist()}) == len(p)   # no pair twice
    with pytest.raises(ValueError, match="splits train and again share"):
        check_disjoint(train=splits["train"], again=splits["train"][:3])


def test_name_pool_is_checked_against_the_tokenizer(tokenizer):
    ok, bad = name_pool(tokenizer)
    assert sorted(ok + bad) == sorted(embedded("names")["first_names"]) and len(ok) >= 20
    assert all(len(tokenizer(f" {n}", add_special_tokens=False)["input_ids"]) == 1 for n in ok) and not any(
        len(tokenizer(f" {n}", add_special_tokens=False)["input_ids"]) == 1 for n in bad
    )
    assert sorted(n for s in SPLITS for n in names_of(tokenizer, s)) == sorted(ok)


def test_a_name_keeps_its_split_for_ever():
    assert {n: split_of(n) for n in GOLDEN_SPLITS} == GOLDEN_SPLITS
    assert {split_of(n) for n in embedded("names")["first_names"]} == set(SPLITS)


def test_pairs_are_the_same_in_every_process(tokenizers):
    want = load_pairs("ioi", tokenizers["qwen3"], split="val", n=20).content_hash()
    assert load_pairs("ioi", tokenizers["qwen3"], split="val", n=20).content_hash() == want
    assert load_pairs("ioi", tokenizers["qwen3"], split="val", n=20, seed=1).content_hash() != want
    code = """from rcid.core import embedded; from rcid.data import load_pairs; from rcid.models import train_tokenizer
texts = [f" {n}" for n in embedded("names")["first_names"]] * 3 + [t["text"] for t in embedded("ioi")["templates"]]
print(load_pairs("ioi", train_tokenizer(texts, vocab=1500), split="val", n=20).content_hash())"""
    assert run(ROOT, sys.executable, "-c", code, PYTHONHASHSEED="7").stdout.strip() == want


def test_variants_differ_in_what_they_say(tokenizers):
    t = tokenizers["qwen3"]
    get = lambda variant, split="train": load_pairs("ioi", t, split=split, n=30, variant=variant)
    templates = lambda p: set(p.template_id.tolist())
    plain, names = get("id"), embedded("names")["first_names"]
    assert not templates(get("ood_templates")) & templates(plain)
    assert {split_of(names[e]) for e in get("ood_names").entity_ids.flatten().tolist()} == {"test"}
    assert (
        float(get("ood_long").attention_mask.sum(1).float().mean())
        > float(plain.attention_mask.sum(1).float().mean()) + 3
    )
    with pytest.raises(ValueError, match="unknown IOI variant 'ood_chess'"): get("ood_chess")


def test_saved_pairs_come_back_and_tampering_is_seen(pairs, tmp_path):
    p = pairs["llama"]["unequal"]
    save_pairs(p, tmp_path/"p")
    back = load_saved_pairs(tmp_path/"p")
    assert back.content_hash() == p.content_hash() and (back.roles, back.is_modified, back.dropped) == (
        p.roles,
        p.is_modified,
        p.dropped,
    )
    other = p[[1, 0, 2, 3, 4]]
    assert other.content_hash() != p.content_hash()
    save_pairs(other, tmp_path/"q")
    (tmp_path/"q"/"pairs.safetensors").replace(tmp_path/"p"/"pairs.safetensors")
    with pytest.raises(ValueError, match="do not match their SHA-256"): load_saved_pairs(tmp_path/"p")


def test_training_text_names_no_test_person():
    held = [n for n in embedded("names")["first_names"] if split_of(n) == "test"]
    docs = [f"{n} is here.\n\nNobody is here." for n in embedded("names")["first_names"]]
    assert set(without_test_entities(docs)) == {
        d for d, n in zip(docs, embedded("names")["first_names"]) if n not in held
    } | {"Nobody is here."}
    assert not re.search(rf"\b({'|'.join(held)})\b", "\n".join(templated_sentences(300, splits=("train",))))
    assert re.search(rf"\b({'|'.join(held)})\b", "\n".join(templated_sentences(300)))


@pytest.mark.data
def test_wikitext(tokenizers):
    if not os.environ.get("RCID_DATA_DIR"): pytest.skip("RCID_DATA_DIR is not set: 1 test of WikiText-2 needs it")
    train, test = (general_text(s, "path") for s in ("train", "test"))
    held = [n for n in embedded("names")["first_names"] if split_of(n) == "test"]
    assert len(train) > 20 < len(test) and not re.search(rf"\b({'|'.join(held)})\b", "\n".join(train))
    assert train[1][:200] not in "\n".join(test)
    assert pack_blocks(test[:2], tokenizers["qwen3"], 64).shape[1] == 64
