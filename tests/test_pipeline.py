"""The pipeline: stages declare what they use; at tiny scale everything runs, nothing runs twice, a killed stage goes
on."""

import functools, json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest
from conftest import ROOT, environment, output_of, run
from ruamel.yaml import YAML
from rcid.core import load_params, read_json
from rcid.data import load_saved_pairs
from rcid.pipeline.stage import code_view, module_deps, write_code_views
from rcid.report.paper import PaperError, fill, keys_used
from rcid.report.values import read_values

yaml = YAML(typ="safe")
STAGES = yaml.load((ROOT/"dvc.yaml").read_text(encoding="utf-8"))["stages"]
NOTEBOOK = {
    name: m[1]
    for name, s in STAGES.items()
    if (m := re.match(r"python -m rcid\.pipeline\.stage (\w+)", s["cmd"])) and m[1] != "code"
}
EXPERIMENTS = ROOT/"nbs"/"experiments"
DVC = (sys.executable, "-m", "dvc")


def names(items): return [i if isinstance(i, str) else next(iter(i)) for i in items]


# what dvc.yaml says

def test_a_stage_depends_on_its_code_and_on_the_modules_this_reaches(tmp_path, monkeypatch):
    for part in ("rcid", "nbs/experiments"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv("RCID_ROOT", str(tmp_path))
    def views():
        write_code_views()
        return {f.stem: f.read_text(encoding="utf-8") for f in (tmp_path/"artifacts"/"code").glob("*.py")}
    before = views()
    with open(tmp_path/"rcid"/"kv"/"fusion.py", "a") as f: f.write("# another line\n")
    changed = {name for name, text in views().items() if text != before[name]}
    assert (
        changed == {n for n in before if "rcid/kv/fusion.py" in module_deps(code_view(EXPERIMENTS / f"{n}.ipynb"))}
        and "kv_fuse" in changed
        and not changed & {"pilot", "distill"}
    )
    assert {"nbs/experiments", "rcid", "data"} == set(STAGES["code"]["deps"])


@pytest.mark.parametrize("stage", NOTEBOOK)
def test_stage_declares_its_notebook_and_coordinates(stage):
    s, notebook = STAGES[stage], NOTEBOOK[stage]
    # the paper names cells of all pages, so it depends on the code of all
    own = "artifacts/code" if stage == "paper" else f"artifacts/code/{notebook}.py"
    assert (EXPERIMENTS/f"{notebook}.ipynb").exists() and own in s["deps"]
    cells = json.loads((EXPERIMENTS/f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    tagged = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])]
    given = re.findall(r" (\w+)=", s["cmd"])
    takes = set(re.findall(r"(?m)^(\w+) *=", "\n".join(tagged)))
    assert set(given) <= takes and (
        set(given) == takes or "matrix" not in s
    ), "the parameters cell and the command differ"
    assert set(s.get("matrix", {})) <= set(
        re.findall(r"\$\{item\.(\w+)\}", s["cmd"])
    ), "a coordinate of the matrix is not handed over"
    record = f"runs/{notebook}/" + ("-".join(re.findall(r"=(\S+)", s["cmd"])) or notebook) + ".ipynb"
    assert record in names(s["outs"]), "the executed notebook is not an output"
    # metrics are in git
    assert [m for m in s.get("metrics", []) if next(iter(m.values()))["cache"]] == []


@pytest.mark.parametrize("stage", NOTEBOOK)
def test_declared_params_are_the_ones_read(stage):
    code = code_view(EXPERIMENTS/f"{NOTEBOOK[stage]}.ipynb")
    declared = {p if isinstance(p, str) else next(iter(p)) for p in STAGES[stage].get("params", [])}
    p, top = r"\b(?:p|load_params\(\))\.", {d.split(".")[0] for d in declared}
    used = set(re.findall(p + r"(\w+)", code)) - {"models"}
    # what the property is made of
    if "cells" in used: used = used - {"cells"} | {"main_matrix", "extra_matrix", "seeds"}
    for key in used: assert key in top, f"{key} is read and not declared"
    for key in re.findall(p + r"models\[family\]\.(\w+)", code):
        assert {"models", f"models.${{item.family}}.{key}"} & declared, f"models.{key} is read and not declared"
    for key in re.findall(r"(?<![\w./\x22])kv\.(\w+)", code):
        assert any(
            d == "kv" or d.startswith((f"kv.{key}", "kv.${item.")) for d in declared
        ), f"kv.{key} is read and not declared"
    for section, key in re.findall(p + r"(eval|sites|data|lm|distill|purity|main_matrix|extra_matrix)\.(\w+)", code):
        assert {section, f"{section}.{key}"} & declared, f"{section}.{key} is read and not declared"


@pytest.mark.parametrize("scale", sorted(f.stem for f in (ROOT/"conf"/"scale").glob("*.yaml")))
def test_declared_params_are_written_down(scale, tmp_path):
    # a default of the schema is invisible to DVC: every key that a stage declares stands in conf/
    from rcid.pipeline.workspace import compose_params
    compose_params(tmp_path/"params.yaml", f"scale={scale}")
    p = yaml.load((tmp_path/"params.yaml").read_text(encoding="utf-8"))
    load_params(tmp_path/"params.yaml")
    for stage, s in STAGES.items():
        for cell in cells_of(s, p):
            for key in names(s.get("params", [])):
                key = re.sub(r"\$\{item\.(\w+)\}", lambda m: str(cell[m[1]]), key)
                try:
                    functools.reduce(lambda d, k: d[k], key.split("."), p)
                except (KeyError, TypeError):
                    pytest.fail(f"stage {stage} declares {key}, which conf/ does not set at scale {scale}")


def test_every_experiment_notebook_is_a_stage():
    assert set(NOTEBOOK.values()) == {n.stem for n in EXPERIMENTS.glob("*.ipynb")}
    assert names(STAGES["code"]["outs"]) == ["artifacts/code"], "a folder, of which each stage needs one file"


def test_outputs_have_one_maker_and_inputs_exist():
    made = {o for s in STAGES.values() for o in names([*s.get("outs", []), *s.get("metrics", []), *s.get("plots", [])])}
    concrete = [o for kind in ("outs", "metrics", "plots") for o in expected(ROOT, kind)]
    # `main_matrix` and `extra_matrix` share a pattern and no student
    assert len(concrete) > 100 and len(concrete) == len(set(concrete))
    shape = lambda text: re.sub(r"\$\{item\.\w+\}", "*", text)
    folders = {shape(m) for m in made}
    for name, s in STAGES.items():
        for d in map(shape, s["deps"]):
            known = any(
                re.fullmatch(re.escape(m).replace(r"\*", "[^/]+") + r"(/.*)?", d.replace("*", "x"))
                or m.startswith(d.rstrip("/") + "/")
                for m in folders
            )
            assert (
                known or (ROOT / d).exists() or d.startswith("data/")
            ), f"stage {name} depends on {d}, which nothing makes"


# a run of everything

def coordinates(folder):
    "(stage, coordinates) of all matrix cells, from params.yaml."
    p = yaml.load((folder/"params.yaml").read_text(encoding="utf-8"))
    for name, s in STAGES.items():
        for c in cells_of(s, p): yield name, c


def cells_of(stage, p):
    cells = [{}]
    for key, values in stage.get("matrix", {}).items():
        if isinstance(values, str): values = functools.reduce(lambda d, k: d[k], values[2:-1].split("."), p)
        cells = [{**c, key: v} for c in cells for v in values]
    return cells


def expected(folder, kind):
    for name, cell in coordinates(folder):
        for item in names(STAGES[name].get(kind, [])):
            yield re.sub(r"\$\{item\.(\w+)\}", lambda m: str(cell[m[1]]), item)


def snapshot(folder, *parts):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for part in parts
        for p in sorted((folder / part).rglob("*"))
        if p.is_file()
    }


@pytest.mark.slow
def test_everything_is_there(workspace):
    made = [*expected(workspace, "outs"), *expected(workspace, "metrics"), *expected(workspace, "plots")]
    assert len(made) > 30 and [m for m in made if not (workspace/m).exists()] == []
    for m in expected(workspace, "metrics"): assert read_json(workspace/m)
    records = [r for r in made if r.startswith("runs/") and r.endswith(".ipynb")]
    assert len(records) == sum(name in NOTEBOOK for name, _ in coordinates(workspace))
    text = {r: (workspace/r).read_text(encoding="utf-8") for r in records}
    for r, t in text.items():
        cells = json.loads(t)["cells"]
        t = re.sub(r"\"image/png\": \"[^\"]*\"", "", t)
        assert [o for c in cells for o in c.get("outputs", []) if o["output_type"] == "error"] == []
        assert not re.search(
            r"\b20\d\d-\d\d-\d\dT\d\d:\d\d|\"(start|end)_time\"|\"duration\"|0x[0-9a-f]{8,}", t
        ), f"{r} holds a time or an address"
        assert "widget-view" not in t, f"{r} holds a progress bar with a random id"
        assert str(ROOT) not in t and not re.search(
            r"\"[^\"]*(?<![\w.])/(home|root|usr|tmp)/\w", t
        ), f"{r} holds an absolute path"
    assert not list((workspace / "artifacts").glob("checkpoints/*"))
    # a lock stays, empty: who deletes one takes it from a process that waits for it
    left = [p for p in (workspace / "artifacts").rglob(".*") if p.is_file()]
    assert [p for p in left if p.suffix != ".filelock" or p.stat().st_size] == []


@pytest.mark.slow
def test_every_student_has_a_route_or_a_reason(workspace):
    for file in sorted((workspace/"metrics"/"evaluate").glob("*.json")):
        c = read_json(file)
        family, task, *_ = file.stem.split("-")
        route, plan = c["route"], read_json(workspace/"metrics"/"sites"/f"{family}-{task}.json")
        if route["distance"] is None: assert not route["kinds"] and all(route["missing"].values()), file
        else: assert 0 <= route["distance"] <= 2 and route["interval"][0] <= route["interval"][1], file
        assert route["distance"] is None or route["floor"] >= 0, file
        assert set(route["kinds"]) | set(route["missing"]) == set(plan["mediation"]["test"]["kinds"]), file
        assert set(c["no_gap"]) <= set(route["missing"]) and set(c["gap"]) == {"mean", "low", "high"}
        for reading, value in (("route_warped", "distance"), ("fingerprint", "similarity"), ("pairwise", "r")):
            assert c[reading] is None or value in c[reading], (file, reading)
        for part in ("trained", "held_out"):
            assert c["original"][part]["consistency"] == c["consistency"][part]["consistency"], file
    for file in sorted((workspace/"metrics"/"distill").glob("*.json")):
        assert all("route" in point and "consistency" not in point for point in read_json(file)["curve"]), file


@pytest.mark.slow
def test_the_data_stage_saves_kinds_beside_the_classic_pairs(workspace):
    for family in ("llama", "qwen3"):
        said = read_json(workspace/"metrics"/"data"/f"{family}.json")["tasks"]["ioi"]
        for split in ("train", "test"):
            classic, kind = (
                load_saved_pairs(workspace/"artifacts"/"pairs"/family/"ioi"/name) for name in (split, f"{split}@s2_new")
            )
            assert kind.clean_ids.equal(classic.clean_ids) and kind.wrong_token_id.equal(classic.wrong_token_id)
            assert (classic.corruption, kind.corruption) == ("s2", "s2_new")
            assert said[f"{split}@s2_new"]["sha256"] == kind.content_hash() and len(kind) == said[split]["pairs"]
        assert "val@s2_new" not in said and said["test@s2_new"]["corruption"] == "s2_new"


@pytest.mark.slow
def test_equal_results_are_equal_files(workspace):
    "safetensors writes several header entries in random order: with two of them a rerun's dvc.lock differs."
    def header(f):
        with f.open("rb") as blob:
            return json.loads(blob.read(int.from_bytes(blob.read(8), "little"))).get("__metadata__", {})
    headers = {str(f.relative_to(workspace)): header(f) for f in (workspace/"artifacts").rglob("*.safetensors")}
    assert any(headers.values()) and not {f: sorted(h) for f, h in headers.items() if len(h) > 1}


def test_nothing_runs_twice(workspace):
    done = run(workspace, *DVC, "repro")
    assert done.returncode == 0 and "Running stage" not in done.stdout + done.stderr, output_of(done)
    assert re.search("didn't change|up to date", done.stdout), output_of(done)


@pytest.mark.slow
def test_workspace_has_its_own_settings_and_lock(workspace):
    assert yaml.load((workspace/"params.yaml").read_text(encoding="utf-8"))["scale"] == "tiny"
    assert yaml.load((ROOT/"params.yaml").read_text(encoding="utf-8"))["scale"] == "laptop"
    assert (
        not any(p.is_symlink() for p in workspace.rglob("*"))
        and (workspace / "dvc.lock").read_bytes() != (ROOT / "dvc.lock").read_bytes()
    )


@pytest.mark.slow
def test_prose_costs_nothing(workspace):
    notebook = workspace/"nbs"/"experiments"/"distill.ipynb"
    before, kept = snapshot(workspace, "metrics", "runs"), notebook.read_text(encoding="utf-8")
    nb = json.loads(kept)
    nb["cells"].append({"cell_type": "markdown", "id": "prose", "metadata": {}, "source": ["A remark.\n"]})
    notebook.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    try:
        done = run(workspace, *DVC, "repro")
        ran = re.findall(r"Running stage '([^']+)'", done.stdout + done.stderr)
        assert done.returncode == 0 and ran == ["code"], output_of(done)
        assert snapshot(workspace, "metrics", "runs") == before
    finally:
        notebook.write_text(kept, encoding="utf-8")
        run(workspace, *DVC, "repro", "code")


@pytest.fixture
def paper(workspace, tmp_path) -> Path: return Path(shutil.copytree(workspace/"paper", tmp_path/"paper"))


@pytest.mark.slow
def test_paper_resolves_every_key(workspace, paper):
    values = read_values(paper/"values.tex")
    assert [k for k in keys_used(paper) if k not in values] == [] and len(keys_used(paper)) > 20
    assert not re.search(r"\\(val|claim)\{", fill(paper, values)) and (
        workspace / "paper" / "main.pdf"
    ).read_bytes().startswith(b"%PDF")
    for key in keys_used(paper):
        assert values[key].strip() and not re.search(r"\b(nan|None|inf)\b", values[key]), f"{key}: {values[key]}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("val", "claim"))
def test_paper_names_a_missing_key(paper, kind):
    key = next(k for k in keys_used(paper) if k.startswith("claim.") == (kind == "claim"))
    values = read_values(paper/"values.tex")
    text = (paper/"values.tex").read_text(encoding="utf-8")
    (paper/"values.tex").unlink()                                          # DVC may have made it read-only
    (paper / "values.tex").write_text(
        "".join(l for l in text.splitlines(True) if not l.startswith(rf"\defval{{{key}}}")), encoding="utf-8"
    )
    (paper/"main.pdf").unlink()
    done = run(ROOT, sys.executable, "-m", "rcid.report.paper", "--folder", str(paper))
    lines = done.stderr.strip().splitlines()
    assert (
        done.returncode
        and len(lines) >= 1
        and all(l.startswith("rcid: missing ") and key.removeprefix("claim.") in l for l in lines)
    ), output_of(done)
    assert not (paper/"main.pdf").exists() and key in values
    with pytest.raises(PaperError, match=re.escape(key.removeprefix("claim."))):
        fill(paper, {k: v for k, v in values.items() if k != key})


@pytest.mark.slow
@pytest.mark.parametrize("folder", ("tables", "figures"))
def test_paper_names_a_missing_table_or_figure(paper, folder):
    source = "".join(p.read_text(encoding="utf-8") for p in paper.rglob("*.tex"))
    victim = next(p for p in sorted((paper/folder).iterdir()) if re.search(rf"\{{{folder}/{p.stem}(\.\w+)?\}}", source))
    victim.unlink()
    with pytest.raises(PaperError, match=f"missing {folder[:-1]} '{folder}/{victim.stem}"):
        fill(paper, read_values(paper / "values.tex"))


@pytest.mark.slow
def test_missing_metrics_are_named(workspace):
    from rcid.report.rows import read_families, read_matrix
    families = load_params(workspace/"params.yaml").families
    kept = (workspace/"metrics"/"models"/f"{families[0]}.json").rename(workspace/"metrics"/"kept")
    try:
        with pytest.raises(FileNotFoundError, match=rf"models/{families[0]}\.json is missing: run `dvc repro`"):
            read_families(workspace / "metrics", "models", families)
        with pytest.raises(FileNotFoundError, match="no metrics in .*nothing"):
            read_matrix(workspace / "metrics", "nothing")
    finally:
        kept.rename(workspace / "metrics" / "models" / f"{families[0]}.json")


# accidents, each in a copy of the finished workspace

@pytest.fixture
def broken(workspace, tmp_path) -> Path:
    "A copy of the workspace (without DVC's cache), to be maltreated."
    return Path(
        shutil.copytree(workspace, tmp_path / "broken", ignore=shutil.ignore_patterns("cache", "tmp", "__pycache__"))
    )


def set_params(folder, section, **values):
    p = yaml.load((folder/"params.yaml").read_text(encoding="utf-8"))
    p[section] |= values
    with open(folder/"params.yaml", "w", encoding="utf-8") as f: YAML().dump(p, f)


@pytest.mark.slow
def test_killed_stage_goes_on_from_its_checkpoint(broken):
    name = "qwen3-ioi-rcid-42"
    where = ("family=qwen3", "task=ioi", "method=rcid", "seed=42")
    command = (sys.executable, "-m", "rcid.pipeline.stage", "distill", *where)
    metrics, student, record, checkpoint = (
        broken / x
        for x in (
            f"metrics/distill/{name}.json",
            f"artifacts/students/{name}",
            f"runs/distill/{name}.ipynb",
            f"artifacts/checkpoints/{name}/progress.json",
        )
    )
    set_params(broken, "distill", steps=160, checkpoint_every=10, log_every=50)
    def forget():
        for f in (metrics, record): f.unlink(missing_ok=True)
        shutil.rmtree(student, ignore_errors=True)
    forget()
    done = run(broken, *command)
    assert done.returncode == 0, output_of(done)
    whole, weights = read_json(metrics), (student/"model.safetensors").read_bytes()
    forget()
    with open(broken / "killed.txt", "w") as log:
        process = subprocess.Popen(
            command, cwd=broken, env=environment(broken), stdout=log, stderr=log, start_new_session=True
        )
    try:
        limit = time.monotonic() + 300
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < limit: time.sleep(.02)
        assert checkpoint.exists(), (
            "the run ended or hung before its first checkpoint:\n" + (broken / "killed.txt").read_text()[-3000:]
        )
        kill_all(process.pid)
    finally:
        kill_all(process.pid)
    assert process.wait() == -signal.SIGKILL and 0 < read_json(checkpoint)["step"] < 160
    assert not metrics.exists() and not student.exists() and not record.exists()
    done = run(broken, *command)
    assert done.returncode == 0 and re.search(
        r"resumed from step [1-9]\d* of 160", done.stdout + done.stderr + record.read_text(encoding="utf-8")
    ), output_of(done)
    again = read_json(metrics)
    assert again["curve"] == whole["curve"] and again == whole
    assert (student/"model.safetensors").read_bytes() == weights and not checkpoint.parent.exists()


def kill_all(pid: int):
    "SIGKILL to a process that this test started and to all below it, the kernel (which has its own group) among them."
    children = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            children.setdefault(int((entry / "stat").read_text().rpartition(")")[2].split()[1]), []).append(
                int(entry.name)
            )
        except OSError:
            pass
    queue = [pid]
    for p in queue: queue += children.get(p, [])
    for p in queue:
        try:os.kill(p, signal.SIGKILL)
        except ProcessLookupError:
            pass


@pytest.mark.slow
def test_failing_gate_of_a_required_family_stops(broken):
    set_params(broken, "eval", gate_names=1000)
    record, metrics = broken/"runs"/"pilot"/"qwen3.ipynb", broken/"metrics"/"pilot"/"qwen3.json"
    before = record.read_bytes()
    done = run(broken, sys.executable, "-m", "rcid.pipeline.stage", "pilot", "family=qwen3")
    lines = [l for l in done.stderr.splitlines() if l.startswith("rcid:")]
    assert (
        done.returncode
        and len(lines) == 1
        and re.search(r"pilot of the required family qwen3 failed: .*single-token names is \d+, bound 1e\+03", lines[0])
    ), output_of(done)
    assert read_json(metrics)["passed"] is False and read_json(metrics)["failed"] and record.read_bytes() == before
    assert [p.name for p in metrics.parent.iterdir() if p.name.startswith(".")] == []
