"""A controller without a cluster, for tests: this file under the names sbatch, squeue, scancel, srun and sinfo.

Its state lies in FAKE_SLURM: a file per job, `calls` (a line per question), and `faults/TOOL`, one line for each of the
next calls of a tool: `fail`, `hang`, `late` (does it, then fails), `refuse`, `ok`.
"""
import os, signal, subprocess, sys, time
from pathlib import Path

HERE, TOOL, ARGS = Path(os.environ["FAKE_SLURM"]), Path(sys.argv[0]).name, sys.argv[1:]


def fault() -> str:
    file = HERE/"faults"/TOOL
    lines = file.read_text().split() if file.exists() else []
    if lines: file.write_text("\n".join(lines[1:]))
    return lines[0] if lines else "ok"


def alive(pid: int) -> bool:
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError: return False


def jobs() -> list[tuple[str, str, int, str]]:
    "(number, name, process or 0, reason) of those that wait or run."
    found = [file.read_text().split("|") for file in sorted((HERE/"jobs").iterdir())]
    return [(n, name, int(pid), why) for n, name, pid, why in found if why or alive(int(pid))]


def sbatch() -> None:
    script = Path(ARGS[-1])
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in script.read_text().splitlines() if line.startswith("#SBATCH --")
    )
    number = 100 + len(list((HERE/"scripts").iterdir()))
    (HERE/"scripts"/str(number)).write_text(script.read_text())
    held = HERE/"reason"/options.get("account", "none")
    for i in range(int(options["array"].partition("%")[0].partition("-")[2]) + 1):
        env = {**os.environ, "SLURM_ARRAY_JOB_ID": str(number), "SLURM_ARRAY_TASK_ID": str(i)}
        pid, why = 0, held.read_text() if held.exists() else ""
        if not why:
            out = open(HERE/"out", "ab")
            pid = subprocess.Popen(["bash", script], env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                   start_new_session=True).pid
        (HERE/"jobs"/f"{number}_{i}").write_text(f"{number}_{i}|{options['job-name']}|{pid}|{why}")
    print(number)


def squeue() -> None:
    for number, name, pid, why in jobs(): print(f"{number}|{name}|{'PENDING' if why else 'RUNNING'}|{why or 'None'}")


def scancel() -> None:
    for number, _, pid, why in jobs():
        if number not in ARGS: continue
        if pid: os.killpg(pid, signal.SIGKILL)
        (HERE/"jobs"/number).unlink()


def sinfo() -> None: print("short* 2:00:00\nlong 7-00:00:00")


if TOOL == "srun": os.execvp(ARGS[1], ARGS[1:])                               # after --unbuffered
with open(HERE/"calls", "a") as f: f.write(" ".join([TOOL, *ARGS]) + "\n")
kind = fault()
if kind == "hang": time.sleep(60)
if kind == "refuse": sys.exit("sbatch: error: Batch job submission failed: Invalid qos specification")
if kind in ("ok", "late"): {"sbatch": sbatch, "squeue": squeue, "scancel": scancel, "sinfo": sinfo}[TOOL]()
if kind in ("fail", "late"): sys.exit(f"{TOOL}: error: Unable to contact slurm controller (connect failure)")
