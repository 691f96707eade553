"""What the benchmarks share: CPU time, memory, the models and pairs, and results.json. Peers import it too, in
environments without rcid."""

import ctypes, json, os, platform, random, statistics, time
from pathlib import Path
import torch

HERE = Path(__file__).resolve().parent
RESULTS = HERE/"results.json"
TEACHER = "artifacts/models/llama/teacher"
SHAPE = dict(layers=30, d_model=576, heads=9, kv_heads=3, head_dim=64, d_mlp=1536, vocab=49152)   # SmolLM2-135M's
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def cpu(f):
    "CPU seconds of this process, and the value."
    start = time.process_time()
    out = f()
    return time.process_time() - start, out


def in_units_of(unit, f, repeats=3):
    """CPU time of `f` in units of `unit`, which runs before and after every repeat: median, least, and the last value
    of `f`."""
    ratios, after = [], cpu(unit)[0]
    for _ in range(repeats):
        before = min(after, cpu(unit)[0])
        spent, out = cpu(f)
        after = cpu(unit)[0]
        ratios.append(spent / ((before + after) / 2))
    return statistics.median(ratios), min(ratios), out


def peak_memory(f):
    "Bytes above the resident size at the start, at the worst moment of `f` (Linux); and the value."
    status = lambda key: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) * 1024
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    # the high-water mark starts again
    with open("/proc/self/clear_refs", "w") as handle: handle.write("5")
    before = status("VmRSS")
    out = f()
    return status("VmHWM") - before, out


def with_student():
    """Teacher, a fresh copy of ten of its layers (what weights a step moves does not change what it costs), and the
    tokenizer."""
    from rcid.models import load_model, shrink
    teacher, tokenizer = load_model(TEACHER)
    return teacher, shrink(teacher, 10), tokenizer


def full_forward(model, pairs):
    "The unit: one plain forward of the clean prompts, with the logits of every token."
    def run():
        with torch.no_grad(): return model(pairs.clean_ids, attention_mask=pairs.attention_mask, use_cache=False).logits
    return run


def pairs_of_20(tokenizer, n=32, split="test", seed=0):
    "IOI pairs of exactly 20 tokens."
    from rcid.core import embedded
    from rcid.data import Row, build_pairs, names_of
    rng, names, table = random.Random(seed), names_of(tokenizer, split), embedded("ioi")
    def rows():
        while True:
            io, s = rng.sample(names, 2)
            place, thing, first = rng.choice(table["places"]), rng.choice(table["objects"]), rng.random() < 0.5
            a, b = (io, s) if first else (s, io)
            start, middle, rest = (
                f"Then, {a} and {b} had a long argument at the {place}, and afterwards ",
                "",
                f" gave a {thing} to",
            )
            if len(tokenizer(start + s + rest)["input_ids"]) != 20: continue
            span = lambda at, word: (at, at + len(word))
            s1 = start.index(f" {s} ") + 1
            yield Row(
                start + s + rest,
                start + io + rest,
                f" {io}",
                f" {s}",
                {"s1": span(s1, s), "s2": span(len(start), s)},
                ("s2",),
                0,
                (names.index(io), names.index(s)),
            )
    return build_pairs(rows(), tokenizer, n=n, task="ioi")


def machine():
    "Where the numbers come from."
    import transformers
    name = next(
        (l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), platform.processor()
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return dict(
        cpu=name,
        system=f"{platform.system()} {platform.machine()}",
        cores=os.cpu_count(),
        memory_gib=memory,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        python=platform.python_version(),
    )


def save(part, data, keep=False):
    """Puts one benchmark's numbers into results.json, with the machine they come from; `keep`: beside those it has
    already."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[part] = (results.get(part, {}) if keep else {}) | data | {"machine": machine()}
    short = lambda x: (
        float(f"{x:.4g}")
        if isinstance(x, float)
        else (
            {k: short(v) for k, v in x.items()}
            if isinstance(x, dict)
            else [short(v) for v in x] if isinstance(x, list) else x
        )
    )
    RESULTS.write_text(json.dumps(short(results), indent=1, sort_keys=True) + "\n")


def show(title, rows):
    "Prints rows of one kind as a table."
    if not rows: return
    cell = lambda v: f"{v:.3g}" if isinstance(v, float) else "" if v is None else str(v)
    columns = list(dict.fromkeys(k for r in rows for k in r))
    width = {c: max(len(c), *(len(cell(r.get(c))) for r in rows)) for c in columns}
    print(f"\n{title}\n" + "  ".join(c.ljust(width[c]) for c in columns))
    for r in rows: print("  ".join(cell(r.get(c)).ljust(width[c]) for c in columns))
    print(flush=True)
