"""Debiased CKA of all layer pairs against torch_cka, ckatorch and the Gram form: python tests/benchmarks/cka.py
[--envs FOLDER]

8 x 8 layers, d 576, n 512 and 2048 in fp32; CPU time in units of the 64 products X'Y, which run in between. Errors
against the Gram form in float64.
Then teacher and student, 30 x 10 layers on 4096 tokens: seconds and peak memory of `layer_cka`."""

import argparse, tempfile
from pathlib import Path
import torch
from cka_forms import features, gram_form, products
from common import cpu, in_units_of, peak_memory, save, show, with_student
from peers import ENVS, run_peer
from rcid.align import layer_cka
from rcid.align.cka import _feature_inner, _hsic, _ratio, naive_cka
from rcid.causal import Site, read
from safetensors.torch import save_file


def against_peers(envs):
    rows, notes, reference = [], [], {}
    for n in (512, 2048):
        xs, ys = features(n)
        reference[str(n)] = gram_form(xs, ys, torch.float64, centre=True)
        unit = lambda: products(xs, ys)
        def row(tool, f, out=None):
            cost, _, got = in_units_of(unit, f)
            rows.append(
                dict(
                    n=n,
                    tool=tool,
                    cost=cost,
                    error=float((got.double() - reference[str(n)]).abs().max()) if out is None else None,
                    measured_pairs=64,
                )
            )
        row("rcid", lambda: _ratio(*_hsic(xs, ys)))
        row("feature form", lambda: _feature_inner(xs, ys), False)
        row("Gram form, fp32", lambda: gram_form(xs, ys))
    with tempfile.TemporaryDirectory() as tmp:
        save_file(reference, f"{tmp}/reference.safetensors")
        got, note = run_peer(
            "peer_cka.py", "cka", ("torch-cka==0.21", "ckatorch==1.0.3"), tmp, f"{tmp}/cka.json", envs=envs
        )
    rows += got or []
    for r in rows:
        r["times_ours"] = r["cost"] / next(o["cost"] for o in rows if o["n"] == r["n"] and o["tool"] == "rcid")
    return sorted(rows, key=lambda r: r["n"]), [note] if note else []


def of_models():
    teacher, student, _ = with_student()
    # the first token of a row is left out: 4096 rows
    ids = torch.randint(100, 40_000, (64, 65), generator=torch.Generator().manual_seed(0))
    peak, (seconds, got) = peak_memory(lambda: cpu(lambda: layer_cka(teacher, student, [dict(input_ids=ids)])))
    some = ((0, 0), (12, 4), (29, 9))
    flat = lambda model, l: read(model, ids, [Site(l)])[Site(l)][:, 1:].flatten(0, 1)
    error = max(abs(float(got[a, b]) - naive_cka(flat(teacher, a), flat(student, b))) for a, b in some)
    n, layers = 4096, 40
    return dict(
        tokens=n,
        layers=[30, 10],
        seconds=seconds,
        peak_mib=peak / 2**20,
        features_mib=layers * n * 576 * 4 / 2**20,
        gram_matrices_mib=layers * n * n * 4 / 2**20,
        error=error,
        checked_pairs=len(some),
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--envs", default=ENVS)
    rows, notes = against_peers(parser.parse_args(argv).envs)
    for note in notes: print(note)
    show("Debiased CKA, 8 x 8 layers, d 576: CPU time in units of the 64 products X'Y", rows)
    models = of_models()
    show("layer_cka of teacher and student", [models])
    save("cka", dict(rows=rows, notes=notes, models=models))


if __name__ == "__main__": main()
