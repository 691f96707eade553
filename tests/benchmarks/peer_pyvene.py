"""pyvene: a vanilla intervention on a block's output, with the source's representations cached, or run again for
each site."""

import pyvene, torch
from peer import Job, measure, write

job = Job()
at = lambda layer: pyvene.IntervenableModel(
    pyvene.IntervenableConfig(
        [
            dict(
                layer=layer,
                component="block_output",
                unit="pos",
                max_number_of_units=1,
                intervention_type=pyvene.VanillaIntervention,
            )
        ]
    ),
    model=job.model,
)
models = [at(layer) for layer in range(job.model.config.num_hidden_layers)]


def start():
    out = job.model(job.corrupt, use_cache=False, output_hidden_states=True)
    return out.hidden_states, job.model(job.clean, use_cache=False).logits


def locations(position): return {"sources->base": ([[[p] for p in position.tolist()]],) * 2}


def cached(hidden, layer, position):
    if layer == len(models) - 1: return again(hidden, layer, position)     # hidden_states end with the normed one
    m = models[layer]
    value = hidden[layer + 1][job.row, position][:, None]
    return m(
        {"input_ids": job.clean, "use_cache": False},
        source_representations={m.sorted_keys[0]: value},
        unit_locations=locations(position),
    )[1].logits


def again(hidden, layer, position):
    return models[layer](
        {"input_ids": job.clean, "use_cache": False},
        [{"input_ids": job.corrupt, "use_cache": False}],
        locations(position),
    )[1].logits


write(
    job,
    "pyvene",
    [
        measure(job, "cached sources", start, cached),
        measure(job, "sources run again", start, again, max(job.stride, 6)),
    ],
)
