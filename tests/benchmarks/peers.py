"""The same sweep in TransformerLens, nnsight and pyvene: python tests/benchmarks/peers.py [--stride 10] [--envs
FOLDER] [--only nnsight]

Each peer has its own environment, made here with pip; one that cannot be made is left out with a note. Ours runs in
this process, in units of the same plain forward.
A stride above 1 measures every n-th site, and the cost of all sites is counted from that."""

import argparse, json, os, subprocess, sys, tempfile
from pathlib import Path
import torch
from common import HERE, SHAPE, TEACHER, full_forward, in_units_of, pairs_of_20, save, show
from safetensors.torch import save_file

PEERS = {"transformer_lens": "transformer-lens==4.3.0", "nnsight": "nnsight==0.8.0", "pyvene": "pyvene==0.1.8"}
ENVS = Path(os.environ.get("RCID_ENVS", Path.home()/".cache"/"rcid"/"envs"))


def environment(name, *packages, envs=ENVS):
    "The python of an environment with these packages, made on first use; None and the reason when it cannot be made."
    folder = Path(envs)/name
    python = folder/"bin"/"python"
    wanted = ["torch==" + torch.__version__.split("+")[0], *packages]
    if (folder/"ready").exists() and (folder/"ready").read_text() == " ".join(wanted): return python, None
    if not python.exists(): subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    done = subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return None, next((l for l in reversed(done.stderr.splitlines()) if l.startswith("ERROR")), "pip failed")
    (folder/"ready").write_text(" ".join(wanted))
    return python, None


def run_peer(script, name, package, job, out, *args, envs=ENVS):
    "Runs a script in its environment; its JSON, or a note."
    python, why = environment(name, *([package] if isinstance(package, str) else package), envs=envs)
    if python is None: return None, f"{name}: skipped, no environment ({why})"
    done = subprocess.run(
        [str(python), str(HERE / script), str(job), str(out), *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode: return None, f"{name}: failed ({(done.stderr.strip().splitlines() or ['no message'])[-1]})"
    return json.loads(Path(out).read_text()), None


def main(argv):
    from rcid.causal import all_sites, answer_logit_diff, causal_effects, sweep_flops
    from rcid.models import load_model
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stride", type=int, default=10), parser.add_argument(
        "--envs", default=ENVS
    ), parser.add_argument("--only", default="")
    o = parser.parse_args(argv)
    model, tokenizer = load_model(TEACHER)
    pairs = pairs_of_20(tokenizer)
    sites, scale = all_sites(model, pairs), float(answer_logit_diff(model, pairs)[0].abs().mean())
    rows, notes = [], []
    forwards, _, effects = in_units_of(
        full_forward(model, pairs), lambda: causal_effects(model, pairs, sites, skip_zero=False)
    )
    quick, _, _ = in_units_of(full_forward(model, pairs), lambda: causal_effects(model, pairs, sites))
    floor = sweep_flops(model, pairs, sites, skip_zero=False)["equivalents"]
    rows += [
        dict(
            tool="rcid",
            variant="every site run",
            forwards=forwards,
            measured_sites=len(sites),
            sites=len(sites),
            difference=0.0,
        ),
        dict(
            tool="rcid",
            variant="exact zeros left out",
            forwards=quick,
            measured_sites=len(sites),
            sites=len(sites),
            difference=0.0,
        ),
    ]
    with tempfile.TemporaryDirectory() as tmp:
        save_file(
            dict(
                clean_ids=pairs.clean_ids,
                corrupt_ids=pairs.corrupt_ids,
                answer_pos=pairs.answer_pos,
                correct=pairs.correct_token_id,
                wrong=pairs.wrong_token_id,
                position=torch.stack(list(pairs.key_positions.values()), 1),
                effects=effects,
            ),
            f"{tmp}/pairs.safetensors",
        )
        Path(tmp, "job.json").write_text(json.dumps({"model": str(Path(TEACHER).resolve())}))
        for name, package in PEERS.items():
            if o.only and name != o.only: continue
            print(f"{name} ...", flush=True)
            got, note = run_peer(f"peer_{name}.py", name, package, tmp, f"{tmp}/{name}.json", o.stride, envs=o.envs)
            rows += got or []
            if note: notes.append(note); print(note, flush=True)
    for r in rows: r |= dict(difference=r["difference"] / scale, times_ours=r["forwards"] / forwards)
    show(
        f"{len(sites)} sites on {len(pairs)} pairs x 20 tokens, in plain forwards of the same batch (floor"
        f" {floor:.2f}); difference from ours in shares of mean |LD|",
        rows,
    )
    if not o.only:
        save(
            "peers",
            dict(
                rows=rows,
                notes=notes,
                floor=floor,
                pairs=len(pairs),
                tokens=pairs.clean_ids.shape[1],
                shape=SHAPE,
                positions={r: p.tolist() for r, p in pairs.key_positions.items()},
            ),
        )


if __name__ == "__main__": main(sys.argv[1:])
