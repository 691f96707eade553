"""What an experiment costs before it does anything: python tests/benchmarks/startup.py [repeats]

An empty notebook, and one that imports the sweep engine and the trainer, run as stages in a workspace of their own.
CPU seconds of all processes, and wall time.
"""

import json, os, resource, shutil, statistics, subprocess, sys, tempfile, time
from pathlib import Path
from common import HERE, save, show

NOTEBOOKS = {
    "empty": "",
    "importing": (
        "from rcid.causal import causal_effects\nfrom rcid.distill import distill\nfrom rcid.models import load_model"
    ),
}


def run(folder, name):
    "CPU and wall seconds of one stage."
    spent = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    before, start = spent(), time.time()
    subprocess.run(
        [sys.executable, "-m", "rcid.pipeline.stage", name],
        cwd=folder,
        check=True,
        capture_output=True,
        env={**os.environ, "RCID_ROOT": folder, "PYTHONPATH": str(HERE.parents[1])},
    )
    return spent() - before, time.time() - start


def main(repeats=3):
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        experiments = Path(folder, "nbs", "experiments")
        experiments.mkdir(parents=True), Path(folder, "dvc.yaml").touch(), shutil.copy(
            HERE.parents[1] / "params.yaml", folder
        )
        for name, code in NOTEBOOKS.items():
            cell = lambda source, **metadata: dict(
                cell_type="code",
                id=f"cell-{len(source)}",
                metadata=metadata,
                source=source,
                outputs=[],
                execution_count=None,
            )
            kernel = dict(kernelspec=dict(display_name="python3", language="python", name="python3"))
            Path(experiments, f"{name}.ipynb").write_text(
                json.dumps(
                    dict(
                        cells=[cell("", tags=["parameters"]), cell(code)] if code else [cell("", tags=["parameters"])],
                        metadata=kernel,
                        nbformat=4,
                        nbformat_minor=5,
                    )
                )
            )
            cpu, wall = zip(*(run(folder, name) for _ in range(repeats)))
            rows.append(
                dict(
                    notebook=name,
                    cpu_seconds=statistics.median(cpu),
                    wall_seconds=statistics.median(wall),
                    repeats=repeats,
                )
            )
    show("An experiment notebook before its own work", rows)
    save("startup", dict(rows=rows))


if __name__ == "__main__": main(*map(int, sys.argv[1:]))
