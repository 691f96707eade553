"""TransformerLens: `run_with_cache` once on either side, then `run_with_hooks` for each site."""
import torch
from peer import Job, measure, write
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer

job = Job()
lens = TransformerBridge.boot_transformers(
    job.path,
    hf_model=type(job.model).from_pretrained(job.path, dtype=torch.float32),
    tokenizer=AutoTokenizer.from_pretrained(job.path),
    device="cpu",
)
name = lambda layer: f"blocks.{layer}.hook_resid_post"


def start():
    only = lambda n: n.endswith("hook_resid_post")
    base, _ = lens.run_with_cache(job.clean, names_filter=only)
    return lens.run_with_cache(job.corrupt, names_filter=only)[1], base


def patch(cache, layer, position):
    def hook(h, hook):
        h = h.clone()
        h[job.row, position] = cache[name(layer)][job.row, position]
        return h
    return lens.run_with_hooks(job.clean, fwd_hooks=[(name(layer), hook)])


write(job, "transformer-lens", [measure(job, "run_with_hooks", start, patch)])
