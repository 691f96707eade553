"""What is large is hashed once in a run, and anew as soon as it is another."""

import hashlib, os
from dataclasses import replace
import pytest, torch
from rcid.core import paths, sha256
from rcid.distill import DistillConfig, distill, model_hash
from rcid.distill import teacher_cache
from rcid.distill.teacher_cache import unchanged
from rcid.models import shrink


@pytest.fixture
def reads(monkeypatch) -> list:
    "Every file that is read for its hash."
    seen, plain = [], hashlib.file_digest
    monkeypatch.setattr(paths, "_hashes", {})
    monkeypatch.setattr(paths.hashlib, "file_digest", lambda f, kind: seen.append(f.name) or plain(f, kind))
    return seen


def aged(file, monkeypatch):
    "As if the file had lain there for a while."
    monkeypatch.setattr(paths.time, "time", lambda: file.stat().st_ctime + 60)


def test_a_file_is_read_once(tmp_path, reads, monkeypatch):
    file = tmp_path/"weights"
    file.write_bytes(b"one")
    aged(file, monkeypatch)
    assert {sha256(file), sha256(str(file)), sha256(tmp_path/".."/tmp_path.name/"weights")} == {
        hashlib.sha256(b"one").hexdigest()
    }
    assert len(reads) == 1


def test_a_file_that_changed_is_read_again(tmp_path, reads, monkeypatch):
    "Also where it has its old size and its old time, or another file has taken its name."
    file = tmp_path/"weights"
    file.write_bytes(b"one")
    aged(file, monkeypatch)
    sha256(file)
    old = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns))
    aged(file, monkeypatch)
    assert sha256(file) == hashlib.sha256(b"two").hexdigest() and len(reads) == 2
    other = tmp_path/"other"
    other.write_bytes(b"six")
    os.replace(other, file)
    assert sha256(file) == hashlib.sha256(b"six").hexdigest() and len(reads) == 3


def test_a_file_of_this_moment_is_not_remembered(tmp_path, reads):
    "It may be written again within a tick of the disk's clock."
    file = tmp_path/"weights"
    file.write_bytes(b"one")
    assert sha256(file) == sha256(file) and len(reads) == 2


# models

CONFIG = DistillConfig(steps=2, batch=4, lr=1e-3, log_every=1, seed=0)


def hashed(monkeypatch, model) -> list:
    "How often this model's weights are read for their hash from now on."
    seen, plain = [], teacher_cache.weights_of
    def weights(m):
        if m is model: seen.append(1)
        return plain(m)
    monkeypatch.setattr(teacher_cache, "weights_of", weights)
    return seen


@pytest.mark.parametrize("method", ("standard_kd", "interchange"))
def test_a_teacher_is_hashed_once_a_run(make_model, pairs, tmp_path, monkeypatch, method):
    teacher = make_model("qwen3")
    config = replace(CONFIG, targets_dir=str(tmp_path/"targets"), layer_map={0: 0, 1: 0, 2: 1, 3: 1})
    first = distill(shrink(teacher, 2), teacher, pairs["qwen3"]["equal"], method, config).history
    seen = hashed(monkeypatch, teacher)
    again = distill(shrink(teacher, 2), teacher, pairs["qwen3"]["equal"], method, config).history
    assert len(seen) == 1 and again == first


def test_another_teacher_has_another_hash_after_the_run(make_model, pairs):
    teacher = make_model("qwen3")
    with unchanged(teacher):
        before = model_hash(teacher)
        with unchanged(teacher): assert model_hash(teacher) == before
        assert model_hash(teacher) == before
    with torch.no_grad(): teacher.model.norm.weight += 1
    assert model_hash(teacher) != before


def test_a_teacher_that_learns_is_hashed_anew(make_model, pairs, monkeypatch):
    "The student of itself, and one whose weights are the teacher's: no promise is made."
    model = make_model("qwen3")
    made = []
    plain = teacher_cache.unchanged
    monkeypatch.setattr("rcid.distill.trainer.unchanged", lambda m: made.append(m) or plain(m))
    distill(model, model, pairs["qwen3"]["equal"], "sft", CONFIG)
    shared = shrink(model, 2)
    shared.model.layers[0] = model.model.layers[0]
    distill(shared, model, pairs["qwen3"]["equal"], "standard_kd", CONFIG)
    assert not made
    distill(shrink(model, 2), model, pairs["qwen3"]["equal"], "standard_kd", CONFIG)
    assert made == [model]
