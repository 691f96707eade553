"""Students and results travel through a DVC remote: whoever has the repository makes any figure again without
training."""

import json, shutil
import pytest, toy

FAST = {"TOY_PACE": "0"}


@pytest.fixture(scope="module")
def author(tmp_path_factory):
    "A finished workspace that was pushed to a remote in a folder."
    here = tmp_path_factory.mktemp("remote")
    first = toy.make(here/"first")
    assert toy.launch(first, "--workers", "2", **FAST)[0] == 0
    toy.dvc(first, "remote", "add", "-d", "store", str(here/"store"))
    toy.dvc(first, "push")
    assert len([p for p in (here/"store").rglob("*") if p.is_file()]) >= 9
    return first


@pytest.fixture
def reader(author, tmp_path):
    "What is in git: sources, dvc.lock and metrics, neither outputs nor a cache; with a remote of its own."
    clone, store = tmp_path/"clone", tmp_path/"store"
    shutil.copytree(author, clone, ignore=shutil.ignore_patterns("out", "cache", "tmp", "trail", "logs", "checkpoints"))
    shutil.copytree(author.parent/"store", store)
    toy.dvc(clone, "remote", "modify", "store", "url", str(store))
    return clone


@pytest.mark.slow
def test_a_figure_is_made_again_without_training(author, reader):
    toy.dvc(reader, "pull", "train@a")                                       # one student ...
    assert [p.name for p in (reader/"out").iterdir()] == ["train-a.txt"]
    toy.dvc(reader, "pull")                                                  # ... or all
    assert toy.results(reader) == toy.results(author)
    assert toy.launch(reader, **FAST)[1].startswith("nothing to do")
    (reader/"result.json").unlink()                                          # the figure
    code, said = toy.launch(reader, "gather", **FAST)
    assert code == 0 and toy.results(reader) == toy.results(author) and not (reader/"trail").exists(), said


@pytest.mark.slow
def test_a_damaged_remote_is_noticed(author, reader):
    students = [f for f in (reader.parent/"store"/"files"/"md5").rglob("*") if f.is_file() and f.stat().st_size == 65]
    assert len(students) == 8
    for f in students: f.chmod(0o644); f.write_bytes(b"0" * 64 + b"\n")
    try:toy.dvc(reader, "pull")
    except AssertionError as e: assert "checkout" in str(e) or "corrupt" in str(e) or "failed" in str(e).lower()
    code, said = toy.launch(reader, "--verify", **FAST)
    assert (
        code == 0
        and toy.results(reader) == toy.results(author)
        and len(json.loads((reader / "result.json").read_text())) == 8
    ), said
