"""Public sets of questions with reasons, from their real files where the data folder is there."""

import os
import pytest
from rcid.data.names import SPLITS
from rcid.data.problems import load_reasoning
from rcid.data.public_problems import PUBLIC

HERE = bool(os.environ.get("RCID_DATA_DIR"))


@pytest.mark.skipif(not HERE, reason="RCID_DATA_DIR is not set")
@pytest.mark.parametrize("name", PUBLIC)
def test_real_files_are_problems_in_disjoint_splits(name):
    parts = {split: load_reasoning(name, split, source="path") for split in SPLITS}
    assert all(p.prompt.strip() and p.reasoning.strip() and p.value.strip() for some in parts.values() for p in some)
    prompts = {split: {p.prompt for p in some} for split, some in parts.items()}
    assert all(prompts.values()) and not prompts["train"] & prompts["val"]
    # the sets themselves repeat a few questions between their own parts
    assert len(prompts["train"] & prompts["test"]) <= .01 * len(prompts["test"])
    again = load_reasoning(name, "val", source="path", n=2)
    assert again == parts["val"][:2]


@pytest.mark.skipif(not HERE, reason="RCID_DATA_DIR is not set")
def test_answers_are_what_the_files_say():
    assert {p.value for p in load_reasoning("strategyqa", "test", source="path")} == {"yes", "no"}
    assert {p.value for p in load_reasoning("arc_challenge", "test", source="path")} <= set("ABCDE1234")
    trained = [p for split in ("train", "val") for p in load_reasoning("math23k", split, source="path")]
    tree = [p for p in trained if p.prompt.startswith("镇海雅乐学校")]
    assert [(p.reasoning, p.value) for p in tree][:1] == [("(11-1)*2 = 20.", "20")]


def test_bad_requests():
    with pytest.raises(ValueError, match="unknown reasoning dataset 'maths': there are word_problems, .*hotpotqa"):
        load_reasoning("maths")
    with pytest.raises(ValueError, match="strategyqa is not embedded: source is 'path'"): load_reasoning("strategyqa")
    with pytest.raises(TypeError, match="belong to word_problems, not to math23k"):
        load_reasoning("math23k", source="path", largest=5)


def test_rows_without_a_problem_that_needs_thinking_are_refused(monkeypatch):
    row = {"question": "How many?", "answer": "#### 3"}                    # no reasoning
    monkeypatch.setattr("rcid.data.problems.read_rows", lambda *where: [row, row])
    with pytest.raises(ValueError, match="gsm8k: none of 2 rows of split 'test' is a problem that needs thinking"):
        load_reasoning("gsm8k", source="path")
