"""lm-evaluation-harness on local copies: its own prompts and metrics, our data."""
import json, os
from pathlib import Path
import pytest
from ruamel.yaml import YAML
from conftest import ROOT
from rcid.core import write_json
from rcid.eval.bench import COPIES, harness_folder, local_tasks, read_scores, run_bench

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
    limit = {"arc_challenge": 8, "gsm8k": 2}
    scores = run_bench(model, tokenizers["llama"], list(limit), limit=limit, max_length=512)
    arc = scores["arc_challenge"]
    assert scores["gsm8k"]["n"] == 2 and scores["gsm8k"]["exact_match (strict-match)"] == 0
    assert arc["n"] == 8 and set(arc) == {"n", "acc", "acc_norm"}
    assert 0 <= arc["acc"] <= 1 and round(arc["acc"] * 8) == arc["acc"] * 8


def asked(monkeypatch, fails_at: str = "") -> list:
    "What the harness is asked from now on, (benchmark, limit); it answers by rote, and is killed at one benchmark."
    seen = []
    def scores_of(model, tokenizer, name, source, limit, **_):
        if name == fails_at: raise KeyboardInterrupt
        seen.append((name, limit))
        return dict(n=limit or 100, acc=.5)
    monkeypatch.setattr("rcid.eval.bench._scores_of", scores_of)
    return seen


THREE = ["arc_challenge", "gsm8k", "bbh"]


def test_a_killed_run_goes_on_behind_what_is_done(make_model, tokenizers, tmp_path, monkeypatch):
    model, how = make_model("llama", layers=1), dict(tasks=THREE, limit={"gsm8k": 7}, kept=tmp_path)
    seen = asked(monkeypatch, fails_at="bbh")
    with pytest.raises(KeyboardInterrupt): run_bench(model, tokenizers["llama"], **how)
    assert seen == [("arc_challenge", None), ("gsm8k", 7)]
    again = asked(monkeypatch)
    scores = run_bench(model, tokenizers["llama"], **how)
    assert again == [("bbh", None)] and scores["gsm8k"] == dict(n=7, acc=.5) and list(scores) == THREE
    assert run_bench(model, tokenizers["llama"], **how) == scores and len(again) == 1


def test_what_another_model_or_limit_left_is_not_taken(make_model, tokenizers, tmp_path, monkeypatch):
    seen, how = asked(monkeypatch), dict(tasks=["gsm8k"], kept=tmp_path)
    first = make_model("llama", layers=1)
    run_bench(first, tokenizers["llama"], limit=3, **how)
    run_bench(first, tokenizers["llama"], limit=4, **how)
    run_bench(make_model("llama", layers=1, seed=5), tokenizers["llama"], limit=4, **how)
    assert seen == [("gsm8k", 3), ("gsm8k", 4), ("gsm8k", 4)]
    (tmp_path/"gsm8k.json").write_text("{")                                       # the disk was full
    run_bench(first, tokenizers["llama"], limit=4, **how)
    assert len(seen) == 4


def test_every_student_is_a_stage_and_its_record_is_read(tmp_path):
    stages = YAML(typ="safe").load((ROOT/"dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert stages["bench"]["matrix"] == stages["kv_fuse"]["matrix"] and "metrics/bench" in stages["exp7"]["deps"]
    for name in ("fixed-42", "none-42"): write_json(tmp_path/f"{name}.json", dict(tasks=[], scores={"gsm8k": {"n": 1}}))
    assert read_scores(tmp_path) == {name: {"gsm8k": {"n": 1}} for name in ("fixed-42", "none-42")}
    assert read_scores(tmp_path/"absent") == {}


def test_a_limit_for_a_benchmark_that_is_not_run_is_refused():
    with pytest.raises(ValueError, match="bench.limit names bbh, which bench.tasks does not: add it there"):
        run_bench(None, None, ["gsm8k"], limit={"bbh": 3, "gsm8k": 2})


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
