"""Minutes of a default run by part: python tests/benchmarks/parts.py NAME FOLDER SECONDS, a folder with a finished
`make repro` and what the clock said of it. Writes this entry of parts.json: `before` is the first version of the
pipeline (commit 50a42ac) on the machine and the day of `now`, today's graph; nothing ran beside either."""

import json, platform, subprocess, sys
from pathlib import Path
from common import HERE

PARTS = {                    # part: its stages
    "models, data, text": ("code", "tokenizers", "budget", "models", "data", "pilot", "text"),
    "healing": ("heal",),
    "sites": ("sites",),
    "plants": ("plant_base", "plants"),
    "calibration": ("calibrate", "calibrate_real"),
    "distillation": ("distill", "distill_extra", "distill_more"),
    "evaluation": ("evaluate", "evaluate_extra", "evaluate_more", "baseline", "probe"),
    "experiment 2a": ("planted",),
    "experiment 2b": ("real_plan", "real_students", "real"),
    "experiment 6": ("kv_data", "kv_models", "kv_diagnose", "kv_baseline", "kv_distill"),
    "experiment 7": ("kv_parts", "kv_base", "kv_teachers", "kv_fuse", "fused_models", "fused"),
    "pages and paper": (
        "exp1", "exp2", "exp2a", "exp2b", "exp3", "exp4", "exp5", "exp6", "exp7", "bench", "paper", "data.dvc"
    ),
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


def cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"): return line.split(":")[1].strip()
    return platform.machine()


if __name__ == "__main__":
    if len(sys.argv) != 4: raise SystemExit(__doc__)
    name, folder, clock = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    known = json.loads((HERE/"parts.json").read_text())
    known[name] = read(folder) | dict(wall_seconds=clock, cpu=cpu())
    (HERE/"parts.json").write_text(json.dumps(known, indent=1) + "\n")
