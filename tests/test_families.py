"""Every family of models: what its adapter says is what the model does: logits, sweep, and what is made of the model.
All models are random, three layers wide 32, and drawn so that caps, windows and multipliers matter."""
import copy, re, warnings
from dataclasses import replace
import pytest, torch
from rcid.causal import PartSite, Site, all_parts, all_sites, answer_logit_diff, causal_effects, hooked_effects
from rcid.causal import naive_effects, read, write
from rcid.causal.effects import run_logit_diff, why_not_restarted
from rcid.data.pairs import ContrastiveDataset
from rcid.distill import DistillConfig, distill
from rcid.distill.restart import exchanged, exchanged_by_hooks, kept_run
from rcid.distill.teacher_cache import SignalRequest, hidden_signals
from rcid.distill.trainer import plain_distill
from rcid.eval.accuracy import answer_logits
from rcid.eval.decode import greedy_decode
from rcid.kv import LatentModel, extract_kv, rope_of
from rcid.models import byte_tokenizer, get_adapter, load_model, save_model, shrink
from rcid.models.families import FAMILIES, Family
from rcid.models.rewrite import SAME, identity_blocks, logits_differ, permuted_heads, rotated
from test_causal import LiveBytes
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB, LAYERS = 300, 3
SIZES = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
    initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=0, max_position_embeddings=64,
)
GROUPED = dict(num_key_value_heads=2)
GEMMA = dict(head_dim=12, query_pre_attn_scalar=6, sliding_window=5, final_logit_softcapping=0.7)
TURNED = [1, 0, 1]
# case -> (model_type, what differs from SIZES)
CASES = {
    "llama": ("llama", dict(GROUPED, head_dim=12)),
    "llama3": ("llama", dict(GROUPED, rope_parameters=dict(
        rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16,
    ))),
    "qwen2.5": ("qwen2", GROUPED),
    "qwen2 windows": ("qwen2", dict(GROUPED, use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen3": ("qwen3", dict(GROUPED, head_dim=12)),
    "qwen3_moe": ("qwen3_moe", dict(
        GROUPED, head_dim=12, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[1],
    )),
    "mistral": ("mistral", dict(GROUPED, sliding_window=5)),
    "mistral whole": ("mistral", dict(GROUPED, head_dim=12, sliding_window=None)),
    "phi3": ("phi3", dict(GROUPED, sliding_window=5, rope_parameters=dict(
        rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5,
    ))),
    "smollm3": ("smollm3", dict(GROUPED, no_rope_layers=TURNED)),
    "granite": ("granite", dict(
        GROUPED, embedding_multiplier=3.0, residual_multiplier=0.4, logits_scaling=2.5, attention_multiplier=0.3,
    )),
    "olmo2": ("olmo2", GROUPED),
    "olmo3": ("olmo3", dict(GROUPED, sliding_window=5)),
    "gemma2": ("gemma2", dict(GROUPED, **GEMMA, attn_logit_softcapping=0.8)),
    "gemma3": ("gemma3_text", dict(GROUPED, **GEMMA, layer_types=["sliding_attention", "full_attention"] * 2)),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", dict(rope_parameters=dict(
        rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5,
    ))),
    "gpt_neox in turn": ("gpt_neox", dict(use_parallel_residual=False)),
}
CASES["gemma3"][1]["layer_types"] = CASES["gemma3"][1]["layer_types"][:LAYERS]
UNLISTED = ("starcoder2", "stablelm", "olmo", "glm", "phi", "gemma", "qwen2_moe")
MODES = ("noising", "denoising")


def made(model_type: str, **more) -> torch.nn.Module:
    "A random float32 model, all its weights moved from where the library starts them."
    config = AutoConfig.for_model(model_type, **{**SIZES, **more})
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():            # norms and biases begin as ones and zeros: a wrong one would not be seen
            for p in model.parameters():
                if p.ndim == 1: p.add_(0.3 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def made_once() -> dict: return {}


@pytest.fixture(params=CASES)
def model(request, made_once):
    model_type, more = CASES[request.param]
    if request.param not in made_once: made_once[request.param] = made(model_type, **more)
    return made_once[request.param]


@pytest.fixture(scope="module")
def pairs() -> ContrastiveDataset:
    "Random sentences of several lengths that differ in one token, `s2`."
    lengths = (12, 9, 14)
    g, n, seq = torch.Generator().manual_seed(0), len(lengths), max(lengths)
    length, i = torch.tensor(lengths), torch.arange(n)
    mask = (torch.arange(seq) < length[:, None]).long()
    clean = torch.randint(3, 200, (n, seq), generator=g) * mask
    at = length // 2
    corrupt = clean.clone()
    corrupt[i, at] = (clean[i, at] + 7) % 200
    answers = torch.randint(3, 200, (2, n), generator=g)
    places = {"s1": at - 2, "s2": at, "end": length - 1}
    modified = {"s1": False, "s2": True, "end": False}
    entities = torch.arange(2 * n).view(n, 2)
    return ContrastiveDataset(
        clean, corrupt, mask, length - 1, *answers, places, modified, torch.zeros(n, dtype=torch.long), entities
    )


def scale_of(model, pairs) -> float: return float(answer_logit_diff(model, pairs)[0].abs().mean())


def fast(*args, **options):
    "Effects by the engine, and by nothing else."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return causal_effects(*args, **options)


def test_every_family_of_the_table_is_tried():
    assert {model_type for model_type, _ in CASES.values()} == set(FAMILIES)


def test_the_oracle_measures_the_models_own_logits(model, pairs):
    a, i = get_adapter(model), torch.arange(len(pairs))
    with torch.no_grad():
        own = model(pairs.clean_ids, attention_mask=pairs.attention_mask).logits[i, pairs.answer_pos]
        want = own[i, pairs.correct_token_id] - own[i, pairs.wrong_token_id]
        assert torch.allclose(run_logit_diff(model, pairs.clean_ids, pairs), want, atol=1e-5)
        said = answer_logits(model, pairs.clean_ids, pairs.attention_mask, pairs.answer_pos)
        assert torch.allclose(said, own, atol=1e-5)
        start = a.start(pairs.clean_ids, torch.arange(pairs.clean_ids.shape[1])[None])
        states = model(pairs.clean_ids, output_hidden_states=True).hidden_states
    assert torch.allclose(start, states[0], atol=1e-6) and want.abs().min() > 1e-3
    if a.logit_cap: assert own.abs().max() > 0.6 * a.logit_cap             # the cap is felt


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
def test_the_engine_equals_the_oracle(model, pairs, attention):
    if attention == "sdpa" and not model._supports_sdpa: pytest.skip("sdpa has no soft cap")
    other = copy.deepcopy(model)
    other.set_attn_implementation(attention)
    for mode in MODES:
        want = naive_effects(other, pairs, mode=mode)
        assert torch.allclose(fast(other, pairs, mode=mode), want, atol=1e-4 * scale_of(other, pairs))
        assert want.view(len(pairs), LAYERS, 3)[:, :2, 1:].abs().max() > 0.01 * scale_of(other, pairs)


# each part in one direction: what differs between the two is tested where residuals are
@pytest.mark.parametrize(
    "part, mode", (("head", "noising"), ("group", "denoising"), ("attention", "noising"), ("mlp", "denoising"))
)
def test_parts_by_the_engine_equal_the_oracle(model, pairs, part, mode):
    sites, a = all_parts(model, pairs, part), get_adapter(model)
    numbers = dict(head=a.n_heads, group=a.n_kv_heads).get(part, 1)
    assert len(sites) == LAYERS * numbers * 3
    want, got = naive_effects(model, pairs, sites, mode), fast(model, pairs, sites, mode)
    assert torch.allclose(got, want, atol=1e-4 * scale_of(model, pairs))
    e = got.view(len(pairs), LAYERS, numbers, 3)
    assert (e[..., 0] == 0).all() and (e[:, -1, :, 1] == 0).all()          # before the change; nothing reads it
    assert (e[..., 2].abs().amax(0) > 0).all()                             # every head says something at the end


@pytest.mark.parametrize("case", ("gpt2", "gemma2", "phi3"))
def test_a_sweep_of_parts_keeps_to_its_memory(case, pairs):
    model_type, more = CASES[case]
    model = made(model_type, **more)
    sites = [*all_sites(model, pairs), *all_parts(model, pairs), *all_parts(model, pairs, "mlp")]
    free = causal_effects(model, pairs, sites)
    with pytest.raises(ValueError, match="raise memory") as e: causal_effects(model, pairs, sites, memory=1000)
    least = int(re.search(r"needs (\d+)", str(e.value))[1])
    with LiveBytes(model) as live: got = causal_effects(model, pairs, sites, memory=least)
    assert torch.allclose(got, free, atol=1e-5) and least / 3 < live.peak <= least


def test_read_and_write_identities(model, pairs):
    a, ids, other = get_adapter(model), pairs.clean_ids[:1, :9], pairs.clean_ids[2:, :9]
    streams = [PartSite(1, None, "head", i) for i in range(a.n_heads)]
    whole = [PartSite(1, None, "attention"), PartSite(1, None, "mlp")]
    with torch.no_grad():
        logits, of_other = model(ids).logits, model(other).logits
        with write(model, read(model, ids, [Site(0, 4), Site(2), *streams, *whole])):
            assert torch.allclose(model(ids).logits, logits, atol=1e-5)    # what is there already
        with write(model, read(model, other, [Site(1)])): assert torch.allclose(model(ids).logits, of_other, atol=1e-5)
        with write(model, read(model, other, streams)): by_heads = model(ids).logits
        with write(model, read(model, other, whole[:1])): by_attention = model(ids).logits
    assert torch.allclose(by_heads, by_attention, atol=1e-4) and not torch.allclose(by_heads, logits, atol=1e-3)
    before, after, attention, mlp = read(model, ids, [Site(0), Site(1), *whole]).values()
    added = getattr(model.config, "residual_multiplier", 1.0) * (attention + mlp)
    assert torch.allclose(before + added, after, atol=1e-5)
    last = read(model, ids, [Site(LAYERS - 1)])[Site(LAYERS - 1)]
    assert torch.allclose(a.logits(a.final_norm(last)), logits, atol=1e-5)


def test_hooks_need_one_forward_a_site_and_two_more(model, pairs):
    sites = [*all_sites(model, pairs), *all_parts(model, pairs, "mlp")]
    forwards = []
    handle = get_adapter(model).body.register_forward_pre_hook(lambda module, args: forwards.append(1))
    try: got = hooked_effects(model, pairs, sites)
    finally: handle.remove()
    assert len(forwards) == len(sites) + 2 and torch.equal(got, naive_effects(model, pairs, sites))


def test_a_pruned_student_is_saved_and_read_back(model, pairs, tmp_path):
    a, ids = get_adapter(model), pairs.clean_ids[2:]
    with torch.no_grad():
        assert torch.equal(shrink(model, LAYERS)(ids).logits, model(ids).logits)
        student = shrink(model, [0, 2])
        kept = read(model, ids, [Site(0)])[Site(0)]                        # the second layer stays out
        with write(model, {Site(1): kept}): want = model(ids).logits
        assert torch.allclose(student(ids).logits, want, atol=1e-5)
        tokenizer = byte_tokenizer()
        save_model(student, tokenizer, tmp_path/"m")
        again, _ = load_model(tmp_path/"m", dtype="float32", device="cpu")
        assert torch.equal(again(ids).logits, student(ids).logits)
    assert type(again) is type(model) and get_adapter(again).n_layers == 2 and a.n_layers == LAYERS
    assert torch.allclose(fast(again, pairs), naive_effects(student, pairs), atol=1e-4 * scale_of(student, pairs))


def test_packed_and_restarted_runs_are_the_models(model, pairs):
    a, i = get_adapter(model), torch.arange(len(pairs))
    some = SignalRequest(corrupt=True, sites=(Site(0, "s2"), Site(1, "end")))
    with torch.no_grad():
        want = {k: a.trunk(ids, pairs.attention_mask)[i, pairs.answer_pos]
                for k, ids in (("final", pairs.clean_ids), ("final_corrupt", pairs.corrupt_ids))}
        for request in (some, replace(some, everywhere=True)):
            got, run = kept_run(model, pairs, request)
            if not request.everywhere:
                assert all(torch.allclose(got[k], want[k], atol=1e-5) for k in want)
            direct = hidden_signals(model, pairs, request)
            assert all(torch.allclose(direct[k], got[k], atol=1e-5) for k in direct)
        for role in ("s2", "end"):
            by_hooks = exchanged_by_hooks(model, pairs, 0, role)
            assert torch.allclose(exchanged(run, 0, role), by_hooks, atol=1e-5)
            assert not torch.allclose(by_hooks, torch.stack(list(want.values()), 1), atol=1e-3)


@pytest.mark.parametrize("method", ("rcid_identity", "interchange"))
def test_a_step_of_distillation(model, pairs, method):
    # at s2, as a short window lets nothing of it reach the end in one layer: there a direction would be rounding
    config = DistillConfig(
        steps=2, batch=3, lr=1e-3, sites=(Site(0, "s2"), Site(1, "s2")), layer_map={0: 0, 1: 0, 2: 1}, warmup=0
    )
    student = shrink(model, [0, 2])
    before = {n: p.clone() for n, p in student.named_parameters()}
    losses = [h["loss"] for h in distill(student, model, pairs, method, config).history]
    assert all(torch.isfinite(torch.tensor(losses))) and losses[1] != losses[0]
    moved = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    inside = {n for n, _ in student.named_parameters() if f".{get_adapter(model).names.layers}." in n}
    untouched = {n for n in inside - moved if "experts" not in n and "k_" not in n and "bias" not in n}
    assert not untouched, untouched
    if method == "interchange": return
    slow = plain_distill(shrink(model, [0, 2]), model, pairs, method, config)
    assert torch.allclose(torch.tensor(losses), torch.tensor(slow), rtol=1e-3)


def test_keys_values_and_queries_are_those_that_the_attention_used(model, pairs):
    a, ids = get_adapter(model), pairs.clean_ids[2:, :4]                   # as long as the shortest window
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    cache, rope = extract_kv(other, ids, queries=True), rope_of(other)
    bare = extract_kv(other, ids, queries=True, pre_rope=True)
    assert torch.allclose(bare.rotated(rope).k, cache.k, atol=1e-5)
    assert torch.allclose(cache.unrotated(rope).q, bare.q, atol=1e-5)
    want = other(ids, output_attentions=True).attentions
    for l in range(LAYERS):
        key = cache.k[:, l].repeat_interleave(a.n_heads // a.n_kv_heads, 1)            # (batch, head, seq, dim)
        scores = cache.q[:, l] @ key.mT / a.head_dim**0.5
        cap = getattr(other.config, "attn_logit_softcapping", None)
        if cap: scores = torch.tanh(scores / cap) * cap
        closed = torch.ones(4, 4, dtype=torch.bool).triu(1)
        assert torch.allclose(scores.masked_fill(closed, -torch.inf).softmax(-1), want[l], atol=1e-5), l
        value = cache.v[:, l].repeat_interleave(a.n_heads // a.n_kv_heads, 1)
        heads = (want[l] @ value).transpose(1, 2)                          # (batch, seq, head, head_dim)
        sites = [PartSite(l, None, "head", i) for i in range(a.n_heads)]
        for i, z in enumerate(read(other, ids, sites).values()): assert torch.allclose(heads[:, :, i], z, atol=1e-5)


def test_which_layers_turn_their_keys(pairs):
    "SmolLM3's second layer keeps keys as they are, GPT-2 all; half of a head stays in Phi-3 and GPT-NeoX."
    ids = pairs.clean_ids[2:, :4]
    def turned(case):
        model_type, more = CASES[case]
        model = made(model_type, **more)
        # (1, layer, kv_head, seq, dim)
        k, bare = extract_kv(model, ids).k, extract_kv(model, ids, pre_rope=True).k
        return [not torch.equal(k[:, l], bare[:, l]) for l in range(LAYERS)], (k - bare).abs().amax((0, 1, 2, 3)) > 1e-6
    assert turned("smollm3")[0] == [bool(t) for t in TURNED] and turned("gpt2")[0] == [False] * LAYERS
    for case in ("phi3", "gpt_neox"):
        layers, dims = turned(case)
        assert all(layers) and dims[:4].all() and not dims[4:].any()


def test_greedy_text_is_the_models(model, pairs):
    ids = pairs.clean_ids[2:, :6]
    text, grown = greedy_decode(model, ids, torch.ones_like(ids), 4)[0], ids
    for token in text:
        assert int(model(grown).logits[0, -1].argmax()) == token
        grown = torch.cat([grown, torch.tensor([[token]])], 1)


def test_bfloat16_is_restarted_too(model, pairs):
    half = copy.deepcopy(model).bfloat16()
    assert why_not_restarted(half, pairs) is None and why_not_restarted(half, pairs, parts=True) is None


def test_a_model_is_rewritten_to_the_same_function_or_refused(model):
    a, rewrites = get_adapter(model), (lambda m: identity_blocks(m, [0]), rotated, permuted_heads)
    if a.names != Family() or a.family == "qwen3_moe":
        words = f"a layer of this {a.family} model is not norm, q, k, v"
        for rewrite in rewrites:
            with pytest.raises(ValueError, match=words): rewrite(model)
        return
    for rewrite in rewrites: assert logits_differ(model, rewrite(model)) < SAME


# families that no one has listed


@pytest.mark.parametrize("model_type", UNLISTED)
def test_an_unlisted_family_is_measured_as_it_is_or_refused(model_type, pairs):
    more = dict(num_experts=4, num_experts_per_tok=2) if "moe" in model_type else {}
    more |= dict(head_dim=8) if model_type in ("gemma", "glm") else {}
    model = made(model_type, num_key_value_heads=2, **more)
    a = get_adapter(model)
    assert not a.known
    sites = [*all_sites(model, pairs), *all_parts(model, pairs)]
    want = naive_effects(model, pairs, sites)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = causal_effects(model, pairs, sites)
    assert torch.allclose(got, want, atol=1e-4 * scale_of(model, pairs)) and want.abs().max() > 0
    assert get_adapter(copy.deepcopy(model).bfloat16()).names == a.names
    with pytest.raises(ValueError, match=f"how '{model_type}' turns keys is not known"): rope_of(model)
    with pytest.raises(ValueError, match="LatentModel: latent places need"): LatentModel(model, 5, 1)


REFUSED = {
    "mamba": (dict(state_size=4), "no attention among norm, mixer"),
    "cohere": (dict(logit_scale=0.25), "its logits are not those of its LM head"),
    "opt": (dict(ffn_dim=48, word_embed_proj_dim=32), "no list of 3 layers among decoder"),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(model_type):
    more, reason = REFUSED[model_type]
    model = made(model_type, **more)
    with pytest.raises(ValueError, match=f"unknown model family '{model_type}': rcid knows .*structure: {reason}") as e:
        get_adapter(model)
    assert "\n" not in str(e.value)


def test_an_encoder_decoder_model_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4))
    with pytest.raises(ValueError, match="'t5'.*tried by structure: it is an encoder-decoder model"): get_adapter(t5)


def test_a_model_that_sees_pictures_is_refused():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration
    text = dict(SIZES, head_dim=8, num_key_value_heads=2)
    eye = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=dict(eye, patch_size=14)))
    with pytest.raises(ValueError, match="'gemma3'.*it reads more than text: load its"): get_adapter(model)


def test_a_layer_that_divides_by_its_number_cannot_move():
    model = made("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ValueError, match="layers of this model divide by their number"): shrink(model, [0, 2])


def test_a_model_that_cannot_be_restarted_is_measured_by_hooks(pairs):
    model = made("llama")
    model.config.layer_types = ["strange_attention"] * LAYERS
    with pytest.warns(UserWarning, match="slow path for this llama model: it has layers of strange_attention"):
        got = causal_effects(model, pairs, all_parts(model, pairs))
    assert torch.equal(got, naive_effects(model, pairs, all_parts(model, pairs)))


def test_a_part_that_is_not_there_is_refused(pairs):
    model = made("llama", num_key_value_heads=2)
    strange = {("head", 4): "has heads 0..3", ("group", 2): "groups 0..1", ("head",): "has heads", ("q", 0): "part 'q'"}
    for part, words in strange.items():
        site = PartSite(0, "end", *part)
        for effects in (causal_effects, naive_effects, hooked_effects):
            with pytest.raises(ValueError, match=words): effects(model, pairs, [site])
    with pytest.raises(IndexError, match="layer 3 is outside"): read(model, pairs.clean_ids, [PartSite(3, 0, "mlp")])
    with pytest.raises(ValueError, match="unknown part 'neuron'"): all_parts(model, pairs, "neuron")


def test_gemma_is_scaled_where_its_embedding_does_not_do_it():
    "As in versions of transformers that scale behind the embedding: in the model's dtype."
    model = made("gemma2", **CASES["gemma2"][1])
    assert get_adapter(model).embed_scale == 1.0 and model.model.embed_tokens.embed_scale == 32**0.5
    model.model.embed_tokens = torch.nn.Embedding(VOCAB, 32)
    assert get_adapter(model).embed_scale == pytest.approx(32**0.5, rel=1e-7)
    assert get_adapter(model.bfloat16()).embed_scale == 5.65625            # the bfloat16 nearest to 5.65685
