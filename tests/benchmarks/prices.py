"""CPU seconds of a step of each method against KL on the same pairs: python tests/benchmarks/prices.py [--rounds 3]
[--steps 4]

Teacher SmolLM2-135M, a student of ten evenly spaced layers, 16 IOI pairs of each of two kinds in a batch, fp32. Methods
are interleaved as in step.py, and a price is the median over rounds of the ratio to `standard_kd_pairs` of that round.
What is done once, before the first step (the teacher's runs, maps, scales), stands beside it in steps of that KL.
"""

import argparse, statistics, time
import torch
from common import TEACHER, save, show
from rcid.align import map_layers
from rcid.causal import Site
from rcid.data import load_kinds, stacked
from rcid.distill import METHODS, RCIDM, DistillConfig, Interchange, Together, distill
from rcid.models import load_model, shrink
from rcid.models.shrink import even_layers

BASE = "standard_kd_pairs"
# a pruned student shares its teacher's basis: W is the identity
KEPT = RCIDM(w="identity")
PRICED = {
    "rcid": METHODS["rcid_identity"],
    "rcid_m": KEPT,
    "rcid_m_interchange": Together(terms=(KEPT, Interchange())),
} | {name: METHODS[name] for name in ("rcid_norm", "interchange", "effect_match", "diito", "fitnets")}
PRICED = {BASE: METHODS[BASE]} | PRICED


def timed(student, teacher, pairs, method, config):
    "CPU seconds before the first step, and of a step after the first."
    times = [time.process_time()]
    distill(student, teacher, pairs, method, config, probe=lambda *_: times.append(time.process_time()) or {})
    # the probe runs before the first step as well; the first step fills caches
    return times[1] - times[0], statistics.median(b - a for a, b in zip(times[2:], times[3:]))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    o = parser.parse_args(argv)
    teacher, tokenizer = load_model(TEACHER)
    student, keep = shrink(teacher, 10), even_layers(30, 10)
    weights = {k: v.clone() for k, v in student.state_dict().items()}
    pairs = stacked(load_kinds("ioi", tokenizer, ["s2", "s2_new"], split="train", n=16))
    config = DistillConfig(
        steps=o.steps + 1, batch=len(pairs), lr=1e-4, log_every=1, checkpoint_every=10**9, bf16=False,
        layer_map=dict(enumerate(map_layers(30, 10, how="kept", keep=keep))),
        sites=tuple(Site(l, "s2") for l in (9, 16, 19)) + (Site(22, "end"),),
        mediating=(Site(19, "s2"), Site(22, "end")))
    before, step = ({name: [] for name in PRICED} for _ in range(2))
    for _ in range(o.rounds):
        for name, method in PRICED.items():
            student.load_state_dict(weights)
            b, s = timed(student, teacher, pairs, method, config)
            before[name].append(b), step[name].append(s)
            print(f"{name}: {s:.2f} s a step, {b:.1f} s before", flush=True)
    rows = []
    for name in PRICED:
        ratios = [a / b for a, b in zip(step[name], step[BASE])]
        once = [a / b for a, b in zip(before[name], step[BASE])]
        rows.append(dict(method=name, price=statistics.median(ratios), least=min(ratios), most=max(ratios),
            seconds=statistics.median(step[name]), before=statistics.median(once)))
    show(f"A step on {len(pairs)} pairs of two kinds", rows)
    save("prices", dict(rows=rows, pairs=len(pairs), threads=torch.get_num_threads()))


if __name__ == "__main__": main()
