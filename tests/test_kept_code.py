"""What is kept is found by the code that made it: a change in any module that ran is another key."""

import ast, sys
from dataclasses import replace
from pathlib import Path
import nbformat, pytest, torch
from conftest import ROOT
import rcid
from rcid.causal import Site
from rcid.causal.mediation import mediation
from rcid.data import load_pairs
from rcid.data.holdout import styled_problems
from rcid.data.reasoning import encode_problems
from rcid.distill import DistillConfig, SignalRequest, teacher_targets
from rcid.distill import teacher_cache
from rcid.distill.patch_targets import PatchTargets, _by_hooks
from rcid.distill.teacher_cache import code_hash
from rcid.eval.behaviour import behaviour
from rcid.eval.fingerprint import fingerprint
from rcid.eval.plant import live_attention
from rcid.eval.repair import apart
from rcid.eval.stored_plants import plant_file, plant_key, plants_kept
from rcid.kv import KV_METHODS, AttentionWeighting, KVMethod, KVObjective, LatentModel, Teacher, Warped
from rcid.kv import load_recording, make_fusion_targets, record_teacher, with_latents
from rcid.models import byte_tokenizer, load_model, save_model, train_tokenizer

LIBRARY = Path(rcid.__file__).parent
# they hash and write, and compute nothing that is kept
KEEPS = {"core/tensors.py", "core/paths.py", "kv/shards.py", "eval/stored_plants.py"}
# they say what is read and where it goes: the files and the problems are in the key themselves
LOADS = {"core/hardware.py", "data/holdout.py", "models/spread.py", "models/lora_folder.py"}
SITES = (Site(0, "s2"), Site(1, "end"))
CONFIG = DistillConfig(steps=3, batch=4)


def inside(files) -> set[str]:
    return {str(Path(f).relative_to(LIBRARY)) for f in files if f and Path(f).is_relative_to(LIBRARY)}


def ran(make) -> set[str]:
    "The library's modules whose functions run."
    files, outer = set(), sys.getprofile()
    def seen(frame, event, _): files.add(frame.f_code.co_filename)
    sys.setprofile(seen)
    try: make()
    finally: sys.setprofile(outer)
    return inside(files) - KEEPS


@pytest.fixture
def hashed(monkeypatch) -> set[str]:
    "The files that a key was made of."
    files, plain = set(), teacher_cache._file_of
    def seen(made):
        files.add(plain(made))
        return plain(made)
    monkeypatch.setattr(teacher_cache, "_file_of", seen)
    return files


@pytest.fixture(scope="module", params=("qwen3", "llama"))
def toy(request, make_model, tokenizers):
    arch = request.param
    return make_model(arch, d_model=32, heads=2, kv_heads=1, d_mlp=64), load_pairs(
        "ioi", tokenizers[arch], split="train", n=8
    )


def test_a_decorator_does_not_hide_a_function(tmp_path, monkeypatch):
    "Its own body counts, whatever is around it."
    body = """
        from contextlib import contextmanager
        from functools import cache
        import torch
        from jaxtyping import jaxtyped
        def plain(): return 1
        @contextmanager
        def block(): yield 1
        @torch.no_grad()
        def quiet(): return 1
        @cache
        def once(): return 1
        @jaxtyped(typechecker=None)
        def shaped(): return 1
    """.replace("\n        ", "\n")
    for name in ("plain", "block", "quiet", "once", "shaped"):
        file = tmp_path/f"of_{name}.py"
        file.write_text(body)
        monkeypatch.syspath_prepend(tmp_path)
        function = getattr(__import__(file.stem), name)
        before = code_hash(function)
        assert code_hash(function) == before
        file.write_text(body.replace("1", "2"))
        assert code_hash(function) != before, name


REQUESTS = (SignalRequest(), SignalRequest(True, SITES, (0, 3), True, SITES, 2), SignalRequest(True, SITES))

@pytest.mark.parametrize("request_", REQUESTS, ids=("answer", "everything", "sites"))
def test_of_teacher_targets(toy, tmp_path, hashed, request_):
    assert ran(lambda: teacher_targets(*toy, request_, tmp_path)) - inside(hashed) == set()


def test_of_patched_runs(toy, tmp_path, hashed):
    teacher, pairs = toy
    config = replace(CONFIG, targets_dir=str(tmp_path))
    def make():
        found = PatchTargets(teacher, pairs, SITES, 1, 1, config, pairs.attention_mask.sum(1))
        _by_hooks(teacher, pairs, SITES, torch.tensor([[0, 0], [0, 1], [2, 1]]), 1)
        return found
    of_plan = {"distill/schedule.py"}                  # which runs there are: they are in the key
    assert ran(make) - of_plan - inside(hashed) == set()


@pytest.fixture(scope="module")
def thinking():
    "Problems, a teacher and a maker of students that think in places."
    problems = [p.styled("equation") for p in styled_problems(n=8, steps=(1, 2), operations="+-", largest=20)]
    tokenizer = train_tokenizer([p.text for p in problems], vocab=400)
    def make(**sizes): return load_model(dict(vocab=len(tokenizer), **sizes), dtype="float32", device="cpu")[0]
    teacher = make(arch="qwen3", layers=3, d_model=32, heads=4, kv_heads=4, head_dim=8, d_mlp=64)
    def student():
        small = make(arch="llama", layers=2, d_model=32, heads=4, kv_heads=2, head_dim=8, d_mlp=64)
        return LatentModel(small, tokenizer.bos_token_id, 2)
    return encode_problems(problems, tokenizer), teacher, student


KV = {name: KV_METHODS[name] for name in ("kv_structured", "kv_flat", "kava", "latent_kd", "codi")}
KV["all"] = KVMethod(a_kl=1., a_codi=10., kv=Warped(weighting=AttentionWeighting("teacher"), cka=.05, places="latents"))

@pytest.mark.parametrize("name", KV)
def test_of_kv_targets(thinking, tmp_path, hashed, name):
    data, teacher, student = thinking
    method = replace(KV[name], fit_steps=2, latents=3)
    objective = KVObjective(method, student(), teacher, data, replace(CONFIG, targets_dir=str(tmp_path)))
    state = objective.start()
    assert ran(lambda: list(objective._targets(state))) - inside(hashed) == set()


def test_of_recordings_and_fusion_targets(tmp_path, hashed):
    tokenizer = byte_tokenizer()
    save_model(load_model(dict(arch="qwen3", layers=2, seed=1), dtype="float32")[0], tokenizer, tmp_path/"teacher")
    problems = styled_problems(n=6, steps=(1,), operations="+-", largest=9)
    teacher = Teacher(name="a", folder=str(tmp_path/"teacher"))
    used = ran(lambda: record_teacher(teacher, problems, tmp_path/"recording"))
    assert used - inside(hashed) - LOADS == set()
    heard = load_recording(teacher, tmp_path/"recording", tokenizer, stream=True)
    there = dict(available=torch.ones_like(heard.available), cache=replace(heard.cache, mask=heard.cache.text))
    heard = replace(heard, **there)
    student = load_model(dict(arch="llama", layers=2), dtype="float32")[0]
    thought = with_latents(heard.data, 2, tokenizer.bos_token_id)
    hashed.clear()
    folder = tmp_path/"kept"
    used = ran(lambda: make_fusion_targets(student, heard.data, thought, dict(a=heard), fit_steps=2, folder=folder))
    assert folder.exists() and used - inside(hashed) == {"kv/fusion.py"}     # prototypes: of the targets, not kept


def test_of_plants(toy, tmp_path, hashed):
    teacher, pairs = toy
    def make(): return live_attention(teacher, pairs, [1], held=pairs, config=replace(CONFIG, steps=2))
    key = plant_key(teacher, pairs, dict(recipe="live_attention", layers=[1]))
    assert ran(lambda: plants_kept(tmp_path, key, make)) - inside(hashed) == set()
    assert plant_file(tmp_path, key).exists()


@pytest.mark.parametrize("page", ("planted", "real"))
def test_of_the_rows_of_a_page(toy, hashed, page):
    "Beside all of distill, which the pages hash file by file."
    cells = [ast.parse(c.source) for c in nbformat.read(ROOT/f"nbs/experiments/{page}.ipynb", 4).cells
             if c.cell_type == "code" and not c.source.startswith("%")]
    names = {}
    for tree in cells:
        imports = [x for x in tree.body if isinstance(x, (ast.Import, ast.ImportFrom))]
        exec(compile(ast.Module(imports, []), page, "exec"), names)
    (call,) = (x for tree in cells for x in ast.walk(tree)
               if isinstance(x, ast.Call) and isinstance(x.func, ast.Name) and x.func.id == "code_hash")
    eval(compile(ast.Expression(call), page, "eval"), names)
    teacher, pairs = toy
    roles = {"s2": ["end"]}
    def read():
        own, b = mediation(teacher, {"s2": pairs}), behaviour(teacher, teacher, pairs)
        apart(own, own, roles, keep=range(own.n_layers)), apart(own, own, roles), own.no_gap(own)
        if page == "real": fingerprint(own, own, n_boot=1)
        return b.kl, b.gap_r, b.accuracy
    assert {x for x in ran(read) if not x.startswith("distill/")} - inside(hashed) == set()
