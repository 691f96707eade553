"""Mediation inside latent places: a model whose answer is computed by hand, the full runs, what is refused."""

import itertools
import pytest, torch
from conftest import ARCHS
from rcid.data.other_numbers import Changed, other_numbers
from rcid.data.reasoning import Problem, word_problems
from rcid.kv import LatentModel, ThoughtProjector
from rcid.kv.inside import enters, equal_lengths, inside_places
from rcid.models import load_model, train_tokenizer
from rcid.models.adapters import hidden_of


@pytest.fixture(scope="module")
def numbers():
    "Tokenizer, and pairs of sums whose numbers have one token."
    problems = list(itertools.islice(word_problems(style="tape", operations="+", largest=30, steps=(1, 2)), 80))
    tokenizer = train_tokenizer([p.text for p in problems], 500)
    return tokenizer, equal_lengths(other_numbers([p for p in problems if len(p.kind) == 2], 30), tokenizer, 6)


def averaging(tokenizer, c: float):
    """Two layers whose heads see everything alike and carry one coordinate, a number's value, times `c`; no MLP. A
    large constant makes every norm the identity, to 1e-4."""
    size = dict(arch="llama", layers=2, d_model=16, heads=1, kv_heads=1, head_dim=16, d_mlp=16, vocab=len(tokenizer))
    model, _ = load_model(size | dict(seed=1), dtype="float32", device="cpu")
    large = 1000.
    with torch.no_grad():
        for name, w in model.named_parameters(): w.fill_(large / 4 if "norm" in name else 0.)
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight[1, 1] = 1.
            layer.self_attn.o_proj.weight[1, 1] = c
        values = torch.zeros(len(tokenizer))
        for word, i in tokenizer.get_vocab().items():
            text = tokenizer.convert_tokens_to_string([word]).strip()
            if text.isdigit(): values[i] = float(text) / 10
        seen = torch.stack([torch.full_like(values, large), values], 1)
        model.model.embed_tokens.weight.copy_(seen @ torch.eye(2, 16))
    assert model.lm_head.weight is model.model.embed_tokens.weight     # the constant cancels between two answers
    return model


@pytest.mark.parametrize("c", (1., 3.))
def test_shares_of_two_averaging_layers_are_those_of_the_hand(numbers, c):
    """The number stands at q, and the cue at n - 1. The first layer adds c/(p + 1) of it to each later position p. The
    second gives the cue the mean over n positions, of the number itself (1) and of what the first added; the first
    layer had given it 1 as well. So of 2 + c sum_p 1/(p + 1), a place p after one layer carries c/(p + 1)."""
    tokenizer, lengths = numbers
    latent, m = tokenizer.bos_token_id, 3
    short = lengths.at_places(m, latent)
    found = inside_places(LatentModel(averaging(tokenizer, c), latent, 0), short, latent, [0, 1, 2])
    for kind, other in short.others.items():
        effects, gaps = found.places.effects[kind], found.places.gaps[kind]
        for i, (_, asks, answers, _) in enumerate(short.clean.segments.tolist()):
            n = int(short.clean.cue_pos[i]) + 1
            q = int((short.clean.input_ids[i, :asks] != other.input_ids[i, :asks]).nonzero())
            whole = 2 + c * sum(1 / (p + 1) for p in range(q, n))
            shares = [c / (p + 1) / whole for p in range(asks, answers)]
            # no place's input knows the number, and after the last layer nobody reads a place that does not think on
            assert effects[i, [0, 2]].abs().max() < 1e-3 * gaps[i].abs()
            assert (effects[i, 1] / gaps[i]).tolist() == pytest.approx(shares, rel=5e-3)
            ways = found.ways.effects[kind][i, 0] / gaps[i]
            assert ways.tolist() == pytest.approx([sum(shares), 1 - sum(shares)], rel=5e-3)


def full_runs(student, short, kind: str, place: int, depth: int) -> torch.Tensor:
    "The effect by whole rows and hooks: every pass of the other run is noted, and put into that pass."
    layers, other = student.plain[0].model.layers, short.others[kind]
    row, at, cue = torch.arange(len(short.clean)), short.clean.segments[:, 1] + place, short.clean.cue_pos
    right, wrong = (d.input_ids[row, d.cue_pos + 1] for d in (short.clean, other))
    noted, passes = [], []
    def keep(h): noted.append(h[row, at].clone())
    def put(h):
        h = h.clone()
        h[row, at] = noted[len(passes)]
        passes.append(h)
        return h
    def run(data, change):
        def entering(_, args):
            new = change(args[0])
            return None if new is None else (new, *args[1:])
        def leaving(_, args, out): return change(hidden_of(out))
        handle = layers[depth - 1].register_forward_hook(leaving) if depth else layers[0].register_forward_pre_hook(
            entering)
        with torch.no_grad(): logits = student(data.input_ids, data.attention_mask).logits
        handle.remove()
        return logits[row, cue, right] - logits[row, cue, wrong]
    run(other, keep)
    return run(short.clean, lambda h: None) - run(short.clean, put)


def test_marks_and_a_projector_are_in_the_full_runs_too(numbers):
    tokenizer, lengths = numbers
    latent, marks = tokenizer.bos_token_id, (3, 4)
    size = dict(arch="llama", layers=2, d_model=32, heads=4, kv_heads=2, head_dim=8, d_mlp=64, vocab=len(tokenizer))
    projector = ThoughtProjector(32, 8)
    torch.nn.init.normal_(projector.down.weight, generator=torch.Generator().manual_seed(0))
    plain = load_model(size | dict(seed=2), dtype="float32", device="cpu")[0]
    short = lengths.at_places(3, latent, marks)
    for rounds in (1, 5):
        student = LatentModel(plain, latent, rounds, "soft", projector, marks)
        found = inside_places(student, short, latent, [0, 1])
        assert found.places.roles == list("01234")
        for place, depth in itertools.product(range(5), range(2)):
            wanted = full_runs(student, short, "step 1", place, depth)
            assert torch.allclose(found.places.effects["step 1"][:, depth, place], wanted, atol=2e-5)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("rounds, thought", [(0, "hidden"), (1, "hidden"), (2, "soft"), (3, "hidden"), (7, "soft")])
def test_few_places_in_few_rounds_are_the_full_runs(numbers, arch, rounds, thought):
    tokenizer, lengths = numbers
    latent, short = tokenizer.bos_token_id, lengths.at_places(3, tokenizer.bos_token_id)
    size = dict(arch=arch, layers=2, d_model=32, heads=4, kv_heads=2, head_dim=8, d_mlp=64, vocab=len(tokenizer))
    student = LatentModel(load_model(size | dict(seed=2), dtype="float32", device="cpu")[0], latent, rounds, thought)
    found = inside_places(student, short, latent, [0, 1, 2])
    for place, depth in itertools.product(range(3), range(3)):
        wanted = full_runs(student, short, "step 2", place, depth)
        assert torch.allclose(found.places.effects["step 2"][:, depth, place], wanted, atol=2e-5)
    assert found.places.effects["step 2"].abs().max() > 1e-4


@torch.no_grad()
def test_a_model_in_words_goes_on_saying_its_own(numbers):
    "Row by row and word by word, without a cache: the residual of one word is that of the other problem."
    tokenizer, lengths = numbers
    latent, m = tokenizer.bos_token_id, 4
    short = lengths.at_places(m, latent)
    size = dict(arch="qwen3", layers=2, d_model=32, heads=4, kv_heads=2, head_dim=8, d_mlp=64, vocab=len(tokenizer))
    model, _ = load_model(size | dict(seed=5), dtype="float32", device="cpu")
    found, layer = inside_places(model, short, latent, [1]), model.model.layers[0]

    def decoded(data, i, place=None, value=None):
        "Logits at the cue, and the residuals after the first layer."
        asks, answers, cue = *data.segments[i, 1:3].tolist(), int(data.cue_pos[i])
        residuals = []
        def seen(_, args, out):
            h = hidden_of(out).clone()
            if value is not None and h.shape[1] > asks + place: h[:, asks + place] = value
            residuals[:] = [h[0]]
            return h
        handle, ids = layer.register_forward_hook(seen), data.input_ids[i:i + 1, :asks]
        for _ in range(m): ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        logits = model(torch.cat([ids, data.input_ids[i:i + 1, answers:cue + 1]], 1)).logits[0, -1]
        handle.remove()
        return logits, residuals[0][asks:]

    other, moved = short.others["step 1"], 0
    for i in range(len(short.clean)):
        right, wrong = (int(d.input_ids[i, d.cue_pos[i] + 1]) for d in (short.clean, other))
        before, own = decoded(short.clean, i)
        _, theirs = decoded(other, i)
        for place in range(m):
            after, _ = decoded(short.clean, i, place, theirs[place])
            effect = float(before[right] - before[wrong] - after[right] + after[wrong])
            assert float(found.places.effects["step 1"][i, 0, place]) == pytest.approx(effect, abs=2e-5)
            moved += abs(effect) > 1e-4
    assert moved


def test_where_a_step_enters():
    shares = torch.zeros(3, 2, 4)
    shares[0, 0], shares[1, 1] = torch.tensor([.1, .6, .2, .9]), 1.0     # the second is in no input
    first = enters(shares)
    assert first[0] == 1 and first[1:].isnan().all() and enters(shares, .9)[0] == 3


def test_what_cannot_be_asked(numbers):
    tokenizer, lengths = numbers
    latent = tokenizer.bos_token_id
    size = dict(arch="llama", layers=2, d_model=32, heads=4, kv_heads=2, head_dim=8, d_mlp=64, vocab=len(tokenizer))
    model, _ = load_model(size, dtype="float32", device="cpu")
    with pytest.raises(ValueError, match="there are no places"):
        inside_places(LatentModel(model, latent, 1), lengths.at_places(0, latent), latent)
    for depths in ([], [3], [-1]):
        with pytest.raises(ValueError, match=r"needs some of 0 \(the input\) to 2"):
            inside_places(model, lengths.at_places(2, latent), latent, depths)
    assert equal_lengths([], tokenizer) is None
    split = Problem("Emma has 12 apples. Tom gives Emma 3 more. How many?", "12 + 3 15", "15", "+")
    longer = split._replace(prompt=split.prompt.replace(" 3 ", " 3 3 3 3 "))
    assert equal_lengths([Changed(split, (longer,))], tokenizer) is None
