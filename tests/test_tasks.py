"""Factual probing, WinoGrande and arithmetic: one word differs, answers are right, splits share nothing; also on real
data, where they are."""

import functools, itertools, json, os, re
import pytest, torch
from conftest import real
from rcid.core import embedded
from rcid.data import TASKS, check_disjoint, load_pairs, relations_of
from rcid.data import arithmetic, factual, winogrande
from rcid.data.names import SPLITS, split_of
from rcid.data.pairs import build_pairs
from rcid.eval import both_right, keep_correct, task_accuracy

FORMS = {
    "factual": dict(task="factual"),
    "partial": dict(task="winogrande"),
    "referent": dict(task="winogrande", form="referent"),
    "symbolic": dict(task="arithmetic"),
    "words": dict(task="arithmetic", form="words"),
}
MODIFIED = {"factual": "subject", "partial": "referent", "referent": "word", "symbolic": "digit", "words": "digit"}
VARIANTS = [
    (f, v)
    for f, o in FORMS.items()
    for v in {"factual": factual, "winogrande": winogrande, "arithmetic": arithmetic}[o["task"]].VARIANTS
    if (f, v) != ("words", "ood_shots")
]
needs_data = pytest.mark.skipif(
    not os.environ.get("RCID_DATA_DIR"), reason="RCID_DATA_DIR is not set: this test of a public dataset needs it"
)


@pytest.fixture(scope="module")
def small() -> dict:
    "A small tokenizer by kind (with and without BOS) that knows the words of every embedded table."
    from rcid.models import train_tokenizer
    facts, twins, sums = embedded("factual"), embedded("winogrande"), embedded("arithmetic")
    words = [
        *embedded("names")["first_names"],
        *sums["things"],
        *(w for r in facts["relations"] for f in r["facts"].items() for w in f),
        *(w for t in twins["twins"] for w in t["words"] + (t["A"] + t["B"] if t["A"] != "name" else [])),
    ]
    texts = (
        [t for r in facts["relations"] for t in r["templates"] + r["ood_templates"]]
        + [t["text"] for t in twins["twins"]]
        + twins["prefixes"]
        + [t["text"] for t in sums["words"]]
    )
    return {
        bos: train_tokenizer(
            [f" {w}" for w in words] * 3 + texts + ["0 1 2 3 4 5 6 7 8 9 + - ="] * 3, vocab=5000, bos=bos
        )
        for bos in (False, True)
    }


@functools.lru_cache
def real_tokenizer(folder):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(params=["plain", "bos", "SmolLM2", "qwen3", "llama3"])
def tokenizer(request, small):
    if request.param in ("plain", "bos"): return small[request.param == "bos"]
    return real_tokenizer(real(request.param))


@pytest.fixture(params=["SmolLM2", "qwen3", "llama3"])
def vocabulary(request):
    "A real tokenizer: public facts and twins have few words that a small one knows."
    return real_tokenizer(real(request.param))


def said(tokenizer, p, role, i, ids=None):
    return tokenizer.decode((p.clean_ids if ids is None else ids)[i, p.key_positions[role][i]]).strip()


def text(tokenizer, ids, p, i):
    return tokenizer.decode(ids[i, : int(p.attention_mask[i].sum())], skip_special_tokens=True)


# what holds for every task

@pytest.mark.parametrize("form, variant", VARIANTS)
def test_one_word_differs_and_answers_are_tokens(tokenizer, form, variant):
    p = load_pairs(**FORMS[form], tokenizer=tokenizer, n=40, variant=variant)
    assert len(p) == 40 and [r for r, m in p.is_modified.items() if m] == [MODIFIED[form]]
    differ = p.clean_ids != p.corrupt_ids
    assert differ.sum(1).eq(1).all() and differ[torch.arange(40), p.key_positions[MODIFIED[form]]].all()
    assert (
        (p.correct_token_id != p.wrong_token_id).all()
        and p.answer_pos.equal(p.attention_mask.sum(1) - 1)
        and p.key_positions["end"].equal(p.answer_pos)
    )
    for role, at in p.key_positions.items(): assert (at <= p.answer_pos).all() and (at >= 0).all(), role
    # no pair twice
    assert len({(*c, *d) for c, d in zip(p.clean_ids.tolist(), p.corrupt_ids.tolist())}) == 40
    again = load_pairs(**FORMS[form], tokenizer=tokenizer, n=40, variant=variant)
    assert (
        again.content_hash()
        == p.content_hash()
        != load_pairs(**FORMS[form], tokenizer=tokenizer, n=40, variant=variant, seed=1).content_hash()
    )


@pytest.mark.parametrize("form", FORMS)
def test_splits_share_no_entity(tokenizer, form):
    splits = {s: load_pairs(**FORMS[form], tokenizer=tokenizer, split=s, n=40) for s in SPLITS}
    check_disjoint(**splits)
    with pytest.raises(ValueError, match="splits test and again share"):
        check_disjoint(test=splits["test"], again=splits["test"][:2])


@pytest.mark.parametrize("form", FORMS)
def test_enough_pairs_in_every_split(small, form):
    for s, n in (("train", 256), ("val", 32), ("test", 128)):
        assert len(load_pairs(**FORMS[form], tokenizer=small[False], split=s, n=n)) == n


# what each task says

def test_factual_answers_are_the_objects(tokenizer):
    table = relations_of()
    p = load_pairs("factual", tokenizer, n=100)
    for i in range(100):
        r = table[int(p.template_id[i])//1000]
        x, y = (said(tokenizer, p, "subject", i, ids) for ids in (p.clean_ids, p.corrupt_ids))
        assert [r.facts[x], r.facts[y]] == [
            tokenizer.decode(a[i]).strip() for a in (p.correct_token_id, p.wrong_token_id)
        ]
        assert (
            p.key_positions["subject"][i] < p.key_positions["relation"][i] < p.answer_pos[i]
            and split_of(x) == split_of(y) == "test"
        )
    assert len({int(t)//1000 for t in p.template_id}) >= 8


def test_factual_table_is_large_enough():
    table = relations_of()
    assert (
        len([r for r in table if not r.ood]) >= 8
        and len({s for r in table for s in r.facts}) >= 60
        and len([r for r in table if r.ood]) >= 2
    )
    for r in table:
        assert (
            len(set(r.templates) | set(r.ood_templates)) == len(r.templates) + len(r.ood_templates) >= 4
            and len(set(r.facts.values())) >= 3
        )
        for t in r.templates + r.ood_templates:
            assert t.index("{X}") < t.index("[") and not re.search(r"\]\W*$", t) and not t.startswith("{X}")


def test_factual_variants_hold_out_what_they_say(small):
    get = lambda v, **kw: load_pairs("factual", small[False], n=60, variant=v, **kw)
    table, ids = relations_of(), lambda p: set(p.entity_ids.flatten().tolist())
    assert {table[t//1000].ood for t in get("ood_relations").template_id.tolist()} == {True}
    assert not ids(get("ood_subjects")) & set.union(*(ids(get("id", split=s)) for s in SPLITS))
    assert all(t % 1000 >= 500 for t in get("ood_templates").template_id.tolist()) and not any(
        t % 1000 >= 500 for t in get("id").template_id.tolist()
    )
    assert {table[t // 1000].name for t in get("id", relations=["capital", "past"]).template_id.tolist()} == {
        "capital",
        "past",
    }


@pytest.mark.parametrize("form", ("partial", "referent"))
def test_twins_answer_for_themselves(tokenizer, form):
    table = embedded("winogrande")["twins"]
    p = load_pairs("winogrande", tokenizer, n=60, form=form)
    for i in range(60):
        t = table[int(p.template_id[i])]
        answers = [tokenizer.decode(a[i]).strip() for a in (p.correct_token_id, p.wrong_token_id)]
        a, b = ((x if isinstance(x, list) else embedded("names")["first_names"]) for x in (t["A"], t["B"]))
        if form == "partial":                              # the clean referent is of the kind that its word goes with
            r, q = said(tokenizer, p, "referent", i), said(tokenizer, p, "referent", i, p.corrupt_ids)
            assert (
                sorted(answers) == sorted(t["words"])
                and r in (a, b)[t["words"].index(answers[0])]
                and q in (a, b)[t["words"].index(answers[1])]
            )
            assert said(tokenizer, p, "other", i) == q or tokenizer.decode(p.clean_ids[i]).count(q) == 1
        else:
            word = said(tokenizer, p, "word", i)
            assert (
                answers[0] in (a, b)[t["words"].index(word)]
                and answers[1] in (a, b)[1 - t["words"].index(word)]
                and "_" in said(tokenizer, p, "blank", i)
            )


def test_sums_are_right(tokenizer):
    for form in ("symbolic", "words"):
        p = load_pairs("arithmetic", tokenizer, n=60, form=form)
        for i in range(60):
            for ids, answer in ((p.clean_ids, p.correct_token_id), (p.corrupt_ids, p.wrong_token_id)):
                s = text(tokenizer, ids, p, i)
                # the space is the prompt's or the number's, as the tokenizer has it
                solved = s + tokenizer.decode(answer[i])
                digits = [int(d) for d in re.findall(r"\d", solved)]
                assert solved[-2] == " " and len(digits) % 3 == 0
                minus = "gives away" in s or "took" in s
                for a, b, c in zip(digits[::3], digits[1::3], digits[2::3]): assert c == (a - b if minus else a + b)


# the teacher filter

def test_filter_keeps_what_is_right_in_both_directions(models, pairs, tokenizers):
    model, p = models["qwen3"], load_pairs("ioi", tokenizers["qwen3"], n=120)
    right = both_right(model, p)
    assert abs(float(right.float().mean()) - task_accuracy(model, p)["both"]) < 1e-6 and both_right(
        model, p, batch_size=7
    ).equal(right)
    if right.any():
        kept, counts = keep_correct(model, p)
        assert (
            counts == dict(kept=int(right.sum()), dropped=int((~right).sum()))
            and len(kept) == counts["kept"]
            and task_accuracy(model, kept)["both"] == 1
        )
        assert (
            kept.clean_ids.equal(p.clean_ids[right])
            and kept.dropped["model is not right in both directions"] == counts["dropped"]
        )
    with pytest.raises(
        ValueError, match=r"task ioi: the model is right in both directions on \d+ of 120 pairs, 121 are needed"
    ):
        keep_correct(model, p, n=121)


# bad input

def one_line(kind, words, f, *args, **kw):
    with pytest.raises(kind, match=words) as e: f(*args, **kw)
    assert "\n" not in str(e.value)


def test_bad_options(small):
    get = lambda task, **kw: load_pairs(task, small[False], n=5, **kw)
    one_line(ValueError, "task 'ioi' has no source 'path': only 'embedded'", get, "ioi", source="path")
    one_line(ValueError, "task 'arithmetic' has no source 'hub'", get, "arithmetic", source="hub")
    for task in ("factual", "winogrande"):
        one_line(ValueError, f"task '{task}' has no source 'web'", get, task, source="web")
    for task in TASKS: one_line(ValueError, r"has no options \['colour'\]: there are ", get, task, colour="red")
    for task in ("factual", "winogrande", "arithmetic"):
        one_line(ValueError, "unknown split 'dev'", get, task, split="dev")
        one_line(ValueError, "unknown .* variant 'harder'", get, task, variant="harder")
    one_line(ValueError, "unknown factual dataset 'wiki'", get, "factual", source="path", dataset="wiki")
    one_line(ValueError, r"unknown relations \['cousin'\]", get, "factual", relations=["cousin"])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RCID_DATA_DIR", str(tmp_path))
    return tmp_path


def test_no_folder(small, monkeypatch, folder):
    get = lambda **kw: load_pairs(tokenizer=small[False], source="path", **kw)
    for dataset in ("lre", "counterfact", "lama"):
        one_line(FileNotFoundError, "holds no dataset", get, task="factual", dataset=dataset)
    one_line(FileNotFoundError, "holds no dataset 'winogrande'", get, task="winogrande")
    (folder/"winogrande").mkdir(); (folder/"lre_relations").mkdir()
    one_line(FileNotFoundError, "the winogrande folder is incomplete", get, task="winogrande")
    one_line(FileNotFoundError, "the lre_relations folder is incomplete", get, task="factual")
    monkeypatch.delenv("RCID_DATA_DIR")
    one_line(FileNotFoundError, "needs RCID_DATA_DIR", get, task="factual")


def toy_relation(folder, subjects, objects):
    (folder/"lre_relations").mkdir(exist_ok=True)
    (folder / "lre_relations" / "toy.json").write_text(
        json.dumps(
            dict(
                name="capital",
                prompt_templates=["The capital of {} is"],
                prompt_templates_zs=["The seat of power in {} is"],
                samples=[dict(subject=s, object=o) for s, o in zip(subjects, objects)],
            )
        )
    )


def test_relation_without_a_valid_pair(small, folder):
    facts = {
        s: o for s, o in relations_of()[0].facts.items() if split_of(s) == "test" and split_of(f"rare {s}") != "val"
    }
    assert factual._relation("capital", [], [], []).ood is False
    get = lambda **kw: load_pairs("factual", small[False], source="path", **kw)
    toy_relation(folder, list(facts)[:1], list(facts.values())[:1])
    one_line(
        ValueError,
        "relation 'capital' has no valid pair in the test split, variant id: it needs two subjects of 1 token",
        get,
        relations=["capital"],
    )
    one_line(ValueError, "factual lre: no relation has a valid pair in the test split", get, dataset="lre")
    toy_relation(folder, list(facts)[:4], ["Paris"]*4)         # two subjects and one object: still none
    one_line(ValueError, "no valid pair", get, relations=["capital"])
    toy_relation(folder, facts, facts.values())
    assert len(get(n=8)) == 8 and len(get(n=4, variant="ood_templates")) == 4
    one_line(ValueError, "factual: only .* of 5000 pairs fit this tokenizer", get, n=5000)


def test_truncated_files(small, folder):
    get = lambda **kw: load_pairs(tokenizer=small[False], source="path", **kw)
    toy_relation(folder, ["France"], ["Paris"])
    file = folder/"lre_relations"/"toy.json"
    file.write_text(file.read_text()[:-20])
    one_line(ValueError, "toy.json is not valid JSON: it is truncated", get, task="factual")
    (folder/"counterfact").mkdir()
    file = folder/"counterfact"/"counterfact.jsonl"
    file.write_text(
        '{"prompt": "The capital of France is", "subject": "France", "ground_truth": "Paris"}\n{"prompt": "The cap'
    )
    one_line(ValueError, "counterfact.jsonl, line 2 is not valid JSON", get, task="factual", dataset="counterfact")
    file.write_text(file.read_text().splitlines()[0] + "\n")
    (folder/"counterfact"/"PROVENANCE.jsonl").write_text(json.dumps(dict(file="counterfact.jsonl", bytes=9999)))
    # at the end of a line
    one_line(ValueError, "instead of 9999: it is truncated or was changed", get, task="factual", dataset="counterfact")


def test_hub_without_network(small, monkeypatch):
    import datasets
    def offline(*a, **kw): raise ConnectionError("no route\nto host")
    monkeypatch.setattr(datasets, "load_dataset", offline)
    for task in ("factual", "winogrande"):
        one_line(
            RuntimeError,
            r"could not be read from the hub \(ConnectionError\): without network use source='path'",
            load_pairs,
            task,
            small[False],
            source="hub",
        )
    one_line(
        ValueError,
        "'lama' is read with source='path'",
        load_pairs,
        "factual",
        small[False],
        source="hub",
        dataset="lama",
    )


def test_hub_rows_become_pairs(small, monkeypatch):
    import datasets
    facts = {
        s: o for s, o in relations_of()[0].facts.items() if split_of(s) == "test" and split_of(f"rare {s}") != "val"
    }
    rows = [
        dict(
            relation_prefix="The seat of",
            relation_suffix=" is in",
            prompt=f"The seat of {s} is in",
            subject=f" {s}",
            target_true=f" {o}",
        )
        for s, o in facts.items()
    ]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **kw: rows)
    if factual._relation("The seat of {X} is in", [], [], []).ood: pytest.skip("this template is a held-out relation")
    assert len(load_pairs("factual", small[False], source="hub", n=6)) == 6


# real data


@needs_data
@pytest.mark.data
@pytest.mark.parametrize(
    "dataset, tokens, variants",
    [
        ("lre", 1, ("id", "ood_subjects", "ood_templates")),
        ("counterfact", 3, factual.VARIANTS),
        ("lama", 2, ("id", "ood_relations", "ood_subjects")),
    ],
)
def test_public_facts(vocabulary, dataset, tokens, variants):
    tokenizer = vocabulary
    for variant in variants:
        rows = itertools.islice(
            TASKS["factual"](tokenizer, source="path", dataset=dataset, subject_tokens=tokens, variant=variant), 400
        )
        p = build_pairs(rows, tokenizer, task="factual")
        assert (
            len(p) > 15
            and sum(p.is_modified.values()) == tokens
            and (p.clean_ids != p.corrupt_ids).sum(1).eq(tokens).all()
            and (p.correct_token_id != p.wrong_token_id).all()
        )
        assert (p.key_positions["relation"] > p.key_positions["subject"]).all() and len(p) + sum(
            p.dropped.values()
        ) <= 400


@needs_data
@pytest.mark.data
@pytest.mark.parametrize("form", ("partial", "referent"))
def test_public_twins(vocabulary, form):
    splits = {
        s: load_pairs("winogrande", vocabulary, split=s, n=100, source="path", form=form) for s in ("train", "test")
    }
    check_disjoint(**splits)
    for p in splits.values(): assert (p.clean_ids != p.corrupt_ids).sum(1).eq(1).all() and p.dropped


@needs_data
@pytest.mark.data
@pytest.mark.parametrize(
    "task, options", [("factual", dict(dataset="lre")), ("winogrande", dict(form="partial"))], ids=("facts", "twins")
)
def test_filter_on_public_pairs_goes_into_a_metrics_file(vocabulary, make_model, tmp_path, task, options):
    tokenizer = vocabulary
    from rcid.core import read_json, write_json
    model, p = make_model(
        "llama", vocab=len(tokenizer), layers=1, d_model=16, heads=1, kv_heads=1, d_mlp=16
    ), load_pairs(task, tokenizer, n=40, source="path", **options)
    right = int(both_right(model, p).sum())
    # a random model seldom turns round with the twin
    if not right:
        with pytest.raises(ValueError, match="right in both directions on 0 of 40 pairs"): keep_correct(model, p)
        return
    kept, counts = keep_correct(model, p)
    assert len(kept) == right and task_accuracy(model, kept)["both"] == 1
    assert read_json(write_json(tmp_path/"m.json", counts)) == dict(kept=right, dropped=40 - right)


@needs_data
@pytest.mark.data
def test_public_twins_differ_in_one_word_and_swap_their_answers():
    twins = winogrande.real_twins()
    assert len(twins) > 1500 and len({t.id for t in twins}) == len(twins)
    for t in twins:
        assert (
            t.words[0] != t.words[1]
            and t.options[0] != t.options[1]
            and t.text.count("{R}") == 1
            and not re.search(r"\s", "".join(t.words))
        )
