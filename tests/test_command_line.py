"""`rcid compare`, `rcid map`, `rcid where`, `rcid launch`: pages that need nothing else, and one line for bad input."""

import configparser, json, re, shutil, signal, subprocess, sys
from pathlib import Path
import pytest
from conftest import ROOT, environment
from rcid.core import embedded, read_json
from rcid.core.paths import CHECKSUMS
from rcid.eval.handmade import counting_model
from rcid.models import byte_tokenizer, load_model, save_model, train_tokenizer
from rcid.models.before_loading import BESIDE, Checkpoint, check_memory, look_at
from rcid.pipeline import measure
from rcid.pipeline.command_line import main, parser
from rcid.report.page import bullets, page, short, table


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    "Small checkpoints: a teacher, one of the same route, one of another, one with its own tokenizer, two untrained."
    here = tmp_path_factory.mktemp("models")
    texts = [t["text"] for t in embedded("ioi")["templates"]]
    names = [f" {n}" for n in embedded("names")["first_names"]]
    tok = train_tokenizer(names * 3 + texts, vocab=1500)
    own = train_tokenizer([n for i, n in enumerate(names) if i % 5] * 3 + texts, vocab=1400, bos=True)
    live, early = {3: .6, 4: .4}, {1: .6, 2: .4}
    made = dict(
        teacher=(counting_model(tok, live), tok),
        same=(counting_model(tok, live, seed=1), tok),
        other=(counting_model(tok, early, seed=2), tok),
        cousin=(counting_model(own, live, seed=3), own),
        untrained=(load_model(dict(arch="qwen3", vocab=len(tok)), dtype="float32", device="cpu")[0], tok),
        letters=load_model(dict(arch="llama"), dtype="float32", device="cpu"),
    )
    return {name: str(save_model(model, tokenizer, here/name)) for name, (model, tokenizer) in made.items()}


def ran(*argv) -> int: return main([str(a) for a in argv])


def test_a_comparison_is_one_page_and_its_numbers(folders, tmp_path, capsys):
    out = tmp_path/"report.html"
    kinds = ("--kinds", "s2,names", "-n", 64)
    assert ran("compare", folders["teacher"], folders["other"], *kinds, "--out", out) == 0
    text, data = out.read_text(encoding="utf-8"), read_json(tmp_path/"report.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert out.stat().st_size < 1_000_000 and text.count("data:image/png;base64,") == 1
    assert not re.search(r"(src|href)=\"?http|<script|@import|url\(", text)            # nothing is fetched
    assert text.startswith("<!doctype html>") and "teacher and other" in text
    assert "takes another route" in text and "the same steps in other layers" in text
    assert data["route"]["distance"] > .3 > data["route_warped"]["distance"]
    assert data["teacher"]["kinds"] == ["s2", "names"] and len(data["teacher"]["F"][0]) == 6
    headings = "Before you believe it", "Routes side by side", "Mechanism", "Behaviour", "Sites compared", "Pairs"
    for heading in headings:
        assert f"<h2>{heading}</h2>" in text
    said = capsys.readouterr()
    assert "route D, same place" in said.out and "GiB needed" in said.err and "64/64 pairs" in said.err
    told = [line for line in said.out.splitlines() if line.startswith("! ")]            # as on the page, in its words
    assert told == [f"! {warning}" for warning in data["warnings"]] and "validated=" not in said.out
    sites = data["interchange"]["per_site"]
    assert sum(site["n_flips"] for site in sites) == data["interchange"]["n_flips"]     # pooled, and the page says so
    assert "is no mean over these sites" in text and "<th scope=col>words that change</th>" in text


def test_interchange_patches_the_first_pairs(folders, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "PATCHED", 20)
    assert ran("compare", folders["teacher"], folders["same"], "-n", 64, "--out", tmp_path/"few.html") == 0
    data = read_json(tmp_path/"few.json")
    assert data["interchange"]["n_pairs"] == 20 and data["behaviour"]["n_pairs"] == 64


def test_the_same_route_is_called_so_and_runs_repeat(folders, tmp_path):
    for name in ("a", "b"):
        assert ran("compare", folders["teacher"], folders["same"], "-n", 64, "--out", tmp_path/f"{name}.html") == 0
    a, b = (read_json(tmp_path/f"{name}.json") for name in "ab")
    assert a["verdicts"]["distance"]["outcome"] == "equal within the bound"
    assert {**a, "seconds": 0, "about": 0} == {**b, "seconds": 0, "about": 0}
    assert "takes the same route" in (tmp_path/"a.html").read_text()


def test_two_tokenizers(folders, tmp_path):
    assert ran("compare", folders["teacher"], folders["cousin"], "-n", 64, "--out", tmp_path/"two.html") == 0
    data, text = read_json(tmp_path/"two.json"), (tmp_path/"two.html").read_text()
    assert data["route"]["distance"] < .1 and "two tokenizers" in text
    # at a site between all and nothing how much of a name passes differs from model to model, and so the word said
    assert data["interchange"]["agreement"] > .5 and data["interchange"]["n_flips"] >= 20
    assert data["behaviour"]["accuracy"] == [1, 1] and data["behaviour"]["n_pairs"] == 64


def test_names_that_a_tokenizer_cuts_up(folders, tmp_path):
    assert ran("compare", folders["teacher"], folders["letters"], "-n", 16, "--out", tmp_path/"cut.html") == 0
    text, data = (tmp_path/"cut.html").read_text(), read_json(tmp_path/"cut.json")
    assert data["behaviour"]["n_pairs"] == 16 and "names are of several tokens" in text
    assert "no gap" in text                                                            # the student is untrained


OWN = [
    dict(clean=f"When {a} and {b} went to the store, {b} gave a drink to",
         corrupt=f"When {a} and {b} went to the store, {a} gave a drink to", answer=f" {a}", wrong=f" {b}",
         roles={"io": f"When {a}", "s2": f", {b}"})
    for a, b in zip(embedded("names")["first_names"][:40:2], embedded("names")["first_names"][1:40:2])
    for _ in range(2)
]


def written(path: Path, rows: list) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_own_pairs(folders, tmp_path):
    half = len(OWN) // 2
    longer = {**OWN[0], "corrupt": OWN[0]["corrupt"].replace(" gave", " soon gave")}
    test, train = written(tmp_path/"mine.jsonl", [longer, *OWN[half:]]), written(tmp_path/"more.jsonl", OWN[:half])
    out = tmp_path/"own.html"
    assert ran("compare", folders["teacher"], folders["same"], "--pairs", test, "--train", train, "--out", out) == 0
    text, data = out.read_text(), read_json(out.with_suffix(".json"))
    assert "line 1: clean and corrupt have unequal length: left out" in text and data["behaviour"]["n_pairs"] == half
    assert data["teacher"]["roles"] == ["changed", "io", "s2", "end"] and data["route"]["distance"] < .1
    assert "20 pairs with 20 names: intervals are wide" in text                         # too few


def test_a_map(folders, tmp_path):
    out = tmp_path/"map"
    assert ran("map", folders["teacher"], "--kinds", "s2,order", "-n", 32, "--out", out) == 0
    text, data = (tmp_path/"map.html").read_text(), read_json(tmp_path/"map.json")
    assert text.count("data:image/png") == 2 and "Effect map of teacher" in text and data["right_both"] == 1
    end = data["roles"].index("end")
    share = [layer[end] for layer in data["F"][0]]
    assert max(abs(v) for v in share[:3]) < .01 and .5 < share[3] < .7 and share[4] > .9     # as it was made
    assert "32 pairs are few" in text


def test_a_teacher_that_cannot_do_it_is_said(folders, tmp_path):
    out = tmp_path/"bad.html"
    assert ran("compare", folders["untrained"], folders["teacher"], "-n", 32, "--out", out) == 0
    assert "there is little to compare" in out.read_text() and "are few" in out.read_text()
    assert ran("map", folders["untrained"], "-n", 32, "--out", tmp_path/"m.html") == 0
    assert "little to map" in (tmp_path/"m.html").read_text()


# bad input

def config(tmp_path, name: str, **said) -> str:
    (tmp_path/name).mkdir()
    (tmp_path/name/"config.json").write_text(json.dumps(said))
    return str(tmp_path/name)


def llama(folders, tmp_path, name: str, **more) -> str:
    return config(tmp_path, name, **{**read_json(Path(folders["teacher"])/"config.json"), **more})


def test_bad_models_are_one_line(folders, tmp_path, capsys):
    gptq = dict(quantization_config=dict(quant_method="gptq", bits=4))
    bad = {
        "is an encoder-decoder model": config(tmp_path, "t5", model_type="t5", is_encoder_decoder=True),
        "is quantised (gptq): use the 16-bit checkpoint": llama(folders, tmp_path, "quantised", **gptq),
        "has no weights: there is no .safetensors file": llama(folders, tmp_path, "empty"),
        "no config.json": str(tmp_path),
        "could not be read as a model": config(tmp_path, "unknown", model_type="chess"),
    }
    for words, folder in bad.items():
        for command in (("map", folder), ("compare", folders["teacher"], folder)):
            assert ran(*command, "--out", tmp_path/"no.html") == 2
            said = capsys.readouterr().err.strip().splitlines()
            assert said[-1].startswith("rcid: ") and words in said[-1] and Path(folder).name in said[-1], said
    assert not (tmp_path/"no.html").exists()


def test_a_family_that_is_not_known_is_refused_before_loading(tmp_path, capsys):
    folder = config(tmp_path, "xlnet", model_type="xlnet", n_layer=1, d_model=8, n_head=1, d_inner=8)
    (tmp_path/"xlnet"/"model.safetensors").write_bytes(b"not read")
    assert ran("map", folder) == 2 and "unknown model family 'xlnet'" in capsys.readouterr().err


@pytest.mark.parametrize("how", ("missing", "shard", "shapes", "a file", "tokenizer"))
def test_a_checkpoint_that_is_not_whole_is_one_line(how, folders, tmp_path, capsys):
    from safetensors.torch import load_file, save_file
    folder = tmp_path/"model"
    shutil.copytree(folders["untrained"], folder)
    (folder/CHECKSUMS).unlink()
    file, spec = folder/"model.safetensors", folder
    if how == "missing":
        whole = load_file(file)
        save_file({k: v for k, v in whole.items() if "layers.3.mlp" not in k}, file, metadata={"format": "pt"})
    elif how == "shard":
        file.rename(folder/"model-00001-of-00002.safetensors")
        shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        index = dict(metadata={}, weight_map=dict(zip(("lm_head.weight", "model.norm.weight"), shards)))
        (folder/"model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "shapes":
        (folder/"config.json").write_text(json.dumps({**read_json(folder/"config.json"), "intermediate_size": 64}))
    elif how == "a file": spec = file
    else:
        for part in folder.glob("token*"): part.unlink()
    words = {
        "missing": "has no weights for model.layers.3.mlp.down_proj.weight and 2 more",
        "shard": "model-00002-of-00002.safetensors",
        "shapes": "its weights have other shapes than its config.json says",
        "a file": "is a file: give the folder that it is in",
        "tokenizer": "has no usable tokenizer",
    }[how]
    assert ran("map", spec, "-n", 8, "--out", tmp_path/"m.html") in (1, 2)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("rcid: ") and words in said and not (tmp_path/"m.html").exists()


def test_python_is_told_the_same(folders, tmp_path):
    gptq = llama(folders, tmp_path, "q", quantization_config=dict(quant_method="gptq", bits=4))
    t5 = config(tmp_path, "t5", model_type="t5")
    for folder, words in ((gptq, r"is quantised \(gptq\)"), (t5, "encoder-decoder")):
        with pytest.raises(ValueError, match=words) as e: load_model(folder, dtype="float32", device="cpu")
        assert "\n" not in str(e.value)
    chess = config(tmp_path, "chess", model_type="chess")
    with pytest.raises(RuntimeError, match="could not load .*chess"): load_model(chess)


def test_a_name_that_is_no_folder(monkeypatch, capsys):
    "Without a network; with one the hub says that it has no such model."
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert ran("map", "no-such-model-of-rcid") == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("rcid: no-such-model-of-rcid: no folder here has this name, so it was taken for a hub id")


def test_a_misspelt_folder_is_told_its_neighbour(monkeypatch, tmp_path, capsys):
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path/"teacher").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("teecher", "./teecher"):
        assert ran("map", name) == 2
        (said,) = capsys.readouterr().err.strip().splitlines()
        assert "(is teacher meant?)" in said[: len(name) + 60]                          # before what the hub says


def test_weights_that_are_damaged_end_with_1(folders, tmp_path, capsys):
    shutil.copytree(folders["teacher"], tmp_path/"damaged")
    file = tmp_path/"damaged"/"model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert ran("map", tmp_path/"damaged", "-n", 8) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("rcid: could not load")


def test_memory_is_looked_at_before_loading(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "free_bytes", lambda device: 2**20)
    monkeypatch.setattr(measure, "load_model", lambda *a, **k: pytest.fail("a weight was read"))
    assert ran("map", folders["teacher"]) == 2
    said = capsys.readouterr().err
    assert "about 1.0 GiB needed, 0.0 GiB free" in said and "--anyway" in said.strip().splitlines()[-1]
    monkeypatch.undo()
    monkeypatch.setattr(measure, "free_bytes", lambda device: 2**20)
    assert ran("map", folders["teacher"], "--anyway", "-n", 8, "--out", tmp_path/"m.html") == 0


def test_memory_by_hand():
    two = [Checkpoint("a", "llama", 2, 10, 3 * 2**30), Checkpoint("b", "llama", 1, 10, 2**30)]
    check_memory(two, 4 * 2**30 + BESIDE)
    check_memory(two, None)                                                             # nothing says what is free
    with pytest.raises(MemoryError, match="about 5.0 GiB are needed for a and b, 5.0 GiB are free"):
        check_memory(two, 4 * 2**30 + BESIDE - 1)


def test_the_estimate_is_the_size_of_the_weights(folders):
    seen = look_at(folders["untrained"], "bfloat16", "cpu")
    model, _ = load_model(folders["untrained"], dtype="bfloat16", device="cpu")
    assert seen.bytes == sum(p.numel() * p.element_size() for p in model.parameters()) and seen.layers == 4


@pytest.mark.parametrize(
    "more, words",
    [
        (("-n", 4), "-n 4: at least 8 pairs are needed"),
        (("--kinds", "s2,so"), "has no kind 'so': there are s2, s2_new"),
        (("--facts", "lama"), "--facts is for --task factual"),
        (("--pairs", "none.jsonl"), "no file none.jsonl"),
        (("--keep", "0,x"), "--keep 0,x: give layers with commas"),
        (("--train", "none.jsonl"), "no file none.jsonl"),
        (("--dtype", "float12"), "unknown dtype 'float12'"),
        (("--out", "tests"), "--out tests is a folder: name a file in it"),
        (("--out", "/dev/null/page.html"), "--out /dev/null/page.html: cannot write in /dev/null"),
        (("--batch", "0"), "--batch 0: at least one pair at a time"),
        (("--seed", "-1"), "--seed -1: give a number that is not negative"),
        (("--device", "cuda:99"), "no device cuda:99 here"),
        (("--device", "abacus"), "unknown device 'abacus': use cpu, cuda or cuda:1"),
        (("--keep", "0,9"), "must be 6 ascending layers within 0..5"),
    ],
)
def test_bad_options_are_one_line(folders, capsys, more, words):
    assert ran("compare", folders["teacher"], folders["same"], *more) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("rcid: ") and words in said[-1]


def test_bad_pairs_are_named_with_their_line_before_a_model_is_loaded(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "load_model", lambda *a, **k: pytest.fail("a weight was read"))
    file = written(tmp_path/"mine.jsonl", [OWN[0], {**OWN[1], "corrupt": OWN[1]["clean"]}])
    assert ran("map", folders["teacher"], "--pairs", file) == 2
    assert "mine.jsonl, line 2 does not differ" in capsys.readouterr().err.strip().splitlines()[-1]
    assert ran("compare", folders["teacher"], folders["same"], "--train", written(tmp_path/"m.jsonl", OWN)) == 2
    assert "--train is a second file beside --pairs" in capsys.readouterr().err


def test_options_that_do_not_go_with_own_pairs(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "load_model", lambda *a, **k: pytest.fail("a weight was read"))
    file, two = written(tmp_path/"mine.json", OWN), ("compare", folders["teacher"], folders["same"])
    bad = {
        "--kinds is for tasks": ("--kinds", "s2"),
        "--facts is for tasks": ("--task", "factual", "--facts", "lama"),
        "is the file of --pairs": ("--train", file),
        f"would be written over {file}": ("--out", tmp_path/"mine.html"),                # its numbers are mine.json
    }
    monkeypatch.setattr(measure, "relations_of", lambda *a: None)
    for words, more in bad.items():
        assert ran(*two, "--pairs", file, *more) == 2
        assert words in capsys.readouterr().err.strip().splitlines()[-1]
    assert len(file.read_text().splitlines()) == len(OWN)


def test_a_file_of_another_encoding(folders, tmp_path, monkeypatch, capsys):
    mark, latin = tmp_path/"mark.jsonl", tmp_path/"latin.jsonl"
    text = "\r\n".join(map(json.dumps, OWN)).encode()
    mark.write_bytes(b"\xef\xbb\xbf" + text)
    assert ran("map", folders["teacher"], "--pairs", mark, "--out", tmp_path/"m.html") == 0
    latin.write_bytes(json.dumps(OWN[0]).encode() + b'\n{"clean": "caf\xe9"}')
    assert ran("map", folders["teacher"], "--pairs", latin) == 2
    assert "latin.jsonl, line 2 is no UTF-8: save the file as UTF-8" in capsys.readouterr().err.splitlines()[-1]


def test_a_page_goes_into_a_folder_that_is_made(folders, tmp_path):
    out = tmp_path/"not"/"yet"/"there.html"
    assert ran("map", folders["teacher"], "-n", 8, "--out", out) == 0 and out.exists()
    assert sorted(p.name for p in out.parent.iterdir()) == ["there.html", "there.json"]


def test_facts_that_are_not_there_are_said_before_loading(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "load_model", lambda *a, **k: pytest.fail("a weight was read"))
    lama = ("map", folders["teacher"], "--task", "factual", "--facts", "lama")
    for where, words in ((str(tmp_path), "holds no dataset 'lama'"), (None, "needs RCID_DATA_DIR")):
        if where: monkeypatch.setenv("RCID_DATA_DIR", where)
        else: monkeypatch.delenv("RCID_DATA_DIR")
        assert ran(*lama) == 2 and words in capsys.readouterr().err.strip().splitlines()[-1]


def test_public_facts_of_any_length(knows_words, monkeypatch, tmp_path):
    "A small table in the public layout, whose subjects the tokenizer cuts up."
    relation = next(r for r in embedded("factual")["relations"] if r["name"] == "capital")
    samples = [dict(subject=f"old {s}", object=o) for s, o in relation["facts"].items()]
    table = dict(name="capital", prompt_templates=["The capital of {} is"], prompt_templates_zs=[], samples=samples)
    (tmp_path/"lre_relations").mkdir()
    (tmp_path/"lre_relations"/"toy.json").write_text(json.dumps(table))
    monkeypatch.setenv("RCID_DATA_DIR", str(tmp_path))
    facts = ("--task", "factual", "--facts", "lre", "--unfiltered", "-n", 8)
    assert ran("map", knows_words, *facts, "--out", tmp_path/"m.html") == 2        # "old" stays: not all tokens change
    for i, s in enumerate(samples): s["subject"] = s["subject"].replace("old", ["Paris", "Rome"][i % 2])
    (tmp_path/"lre_relations"/"toy.json").write_text(json.dumps(table))
    assert ran("map", knows_words, *facts, "--out", tmp_path/"m.html") == 0
    text, data = (tmp_path/"m.html").read_text(), read_json(tmp_path/"m.json")
    assert "facts of lre" in text and data["roles"] == ["subject", "relation", "end"]
    assert re.search(r"The capital of (Paris|Rome) \w+ is", text)


def test_models_without_a_common_sentence(folders, capsys):
    assert ran("compare", folders["teacher"], folders["letters"], "--task", "factual") == 2
    assert "no sentence fits both tokenizers" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def knows_words(tmp_path_factory) -> str:
    "An untrained model whose tokenizer has the words of the embedded facts."
    relations = embedded("factual")["relations"]
    words = [f" {w}" for r in relations for fact in r["facts"].items() for w in fact]
    tok = train_tokenizer(words * 3 + [t for r in relations for t in r["templates"]], vocab=4000)
    model, _ = load_model(dict(arch="llama", layers=2, vocab=len(tok)), dtype="float32", device="cpu")
    return str(save_model(model, tok, tmp_path_factory.mktemp("facts")/"untrained"))


def test_a_task_that_the_teacher_cannot_do_is_refused(knows_words, monkeypatch, tmp_path, capsys):
    facts = ("map", knows_words, "--task", "factual", "-n", 8, "--out", tmp_path/"m.html")
    monkeypatch.setattr(measure, "both_right", lambda model, pairs, batch: pairs.answer_pos < 0)
    assert ran(*facts) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "right in both directions on 0 of 16 pairs, 8 are needed" in said and "--unfiltered" in said
    monkeypatch.undo()
    assert ran(*facts, "--unfiltered") == 0 and "subject" in (tmp_path/"m.html").read_text()


def test_only_pairs_that_the_teacher_gets_right_are_read(knows_words, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "both_right", lambda model, pairs, batch: pairs.answer_pos % 2 == 0)
    assert ran("map", knows_words, "--task", "factual", "-n", 16, "--out", tmp_path/"m.html") == 0
    said = read_json(tmp_path/"m.json")["warnings"]
    assert any("of 32 pairs: only those are used" in w for w in said)


def test_an_interrupt_ends_with_130(folders, monkeypatch, capsys):
    def stop(q): raise KeyboardInterrupt
    monkeypatch.setattr(measure, "map_model", stop)
    assert ran("map", folders["teacher"]) == 130 and "nothing was written" in capsys.readouterr().err


def test_control_c_in_the_middle(folders, tmp_path):
    command = [sys.executable, "-m", "rcid.pipeline.command_line", "map", folders["teacher"], "-n", "20000"]
    env = environment(ROOT, PYTHONPATH=str(ROOT), RCID_THREADS="1", OMP_NUM_THREADS="1")
    env.pop("RCID_ROOT")
    # elsewhere: the tables are those of the repository that the package is imported from
    def listens(): signal.signal(signal.SIGINT, signal.SIG_DFL)    # a shell's background job would ignore it
    told = dict(stderr=subprocess.PIPE, text=True, preexec_fn=listens)
    with subprocess.Popen(command, cwd=tmp_path, env=env, **told) as running:
        seen = []
        for line in running.stderr:
            seen.append(line)
            if "GiB needed" in line: break
        running.send_signal(signal.SIGINT)
        try: rest = running.communicate(timeout=120)[1].strip().splitlines()
        finally: running.kill()
    assert running.returncode == 130 and rest == ["rcid: interrupted; nothing was written"], (seen, rest)
    assert not list(tmp_path.iterdir())


# the commands

@pytest.mark.parametrize("command", ("compare", "map"))
def test_help_has_examples_that_parse(command, capsys):
    with pytest.raises(SystemExit) as e: main([command, "--help"])
    text = capsys.readouterr().out
    shown = [line.split("(needs")[0].split() for line in text.splitlines()]
    lines = [words for words in shown if words[:2] == ["rcid", command]]
    assert e.value.code == 0 and len(lines) >= 3
    assert f"rcid-{command}.html" in " ".join(text.split())             # where the page is without --out
    for words in lines: assert parser().parse_args(words[1:]).command == command


def test_usage_is_refused_with_2(capsys):
    for argv in ([], ["compare", "a"], ["mapp", "a"], ["map", "a", "--task", "chess"]):
        with pytest.raises(SystemExit) as e: main(argv)
        (said,) = capsys.readouterr().err.splitlines()                                  # not the whole usage
        assert e.value.code == 2 and said.startswith("rcid: ") and "--help shows what there is" in said


@pytest.mark.parametrize(
    "argv, near",
    [
        (["compare", "--tsak", "ioi"], "rcid compare has no option --tsak: did you mean --task?"),
        (["compare", "a", "b", "--tsak=ioi"], "rcid compare has no option --tsak: did you mean --task?"),
        (["map", "a", "--unfilterd"], "rcid map has no option --unfilterd: did you mean --unfiltered?"),
        (["launch", "--wrokers", "2"], "rcid launch has no option --wrokers: did you mean --workers?"),
        (["map", "a", "--xyz"], "rcid map has no option --xyz; rcid map --help shows what there is"),
    ],
)
def test_a_misspelt_option_is_one_line_with_the_nearest(argv, near, capsys):
    with pytest.raises(SystemExit) as e: main(argv)
    assert e.value.code == 2 and capsys.readouterr().err == f"rcid: {near}\n"


def test_where_and_launch_are_handed_on(capsys):
    from rcid.pipeline.provenance import all_keys
    key = next(iter(all_keys()))
    assert main(["where", key]) == 0 and "metrics/" in capsys.readouterr().out
    assert main(["where", "no.such.key"]) == 2
    assert capsys.readouterr().err.startswith("rcid: nothing is called")
    with pytest.raises(SystemExit) as e: main(["launch", "--help"])
    said = capsys.readouterr().out
    assert e.value.code == 0 and "--workers" in said and said.startswith("usage: rcid launch ")


def test_the_console_script_is_this(root):
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(root/"settings.ini")
    name, where = settings["DEFAULT"]["console_scripts"].split("=")
    module, function = where.split(":")
    assert name == "rcid" and getattr(__import__(module, fromlist=[function]), function) is main
    assert '"scripts"' in (root/"pyproject.toml").read_text() and "console_scripts" in (root/"setup.py").read_text()


# the page

def test_texts_on_a_page_are_escaped():
    made = page("<b>", "a & b", [("<i>", table(["<u>"], [["<script>"]]) + bullets(["<x>"])), ("empty", "")], ["<s>"])
    for tag in ("<b>", "<i>", "<u>", "<script>", "<x>", "<s>"): assert tag not in made
    assert "a &amp; b" in made and "empty" not in made


def test_numbers_are_short():
    assert [short(v) for v in (None, float("nan"), -.001, .125, 1)] == ["-", "-", "0.00", "0.12", "1.00"]
