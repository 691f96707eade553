"""The patching sweep against the naive loop and its hand-counted floor: python tests/benchmarks/sweep.py [repeats]

CPU process time in units of one full forward of the same batch, interleaved with it. Prints a table and writes sweep.json beside this file.
Needs artifacts/models/llama/teacher (`dvc repro models@llama`). Set OMP_NUM_THREADS; an idle machine gives the cleanest numbers."""
import os, statistics, sys, time
from dataclasses import replace
from pathlib import Path
import torch
from rcid.causal import all_positions, all_sites, answer_logit_diff, causal_effects, naive_effects, sweep_flops
from rcid.core import write_json
from rcid.data import load_pairs
from rcid.models import load_model

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 3
model, tokenizer = load_model("artifacts/models/llama/teacher")
pairs = load_pairs("ioi", tokenizer, n=32)
pairs = replace(pairs, key_positions={r: pairs.key_positions[r] for r in ("s1", "s2", "end")}).trimmed()


def cpu(f):
    start = time.process_time(); out = f(); return time.process_time() - start, out


def forward():
    with torch.no_grad(): return model(pairs.clean_ids, attention_mask=pairs.attention_mask, use_cache=False).logits


rows = []
forward()
for name, sites, options in (("layers x s1, s2, end; s1 computed too", all_sites(model, pairs), {"skip_zero": False}), ("layers x s1, s2, end", all_sites(model, pairs), {}),
                             ("all positions", all_positions(model, pairs), {})):
    ratios = []
    for _ in range(repeats):
        before, _ = cpu(forward)
        spent, effects = cpu(lambda: causal_effects(model, pairs, sites, **options))
        after, _ = cpu(forward)
        ratios.append(spent / ((before + after) / 2))
    floor = sweep_flops(model, pairs, sites, skip_zero=options.get("skip_zero", True))["equivalents"]
    rows.append(dict(sweep=name, sites=len(sites), forwards=statistics.median(ratios), least=min(ratios), floor=floor, over_floor=statistics.median(ratios) / floor))
    print("{sweep:40} {sites:4} sites  {forwards:6.2f} forwards (least {least:.2f})  floor {floor:5.2f}  x {over_floor:.2f}".format(**rows[-1]), flush=True)

few, some = pairs[:4], all_sites(model, pairs)[1::4]                       # the oracle needs three forwards a site; a stride that meets every role
error = float((causal_effects(model, few, some) - naive_effects(model, few, some)).abs().max() / answer_logit_diff(model, few)[0].abs().mean())
print(f"largest difference from the naive oracle on {len(few)} pairs, {len(some)} sites: {error:.1e} of mean |LD|")
write_json(Path(__file__).with_name("sweep.json"), dict(rows=rows, naive_forwards_by_count=3 * 90, error=error, pairs=len(pairs), seq=pairs.clean_ids.shape[1], threads=torch.get_num_threads(), torch=torch.__version__))
