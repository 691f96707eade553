"""All benchmarks, one after the other, each in its own process: python tests/benchmarks/run.py [sweep] [peers]
[step] [prices] [cka] [startup]

Prints every table, then a summary, and writes results.json beside this file; a part that is named alone replaces
only its own numbers there. One thread unless OMP_NUM_THREADS says otherwise. About forty minutes of CPU time; peers
need the package index once.
"""

import json, os, subprocess, sys
from common import HERE, RESULTS, show

PARTS = ("sweep", "peers", "step", "prices", "cka", "startup")


def summary(results):
    "One row for every figure that this project is judged by."
    rows = [
        dict(what=f"sweep: {r['model']}, {r['sweep']}", unit="forwards", here=r["forwards"], floor=r["floor"])
        for r in results.get("sweep", {}).get("rows", [])
    ]
    rows += [
        dict(
            what=f"sweep: {r['tool']}, {r['variant']}",
            unit="forwards",
            here=r["forwards"],
            floor=results["peers"]["floor"] if r["variant"] != "exact zeros left out" else None,
        )
        for r in results.get("peers", {}).get("rows", [])
    ]
    rows += [
        dict(what=f"step, KL at {r['kl_at']}: {r['step']}", unit="plain steps", here=r["cost"], floor=r.get("floor"))
        for r in results.get("step", {}).get("rows", [])
    ]
    rows += [
        dict(what=f"step on two kinds: {r['method']}", unit="steps of KL on pairs", here=r["price"])
        for r in results.get("prices", {}).get("rows", [])
    ]
    rows += [
        dict(what=f"CKA, n = {r['n']}: {r['tool']}", unit="products X'Y", here=r["cost"], error=r["error"])
        for r in results.get("cka", {}).get("rows", [])
    ]
    rows += [
        dict(what=f"start: {r['notebook']} notebook", unit="s", here=r["cpu_seconds"])
        for r in results.get("startup", {}).get("rows", [])
    ]
    return rows


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    wanted = sys.argv[1:] or PARTS
    if set(wanted) - set(PARTS):
        sys.exit(f"unknown benchmark {sorted(set(wanted) - set(PARTS))}: there are {', '.join(PARTS)}")
    failed = [p for p in wanted if subprocess.run([sys.executable, "-W", "ignore", str(HERE/f"{p}.py")]).returncode]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    show("Summary", summary(results))
    for note in (n for r in results.values() for n in r.get("notes", [])): print(note)
    if failed: sys.exit(f"failed: {', '.join(failed)}")
