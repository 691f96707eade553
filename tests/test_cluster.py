"""The launcher's jobs on a controller that fails, hangs, refuses, or takes jobs and says that it did not."""
import shutil, sys, time
from contextlib import ExitStack
from pathlib import Path
import pytest, toy
from conftest import ROOT
from rcid.core.commands import CommandFailed
from rcid.pipeline.dvc import Job
from rcid.pipeline.slurm import Slurm


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Path:
    "The state of a fake SLURM whose commands come first on PATH."
    here = tmp_path/"slurm"
    for part in ("bin", "jobs", "scripts", "faults", "reason"): (here/part).mkdir(parents=True)
    text = f"#!{sys.executable} -S\n" + (ROOT/"tests"/"slurm"/"fake.py").read_text()
    for tool in ("sbatch", "squeue", "scancel", "srun", "sinfo"):
        (here/"bin"/tool).write_text(text)
        (here/"bin"/tool).chmod(0o755)
    monkeypatch.setenv("FAKE_SLURM", str(here))
    monkeypatch.setenv("PATH", str(here/"bin"), prepend=":")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return here


def faults(cluster: Path, tool: str, *kinds: str): (cluster/"faults"/tool).write_text("\n".join(kinds))


def calls(cluster: Path, tool: str) -> int: return (cluster/"calls").read_text().split().count(tool)


def pool(folder: Path, launch: str = "{}", **more) -> Slurm:
    "Jobs of a workspace; a command of SLURM hangs after ten seconds."
    folder.mkdir(exist_ok=True)
    (folder/"params.yaml").write_text(f"launch: {launch}\n")
    return Slurm(**{**dict(folder=folder, poll=0.1, patience=0.5, answer=10.0), **more})


def job(folder: Path, name: str, command: str | None = None) -> Job:
    "A stage that leaves a line in `trail` each time it runs."
    return Job(name, command or f"sleep 0.3; echo {name} >> trail", str(folder), {}, [], ExitStack())


def finished(slurm: Slurm, n: int, limit: float = 120.0) -> dict[str, int]:
    "Exit statuses of `n` stages."
    slurm.flush()
    done, end = {}, time.monotonic() + limit
    while len(done) < n:
        assert time.monotonic() < end, f"only {done} ended"
        done |= {j.name: code for j, code in slurm.ended()}
        slurm.flush()                                                         # as the launcher does
        time.sleep(0.05)
    return done


def ran(folder: Path) -> list[str]: return sorted((folder/"trail").read_text().split())


@pytest.mark.parametrize("kinds", (("fail",), ("fail", "fail"), ("hang",)), ids="-".join)
@pytest.mark.parametrize("tool", ("squeue", "sbatch"))
def test_a_failed_question_loses_no_job(cluster, tmp_path, capsys, tool, kinds):
    work, slurm = tmp_path/"work", pool(tmp_path/"work")
    for name in ("a", "b"): slurm.start(job(work, name))
    faults(cluster, tool, *kinds)
    assert finished(slurm, 2) == {"a": 0, "b": 0} and ran(work) == ["a", "b"]
    assert (cluster/"faults"/tool).read_text() == "" and calls(cluster, "scancel") == 0
    said = capsys.readouterr().out
    assert f"SLURM: {tool} does not answer" in said and ("hangs" if "hang" in kinds else "Unable to contact") in said
    assert slurm.stop() == [] and not slurm.known.exists()


def test_jobs_that_slurm_took_without_saying_so_run_once(cluster, tmp_path):
    work, slurm = tmp_path/"work", pool(tmp_path/"work")
    slurm.start(job(work, "long", "sleep 2; echo long >> trail"))
    faults(cluster, "sbatch", "late")                                     # it is in the queue when asked
    assert finished(slurm, 1) == {"long": 0} and ran(work) == ["long"] and calls(cluster, "sbatch") == 1
    slurm.start(job(work, "short", "echo short >> trail"))
    faults(cluster, "sbatch", "late")
    slurm.flush()
    while not list(slurm.folder.glob("short.*")) or (cluster/"faults"/"sbatch").read_text(): time.sleep(0.05)
    time.sleep(1.0)                                                       # it has ended when asked: its claim is there
    assert finished(slurm, 1) == {"short": 0} and ran(work) == ["long", "short"] and calls(cluster, "sbatch") == 2


def test_a_killed_job_is_handed_in_again_while_squeue_fails(cluster, tmp_path):
    work, slurm = tmp_path/"work", pool(tmp_path/"work")
    slurm.start(job(work, "a", "echo a >> trail; test -e again || { touch again; kill -9 $$; }"))
    faults(cluster, "squeue", "fail", "ok", "fail", "fail")
    assert finished(slurm, 1) == {"a": 0} and ran(work) == ["a", "a"]


def test_what_is_refused_fails_alone_and_says_why(cluster, tmp_path):
    work = tmp_path/"work"
    slurm = pool(work, "{stages: {big: {memory: 900}}}")
    for name in ("big", "small"): slurm.start(job(work, name))
    faults(cluster, "sbatch", "refuse")
    assert finished(slurm, 2) == {"big": 1, "small": 0} and ran(work) == ["small"]
    assert "rcid: SLURM refuses it: sbatch: error: Batch job submission failed: Invalid qos" in (
        slurm.log("big").read_text()
    )
    assert calls(cluster, "sbatch") == 2


def test_a_job_that_can_never_start_is_reported(cluster, tmp_path):
    work = tmp_path/"work"
    slurm = pool(work, "{account: closed, stages: {other: {memory: 8}}}")
    (cluster/"reason"/"closed").write_text("AccountNotAllowed")
    slurm.start(job(work, "never"))
    assert finished(slurm, 1) == {"never": 1} and list((cluster/"jobs").iterdir()) == []
    assert "rcid: SLURM would never start it (AccountNotAllowed)" in slurm.log("never").read_text()
    (cluster/"reason"/"closed").write_text("Priority")                    # this one waits, as it should
    slurm.start(job(work, "other"))
    slurm.flush()
    for _ in range(15): assert slurm.ended() == []; time.sleep(0.1)
    assert [j.name for j in slurm.stop()] == ["other"] and list((cluster/"jobs").iterdir()) == []


def test_stages_ask_for_what_they_need(cluster, tmp_path, capsys):
    work = tmp_path/"work"
    slurm = pool(work, "{account: lab, qos: normal, constraint: a100, stages: {exp1: {gpus: 0, memory: 8}, "
                       "bench: {partition: long, minutes: 3000}}}")
    for name in ("distill@a", "distill@b", "exp1", "bench"): slurm.start(job(work, name, "true"))
    assert finished(slurm, 4) == dict.fromkeys(("distill@a", "distill@b", "exp1", "bench"), 0)
    asked = {}
    for file in (cluster/"scripts").iterdir():
        lines = file.read_text().splitlines()
        options = dict(l.removeprefix("#SBATCH --").partition("=")[::2] for l in lines if l.startswith("#SBATCH"))
        asked[options["mem"], options["time"]] = options
    usual, cheap, long = asked["32G", "120"], asked["8G", "120"], asked["32G", "3000"]
    assert usual["gpus-per-node"] == "1" and usual["array"].startswith("0-1%") and "partition" not in usual
    assert "gpus-per-node" not in cheap and cheap["array"].startswith("0-0%") and long["partition"] == "long"
    for options in asked.values():
        assert (options["account"], options["qos"], options["constraint"]) == ("lab", "normal", "a100")
        assert "requeue" in options
    assert "exp1 asks for 240 minutes, the partition gives 120" in capsys.readouterr().out


def test_a_stage_that_is_not_there_is_named(cluster, tmp_path):
    (tmp_path/"work").mkdir()
    shutil.copyfile(ROOT/"dvc.yaml", tmp_path/"work"/"dvc.yaml")
    with pytest.raises(ValueError, match="launch.stages names exp99, and dvc.yaml has no such stage"):
        pool(tmp_path/"work", "{stages: {exp99: {gpus: 0}}}")


def test_an_end_leaves_no_job_though_a_question_fails(cluster, tmp_path):
    work, slurm = tmp_path/"work", pool(tmp_path/"work")
    slurm.start(job(work, "a", "sleep 60"))
    slurm.flush()
    faults(cluster, "squeue", "fail")
    assert [j.name for j in slurm.stop()] == ["a"] and list((cluster/"jobs").iterdir()) == []


def test_what_a_killed_launcher_left_is_ended(cluster, tmp_path):
    work = tmp_path/"work"
    killed = pool(work)
    killed.start(job(work, "a", "sleep 60"))
    faults(cluster, "sbatch", "late")                                     # nor did it know the number
    killed.flush()
    assert len(list((cluster/"jobs").iterdir())) == 1
    faults(cluster, "squeue", "fail")
    pool(work)
    assert list((cluster/"jobs").iterdir()) == []
    pool(work).known.write_text('["rcid-1"]')
    faults(cluster, "squeue", "fail", "fail", "fail")
    with pytest.raises(CommandFailed, match="squeue does not answer"): pool(work)


@pytest.mark.slow
def test_a_pipeline_on_a_controller_that_often_fails(cluster, tmp_path):
    folder = toy.make(tmp_path/"toy")
    faults(cluster, "sbatch", "late", "fail", "ok", "late")
    faults(cluster, "squeue", "ok", "fail", "fail", "ok", "fail")
    code, said = toy.launch(folder, "--executor", "slurm", TOY_PACE="0")
    assert code == 0 and "SLURM: sbatch does not answer" in said, said
    assert sorted(t["stage"] for t in toy.trail(folder)) == sorted({t["stage"] for t in toy.trail(folder)}), "ran twice"
    assert len(toy.results(folder)) == 19 and "up to date" in toy.dvc(folder, "repro")
    assert not (folder/"logs"/"slurm"/"jobs.json").exists() and calls(cluster, "scancel") == 0
