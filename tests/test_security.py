"""Nothing that is loaded can run code, nothing leaves the workspace, no secret gets into a record."""
import json, os, pickle, re, sys
from pathlib import Path
import pytest
from conftest import ROOT, output_of, run
from pydantic import BaseModel
from rcid.core.params import Params, load_params
from rcid.pipeline.stage import redact, strip_notebook

SECRET = "hf_" + "Zx9" * 8


def lines(tracked):
    "(where, line) of all modules and code cells."
    for name in tracked:
        if not name.endswith((".py", ".ipynb")) or name.startswith("tests/"): continue
        text = (ROOT/name).read_text(encoding="utf-8")
        if name.endswith(".ipynb"):
            text = "\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "code")
        for n, line in enumerate(text.splitlines(), 1): yield f"{name}:{n}", line


def test_nothing_loads_code(tracked):
    bad = re.compile(
        r"\b(import|from)\s+(pickle|cPickle|cloudpickle|dill|joblib|marshal|shelve)\b|\b(torch|joblib)\.load\("
        r"|allow_pickle\s*=\s*True|trust_remote_code\s*=\s*(?!False)|weights_only\s*=\s*False"
        r"|yaml\.(unsafe_load|Loader)|typ\s*=\s*[\"']unsafe|use_safetensors\s*=\s*False"
    )
    found = list(lines(tracked))
    assert len(found) > 3000 and [f"{where}: {line.strip()}" for where, line in found if bad.search(line)] == []


class Malice:
    def __init__(self, path): self.path = path
    def __reduce__(self): return (Path.touch, (self.path,))


@pytest.fixture
def malicious(tmp_path) -> tuple[bytes, Path]:
    "A pickle that makes a file when it is loaded, and that file."
    trap = tmp_path/"trapped"
    blob = pickle.dumps(Malice(trap))
    pickle.loads(blob)
    assert trap.exists()                                                    # it does bite
    trap.unlink()
    return blob, trap


@pytest.mark.parametrize("name", ("pytorch_model.bin", "model.safetensors"))
def test_malicious_weights_are_refused(malicious, make_model, tokenizers, tmp_path, name):
    from rcid.models import load_model, save_model
    blob, trap = malicious
    saved = save_model(make_model("llama", layers=1), tokenizers["llama"], tmp_path/"model")
    for f in ("model.safetensors", "SHA256SUMS"): (saved/f).unlink()
    (saved/name).write_bytes(blob)
    with pytest.raises(RuntimeError, match="could not load") as e: load_model({"path": str(saved)})
    assert "\n" not in str(e.value) and not trap.exists()


def test_malicious_caches_are_not_used(malicious, make_model, pairs, tmp_path):
    from rcid.core.paths import write_checksums
    from rcid.data.pairs import load_saved_pairs, save_pairs
    from rcid.distill.teacher_cache import SignalRequest, teacher_targets
    from rcid.distill.checkpoint import load_checkpoint
    blob, trap = malicious
    model, some = make_model("llama"), pairs["llama"]["equal"]
    # what it returns is mapped from the file
    whole = {k: v.clone() for k, v in teacher_targets(model, some, SignalRequest(False), tmp_path/"targets").items()}
    (kept,) = (tmp_path/"targets").glob("*.safetensors")
    kept.unlink()
    kept.write_bytes(blob)
    assert all(v.equal(whole[k]) for k, v in teacher_targets(model, some, SignalRequest(False),
        tmp_path/"targets").items())
    save_pairs(some, tmp_path/"pairs")
    (tmp_path/"pairs"/"pairs.safetensors").write_bytes(blob)
    with pytest.raises(ValueError, match="not a whole file of tensors"): load_saved_pairs(tmp_path/"pairs")
    (tmp_path/"run").mkdir()
    (tmp_path/"run"/"tensors.safetensors").write_bytes(blob)
    (tmp_path/"run"/"progress.json").write_text('{"fingerprint": "f", "step": 1, "history": []}')
    write_checksums(tmp_path/"run")
    assert load_checkpoint(tmp_path/"run", "f") is None and not trap.exists()


def sections(model):
    yield model
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from sections(field.annotation)


def test_params_have_a_schema(tmp_path):
    found = list(sections(Params))
    assert len(found) >= 6 and all(m.model_config["extra"] == "forbid" for m in found)
    text = (ROOT/"params.yaml").read_text(encoding="utf-8")
    for old, new in (
        ("seeds:", "sedes:"),
        ("scale: laptop", "scale: moon"),
        ("bootstrap: 10000", "bootstrap: many"),
        ("bootstrap: 10000", "bootstrap: -1"),
    ):
        assert old in text
        (tmp_path/"params.yaml").write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=r"params\.yaml: ") as e: load_params(tmp_path/"params.yaml")
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("path", ("../..", "../../etc/passwd", "/etc", "artifacts/../../x", "~/../../etc"))
@pytest.mark.parametrize(
    "spec",
    ({"path": 0}, {"arch": "llama", "tokenizer": 0}, {"wheel": "w==1", "file": "f", "sha256": "0" * 64, "cache": 0}),
)
def test_paths_of_params_stay_in_the_workspace(tmp_path, path, spec):
    p = load_params().model_dump(mode="json")
    p["models"][p["families"][0]]["teacher"] = {k: path if v == 0 else v for k, v in spec.items()}
    (tmp_path/"params.yaml").write_text(json.dumps(p))
    with pytest.raises(ValueError, match="leaves the workspace .*use a path below it"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("word", ("family=../../x", "family=a/b", "seed=$(id)", "task=a;id", "task=-rf"))
def test_coordinates_are_plain_words(word):
    from rcid.pipeline.stage import coordinates_of
    with pytest.raises(ValueError, match="plain word|unknown family"): coordinates_of([word])


def test_secrets_are_taken_out(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", 'quote"d-and\\slashed')
    assert redact(json.dumps({"a": 'quote"d-and\\slashed', "b": SECRET})) == '{"a": "[secret]", "b": "[secret]"}'
    nb = {
        "cells": [
            {
                "cell_type": "code",
                "id": "x",
                "metadata": {},
                "source": [],
                "outputs": [{"output_type": "stream", "name": "stdout", "text": [f"token {SECRET}\n"]}],
            }
        ]
    }
    assert SECRET not in json.dumps(strip_notebook(nb, "/nowhere"))


@pytest.mark.slow
@pytest.mark.parametrize("fails", (False, True))
def test_a_token_never_gets_into_an_executed_notebook(copy, fails):
    cell = {
        "cell_type": "code",
        "id": "leaky001",
        "metadata": {},
        "execution_count": None,
        "outputs": [],
        "source": [
            "import os\n",
            "print(os.environ)\n",
            "os.environ['HF_TOKEN']\n",
            *(["raise RuntimeError(os.environ['HF_TOKEN'])"] if fails else []),
        ],
    }
    nb = {
        "cells": [cell],
        "metadata": {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    (copy/"nbs"/"experiments"/"leak.ipynb").write_text(json.dumps(nb))
    done = run(copy, sys.executable, "-m", "rcid.pipeline.stage", "leak", HF_TOKEN=SECRET)
    written = [p for part in ("runs", "logs") for p in (copy/part).rglob("*.ipynb")]
    assert bool(done.returncode) == fails and len(written) == 1, output_of(done)
    assert (
        SECRET not in written[0].read_text()
        and "[secret]" in written[0].read_text()
        and (not fails or SECRET not in done.stderr.splitlines()[-1])
    )


def test_check_does_not_show_a_token():
    done = run(ROOT, sys.executable, "-m", "rcid.pipeline", "check", HF_TOKEN=SECRET)
    assert SECRET not in done.stdout + done.stderr and "HF_TOKEN is set" in done.stdout
