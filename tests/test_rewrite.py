"""Rewrites keep the function: three architectures, every combination, and one line for what cannot be rewritten."""
import copy, warnings
import pytest, torch
from accelerate import cpu_offload
from conftest import ARCHS, real
from rcid.distill import model_hash
from rcid.models import blocks_map, get_adapter, identity_blocks, load_model, logits_differ, permuted_heads, rotated
from rcid.models import save_model
from rcid.models.rewrite import SAME, head_orders, random_isometry

IDS = torch.randint(3, 200, (2, 16), generator=torch.Generator().manual_seed(1))


def deeper(model): return identity_blocks(model, [0, 2, 2])


REWRITES = {"blocks": deeper, "rotated": rotated, "heads": permuted_heads}


@pytest.fixture(params=ARCHS)
def model(request): return used(request.param)


def used(arch, dtype="float32", **spec):
    "A random model whose gains and biases are as after training: none is one, none is zero."
    model, _ = load_model({"arch": arch, **spec}, dtype="float32", device="cpu")
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1: weight.add_(torch.randn(weight.shape, generator=g) / 3)
    return model.to(getattr(torch, dtype))


def hidden(model):
    "The residual stream after every layer but the last."
    with torch.no_grad(): return model(IDS, output_hidden_states=True).hidden_states[1:-1]


@pytest.mark.parametrize("name", REWRITES)
def test_a_rewrite_is_the_same_function_in_other_weights(model, name):
    before, training = model_hash(model), [m.training for m in model.modules()]
    new = REWRITES[name](model)
    assert logits_differ(model, new) <= SAME and logits_differ(model, new, IDS) <= SAME
    assert model_hash(new) != before == model_hash(model) and [m.training for m in model.modules()] == training
    assert {p.dtype for p in new.parameters()} == {torch.float32} and not new.training
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in new.parameters()}
    assert not shared                                                      # a copy, not a view
    assert model_hash(REWRITES[name](model)) == model_hash(new)            # and always the same one


def test_what_is_rewritten_is_seen_by_the_check(model):
    "One weight of each kind of part, forgotten by a rewrite, is more than rounding."
    for name, weight in model.named_parameters():
        new = rotated(model)
        if name.startswith("model.layers.") and not name.startswith("model.layers.1."): continue
        with torch.no_grad(): weight_of = dict(new.named_parameters()).get(name)
        if weight_of is None or weight_of.shape != weight.shape or torch.equal(weight_of, weight): continue
        with torch.no_grad(): weight_of.copy_(weight)
        assert logits_differ(model, new) > SAME, name


def test_rewrites_follow_each_other(model):
    new = model
    for rewrite in (permuted_heads, deeper, rotated, permuted_heads, deeper, rotated):
        new = rewrite(new)
        assert 0 <= logits_differ(model, new) <= SAME
    a = get_adapter(new)
    assert a.n_layers == len(a.layers) == new.config.num_hidden_layers == 4 + 3 + 3


@pytest.mark.parametrize("name", REWRITES)
def test_a_rewrite_is_saved_and_read_back(model, tmp_path, name):
    new = REWRITES[name](model)
    save_model(new, load_model({"arch": "llama"}, device="cpu")[1], tmp_path/"m")
    again, _ = load_model({"path": str(tmp_path/"m")}, dtype="float32", device="cpu")
    assert model_hash(again) == model_hash(new) and logits_differ(new, again) == 0
    assert again.config.to_dict().get("layer_types") == new.config.to_dict().get("layer_types")


def test_a_rewrite_has_a_cache_and_goes_on_from_it(model):
    "Layer numbers of the attention modules: a cache is filled by them."
    for rewrite in REWRITES.values():
        new = rewrite(model)
        with torch.no_grad():
            past = new(IDS[:, :10], use_cache=True).past_key_values
            rest = new(IDS[:, 10:], past_key_values=past).logits
            assert torch.allclose(rest, model(IDS).logits[:, 10:], atol=SAME)
        assert len(past.layers) == get_adapter(new).n_layers


# identity blocks


def test_blocks_leave_every_layer_as_it_was(model):
    where, new = blocks_map(4, [0, 2, 2]), deeper(model)
    assert where.old == [0, 0, 1, 2, 2, 2, 3] and where.new == [0, 2, 3, 6] and where.inserted == [1, 4, 5]
    assert where.depths.tolist() == [.25, .25, .5, .75, .75, .75, 1.]
    assert logits_differ(model, new) == 0
    old, now = hidden(model), hidden(new)
    assert all(torch.equal(now[i], old[where.old[i]]) for i in range(6))
    assert identity_blocks(model, []).config.num_hidden_layers == 4 and blocks_map(4, []).inserted == []
    assert blocks_map(3, [2]).old == [0, 1, 2, 2] and logits_differ(model, identity_blocks(model, [3])) == 0


def test_kinds_of_attention_go_with_their_layers():
    from transformers import AutoConfig, AutoModelForCausalLM
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = used("qwen3").config.to_dict() | dict(use_sliding_window=True, sliding_window=4, layer_types=kinds)
    config = AutoConfig.for_model("qwen3", **{k: v for k, v in config.items() if k != "model_type"})
    model = AutoModelForCausalLM.from_config(config).eval()
    assert [get_adapter(model).window(l) for l in range(4)] == [None, 4, None, 4]
    new = identity_blocks(model, [1, 2])
    assert [get_adapter(new).window(l) for l in range(6)] == [None, 4, 4, None, None, 4]
    assert logits_differ(model, new) == 0 and logits_differ(model, rotated(new)) <= SAME


def test_biases_of_writers_are_silenced_and_turned():
    "LLaMA's optional biases, of attention and of the MLP."
    from transformers import AutoConfig, AutoModelForCausalLM
    config = used("llama").config.to_dict() | dict(attention_bias=True, mlp_bias=True)
    config = AutoConfig.for_model("llama", **{k: v for k, v in config.items() if k != "model_type"})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1: weight.add_(torch.randn_like(weight) / 3)
    assert model.model.layers[0].mlp.down_proj.bias.abs().min() > 0
    for rewrite in REWRITES.values(): assert logits_differ(model, rewrite(model)) <= SAME


# the basis


def test_the_residual_stream_is_turned_and_nothing_else(model):
    turn, new = random_isometry(64, 64, 5).float(), rotated(model, seed=5)
    for old, now in zip(hidden(model), hidden(new), strict=True):
        assert torch.allclose(now, old @ turn, atol=1e-5 * float(old.abs().max()) + 1e-5)
        assert not torch.allclose(now, old, atol=.1)
    assert model_hash(rotated(model, seed=6)) != model_hash(new)
    assert all((n.weight == 1).all() for n in (get_adapter(new).final_norm, get_adapter(new).parts(2).mlp_norm))


def test_an_embedding_stays_tied_if_the_final_norm_has_no_gain(model):
    a = get_adapter(model)
    assert a.lm_head.weight is a.embed.weight
    untied = get_adapter(rotated(model))
    assert untied.lm_head.weight is not untied.embed.weight and not untied.model.config.tie_word_embeddings
    with torch.no_grad(): a.final_norm.weight.fill_(1)
    new = rotated(model)
    tied = get_adapter(new)
    assert tied.lm_head.weight is tied.embed.weight and new.config.tie_word_embeddings
    assert logits_differ(model, new) <= SAME
    assert logits_differ(model, rotated(untied.model)) > SAME              # the gain is gone from `model`, not from it


def test_a_large_matrix_is_turned_in_pieces(model, monkeypatch):
    whole = rotated(model)
    monkeypatch.setattr("rcid.models.rewrite.ROWS", 7)
    assert logits_differ(whole, rotated(model)) <= 1e-6


# heads


@pytest.mark.parametrize("sizes", [(4, 4), (4, 1), (6, 2), (2, 2)], ids=str)
def test_heads_change_places_within_the_rules(sizes):
    heads, groups = sizes
    orders = head_orders(5, heads, groups, seed=3)
    size = heads // groups
    assert orders.shape == (5, heads) and all(sorted(o) == list(range(heads)) for o in orders.tolist())
    by_group = orders.unflatten(1, (groups, size)) // size
    assert (by_group == by_group[:, :, :1]).all()                          # a group stays together
    assert any(o != sorted(o) for o in orders.tolist())
    for arch in ARCHS:
        one = used(arch, heads=heads, kv_heads=groups, d_model=heads * 16)
        new = permuted_heads(one, 3)
        assert logits_differ(one, new) <= SAME and model_hash(new) != model_hash(one)


# what cannot be rewritten, or not exactly


@pytest.mark.parametrize("after", ([4], [-1], [0, 9], 2, "1", [1.5], None), ids=repr)
def test_a_layer_that_is_not_there(after):
    for call in (lambda: blocks_map(4, after), lambda: identity_blocks(used("llama"), after)):
        with pytest.raises(ValueError, match=r"identity blocks after .*each within 0\.\.3") as e: call()
        assert "\n" not in str(e.value)


class Centred(torch.nn.Module):
    "A LayerNorm that names its weights as RMSNorm does."
    def __init__(self, norm): super().__init__(); self.weight = norm.weight
    def forward(self, x): return torch.nn.functional.layer_norm(x, x.shape[-1:], self.weight)


@pytest.mark.parametrize("name", REWRITES)
def test_a_model_that_is_not_plain(name):
    layer_norm = used("llama")
    layer_norm.model.norm = Centred(layer_norm.model.norm)
    inside = used("qwen3")
    inside.model.layers[2].input_layernorm = Centred(inside.model.layers[2].input_layernorm)
    bias = used("llama")
    bias.model.norm = torch.nn.LayerNorm(64)
    for model, words in (
        (layer_norm, "the final norm is Centred, in a plain one LlamaRMSNorm"),
        (inside, "layer 2 input_layernorm is Centred, in a plain one Qwen3RMSNorm"),
        (bias, "model.norm.bias not in a plain one"),
    ):
        with pytest.raises(ValueError, match=words) as e: REWRITES[name](model)
        assert "\n" not in str(e.value)


def test_a_model_with_one_head():
    one = used("llama", heads=1, kv_heads=1, d_model=16)
    with pytest.raises(ValueError, match="one head: there is no other order"): permuted_heads(one)
    assert logits_differ(one, rotated(one)) <= SAME


def test_models_of_other_vocabularies_are_not_compared():
    with pytest.raises(ValueError, match=r"models of \d+ and 300 logits"):
        logits_differ(used("llama"), used("llama", vocab=300))


@pytest.mark.parametrize("name", REWRITES)
def test_offloaded_weights_are_fetched_and_lost_ones_refused(name):
    model = used("llama")
    away = cpu_offload(copy.deepcopy(model), execution_device="cpu")
    new = REWRITES[name](away)
    assert all(p.is_meta for p in away.parameters()) and not any(p.is_meta for p in new.parameters())
    assert model_hash(new) == model_hash(REWRITES[name](model))
    with pytest.raises(ValueError, match="no weights .device meta.*load it with load_model") as e:
        REWRITES[name](copy.deepcopy(model).to("meta"))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_sixteen_bits(dtype):
    "Blocks are exact, heads are summed in another order, a turned model says that it is rounded."
    model = used("llama", dtype)
    whole = copy.deepcopy(model).float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert logits_differ(model, deeper(model)) == 0
        assert logits_differ(whole, permuted_heads(model).float()) <= SAME
    with pytest.warns(UserWarning, match="load the model in float32"): new = rotated(model)
    assert {p.dtype for p in new.parameters()} == {model.dtype}
    assert SAME < logits_differ(whole, new.float()) < .1                   # rounded, and still the same model


def test_modes_hooks_and_random_numbers_stay(model):
    model.train()
    model.lm_head.eval()
    seen = []
    model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    torch.manual_seed(0)
    before = torch.get_rng_state(), [m.training for m in model.modules()]
    for rewrite in REWRITES.values():
        new = rewrite(model)
        new(IDS)
    assert not seen                                                        # a rewrite does not run the model's hooks
    logits_differ(model, new)
    assert torch.equal(torch.get_rng_state(), before[0]) and [m.training for m in model.modules()] == before[1]
    assert seen == [1] and len(model.model.layers[1]._forward_hooks) == 1


@pytest.mark.slow
def test_real_weights():
    model, tokenizer = load_model({"path": str(real("SmolLM2"))}, dtype="float32", device="cpu")
    text = " ".join(["When Mary and John went to the store, John gave a drink to Mary."] * 3)
    ids = torch.tensor([tokenizer(text).input_ids])
    far = rotated(permuted_heads(identity_blocks(model, [5, 20, 29]), 1), 2)
    for new in (identity_blocks(model, [14]), permuted_heads(model), rotated(model), far):
        assert logits_differ(model, new, ids) <= SAME
