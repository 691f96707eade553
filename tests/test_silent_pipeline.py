"""What a stage depends on (its code in every form, its tables), and what it must not: the user's surroundings."""

import ast, json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest, toy
from conftest import ROOT, environment, output_of, run
from ruamel.yaml import YAML
from rcid.pipeline.stage import code_view, coordinates_of, module_deps, strip_notebook, write_code_views

EXPERIMENTS = ROOT / "nbs" / "experiments"
STAGES = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def notebook(*sources: str, tags: tuple = ()) -> str:
    "A notebook of these code cells as text; the first one has the tags."
    cells = [
        {
            "cell_type": "code",
            "id": f"cell{i}",
            "metadata": {"tags": list(tags)} if tags and i == 0 else {},
            "execution_count": None,
            "outputs": [],
            "source": s.splitlines(True),
        }
        for i, s in enumerate(sources)
    ]
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    return json.dumps({"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5})


@pytest.fixture
def bare(tmp_path, monkeypatch) -> Path:
    "A workspace with the package, the settings and no experiment."
    shutil.copytree(ROOT / "rcid", tmp_path / "bare" / "rcid", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("params.yaml", "dvc.yaml", "data.dvc"):
        shutil.copyfile(ROOT / name, tmp_path / "bare" / name)
    (tmp_path / "bare" / "nbs" / "experiments").mkdir(parents=True)
    monkeypatch.setenv("RCID_ROOT", str(tmp_path / "bare"))
    return tmp_path / "bare"


def put(folder: Path, name: str, *sources: str, **kw):
    (folder / "nbs" / "experiments" / f"{name}.ipynb").write_text(notebook(*sources, **kw), encoding="utf-8")


# dependencies that are not seen

FORMS = (
    "import rcid.eval.stats",
    "import rcid.eval.stats as s",
    "import os, rcid.eval.stats",
    "from rcid.eval import stats",
    "from rcid.eval.stats import sign_test",
    "from rcid.eval.stats import *",
    "from rcid.eval import *",
    "from rcid import eval as e",
    "import rcid.eval as e\ne.stats",
    "import rcid.eval\nrcid.eval.stats.x",
    "import rcid.core\nrcid.eval.stats.x",
    "def f():\n    import rcid.eval.stats",
    "if True:\n    from rcid.eval import stats",
    "import importlib\nimportlib.import_module('rcid.eval.stats')",
    "from importlib import import_module\nimport_module('.stats', package='rcid.eval')",
    "__import__('rcid.eval.stats')",
    "import_module(f'rcid.eval.{name}')",
    "await go(__import__('rcid.eval.stats'))",
    "%%time\nimport rcid.eval.stats",
    "%time __import__('rcid.eval.stats')",
    "!python -m rcid.eval.stats",
    "out = !python -m rcid.eval.stats",
    "%%bash\npython -m rcid.eval.stats | tail -1",
)


@pytest.mark.parametrize("form", FORMS)
def test_every_way_to_import_is_a_dependency(bare, form):
    "A change of the module changes what the stage depends on."
    put(bare, "toy", form)

    def view():
        try:
            write_code_views()
        except SyntaxError:
            return "no view: SyntaxError"
        return (bare / "artifacts" / "code" / "toy.py").read_text(encoding="utf-8")

    before = view()
    with open(bare / "rcid" / "eval" / "stats.py", "a") as f:
        f.write("# another line\n")
    assert "rcid/eval/stats.py" in before and view() != before, before


def test_imports_between_modules_are_followed(bare):
    "Relative imports, plain imports inside modules, and what a package's __init__ runs for its effect."
    (bare / "rcid" / "eval" / "far.py").write_text("import rcid.align.cka\n")
    (bare / "rcid" / "eval" / "near.py").write_text("def f():\n    from . import far\n")
    (bare / "rcid" / "eval" / "effect.py").write_text("import torch\ntorch.set_num_threads(1)\n")
    with open(bare / "rcid" / "eval" / "__init__.py", "a") as f:
        f.write("from . import effect\n")
    assert {"rcid/eval/near.py", "rcid/eval/far.py", "rcid/align/cka.py", "rcid/eval/effect.py"} <= set(
        module_deps("from rcid.eval.near import f")
    )
    assert "rcid/eval/effect.py" in module_deps("from rcid.eval import sign_test, task_accuracy")


def test_what_is_not_reached_is_no_dependency(bare):
    assert module_deps("import torch, os\nrcid = os\nrcid.eval.stats") == [] and "rcid/kv/fusion.py" not in module_deps(
        "from rcid.data import load_pairs"
    )
    assert "rcid/data/winogrande.py" not in module_deps(
        "from rcid.data import name_pool"
    ), "a name of a package leads to its module alone"


def test_tables_that_are_read_are_dependencies(copy, monkeypatch):
    "A change of a table makes stale what reads it, and nothing else; no stage lists tables by hand."
    monkeypatch.setenv("RCID_ROOT", str(copy))

    def views():
        write_code_views()
        return {f.stem: f.read_text(encoding="utf-8") for f in (copy / "artifacts" / "code").glob("*.py")}

    before = views()
    for table, some, none in (
        ("names", {"pilot", "kv_data", "kv_parts", "kv_fuse", "data"}, {"distill", "exp1"}),
        ("corpus", {"heal", "models", "evaluate"}, {"pilot", "data", "probe", "kv_data"}),
    ):
        kept = (copy / "data" / f"{table}.json").read_bytes()
        (copy / "data" / f"{table}.json").write_bytes(kept + b"\n")
        changed = {n for n, text in views().items() if text != before[n]}
        (copy / "data" / f"{table}.json").write_bytes(kept)
        assert some <= changed and not none & changed, (table, sorted(changed))
    assert "data" in STAGES["code"]["deps"] and not [
        (n, d) for n, s in STAGES.items() for d in s["deps"] if d.startswith("data/")
    ]


READS = """
import os, sys
LOG = os.environ.get("RCID_TEST_READS")
if LOG:
    def note(event, args):
        if event != "open" or not isinstance(args[0], str) or "/data/" not in args[0] or "r" not in str(args[1]): return
        with os.fdopen(os.open(LOG, os.O_APPEND | os.O_CREAT | os.O_WRONLY), "a") as f: f.write(args[0] + "\\n")
    sys.addaudithook(note)
"""


@pytest.mark.slow
def test_tables_read_at_run_time_are_in_the_view(copy):
    "Every table that a kernel opens, seen by an audit hook, is in the code view of its notebook."
    from rcid.pipeline.workspace import compose_params

    (copy / "rcid" / "__init__.py").write_text((copy / "rcid" / "__init__.py").read_text() + READS)
    compose_params(copy / "params.yaml", "scale=tiny")
    done = run(copy, sys.executable, "-m", "rcid.pipeline.stage", "code")
    assert done.returncode == 0, output_of(done)
    for name in ("kv_parts", "kv_data"):
        log = copy / f"{name}.txt"
        done = run(copy, sys.executable, "-m", "rcid.pipeline.stage", name, RCID_TEST_READS=str(log), RCID_THREADS="1")
        assert done.returncode == 0, output_of(done)
        view = (copy / "artifacts" / "code" / f"{name}.py").read_text(encoding="utf-8")
        read = {Path(line).name for line in log.read_text().split()} & {f.name for f in (copy / "data").glob("*.json")}
        assert read and [t for t in read if not re.search(rf"(?m)^# [0-9a-f]{{64}}  data/{t}$", view)] == [], name


ALLOWED = {"load_params", "read_matrix", "setup_values"}  # the only functions that get all params


def test_params_are_read_in_ways_that_the_declared_ones_are_compared_with():
    "test_pipeline compares `p.section.key` with dvc.yaml; other ways to read a setting would escape it."
    for file in sorted(EXPERIMENTS.glob("*.ipynb")):
        tree = ast.parse(code_view(file))
        names = {
            t.id
            for n in ast.walk(tree)
            if isinstance(n, ast.Assign) and ast.unparse(n.value).startswith("load_params()")
            for t in ast.walk(n.targets[0])
            if isinstance(t, ast.Name)
        }
        for n in ast.walk(tree):
            if isinstance(n, ast.Subscript) and isinstance(n.value, ast.Name) and n.value.id in names:
                pytest.fail(f"{file.name}: {ast.unparse(n)}")
            if isinstance(n, ast.Attribute) and n.attr.startswith(("model_", "__")) and "load_params" in ast.unparse(n):
                pytest.fail(f"{file.name}: {ast.unparse(n)}")
            if isinstance(n, ast.Call) and getattr(n.func, "id", "") in ("getattr", "vars", "dict"):
                assert not [
                    a for a in n.args if isinstance(a, ast.Name) and a.id == "p"
                ], f"{file.name}: {ast.unparse(n)}"


# magics and broken notebooks


@pytest.mark.parametrize(
    "magic",
    (
        "%%bash\nif true; then echo $((1 + 2)); fi",
        "load_params?",
        "load_params??",
        "files = !ls -1",
        "!ls | head",
        "%matplotlib inline",
        "x = %pwd",
        "%%writefile x.txt\nnot: python {",
        "if True:\n    !ls",
        "await f()",
    ),
)
def test_magics_are_what_ipython_makes_of_them(bare, magic):
    put(bare, "toy", magic, "from rcid.eval.stats import sign_test")
    done = run(bare, sys.executable, "-m", "rcid.pipeline.stage", "code")
    view = bare / "artifacts" / "code" / "toy.py"
    assert done.returncode == 0 and "Traceback" not in done.stderr, output_of(done)
    assert (
        "rcid/eval/stats.py" in view.read_text()
        and magic.split("\n")[-1].split("!")[-1].strip(" ?%")[-3:] in view.read_text()
    )
    compile(view.read_text(), "view", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize(
    "text, line",
    (
        (notebook("x = 1", "y = 2\nif y\n    pass"), r"broken\.ipynb, cell 2 .*line 2.*'if y'"),
        (notebook("x = (1"), r"broken\.ipynb, cell 1 .*'x = \(1'"),
        (notebook("def f():\nreturn 1"), r"broken\.ipynb, cell 1"),
        (notebook("%%time\nx = 1")[:-30], r"broken\.ipynb is no notebook"),
        ("[]", r"broken\.ipynb is no notebook"),
    ),
)
def test_a_broken_notebook_is_named_with_its_cell(bare, text, line):
    (bare / "nbs" / "experiments" / "broken.ipynb").write_text(text)
    done = run(bare, sys.executable, "-m", "rcid.pipeline.stage", "code")
    assert done.returncode and re.fullmatch(rf"rcid: .*{line}.*", done.stderr.strip()), output_of(done)


# coordinates and records


@pytest.mark.slow
def test_a_parameter_may_be_called_name(bare):
    put(bare, "toy", 'name = "a"\nsource = "b"\nself = "c"', "print(name, source, self)", tags=("parameters",))
    done = run(bare, sys.executable, "-m", "rcid.pipeline.stage", "toy", "name=one", "source=two", "self=three")
    assert (
        done.returncode == 0 and "one two three" in (bare / "runs" / "toy" / "one-two-three.ipynb").read_text()
    ), output_of(done)


def test_a_coordinate_is_given_once():
    with pytest.raises(ValueError, match="given twice") as said:
        coordinates_of(["seed=1", "family=qwen3", "seed=2"])
    assert "\n" not in str(said.value)


def record(text: str, workspace: str) -> str:
    cell = {
        "cell_type": "code",
        "id": "x",
        "metadata": {},
        "source": [],
        "outputs": [{"output_type": "stream", "name": "stdout", "text": [text + "\n"]}],
    }
    return "".join(strip_notebook({"cells": [cell]}, workspace)["cells"][0]["outputs"][0]["text"]).rstrip("\n")


@pytest.mark.parametrize(
    "text, workspace, kept",
    (
        ("loss 1/2, a/b, /etc/x", "/", "loss 1/2, a/b, /etc/x"),
        ("/home/me/rcid-old/x", "/home/me/rcid", "/home/me/rcid-old/x"),
        ("/home/me/rcid2/x", "/home/me/rcid", "/home/me/rcid2/x"),
        ("/mnt/home/me/rcid/x", "/home/me/rcid", "/mnt/home/me/rcid/x"),
        ("/home/me/rcid.bak", "/home/me/rcid", "/home/me/rcid.bak"),
        ("at /home/me/rcid/runs, '/home/me/rcid'", "/home/me/rcid", "at ./runs, '.'"),
        ('/my "clone"/runs', '/my "clone"', "./runs"),
        ("a\n/home/me/rcid/x", "/home/me/rcid", "a\n./x"),
        ("file:///my%20clone/x", "/my clone", "file://./x"),
    ),
)
def test_only_paths_in_the_workspace_become_relative(text, workspace, kept):
    assert record(text, workspace) == kept


# what the environment decides

SEEN = """
import json, locale, os, random, shutil, sys, time
import matplotlib
print(matplotlib.get_backend(), matplotlib.rcParams["font.size"], hash("a"), time.tzname)
print(locale.setlocale(locale.LC_ALL, ""))
print(shutil.get_terminal_size().columns, os.environ.get("ATEN_CPU_CAPABILITY"), os.environ["CUBLAS_WORKSPACE_CONFIG"])
print(sorted(n for n in globals() if n.startswith("mine")), [k for k in os.environ if k.startswith("MINE")])
print([p for p in sys.path if "mine" in p])
"""


@pytest.mark.slow
def test_the_users_configuration_changes_no_record(bare, tmp_path):
    "IPython start-up and configuration, kernel specs, matplotlibrc, variables of the libraries: two users, one record."
    put(bare, "toy", SEEN)
    home = tmp_path / "home"

    def write(name, text):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)

    write(".ipython/profile_default/startup/00.py", "mine_startup = 1\nprint('started')\n")
    write(".ipython/profile_default/ipython_config.py", "c.InteractiveShellApp.exec_lines = ['mine_config = 1']\n")
    write(".ipython/profile_default/ipython_kernel_config.py", "c.IPKernelApp.exec_lines = ['mine_kernel = 1']\n")
    write(".config/matplotlib/matplotlibrc", "font.size: 33\n")
    write("rc", "font.size: 44\n")
    write("mine/sitecustomize.py", "import builtins\n")
    write("start.py", "mine_start = 1\n")
    write(
        ".local/share/jupyter/kernels/python3/kernel.json",
        json.dumps(
            {
                "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                "display_name": "mine",
                "language": "python",
                "env": {"MINE_SPEC": "1"},
            }
        ),
    )
    mine = dict(
        HOME=str(home),
        MPLBACKEND="svg",
        PYTHONSTARTUP=str(home / "start.py"),
        PYTHONHASHSEED="7",
        TZ="Asia/Tokyo",
        LC_ALL="C",
        COLUMNS="33",
        MATPLOTLIBRC=str(home / "rc"),
        MINE_TOO="1",
        ATEN_CPU_CAPABILITY="default",
        CUBLAS_WORKSPACE_CONFIG=":16:8",
        JUPYTER_PATH=str(home / ".local/share/jupyter"),
    )
    records = []
    for more in ({}, mine):
        done = run(bare, sys.executable, "-m", "rcid.pipeline.stage", "toy", **more)
        assert done.returncode == 0, output_of(done)
        records.append((bare / "runs" / "toy" / "toy.ipynb").read_text(encoding="utf-8"))
        (bare / "runs" / "toy" / "toy.ipynb").unlink()
    assert records[0] == records[1]


@pytest.mark.slow
def test_what_a_stage_needs_still_passes(bare):
    put(
        bare,
        "toy",
        "import os, sys\n"
        "names = 'RCID_DATA_DIR HF_HOME https_proxy PIP_INDEX_URL SLURM_JOB_ID CUDA_VISIBLE_DEVICES'.split()\n"
        "print(*(os.environ.get(n) for n in names), sys.executable == os.environ['RCID_EXE'])",
    )
    given = dict(
        RCID_DATA_DIR="data-folder",
        HF_HOME="hub-folder",
        https_proxy="a-proxy",
        PIP_INDEX_URL="an-index",
        SLURM_JOB_ID="77",
        CUDA_VISIBLE_DEVICES="",
        RCID_EXE=sys.executable,
    )
    done = run(bare, sys.executable, "-m", "rcid.pipeline.stage", "toy", **given)
    assert "data-folder hub-folder a-proxy an-index 77  True" in done.stdout, output_of(done)


# what an end before its time leaves


@pytest.fixture(scope="module")
def committed_once(tmp_path_factory) -> Path:
    "The toy pipeline, finished and in git."
    folder = toy.make(tmp_path_factory.mktemp("committed") / "toy")
    code, said = toy.launch(folder, "--workers", "2", TOY_PACE="0")
    assert code == 0, said
    (folder / ".gitignore").write_text("/out\n/trail\n/checkpoints\n/logs\n/.dvc\n")
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "-m", "results")
    return folder


@pytest.fixture
def committed(committed_once, tmp_path) -> Path:
    "A copy of it in which a setting was changed, which makes the trainings stale."
    folder = tmp_path / "toy"
    subprocess.run(["cp", "-a", committed_once, folder], check=True)
    (folder / "params.yaml").write_text((folder / "params.yaml").read_text().replace("steps: 10", "steps: 12"))
    return folder


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, output_of(done)
    return done.stdout


def deleted(folder: Path) -> list[str]:
    return [line for line in git(folder, "status", "--porcelain").splitlines() if line[1] == "D"]


@pytest.mark.slow
@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM, signal.SIGKILL))
def test_an_interrupted_run_deletes_no_committed_result(committed, number):
    before = len(toy.trail(committed))
    process = toy.start(committed, "--workers", "2", TOY_PACE="0.3")
    while len(toy.trail(committed)) < before + 2:
        time.sleep(0.02)
    process.send_signal(number)
    process.wait(timeout=60)
    assert deleted(committed) == []
    code, said = toy.launch(committed, "--workers", "2", TOY_PACE="0")
    assert code == 0 and json.loads((committed / "metrics" / "train-a.json").read_text())["steps"] == 12, said
    assert deleted(committed) == [] and "up to date" in toy.dvc(committed, "repro")


@pytest.mark.slow
def test_a_failing_stage_deletes_no_committed_result(committed):
    stage = committed / "stage.py"
    kept = stage.read_text()
    stage.write_text(
        kept.replace("def train(name: str):", "def train(name: str):\n    if name == 'b': sys.exit('rcid: no b')")
    )
    code, said = toy.launch(committed, "--workers", "2", TOY_PACE="0")
    assert code == 1 and "no b" in said and deleted(committed) == [], said
    stage.write_text(
        kept.replace(
            "def train(name: str):", "def train(name: str):\n    if name == 'c': write('out/train-c.txt', 'x'); return"
        )
    )
    code, said = toy.launch(committed, "--workers", "2", TOY_PACE="0")  # an old file is not taken for a new one
    assert code == 1 and re.search(r"failed  train@c: .*metrics/train-c\.json", said), said
    stage.write_text(kept)
    code, said = toy.launch(committed, "--workers", "2", TOY_PACE="0")
    assert code == 0 and deleted(committed) == [], said


@pytest.mark.slow
def test_a_result_of_the_run_cache_replaces_the_committed_one(committed):
    old = (committed / "metrics" / "train-a.json").read_bytes()
    assert toy.launch(committed, "--workers", "2", TOY_PACE="0")[0] == 0
    new = (committed / "metrics" / "train-a.json").read_bytes()
    (committed / "params.yaml").write_text((committed / "params.yaml").read_text().replace("steps: 12", "steps: 10"))
    code, said = toy.launch(committed, "--workers", "2", TOY_PACE="0")
    assert (
        code == 0 and "cached  train@a" in said and (committed / "metrics" / "train-a.json").read_bytes() == old != new
    ), said


@pytest.mark.slow
def test_dvc_itself_leaves_no_deletion_when_a_stage_fails(bare):
    "`dvc repro` deletes outputs first; what is in git is brought back when the notebook fails."
    put(
        bare,
        "toy",
        "from pathlib import Path\nPath('metrics').mkdir(exist_ok=True)\nPath('metrics/toy.json').write_text('1')",
    )
    (bare / "dvc.yaml").write_text(
        "stages:\n  toy:\n    cmd: python -m rcid.pipeline.stage toy\n    deps: [nbs/experiments/toy.ipynb]\n"
        "    outs: [runs/toy/toy.ipynb]\n    metrics:\n      - metrics/toy.json: {cache: false}\n"
    )
    (bare / "data.dvc").unlink()
    git(bare, "init", "-q")
    assert run(bare, sys.executable, "-m", "dvc", "init", "-q").returncode == 0
    done = run(bare, sys.executable, "-m", "dvc", "repro")
    assert done.returncode == 0, output_of(done)
    git(bare, "add", "-A")
    git(bare, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "-m", "results")
    put(bare, "toy", "raise RuntimeError('trouble')")
    done = run(bare, sys.executable, "-m", "dvc", "repro")
    assert done.returncode and "trouble" in done.stdout + done.stderr and deleted(bare) == [], output_of(done)


# the toy of the tests is no part of the project


def test_dvc_does_not_see_the_toy_pipeline():
    from dvc.repo import Repo

    assert [s.addressing for s in Repo(str(ROOT)).index.stages if "toy" in s.addressing] == []


CODE_FOLDER = """
stages:
  code:
    cmd: mkdir -p code && cp source/* code/
    deps: [source]
    outs:
      - code: {cache: false}
  first: {cmd: cp code/first.py first.txt, deps: [code/first.py], outs: [first.txt]}
  second: {cmd: cp code/second.py second.txt, deps: [code/second.py], outs: [second.txt]}
"""


@pytest.mark.slow
@pytest.mark.parametrize("by", ("dvc", "launcher"))
def test_a_stage_needs_its_file_of_the_code_folder_only(tmp_path, by):
    "The folder artifacts/code is one output; a stage is stale if its own file in it changed."
    folder = toy.make(tmp_path / "toy")
    (folder / "dvc.yaml").write_text(CODE_FOLDER)
    (folder / "source").mkdir()
    for name in ("first", "second"): (folder / "source" / f"{name}.py").write_text("1\n")

    def what_runs():
        if by == "dvc": return re.findall(r"Running stage '(\w+)'", toy.dvc(folder, "repro"))
        code, said = toy.launch(folder)
        assert code == 0, said
        return re.findall(r"(?m)^ran +(\w+)", said)

    assert set(what_runs()) == {"code", "first", "second"}
    (folder / "source" / "second.py").write_text("2\n")
    assert what_runs() == ["code", "second"]
    assert (folder / "second.txt").read_text() == "2\n" and what_runs() == []
