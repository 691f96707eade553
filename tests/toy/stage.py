"A stage of the toy pipeline: hashes a number so many times, slowly, with a checkpoint after every step."
import hashlib, json, os, sys, tempfile, time
from pathlib import Path

PACE = float(os.environ.get("TOY_PACE", "0.1"))


def write(path: str, text: str):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # as rcid.core.paths.atomic_file
    handle, new = tempfile.mkstemp(dir=Path(path).parent, prefix=f".{Path(path).name}.")
    try:
        with open(handle, "w") as f: f.write(text)
        os.chmod(new, 0o644)
        os.replace(new, path)
    except OSError:
        os.unlink(new)
        raise


def train(name: str):
    params, kept = Path("params.yaml").read_text(), f"checkpoints/{name}.json"
    steps = int(params.split("steps:")[1].split()[0])
    state = (
        json.loads(Path(kept).read_text())
        if Path(kept).exists()
        else {"step": 0, "value": Path("out/source.txt").read_text() + name}
    )
    note = dict(
        stage=name,
        gpu=os.environ.get("CUDA_VISIBLE_DEVICES"),
        job=f"{os.environ.get('SLURM_ARRAY_JOB_ID')}_{os.environ.get('SLURM_ARRAY_TASK_ID')}",
        start=state["step"],
        pid=os.getpid(),
    )
    write(f"trail/{name}-{time.time_ns()}.json", json.dumps(note))
    while state["step"] < steps:
        time.sleep(PACE)
        state = {"step": state["step"] + 1, "value": hashlib.sha256(state["value"].encode()).hexdigest()}
        write(kept, json.dumps(state))
        print(f"step {state['step']} of {steps} loss={1 / state['step']:.3f}", flush=True)
    write(f"out/train-{name}.txt", state["value"] + "\n")
    write(f"metrics/train-{name}.json", json.dumps({"value": state["value"], "steps": steps}) + "\n")
    os.unlink(kept)


if sys.argv[1] == "source":write("out/source.txt", Path("params.yaml").read_text().split("seed:")[1].split()[0])
elif sys.argv[1] == "train":train(sys.argv[2])
else:
    values = {p.stem: json.loads(p.read_text())["value"] for p in sorted(Path("metrics").glob("*.json"))}
    write("result.json", json.dumps(values) + "\n")
