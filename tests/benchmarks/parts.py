"""Minutes of a default run by part, for two commits run one after the other on one machine:
python tests/benchmarks/parts.py BEFORE AFTER SECONDS_BEFORE SECONDS_AFTER, folders with a finished `make repro` and
what the clock said of it. Writes parts.json."""

import json, os, platform, subprocess, sys
from pathlib import Path
from common import HERE

PARTS = {                    # part: its stages
    "models, data, text": ("code", "tokenizers", "budget", "models", "data", "pilot", "text"),
    "healing": ("heal",),
    "sites": ("sites",),
    "calibration and its plants": ("plants", "plants_real", "calibrate"),
    "distillation": ("distill", "distill_extra", "distill_more"),
    "evaluation": ("evaluate", "evaluate_extra", "evaluate_more", "baseline", "probe"),
    "experiment 6": ("kv_data", "kv_models", "kv_diagnose", "kv_baseline", "kv_distill"),
    "experiment 7": ("kv_parts", "kv_base", "kv_teachers", "kv_fuse", "fused_models", "fused"),
    "pages and paper": ("exp1", "exp2", "exp3", "exp4", "exp5", "exp6", "exp7", "bench", "paper"),
}


def part_of(stage: str) -> str:
    name = stage.partition("@")[0]
    for part, stages in PARTS.items():
        if name in stages: return part
    raise SystemExit(f"stage {name!r} belongs to no part: add it to PARTS in {__file__}")


def read(folder: Path) -> dict:
    "Stages and seconds of each part, as the launcher has noted them."
    seconds = json.loads((folder/"logs"/"launch"/"times.json").read_text())
    commit = subprocess.run(["git", "-C", folder, "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True)
    parts = {part: dict(stages=0, seconds=0.0) for part in PARTS}
    for stage, spent in seconds.items():
        parts[part_of(stage)]["stages"] += 1
        parts[part_of(stage)]["seconds"] += spent
    for part in parts.values(): part["seconds"] = round(part["seconds"], 1)
    return dict(commit=commit.stdout.strip(), parts=parts)


if __name__ == "__main__":
    if len(sys.argv) != 5: raise SystemExit(__doc__)
    before, after = (read(Path(folder)) for folder in sys.argv[1:3])
    before["wall_seconds"], after["wall_seconds"] = map(int, sys.argv[3:])
    machine = dict(cores=os.cpu_count(), system=f"{platform.system()} {platform.machine()}", workers=2, threads=1)
    (HERE/"parts.json").write_text(json.dumps(dict(machine=machine, before=before, after=after), indent=1) + "\n")
