"""Every method of both trainers for two steps on the CPU and on the fake device: the same curves; one in bfloat16."""
from dataclasses import replace
from itertools import islice
import torch
from rcid.causal import Site
from rcid.core import embedded
from rcid.data import load_pairs
from rcid.data.reasoning import encode_problems, word_problems
from rcid.distill import METHODS, DistillConfig, distill
from rcid.eval.handmade import counting_model
from rcid.kv import KV_METHODS, LatentModel
from rcid.models import load_model, shrink, train_tokenizer

DEVICES = ("cpu", "fakegpu")
NEAR = 1e-5


def pair_world():
    texts = [f" {n}" for n in embedded("names")["first_names"]] * 3 + [t["text"] for t in embedded("ioi")["templates"]]
    tokenizer = train_tokenizer(texts, vocab=1500)
    return tokenizer, load_pairs("ioi", tokenizer, split="train", n=24)


def on_pairs(name: str, device: str, tokenizer, pairs, **more) -> list[dict]:
    "The learning curve of a student of four layers of its teacher's six."
    if name == "effect_match": teacher = counting_model(tokenizer, {3: .6, 4: .4}).to(device)     # it wants a gap
    else:
        sizes = dict(layers=6, d_model=32, heads=4, kv_heads=2, head_dim=8, d_mlp=48)
        teacher, _ = load_model(dict(arch="qwen3", vocab=len(tokenizer)) | sizes, dtype="float32", device=device)
    sites, layers = (Site(1, "s2"), Site(3, "end"), Site(4, "end")), {0: 0, 1: 0, 2: 1, 3: 1, 4: 2, 5: 3}
    config = DistillConfig(sites=sites, layer_map=layers, steps=2, batch=6, lr=1e-3, log_every=1, seed=0, **more)
    return distill(shrink(teacher, [0, 3, 4, 5]), teacher, pairs, name, config).history


def on_problems(name: str, device: str, tokenizer, data) -> list[dict]:
    "The same of a student that thinks in latent places."
    sizes = dict(vocab=len(tokenizer), d_mlp=48, d_model=32, heads=4)
    teacher, _ = load_model(
        dict(arch="qwen3", layers=3, kv_heads=4, head_dim=16, seed=1) | sizes, dtype="float32", device=device
    )
    student, _ = load_model(
        dict(arch="llama", layers=2, kv_heads=2, head_dim=8, seed=2) | sizes, dtype="float32", device=device
    )
    method = replace(KV_METHODS[name], fit_steps=2, latents=3)
    config = DistillConfig(steps=2, batch=4, lr=1e-3, log_every=1, seed=0)
    return distill(LatentModel(student, tokenizer.bos_token_id, 2), teacher, data, method, config).history


def check(name: str, make, *world):
    curves = []
    for device in DEVICES:
        try: curves.append(make(name, device, *world))
        except Exception as e: raise SystemExit(f"{name} on {device}: {type(e).__name__}: {e}") from e
    for cpu, fake in zip(*curves, strict=True):
        for key, value in cpu.items():
            if not abs(value - fake[key]) <= NEAR * max(1, abs(value)):
                where = f"{name}: {key} at step {cpu['step']}"
                raise SystemExit(f"{where} is {value} on the CPU, {fake[key]} on the device")


def main():
    torch.set_num_threads(1)
    tokenizer, pairs = pair_world()
    for name in METHODS: check(name, on_pairs, tokenizer, pairs)
    problems = list(islice(word_problems("train", style="equation", steps=(2,), operations="+-", largest=9), 36))
    words = train_tokenizer([p.text for p in problems], vocab=300)
    for name in KV_METHODS: check(name, on_problems, words, encode_problems(problems, words))
    plain, mixed = (on_pairs("rcid_m", "fakegpu", tokenizer, pairs, bf16=bf16)[-1]["loss"] for bf16 in (False, True))
    assert 0 < abs(mixed - plain) < .05 * plain, f"bfloat16 on the device: loss {mixed}, in float32 {plain}"
    print(f"{len(METHODS)} + {len(KV_METHODS)} methods, and one in bfloat16")


if __name__ == "__main__": main()
