"""KV caches, RoPE, compression and reasoning data: goldens, identities, bad input."""
import itertools
import pytest
import torch
from conftest import ARCHS
from rcid.data.problems import load_reasoning
from rcid.data.reasoning_pairs import reasoning_rows
from rcid.data.reasoning import CUE, SEGMENTS, Problem, encode_problems, exact_match, extract_number, word_problems
from rcid.kv import (
    KVCache,
    Rope,
    answer_importance,
    compress_kv,
    dynamic_ntk_base,
    extract_kv,
    forward_kv,
    gather_kept,
    load_kv,
    ntk_base,
    positions_of,
    rope_of,
    rotate_keys,
    save_kv,
    unrotate_keys,
)
from rcid.models import load_model

SCALINGS = {
    "default": {},
    "linear": dict(factor=4.0),
    "dynamic": dict(factor=4.0),
    "yarn": dict(factor=4.0, original_max_position_embeddings=16),
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
}


def ids_of(model, *shape, seed=0):
    return torch.randint(5, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def scaled_model(kind, arch="qwen3"):
    "A random model with one kind of RoPE scaling, trained length 16 (yarn: stretched to 64)."
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            arch,
            vocab_size=200,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=64 if kind == "yarn" else 16,
            rope_parameters={"rope_type": kind, "rope_theta": 10_000.0, **SCALINGS[kind]},
        )
    ).eval()


def test_goldens_of_the_bases():
    assert round(ntk_base(10_000, 4, 64), 2) == 41829.37 and round(ntk_base(10_000, 4, 128), 2) == 40889.94
    assert round(dynamic_ntk_base(10_000, 4, 4096, 2048, 128), 2) == 51293.79


@pytest.mark.parametrize("kind", SCALINGS)
def test_pre_rope_keys_are_what_leaves_the_projection(kind):
    model, seen = scaled_model(kind), {}
    hooks = [
        l.self_attn.k_norm.register_forward_hook(lambda m, i, o, n=n: seen.__setitem__(n, o.transpose(1, 2)))
        for n, l in enumerate(model.model.layers)
    ]
    hooks += [
        l.self_attn.q_norm.register_forward_hook(lambda m, i, o, n=n: seen.__setitem__(("q", n), o.transpose(1, 2)))
        for n, l in enumerate(model.model.layers)
    ]
    ids, mask = ids_of(model, 2, 40), torch.ones(2, 40, dtype=torch.long)        # longer than the trained 16
    mask[1, :13] = 0                                                             # and padded on the left
    with torch.no_grad():
        turned, cache = extract_kv(model, ids, mask, queries=True), extract_kv(
            model, ids, mask, queries=True, pre_rope=True
        )
    for n in range(3):
        for got, want in ((cache.k[:, n], seen[n]), (cache.q[:, n], seen["q", n])):
            assert (got - want).transpose(1, 2)[mask.bool()].abs().max() <= 1e-5
    rope = rope_of(model)
    assert (rotate_keys(cache.k, rope, cache.positions) - turned.k).abs().max() <= 1e-5 and (
        cache.rotated(rope).q - turned.q
    ).abs().max() <= 1e-5
    assert (unrotate_keys(rotate_keys(cache.k, rope), rope) - cache.k).abs().max() <= 1e-5
    for h in hooks: h.remove()


@pytest.mark.parametrize("arch", ARCHS)
def test_cache_is_the_models_own(arch, models):
    model = models[arch]
    ids = ids_of(model, 2, 7)
    with torch.no_grad():
        hidden, cache = forward_kv(model, ids)
        past = model(ids, use_cache=True)
    assert torch.equal(cache.k, torch.stack([l.keys for l in past.past_key_values.layers], 1)) and torch.equal(
        cache.v, torch.stack([l.values for l in past.past_key_values.layers], 1)
    )
    assert torch.allclose(model.lm_head(hidden), past.logits, atol=1e-5)


@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("arch", ARCHS)
def test_padded_batch_equals_its_rows(arch, side, models):
    model, lengths = models[arch], (4, 9, 7)
    ids, mask = ids_of(model, 3, 9), torch.zeros(3, 9, dtype=torch.long)
    for i, n in enumerate(lengths): mask[i, slice(9 - n, None) if side == "left" else slice(n)] = 1
    with torch.no_grad(): batch = extract_kv(model, ids, mask, queries=True, pre_rope=True)
    for i in range(3):
        at = mask[i].bool()
        with torch.no_grad(): alone = extract_kv(model, ids[i:i+1, at], queries=True, pre_rope=True)
        for part in "kvq":
            assert (getattr(batch, part)[i][:, :, at] - getattr(alone, part)[0]).abs().max() < 1e-5 and (
                getattr(batch, part)[i][:, :, ~at] == 0
            ).all()
        assert torch.equal(batch.positions[i][at], alone.positions[0])


def test_gradients_reach_keys_values_and_queries(make_model):
    model = make_model("qwen3")
    cache = extract_kv(model, ids_of(model, 1, 6), queries=True, pre_rope=True)
    (cache.k.square().sum() + cache.v.square().sum() + cache.q.square().sum()).backward()
    for name in ("q_proj", "k_proj", "v_proj"):
        assert getattr(model.model.layers[0].self_attn, name).weight.grad.abs().sum() > 0


def test_bad_models_and_caches(make_model, tmp_path):
    model = make_model("llama")
    ids = ids_of(model, 1, 6)
    with torch.no_grad(): cache = extract_kv(model, ids)
    forward = model.model.forward
    model.model.forward = lambda use_cache, **kw: forward(use_cache=False, **kw)
    with pytest.raises(ValueError, match="llama model returned no key-value cache"): extract_kv(model, ids)
    model.model.forward = forward
    with torch.no_grad(): model.model.layers[1].self_attn.k_proj.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="keys of layer 1 hold NaN"): extract_kv(model, ids)
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(ValueError, match="returned no key-value cache"): extract_kv(model, ids)
    model = make_model("llama")
    with torch.no_grad(): model.model.layers[2].self_attn.v_proj.weight[0] = float("nan")
    with pytest.raises(ValueError, match="values of layer 2 hold NaN"): extract_kv(model, ids)
    with pytest.raises(ValueError, match="odd"): rotate_keys(torch.zeros(1, 1, 1, 2, 7), Rope(torch.ones(3)))
    with pytest.raises(ValueError, match="head_dim 15 is odd"): Rope.of_base(10_000, 15)
    with pytest.raises(ValueError, match="positions have shape"):
        rotate_keys(cache.k, rope_of(model), torch.arange(9)[None])
    with pytest.raises(ValueError, match="keys have head_dim 8"):
        unrotate_keys(torch.zeros(1, 1, 1, 2, 8), rope_of(model))
    with pytest.raises(ValueError, match="does not fit keys"): KVCache(cache.k, cache.v, torch.ones(1, 5))
    with pytest.raises(ValueError, match="must both be"): KVCache(cache.k[0], cache.v[0], torch.ones(4, 6))
    with pytest.raises(ValueError, match="queries .* do not fit"):
        KVCache(cache.k, cache.v, torch.ones(1, 6), q=cache.k[:, :, [0, 1, 0]])
    f = save_kv(cache, tmp_path/"c.safetensors")
    assert torch.equal(load_kv(f).k, cache.k)
    with pytest.raises(FileNotFoundError, match="no file"): load_kv(tmp_path/"other")
    whole = f.read_bytes()
    f.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="does not match its SHA-256"): load_kv(f)
    f.write_bytes(f.read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a whole file of tensors"): load_kv(f)


@pytest.fixture(scope="module")
def thought():
    "A cache of two rows of different length, with reasoning and answer masks."
    model, _ = load_model({"arch": "qwen3"}, dtype="float32", device="cpu")
    ids, mask, order = ids_of(model, 2, 24), torch.ones(2, 24, dtype=torch.long), torch.arange(24)
    mask[1, 17:] = 0
    with torch.no_grad(): cache = extract_kv(model, ids, mask, queries=True)
    return (
        cache,
        torch.stack([(order > 4) & (order < 18), (order > 2) & (order < 12)]),
        torch.stack([order > 17, (order > 11) & (order < 17)]),
    )


def slow_kava(cache, b, l, h, reasoning, answer, lam=0.1):
    candidates, group = reasoning[b].nonzero().flatten().tolist(), cache.q.shape[2]//cache.n_kv_heads
    k, importance = cache.k[b, l, h].double(), torch.zeros(len(candidates)).double()
    queries = [t for t in answer[b].nonzero().flatten().tolist() if cache.mask[b, t]]
    for t in queries:
        logits = (
            torch.stack(
                [
                    torch.stack([cache.q[b, l, h * group + g, t].double() @ k[j] for g in range(group)]).max()
                    for j in candidates
                ]
            )
            / cache.head_dim**0.5
        )
        importance += logits.softmax(0)/len(queries)
    c = torch.stack(
        [torch.stack([torch.cosine_similarity(k[i], k[j], 0) for j in candidates if j != i]).mean() for i in candidates]
    )
    score = lam*importance + (1 - lam)*(-c).softmax(0)
    return lambda budget: sorted(candidates[i] for i in score.argsort(descending=True)[:budget])


@pytest.mark.parametrize("budget", (1, 5, 11))
def test_kept_indices_equal_a_slow_loop(thought, budget):
    cache, reasoning, answer = thought
    kept = compress_kv(cache, budget, query_at=answer, key_at=reasoning)
    for b, l, h in itertools.product(range(2), range(4), range(2)):
        n = int(kept.cache.mask[b].sum())
        index = kept.index[b, l, h, :n].tolist()
        assert n == min(budget, int(reasoning[b].sum())) and index == slow_kava(cache, b, l, h, reasoning, answer)(
            budget
        ) == sorted(index)
        assert (
            torch.equal(kept.cache.v[b, l, h, :n], cache.v[b, l, h, index]) and (kept.cache.k[b, l, h, n:] == 0).all()
        )


@pytest.mark.parametrize("method", ("kava", "rkv", "crop", "random", "uniform"))
def test_every_method_keeps_ascending_candidates(thought, method):
    cache, reasoning, answer = thought
    kept = compress_kv(cache, 11, method, key_at=reasoning, query_at=answer)
    assert kept.cache.mask.sum(1).tolist() == [11, 9] and kept.cache.k.shape[3] == 11
    for b, n in enumerate((11, 9)):
        index = kept.index[b, :, :, :n]
        assert (index.diff(dim=-1) > 0).all() and reasoning[b][index].all()
    w = gather_kept(answer_importance(cache, answer, reasoning), kept)
    assert torch.allclose(w.sum(-1), torch.ones(2, 4, 2)) and torch.allclose(
        gather_kept(torch.ones(2, 24), kept),
        (kept.cache.mask / kept.cache.mask.sum(1, keepdim=True))[:, None, None].expand(2, 4, 2, 11),
    )


def test_decoding_keeps_its_window_and_equals_the_formula(thought):
    cache, *_ = thought
    budget, window, lam = 8, 4, 0.1
    kept = compress_kv(cache, budget, "rkv", window=window, pool=3, threshold=0.3)
    for b, n in enumerate((24, 17)):
        for l, h in itertools.product(range(4), range(2)):
            k, q = cache.k[b, l, h, :n], cache.q[b, l, 2*h:2*h + 2, n - window:n]
            a = (q @ k.T).amax(0)[:, :n - window].div(cache.head_dim**0.5).softmax(-1).mean(0)
            a = torch.stack([a[max(0, i - 1):i + 2].max() for i in range(n - window)])
            cos = torch.nn.functional.normalize(k, dim=-1) @ torch.nn.functional.normalize(k, dim=-1).T
            cos.fill_diagonal_(0)
            for i in range(n):
                if (alike := (cos[i] > 0.3).nonzero()).numel(): cos[i, alike[-1]] = 0
            score = lam*a - (1 - lam)*cos.mean(0).softmax(0)[:n - window]
            assert kept.index[b, l, h].tolist() == sorted(score.topk(budget - window).indices.tolist()) + list(
                range(n - window, n)
            )


def test_rkv_judges_the_reasoning_as_if_it_were_the_whole_text(thought):
    cache, reasoning, _ = thought
    kept = compress_kv(cache, 6, "rkv", key_at=reasoning, window=3, pool=3)
    for b in range(2):
        at = reasoning[b].nonzero()[:, 0]
        q = cache.q[b:b + 1, :, :, at]
        alone = KVCache(cache.k[b:b + 1, :, :, at], cache.v[b:b + 1, :, :, at], torch.ones(1, len(at)), q=q)
        index = compress_kv(alone, 6, "rkv", window=3, pool=3).index[0]
        assert kept.index[b].tolist() == at[index].tolist() and (kept.index[b][..., -3:] == at[-3:]).all()
    # the paper's window of 8, or half of a budget that is too small for it
    assert torch.equal(compress_kv(cache, 6, "rkv", key_at=reasoning, pool=3).index, kept.index)


@pytest.mark.parametrize("wrong, message", [
    (dict(budget=0), "budget 0"),
    (dict(method="best"), "unknown compression"),
    (dict(query_at=None), "needs query_at"),
    (dict(per="token"), "unknown per"),
    (dict(crop="middle"), "unknown crop"),
    (dict(method="rkv", budget=1), "does not exceed the window"),
    (dict(method="rkv", window=4), "does not exceed the window"),
    (dict(method="rkv", budget=20, window=15), "no tokens before its window of 15"),
    (dict(method="rkv", pool=4), "must be odd")])
def test_bad_arguments_of_compression(thought, wrong, message):
    cache, reasoning, answer = thought
    with pytest.raises(ValueError, match=message):
        compress_kv(cache, **dict(budget=4, query_at=answer, key_at=reasoning) | wrong)


def test_bad_compression(thought):
    cache, reasoning, answer = thought
    with pytest.raises(ValueError, match="row 0 has no candidate"):
        compress_kv(cache, 2, query_at=answer, key_at=reasoning & False)
    with pytest.raises(ValueError, match="in row 0 no query"):
        compress_kv(cache, 2, query_at=reasoning & False, key_at=reasoning)
    with pytest.raises(ValueError, match="needs queries"):
        compress_kv(KVCache(cache.k, cache.v, cache.mask), 2, query_at=answer)
    with pytest.raises(TypeError, match="belong to method 'rkv'"): compress_kv(cache, 4, "crop", window=3)


def test_positions_count_from_the_first_token():
    assert positions_of(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]).bool()).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]


@pytest.mark.parametrize("arch", ARCHS)
def test_segments_are_the_text(arch, tokenizers):
    tokenizer, problems = tokenizers[arch], load_reasoning(n=30)
    data = encode_problems(problems, tokenizer)
    assert torch.equal(torch.stack([data.at(s) for s in SEGMENTS]).sum(0), data.attention_mask)
    for i, p in enumerate(problems):
        text = lambda s: tokenizer.decode(data.input_ids[i][data.at(s)[i]], skip_special_tokens=True).strip()
        assert (text("reasoning"), text("answer")) == (p.reasoning, f"{CUE} {p.value}") and data.segments[
            i, 2
        ] < data.cue_pos[i] < data.segments[i, 3] - 1


def test_bad_reasoning(tokenizers, monkeypatch):
    p = next(word_problems())
    with pytest.raises(ValueError, match="longer than the sequence"):
        encode_problems([p], tokenizers["qwen3"], max_length=8)
    with pytest.raises(ValueError, match="is empty"): encode_problems([p._replace(reasoning=" ")], tokenizers["qwen3"])
    with pytest.raises(ValueError, match="style 'words': use equation or tape"):
        next(reasoning_rows(tokenizers["qwen3"], style="words"))
    monkeypatch.setenv("RCID_DATA_DIR", "nowhere")
    for name in ("gsm8k", "svamp"):
        with pytest.raises(FileNotFoundError, match="no folder"): load_reasoning(name, source="path")
    monkeypatch.delenv("RCID_DATA_DIR")
    with pytest.raises(FileNotFoundError, match="RCID_DATA_DIR"): load_reasoning("gsm8k", source="path")


def test_numbers():
    assert exact_match([Problem("q", "r", "8").text, "I have 3", "none"], ["8.00", "4", "1"]) == pytest.approx(1/3)
    assert [extract_number(t) for t in ("#### 1,200", "12-5 = 7", "$3.50", "answer is -4.", "")] == [
        "1200",
        "7",
        "3.5",
        "-4",
        None,
    ]
