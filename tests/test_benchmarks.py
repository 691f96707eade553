"""The committed benchmark results are whole, and the benchmark's own rulers measure what they say. Nothing here is
about how fast a machine is."""

import json, sys
import pytest, torch
from conftest import ROOT

sys.path.append(str(ROOT/"tests"/"benchmarks"))
PARTS = ("sweep", "peers", "step", "prices", "cka", "startup")


@pytest.fixture(scope="module")
def results(): return json.loads((ROOT/"tests"/"benchmarks"/"results.json").read_text())


def test_results_have_every_part_from_one_thread(results):
    assert set(results) == set(PARTS)
    for part, r in results.items():
        assert r["machine"]["threads"] == 1 and {"cpu", "torch", "transformers", "python"} <= set(r["machine"]), part
        assert r.get("rows"), part


def test_results_agree_with_the_references(results):
    assert all(e["error"] <= 1e-4 for e in results["sweep"]["errors"]) and {
        e["mode"] for e in results["sweep"]["errors"]
    } == {"noising", "denoising"}
    assert all(r["difference"] <= 1e-4 for r in results["peers"]["rows"])
    assert all(r["loss_difference"] <= 1e-4 for r in results["step"]["rows"] if r["step"] in ("rcid", "+ fused AdamW"))
    assert (
        all(r["error"] <= 1e-5 for r in results["cka"]["rows"] if r["tool"] == "rcid")
        and results["cka"]["models"]["error"] <= 1e-5
    )
    assert all(m["peak_mib"] <= m["budget_mib"] for m in results["sweep"]["memory"])


def test_peers_are_there_or_a_note_says_why(results):
    said = json.dumps([r.get("notes") for r in results.values()])
    for part, peers in dict(
        peers=("transformer-lens", "nnsight", "pyvene"), step=("trl",), cka=("torch_cka", "ckatorch")
    ).items():
        for peer in peers:
            assert any(peer in json.dumps(row) for row in results[part]["rows"]) or peer.replace("-", "_") in said, peer


def test_a_part_replaces_its_own_numbers_only(tmp_path, monkeypatch):
    import common
    monkeypatch.setattr(common, "RESULTS", tmp_path/"results.json")
    common.save("step", dict(rows=[dict(cost=1 / 3)])), common.save("cka", dict(rows=[])), common.save(
        "step", dict(rows=[dict(cost=2 / 3)])
    )
    kept = json.loads((tmp_path/"results.json").read_text())
    assert (
        set(kept) == {"step", "cka"}
        and kept["step"]["rows"] == [{"cost": 0.6667}]
        and kept["cka"]["machine"]["threads"] == torch.get_num_threads()
    )


@pytest.fixture(scope="module")
def scale_run(): return json.loads((ROOT/"tests"/"benchmarks"/"gpu.json").read_text())


def test_scale_run_has_the_settings_of_its_scale(scale_run, tmp_path):
    from scale import settings
    from rcid.core.params import load_params
    from rcid.pipeline.workspace import compose_params
    compose_params(tmp_path/"params.yaml", "scale=gpu")
    now, then = settings(load_params(tmp_path/"params.yaml")), json.loads(json.dumps(scale_run["settings"]))
    # that run's text: the page says so, until the run is made again
    assert then["lm"].pop("source") == "embedded"
    for key in ("source", "samples", "path", "hub"): now["lm"].pop(key)
    now["data"].pop("corruptions")           # kinds that this run did not measure; the classic one is always there
    assert then == now, "conf/scale/gpu.yaml changed after the run: run it again (tests/benchmarks/scale.py)"


def test_scale_run_has_every_student_of_the_matrix(scale_run):
    s, e = scale_run["settings"], scale_run["experiments"]
    assert len(s["seeds"]) >= 3
    matrix = {
        (f, t, m)
        for block in ("main_matrix", "extra_matrix")
        for f in s[block]["families"]
        for t in s[block]["tasks"]
        for m in s[block]["methods"]
    }
    assert len(matrix) == 42
    rows = {(r["family"], r["task"], r["method"]): r for r in e["exp2"]["rows"]}
    assert matrix <= set(rows) and all(rows[k]["n_seeds"] == len(s["seeds"]) for k in matrix)
    assert {(p["family"], p["task"], p["method"], p["seed"]) for p in e["exp3"]["points"]} == {
        (*k, seed) for k in matrix for seed in s["seeds"]
    }
    assert scale_run["seconds"]["distill"]["stages"] + scale_run["seconds"]["distill_extra"]["stages"] == len(
        matrix
    ) * len(s["seeds"])
    assert all(m["pilot"]["passed"] for m in scale_run["models"].values()) and set(scale_run["models"]) == set(
        s["families"]
    )


def test_calibration_at_its_scale_has_its_settings_and_eight_plants_of_a_class(tmp_path):
    from collections import Counter
    from rcid.core.params import load_params
    from rcid.pipeline.workspace import compose_params
    run = json.loads((ROOT/"tests"/"benchmarks"/"calibrate.json").read_text())
    compose_params(tmp_path/"params.yaml", "scale=calibrate")
    now = json.loads(json.dumps(load_params(tmp_path/"params.yaml").calibrate.model_dump()))
    assert run["settings"] == now, "settings of plants changed after the run: run it again (tests/benchmarks/scale.py)"
    c = run["calibration"]
    plants = Counter((p["architecture"], p["cls"]) for p in c["plants"])
    for architecture in ("qwen3", "llama"):
        assert all(plants[architecture, cls] >= 8 for cls in ("moved", "rerouted", "shortcut")), architecture
    judged = {(r["architecture"], r["cls"]): r for r in c["rows"] if r["reading"] == "route" and "auroc" in r}
    assert all(2 * r["n_plants"] >= plants[key] for key, r in judged.items())          # half of them chose nothing
    assert {part for one in c["real"] for part in ("rewrites", "twins", "moved") if one[part]} == {
        "rewrites", "twins", "moved"}


def test_experiment_2a_with_every_method_has_its_settings_and_all_students(tmp_path):
    from rcid.core.params import load_params
    from rcid.pipeline.workspace import compose_params
    run = json.loads((ROOT/"tests"/"benchmarks"/"repair.json").read_text())
    compose_params(tmp_path/"params.yaml", "scale=laptop", "+plants=full", "+repair=full")
    c = json.loads(json.dumps(load_params(tmp_path/"params.yaml").planted.model_dump()))
    assert run["settings"] == c, "settings changed after the run: run it again (tests/benchmarks/scale.py)"
    rows = {(r["architecture"], r["direction"], r["method"], tuple(r["kinds"]), tuple(r["roles"])): r
            for r in run["repair"]["rows"]}
    judge = [name for name, route in c["routes"].items() if not route["develop"]]
    assert len(c["architectures"]) == 2 and len(judge) == 3 and c["runs"] == 5
    # planted teachers hand over at once: none of them has a mediating site to look at, and the guide says so
    nowhere = {k for k, v in c["variants"].items() if v["choice"] == "mediating"}
    assert nowhere == {"rcid_m_mediating"} and not any(key[2] in nowhere for key in rows)
    for method in [*c["methods"], *(c["variants"].keys() - nowhere)]:
        for architecture in c["architectures"]:
            for name in judge:
                first = rows[architecture, name, method, tuple(c["kinds"]), tuple(c["roles"])]["first"]
                assert first["n"] + first["undefined"] == c["runs"], (architecture, name, method)
    widths = {len(r["kinds"]) for r in run["repair"]["reach"] if r["method"] == "rcid_m"}
    assert widths == {1, 2, 3} and run["repair"]["validated"]["route"]


def test_true_widths_were_measured_of_every_stage_of_a_part():
    import true_widths
    parts = json.loads((ROOT/"tests"/"benchmarks"/"true_widths.json").read_text())["parts"]
    assert parts and set(parts) <= {*true_widths.FAMILIES, "kv"}       # the budget page names those that are missing
    for part, measured in parts.items():
        assert {m["layers"] for m in measured} == {2, 4}, part
        expected = set(true_widths.KV if part == "kv" else true_widths.PAIRS)
        assert all(set(m["stages"]) == expected and min(m["stages"].values()) > 0 for m in measured), part
    assert "kv" not in parts or len({m["problems"] for m in parts["kv"]}) == 2
    host = json.loads((ROOT/"metrics"/"budget.json").read_text())["host"]
    assert {part: set(of) for part, of in host.items()} == {part: set(of[0]["stages"]) for part, of in parts.items()}


def test_host_memory_grows_by_what_a_layer_and_a_problem_take_beyond_weights():
    import ast
    cells = json.loads((ROOT/"nbs"/"experiments"/"budget.ipynb").read_text(encoding="utf-8"))["cells"]
    (source,) = (s for c in cells if "def grown(" in (s := "".join(c["source"])))
    (grown,) = (f for f in ast.parse(source).body if isinstance(f, ast.FunctionDef))
    exec(compile(ast.Module([grown], []), "budget.ipynb", "exec"), space := {})
    few = dict(layers=2, teacher=2., student=1., problems=32, stages={"keeps": 3., "drops": 3., "trains seed=1": 9.})
    four = dict(layers=4, teacher=4., student=2., problems=32, stages={"keeps": 8., "drops": 4., "trains seed=1": 15.})
    more = four | dict(problems=96, stages={"keeps": 8., "drops": 4., "trains seed=1": 15.64})
    # a layer weighs 1 and .5, or 1 and 4 x .5 where the student is trained: 2.5, .5 and 3 a layer were seen
    at = space["grown"]([few, four], 10, {}, dict(trains=4), {})
    most = lambda at: {stage: gb["most"] for stage, gb in at.items()}
    assert most(at) == pytest.approx({"keeps": 8 + 6 * 1., "drops": 4., "trains seed=1": 15.})
    # .01 a problem with four layers, .025 with ten; it holds 132 at once
    at = space["grown"]([few, four, more], 10, dict(trains=132), dict(trains=4), dict(trains=1))
    assert most(at) == pytest.approx({"keeps": 14., "drops": 4., "trains seed=1": 15. + 100 * .025})
    # of four layers the card holds both models once: 4 and 2
    beside = {stage: gb["beside"] for stage, gb in at.items()}
    assert beside == pytest.approx(most(at) | {"trains seed=1": 15. + 100 * .025 - 4 - 2})
    assert {stage: gb["measured"] for stage, gb in at.items()} == four["stages"]


def test_scale_run_of_other_sources_or_unfinished_is_refused(tmp_path, monkeypatch):
    import scale, subprocess
    monkeypatch.setenv("RCID_ROOT", str(tmp_path))
    git = lambda *a: subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", *a], cwd=tmp_path, check=True, capture_output=True
    )
    stages = json.dumps(dict(stages={e: dict(cmd="true", deps=["rcid/a.py"]) for e in scale.EXPERIMENTS}))
    for folder in (tmp_path, tmp_path/".workspaces"/"gpu"):
        (folder/"rcid").mkdir(parents=True), (folder/"nbs"/"experiments").mkdir(parents=True)
        (folder / "rcid" / "a.py").write_text("a = 1\n"), (folder / "nbs" / "experiments" / "e.ipynb").write_text(
            "{}\n"
        ), (folder / "dvc.yaml").write_text(stages)
    git("init", "-q"), git("add", "rcid", "nbs", "dvc.yaml"), git("commit", "-qm", "a")
    dvc = lambda *a: subprocess.run(
        [sys.executable, "-m", "dvc", *a], cwd=tmp_path / ".workspaces" / "gpu", check=True, capture_output=True
    )
    dvc("init", "--no-scm", "-q"), dvc("repro", "-q", *scale.EXPERIMENTS[:4])
    with pytest.raises(SystemExit, match="is not up to date:\nexp5:"): scale.collect("gpu", "HEAD")
    dvc("repro", "-q")
    # nothing stale: it goes on to the settings
    with pytest.raises(FileNotFoundError, match="params.yaml"): scale.collect("gpu", "HEAD")
    (tmp_path/".workspaces"/"gpu"/"rcid"/"a.py").write_text("a = 2\n")
    with pytest.raises(SystemExit, match="rcid/a.py are not those of commit HEAD"): scale.collect("gpu", "HEAD")
