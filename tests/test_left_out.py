"""A family that is not required and stops at a gate: the others run to the end, in one command."""
import json, shutil
from pathlib import Path
import numpy as np, pytest, toy
from conftest import ROOT, code_of, page
from rcid.core.params import load_params
from rcid.core.paths import read_yaml
from rcid.models import load_model
from rcid.pipeline.left_out import without
from rcid.pipeline.workspace import compose_params
from rcid.report.paper import keys_used

SCALES = sorted(f.stem for f in (ROOT/"conf"/"scale").glob("*.yaml"))
STAGES = """
stages:
  models:
    matrix: {family: "${families}"}
    cmd: test ${item.family} != "${refused}" && echo ok > models-${item.family}.txt
    params: [refused]
    outs: ["models-${item.family}.txt"]
  pilot:
    matrix: {family: "${families}"}
    cmd: python pilot.py ${item.family}
    deps: [pilot.py, "models-${item.family}.txt"]
    params: [weak]
    metrics: [{"metrics/pilot/${item.family}.json": {cache: false}}]
  distill:
    matrix: {family: "${main_matrix.families}"}
    cmd: echo ${item.family} >> trail; echo ok > student-${item.family}.txt
    deps: ["metrics/pilot/${item.family}.json"]
    outs: ["student-${item.family}.txt"]
  distill_extra:
    matrix: {family: "${extra_matrix.families}"}
    cmd: echo ${item.family} >> trail; echo ok > student-${item.family}.txt
    deps: ["metrics/pilot/${item.family}.json"]
    outs: ["student-${item.family}.txt"]
  paper:
    cmd: cat params.yaml > paper.txt
    deps: [metrics/pilot]
    params: [families, left_out]
    outs: [paper.txt]
"""
PILOT = """
import json, sys, yaml
family, p = sys.argv[1], yaml.safe_load(open("params.yaml"))
failed = ["names are 3, bound 20"] if family == p["weak"] else []
json.dump(dict(passed=not failed, failed=failed), open(f"metrics/pilot/{family}.json", "w"))
"""


def make(folder: Path, **params) -> Path:
    "A pipeline of two families; llama stands in the extra matrix only, and is not required."
    (folder/"metrics"/"pilot").mkdir(parents=True)
    given = dict(
        families=["qwen3", "llama"], refused="nobody", weak="nobody", left_out={},
        main_matrix={"families": ["qwen3"]}, extra_matrix={"families": ["llama"]},
        models={"qwen3": {"required": True}, "llama": {"required": False}},
    )
    (folder/"params.yaml").write_text(json.dumps({**given, **params}))
    (folder/"dvc.yaml").write_text(STAGES)
    (folder/"pilot.py").write_text(PILOT)
    shutil.copytree(Path(toy.initialised().name)/".dvc", folder/".dvc")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("gate, params", (("models", {"refused": "llama"}), ("pilot", {"weak": "llama"})))
def test_the_others_run_to_the_end(tmp_path, gate, params):
    folder = make(tmp_path/"work", **params)
    code, said = toy.launch(folder, "--workers", "1", "--first", "pilot")
    assert code == 0 and f"llama stopped at {gate}, is not required, and is left out" in said, said
    assert (folder/"trail").read_text().split() == ["qwen3"]                  # each once, and llama's student never
    assert f"llama: {gate}" in (folder/"paper.txt").read_text()
    assert ("its gates: names are 3, bound 20" in said) == (gate == "pilot")
    assert toy.launch(folder)[1].startswith("nothing to do")
    make_anew = json.loads((make(tmp_path/"other", **params)/"params.yaml").read_text())
    (folder/"params.yaml").write_text(json.dumps(make_anew))                  # as `make repro` does
    code, said = toy.launch(folder, "--workers", "1")
    assert code == 0 and "is left out" in said and (folder/"trail").read_text().split() == ["qwen3"], said
    (folder/"params.yaml").write_text(json.dumps({**make_anew, "refused": "nobody", "weak": "nobody"}))
    code, said = toy.launch(folder, "--workers", "1")                         # its licence came, its names are enough
    assert code == 0 and "left out" not in said and "llama" in (folder/"trail").read_text(), said
    assert "llama" not in (folder/"paper.txt").read_text().partition("left_out")[2].partition("main_matrix")[0]


def test_a_required_family_still_stops_what_needs_it(tmp_path):
    folder = make(tmp_path/"work", refused="qwen3")
    code, said = toy.launch(folder, "--workers", "1")
    assert code == 1 and "left out" not in said and "skipped paper" in said, said
    assert json.loads((folder/"params.yaml").read_text())["families"] == ["qwen3", "llama"]


def test_what_was_asked_for_by_name_is_not_left_out(tmp_path):
    folder = make(tmp_path/"work", refused="llama")
    code, said = toy.launch(folder, "models@llama", "--workers", "1")
    assert code == 1 and "failed  models@llama" in said and "left out" not in said, said


def test_the_matrix_of_the_paper_without_llama(tmp_path):
    "The extra matrix has no family left, experiment 7 no teacher that needs the licence; the params are still valid."
    compose_params(tmp_path/"all.yaml", "scale=a100")
    before = load_params(tmp_path/"all.yaml").model_dump(mode="json")
    (tmp_path/"params.yaml").write_text(json.dumps(without(before, {"llama": "models"})))
    p = load_params(tmp_path/"params.yaml")
    assert p.families == ["qwen3"] and p.extra_matrix.families == [] and p.left_out == {"llama": "models"}
    assert {f for f, *_ in p.cells} == {"qwen3"} and len(p.cells) == 36
    assert p.teachers.base_models == ["qwen3", "student"] and p.teachers.names == ["qwen3"]
    assert p.teachers.run == ["none", "single_qwen3"]
    assert without(before, {"llama": "pilot"})["teachers"] == before["teachers"]   # the model is there all the same
    assert without(before, {"llama": "pilot", "qwen3": "pilot"}) is None


@pytest.mark.parametrize("scale", SCALES)
def test_params_without_a_family_are_valid_at_every_scale(scale, tmp_path):
    compose_params(tmp_path/"all.yaml", f"scale={scale}")
    before = load_params(tmp_path/"all.yaml").model_dump(mode="json")
    for family in before["families"]:
        new = without(before, {family: "pilot"})
        if new is None: continue
        (tmp_path/"params.yaml").write_text(json.dumps(new))
        assert family not in load_params(tmp_path/"params.yaml").families


def test_a_gated_repository_names_its_page(monkeypatch):
    from transformers import AutoModelForCausalLM
    said = "You are trying to access a gated repo.\nMake sure to have access to it at https://hub/our/model.\n401 No"
    def refuse(*args, **options): raise OSError(said)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(RuntimeError) as e: load_model({"hub": "our/model"})
    assert str(e.value) == (
        "could not load our/model: You are trying to access a gated repo. Make sure to have access to it at"
        " https://hub/our/model. Then set HF_TOKEN to a token of yours."
    )
    said = "our/model is not a valid identifier\nmore"
    with pytest.raises(RuntimeError, match="identifier .no folder here has this name, so it was taken for a hub id.$"):
        load_model({"hub": "our/model"})


def test_a_family_without_a_method_of_the_other_is_drawn_without_it():
    "At the scale a100 LLaMA has two of four methods: experiment 1 asked for files that no stage makes."
    def cell(family, method, seed, task="ioi"): return dict(family=family, method=method, seed=seed, task=task)
    cells = [cell("qwen3", "undistilled", 0), cell("qwen3", "fitnets", 42), cell("qwen3", "fitnets", 43),
        cell("llama", "undistilled", 0), cell("llama", "rcid", 42), cell("llama", "standard_kd", 42, "factual")]
    shown = page("exp1").first_seeds(cells, "ioi")
    assert shown == {"qwen3": {"undistilled": 0, "fitnets": 42}, "llama": {"undistilled": 0, "rcid": 42}}


def test_a_family_of_which_no_method_is_shown_has_no_row():
    "`KeyError: 'llama'`, where the figures of experiment 1 showed none of its methods."
    exp1, asked = page("exp1"), []
    def read_effects(family, task, *student):
        asked.append((family, *student))
        return {"trained": np.full((4, 2), float(len(student)))}
    exp1.read_effects = read_effects
    shown = exp1.first_seeds([dict(family="qwen3", method="rcid", seed=42, task="ioi"),
                              dict(family="llama", method="crd", seed=42, task="ioi")], "ioi")
    effects = exp1.effects_shown(shown, ["llama", "qwen3"], "ioi")
    assert list(effects) == ["qwen3"] and asked == [("qwen3",), ("qwen3", "rcid", 42)]
    site = [(0, "end"), (1, "end")]
    assert len(exp1.effect_scatter(effects, {"llama": site, "qwen3": site}).axes) == 1
    with pytest.raises(ValueError, match="no family has a method"): exp1.effect_scatter({}, {})
    source = "".join(code_of(ROOT/"nbs"/"experiments"/"exp1.ipynb"))
    assert "shown[family]" not in source, "and the routes are drawn without them"


def test_the_paper_asks_for_no_family_by_name():
    "Without LLaMA there is no sentence on LLaMA: a claim of that name stopped the paper."
    scales = [read_yaml(ROOT/"conf"/"scale"/f"{scale}.yaml") for scale in SCALES]
    families = {family for scale in scales for family in scale.get("models", {})}
    assert families == {"llama", "qwen3"}
    assert [key for key in keys_used(ROOT/"paper") if families & set(key.split("."))] == []
