"""What is measured of a model whose layers are on two devices: the numbers of one device, and the model as it was."""
import copy
from dataclasses import replace
from itertools import islice
from tempfile import TemporaryDirectory
import torch
from torch import nn
from every_method import pair_world
from rcid.align import layer_cka
from rcid.causal import Site, causal_effects, mediation, read, score_sites
from rcid.causal.effects import all_parts, answer_logit_diff, hooked_effects, naive_effects
from rcid.causal.sites import integrated_effects
from rcid.data import load_pairs
from rcid.data.holdout import styled_problems
from rcid.data.reasoning import encode_problems, word_problems
from rcid.distill import DistillConfig, distill
from rcid.distill.patch_targets import patched_finals
from rcid.distill.teacher_cache import SignalRequest, model_hash, teacher_targets
from rcid.eval import compare, perplexity, task_accuracy
from rcid.eval.decode import greedy_decode
from rcid.eval.knockout import knock_out
from rcid.kv import KV_METHODS, LatentModel, forward_kv
from rcid.kv.recording import Teacher, load_recording, record_teacher
from rcid.models import get_adapter, load_model, save_model, shrink, train_tokenizer
from rcid.models.spread import spread
from rcid.models.weights import weights_of

NEAR = 1e-5
SIZES = dict(layers=4, d_model=32, heads=4, kv_heads=2, head_dim=8, d_mlp=48)
# where the first half is, and the rest; accelerate fetches what is on the CPU, and computes on the device
PLACES = dict(qwen3=("fakegpu:0", "fakegpu:1"), llama=("fakegpu:1", "fakegpu:0"), qwen2=("cpu", "fakegpu:1"))


def devices(first: str, rest: str, tied: bool) -> dict[str, str]:
    "A device for every part; the rotary embedding is with the last layers, as accelerate places it."
    parts = {"model.embed_tokens": first, "lm_head": first if tied else rest, "model.norm": rest}
    return parts | {"model.rotary_emb": rest} | {f"model.layers.{l}": first if l < 2 else rest for l in range(4)}


def untied(model: nn.Module) -> nn.Module:
    "The model with a head of its own, which may lie on another device than the embeddings."
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 1.5)
    return model


def as_it_is(model: nn.Module) -> list:
    "Where every weight is, the mode, and the hooks of every part."
    parts = [(name, m.training, len(m._forward_hooks), len(m._forward_pre_hooks), id(getattr(m, "_hf_hook", None)))
             for name, m in model.named_modules()]
    return parts + [(name, str(p.device), p.requires_grad, p.grad is None) for name, p in model.named_parameters()]


def measurements(model: nn.Module, pairs, more: tuple):
    "(name, function) of everything that is asked of a teacher."
    ids = pairs.clean_ids[:2]
    at_home, ones = ids.to(get_adapter(model).home), torch.ones_like(ids).to(get_adapter(model).home)
    sites = (Site(0, "s2"), Site(2, "end"))
    everywhere = SignalRequest(corrupt=True, layers=(0, 3), everywhere=True)
    at_answers = SignalRequest(corrupt=True, sites=sites, swaps=(Site(1, "s2"),))
    runs = torch.tensor([[0, 0], [0, 1], [1, 0]])
    def heads(): return causal_effects(model, pairs[:2], all_parts(model, pairs[:2], "head"))
    def mlps(): return causal_effects(model, pairs[:2], all_parts(model, pairs[:2], "mlp"))
    def shares(): return list(mediation(model, pairs).effects.values())
    def differences(): return answer_logit_diff(model, pairs)
    def accuracy(): return [v for v in task_accuracy(model, pairs).values() if not isinstance(v, list)]
    def residuals(): return list(read(model, at_home, [Site(0, 3), Site(3, 3), Site(2)]).values())
    def keys():
        final, cache = forward_kv(model, at_home, ones, queries=True, pre_rope=True)
        return final, cache.k, cache.v, cache.q
    def targets(): return list(teacher_targets(model, pairs, at_answers).values())
    def all_targets(): return list(teacher_targets(model, pairs, everywhere).values())
    def latent(): return LatentModel(model, int(ids[0, 5]), 2)(at_home).logits.detach()
    def text(): return greedy_decode(model, at_home, ones, 4)
    def alike(): return compare(model, model, more[0], train=more[1], batch_size=8, interchange_pairs=4).route.distance
    yield "effects", lambda: causal_effects(model, pairs)
    yield "effects, denoising", lambda: causal_effects(model, pairs, sites, mode="denoising")
    yield "effects of heads", heads
    yield "effects of MLPs", mlps
    yield "effects by hooks", lambda: hooked_effects(model, pairs, sites)
    yield "effects, naive", lambda: naive_effects(model, pairs, sites)
    yield "mediation", shares
    yield "logit differences", differences
    yield "attribution", lambda: score_sites(model, pairs, "atp")
    yield "integrated gradients", lambda: integrated_effects(model, pairs)
    yield "differences of residuals", lambda: score_sites(model, pairs, "norm")
    yield "accuracy", accuracy
    yield "knock-out", lambda: knock_out(model, pairs, 3, "end")
    yield "perplexity", lambda: perplexity(model, ids.flatten(), window=16, stride=8)
    yield "greedy text", text
    yield "CKA", lambda: layer_cka(model, model, [dict(input_ids=ids)])
    yield "residuals", residuals
    yield "keys, values, queries", keys
    yield "targets", targets
    yield "targets at all tokens", all_targets
    yield "patched targets", lambda: patched_finals(model, pairs, sites, runs)
    yield "latent places", latent
    yield "a student cut out", lambda: shrink(model, [0, 3])(input_ids=at_home).logits.detach()
    if get_adapter(model).family == "qwen3": yield "comparison", alike     # the dearest: once


def numbers(said) -> torch.Tensor:
    "All numbers of an answer in a row; what is undefined counts as 0."
    if isinstance(said, torch.Tensor): return said.detach().cpu().double().flatten().nan_to_num()
    if isinstance(said, (list, tuple)): return torch.cat([numbers(x) for x in said])
    return torch.tensor([said], dtype=torch.float64).nan_to_num()


def same(where: str, one, two):
    one, two = numbers(one), numbers(two)
    if len(one) != len(two) or not len(one): raise SystemExit(f"{where}: {len(two)} numbers, on one device {len(one)}")
    far = float((one - two).abs().div(one.abs().clamp_min(1)).max())
    if not far <= NEAR: raise SystemExit(f"{where}: off by {far} from one device")


def taught(teacher: nn.Module, pairs, method: str, device: str) -> list[float]:
    "The learning curve of a student on the device of its teacher's embeddings."
    sites, layers = (Site(1, "s2"), Site(2, "end")), {0: 0, 1: 0, 2: 1, 3: 1}
    config = DistillConfig(sites=sites, layer_map=layers, steps=2, batch=6, lr=1e-3, log_every=1, seed=0)
    student = shrink(teacher, [0, 3])
    assert {str(p.device) for p in student.parameters()} == {device}
    return [v for row in distill(student, teacher, pairs, method, config).history for v in row.values()]


def thinking(teacher: nn.Module, tokenizer, data, device: str) -> list[float]:
    "The same of a student that thinks in latent places, taught by keys, values and hidden states."
    sizes = dict(layers=2, d_model=32, heads=4, kv_heads=2, head_dim=8, d_mlp=48, seed=2)
    student, _ = load_model(dict(arch="llama", vocab=len(tokenizer)) | sizes, dtype="float32", device=device)
    method = replace(KV_METHODS["kava"], fit_steps=2, latents=3)
    config = DistillConfig(steps=2, batch=4, lr=1e-3, log_every=1, seed=0)
    student = LatentModel(student, tokenizer.bos_token_id, 2)
    return [v for row in distill(student, teacher, data, method, config).history for v in row.values()]


def check(arch: str, first: str, rest: str, tokenizer, pairs, more: tuple, problems: tuple):
    model, _ = load_model(dict(arch=arch, vocab=len(tokenizer)) | SIZES, dtype="float32", device="cpu")
    if arch == "llama": model = untied(model)
    away = spread(copy.deepcopy(model), devices(first, rest, tied=arch != "llama"))
    home = rest if first == "cpu" else first
    assert [str(d) for d in get_adapter(away).devices] == [home, home, rest, rest]
    before, few = as_it_is(away), pairs[:6]
    for (name, one), (_, two) in zip(measurements(model, few, more), measurements(away, few, more), strict=True):
        same(f"{name} of {arch} on {first} and {rest}", one(), two())
    for method in ("rcid",) if first == "cpu" else ("rcid", "interchange", "fitnets"):
        curves = taught(model, pairs, method, "cpu"), taught(away, pairs, method, home)
        same(f"{method} of {arch} on {first} and {rest}", *curves)
    if arch == "qwen3": refused(model, first, rest)
    if arch == "llama": speaking(arch, first, rest, *problems)
    assert as_it_is(away) == before and model_hash(away) == model_hash(model)
    on_disk(model, tokenizer, away, {part: str(d) for part, d in away.hf_device_map.items()})


def speaking(arch: str, first: str, rest: str, words, data):
    "A teacher of problems in words, on two devices."
    model, _ = load_model(dict(arch=arch, vocab=len(words)) | SIZES, dtype="float32", device="cpu")
    away = spread(copy.deepcopy(model), devices(first, rest, tied=True))
    curves = thinking(model, words, data, "cpu"), thinking(away, words, data, first)
    same(f"kava of {arch} on {first} and {rest}", *curves)


def refused(model: nn.Module, first: str, rest: str):
    "Embeddings and head that are one weight, on two devices."
    try: spread(copy.deepcopy(model), devices(first, rest, tied=False))
    except ValueError as e: assert "the LM head is the embedding of this model" in str(e), e
    else: raise SystemExit("one weight on two devices was not refused")


def on_disk(model: nn.Module, tokenizer, away: nn.Module, places: dict[str, str]):
    "A model on two devices is saved whole; it is loaded, and asked what a recording asks, on two devices."
    with TemporaryDirectory() as folder:
        offloaded = any(p.is_meta for p in away.parameters())              # transformers cannot save one that is tied
        save_model(model if offloaded else away, tokenizer, f"{folder}/m")
        one, two = (load_model(f"{folder}/m", dtype="float32", device=device)[0] for device in ("cpu", places))
        problems = styled_problems(n=12, steps=(1,), operations="+-", largest=20)
        said, teacher = [], Teacher(name="t", folder=f"{folder}/m")
        for i, device in enumerate(("cpu", places)):
            kept = record_teacher(teacher, problems, f"{folder}/{i}", device=device)
            said.append(load_recording(teacher, kept, tokenizer).cache)
    assert model_hash(one) == model_hash(two)
    same("weights that were saved", *([value for _, value in weights_of(m)] for m in (model, two)))
    assert get_adapter(two).devices == get_adapter(away).devices
    same("a recording", *([c.k, c.v, c.q] for c in said))


def main():
    torch.set_num_threads(1)
    tokenizer, pairs = pair_world()
    more = tuple(load_pairs("ioi", tokenizer, split=split, n=24) for split in ("test", "train"))
    some = list(islice(word_problems("train", style="equation", steps=(2,), operations="+-", largest=9), 36))
    words = train_tokenizer([p.text for p in some], vocab=300)
    problems = words, encode_problems(some, words)
    for arch, (first, rest) in PLACES.items(): check(arch, first, rest, tokenizer, pairs, more, problems)
    print(f"a model on {' or '.join(' and '.join(both) for both in PLACES.values())}: as on one device")


if __name__ == "__main__": main()
