"""What every peer does: the sweep, one site after another, between plain forwards of the same model in the same
process.

peers.py runs a peer_*.py in its own environment: python peer_NAME.py JOB_FOLDER OUT.json STRIDE"""

import json, sys
from importlib.metadata import version
import torch, transformers
from common import cpu
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


class Job:
    "The pairs, our effects, and the unmodified model."
    def __init__(self):
        folder, self.out, stride = sys.argv[1:]
        self.stride, t = int(stride), load_file(f"{folder}/pairs.safetensors")
        self.clean, self.corrupt, self.last, self.correct, self.wrong, self.position, self.effects = (
            t[k] for k in ("clean_ids", "corrupt_ids", "answer_pos", "correct", "wrong", "position", "effects")
        )
        self.path = json.loads(open(f"{folder}/job.json").read())["model"]
        self.model = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()
        self.row = torch.arange(len(self.clean))

    def ld(self, logits):
        "Logit difference at the answer, from the logits of all positions."
        at = logits[self.row, self.last]
        return at[self.row, self.correct] - at[self.row, self.wrong]


@torch.no_grad()
def measure(job, name, start, patch, stride=None):
    """Cost of `start` (the runs done once) and of `patch` at every `stride`-th of the layers x roles, in forwards; and
    the difference from our effects."""
    roles, stride = job.position.shape[1], stride or job.stride
    sites = range(stride // 2, job.effects.shape[1], stride)
    forward = lambda: job.model(job.clean, use_cache=False).logits
    forward()
    once, (state, base) = cpu(start)
    unit, spent, ratios, error = cpu(forward)[0], 0., [], 0.
    first = unit
    for n, site in enumerate(sites):
        layer, role = divmod(site, roles)
        seconds, logits = cpu(lambda: patch(state, layer, job.position[:, role]))
        spent += seconds
        error = max(error, float((job.ld(base) - job.ld(logits) - job.effects[:, site]).abs().max()))
        # a plain forward before and after every five sites
        if n % 5 == 4 or site == sites[-1]:
            after = cpu(forward)[0]
            ratios.append((spent / ((unit + after) / 2), n + 1 - sum(k for _, k in ratios)))
            unit, spent = after, 0.
    per_site = sum(r for r, _ in ratios) / len(sites)
    print(f"{name}: {per_site:.3f} forwards a site, difference {error:.1e}", flush=True)
    return dict(
        variant=name,
        once=once / first,
        per_site=per_site,
        measured_sites=len(sites),
        sites=job.effects.shape[1],
        forwards=once / first + per_site * job.effects.shape[1],
        difference=error,
    )


def write(job, package, rows):
    json.dump(
        [
            dict(
                tool=f"{package} {version(package)}",
                transformers=transformers.__version__,
                torch=torch.__version__,
                **r,
            )
            for r in rows
        ],
        open(job.out, "w"),
    )
