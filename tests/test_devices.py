"""Which device is taken; what runs on one is checked by tests/on_fake_device.py, stage by stage, behind these tests."""

import json, math, re
from pathlib import Path
import pytest, torch
from conftest import ROOT
from rcid.core.hardware import in_bf16, pick_device, pick_dtype
from on_fake_device import FEW, FOLDERS, GUIDE, NO_MODEL, ONE_OF_EACH, TAKEN, compared, differences, page


def test_the_variable_names_the_device_and_an_argument_wins(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("RCID_DEVICE", "cuda:1")
    assert pick_device() == "cuda:1" and pick_device("cpu") == "cpu"
    monkeypatch.setenv("RCID_DEVICE", "")
    assert pick_device() == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_device_that_torch_does_not_know_is_refused(monkeypatch):
    monkeypatch.setenv("RCID_DEVICE", "gpu0")
    with pytest.raises(ValueError, match=r"unknown device 'gpu0' \(RCID_DEVICE\): use cpu, cuda or cuda:1"):
        pick_device()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("RCID_DEVICE", "cuda:1")
    with pytest.raises(ValueError, match="no device cuda:1 here: torch sees 1 CUDA devices; use another, or cpu"):
        pick_device()
    assert pick_device("cpu") == "cpu"


def test_numbers_are_rounded_to_sixteen_bits_on_cuda_alone():
    devices = ("cpu", "cuda", torch.device("cuda", 1), "mps", "fakegpu")
    assert [in_bf16(d) for d in devices] == [False, True, True, False, False]
    assert [pick_dtype(None, d) for d in devices[:2]] == [torch.float32, torch.bfloat16]


# the script's own ruler

@pytest.mark.parametrize("cpu, device", (
    ({"a": 1.0}, {"a": 1.00002}), ({"a": [1, 2]}, {"a": [1]}), ({"a": 1}, {}), ({}, {"a": 1}), ({"a": "x"}, {"a": "y"}),
    ({"a": None}, {"a": 0.0}), ({"a": math.nan}, {"a": 0.0}), ({"a": 1e-3}, {"a": 1.02e-3}),
    ({"a": True}, {"a": False}), ({"f": "artifacts/plants/x/0"}, {"f": "artifacts/plants/y/0"}),
))
def test_what_is_not_the_same_is_found(cpu, device):
    assert len(list(differences(cpu, device))) == 1


@pytest.mark.parametrize("cpu, device", (
    ({"a": [1.0, 100.0, None]}, {"a": [1.000009, 100.0009, None]}), ({"a": math.nan}, {"a": math.nan}),
    ({"f": "artifacts/plants/x/0"}, {"f": "artifacts/plants/x/1"}),
))
def test_what_is_the_same_is_not(cpu, device): assert not list(differences(cpu, device))


def test_a_stage_that_wrote_nothing_and_one_that_wrote_something_else_fail(tmp_path):
    for name, value in (("cpu", 1.0), ("device", 1.1)):
        (tmp_path/name).mkdir()
        (tmp_path/name/"a.json").write_text(json.dumps(dict(x=value)))
    with pytest.raises(SystemExit, match=r"FAILED in here: 1 numbers differ\na.json: .x is 1.0 on the CPU and 1.1"):
        compared("here", tmp_path/"cpu", tmp_path/"device")
    (tmp_path/"device"/"a.json").unlink()
    with pytest.raises(SystemExit, match="a.json was not written on the device"):
        compared("here", tmp_path/"cpu", tmp_path/"device")
    with pytest.raises(SystemExit, match="there are no metrics on the CPU"):
        compared("here", tmp_path/"none", tmp_path/"device")
    assert compared("here", tmp_path/"cpu", tmp_path/"cpu") == 1


def test_the_students_of_the_readme_are_made_on_the_device():
    lines = "".join("".join(cell["source"]) for cell in json.loads((ROOT/"nbs"/"index.ipynb").read_text())["cells"])
    students = set(re.findall(r'"artifacts/students/([^"]+)"', lines))
    assert students and [name for name in students if f"distill@{name}" not in ONE_OF_EACH] == []


def test_ci_runs_the_script_and_what_it_leaves_out_is_run_for_a_few_steps():
    assert "tests/on_fake_device.py" in (ROOT/".ci"/"run").read_text(encoding="utf-8").splitlines()[-1]
    assert TAKEN == ("models@", "kv_base@") and all(f"{key}=3" in FEW for key in (
        "models.llama.pretrain_steps", "models.qwen3.pretrain_steps", "teachers.models.student.steps"))
    assert (ROOT/"nbs"/"guides"/f"{GUIDE}.ipynb").exists() and Path(FOLDERS[0]).name == "data"


def test_pages_that_are_left_out_run_no_model():
    for name in NO_MODEL:
        cells = json.loads((ROOT/"nbs"/"experiments"/f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        assert not re.search(r"\b(load_model|load_trained|read_plant|pick_device|model_device|\.to\()", code), name
    assert page("kv_distill@kava-42") == "kv_distill" and page("calibrate") == "calibrate"
