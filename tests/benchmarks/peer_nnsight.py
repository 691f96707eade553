"""nnsight: residuals of both sides saved in one trace each, then a trace for each site; and the same with the layers
before the site skipped."""

import torch
from nnsight import NNsight
from peer import Job, measure, write

job = Job()
model = NNsight(job.model)
layers = model.model.layers


def residuals(ids):
    with torch.no_grad(), model.trace(ids, use_cache=False):
        hidden = list().save()
        for layer in layers: hidden.append(layer.output)
        logits = model.output.logits.save()
    return hidden, logits


def start():
    clean, base = residuals(job.clean)
    return (clean, residuals(job.corrupt)[0]), base


def patch(state, layer, position):
    value = state[1][layer][job.row, position]
    with model.trace(job.clean, use_cache=False):
        h = layers[layer].output.clone()
        h[job.row, position] = value
        layers[layer].output = h
        logits = model.output.logits.save()
    return logits


def skip(state, layer, position):
    h = state[0][layer].clone()
    h[job.row, position] = state[1][layer][job.row, position]
    with model.trace(job.clean, use_cache=False):
        for before in range(layer + 1): layers[before].skip(h)
        logits = model.output.logits.save()
    return logits


write(job, "nnsight", [measure(job, "trace", start, patch), measure(job, "trace, earlier layers skipped", start, skip)])
