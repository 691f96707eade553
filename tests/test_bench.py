"""lm-evaluation-harness on local copies: its own prompts and metrics, our data."""
import json, os
from pathlib import Path
import pytest
from rcid.eval.bench import COPIES, harness_folder, local_tasks, run_bench

needs_data = pytest.mark.skipif(
    not os.environ.get("RCID_DATA_DIR"), reason=f"{len(COPIES)} benchmarks not run: RCID_DATA_DIR is not set"
)


@needs_data
@pytest.mark.parametrize("name", COPIES)
def test_local_copy_has_the_columns_of_the_harness(name, tmp_path):
    tasks = [json.loads(Path(t).read_text()) for t in local_tasks(name, tmp_path)]
    assert len(tasks) == len({t["task"] for t in tasks}) and all(
        Path(t["include"]).is_relative_to(harness_folder()) for t in tasks
    )
    rows = [
        json.loads(l)
        for t in tasks
        for f in t["dataset_kwargs"]["data_files"].values()
        for l in Path(f).read_text(encoding="utf-8").splitlines()
    ]
    assert len(rows) > 100 and len({tuple(sorted(r)) for r in rows}) == 1


@needs_data
def test_arc_and_gsm8k_on_a_random_model(make_model, tokenizers):
    model = make_model("llama", layers=1)
    scores = run_bench(model, tokenizers["llama"], ["arc_challenge", "gsm8k"], limit=2, max_length=512)
    assert scores["arc_challenge"]["n"] == 2 and set(scores["arc_challenge"]) == {"n", "acc", "acc_norm"}
    assert scores["gsm8k"]["n"] == 2 and scores["gsm8k"]["exact_match (strict-match)"] == 0
    arc = run_bench(model, tokenizers["llama"], ["arc_challenge"], limit=8, max_length=512)["arc_challenge"]
    assert arc["n"] == 8 and 0 <= arc["acc"] <= 1 and round(arc["acc"] * 8) == arc["acc"] * 8


def test_bad_input(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="unknown benchmark 'mmlu'"): local_tasks("mmlu", tmp_path)
    with pytest.raises(ValueError, match="gpqa.*no local copy"): local_tasks("gpqa", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match=r"benchmarks need lm-evaluation-harness: `pip install -e '\.\[dev\]'`"
    ):
        harness_folder()
    monkeypatch.undo()
    monkeypatch.delenv("RCID_DATA_DIR", raising=False)
    with pytest.raises(FileNotFoundError, match="needs RCID_DATA_DIR"): local_tasks("gsm8k", tmp_path)
