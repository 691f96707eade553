"""Kinds of corruption: the same rows in the same order, each changed where it says; the classic kind as it was."""
import re
from dataclasses import replace
import pytest, torch
from rcid.core import embedded, read_json, write_json
from rcid.core.tensors import content_hash
from rcid.data import (
    TASKS,
    build_kinds,
    build_pairs,
    check_disjoint,
    corruptions,
    load_kinds,
    load_pairs,
    load_saved_pairs,
    names_of,
    save_pairs,
    styled_problems,
)
from rcid.data import arithmetic, ioi, winogrande
from rcid.data.names import SPLITS, split_of
from rcid.data.pairs import Row
from rcid.data.reasoning_pairs import reasoning_rows
from rcid.data.stories import story_row
from rcid.eval import keep_correct
from test_tasks import FORMS, small, tokenizer  # fixtures

FORMS = {"ioi": dict(task="ioi"), **FORMS}
# what IOI says at IO, S1 and S2 in place of the clean io, s, s; t is a third name
SAID = {
    "s2": "io s io",
    "s2_new": "io s t",
    "names": "s io io",
    "s1_new": "io t s",
    "io_new": "t s s",
    "order": "s io s",
}

# the first digits of the content hashes of the classic pairs (24 test pairs, without the role s1+1) before other kinds
GOLDEN = {
    "plain": {
        "ioi": "c9dc5351c12dbdb2",
        "factual": "200d8ff7c3476d7a",
        "partial": "9e5496c3920e3f2e",
        "referent": "ee0422915f92b8a8",
        "symbolic": "ada777831c3e7158",
        "words": "38d6d0a3c67be759",
    },
    "bos": {
        "ioi": "674b1563e6c2efc7",
        "factual": "7c615218c8994e9d",
        "partial": "aef214fb55b00951",
        "referent": "f66df1b6b588df93",
        "symbolic": "26d25c63c1ecc92b",
        "words": "f9ad500f8b85564f",
    },
    "SmolLM2": {
        "ioi": "62ba0327c19e38f7",
        "factual": "fd5b26206ebdacc3",
        "partial": "3d67786edc7f1b25",
        "referent": "8eb7753bbd83fd17",
        "symbolic": "9940425b52086720",
        "words": "81bcaa19898f68fb",
    },
    "qwen3": {
        "ioi": "a9f082ea4fb7ce80",
        "factual": "765702f040bf7567",
        "partial": "6c063e5ddf977999",
        "referent": "206af52817612ae6",
        "symbolic": "421ead8ea581aafb",
        "words": "7fbdb4852811f5e4",
    },
    "llama3": {
        "ioi": "17ec270127ad7072",
        "factual": "92cfb04b1255171a",
        "partial": "53905e8c8ba6b325",
        "referent": "2c4170389d6a2e46",
        "symbolic": "bd0239f575aec59c",
        "words": "b84bf48159340f64",
    },
}


def without_new_role(p) -> str:
    return content_hash({name: t for name, t in p.tensors().items() if name != "role.s1+1"})


def changed(p) -> torch.Tensor: return p.clean_ids != p.corrupt_ids


def says(p, role: str, ids=None) -> list[int]:
    "The token of each row at a role."
    at = p.key_positions[role][:, None]
    return (p.clean_ids if ids is None else ids).gather(1, at)[:, 0].tolist()


# every task

@pytest.mark.parametrize("form", FORMS)
def test_classic_rows_are_those_of_before(tokenizer, request, form):
    name = request.node.callspec.params["tokenizer"]
    p = load_pairs(**FORMS[form], tokenizer=tokenizer, n=24)
    assert without_new_role(p)[:16] == GOLDEN[name][form]
    assert p.corruption == corruptions(p.task)[0] and not p.keeps_answer


@pytest.mark.parametrize("form", FORMS)
def test_kinds_have_the_same_rows_and_answers(tokenizer, form):
    kinds = load_kinds(**FORMS[form], tokenizer=tokenizer, n=24)
    classic, *others = kinds.values()
    assert tuple(kinds) == corruptions(classic.task) == tuple(p.corruption for p in kinds.values()) and others
    for p in others:
        for name in ("clean_ids", "attention_mask", "answer_pos", "correct_token_id", "wrong_token_id", "template_id"):
            assert getattr(p, name).equal(getattr(classic, name)), (p.corruption, name)
        assert p.roles == classic.roles and p.dropped == classic.dropped
        for role, at in p.key_positions.items(): assert at.equal(classic.key_positions[role]), (p.corruption, role)
        assert not p.corrupt_ids.equal(classic.corrupt_ids)
    one = others[-1]
    again = load_pairs(**FORMS[form], tokenizer=tokenizer, n=24, corruption=one.corruption)
    assert again.content_hash() == one.content_hash() and again.corruption == one.corruption


@pytest.mark.parametrize("form", FORMS)
def test_a_kind_changes_what_it_says_and_nothing_else(tokenizer, form):
    for kind, p in load_kinds(**FORMS[form], tokenizer=tokenizer, n=24).items():
        modified = [role for role, m in p.is_modified.items() if m]
        assert modified, kind
        at = torch.stack([p.key_positions[role] for role in modified], 1)
        want = torch.zeros_like(p.clean_ids).scatter(1, at, 1).bool()
        if kind != "relation":
            assert changed(p).equal(want), kind
            continue
        for role, stays in p.is_modified.items():
            if not stays: assert says(p, role) == says(p, role, p.corrupt_ids), role
        assert changed(p).any(1).all() and (changed(p).sum(1) > 1).any()


@pytest.mark.parametrize("form", FORMS)
def test_no_kind_brings_in_another_split(tokenizer, form):
    by_split = {s: load_kinds(**FORMS[form], tokenizer=tokenizer, split=s, n=24) for s in ("train", "test")}
    for train in by_split["train"].values():
        for test in by_split["test"].values(): check_disjoint(train=train, test=test)


def test_a_kind_that_a_task_lacks(small):
    for task, has in (("ioi", "s2, s2_new, names, s1_new, io_new, order"), ("factual", "subject, relation")):
        for load in (
            lambda: load_pairs(task, small[False], corruption="digit"),
            lambda: load_kinds(task, small[False], [corruptions(task)[0], "digit"]),
            lambda: load_kinds(task, small[False], "digit"),
        ):
            with pytest.raises(ValueError, match=f"^task '{task}' has no corruption 'digit': there are {has}$"): load()
    with pytest.raises(ValueError, match="no kind of corruption asked for: there are twin, options"):
        load_kinds("winogrande", small[False], [])
    with pytest.raises(ValueError, match="unknown task 'chess'"): corruptions("chess")
    for task, rows in TASKS.items():
        with pytest.raises(ValueError, match="unknown .* corruption 'chess'"):
            next(rows(small[False], corruption="chess"))


def test_a_task_of_one_kind(small, monkeypatch):
    def own(tokenizer, split="test", seed=0):
        for row in TASKS["ioi"](tokenizer, split, seed): yield row._replace(corruption="")
    monkeypatch.setitem(TASKS, "own", own)
    assert corruptions("own") == ("classic",) and list(load_kinds("own", small[False], n=4)) == ["classic"]
    assert load_pairs("own", small[False], n=4).content_hash() == load_pairs("ioi", small[False], n=4).content_hash()
    with pytest.raises(ValueError, match="task 'own' has no corruption 's2': there are classic"):
        load_pairs("own", small[False], corruption="s2")


# IOI

@pytest.mark.parametrize("variant", ioi.VARIANTS)
def test_ioi_names_stand_where_the_kind_puts_them(tokenizer, variant):
    kinds = load_kinds("ioi", tokenizer, n=24, variant=variant)
    assert tuple(kinds) == ioi.CORRUPTIONS == tuple(SAID)
    assert kinds["s2"].clean_ids.equal(load_pairs("ioi", tokenizer, n=24, variant=variant).clean_ids)  # none is dropped
    names, thirds = embedded("names")["first_names"], set()
    for kind, p in kinds.items():
        found = zip(*(says(p, role, p.corrupt_ids) for role in ("io", "s1", "s2")))
        for i, said in enumerate(found):
            io, s, *third = (names[e] for e in p.entity_ids[i].tolist())
            who = dict(zip(("io", "s", "t"), (io, s, *third)))
            assert [tokenizer.decode(t).strip() for t in said] == [who[w] for w in SAID[kind].split()], kind
            assert len({io, s, *third}) == 2 + len(third) == (3 if "t" in SAID[kind].split() else 2)
            if third: thirds.add((i, third[0]))
            assert {split_of(n) for n in (io, s, *third)} == {"test"}
    assert len(thirds) == 24                                               # one third name of a row, in all its kinds


def test_order_keeps_the_answer_and_no_other_kind_does(tokenizer):
    kinds = load_kinds("ioi", tokenizer, n=24)
    assert [kind for kind, p in kinds.items() if p.keeps_answer] == ["order"]
    for kind, p in kinds.items():
        for i, (a, b, again) in enumerate(zip(*(says(p, role, p.corrupt_ids) for role in ("io", "s1", "s2")))):
            answer = {a, b} - {again}                  # whoever is not named again; nobody in particular for a new S2
            assert (answer == {int(p.correct_token_id[i])}) == (kind == "order"), kind
    order, clean = kinds["order"], kinds["order"].clean_ids
    back = order.corrupt_ids.clone()                   # exchanging the two again gives the clean prompt
    row, io, s1 = torch.arange(24), order.key_positions["io"], order.key_positions["s1"]
    back[row, io], back[row, s1] = order.corrupt_ids[row, s1], order.corrupt_ids[row, io]
    assert back.equal(clean) and not order.corrupt_ids.equal(clean)


# the other tasks

def test_other_operand_is_a_problem_of_the_split_that_no_line_has_solved(small):
    alike = 0
    for split in SPLITS:
        kinds = load_kinds("arithmetic", small[False], split=split, n=40)
        p, known = kinds["other"], set(arithmetic.problems("+", split))
        for i in range(40):
            said = small[False].decode(p.corrupt_ids[i][p.attention_mask[i] == 1], skip_special_tokens=True)
            digits = [int(d) for d in re.findall(r"\d", said)]
            shown = [tuple(digits[k:k+2]) for k in range(0, len(digits) - 2, 3)]
            a, b = digits[-2:]
            assert (a, b) in known and not {(a, b), (b, a)} & set(shown)
            alike += small[False].decode(p.wrong_token_id[i]).strip() == str(a + b)
    assert alike > 12                                  # the classic answer, where the split has such a problem


def test_options_are_exchanged():
    swap = winogrande._exchanged
    assert swap("The knife cut the bread as the", ("bread", "knife")) == "The bread cut the knife as the"
    assert swap("The car hit the car door", ("car", "car door")) is None     # one option is named twice
    assert swap("The knife cut", ("knife", "bread")) is None
    told = "The old dog saw the cat because the"
    assert swap(swap(told, ("old dog", "cat")), ("old dog", "cat")) == told


def test_word_problems_name_their_kind(small):
    assert {next(reasoning_rows(small[False], split)).corruption for split in SPLITS} == {"number"}
    rows = [story_row(p, largest=20) for p in styled_problems(n=30, steps=(1,), operations="+-", largest=20)]
    assert {row.corruption for row in rows if row} == {"second"}


# how pairs of several kinds are built, kept and filtered

TOLD = Row(
    "When Ann and Bob met, Bob gave it to",
    "When Ann and Bob met, Ann gave it to",
    " Ann",
    " Bob",
    dict(io=(5, 8), s1=(13, 16), s2=(22, 25)),
    ("s2",),
    0,
    (0, 1),
    "who",
    after=("s1",),
)
OTHER = TOLD._replace(corrupt="When Bob and Ann met, Bob gave it to", modified=("io", "s1"), corruption="order")


@pytest.fixture(scope="module")
def own():
    from rcid.models import train_tokenizer
    return train_tokenizer([TOLD.clean, TOLD.corrupt, OTHER.corrupt] * 9, vocab=400)


def test_a_sentence_stays_if_all_its_kinds_fit(own):
    none = OTHER._replace(corrupt="")
    long = TOLD._replace(corrupt=TOLD.corrupt + " to")
    kinds = build_kinds([dict(a=TOLD, b=none), dict(a=TOLD, b=OTHER), dict(a=long, b=OTHER)], own)
    assert [len(p) for p in kinds.values()] == [1, 1]
    reasons = {"b: the sentence has no such corruption": 1, "clean and corrupt have unequal length": 1}
    assert kinds["a"].dropped == kinds["b"].dropped == reasons
    assert kinds["b"].corruption == "order" and kinds["b"].is_modified["io"] and not kinds["b"].is_modified["s2"]
    with pytest.raises(ValueError, match=r"only 0 of 1 pairs fit .*b: the sentence has no such corruption': 1"):
        build_kinds([dict(a=TOLD, b=none)], own, n=1)
    with pytest.raises(ValueError, match="corruption 'b' is of another sentence .* than 'a': all kinds of a row share"):
        build_kinds([dict(a=TOLD, b=OTHER._replace(wrong=" met"))], own)


def test_several_words_must_all_be_named(own):
    for modified in (("io",), ("io", "s1", "s2"), ()):
        with pytest.raises(ValueError, match="more than the modified word differs"):
            build_pairs([OTHER._replace(modified=modified)], own)
    assert build_pairs([OTHER], own).roles == ["io", "s1", "s1+1", "s2", "end"]
    # a kind that changes the wording is free outside of the roles, and must leave those alone that it does not name
    free = OTHER._replace(roles=dict(s2=TOLD.roles["s2"]), modified=(), rewords=True, after=())
    assert build_pairs([free], own).is_modified == dict(s2=False, end=False)
    for bad in (free._replace(roles=TOLD.roles), free._replace(corrupt=free.clean)):
        with pytest.raises(ValueError, match="a word differs that should stay"): build_pairs([bad], own)
    assert build_pairs([free._replace(roles=TOLD.roles, modified=("io", "s1"))], own).is_modified["s1"]


def test_a_role_after_the_last_token_is_none(own):
    row = TOLD._replace(roles=TOLD.roles | {"to": (34, 36)}, after=("to",))
    assert TOLD.clean[34:36] == "to"
    with pytest.raises(ValueError, match="a role has no token"): build_pairs([row], own)


def test_kinds_are_kept_on_disk_and_are_no_part_of_the_hash(small, tmp_path):
    p = load_kinds("ioi", small[True], ["order"], n=6)["order"]
    back = load_saved_pairs(save_pairs(p, tmp_path/"test@order"))
    assert (back.corruption, back.keeps_answer, back.is_modified) == ("order", True, p.is_modified)
    assert replace(p, corruption="", keeps_answer=False).content_hash() == p.content_hash() == back.content_hash()
    note = read_json(tmp_path/"test@order"/"pairs.json")
    for name in ("corruption", "keeps_answer"): del note[name]
    write_json(tmp_path/"test@order"/"pairs.json", note)
    assert load_saved_pairs(tmp_path/"test@order").corruption == ""         # written before there were kinds


def test_the_filter_keeps_the_same_rows_of_every_kind(small, models, monkeypatch):
    kinds = load_kinds("ioi", small[False], ["s2", "names"], n=6)
    asked, right = [], torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    def answers(model, pairs, batch_size):
        asked.append(pairs.corruption)
        return right
    monkeypatch.setattr("rcid.eval.filter.both_right", answers)
    kept, counts = keep_correct(models["qwen3"], kinds, n=3)
    assert asked == ["s2"] and counts == dict(kept=4, dropped=2) and list(kept) == ["s2", "names"]
    for kind, p in kept.items():
        assert p.corrupt_ids.equal(kinds[kind].corrupt_ids[[0, 2, 3]]) and p.corruption == kind
        assert p.dropped["model is not right in both directions"] == 2
    with pytest.raises(ValueError, match="kind 'names' has other rows than the first"):
        keep_correct(models["qwen3"], kinds | {"names": kinds["names"][1:]})
