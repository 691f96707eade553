"""The toy pipeline of tests/toy: cheap stages with checkpoints that go through the same launcher as the real ones."""
import json, os, shutil, subprocess, sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from conftest import ROOT, output_of

TOY = ROOT/"tests"/"toy"


@cache
def initialised() -> TemporaryDirectory:
    "A folder in which `dvc init` ran: once in a process of tests, which copy what it made."
    folder = TemporaryDirectory(prefix="toy-dvc-")
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=folder.name, capture_output=True, text=True
    )
    assert done.returncode == 0, output_of(done)
    return folder


def make(folder: Path, **params) -> Path:
    "A DVC workspace with the toy pipeline in `folder`."
    shutil.copytree(TOY, folder, ignore=shutil.ignore_patterns("__pycache__"))
    text = (folder/"params.yaml").read_text()
    for key, value in params.items():
        text = "".join(f"{key}: {value}\n" if line.startswith(f"{key}:") else line for line in text.splitlines(True))
    (folder/"params.yaml").write_text(text)
    shutil.copyfile(ROOT/".dvcignore", folder/".dvcignore")
    shutil.copytree(Path(initialised().name)/".dvc", folder/".dvc")
    return folder


def environment(folder: Path, **more: str) -> dict:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {
        **os.environ,
        "PATH": path,
        "RCID_ROOT": str(folder),
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        **more,
    }


def start(folder: Path, *args: str, **more: str) -> subprocess.Popen:
    "`python -m rcid.pipeline ...` in the background, in a session of its own."
    return subprocess.Popen(
        [sys.executable, "-m", "rcid.pipeline", *args],
        cwd=folder,
        env=environment(folder, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def launch(folder: Path, *args: str, timeout: int = 120, **more: str) -> tuple[int, str]:
    "Exit status and what was said."
    process = start(folder, *args, **more)
    try: said, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError("the launcher hangs:\n" + process.communicate()[0])
    return process.returncode, said


def dvc(folder: Path, *args: str, **more: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *args],
        cwd=folder,
        env=environment(folder, **more),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, output_of(done)
    return done.stdout + done.stderr


def results(folder: Path) -> dict[str, bytes]:
    "Everything that a run leaves for good: lock file, metrics and outputs."
    return {p.relative_to(folder).as_posix(): p.read_bytes() for part in ("dvc.lock", "out", "metrics", "result.json")
            for p in ([folder/part] if (folder/part).is_file() else sorted((folder/part).rglob("*"))) if p.is_file()}


def trail(folder: Path) -> list[dict]:
    return [
        json.loads(p.read_text())
        for p in sorted((folder / "trail").glob("*.json"), key=lambda p: p.name.rpartition("-")[2])
    ]
