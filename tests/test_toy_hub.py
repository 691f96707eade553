"""The hub of toys has the structure of the paper's models; `on_toy_hub.py` changes what conf/ knows, but no model."""
import json, os, sys, urllib.error, urllib.request
import pytest
import on_toy_hub, toyhub
from conftest import finished
from rcid.core.paths import read_yaml
from rcid.pipeline.workspace import compose_params
from rcid.report.budget import SHAPES


@pytest.fixture(scope="module")
def params(tmp_path_factory) -> tuple[dict, dict]:
    "Of the scale as it is, and as the script runs it."
    folder = tmp_path_factory.mktemp("params")
    for name, more in (("is", ()), ("runs", on_toy_hub.overrides())):
        compose_params(folder/f"{name}.yaml", "scale=a100", *more)          # refuses a key that there is not
    return tuple(read_yaml(folder/f"{name}.yaml") for name in ("is", "runs"))


def at(tree: dict, key: str):
    for word in key.split("."): tree = tree[word]
    return tree


def test_the_models_data_and_revisions_are_those_of_the_scale(params):
    is_, runs = params
    assert toyhub.specs(is_) == toyhub.specs(runs) and {s["hub"] for s in toyhub.specs(is_)} == set(toyhub.MODELS)
    for key in ("scale", "families", "lm.source", "lm.hub", "lm.bf16", "kv.data.dataset", "kv.data.source",
        "kv.data.style", "kv.latent_token", "kv.train.latents", "kv.train.iterations", "teachers.names",
        "bench.source", "real.students", "sites.score", "sites.layer_map"):
        assert at(is_, key) == at(runs, key), key


@pytest.mark.parametrize("override", on_toy_hub.SMALLER)
def test_every_override_changes_something(params, override):
    is_, runs = params
    key = override.partition("=")[0]
    assert at(is_, key) != at(runs, key)


def test_ci_runs_the_script():
    lines = (on_toy_hub.ROOT/".ci"/"run").read_text(encoding="utf-8").splitlines()
    assert any(line.endswith(" tests/on_toy_hub.py") for line in lines)


def test_every_kind_of_stage_is_left(params):
    "A matrix that is cut down to nothing would be no test of its stage."
    _, runs = params
    for key in ("main_matrix.families", "main_matrix.methods", "extra_matrix.families", "kv.methods", "kv.seeds",
        "teachers.run", "teachers.names", "teachers.base_models", "calibrate.recipes", "planted.directions",
        "fused.cases", "fused.runs", "bench.tasks"):
        assert at(runs, key), key
    assert len(runs["families"]) == 2 and not runs["models"]["llama"]["required"]


@pytest.mark.parametrize("name", sorted(toyhub.MODELS))
def test_what_does_not_shrink(name):
    family, said, _, _ = toyhub.MODELS[name]
    shape, here = SHAPES[name], {**toyhub.FAMILIES[family], **said}
    for key in ("vocab_size", "tie_word_embeddings"): assert here[key] == shape[key], key
    assert here["num_attention_heads"] > here["num_key_value_heads"] > 1      # grouped queries
    rope = here.get("rope_parameters", {})
    assert (rope.get("rope_type") == "llama3") == (family == "llama")


# what the hub answers

@pytest.fixture
def hub(tmp_path):
    "Two repositories, one of which asks for a licence."
    for name in ("Qwen/a", "meta-llama/b"):
        (tmp_path/"models"/name).mkdir(parents=True)
        (tmp_path/"models"/name/"config.json").write_text(json.dumps(dict(name=name)))
    commits = {"models/Qwen/a": "1" * 40, "models/meta-llama/b": "2" * 40}
    with toyhub.serve(tmp_path, commits, closed=("meta-llama/",)) as (address, refusals): yield address, refusals


def code_of(address: str) -> tuple[int, str]:
    "Its status, and the reason that a hub gives in a header."
    try:
        with urllib.request.urlopen(address) as answer: return answer.status, answer.headers.get("X-Repo-Commit")
    except urllib.error.HTTPError as e: return e.code, e.headers["X-Error-Code"]


def test_it_answers_as_a_hub_does(hub):
    address, refusals = hub
    assert code_of(f"{address}/Qwen/a/resolve/{'1' * 40}/config.json") == (200, "1" * 40)
    assert code_of(f"{address}/Qwen/a/resolve/{'3' * 40}/config.json") == (404, "RevisionNotFound")
    assert code_of(f"{address}/Qwen/a/resolve/main/none.json") == (404, "EntryNotFound")
    assert code_of(f"{address}/Qwen/c/resolve/main/config.json") == (404, "RepoNotFound")
    assert code_of(f"{address}/meta-llama/b/resolve/main/config.json") == (401, "GatedRepo")
    assert code_of(f"{address}/api/models/Qwen/a")[0] == 200
    assert code_of(f"{address}/api/models/meta-llama/b/auth-check") == (401, "GatedRepo")
    assert [code for code, _ in refusals] == [404, 404, 404, 401, 401]


def test_the_tree_of_a_repository(hub):
    with urllib.request.urlopen(f"{hub[0]}/api/models/Qwen/a/tree/main?recursive=True") as answer:
        assert [(e["type"], e["path"]) for e in json.load(answer)] == [("file", "config.json")]


HANGS = """
import signal, time
signal.signal(signal.SIGTERM, signal.default_int_handler)
print("began", flush=True)
try: time.sleep(60)
except KeyboardInterrupt: print("ended what it started", flush=True)
"""

def test_a_run_that_hangs_is_ended_with_a_line(tmp_path, monkeypatch):
    "It is asked to end first: what it started ends with it."
    monkeypatch.setattr(on_toy_hub, "LIMIT", 2)
    monkeypatch.setattr(on_toy_hub, "environment", lambda folder, **more: {**os.environ, "PYTHONPATH": str(tmp_path)})
    (tmp_path/"rcid").mkdir()
    (tmp_path/"rcid"/"pipeline.py").write_text(HANGS)
    with pytest.raises(SystemExit, match="FAILED in the graph: not done after 2 s: it hangs, or needs a larger") as e:
        on_toy_hub.repro("the graph", tmp_path, "http://127.0.0.1:1")
    assert "began\nended what it started" in str(e.value)


def test_a_run_that_does_not_want_to_end_is_ended_too(tmp_path):
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(60)"
    with pytest.raises(TimeoutError, match="(?s)not done after 2 s.*on"):
        finished([sys.executable, "-c", deaf], tmp_path, dict(os.environ), 2, grace=1)
