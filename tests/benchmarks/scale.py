"""What a finished run of another scale says: python tests/benchmarks/scale.py gpu|calibrate COMMIT

Reads .workspaces/SCALE and writes tests/benchmarks/SCALE.json: settings, stage times, machine, the commit that its
sources are, and of `gpu` the models and experiments 1 to 5, of `calibrate` the calibration. Refuses a run with stale
stages or with sources of another commit. nbs/guides/gpu_scale.ipynb shows that of `gpu`, more_plants.ipynb that of
`calibrate`."""

import json, os, subprocess, sys
from collections import defaultdict
from common import HERE, machine
from rcid.core import read_json, root, write_json
from rcid.core.params import load_params

EXPERIMENTS = [f"exp{i}" for i in range(1, 6)]
SOURCES = ("rcid", "nbs/experiments", "dvc.yaml")


def settings(p):
    "What the numbers depend on beside the code."
    return dict(
        seeds=p.seeds,
        families=p.families,
        bootstrap=p.eval.bootstrap,
        **p.model_dump(include={"main_matrix", "extra_matrix", "data", "distill", "lm"}),
    )


def results(scale, p, metrics):
    if scale == "calibrate":
        return dict(settings=p.calibrate.model_dump(), calibration=read_json(metrics/"calibrate.json"))
    return dict(
        settings=settings(p),
        models={
            f: {kind: read_json(metrics / kind / f"{f}.json") for kind in ("models", "heal", "pilot")}
            for f in p.families
        },
        experiments={e: read_json(metrics / f"{e}.json") for e in EXPERIMENTS},
    )


def collect(scale, commit):
    folder = root()/".workspaces"/scale
    git = lambda *words: subprocess.run(["git", *words], cwd=root(), capture_output=True, text=True, check=True).stdout
    if other := git(f"--work-tree={folder}", "diff", "--name-only", commit, "--", *SOURCES).split():
        sys.exit(f"{folder}: {', '.join(other[:3])} are not those of commit {commit}")
    stages = ["calibrate"] if scale == "calibrate" else EXPERIMENTS
    stale = subprocess.run(
        [sys.executable, "-m", "dvc", "status", "--with-deps", *stages],
        cwd=folder,
        env={**os.environ, "RCID_ROOT": str(folder), "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    if stale.returncode or "up to date" not in stale.stdout:
        sys.exit(f"{folder} is not up to date:\n{stale.stdout[:600]}{stale.stderr[:600]}")
    p, seconds = load_params(folder/"params.yaml"), defaultdict(list)
    for name, s in read_json(folder/"logs"/"launch"/"times.json").items(): seconds[name.split("@")[0]].append(s)
    return dict(
        commit=git("rev-parse", "--short", commit).strip(),
        machine=machine(),
        **results(scale, p, folder/"metrics"),
        seconds={k: dict(stages=len(v), mean=sum(v) / len(v)) for k, v in sorted(seconds.items())},
    )


if __name__ == "__main__": print(write_json(HERE/f"{sys.argv[1]}.json", collect(*sys.argv[1:3])))
