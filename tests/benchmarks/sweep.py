"""The patching sweep against the naive loop and its hand-counted floor: python tests/benchmarks/sweep.py [repeats of the first three rows]

CPU process time in units of one full forward of the same batch, which runs in between. Needs artifacts/models/llama/teacher (`dvc repro models@llama`)."""
import sys
from dataclasses import replace
import torch
from common import SHAPE, TEACHER, cpu, full_forward, in_units_of, pairs_of_20, peak_memory, save, show
from rcid.causal import all_positions, all_sites, answer_logit_diff, attribution_effects, causal_effects, naive_effects, rank_agreement, score_sites, sweep_flops
from rcid.data import load_pairs
from rcid.models import load_model

ROLES = ("s1", "s2", "end")


def swept(label, model, pairs, repeats):
    "Three sweeps of one model: every site run, exact zeros left out, and all positions."
    rows, forward = [], full_forward(model, pairs)
    for name, sites, skip in (("layers x s1, s2, end; s1 run too", all_sites(model, pairs), False), ("layers x s1, s2, end", all_sites(model, pairs), True),
                              ("layers x all positions", all_positions(model, pairs), True)):
        median, least, _ = in_units_of(forward, lambda: causal_effects(model, pairs, sites, skip_zero=skip), repeats)
        floor = sweep_flops(model, pairs, sites, skip_zero=skip)["equivalents"]
        rows.append(dict(model=label, sweep=name, tokens=pairs.clean_ids.shape[1], sites=len(sites), forwards=median, least=least, floor=floor, over_floor=median / floor))
        print("{model:34} {sweep:34} {forwards:6.2f} forwards (least {least:.2f}), floor {floor:5.2f}, x {over_floor:.2f}".format(**rows[-1]), flush=True)
    return rows


def difference(model, pairs, sites, mode="noising"):
    "Largest difference from the naive oracle, as a share of mean |LD|."
    scale = answer_logit_diff(model, pairs)[0].abs().mean()
    return float((causal_effects(model, pairs, sites, mode) - naive_effects(model, pairs, sites, mode)).abs().max() / scale)


def main(repeats=3):
    model, tokenizer = load_model(TEACHER)
    ioi = load_pairs("ioi", tokenizer, n=32)
    ioi = replace(ioi, key_positions={r: ioi.key_positions[r] for r in ROLES}).trimmed()
    pairs = pairs_of_20(tokenizer)
    sites = all_sites(model, pairs)
    rows = swept("SmolLM2-135M", model, pairs, repeats) + swept("SmolLM2-135M, the project's IOI", model, ioi, 1)

    errors = [dict(model="SmolLM2-135M", mode=mode, pairs=4, sites=len(s), error=difference(model, pairs[:4], s, mode)) for mode, s in (("noising", sites), ("denoising", sites[1::4]))]
    few = sites[5::10]                                                    # three sites of every role
    naive, _, _ = in_units_of(full_forward(model, pairs), lambda: naive_effects(model, pairs, few), 1)
    estimate, exact = (score_sites(model, pairs, score) for score in ("atp", "effect"))
    atp = rank_agreement(estimate, exact) | dict(forwards=in_units_of(full_forward(model, pairs), lambda: attribution_effects(model, pairs), repeats)[0])

    memory = []
    for budget in (2**30, 2**26):
        peak, _ = peak_memory(lambda: causal_effects(model, pairs, memory=budget))
        memory.append(dict(sweep="layers x s1, s2, end", budget_mib=budget / 2**20, peak_mib=peak / 2**20))
    effects, scale = causal_effects(model, pairs), float(answer_logit_diff(model, pairs)[0].abs().mean())
    half, _ = load_model(TEACHER, dtype=torch.bfloat16)
    rows += swept("SmolLM2-135M, bf16", half, pairs, 1)
    rounded = causal_effects(half, pairs)
    bf16 = dict(from_fp32=float((rounded - effects).abs().max()) / scale, naive_from_fp32=float((naive_effects(half, pairs[:4], sites[1::4]) - effects[:4, 1::4]).abs().max()) / scale)
    del half
    for arch in ("qwen3", "qwen2"):
        other, _ = load_model(dict(arch=arch, **SHAPE), dtype="float32")
        rows += swept(f"{arch}, random weights", other, pairs, 1)
        errors.append(dict(model=f"{arch}, random weights", mode="noising", pairs=4, sites=len(sites[1::4]), error=difference(other, pairs[:4], sites[1::4])))
    show("Sweep, in forwards of the same 32 pairs", rows)
    show("Largest difference from the naive oracle, share of mean |LD|", errors)
    show("Attribution patching against exact effects, layer x role", [atp])
    show("Memory above the loaded model", memory)
    print(f"naive loop: {naive / len(few) * len(sites):.0f} forwards for {len(sites)} sites, measured on {len(few)}; bf16 differs from fp32 by {bf16['from_fp32']:.1e} of mean |LD| (its own naive loop by {bf16['naive_from_fp32']:.1e})")
    save("sweep", dict(rows=rows, errors=errors, atp=atp, memory=memory, bf16=bf16, naive=dict(forwards=naive / len(few) * len(sites), measured_sites=len(few), sites=len(sites)), pairs=len(pairs)))


if __name__ == "__main__": main(*map(int, sys.argv[1:]))
