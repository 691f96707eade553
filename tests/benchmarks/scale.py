"""What a finished run in a workspace says: python tests/benchmarks/scale.py gpu|calibrate|repair COMMIT

Reads .workspaces/NAME and writes tests/benchmarks/NAME.json: settings, stage times, machine, the commit that its
sources are, and of `gpu` the models and experiments 1 to 5, of `calibrate` the calibration, of `repair` experiment 2a.
Refuses a run with stale stages or with sources of another commit. What came out is shown by nbs/guides/gpu_scale.ipynb,
more_plants.ipynb and more_repair.ipynb, which say how each is run."""

import json, os, subprocess, sys
from collections import defaultdict
from common import HERE, machine
from rcid.core import read_json, root, write_json
from rcid.core.params import load_params

EXPERIMENTS = [f"exp{i}" for i in range(1, 6)]
PAGES = dict(gpu=EXPERIMENTS, calibrate=["calibrate"], repair=["exp2a"])     # stages that must be up to date
SOURCES = ("rcid", "nbs/experiments", "dvc.yaml")


def settings(p):
    "What the numbers depend on beside the code."
    return dict(
        seeds=p.seeds,
        families=p.families,
        bootstrap=p.eval.bootstrap,
        **p.model_dump(include={"main_matrix", "extra_matrix", "data", "distill", "lm"}),
    )


def results(name, p, metrics):
    if name == "repair": return dict(settings=p.planted.model_dump(), repair=read_json(metrics/"exp2a.json"))
    if name == "calibrate":
        return dict(settings=p.calibrate.model_dump(), calibration=read_json(metrics/"calibrate.json"))
    return dict(
        settings=settings(p),
        models={
            f: {kind: read_json(metrics / kind / f"{f}.json") for kind in ("models", "heal", "pilot")}
            for f in p.families
        },
        experiments={e: read_json(metrics / f"{e}.json") for e in EXPERIMENTS},
    )


def collect(name, commit):
    folder = root()/".workspaces"/name
    git = lambda *words: subprocess.run(["git", *words], cwd=root(), capture_output=True, text=True, check=True).stdout
    if other := git(f"--work-tree={folder}", "diff", "--name-only", commit, "--", *SOURCES).split():
        sys.exit(f"{folder}: {', '.join(other[:3])} are not those of commit {commit}")
    stale = subprocess.run(
        [sys.executable, "-m", "dvc", "status", "--with-deps", *PAGES[name]],
        cwd=folder,
        env={**os.environ, "RCID_ROOT": str(folder), "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    if stale.returncode or "up to date" not in stale.stdout:
        sys.exit(f"{folder} is not up to date:\n{stale.stdout[:600]}{stale.stderr[:600]}")
    p, seconds = load_params(folder/"params.yaml"), defaultdict(list)
    for stage, s in read_json(folder/"logs"/"launch"/"times.json").items(): seconds[stage.split("@")[0]].append(s)
    return dict(
        commit=git("rev-parse", "--short", commit).strip(),
        machine=machine(),
        **results(name, p, folder/"metrics"),
        seconds={k: dict(stages=len(v), mean=sum(v) / len(v)) for k, v in sorted(seconds.items())},
    )


if __name__ == "__main__": print(write_json(HERE/f"{sys.argv[1]}.json", collect(*sys.argv[1:3])))
