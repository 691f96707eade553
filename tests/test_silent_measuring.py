"""What the measuring parts do with tokenizers, models, files and answers that are not the usual ones."""

import ast, functools, io, itertools, json, re, shutil, tokenize, warnings
import numpy as np, pytest, torch
from conftest import ROOT, page
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from rcid.causal import (
    Site,
    all_positions,
    answer_logit_diff,
    attribution_effects,
    causal_effects,
    naive_effects,
    read,
    score_sites,
    sweep_flops,
)
from rcid.causal.engine import restart_error
from rcid.core import embedded
from rcid.data import (
    TASKS,
    Reader,
    build_pairs,
    load_pairs,
    name_pool,
    pack_blocks,
    pad_sentences,
    story_pairs,
    styled_problems,
)
from rcid.data.pairs import ContrastiveDataset
from rcid.data.problems import load_reasoning
from rcid.data.reasoning import encode_problems, exact_match, extract_number, number
from rcid.data.reasoning_pairs import reasoning_rows
from rcid.data.sources import read_rows
from rcid.distill.restart import exchanged, exchanged_by_hooks, kept_run
from rcid.distill.teacher_cache import SignalRequest, hidden_signals
from rcid.eval import keep_correct, perplexity, stats, task_accuracy
from rcid.eval.bench import run_bench
from rcid.eval.consistency import consistency
from rcid.eval.purity import control_labels, probe_purity
from rcid.eval.decode import greedy_decode, problem_prompts, solve
from rcid.kv.recording import Teacher
from rcid.models import train_tokenizer
from rcid.report import method_rows

# 5. layers that see a few tokens back only


def windowed(arch: str, attention: str = "sdpa", window: int = 8, first: int = 1):
    "A random model of four layers; from layer `first` on they see `window` tokens."
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        use_sliding_window=True,
        sliding_window=window,
        max_window_layers=first,
        initializer_range=0.3,
        attn_implementation=attention,
    )
    torch.manual_seed(1)
    return (
        AutoModelForCausalLM.from_config(
            AutoConfig.for_model(arch, **sizes, **({"head_dim": 8} if arch == "qwen3" else {}))
        )
        .float()
        .eval()
    )


def long_pairs(lengths=(24, 24, 19, 30)) -> ContrastiveDataset:
    "Random prompts that differ in one token; the first change comes late in some and early in others."
    g, n, length = torch.Generator().manual_seed(0), len(lengths), torch.tensor(lengths)
    mask = (torch.arange(max(lengths)) < length[:, None]).long()
    clean, row, at = (
        torch.randint(3, 300, mask.shape, generator=g) * mask,
        torch.arange(n),
        torch.tensor([5, 18, 9, 21][:n]),
    )
    corrupt = clean.clone()
    corrupt[row, at] = (clean[row, at] + 11) % 297 + 3
    some = lambda: torch.randint(3, 300, (n,), generator=g)
    return ContrastiveDataset(
        clean,
        corrupt,
        mask,
        length - 1,
        some(),
        some(),
        {"before": at - 2, "changed": at, "end": length - 1},
        {"before": False, "changed": True, "end": False},
        torch.zeros(n, dtype=torch.long),
        row[:, None],
    )


def far(got, want) -> float:
    return float((got - want).norm() / want.norm())


@pytest.fixture(
    params=[("qwen2", "sdpa", 0), ("qwen2", "eager", 2), ("qwen3", "sdpa", 2), ("qwen3", "eager", 0)], ids=str
)
def short_sighted(request):
    return windowed(request.param[0], request.param[1], first=request.param[2])


def test_the_window_is_seen_at_all(short_sighted):
    wide, pairs = windowed(short_sighted.config.model_type, first=4), long_pairs()
    wide.load_state_dict(short_sighted.state_dict())
    with torch.no_grad():
        assert (
            far(
                *(
                    m.model(input_ids=pairs.clean_ids, attention_mask=pairs.attention_mask).last_hidden_state[:2]
                    for m in (wide, short_sighted)
                )
            )
            > 0.1
        )


@pytest.mark.parametrize("everywhere", (True, False))
def test_packed_prompts_see_what_the_model_sees(short_sighted, everywhere):
    pairs, row = long_pairs(), torch.arange(4)
    sites = (Site(1, "changed"), Site(2, "end"))
    with torch.no_grad():
        got = hidden_signals(short_sighted, pairs, SignalRequest(corrupt=True, sites=sites, everywhere=everywhere))
        for ids, final, at in (
            (pairs.clean_ids, "final", "sites"),
            (pairs.corrupt_ids, "final_corrupt", "sites_corrupt"),
        ):
            out = short_sighted.model(input_ids=ids, attention_mask=pairs.attention_mask, output_hidden_states=True)
            want = torch.stack([out.hidden_states[s.layer + 1][row, pairs.key_positions[s.role]] for s in sites], 1)
            assert far(got[at], want) < 1e-5, at
            if not everywhere:
                assert far(got[final], out.last_hidden_state[row, pairs.answer_pos]) < 1e-5, final
            elif final == "final":
                assert (
                    far(got[final][pairs.attention_mask.bool()], out.last_hidden_state[pairs.attention_mask.bool()])
                    < 1e-5
                )
            else:  # from the first change on
                first = pairs.key_positions["changed"]
                for i in range(4):
                    own = out.last_hidden_state[i, first[i] : pairs.answer_pos[i] + 1]
                    assert far(got[final][i, : len(own)], own) < 1e-5


@pytest.mark.parametrize("site", (Site(0, "changed"), Site(1, "end"), Site(2, "changed")), ids=str)
def test_a_restart_sees_what_the_model_sees(short_sighted, site):
    pairs = long_pairs()
    with torch.no_grad():
        _, run = kept_run(short_sighted, pairs, SignalRequest(corrupt=True))
        assert far(exchanged(run, *site, span=2), exchanged_by_hooks(short_sighted, pairs, *site, span=2)) < 1e-5


@pytest.mark.parametrize("mode", ("noising", "denoising"))
def test_a_sweep_sees_what_the_model_sees(short_sighted, mode):
    pairs = long_pairs()
    want = naive_effects(short_sighted, pairs, mode=mode)
    assert (want.abs() > 1e-3).any()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for batch in (1, None):
            assert torch.allclose(causal_effects(short_sighted, pairs, mode=mode, batch_size=batch), want, atol=1e-4)
    assert not [w for w in said if "slow path" in str(w.message)]
    few = pairs[:2].trimmed()
    assert torch.allclose(
        causal_effects(short_sighted, few, all_positions(short_sighted, few)),
        naive_effects(short_sighted, few, all_positions(short_sighted, few)),
        atol=1e-4,
    )


def test_a_restart_sees_what_the_model_sees(short_sighted):
    pairs = long_pairs()
    assert restart_error(short_sighted, pairs.clean_ids, pairs.attention_mask, pairs.answer_pos) < 1e-4


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
@pytest.mark.parametrize("arch", ("qwen2", "qwen3"))
def test_decoding_sees_what_the_model_sees(arch, attention):
    model, pairs = windowed(arch, attention), long_pairs()
    prompts = [ids[:n] for ids, n in zip(pairs.clean_ids, pairs.attention_mask.sum(1).tolist())]

    def alone(ids):  # full forwards of one prompt
        for _ in range(12):
            ids = torch.cat([ids, model(ids[None]).logits[0, -1:].argmax(-1)])
        return ids[-12:].tolist()

    with torch.no_grad():
        want = [alone(p) for p in prompts]
    assert want == [
        model.generate(
            p[None],
            attention_mask=torch.ones_like(p[None]),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(p) :].tolist()
        for p in prompts
    ]
    assert greedy_decode(model, pairs.clean_ids, pairs.attention_mask, 12) == want


def test_latent_places_of_a_short_sighted_model():
    from rcid.kv.latent import LatentModel

    pairs = long_pairs()
    ids = pairs.clean_ids.clone()
    ids[:, 12:16] = 1  # token 1 stands in no text: a place
    model, lengths = LatentModel(windowed("qwen3"), 1, 2), pairs.attention_mask.sum(1).tolist()
    want = [
        greedy_decode(model, ids[i : i + 1, :n], pairs.attention_mask[i : i + 1, :n], 8)[0]
        for i, n in enumerate(lengths)
    ]
    assert greedy_decode(model, ids, pairs.attention_mask, 8) == want


# 4. what a prompt and its answer are to a tokenizer


def words() -> list[str]:
    "Every word that an embedded task can answer or swap."
    facts, twins, sums = embedded("factual"), embedded("winogrande"), embedded("arithmetic")
    return [
        *embedded("names")["first_names"],
        *sums["things"],
        *map(str, range(10)),
        *(w for r in facts["relations"] for f in r["facts"].items() for w in f),
        *(w for t in twins["twins"] for w in t["words"] + (t["A"] + t["B"] if t["A"] != "name" else [])),
    ]


def ends(core, before: str, after: str):
    "A tokenizer whose post-processor puts special tokens around a text."
    from tokenizers.processors import TemplateProcessing

    tokens = [(t, core.token_to_id(t)) for t in ("<|bos|>", "<|eos|>")]
    core.post_processor = TemplateProcessing(single=f"{before} $A {after}".strip(), special_tokens=tokens)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>")


@functools.lru_cache
def byte_level(prefix: bool = False) -> str:
    "GPT-2's kind, as JSON; with `prefix` a text begins with a space of the tokenizer's own."
    core = train_tokenizer(
        [f" {w}" for w in words()] * 3 + [t["text"] for t in embedded("ioi")["templates"]], vocab=4000
    ).backend_tokenizer
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    return core.to_str()


@functools.lru_cache
def sentencepiece(scheme: str) -> str:
    """LLaMA 2's kind, as JSON, texts begin with a space; `scheme`: the normaliser of old files, or Metaspace's of new
    ones."""
    specials = ["<unk>", "<|pad|>", "<|bos|>", "<|eos|>", *(f"<0x{b:02X}>" for b in range(256))]
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    letters = ["".join(chr(c) for c in range(33, 127))]
    core.train_from_iterator(
        words() * 3 + [t["text"] for t in embedded("ioi")["templates"]] + letters,
        trainers.BpeTrainer(vocab_size=4500, special_tokens=specials, show_progress=False),
    )
    if scheme == "legacy":
        core.normalizer, core.pre_tokenizer = (
            normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
            None,
        )
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return core.to_str()


KINDS = {
    "gpt2": byte_level,
    "prefix_space": lambda: byte_level(True),
    "legacy": lambda: sentencepiece("legacy"),
    "first": lambda: sentencepiece("first"),
    "always": lambda: sentencepiece("always"),
}
AROUND = {"plain": ("", ""), "bos": ("<|bos|>", ""), "eos": ("", "<|eos|>"), "both": ("<|bos|>", "<|eos|>")}
TASKS_HERE = (
    dict(task="ioi"),
    dict(task="factual"),
    dict(task="winogrande"),
    dict(task="winogrande", form="referent"),
    dict(task="arithmetic"),
    dict(task="arithmetic", form="words"),
)


@functools.lru_cache
def tokenizer_of(kind: str, around: str):
    return ends(Tokenizer.from_str(KINDS[kind]()), *AROUND[around])


def drawn(**how) -> tuple[ContrastiveDataset | None, str]:
    "Pairs, or why there are none."
    try:
        return load_pairs(**how), ""
    except ValueError as e:
        return None, str(e)


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("kind", KINDS)
def test_names_are_looked_up_inside_a_sentence(kind, around):
    usable = name_pool(tokenizer_of(kind, around))[0]
    assert len(usable) >= 120 and set(usable) == set(name_pool(tokenizer_of("gpt2", "plain"))[0])


@pytest.mark.parametrize("around", ("plain", "both"))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", TASKS_HERE, ids=lambda h: "-".join(h.values()))
def test_the_answer_is_what_follows_the_prompt(kind, around, how):
    tokenizer, one = tokenizer_of(kind, around), dict(how)
    pairs, why = drawn(**how, tokenizer=tokenizer, n=12)
    assert pairs is not None, why
    rows = TASKS[one.pop("task")](tokenizer, split="test", seed=0, **one)

    def tokens(text):  # as a prompt: without what the tokenizer appends
        read = tuple(tokenizer(text)["input_ids"])
        return read[:-1] if AROUND[around][1] else read

    found = {}  # tokens of both prompts with their answers -> the row they are
    ends = pairs.attention_mask.sum(1).tolist()
    both = [
        tuple(
            (*ids[i, :n].tolist(), int(answer[i]))
            for ids, answer in ((pairs.clean_ids, pairs.correct_token_id), (pairs.corrupt_ids, pairs.wrong_token_id))
        )
        for i, n in enumerate(ends)
    ]
    for row in itertools.islice(rows, 4000):
        key = tokens(row.clean + row.correct), tokens(row.corrupt + row.wrong)
        if key in both:
            found[key] = row
        if len(found) == 12:
            break
    for i, (clean, corrupt) in enumerate(both):
        row, n = found.get((clean, corrupt)), ends[i]
        assert row is not None, tokenizer.convert_ids_to_tokens(clean)
        assert clean[:-1] == tokens(row.clean) and int(pairs.answer_pos[i]) == n - 1 == int(
            pairs.key_positions["end"][i]
        )
        assert tokenizer.eos_token_id not in clean + corrupt and clean.count(tokenizer.bos_token_id) == bool(
            AROUND[around][0]
        )
        for role in row.modified:
            low, high = row.roles[role]
            assert tokenizer.decode([clean[pairs.key_positions[role][i]]]).strip() == row.clean[low:high]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("around, same", (("eos", "plain"), ("both", "bos")))
def test_an_appended_end_changes_nothing_that_is_measured(kind, around, same, make_model):
    with_end, without = tokenizer_of(kind, around), tokenizer_of(kind, same)
    for how in TASKS_HERE[:2]:
        (a, why), (b, _) = (drawn(**how, tokenizer=t, n=8) for t in (with_end, without))
        assert a is not None, why
        assert a.content_hash() == b.content_hash()
    problems = load_reasoning(n=6)
    for eos in (True, False):
        a, b = (encode_problems(problems, t, eos=eos) for t in (with_end, without))
        assert a.content_hash() == b.content_hash()
        assert all(problem_prompts(a, upto)[0].equal(problem_prompts(b, upto)[0]) for upto in ("prompt", "cue"))
    a, b = (build_pairs(reasoning_rows(t, steps=(1, 2), largest=9), t, 6).content_hash() for t in (with_end, without))
    assert a == b
    told = styled_problems(n=40, steps=(1,), largest=9)
    try:
        a, b = (story_pairs(told, {"x": Reader(t)})["x"].content_hash() for t in (with_end, without))
    except ValueError:
        a = b = "this tokenizer gives a digit two tokens"
    assert a == b
    for a, b in zip(
        *(pad_sentences(["Ann met Bob.", "Ann and Bob met at the store."], t, 99) for t in (with_end, without))
    ):
        assert a.equal(b)
    assert pack_blocks(["Ann met Bob."] * 9, with_end, 8).equal(pack_blocks(["Ann met Bob."] * 9, without, 8))
    model = make_model("qwen3", vocab=len(with_end))
    a, b = (perplexity(model, ["Ann and Bob met at the store.", "Bob left."], t) for t in (with_end, without))
    assert a == b


def test_a_drawn_reasoning_follows_the_question(make_model):
    seen = []
    for around in ("bos", "both"):
        tokenizer = tokenizer_of("gpt2", around)
        model = make_model("llama", vocab=len(tokenizer))
        model.generate = lambda ids, **kw: seen.append(ids.tolist()) or torch.cat([ids, ids[:, :1]], 1)
        Teacher(name="s", folder="", sample=1).read(styled_problems(n=2), model, tokenizer)
    assert seen[:2] == seen[2:] and tokenizer.eos_token_id not in seen[2][0]


# 6. generation settings


class Listening:
    "A tokenizer that keeps the tokens it was asked to decode."

    def __init__(self, tokenizer):
        self.tokenizer, self.decoded = tokenizer, []

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *args, **kw):
        return self.tokenizer(*args, **kw)

    def decode(self, ids, *args, **kw):
        self.decoded.append(torch.as_tensor(ids).tolist())
        return self.tokenizer.decode(ids, *args, **kw)


@pytest.mark.parametrize("where", ("generation_config", "config"))
def test_solve_ends_at_every_end_token(make_model, where):
    tokenizer = tokenizer_of("gpt2", "bos")
    model, data = make_model("llama", vocab=len(tokenizer)), encode_problems(load_reasoning(n=3), tokenizer)
    free = greedy_decode(model, *problem_prompts(data), 8)
    ends = [free[0][0], free[1][-1]]
    setattr(getattr(model, where), "eos_token_id", ends)
    ear = Listening(tokenizer)
    solve(model, data, ear, max_new=8)
    assert (
        ear.decoded
        == [
            text[: min([text.index(e) for e in (*ends, tokenizer.eos_token_id) if e in text], default=8)]
            for text in free
        ]
        != free
    )


def test_drawing_is_as_asked_whatever_the_models_settings(make_model):
    from copy import deepcopy

    tokenizer = tokenizer_of("gpt2", "bos")
    model, drawn = make_model("llama", vocab=len(tokenizer)), []
    leaks = (
        dict(),
        dict(top_p=0.05),
        dict(repetition_penalty=9.0),
        dict(min_p=0.5),
        dict(no_repeat_ngram_size=1),
        dict(num_beams=2),
        dict(temperature=0.01, do_sample=False, top_k=2),
        dict(min_new_tokens=9),
    )
    for settings in leaks:
        other, ear = deepcopy(model), Listening(tokenizer)
        for k, v in settings.items():
            setattr(other.generation_config, k, v)
        own, before = other.generation_config, other.generation_config.to_dict()
        Teacher(name="s", folder="", sample=3, longest=8).read(styled_problems(n=2), other, ear)
        drawn.append(ear.decoded)
        assert other.generation_config is own and own.to_dict() == before
    assert all(d == drawn[0] for d in drawn), [s for s, d in zip(leaks, drawn) if d != drawn[0]]


def test_a_benchmark_asks_the_model_plainly_and_leaves_it_as_it_was(make_model, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    tokenizer, asked = tokenizer_of("gpt2", "bos"), []
    tokenizer = tokenizer.__class__(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<|bos|>", eos_token="<|eos|>"
    )  # without a pad token
    model = make_model("llama", vocab=len(tokenizer)).train()
    model.generation_config.repetition_penalty, model.generation_config.eos_token_id = 9.0, [5, 6]
    own, before = model.generation_config, model.generation_config.to_dict()

    def evaluate(lm, **kw):
        c = lm.model.generation_config
        asked.append((c.repetition_penalty, {5, 6} <= set(c.eos_token_id)))
        return {"results": {}, "n-samples": {}}

    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluate)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **kw: None)  # indexes thousands of files
    run_bench(model, tokenizer, ["gsm8k"], "hub")
    assert asked == [(None, True)] and model.generation_config is own and own.to_dict() == before
    assert tokenizer.pad_token_id is None and model.training


# 21. answers as people write them, and nothing to measure


@pytest.mark.parametrize(
    "said, value",
    [
        ("−3", "-3"),
        ("–3", "-3"),
        ("‑3", "-3"),
        ("－3", "-3"),
        ("-3", "-3"),
        ("-$3", "-3"),
        ("$-3", "-3"),
        ("−$3.50", "-3.5"),
        ("３", "3"),
        ("１，０００", "1000"),
        ("1,000", "1000"),
        ("$1,000", "1000"),
        ("1,000.50", "1000.5"),
        ("1, 2 and 3", "1"),
        ("1,2", "1"),
        ("3.0", "3"),
        ("3.", "3"),
        ("0.50", "0.5"),
        (".5", "0.5"),
        ("−.5", "-0.5"),
        ("12−5", "12"),
        ("2–3", "2"),
        ("−0", "0"),
    ],
)
def test_a_number_is_read_as_it_is_written(said, value):
    assert extract_number(f"So: 77. The answer is: {said}.") == value and extract_number(f"#### {said}") == value
    assert exact_match([f"The answer is: {said}"], [value]) == 1 and exact_match(["The answer is: 41"], [said]) == 0


@pytest.mark.parametrize(
    "written, value",
    [
        ("−3", "-3"),
        ("–3", "-3"),
        ("１，０００", "1000"),
        ("$1,000.0", "1000"),
        ("3.0", "3"),
        ("3.", "3"),
        (" 7 ", "7"),
        ("−0", "0"),
        ("x", None),
        ("", None),
    ],
)
def test_a_gold_answer_is_read_like_a_given_one(written, value):
    assert number(written) == value
    if value:
        assert exact_match([f"The answer is: {value}"], [written]) == 1


def test_dashes_between_numbers_are_no_sign():
    assert [extract_number(t) for t in ("it takes 2–3", "so 12−5 makes 7", "12 − 5", "she has—5")] == [
        "3",
        "7",
        "5",
        "5",
    ]


def refusal(call) -> str:
    "What a call says when it refuses; anything but a ValueError is no refusal."
    try:
        call()
    except Exception as e:
        return f"{e}" if type(e) is ValueError else f"[{type(e).__name__}] {e}"
    return "[nothing]"


def test_nothing_to_measure_is_said_in_one_line(make_model):
    model, pairs = make_model("qwen3"), long_pairs()
    none, tokenizer, ids = pairs[:0], tokenizer_of("gpt2", "plain"), torch.zeros(0, 4, dtype=torch.long)
    calls = {
        "no texts": lambda: perplexity(model, []),
        "leave it out": lambda: perplexity(model, ["Ann met Bob.", ""], tokenizer),
        "text 0": lambda: perplexity(model, torch.tensor([5])),
        "no pairs": lambda: task_accuracy(model, none),
        "no pairs given": lambda: causal_effects(model, none),
        "no  pairs given": lambda: naive_effects(model, none),
        "no pairs  given": lambda: answer_logit_diff(model, none),
        "no   pairs given": lambda: attribution_effects(model, none),
        "no pairs   given": lambda: score_sites(model, none, "norm"),
        "no  pairs  given": lambda: sweep_flops(model, none),
        "hold no tokens": lambda: read(model, ids, [Site(0)]),
        "no sites given": lambda: causal_effects(model, pairs, []),
        "no sites  given": lambda: naive_effects(model, pairs, []),
        "keep_correct: no pairs": lambda: keep_correct(model, none),
        "and a site": lambda: consistency(*[np.zeros((4, 0))] * 2, *[(np.ones(4), np.zeros(4))] * 2),
        "no rows": lambda: stats.cluster_bootstrap(lambda w: w.mean(1), []),
        "resamples": lambda: stats.cluster_bootstrap(lambda w: w.mean(1), [1, 2], n=0),
        "at least 2 values": lambda: stats.lin_concordance([1.0], [2.0]),
        "at least 2  values": lambda: stats.lin_concordance([], []),
        "at least one prompt": lambda: greedy_decode(model, ids, ids, 2),
        "no sentences": lambda: pad_sentences([], tokenizer, 4),
        "n=0 pairs": lambda: load_pairs("ioi", tokenizer, n=0),
    }
    said = {words: refusal(call) for words, call in calls.items()}
    assert not {w: s for w, s in said.items() if " ".join(w.split()) not in s or "\n" in s}
    assert (
        len(none.trimmed()) == 0
        and np.isnan(stats.fisher_mean([]))
        and len(stats.holm([])) == len(stats.benjamini_hochberg([])) == 0
    )
    assert stats.paired_test([1.0], [2.0]).n == 1 and np.isnan(stats.paired_test([1.0], [2.0]).p_t)


# 15. rows of files

STRANGE = "\u2028\u2029\x85\x1c\x0b\x0c"


def test_a_row_is_a_line_whatever_it_says(tmp_path, monkeypatch):
    rows = [dict(question=f"How {c} many?", answer=f"2 + 3 = <<2+3=5>>5 {c}\n#### 5") for c in STRANGE] + [
        dict(question="Last?", answer="1 + 1 = 2\n#### 2")
    ]
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    for end, name in (("", "whole"), ("\n", "ended")):
        folder = tmp_path / name / "gsm8k"
        folder.mkdir(parents=True)
        (folder / "train.jsonl").write_text("", encoding="utf-8")
        (folder / "test.jsonl").write_bytes((text.rstrip("\n") + end).encode())
        (folder / "PROVENANCE.jsonl").write_text(
            "".join(
                json.dumps(dict(file=f.name, bytes=f.stat().st_size, note=STRANGE), ensure_ascii=False) + "\n"
                for f in (folder / "train.jsonl", folder / "test.jsonl")
            ),
            encoding="utf-8",
        )
        monkeypatch.setenv("RCID_DATA_DIR", str(tmp_path / name))
        said = refusal(lambda: read_rows("gsm8k", "test.jsonl"))
        assert said == "[nothing]"
        assert read_rows("gsm8k", "test.jsonl") == rows and read_rows("gsm8k", "train.jsonl") == []
    (folder / "test.jsonl").write_bytes(text.encode()[:-20])
    assert "truncated or was changed" in refusal(lambda: read_rows("gsm8k", "test.jsonl"))
    (folder / "PROVENANCE.jsonl").unlink()
    assert f"line {len(rows)} is not valid JSON" in refusal(lambda: read_rows("gsm8k", "test.jsonl"))


# 24. both directions of an effect are shown


def stage(name: str, folder, monkeypatch, **parameters) -> dict:
    "The variables that a stage's notebook leaves when its code cells run in `folder`."
    monkeypatch.setenv("RCID_ROOT", str(folder)), monkeypatch.chdir(folder)
    cells, names = json.loads((ROOT / "nbs" / "experiments" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"], {}
    for i, cell in enumerate(c for c in cells if c["cell_type"] == "code"):
        try:
            exec(compile("".join(cell["source"]), f"{name}, code cell {i}", "exec"), names)
        except RuntimeError as e:
            assert "pilot of the required family" in str(e)  # a random teacher passes no gate
        if i == 0:
            names.update(parameters)
    return names


@pytest.fixture
def begun(tmp_path, make_model, tokenizers, monkeypatch):
    "A workspace with random models and pairs, as the stages before `pilot` and `sites` leave them."
    from rcid.core import load_params, write_json
    from rcid.data import corruptions, load_kinds, save_pairs
    from rcid.models import save_model

    for file in ("params.yaml", "dvc.yaml"):
        shutil.copyfile(ROOT / file, tmp_path / file)
    (tmp_path / "data").symlink_to(ROOT / "data")
    for who, layers in (("teacher", 4), ("student", 2)):
        save_model(
            make_model("qwen3", layers=layers), tokenizers["qwen3"], tmp_path / "artifacts" / "models" / "qwen3" / who
        )
    classic, *others = kinds = [corruptions("ioi")[0], *load_params().data.corruptions["ioi"]]
    for split in ("train", "val", "test"):
        pairs = load_kinds("ioi", tokenizers["qwen3"], kinds, split=split, n=12)
        folder = tmp_path / "artifacts" / "pairs" / "qwen3" / "ioi"
        save_pairs(pairs[classic], folder / split)
        for kind in others:
            save_pairs(pairs[kind], folder / f"{split}@{kind}")
    write_json(tmp_path / "metrics" / "models" / "qwen3.json", dict(student_layers=[1, 3]))
    return tmp_path


def table(values) -> torch.Tensor:
    return torch.tensor([[float("nan") if v is None else v for v in row] for row in values])


@pytest.mark.parametrize("name, key, split", (("pilot", "effects", "val"), ("sites", "score", "train")))
def test_the_stages_write_and_draw_both_directions(begun, monkeypatch, name, key, split):
    left = stage(name, begun, monkeypatch)
    file = begun / "metrics" / name / ("qwen3.json" if name == "pilot" else "qwen3-ioi.json")
    wrote = json.loads(file.read_text())
    assert "denoising" in wrote, sorted(wrote)
    pairs = left["pairs"] if name == "pilot" else left["few"]
    back = pairs if name == "pilot" else pairs[:len(pairs) // 2]       # the way back is only looked at
    ways = {
        k: causal_effects(left["teacher"], some, mode=mode).abs().mean(0).view(4, -1)
        for k, mode, some in ((key, "noising", pairs), ("denoising", "denoising", back))
    }
    for k, want in ways.items():
        got = table(wrote[k])
        assert (
            got.shape == want.shape
            and torch.allclose(got[~got.isnan()], want[~got.isnan()], atol=1e-5)
            and (want[got.isnan()] == 0).logical_or(torch.tensor(name == "sites")).all()
        ), k
    assert table(wrote[key]).isnan().equal(table(wrote["denoising"]).isnan()) and not torch.allclose(
        *ways.values(), atol=1e-4
    )
    if name == "pilot":
        assert [a.get_title("left").split()[-1] for a in left["figure"].axes if a.get_title("left")] == [
            "noising",
            "denoising",
        ]


def test_the_sites_table_shows_both_directions():
    sites = dict(
        roles=["s2", "end"],
        score=[[3.0, 0.0], [1.0, 2.0]],
        denoising=[[2.5, 0.0], [1.0, 1.25]],
        selected=[[0, "s2"]],
        held_out=[[1, "end"]],
        maps={"proportional": {"0": 0, "1": 1}},
    )
    sites_table = page("paper").sites_table
    lines = sites_table({"llama": sites}, "proportional").split("\n")
    assert (
        any("denoising" in l for l in lines)
        and any("3.00 & 2.50 &" in l for l in lines)
        and any("2.00 & 1.25 &" in l for l in lines)
    )
    assert any(
        "3.00 & -- &" in l
        for l in sites_table({"llama": {k: v for k, v in sites.items() if k != "denoising"}}, "proportional").split(
            "\n"
        )
    )  # metrics of an earlier run


def test_the_companions_show_the_consistency_of_both_directions():
    rng = np.random.default_rng(0)
    effects, ld = rng.normal(size=(12, 3)), (np.ones(12), -np.ones(12))
    report = lambda n: consistency(
        effects[:, :n], effects[:, :n] + rng.normal(size=(12, n)), ld, ld, n_boot=20, n_shuffles=20
    ).to_dict()
    back = report(3)  # two sites trained on, one held out
    cell = dict(
        family="llama",
        task="ioi",
        method="rcid",
        seed=1,
        accuracy=dict(accuracy=1.0),
        consistency=dict(trained=report(2), held_out=report(1)),
        denoising=back,
    )
    row = method_rows([cell])[0]
    assert row.get("denoising") == pytest.approx(
        {"trained": float(np.tanh(np.arctanh(back["pearson"][:2]).mean())), "held_out": back["pearson"][2]}
    ), row.keys()
    table = page("exp2").companions_table([row])
    assert f"{back['pearson'][2]:.2f}".replace("-", "$-") in table and "denois." in table
    assert method_rows([{k: v for k, v in cell.items() if k != "denoising"}])[0]["denoising"] == {
        "trained": None,
        "held_out": None,
    }


def test_a_seal_holds_whatever_a_file_is_called(tmp_path):
    from rcid.core.paths import broken_checksums, write_checksums

    (tmp_path / f"a{STRANGE}b.txt").write_text("x")
    write_checksums(tmp_path)
    assert broken_checksums(tmp_path) == []
    (tmp_path / f"a{STRANGE}b.txt").write_text("y")
    assert broken_checksums(tmp_path) == [f"a{STRANGE}b.txt"]


# 27. what selectivity compares


def test_selectivity_is_of_unseen_entities_and_the_controls_chance_is_by_construction():
    rng, n, people = np.random.default_rng(0), 600, 40
    entities, y = np.stack([rng.integers(people, size=n), people + rng.integers(2, size=n)], 1), rng.integers(2, size=n)
    who, task = np.eye(people)[entities[:, 0]] * 3, (2 * y - 1)[:, None] * np.ones(
        (1, people)
    )  # who it is; the answer, for everybody alike
    own = rng.choice([-1, 1], people)  # the answer in a code of everybody's own: only memory reads it
    private = who * ((2 * y - 1)[:, None] * own[None])
    features = np.stack([who, task, private]) + 0.01 * rng.normal(size=(3, n, people))
    r = probe_purity(
        features, features, y, entities[:, :1], np.zeros(n, int), sites=["who", "task", "private"], splits=6, n_boot=200
    )
    x = {k: np.array(v) for k, v in r.h.items()}
    assert (
        x["control"][0] > 0.95 and 0.3 < x["control_unseen"].min() and x["control_unseen"].max() < 0.6
    )  # known types are remembered, unseen ones guessed, whatever the features say
    assert x["accuracy"][1] > 0.99 and x["accuracy_seen"][2] > 0.95 and abs(x["accuracy"][2] - 0.5) < 0.16
    assert np.allclose(
        x["selectivity"], x["accuracy"] - x["control"]
    )  # the stricter one: unseen entities against known types
    assert "selectivity_seen" in x and np.allclose(
        x["selectivity_seen"], x["accuracy_seen"] - x["control"]
    )  # Hewitt & Liang's: the same rows
    assert x["selectivity"][2] < x["selectivity_seen"][2] - 0.3 and "unseen" in probe_purity.__doc__


def test_control_labels_are_one_per_type_and_as_frequent_as_the_task():
    rng = np.random.default_rng(1)
    types, y = np.repeat(np.arange(60), 5), (np.arange(300) < 75).astype(int)
    for seed in range(5):
        labels = control_labels(types, y, np.random.default_rng(seed))
        assert all(len(set(labels[types == t])) == 1 for t in range(60)) and np.bincount(labels).tolist() == [225, 75]
    many = np.array([control_labels(types, y, rng)[::5] for _ in range(400)])
    assert abs(many.mean(0) - 0.25).max() < 0.1  # and which type has which is chance


# 25. what the repository cites, it has

NAMED = re.compile(r"(?<![\w/.*<{-])((?:\.{0,2}/)*(?:[\w-]+/)*[\w-]+\.(?:md|ipynb|py))\b(?![\w/*{])")


def said(name: str, text: str) -> list[str]:
    "What a file says rather than does: markdown, comments and docstrings."
    if name.endswith((".md", ".tex")):
        return text.splitlines()
    cells = (
        [("code", text)]
        if name.endswith(".py")
        else [(c["cell_type"], "".join(c["source"])) for c in json.loads(text)["cells"]]
    )
    out = [line for kind, source in cells if kind != "code" for line in source.splitlines()]
    for source in (s for kind, s in cells if kind == "code"):
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue  # a magic
        out += [t.string for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT]
        has_docstring = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        out += [d for node in ast.walk(tree) if isinstance(node, has_docstring) and (d := ast.get_docstring(node))]
    return out


def test_every_cited_file_is_in_the_repository(tracked):
    absent = []
    for name in tracked:
        if not name.endswith((".md", ".py", ".ipynb", ".tex")) or name.startswith("rcid/_modidx"):
            continue
        text = (ROOT / name).read_text(encoding="utf-8")
        if name.endswith(".tex"): text = text.replace(r"\_", "_")
        for line in said(name, text):
            for cited in NAMED.findall(line):
                tail = re.sub(r"^(\.{0,2}/)+", "", cited)
                if tail.startswith("runs/") or "NAME" in tail:
                    continue  # made by a run; any name
                if not any(f == tail or f.endswith("/" + tail) for f in tracked):
                    absent.append(f"{name} cites {cited}")
    assert not absent
    assert NAMED.findall(
        "METHOD.md section 3, nbs/03_causal/01_effects.ipynb and [x](../a/02_b.ipynb), a.b/<x>.py"
    ) == ["METHOD.md", "nbs/03_causal/01_effects.ipynb", "../a/02_b.ipynb"]
