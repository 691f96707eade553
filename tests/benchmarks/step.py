"""A distillation step against a plain loop and TRL: python tests/benchmarks/step.py [--rounds 3] [--steps 4]
[--quick] [--envs FOLDER]

Teacher SmolLM2-135M, ten-layer student, 16 clean + 16 corrupt prompts x 20 tokens; CPU time of a step, plain loop =
1.00. All train the same parameters in fp32.
Runs are interleaved: a round runs each of them once, and a cost is the median over rounds of the ratio to the plain
loop of that round.
The parts are switched on one after the other in the plain loop; the last rows are `rcid.distill.distill` itself,
which also packs both prompts of a pair into one row.
"""

import argparse, json, statistics, tempfile, time
from pathlib import Path
import torch
import plain_step
from common import TEACHER, pairs_of_20, peak_memory, save, show, with_student
from peers import ENVS, run_peer
from rcid.distill import DistillConfig, distill, step_flops
from rcid.distill.teacher_cache import pack_pairs
from rcid.distill.schedule import lr_at
from safetensors.torch import save_file

PARTS = ("cached", "joined", "head_at_answer", "fused")
NAMES = ("plain loop", "+ cached teacher", "+ one batch", "+ head at the answer", "+ fused AdamW")
TRL = "trl==1.16.0"


def ours(student, teacher, pairs, config):
    "Losses and CPU seconds of every step of `distill`: its probe runs after each."
    times = []
    result = distill(
        student, teacher, pairs, "standard_kd_pairs", config, probe=lambda *_: times.append(time.process_time()) or {}
    )
    return [h["loss"] for h in result.history[1:]], [b - a for a, b in zip(times[1:], times[2:])]


def of_trl(student, pairs, lrs, o):
    "TRL's rows, or a note."
    with tempfile.TemporaryDirectory() as tmp:
        student.save_pretrained(f"{tmp}/student")
        save_file(
            dict(clean=pairs.clean_ids, corrupt=pairs.corrupt_ids, answer=pairs.answer_pos), f"{tmp}/pairs.safetensors"
        )
        Path(tmp, "job.json").write_text(
            json.dumps(dict(teacher=str(Path(TEACHER).resolve()), student=f"{tmp}/student", lrs=lrs, rounds=o.rounds))
        )
        return run_peer("peer_trl.py", "trl", TRL, tmp, f"{tmp}/trl.json", envs=o.envs)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3), parser.add_argument(
        "--steps", type=int, default=4
    ), parser.add_argument("--envs", default=ENVS), parser.add_argument(
        "--quick", action="store_true", help="only the plain loop and rcid"
    )
    o = parser.parse_args(argv)
    teacher, student, tokenizer = with_student()
    pairs, weights = pairs_of_20(tokenizer, 16, split="train"), {k: v.clone() for k, v in student.state_dict().items()}
    config = lambda kl_at, **more: DistillConfig(
        **dict(
            steps=o.steps + 1, batch=len(pairs), lr=1e-4, kl_at=kl_at, log_every=1, checkpoint_every=10**9, bf16=False
        )
        | more
    )
    lrs = [lr_at(i, config("answer")) for i in range(o.steps + 1)]
    plain = lambda everywhere, n=0: lambda: plain_step.run(
        student,
        teacher,
        pairs.clean_ids,
        pairs.corrupt_ids,
        pairs.answer_pos,
        lrs,
        everywhere,
        **{p: True for p in PARTS[:n]},
    )
    fast = lambda kl_at, **more: lambda: ours(student, teacher, pairs, config(kl_at, **more))
    runs = {
        (kl_at, name): f
        for kl_at in ("answer", "all tokens")
        for everywhere in (kl_at != "answer",)
        for name, f in {
            "plain loop": plain(everywhere),
            "rcid": fast(kl_at.split()[0]),
            "rcid, bf16": fast(kl_at.split()[0], bf16=True),
        }.items()
    }
    runs |= {("answer", NAMES[n]): plain(False, n) for n in range(1, len(NAMES))}
    if o.quick: runs = {k: f for k, f in runs.items() if k[1] in ("plain loop", "rcid")}
    seconds, losses = {k: [] for k in runs}, {}
    for _ in range(o.rounds):
        for key, f in runs.items():
            student.load_state_dict(weights)
            losses[key], s = f()
            # the first step fills caches
            seconds[key].append(statistics.median(s[1:] if len(s) > o.steps else s))
            print(*key, f"{seconds[key][-1]:.2f} s", flush=True)
    peaks = {}
    for key, f in {
        ("answer", "plain loop"): plain(False),
        ("answer", "rcid"): fast("answer"),
        ("answer", "rcid, gradient checkpointing"): fast("answer", checkpoint_gradients=True),
    }.items():
        student.load_state_dict(weights), student.zero_grad()
        peaks[key] = peak_memory(f)[0] / 2**20

    packed, tokens, head = (
        pack_pairs(pairs).ids.numel(),
        2 * pairs.clean_ids.numel(),
        {"answer": 2 * len(pairs), "all tokens": pack_pairs(pairs).ids.numel()},
    )
    unit = step_flops(student, tokens, tokens, True) + step_flops(teacher, tokens, tokens, False)
    floor = (
        lambda kl_at: (
            step_flops(student, packed, head[kl_at], True, last_rows=head[kl_at] if kl_at == "answer" else None)
            + step_flops(teacher, 0, head[kl_at], False)
        )
        / unit
    )
    rows = []
    for kl_at, name in sorted(runs, key=lambda k: (k[0] != "answer", k[1].startswith("rcid"))):
        ratios = [a / b for a, b in zip(seconds[kl_at, name], seconds[kl_at, "plain loop"])]
        rows.append(
            dict(
                kl_at=kl_at,
                step=name,
                cost=statistics.median(ratios),
                least=min(ratios),
                most=max(ratios),
                seconds=statistics.median(seconds[kl_at, name]),
                floor=floor(kl_at) if name == "rcid" else None,
                loss_difference=(
                    None
                    if "bf16" in name
                    else max(abs(a - b) for a, b in zip(losses[kl_at, name], losses[kl_at, "plain loop"]))
                ),
            )
        )
    memory = [dict(kl_at=kl_at, step=name, peak_mib=peak) for (kl_at, name), peak in peaks.items()]
    student.load_state_dict(weights)
    got, note = (
        (None, "step: a quick run, without the parts one after the other and without trl")
        if o.quick
        else of_trl(student, pairs, lrs, o)
    )
    rows += got or []
    if note: print(note)
    show("A distillation step in plain steps (CPU time); floor: FLOPs counted by hand over the plain step's", rows)
    show("Memory of a run above the loaded models", memory)
    save(
        "step",
        dict(
            rows=rows,
            memory=memory,
            notes=[note] if note else [],
            losses=losses["answer", "plain loop"],
            pairs=len(pairs),
            tokens=pairs.clean_ids.shape[1],
            packed_tokens=packed,
            plain_tokens=tokens,
            rounds=o.rounds,
            steps=o.steps,
        ),
    )


if __name__ == "__main__": main()
