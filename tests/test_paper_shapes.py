"""What the paper's own models ask: a head with more padding rows than the other's, more directions than the problems
of a fit, a public set of which some problems have no equation."""

import json, warnings
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace
import pytest, torch
from conftest import ROOT
from rcid.core import load_params
from rcid.data.problems import load_reasoning
from rcid.data.reasoning import encode_problems, word_problems
from rcid.distill import DistillConfig, distill
from rcid.eval import perplexity
from rcid.kv import KV_METHODS, KVObjective, LatentModel
from rcid.models import common_vocab, load_model, train_tokenizer

WIDTH = 48


@pytest.fixture(scope="module")
def words():
    problems = list(islice(word_problems("train", style="equation", steps=(2,), operations="+-", largest=9), 90))
    tokenizer = train_tokenizer([p.text for p in problems], vocab=300)
    return tokenizer, encode_problems(problems, tokenizer)


def models(tokenizer, more_t: int = 0, more_s: int = 0):
    "A teacher and a student whose heads have so many rows more than the tokenizer has tokens."
    sizes = dict(layers=2, heads=4, d_mlp=48)
    teacher, _ = load_model(
        dict(arch="qwen2", vocab=len(tokenizer) + more_t, d_model=64, kv_heads=2, seed=1) | sizes, dtype="float32",
        device="cpu"
    )
    student, _ = load_model(
        dict(arch="qwen2", vocab=len(tokenizer) + more_s, d_model=WIDTH, kv_heads=2, seed=2) | sizes, dtype="float32",
        device="cpu"
    )
    return teacher, LatentModel(student, tokenizer.bos_token_id, 1)


# vocabularies

def heads(monkeypatch, v_t: int, v_s: int) -> tuple:
    "Two models of which only the number of logits is known."
    monkeypatch.setattr("rcid.models.adapters.get_adapter", lambda v: SimpleNamespace(vocab=v))
    return v_t, v_s


@pytest.mark.parametrize("sizes", ((152064, 151936), (151936, 152064), (151936, 151936)))
def test_the_common_part_of_padded_heads(monkeypatch, sizes):
    "Qwen2-7B has 152,064 logits and the 1.5B 151,936, of which their tokenizer names 151,665."
    assert common_vocab(*heads(monkeypatch, *sizes), ids=torch.tensor([0, 151645])) == 151936


def test_a_head_without_a_token_of_the_data_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="152064 logits, student 151936, and the data hold token 151936"):
        common_vocab(*heads(monkeypatch, 152064, 151936), ids=torch.tensor([151936]))
    with pytest.raises(ValueError, match="differ by more than padding"):
        common_vocab(*heads(monkeypatch, 152064, 128256), ids=torch.tensor([5]))


@pytest.mark.parametrize("name", ("latent_kd", "kava", "kv_structured"))
def test_padding_rows_change_nothing(words, name):
    "A teacher with 128 rows of padding teaches as without them: they are in no softmax."
    tokenizer, data = words
    config = DistillConfig(steps=2, batch=4, lr=1e-3, log_every=1, seed=0)
    method = replace(KV_METHODS[name], fit_steps=2, latents=3)
    curves = []
    for more in (0, 128):
        teacher, student = models(tokenizer, more)
        if more:
            first, _ = models(tokenizer)
            with torch.no_grad(): teacher.model.embed_tokens.weight[:len(tokenizer)] = first.model.embed_tokens.weight
            rest = {k: v for k, v in first.state_dict().items() if "embed" not in k and "lm_head" not in k}
            teacher.load_state_dict(rest, strict=False)
        curves.append(distill(student, teacher, data[:64], method, config).history)
    for a, b in zip(*curves, strict=True): assert a == pytest.approx(b, rel=1e-5)


# CODI's maps

def maps_of(words, n: int):
    "CODI's maps with `n` problems, and what was warned of."
    tokenizer, data = words
    teacher, student = models(tokenizer)
    method = replace(KV_METHODS["kava"], fit_steps=0, latents=3, fit_rows=16)
    objective = KVObjective(method, student, teacher, data[:n], DistillConfig(batch=4, seed=0))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        state = objective.start()
    return state.codi_w, [str(w.message) for w in said if "CODI" in str(w.message)], objective


def test_as_many_problems_as_a_map_needs(words):
    "16 problems fit the projector; the map has 48 directions and takes 60."
    w, said, objective = maps_of(words, 90)
    assert not said and torch.allclose(w.mT @ w, torch.eye(WIDTH).expand(len(w), -1, -1), atol=1e-4)
    rows = [x for x in range(60)]
    theirs = objective.of_teacher(rows)[1]["hidden"]
    assert torch.allclose(objective.start().codi_mean_t, theirs.mean(0), atol=1e-5)


def test_a_map_of_fewer_directions_says_so(words):
    w, (said,), _ = maps_of(words, 32)
    assert "32 problems determine 31 of 48 directions" in said and "more than 48 problems" in said
    singular = torch.linalg.svdvals(w)                                                      # (layer, d_s)
    assert torch.allclose(singular[:, :31], torch.ones(len(w), 31), atol=1e-4) and singular[:, 31:].abs().max() < 1e-4


# public problems

def test_all_problems_that_have_an_equation(monkeypatch):
    rows = [dict(question=f"What is {i} + 1?", answer=f"It is <<{i}+1={i+1}>>{i+1}.\n#### {i+1}") for i in range(20)]
    for row in rows[::5]: row["answer"] = row["answer"].replace("<<", "").replace(">>", " ")    # no equation marked
    monkeypatch.setattr("rcid.data.problems.read_rows", lambda *_: rows)
    assert len(load_reasoning("gsm8k", "test", None, 0, "path", "equation")) == 16
    assert len(load_reasoning("gsm8k", "test", None, 0, "path", "words")) == 20
    with pytest.raises(ValueError, match="only 16 problems in split 'test', 20 asked for"):
        load_reasoning("gsm8k", "test", 20, 0, "path", "equation")


def test_the_papers_scale_asks_for_all_of_them(tmp_path):
    from rcid.pipeline.workspace import compose_params
    compose_params(tmp_path/"params.yaml", "scale=a100")
    data = load_params(tmp_path/"params.yaml").kv.data
    assert data.dataset == "gsm8k" and data.n_test is None


# records

@pytest.mark.parametrize("page", ("models", "heal", "kv_models", "kv_base"))
def test_every_page_that_fetches_a_model_says_where_it_is_from(page):
    cells = json.loads((ROOT/"nbs"/"experiments"/f"{page}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    assert "origin_of(" in code and "origin=origin" in code.partition("write_json(")[2]


def test_windows_begin_as_the_tokenizer_begins_a_text(tokenizers, make_model):
    "With a BOS every window has one; where a tokenizer puts none, its ids are read as they are."
    for arch in ("llama", "qwen3"):
        tokenizer, model = tokenizers[arch], make_model(arch, layers=1)
        ids = torch.tensor(tokenizer("Mary and John went to the store. " * 8, add_special_tokens=False)["input_ids"])
        plain, begun = (perplexity(model, ids, t, window=16, stride=8) for t in (None, tokenizer))
        assert (plain == begun) == (arch == "qwen3")
        already = torch.cat([torch.tensor([tokenizer.bos_token_id]), ids[:15]])
        if arch == "llama": assert perplexity(model, already, tokenizer) == perplexity(model, already)   # never twice
