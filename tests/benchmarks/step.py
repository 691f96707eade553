"""A distillation step against a plain loop and TRL: python tests/benchmarks/step.py [--rounds 2] [--steps 3] [--envs FOLDER]

Teacher SmolLM2-135M, ten-layer student, 16 clean + 16 corrupt prompts x 20 tokens; CPU time of a step, plain loop = 1.00. All train the same parameters in fp32.
The parts are switched on one after the other in the plain loop; the last rows are `rcid.distill.distill` itself, which also packs both prompts of a pair into one row."""
import argparse, json, statistics, tempfile, time
from pathlib import Path
import torch
import plain_step
from common import STUDENT, TEACHER, pairs_of_20, save, show
from peers import ENVS, run_peer
from rcid.distill import DistillConfig, distill
from rcid.distill.targets import pack_pairs
from rcid.distill.plan import step_flops
from rcid.distill.trainer import lr_at
from rcid.models import get_adapter, load_model
from safetensors.torch import save_file

PARTS = ("cached", "joined", "head_at_answer", "fused")
NAMES = ("plain loop", "+ cached teacher", "+ one batch", "+ head at the answer", "+ fused AdamW")
TRL = "trl==1.16.0"


def ours(student, teacher, pairs, config):
    "Losses and CPU seconds of every step of `distill`: its probe runs after each."
    times = []
    result = distill(student, teacher, pairs, "standard_kd_pairs", config, probe=lambda *_: times.append(time.process_time()) or {})
    return [h["loss"] for h in result.history[1:]], [b - a for a, b in zip(times[1:], times[2:])]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2), parser.add_argument("--steps", type=int, default=3), parser.add_argument("--envs", default=ENVS)
    o = parser.parse_args(argv)
    (teacher, tokenizer), (student, _) = load_model(TEACHER), load_model(STUDENT)
    pairs, weights = pairs_of_20(tokenizer, 16, split="train"), {k: v.clone() for k, v in student.state_dict().items()}
    config = lambda kl_at, bf16=False: DistillConfig(steps=o.steps + 1, batch=len(pairs), lr=1e-4, kl_at=kl_at, log_every=1, checkpoint_every=10**9, bf16=bf16)
    lrs = [lr_at(i, config("answer")) for i in range(o.steps + 1)]
    plain = lambda everywhere, n=0: lambda: plain_step.run(student, teacher, pairs.clean_ids, pairs.corrupt_ids, pairs.answer_pos, lrs, everywhere, **{p: True for p in PARTS[:n]})
    runs = {("answer", NAMES[n]): plain(False, n) for n in range(len(NAMES))} | {("answer", "rcid"): lambda: ours(student, teacher, pairs, config("answer"))} | {
        ("all tokens", "plain loop"): plain(True), ("all tokens", "rcid"): lambda: ours(student, teacher, pairs, config("all")),
        ("answer", "rcid, bf16"): lambda: ours(student, teacher, pairs, config("answer", True)), ("all tokens", "rcid, bf16"): lambda: ours(student, teacher, pairs, config("all", True))}
    seconds, losses = {k: [] for k in runs}, {}
    for _ in range(o.rounds):
        for key, f in runs.items():
            student.load_state_dict(weights)
            losses[key], s = f()
            seconds[key].append(statistics.median(s[1:] if len(s) > o.steps else s))                # the first step fills caches
            print(*key, f"{seconds[key][-1]:.2f} s", flush=True)

    packed, tokens, head = pack_pairs(pairs).ids.numel(), 2 * pairs.clean_ids.numel(), {"answer": 2 * len(pairs), "all tokens": 2 * pairs.clean_ids.numel()}
    counted = lambda trunk, rows, known: step_flops(student, trunk, rows, True) + (2 * rows * get_adapter(teacher).vocab * get_adapter(teacher).d_model if known else step_flops(teacher, tokens, tokens, False))
    rows = []
    for kl_at, name in runs:
        unit = seconds[kl_at, "plain loop"]
        fast = name.startswith("rcid")
        rows.append(dict(kl_at=kl_at, step=name, cost=statistics.median(a / b for a, b in zip(seconds[kl_at, name], unit)), seconds=statistics.median(seconds[kl_at, name]),
            floor=counted(packed, packed if kl_at == "all tokens" else head[kl_at], True) / counted(tokens, tokens, False) if fast else None,
            loss_difference=None if "bf16" in name else max(abs(a - b) for a, b in zip(losses[kl_at, name], losses[kl_at, "plain loop"]))))
    with tempfile.TemporaryDirectory() as tmp:
        save_file(dict(clean=pairs.clean_ids, corrupt=pairs.corrupt_ids, answer=pairs.answer_pos), f"{tmp}/pairs.safetensors")
        Path(tmp, "job.json").write_text(json.dumps(dict(teacher=str(Path(TEACHER).resolve()), student=str(Path(STUDENT).resolve()), lrs=lrs, rounds=o.rounds)))
        got, note = run_peer("peer_trl.py", "trl", TRL, tmp, f"{tmp}/trl.json", envs=o.envs)
    rows += got or []
    if note: print(note)
    show("A distillation step in plain steps (CPU time); floor: FLOPs counted by hand over the plain step's", rows)
    save("step", dict(rows=rows, notes=[note] if note else [], losses=losses["answer", "plain loop"], pairs=len(pairs), tokens=pairs.clean_ids.shape[1], packed_tokens=packed, plain_tokens=tokens, rounds=o.rounds, steps=o.steps))


if __name__ == "__main__": main()
