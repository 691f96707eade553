"""Facts with subjects of any length, words and answers of several tokens, the same sentences for two tokenizers, and
pairs out of a file of one's own."""

import json
import pytest
from rcid.core import embedded
from rcid.data import build_pairs, check_disjoint, load_for_all, load_pairs, own_pairs, relations_of
from rcid.data.ioi import ioi_rows, names_as_long
from rcid.data.own_pairs import read_own_rows
from rcid.data.pairs import Row, misfit
from rcid.data.splits import PATIENCE
from rcid.data.subjects import disjoint_swaps, readings
from rcid.models import byte_tokenizer, train_tokenizer
from conftest import real
from test_tasks import needs_data, real_tokenizer, vocabulary  # a mark, a function and a fixture


@pytest.fixture(scope="module")
def cutting() -> dict:
    "Two tokenizers that cut most subjects up, each in its own way; the second one puts a BOS in front."
    relations = embedded("factual")["relations"]
    words = [f" {w}" for r in relations for fact in r["facts"].items() for w in fact]
    texts = [t for r in relations for t in r["templates"]]
    return {bos: train_tokenizer(words[::1 + bos] + texts, vocab=900 - 200 * bos, bos=bos) for bos in (False, True)}


def changed(p): return (p.clean_ids != p.corrupt_ids)


def of_any(tokenizer, split="all", **more):
    return load_pairs("factual", tokenizer, split=split, subject_tokens="any", long_answers=True, **more)


# subjects of any length

@pytest.mark.parametrize("bos", (False, True))
def test_all_tokens_of_a_subject_change_and_its_role_is_the_last(cutting, bos):
    tok = cutting[bos]
    p, table = of_any(tok, n=60), relations_of()
    assert p.is_modified == {"subject": True, "relation": False, "end": False} and changed(p).sum(1).max() > 1
    names = sorted({s for r in table for s in r.facts})
    for i in range(len(p)):
        at = changed(p)[i].nonzero()[:, 0].tolist()
        subject, other = (names[e] for e in p.entity_ids[i].tolist())
        assert at == list(range(at[0], at[-1] + 1)) and at[-1] == p.key_positions["subject"][i]
        assert tok.decode(p.clean_ids[i, at]).strip() == subject and tok.decode(p.corrupt_ids[i, at]).strip() == other
        facts = table[int(p.template_id[i]) // 1000].facts
        seen = p.attention_mask[i] == 1
        answers = [tok.decode(p.correct_token_id[i]), tok.decode(p.wrong_token_id[i])]
        for who, ids, answer in zip((subject, other), (p.clean_ids, p.corrupt_ids), answers):
            text = tok.decode(ids[i][seen], skip_special_tokens=True) + answer
            said = f" {facts[who]}"
            # the prompt ends with what both answers begin with, and the next token goes on with this one
            assert any(text.endswith(said[:n]) for n in range(len(answer), len(said) + 1)), (text, said)


def test_no_subject_is_in_two_pairs(cutting):
    p = of_any(cutting[False], n=60)
    used = p.entity_ids.flatten().tolist()
    assert len(used) == len(set(used)) == 120


def test_splits_and_rare_subjects_stay_apart(cutting):
    parts = {split: of_any(cutting[False], split, n=8) for split in ("train", "val", "test")}
    check_disjoint(**parts, rare=of_any(cutting[False], "test", n=4, variant="ood_subjects"))
    numbers = {int(t) // 1000 for t in of_any(cutting[False], "test", n=8).template_id}
    assert not any(relations_of()[k].ood for k in numbers)


def test_both_kinds_have_the_same_rows(cutting):
    options = dict(split="all", n=10, subject_tokens="any", long_answers=True)
    kinds = load_for_all("factual", [cutting[False]], ["subject", "relation"], **options)[0]
    subject, relation = kinds["subject"], kinds["relation"]
    assert relation.clean_ids.equal(subject.clean_ids) and relation.wrong_token_id.equal(subject.wrong_token_id)
    at = relation.key_positions["subject"][:, None]
    assert relation.corrupt_ids.gather(1, at).equal(relation.clean_ids.gather(1, at))


def test_seed_decides_and_nothing_else(cutting):
    first, again, other = (of_any(cutting[False], n=20, seed=seed).content_hash() for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(split="all"), "unknown split 'all'.* all with subject_tokens='any'"),
        (dict(split="dev", subject_tokens="any"), "unknown split 'dev'"),
        (dict(subject_tokens=0), "subject_tokens=0: give a number of at least 1, or 'any'"),
        (dict(subject_tokens="many"), "subject_tokens='many'"),
        (dict(long_answers=True), "set subject_tokens='any'"),
        (dict(beside=byte_tokenizer()), "set subject_tokens='any'"),
        (dict(subject_tokens="any", relations=["capital"], variant="ood_relations"), "no relation has a valid pair"),
    ],
)
def test_bad_options_of_facts(cutting, options, words):
    with pytest.raises(ValueError, match=words) as e: load_pairs("factual", cutting[False], n=2, **options)
    assert "\n" not in str(e.value)


def test_partners_differ_in_every_token_and_in_the_answer():
    facts = [("Ada Berg", "Oslo"), ("Max Holt", "Rome"), ("Ada Holt", "Rome"), ("Eve", "Rome"), ("Jon Lind", "Oslo")]
    words = [f" {w}" for subject, answer in facts for w in (*subject.split(), answer)]
    tok = train_tokenizer(words * 2 + ["The home of is in"], vocab=400)
    read = readings(tok, facts, "The home of {X} [is] in")
    assert [len(r.subject) for r in read] == [2, 2, 2, 1, 2] and all(len(r.answer) == 1 for r in read)
    import random
    for seed in range(20):
        swaps = disjoint_swaps([tok], facts, [(7, "The home of {X} [is] in")], random.Random(seed))
        pairs = {frozenset((s.subject, s.other)) for s in swaps}
        # Ada Holt shares a token with Ada Berg and an answer with Max Holt: only Jon Lind is left
        assert frozenset(("Ada Holt", "Ada Berg")) not in pairs and frozenset(("Ada Holt", "Max Holt")) not in pairs
        assert not any("Eve" in pair for pair in pairs) and {s.template for s in swaps} == {7}
    assert disjoint_swaps([tok], [], [(7, "{X} [is]")], random.Random(0)) == []


@needs_data
@pytest.mark.data
@pytest.mark.parametrize("dataset, least", [("lama", 2000), ("counterfact", 1000), ("lre", 1000)])
def test_public_tables_give_thousands_of_pairs(vocabulary, dataset, least):
    p = load_pairs("factual", vocabulary, "all", least, source="path", dataset=dataset, subject_tokens="any")
    used = p.entity_ids.flatten().tolist()
    assert len(p) == least and len(set(used)) == 2 * least and changed(p).sum(1).max() > 3
    assert p.is_modified["subject"] and (p.correct_token_id != p.wrong_token_id).all()


@needs_data
@pytest.mark.data
def test_public_facts_of_two_real_vocabularies():
    both = [real_tokenizer(real(name)) for name in ("qwen3", "llama3")]
    options = dict(source="path", dataset="lre", subject_tokens="any", beside=both[1])
    mine, theirs = load_for_all("factual", both, ["subject"], "all", 3000, **options)
    p, q = mine["subject"], theirs["subject"]
    assert len(p) >= 1000 and p.entity_ids.equal(q.entity_ids) and changed(p).sum(1).max() > 3
    assert (q.clean_ids[:, 0] == both[1].bos_token_id).all()


@pytest.mark.parametrize("task", ("ioi", "factual", "winogrande", "arithmetic"))
def test_every_task_has_common_sentences_of_real_vocabularies(task):
    both = [real_tokenizer(real(name)) for name in ("llama3", "qwen3")]
    mine, theirs = load_for_all(task, both, n=50)
    for kind, p in mine.items():
        assert len(p) == len(theirs[kind]) == 50 and p.roles == theirs[kind].roles
        for i in (0, 49):
            said = [t.decode(k.clean_ids[i][k.attention_mask[i] == 1], skip_special_tokens=True)
                    for t, k in zip(both, (p, theirs[kind]))]
            assert said[0] == said[1]


# words and answers of several tokens

TEXT = "Annabella met Bob. Bob saw"

def told(**more) -> Row:
    names = "Annabella", "Rosalinda"
    row = Row(TEXT, TEXT.replace(*names), *names, {"who": (0, 9)}, ("who",), 0, (0, 1))
    return row._replace(**{"long_words": True, "long_answers": True, **more})


def test_long_words_and_answers_by_hand():
    letters = byte_tokenizer()
    def ids(text): return letters(text)["input_ids"]
    p = build_pairs([told(correct=" Annabella", wrong=" Annika")], letters)
    shared = ids(" Ann")
    assert p.clean_ids[0].tolist() == ids(TEXT) + shared and p.answer_pos.item() == len(TEXT) + 3
    assert (p.correct_token_id.item(), p.wrong_token_id.item()) == (ids("a")[0], ids("i")[0])
    assert p.key_positions["who"].item() == 8 and p.key_positions["end"].item() == p.answer_pos.item()


@pytest.mark.parametrize(
    "more, why",
    [
        (dict(long_answers=False), "answer is not one token"),
        (dict(long_words=False), "more than the modified word differs"),
        (dict(corrupt="Rosalinda met Bob. Tom saw"), "more than the modified word differs"),
        (dict(corrupt="Rosa met Bob. Bob saw"), "clean and corrupt have unequal length"),
        (dict(roles={"who": (0, 9), "bob": (14, 17)}, modified=("who", "bob")), "more than the modified word differs"),
        (dict(correct="Anna", wrong="Annabella"), "one answer begins with the other"),
        (dict(correct="Anna", wrong="Anna"), "one answer begins with the other"),
        (dict(correct="", wrong="Anna"), "one answer begins with the other"),
    ],
)
def test_a_long_row_that_does_not_fit_says_why(more, why):
    assert misfit(byte_tokenizer(), {"": told(**more)}) == why
    assert misfit(byte_tokenizer(), {"": told()}) == ""


# two tokenizers

def test_sentences_are_the_same_for_both(cutting):
    for kinds, opts in ((["s2", "names"], dict(name_tokens="any")), (["s2"], dict(name_tokens="any", split="train"))):
        pair = [cutting[False], cutting[True]]
        for kind, p in (made := load_for_all("ioi", pair, kinds, n=12, beside=pair[1], **opts))[0].items():
            q = made[1][kind]
            assert len(p) == len(q) == 12 and p.entity_ids.equal(q.entity_ids) and p.dropped == q.dropped
            for i in range(12):
                said = [
                    t.decode(r.corrupt_ids[i][r.attention_mask[i] == 1], skip_special_tokens=True)
                    for t, r in zip(pair, (p, q))
                ]
                short, long = sorted(said, key=len)
                assert long.startswith(short) and len(long) - len(short) < 12       # what both answers begin with


def test_facts_for_both_have_equal_lengths_in_both(cutting):
    pair = [cutting[False], cutting[True]]
    options = dict(subject_tokens="any", long_answers=True, beside=pair[1])
    mine, theirs = load_for_all("factual", pair, ["subject"], "all", 30, **options)
    assert mine["subject"].entity_ids.equal(theirs["subject"].entity_ids) and len(mine["subject"]) == 30
    # without `beside` pairs are made for the first one, and the second cannot take some of them
    alone = load_for_all("factual", pair, ["subject"], "all", 30, **{**options, "beside": None})
    assert sum(alone[0]["subject"].dropped.values()) > sum(mine["subject"].dropped.values())


def test_no_common_sentence_is_one_line(cutting):
    with pytest.raises(ValueError, match="'factual': no sentence fits both tokenizers .*try another task") as e:
        load_for_all("factual", [cutting[False], byte_tokenizer()], ["subject"])
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="n=0 pairs asked for"): load_for_all("ioi", [cutting[False]], ["s2"], n=0)
    with pytest.raises(ValueError, match="no corruption 'so'"): load_for_all("ioi", [cutting[False]], ["so"])


def test_an_endless_task_is_given_up(monkeypatch, cutting):
    from rcid.data import splits
    seen = []
    monkeypatch.setattr(splits, "misfit", lambda t, sentence: seen.append(1) or "no")
    with pytest.raises(ValueError, match="no sentence fits this tokenizer"):
        load_for_all("ioi", [cutting[False]], ["s2"], n=3, name_tokens="any")
    assert len(seen) == PATIENCE * 13 + 1


def test_names_of_a_sentence_are_equally_long(cutting):
    pools = names_as_long([cutting[False], cutting[True]], "train")
    assert all(name in pool and len(pool) > 2 for name, pool in pools.items())
    p = build_pairs(ioi_rows(cutting[False], "train", name_tokens="any"), cutting[False], n=20)
    assert changed(p).sum(1).max() > 1 and p.is_modified["s2"] and not p.is_modified["io"]
    with pytest.raises(ValueError, match="name_tokens=2: use 1 or 'any'"): next(ioi_rows(cutting[False], name_tokens=2))
    with pytest.raises(ValueError, match="unknown split 'dev'"): names_as_long([cutting[False]], "dev")


# a file of one's own

GOOD = dict(clean="Then Mary and John met, John called", corrupt="Then Mary and John met, Mary called",
            answer=" Mary", wrong=" John", roles={"io": "Mary and", "s2": ", John"})


def written(tmp_path, *rows):
    file = tmp_path/"mine.jsonl"
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    "row, words",
    [
        ("{", "line 2 is no JSON"),
        ([], "line 2 is no JSON object"),
        ({**GOOD, "clean": ""}, "line 2 has no text 'clean'"),
        ({**GOOD, "answer": 3}, "line 2 has no text 'answer'"),
        ({**GOOD, "anwser": " Mary"}, "line 2 has a key 'anwser' that means nothing here"),
        ({**GOOD, "corrupt": GOOD["clean"]}, "line 2 does not differ"),
        ({**GOOD, "wrong": " Mary"}, "line 2 has one answer for both prompts"),
        ({**GOOD, "answer": "Mary"}, "line 2 has answer 'Mary' glued to the prompt's last word"),
        ({**GOOD, "roles": ["io"]}, "line 2 has roles that are no object"),
        ({**GOOD, "roles": {"end": "Mary and"}}, "line 2 names a role 'end', which every row has"),
        ({**GOOD, "roles": {"s": "John"}}, "line 2 says 'John' for role 's', 2 times in clean"),
        ({**GOOD, "roles": {"s": "Tom"}}, "line 2 says 'Tom' for role 's', 0 times in clean"),
        ({**GOOD, "roles": {"io": "Mary and"}}, "only one of line 1 and line 2 has the role 's2'"),
        ({**GOOD, "roles": {"io": "Mary and", "s2": "Mary"}}, "only one of line 1 and line 2 changes the role 's2'"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path, row, words):
    with pytest.raises(ValueError, match=words) as e: read_own_rows(written(tmp_path, GOOD, row))
    assert "\n" not in str(e.value) and "mine.jsonl" in str(e.value)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*: give one"): read_own_rows(tmp_path/"none.jsonl")
    with pytest.raises(ValueError, match="is empty: write a JSON object"): read_own_rows(written(tmp_path, ""))


def test_own_rows_become_pairs(tmp_path):
    letters = byte_tokenizer(bos=True)
    longer = {**GOOD, "corrupt": GOOD["clean"].replace(", John", ", Marianne")}
    grouped = {**GOOD, "group": "x"}
    (p,), said = own_pairs(written(tmp_path, GOOD, "", longer, grouped), [letters])
    assert len(p) == 2 and said == ["line 3: clean and corrupt have unequal length"] and p.task == "mine"
    assert p.roles == ["changed", "io", "s2", "end"]
    assert p.is_modified == dict(changed=True, io=False, s2=True, end=False)
    text = GOOD["clean"]
    places = {role: at[0].item() - 1 for role, at in p.key_positions.items()}           # without the BOS
    assert places == dict(changed=27, io=12, s2=27, end=len(text))           # a space is said
    assert text[:28].endswith(", John") and text[:13].endswith("Mary and")
    assert p.entity_ids.tolist() == [[0, 1], [2, 2]] and p.template_id.tolist() == [1, 4]
    with pytest.raises(ValueError, match=r"none of 1 rows fits the tokenizer \(line 1: clean and corrupt have unequal"):
        own_pairs(written(tmp_path, longer), [letters])


def test_a_row_that_one_tokenizer_cannot_take_is_left_out_of_both(tmp_path):
    whole = train_tokenizer([" Then Mary and John met, called Tom", "Then met"] * 5, vocab=330)
    short = {**GOOD, "corrupt": GOOD["clean"].replace(", John", ", Tom")}    # a token for one, letters for the other
    (mine, theirs), said = own_pairs(written(tmp_path, GOOD, short), [whole, byte_tokenizer()])
    assert len(mine) == len(theirs) == 1 and said == ["line 2: clean and corrupt have unequal length"]
    (alone,), nothing = own_pairs(written(tmp_path, GOOD, short), [whole])
    assert len(alone) == 2 and not nothing
