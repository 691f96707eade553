"""The repository holds together: notebooks and modules agree, settings compose, nothing of one machine is in it."""

import hashlib, json, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest
from conftest import LONGEST, ROOT, output_of, run
from ruamel.yaml import YAML
from rcid.core import load_params
from rcid.core.commits import ADVICE
from rcid.core.notebooks import cleaned, marks
from rcid.core.params import Params
from rcid.pipeline.workspace import DEFAULT_SCALE, compose_params

SCALES = sorted(p.stem for p in (ROOT/"conf"/"scale").glob("*.yaml"))
TOOL = str(Path(sys.executable).parent)
yaml = YAML(typ="safe")


def contents(folder: Path, pattern: str) -> dict:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob(pattern))
        if "__pycache__" not in p.parts and ".ipynb_checkpoints" not in p.parts
    }


def test_export_gives_the_committed_modules(copy):
    before = contents(copy/"rcid", "*.py")
    shutil.rmtree(copy/"rcid")
    done = run(copy, f"{TOOL}/nbdev_export")
    assert done.returncode == 0, output_of(done)
    after = contents(copy/"rcid", "*.py")
    assert sorted(after) == sorted(before), "nbdev_export makes other files than are committed"
    assert [n for n in after if after[n] != before[n]] == [], ADVICE


def test_notebooks_are_clean(copy):
    before = contents(copy/"nbs", "*.ipynb")
    done = run(copy, f"{TOOL}/nbdev_clean")
    assert done.returncode == 0 and before, output_of(done)
    after = contents(copy/"nbs", "*.ipynb")
    assert [n for n in before if after[n] != before[n]] == [], "run make clean-notebooks"
    assert [
        n for n, blob in before.items() if cleaned(blob.decode(), n).encode() != blob
    ] == [], "run make clean-notebooks"


def test_one_file_has_the_tests_of_the_workspace():
    "Processes share the tests by file: two files with one workspace would delete it under each other's feet."
    using = [f.name for f in sorted((ROOT/"tests").glob("test_*.py"))
             if re.search(r"def \w+\([^)]*\bworkspace\b[^)]*\)(?: ->[^:]*)?:", f.read_text(encoding="utf-8"))]
    # faults: only by `make faults`, in one process; silent: a folder's name, a parameter of the test
    assert using == ["test_faults.py", "test_pipeline.py", "test_silent_pipeline.py"]
    assert "--dist loadfile" in (ROOT/"Makefile").read_text(encoding="utf-8")
    assert [name for name in LONGEST if not (ROOT/"tests"/name).exists()] == []


def test_no_marks_of_a_merge(tracked):
    texts = {n: blob.decode("utf-8", "replace") for n in tracked if b"\0" not in (blob := (ROOT/n).read_bytes())[:8000]}
    assert len(texts) > 50 and [line for name, text in texts.items() for line in marks(name, text)] == []


def test_no_link_is_tracked(tracked):
    "Git lets a tracked link replace an ignored folder: a merge of one named .venv deleted the environment."
    if not (ROOT/".git").exists(): pytest.skip("no git here")
    kinds = subprocess.run(["git", "ls-files", "--stage"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert kinds and [line for line in kinds.splitlines() if line.startswith("120000")] == []
    assert "/.venv" in (ROOT/".gitignore").read_text(encoding="utf-8").splitlines(), "ignored, also where it is a link"


def test_the_lock_names_living_stages_alone():
    "DVC keeps what it once ran: a stage that a change of params took away would look like a result of today."
    from dvc.repo import Repo
    living = {stage.addressing.split(":")[-1] for stage in Repo(ROOT).index.stages}
    locked = yaml.load((ROOT/"dvc.lock").read_text(encoding="utf-8"))["stages"]
    assert locked and sorted(set(locked) - living) == [], "take these entries out of dvc.lock"


def test_the_metrics_in_git_are_of_living_stages():
    "A page that reads a folder of metrics would show a student that no stage makes any more."
    from dvc.repo import Repo
    outs = {out.fs_path for stage in Repo(ROOT).index.stages for out in stage.outs}
    done = run(ROOT, "git", "ls-files", "metrics")
    files = [ROOT/line for line in done.stdout.splitlines()]
    assert len(files) > 100
    dead = [str(file.relative_to(ROOT)) for file in files if not outs & {str(file), *map(str, file.parents)}]
    assert dead == [], "take these out of git"


def test_toys_start_no_daemons():
    "Where `dvc init` runs, DVC would report and ask for updates, in processes that outlive the folder they write into."
    notebooks = {f.name: f.read_text(encoding="utf-8") for f in (ROOT/"nbs").rglob("*.ipynb")}
    toys = {name: text for name, text in notebooks.items() if "--no-scm" in text}
    assert toys and [name for name, text in toys.items() if "DVC_TEST" not in text] == []
    assert os.environ["DVC_TEST"] == "1"                                  # of all tests, by conftest


def test_params_are_the_default_scale(tmp_path):
    compose_params(tmp_path/"params.yaml", f"scale={DEFAULT_SCALE}")
    assert yaml.load((ROOT / "params.yaml").read_text(encoding="utf-8")) == yaml.load(
        (tmp_path / "params.yaml").read_text(encoding="utf-8")
    ), "run `make params`"


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_composes(scale, tmp_path):
    compose_params(tmp_path/"params.yaml", f"scale={scale}", "sites.k=3")
    p = load_params(tmp_path/"params.yaml")
    assert p.scale == scale and p.sites.k == 3 and set(p.families) == set(p.models)
    # no network
    if scale == "tiny": assert p.real_tokenizers == [] and all("arch" in m.teacher for m in p.models.values())


def test_all_scales_are_there(): assert SCALES == sorted(Params.model_fields["scale"].annotation.__args__)


def test_package_can_be_imported_from_anywhere(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "import rcid.core, rcid; print(rcid.__version__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and re.search(
        r"(?m)^version *= *" + re.escape(done.stdout.strip()), (ROOT / "settings.ini").read_text()
    ), output_of(done)


def sources(tracked):
    "(name, line number, line) of all code: modules, and code cells of notebooks."
    for name in tracked:
        if name.startswith("tests/") or not name.endswith((".py", ".ipynb")): continue
        text = (ROOT/name).read_text(encoding="utf-8")
        if name.endswith(".ipynb"):
            text = "\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "code")
        for n, line in enumerate(text.splitlines(), 1): yield name, n, line


def test_no_pickles_and_no_remote_code(tracked):
    bad = re.compile(
        r"pickle\.loads?\(|\btorch\.load\(|trust_remote_code\s*=\s*True|weights_only\s*=\s*False|^\s*from \S+ import"
        r" \*|@patch\b"
    )
    lines = list(sources(tracked))
    assert len(lines) > 3000 and [f"{n}:{i}: {l.strip()}" for n, i, l in lines if bad.search(l)] == []


def test_no_path_of_one_machine(tracked):
    "Absolute home and work paths; an example may use the invented user `me`."
    bad = re.compile(
        r"(?<![\w.~-])/(?:" + "|".join(("home/(?!me/)", "root/", "Users/(?!me/)", "work/", "tmp/t/")) + r")\w"
    )
    found = []
    for name in tracked:
        blob = (ROOT/name).read_bytes()
        if b"\0" in blob[:4096] or name.startswith("tests/test_repository"): continue
        found += [
            f"{name}:{i}: {l.strip()[:120]}"
            for i, l in enumerate(blob.decode("utf-8", "replace").splitlines(), 1)
            if bad.search(l)
        ]
    assert found == []


def test_embedded_data_are_in_the_store():
    (out,) = yaml.load((ROOT/"data.dvc").read_text())["outs"]
    store = ROOT/".dvc"/"store"/"files"/"md5"
    def stored(md5):
        blob = (store/md5[:2]/md5[2:]).read_bytes()
        assert hashlib.md5(blob).hexdigest() == md5.removesuffix(".dir")
        return blob
    files = json.loads(stored(out["md5"]))
    assert (
        len(files) == out["nfiles"] > 0
        and sum(len(stored(f["md5"])) for f in files) == out["size"]
        and out["remote"] == "embedded"
    )
    for f in files:
        assert (ROOT / "data" / f["relpath"]).read_bytes() == stored(
            f["md5"]
        ), f"data/{f['relpath']} is not what data.dvc says"
    assert (
        git := subprocess.run(
            ["git", "ls-files", ".dvc/store"], cwd=ROOT, capture_output=True, text=True
        ).stdout.split()
    ) and {f["md5"] for f in files} <= {g[-33:].replace("/", "")[-32:] for g in git}


@pytest.mark.parametrize(
    "name",
    (
        "README.md",
        "LICENSE",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "Makefile",
        "settings.ini",
        "nbs/index.ipynb",
        "nbs/experiments/.notest",
        ".ci/run",
    ),
)
def test_expected_file_is_there(tracked, name):
    assert name in tracked


def test_other_settings_for_a_scale():
    "`SET` reaches the workspace of a scale; the committed params of the default scale cannot be overridden in passing."
    dry = lambda *words: subprocess.run(["make", "-n", "repro", *words], cwd=ROOT, capture_output=True, text=True)
    done = dry("SCALE=gpu", "SET=distill.steps=60 seeds=[42]")
    assert done.returncode == 0, done.stderr
    assert "rcid.pipeline.workspace gpu distill.steps=60 seeds=[42]" in done.stdout
    refused = dry("SET=distill.steps=60")
    assert refused.returncode and "SET is for the other scales" in refused.stderr
    assert "rcid.pipeline pilot" not in refused.stdout
