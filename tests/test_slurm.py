"""The launcher on a real SLURM: one node, four simulated GPUs, nine toy stages; some are killed, one is preempted."""

import os, shutil, signal, subprocess, time
from pathlib import Path
import pytest, toy
from conftest import ROOT

NEEDS = [tool for tool in ("slurmctld", "slurmd", "munged", "sbatch") if not shutil.which(tool)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(NEEDS) or os.geteuid() != 0,
        reason=f"SLURM cannot be started here: needs root and {', '.join(NEEDS) or 'nothing more'} (make slurm-test)",
    ),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> dict:
    "The environment of a running SLURM, ended afterwards."
    folder = tmp_path_factory.mktemp("slurm")
    for parent in (folder, *folder.parents[:2]): parent.chmod(0o755)
    try:
        done = subprocess.run([ROOT/"tests"/"slurm"/"start.sh", folder], stdout=subprocess.PIPE, timeout=60, text=True)
        assert done.returncode == 0, done.stdout
        yield {"SLURM_CONF": str(folder/"slurm.conf")}
    finally:
        subprocess.run([ROOT / "tests" / "slurm" / "stop.sh", folder], timeout=60)


def slurm(cluster: dict, *command: str) -> list[str]:
    return subprocess.run(
        command, env={**os.environ, **cluster}, capture_output=True, text=True, timeout=60, check=True
    ).stdout.split()


def until(what, limit: float = 60.0):
    end = time.monotonic() + limit
    while not (value := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value


def alive(pid: int) -> bool: return Path(f"/proc/{pid}").exists()


def on_step(folder: Path, name: str, step: int) -> bool:
    return (log := folder / "logs" / "stages" / f"train@{name}.log").exists() and f"step {step} of" in log.read_text()


def test_killed_and_preempted_stages_end_as_in_a_serial_run(cluster, tmp_path):
    serial, folder = toy.make(tmp_path/"serial", steps=20), toy.make(tmp_path/"cluster", steps=20)
    toy.dvc(serial, "repro", "-q", TOY_PACE="0")
    process = toy.start(folder, "--executor", "slurm", TOY_PACE="0.2", **cluster)
    try:
        running = until(lambda: toy.trail(folder)[3:] and toy.trail(folder)[:4])
        # four at once, each on a GPU of its own
        assert sorted(t["gpu"] for t in running) == ["0", "1", "2", "3"] and all(alive(t["pid"]) for t in running)
        first, second, third, _ = running
        for t in (first, second, third): until(lambda: on_step(folder, t["stage"], 3))
        os.kill(first["pid"], signal.SIGKILL)                                # killed on its node, as by the OOM killer
        slurm(cluster, "scancel", second["job"])                             # taken away
        slurm(cluster, "scontrol", "requeue", third["job"])                  # preempted: same number, later
        until(lambda: slurm(cluster, "squeue", "-h", "-j", third["job"], "-o", "%T") == ["PENDING"])
        # SLURM would wait two minutes
        slurm(cluster, "scontrol", "update", f"jobid={third['job']}", "StartTime=now")
        said, _ = process.communicate(timeout=150)
    finally:
        process.kill()
        for job in slurm(cluster, "squeue", "-h", "-o", "%A"): slurm(cluster, "scancel", job)
    assert process.returncode == 0, said
    starts = {name: [t["start"] for t in toy.trail(folder) if t["stage"] == name] for name in "abcdefgh"}
    # went on from its checkpoint
    for t in (first, second, third): assert len(starts[t["stage"]]) == 2 and starts[t["stage"]][1] >= 3, starts
    assert sum(map(len, starts.values())) == 11, starts                       # nothing else ran twice
    assert toy.results(folder) == toy.results(serial) and len(toy.results(serial)) == 19
    assert "up to date" in toy.dvc(folder, "repro") and toy.launch(folder)[1].startswith("nothing to do")


def test_interrupted_launcher_leaves_no_job(cluster, tmp_path):
    folder = toy.make(tmp_path/"cluster", steps=30)
    process = toy.start(folder, "--executor", "slurm", TOY_PACE="0.2", **cluster)
    until(lambda: len(toy.trail(folder)) >= 4)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert (
        process.returncode == 128 + signal.SIGINT and "stopped" in said and slurm(cluster, "squeue", "-h") == []
    ), said
    killed = toy.start(folder, "--executor", "slurm", TOY_PACE="0.2", **cluster)
    until(lambda: len(toy.trail(folder)) >= 8)
    killed.kill(); killed.communicate()
    old = set(slurm(cluster, "squeue", "-h", "-r", "-o", "%i"))
    assert old
    code, said = toy.launch(folder, "--executor", "slurm", TOY_PACE="0", **cluster)
    assert code == 0 and not old & set(slurm(cluster, "squeue", "-h", "-r", "-o", "%i")), said
    serial = toy.make(tmp_path/"serial", steps=30)
    toy.dvc(serial, "repro", "-q", TOY_PACE="0")
    assert toy.results(folder) == toy.results(serial)
