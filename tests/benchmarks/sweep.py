"""The patching sweep against the naive loop and its hand-counted floor: python tests/benchmarks/sweep.py [repeats]
[costs] [errors] [prefilter] [memory]

CPU process time in units of one full forward of the same batch, which runs in between. Needs
artifacts/models/llama/teacher (`dvc repro models@llama`).
"""

import sys
from dataclasses import replace
import torch
from common import SHAPE, TEACHER, cpu, full_forward, in_units_of, pairs_of_20, peak_memory, save, show
from rcid.causal import (
    all_positions,
    all_sites,
    answer_logit_diff,
    attribution_effects,
    causal_effects,
    naive_effects,
    rank_agreement,
    score_sites,
    sweep_flops,
)
from rcid.data import load_pairs
from rcid.models import load_model

ROLES = ("s1", "s2", "end")


def swept(label, model, pairs, repeats):
    "Three sweeps of one model: every site run, exact zeros left out, and all positions."
    rows, forward = [], full_forward(model, pairs)
    for name, sites, skip in (
        ("layers x s1, s2, end; s1 run too", all_sites(model, pairs), False),
        ("layers x s1, s2, end", all_sites(model, pairs), True),
        ("layers x all positions", all_positions(model, pairs), True),
    ):
        median, least, _ = in_units_of(forward, lambda: causal_effects(model, pairs, sites, skip_zero=skip), repeats)
        floor = sweep_flops(model, pairs, sites, skip_zero=skip)["equivalents"]
        rows.append(
            dict(
                model=label,
                sweep=name,
                tokens=pairs.clean_ids.shape[1],
                sites=len(sites),
                forwards=median,
                least=least,
                floor=floor,
                over_floor=median / floor,
            )
        )
        print(
            "{model:34} {sweep:34} {forwards:6.2f} forwards (least {least:.2f}), floor {floor:5.2f}, x {over_floor:.2f}"
            .format(**rows[-1]),
            flush=True,
        )
    return rows


def difference(model, pairs, sites, mode="noising"):
    "Largest difference from the naive oracle, as a share of mean |LD|."
    scale = answer_logit_diff(model, pairs)[0].abs().mean()
    return float(
        (causal_effects(model, pairs, sites, mode) - naive_effects(model, pairs, sites, mode)).abs().max() / scale
    )


def costs(model, tokenizer, pairs, repeats):
    "Every model and sweep beside its floor."
    ioi = load_pairs("ioi", tokenizer, n=32)
    ioi = replace(ioi, key_positions={r: ioi.key_positions[r] for r in ROLES}).trimmed()
    rows = swept("SmolLM2-135M", model, pairs, repeats) + swept("SmolLM2-135M, the project's IOI", model, ioi, 1)
    for arch in ("qwen3", "qwen2"):
        rows += swept(
            f"{arch}, random weights", load_model(dict(arch=arch, **SHAPE), dtype="float32")[0], pairs, repeats
        )
    rows += swept("SmolLM2-135M, bf16", load_model(TEACHER, dtype=torch.bfloat16)[0], pairs, 1)
    few = all_sites(model, pairs)[5::10]                                  # three sites of every role
    naive, _, _ = in_units_of(full_forward(model, pairs), lambda: naive_effects(model, pairs, few), 1)
    sites = len(all_sites(model, pairs))
    naive = dict(forwards=naive / len(few) * sites, measured_sites=len(few), sites=sites)
    show("Sweep, in forwards of the same 32 pairs", rows), show("The naive loop", [naive])
    return dict(rows=rows, naive=naive, pairs=len(pairs))


def errors(model, tokenizer, pairs, repeats):
    "Largest differences from the oracle; bf16 against fp32."
    sites = all_sites(model, pairs)
    rows = [
        dict(model="SmolLM2-135M", mode=mode, pairs=4, sites=len(s), error=difference(model, pairs[:4], s, mode))
        for mode, s in (("noising", sites), ("denoising", sites[1::4]))
    ]
    for arch in ("qwen3", "qwen2"):
        other, _ = load_model(dict(arch=arch, **SHAPE), dtype="float32")
        rows.append(
            dict(
                model=f"{arch}, random weights",
                mode="noising",
                pairs=4,
                sites=len(sites[1::4]),
                error=difference(other, pairs[:4], sites[1::4]),
            )
        )
    half, scale, effects = (
        load_model(TEACHER, dtype=torch.bfloat16)[0],
        float(answer_logit_diff(model, pairs)[0].abs().mean()),
        causal_effects(model, pairs),
    )
    bf16 = dict(
        from_fp32=float((causal_effects(half, pairs) - effects).abs().max()) / scale,
        naive_from_fp32=float((naive_effects(half, pairs[:4], sites[1::4]) - effects[:4, 1::4]).abs().max()) / scale,
    )
    show("Largest difference from the naive oracle, share of mean |LD|", rows), show(
        "bf16 against fp32, share of mean |LD|", [bf16]
    )
    return dict(errors=rows, bf16=bf16)


def prefilter(model, tokenizer, pairs, repeats):
    "Attribution patching: its cost, and how well it ranks."
    estimate, exact = (score_sites(model, pairs, score=score) for score in ("atp", "effect"))
    forwards = in_units_of(full_forward(model, pairs), lambda: attribution_effects(model, pairs), repeats)[0]
    rows = [rank_agreement(estimate, exact, k) | dict(forwards=forwards) for k in (8, 16, 24)]
    show("Attribution patching against exact effects, layer x role", rows)
    return dict(atp=rows)


def memory(model, tokenizer, pairs, repeats):
    "Peaks under three budgets."
    rows = []
    for budget in (2**30, 2**27, 2**26):
        sweep = lambda: causal_effects(model, pairs, memory=budget)
        # buffers that the libraries set up in a first call and keep are not counted
        sweep()
        rows.append(
            dict(sweep="layers x s1, s2, end", budget_mib=budget / 2**20, peak_mib=peak_memory(sweep)[0] / 2**20)
        )
    show("Memory above the loaded model", rows)
    return dict(memory=rows)


PARTS = dict(costs=costs, errors=errors, prefilter=prefilter, memory=memory)


def main(*wanted):
    repeats = next((int(w) for w in wanted if w.isdigit()), 3)
    model, tokenizer = load_model(TEACHER)
    pairs = pairs_of_20(tokenizer)
    for name in [w for w in wanted if not w.isdigit()] or PARTS:
        save("sweep", PARTS[name](model, tokenizer, pairs, repeats), keep=True)


if __name__ == "__main__": main(*sys.argv[1:])
