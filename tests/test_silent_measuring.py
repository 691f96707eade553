"""What the measuring parts do with tokenizers, models, files and answers that are not the usual ones."""
import random, warnings
import pytest, torch
from conftest import ARCHS, ROOT
from rcid.causal import Site, all_positions, all_sites, causal_effects, naive_effects
from rcid.causal.engine import restart_error, sweep
from rcid.data import build_pairs, load_pairs, name_pool
from rcid.data.pairs import ContrastiveDataset
from rcid.distill.targets import Wanted, hidden_signals
from rcid.eval.decode import greedy_decode
from rcid.models import get_adapter


# 5. layers that see a few tokens back only

def windowed(arch: str, attention: str = "sdpa", window: int = 8, first: int = 1):
    "A random model of four layers; from layer `first` on they see `window` tokens."
    from transformers import AutoConfig, AutoModelForCausalLM
    sizes = dict(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
                 use_sliding_window=True, sliding_window=window, max_window_layers=first, initializer_range=.3, attn_implementation=attention)
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **sizes, **({"head_dim": 8} if arch == "qwen3" else {}))).float().eval()


def long_pairs(lengths=(24, 24, 19, 30)) -> ContrastiveDataset:
    "Random prompts that differ in one token; the first change comes late in some and early in others."
    g, n, length = torch.Generator().manual_seed(0), len(lengths), torch.tensor(lengths)
    mask = (torch.arange(max(lengths)) < length[:, None]).long()
    clean, row, at = torch.randint(3, 300, mask.shape, generator=g) * mask, torch.arange(n), torch.tensor([5, 18, 9, 21][:n])
    corrupt = clean.clone()
    corrupt[row, at] = (clean[row, at] + 11) % 297 + 3
    some = lambda: torch.randint(3, 300, (n,), generator=g)
    return ContrastiveDataset(clean, corrupt, mask, length - 1, some(), some(), {"before": at - 2, "changed": at, "end": length - 1},
                              {"before": False, "changed": True, "end": False}, torch.zeros(n, dtype=torch.long), row[:, None])


def far(got, want) -> float: return float((got - want).norm() / want.norm())


@pytest.fixture(params=[(arch, attention, first) for arch in ("qwen2", "qwen3") for attention in ("sdpa", "eager") for first in (0, 2)], ids=str)
def short_sighted(request): return windowed(request.param[0], request.param[1], first=request.param[2])


def test_the_window_is_seen_at_all(short_sighted):
    wide, pairs = windowed(short_sighted.config.model_type, first=4), long_pairs()
    wide.load_state_dict(short_sighted.state_dict())
    with torch.no_grad(): assert far(*(m.model(input_ids=pairs.clean_ids, attention_mask=pairs.attention_mask).last_hidden_state[:2] for m in (wide, short_sighted))) > .1


@pytest.mark.parametrize("everywhere", (True, False))
def test_packed_prompts_see_what_the_model_sees(short_sighted, everywhere):
    pairs, row = long_pairs(), torch.arange(4)
    sites = (Site(1, "changed"), Site(2, "end"))
    with torch.no_grad():
        got = hidden_signals(short_sighted, pairs, Wanted(corrupt=True, sites=sites, everywhere=everywhere))
        for ids, final, at in ((pairs.clean_ids, "final", "sites"), (pairs.corrupt_ids, "final_corrupt", "sites_corrupt")):
            out = short_sighted.model(input_ids=ids, attention_mask=pairs.attention_mask, output_hidden_states=True)
            want = torch.stack([out.hidden_states[s.layer + 1][row, pairs.key_positions[s.role]] for s in sites], 1)
            assert far(got[at], want) < 1e-5, at
            if not everywhere: assert far(got[final], out.last_hidden_state[row, pairs.answer_pos]) < 1e-5, final
            elif final == "final": assert far(got[final][pairs.attention_mask.bool()], out.last_hidden_state[pairs.attention_mask.bool()]) < 1e-5
            else:                                                          # from the first change on
                first = pairs.key_positions["changed"]
                for i in range(4):
                    own = out.last_hidden_state[i, first[i]:pairs.answer_pos[i] + 1]
                    assert far(got[final][i, :len(own)], own) < 1e-5


@pytest.mark.parametrize("mode", ("noising", "denoising"))
def test_a_sweep_sees_what_the_model_sees(short_sighted, mode):
    pairs = long_pairs()
    want = naive_effects(short_sighted, pairs, mode=mode)
    assert (want.abs() > 1e-3).any()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for batch in (1, None): assert torch.allclose(causal_effects(short_sighted, pairs, mode=mode, batch_size=batch), want, atol=1e-4)
    assert not [w for w in said if "slow path" in str(w.message)]
    few = pairs[:2].trimmed()
    assert torch.allclose(causal_effects(short_sighted, few, all_positions(short_sighted, few)), naive_effects(short_sighted, few, all_positions(short_sighted, few)), atol=1e-4)


def test_a_restart_sees_what_the_model_sees(short_sighted):
    pairs = long_pairs()
    assert restart_error(short_sighted, pairs.clean_ids, pairs.attention_mask, pairs.answer_pos) < 1e-4


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
@pytest.mark.parametrize("arch", ("qwen2", "qwen3"))
def test_decoding_sees_what_the_model_sees(arch, attention):
    model, pairs = windowed(arch, attention), long_pairs()
    prompts = [ids[:n] for ids, n in zip(pairs.clean_ids, pairs.attention_mask.sum(1).tolist())]
    def alone(ids): # full forwards of one prompt
        for _ in range(12): ids = torch.cat([ids, model(ids[None]).logits[0, -1:].argmax(-1)])
        return ids[-12:].tolist()
    with torch.no_grad(): want = [alone(p) for p in prompts]
    assert want == [model.generate(p[None], attention_mask=torch.ones_like(p[None]), do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)[0, len(p):].tolist() for p in prompts]
    assert greedy_decode(model, pairs.clean_ids, pairs.attention_mask, 12) == want


def test_latent_places_of_a_short_sighted_model():
    from rcid.kv.latent import LatentModel
    pairs = long_pairs()
    ids = pairs.clean_ids.clone()
    ids[:, 12:16] = 1                                                      # token 1 stands in no text: a place
    model, lengths = LatentModel(windowed("qwen3"), 1, 2), pairs.attention_mask.sum(1).tolist()
    want = [greedy_decode(model, ids[i:i + 1, :n], pairs.attention_mask[i:i + 1, :n], 8)[0] for i, n in enumerate(lengths)]
    assert greedy_decode(model, ids, pairs.attention_mask, 8) == want
