"""A checkpoint in several files is the same model, hashed whole, each file once; one without a file is refused."""
import hashlib, json
import pytest, torch
from rcid.core import paths, sha256
from rcid.core.paths import CHECKSUMS, broken_checksums, write_checksums
from rcid.data.holdout import styled_problems
from rcid.distill.teacher_cache import model_hash
from rcid.kv import recording
from rcid.kv.recording import Teacher
from rcid.models import load_model, save_model, save_trained

SPEC = dict(arch="qwen3", layers=3)
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def made(): return load_model(SPEC, dtype="float32", device="cpu")


@pytest.fixture
def shards(made, tmp_path):
    "The model in files of 100 KB with an index, as a hub has a large one; without a list of checksums."
    model, tokenizer = made
    model.save_pretrained(tmp_path/"shards", max_shard_size="100KB")
    tokenizer.save_pretrained(tmp_path/"shards")
    assert len(files(tmp_path/"shards")) > 3 and (tmp_path/"shards"/INDEX).exists()
    return tmp_path/"shards"


def files(folder): return sorted(folder.glob("*.safetensors"))


def teacher_in(folder): return Teacher(name="t", folder=str(folder))


def load(folder): return load_model({"path": folder}, dtype="float32", device="cpu")[0]


def test_the_same_model_in_one_file_and_in_several(made, shards, tmp_path):
    whole = load(save_model(*made, tmp_path/"whole"))
    assert len(files(tmp_path/"whole")) == 1
    parts = load(shards)
    assert model_hash(parts) == model_hash(whole)
    for (name, one), two in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("which", (0, 1, -1, None))          # of the files; None: the index
def test_every_file_is_in_the_hashes(shards, which):
    write_checksums(shards)
    problems, teacher = styled_problems(n=2, steps=(1,), operations="+-", largest=9), teacher_in(shards)
    before = sha256(shards), recording._key(teacher, problems)
    file = shards/INDEX if which is None else files(shards)[which]
    content = bytearray(file.read_bytes())
    content[-3] ^= 1                                         # one bit
    file.write_bytes(content)
    assert broken_checksums(shards) == [file.name]
    assert all(x != y for x, y in zip(before, (sha256(shards), recording._key(teacher, problems))))
    with pytest.raises(RuntimeError, match=f"could not load .*{file.name} does not match its SHA-256"): load(shards)


@pytest.mark.parametrize("listed", (True, False))
def test_a_missing_file_is_one_line(shards, listed):
    if listed: write_checksums(shards)
    name = files(shards)[1].name
    (shards/name).unlink()
    with pytest.raises(RuntimeError, match=f"could not load .*{name}") as e: load(shards)
    assert "\n" not in str(e.value)
    assert broken_checksums(shards) == ([name] if listed else [])


def test_each_file_is_read_once(shards, monkeypatch):
    "For all its hashes together: of the checkpoint, of the folder, of a recording."
    write_checksums(shards)
    seen, plain = [], hashlib.file_digest
    monkeypatch.setattr(paths, "_hashes", {})
    monkeypatch.setattr(paths.hashlib, "file_digest", lambda f, kind: seen.append(f.name) or plain(f, kind))
    later = max(f.stat().st_ctime for f in shards.iterdir()) + 60
    monkeypatch.setattr(paths.time, "time", lambda: later)
    problems = styled_problems(n=2, steps=(1,), operations="+-", largest=9)
    for _ in range(2):
        load(shards)
        sha256(shards)
        recording._key(teacher_in(shards), problems)
    assert sorted(seen) == sorted(str(f) for f in shards.iterdir())


def test_what_training_changed_in_several_files(made, shards, tmp_path):
    write_checksums(shards)
    student, tokenizer = load(shards), made[1]
    with torch.no_grad():
        for layer in student.model.layers: layer.mlp.up_proj.weight += 0.1
    save_trained(student, tokenizer, tmp_path/"student", shards)
    assert model_hash(load(tmp_path/"student")) == model_hash(student)
    told = json.loads((tmp_path/"student"/"base.json").read_text())
    assert told["checksums"] == sha256(shards/CHECKSUMS)
