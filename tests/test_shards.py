"""Targets on disk: what is read is what was made, losses are the same bit for bit, 16 bits round once, a shard that is
missing or was changed is refused, and memory grows with the batch and not with the problems."""

import copy, itertools, json, os, shutil, subprocess, sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
import pytest, torch
from rcid.core.paths import read_yaml
from rcid.core.tensors import load_tensors
from rcid.data.holdout import styled_problems
from rcid.data.reasoning import encode_problems, word_problems
from rcid.distill import DistillConfig, distill
from rcid.kv import KV_METHODS, AttentionWeighting, KVMethod, KVObjective, KVShape, LatentModel, MapProjectionAligner
from rcid.kv import Column, RegressionKVLoss, Warped, columns_of, kept_shards, load_shards, method_of, write_shards
from rcid.kv import KVFusion, Teacher, load_recording, make_fusion_targets, record_teacher, with_latents
from rcid.kv import fusion_targets as fusing, places, shards
from rcid.kv.compress import compress_kv
from rcid.kv.fusion_targets import closeness
from rcid.kv.recording import KeptCache
from rcid.kv.shards import NOTE, filled, rows_of, shard_of
from rcid.kv.warp import TimeWarper
from rcid.models import load_model, save_model, train_tokenizer
from rcid.pipeline import needs
from rcid.pipeline.dvc import LEFTOVER

N = 140                                          # problems: two shards and a part of one
CONFIG = DistillConfig(steps=3, batch=16, lr=3e-3, log_every=1, seed=3)


def made(n: int = 10, size: int = 4, seq: int = 6) -> list[dict[str, torch.Tensor]]:
    "Batches of targets with holes in their mask, and one problem without any token."
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(n, seq, generator=g) < .6
    mask[1] = False
    place = mask[:, None, None, :, None]
    whole = {name: torch.randn(n, 2, heads, seq, 8, generator=g) * place for name, heads in (("k", 2), ("q", 4))}
    whole |= dict(mask=mask, hidden=torch.randn(n, 2, 5, generator=g), final=torch.randn(n, 3, 5, generator=g))
    return [{name: x[i:i + size] for name, x in whole.items()} for i in range(0, n, size)]


def folders(kept):
    "Of targets, without the locks beside them."
    return sorted(folder for folder in kept.iterdir() if folder.is_dir())


def joined(parts):
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}


@pytest.mark.parametrize("rows", ([9, 0, 4, 3], [1], [5, 5, 5], slice(2, 7), slice(None), torch.tensor([8, 1, -1]),
    6, -1, torch.tensor(3), [], slice(0, 0)))
def test_rows_in_any_order_are_those_that_were_made(tmp_path, rows):
    parts = made()
    whole = joined(parts)
    for kept in (kept_shards(None, (), lambda: parts, 10), kept_shards(tmp_path, (), lambda: parts, 10)):
        assert sorted(kept) == sorted(whole)
        for name, x in kept.items(): assert torch.equal(x[rows], whole[name][rows]), name
        assert not any(x[rows].requires_grad for x in kept.values())


def test_padding_is_not_kept():
    parts = made()
    tokens = int(joined(parts)["mask"].sum())
    kept = kept_shards(None, (), lambda: parts, 10)
    assert sum(len(x) for x in kept["k"].pieces) == tokens < 10 * 6
    assert sum(x.nbytes for x in kept["q"].pieces) == tokens * 2 * 4 * 8 * 4


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_16_bits_round_once_and_are_read_as_they_were_made(tmp_path, dtype):
    parts = made()
    whole, kept = joined(parts), load_shards(write_shards(tmp_path/"t", parts, 10, dtype))
    for name in ("k", "q", "hidden"):
        assert {x.dtype for x in kept[name].pieces} == {dtype} and kept[name][:].dtype == torch.float32
        assert torch.equal(kept[name][:], whole[name].to(dtype).float())
    # the teacher's own head reads these
    assert torch.equal(kept["final"][:], whole["final"])
    half = sum(x.nbytes for x in kept["k"].pieces)
    assert 2 * half == sum(x.nbytes for x in kept_shards(None, (), lambda: parts, 10)["k"].pieces)


def test_numbers_that_do_not_fit_are_refused(tmp_path):
    parts = made()
    place = parts[1]["mask"].nonzero()[0]
    parts[1]["k"][place[0], 0, 0, place[1], 0] = 1e5
    with pytest.raises(ValueError, match=r"^targets: k of problems 4 to 7 does not fit torch.float16: keep them in bf"):
        write_shards(tmp_path/"t", parts, 10, torch.float16)
    assert list(tmp_path.iterdir()) == [], "nothing is left of it"
    write_shards(tmp_path/"t", parts, 10, torch.bfloat16)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("what", ("nan", "inf"))
def test_what_is_no_number_is_not_said_to_need_more_bits(tmp_path, dtype, what):
    parts = made()
    place = parts[1]["mask"].nonzero()[0]
    parts[1]["k"][place[0], 0, 0, place[1], 0] = float(what)
    named = dict(nan="NaN", inf="inf")[what]
    for folder in (tmp_path/"t", None):
        with pytest.raises(ValueError, match=f"^targets: k of problems 4 to 7 holds {named}: the teacher ") as error:
            kept_shards(folder, (), lambda: parts, 10, dtype)
        one_line(error)
    assert folders(tmp_path/"t") == []


def test_no_problems_and_batches_without_any(tmp_path):
    for folder in (None, tmp_path):
        said = "targets in memory are of no problem" if folder is None else "no targets in"
        with pytest.raises((ValueError, FileNotFoundError), match=f"^{said}") as error:
            kept_shards(folder, (), lambda: [], 0)
        one_line(error)
    with pytest.raises(ValueError, match="^filled: no problem"): filled([], 0)
    parts, nothing = made(), {name: x[:0] for name, x in made()[0].items()}
    with_gaps = [nothing, parts[0], nothing, {}, *parts[1:], nothing]
    for folder in (None, tmp_path):
        kept = kept_shards(folder, ("gaps",), lambda: with_gaps, 10)
        assert torch.equal(kept["k"][:], joined(parts)["k"]) and torch.equal(kept["mask"], joined(parts)["mask"])


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("lost, first", ((0, 0), (1, 4), (2, 8)))
def test_a_missing_shard_is_refused(tmp_path, lost, first):
    folder = write_shards(tmp_path/"t", made(), 10)
    sorted(folder.iterdir())[lost].unlink()
    with pytest.raises(ValueError) as error: load_shards(folder)
    assert one_line(error) == f"targets in {folder} lack problem {first} of 10: delete them and make them again"


def test_a_folder_without_any_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"^no targets in {tmp_path}: make them again$"): load_shards(tmp_path)


@pytest.mark.parametrize("how", ("truncated", "changed", "of another file"))
def test_a_damaged_shard_is_refused_and_made_again(tmp_path, how):
    parts = made()
    kept_shards(tmp_path, (), lambda: parts, 10)
    (folder,) = folders(tmp_path)
    file = sorted(folder.iterdir())[1]
    whole = file.read_bytes()
    if how == "truncated": file.write_bytes(whole[:-40])
    elif how == "changed": file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    else: file.write_bytes(sorted(folder.iterdir())[0].read_bytes())
    with pytest.raises(ValueError) as error: load_shards(folder)
    assert str(folder) in one_line(error) and "make" in one_line(error)
    again = kept_shards(tmp_path, (), lambda: parts, 10)
    assert torch.equal(again["k"][:], joined(parts)["k"]) and load_tensors(file)


@pytest.mark.parametrize("what", ("thesis.tex", ".hidden", "model-00001-of-00002.safetensors", "chapter"))
def test_a_folder_that_holds_anything_else_is_not_replaced(tmp_path, what):
    folder = tmp_path/"mine"
    folder.mkdir()
    (folder/what).mkdir() if what == "chapter" else (folder/what).write_text("years of work")
    asked = []
    def parts():
        asked.append(True)
        yield from made()
    for _ in range(2):                                             # without shards, then beside them
        with pytest.raises(ValueError) as error: write_shards(folder, parts(), 10)
        assert one_line(error) == f"{folder} holds {what}, not written by rcid: name a folder of its own"
        assert (folder/what).exists() and not asked, "and nothing was computed for it"
        (folder/"00000000.safetensors").write_bytes(b"")
    file = tmp_path/"thesis.pdf"
    file.write_text("years of work")
    with pytest.raises(ValueError, match="thesis.pdf is no folder: name another one"): write_shards(file, parts(), 10)
    assert file.read_text() == "years of work"


def test_a_folder_of_shards_is_replaced_with_its_note(tmp_path):
    folder = write_shards(tmp_path/"t", made(), 10, of="one", note=lambda: dict(key="one"))
    assert json.loads((folder/NOTE).read_text()) == dict(key="one")
    assert load_shards(folder, "one") and load_shards(folder)
    with pytest.raises(ValueError) as error: load_shards(folder, "two")
    assert one_line(error).startswith(f"{folder/'00000000.safetensors'} does not belong to the {NOTE} beside it: ")
    shards = sorted(folder.glob("*.safetensors"))
    other = write_shards(tmp_path/"u", made(), 10, of="two")
    shutil.copy(other/shards[1].name, shards[1])                   # the same problems, of another teacher
    with pytest.raises(ValueError, match=f"{shards[1].name} does not belong"): load_shards(folder, "one")
    write_shards(folder, made(), 10)
    assert len(list(folder.iterdir())) == 3, "the note was of the others"


AT_ONCE = """
import sys, time
from pathlib import Path
import torch
from rcid.kv.shards import kept_shards
folder, keys = Path(sys.argv[1]), int(sys.argv[2])
def parts():
    print("made")
    for i in range(4):
        time.sleep(.01)
        yield dict(k=torch.full((2, 1, 1, 3, 4), float(i)), mask=torch.ones(2, 3).bool())
(folder/f"ready-{sys.argv[3]}").touch()
while not (folder/"go").exists(): time.sleep(.001)
for key in range(keys):
    k = kept_shards(folder/"kept", (key,), parts, 8)["k"]
    assert k[:][:, 0, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
"""

def test_processes_that_ask_at_once(tmp_path, root, at_once):
    "Two stages of a node: they exchanged each other's folder, and one failed."
    said = at_once(AT_ONCE, 3, tmp_path, str(tmp_path), "16")
    assert "".join(said).count("made") == 16, "each was made by one, and the others waited"
    assert len(folders(tmp_path/"kept")) == 16
    left = [path.name for path in (tmp_path/"kept").iterdir() if not path.is_dir()]
    assert all(LEFTOVER.fullmatch(name) for name in left), "DVC does not see the locks"


def test_a_teacher_that_stopped_early_leaves_no_targets():
    with pytest.raises(ValueError, match="^targets in memory lack problem 8 of 10: "):
        kept_shards(None, (), lambda: made()[:2], 10)
    with pytest.raises(ValueError, match="^targets in memory lack problem 0 of 10: "):
        columns_of([shard_of(made()[0], 4, 10)])


# in training

@pytest.fixture(scope="module")
def world():
    problems = list(itertools.islice(word_problems("train", operations="+-", largest=9, style="equation"), N))
    tokenizer = train_tokenizer([p.text for p in problems], vocab=500)
    sizes = dict(vocab=len(tokenizer), d_mlp=64)
    big = dict(arch="qwen3", layers=4, d_model=48, heads=4, kv_heads=4, head_dim=16, seed=1, **sizes)
    small = dict(arch="llama", layers=2, d_model=32, heads=4, kv_heads=2, head_dim=8, seed=2, **sizes)
    teacher, _ = load_model(big, dtype="float32", device="cpu")
    def student(): return LatentModel(load_model(small, dtype="float32", device="cpu")[0], tokenizer.bos_token_id, 2)
    return encode_problems(problems, tokenizer), teacher, student


METHODS = {
    **{name: KV_METHODS[name] for name in ("kv_structured", "kv_flat", "kava", "kava_shuffled", "latent_kd", "codi")},
    "all": KVMethod(a_kl=1., a_codi=10., kv=Warped(weighting=AttentionWeighting("teacher"), cka=.05, places="latents")),
}

@pytest.mark.parametrize("name", METHODS)
def test_losses_on_streamed_targets_are_those_on_targets_in_memory(world, tmp_path, name):
    data, teacher, student = world
    method, curves = replace(METHODS[name], fit_steps=3, latents=3), []
    for folder in (None, str(tmp_path), str(tmp_path)):
        curves.append(distill(student(), teacher, data, method, replace(CONFIG, targets_dir=folder)).history)
    assert curves[0] == curves[1] == curves[2] and len(curves[0]) == 1 + CONFIG.steps
    (folder,) = folders(tmp_path)
    assert len(list(folder.iterdir())) == 3, "64 problems a shard"


def test_a_teacher_in_16_bits_has_targets_in_16_bits(world, tmp_path):
    data, teacher, student = world
    method, read = replace(KV_METHODS["kv_structured"], fit_steps=2, latents=3), []
    half = copy.deepcopy(teacher).to(torch.bfloat16)
    for model, folder in ((half, None), (half, str(tmp_path))):
        objective = KVObjective(method, student(), model, data, replace(CONFIG, targets_dir=folder))
        objective.start()
        assert objective.targets["k"].pieces[0].dtype == objective.targets["q"].pieces[0].dtype == torch.bfloat16
        read.append(objective.target([3, 130], 12))
    assert read[0].k.dtype == torch.float32 and all(torch.equal(a, b) for a, b in zip(*read))
    exact = KVObjective(method, student(), half, data, CONFIG)
    state = exact.start()
    rows = [3, 130]
    with torch.no_grad(): want = exact.align(state.aligner, exact.of_teacher(rows)[0], rows)
    # one rounding, of a number that does not depend on what else is in the batch but for its last bits
    assert torch.allclose(read[0].k, want.k[..., :12, :], rtol=2**-7, atol=1e-2)


def test_queries_are_kept_only_where_a_loss_asks_for_them(world):
    data, teacher, student = world
    by_student = KVMethod(kv=Warped(loss=RegressionKVLoss(), weighting=AttentionWeighting("student")))
    for method, asks in ((KV_METHODS["kv_structured"], True), (KV_METHODS["kv_mse"], False), (by_student, False)):
        method = replace(method, fit_steps=1, latents=3)
        objective = KVObjective(method, student(), teacher, data[:16], CONFIG)
        state = objective.start()
        assert ("q" in objective.targets) == ("q" in state.aligner.projectors) == asks == method.query_targets
        assert objective.terms(torch.arange(4), 0, state)[1].isfinite()


def test_flat_projectors_of_qwen2_leave_the_queries_out():
    "28 layers of 28 query and 4 key heads onto 28 of 12 and 2: of 4.5 billion parameters 4.3 are those of queries."
    def flat(heads_t, heads_s, dim): return (28 * heads_t * dim) * (28 * heads_s * dim)
    assert 2 * flat(4, 2, 128) + flat(28, 12, 128) == 4_521_459_712 and 2 * flat(4, 2, 128) == 205_520_896
    shapes, dim = (KVShape(28, 4, 4, 28), KVShape(28, 2, 4, 12)), 4
    both = [MapProjectionAligner(*shapes, "flat", parts="kvq", queries=how) for how in (None, "structured")]
    assert both[0].n_params == 2 * flat(4, 2, dim) + flat(28, 12, dim)
    assert both[1].n_params == 2 * flat(4, 2, dim) + 28 * (12 * 28 + dim * dim)


def test_the_paper_scale_maps_queries_by_heads(root):
    own = read_yaml(root/"conf"/"scale"/"a100.yaml")["kv"]
    kv = SimpleNamespace(variants=own["variants"], train=SimpleNamespace(latents=24, fit_steps=200))
    method, named = method_of("kv_flat", kv), KV_METHODS["kv_flat"]
    assert method.kv == replace(named.kv, projector=replace(named.kv.projector, queries="structured"))
    assert method_of("kv_structured", kv).kv == KV_METHODS["kv_structured"].kv
    with pytest.raises(ValueError, match="unknown queries='mixed'"):
        MapProjectionAligner(KVShape(2, 1, 4, 2), KVShape(2, 1, 4, 2), queries="mixed")


def test_the_pipeline_counts_with_the_same_shards():
    assert needs.SHARD == shards.SHARD


# several teachers

@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A student, 70 problems in its words and with places, and of two teachers what was recorded of each, in memory and
    on disk. They are untrained and so missing everywhere; here each is there for some problems all the same."""
    problems, folder = styled_problems(n=70, steps=(1,), operations="+-", largest=20), tmp_path_factory.mktemp("said")
    def tokenizer(style, vocab): return train_tokenizer([p.styled(style).text for p in problems], vocab=vocab)
    recorded = {True: {}, False: {}}
    for name, style, layers, available in (("a", "words", 4, range(70)), ("b", "equation", 3, range(66, 70))):
        words = tokenizer(style, 500)
        model = load_model(dict(arch="qwen3", layers=layers, vocab=len(words), seed=layers), dtype="float32")[0]
        save_model(model, words, folder/f"model-{name}")
        teacher = Teacher(name=name, folder=str(folder/f"model-{name}"), style=style)
        record_teacher(teacher, problems, folder/name)
        for stream in (False, True):
            said = load_recording(teacher, folder/name, words, stream=stream)
            there = torch.tensor([i in available for i in range(70)])
            mask = said.data.attention_mask.bool() & there[:, None]
            recorded[stream][name] = replace(said, cache=replace(said.cache, mask=mask), available=there)
    words = tokenizer("equation", 450)
    spec = dict(arch="llama", layers=2, heads=2, kv_heads=2, vocab=len(words), seed=5)
    student, _ = load_model(spec, dtype="float32")
    own = encode_problems([p.styled("equation") for p in problems], words)
    return student, own, with_latents(own, 4, words.bos_token_id), recorded


def test_what_a_teacher_said_is_read_from_disk_as_it_is_in_memory(several):
    *_, recorded = several
    for name, whole in recorded[False].items():
        some = recorded[True][name].cache[[69, 3, 40]]
        for part in ("k", "v", "q", "mask", "positions"):
            assert torch.equal(getattr(some, part), getattr(whole.cache[[69, 3, 40]], part)), part
        assert some.pre_rope and whole.key == recorded[True][name].key != ""


@pytest.mark.parametrize("time", ("segment", "index", "kava", "random"))
def test_targets_of_several_teachers_on_disk_are_those_in_memory(several, tmp_path, monkeypatch, time):
    student, words, thought, recorded = several
    how = dict(time=time, fit_steps=3)
    whole = make_fusion_targets(student, words, thought, recorded[False], **how)
    kept = make_fusion_targets(student, words, thought, recorded[True], **how, folder=tmp_path)
    def never(*_): raise AssertionError("aligned a second time")
    monkeypatch.setattr(fusing, "pretrain_aligner", never)
    again = make_fusion_targets(student, words, thought, recorded[True], **how, folder=tmp_path)
    for found in (kept, again):
        for name, t in whole.targets.items():
            assert isinstance(found.targets[name].k, Column) and torch.equal(found.targets[name].mask, t.mask)
            for part in "kv": assert torch.equal(getattr(found.targets[name], part)[:], getattr(t, part)), (name, part)
        assert torch.equal(found.features, whole.features)
        for name, x in whole.prototypes.items(): assert torch.equal(found.prototypes[name], x)
        assert closeness(student, found) == closeness(student, whole)
    assert len(folders(tmp_path)) == 2 and kept.content_hash() == again.content_hash()
    if time != "segment": return
    config = DistillConfig(steps=3, batch=16, lr=1e-3, log_every=1)
    curves = []
    for targets in (whole, kept):
        model = copy.deepcopy(student)
        curves.append(distill(model, model, targets, KVFusion(fusion="govern"), config).history)
    assert curves[0] == curves[1]


CHANGES = {                                      # of what a place reads, without a word to `make_fusion_targets`
    "compress": ("crop", "compress_kv", partial(compress_kv, crop="last")),
    "warp": ("segment", "TimeWarper", partial(TimeWarper, smoothness=dict(prompt=3., reasoning=3., answer=3.))),
    "available": ("segment", None, None),
}

@pytest.mark.parametrize("what", CHANGES)
def test_kept_targets_are_of_all_that_they_depend_on(several, tmp_path, monkeypatch, what):
    "They were found again after a change of settings, or of the problems that a teacher is there for."
    student, words, thought, recorded = several
    time, name, new = CHANGES[what]
    how, whole, some = dict(time=time, fit_steps=1), *({"a": recorded[stream]["a"]} for stream in (False, True))
    def targets(): return make_fusion_targets(student, words, thought, some, **how, folder=tmp_path).targets["a"]
    first = targets()
    if name: monkeypatch.setattr(places, name, new)
    else:
        there = torch.arange(70) > 9
        whole, some = ({"a": replace(x["a"], available=there)} for x in (whole, some))
    fresh = make_fusion_targets(student, words, thought, whole, **how).targets["a"]
    for _ in range(2): second = targets()
    assert len(folders(tmp_path)) == 2
    assert torch.equal(second.k[:], fresh.k) and torch.equal(second.mask, fresh.mask)
    assert not (torch.equal(second.k[:], first.k[:]) and torch.equal(second.mask, first.mask))


def test_kept_targets_are_of_the_code_that_makes_them(several, tmp_path, monkeypatch):
    student, words, thought, recorded = several
    asked = []
    monkeypatch.setattr(fusing, "code_hash", lambda *made_by: asked.append(made_by) or str(len(asked)))
    how = dict(recorded={"a": recorded[True]["a"]}, fit_steps=1, folder=tmp_path)
    for _ in range(2): make_fusion_targets(student, words, thought, **how)
    assert {TimeWarper, compress_kv, KeptCache, kept_shards, make_fusion_targets} <= set(asked[0])
    assert len(folders(tmp_path)) == 2, "other code, other targets"


def test_kept_targets_go_with_the_last_page_that_needs_them(root, tmp_path, monkeypatch):
    "On a node with GPUs they filled its disk."
    sources = {}
    for name in ("kv_fuse", "exp7"):
        cells = json.loads((root/"nbs"/"experiments"/f"{name}.ipynb").read_text())["cells"]
        sources[name] = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code").splitlines()
    (kept,) = (line for line in sources["kv_fuse"] if line.startswith("folder = "))
    (removed,) = (line for line in sources["exp7"] if "rmtree" in line)
    found = {}
    exec(kept, dict(large=True), found)
    monkeypatch.chdir(tmp_path)
    os.makedirs(f"{found['folder']}/0123")
    os.makedirs("artifacts/targets/others")
    for _ in range(2): exec(removed, dict(shutil=shutil))          # once there is nothing: nothing happens
    assert os.listdir("artifacts/targets") == ["others"] and sources["exp7"][-1] == removed


def test_own_keys_are_computed_again_where_they_are_not_kept(several):
    student, words, thought, _ = several
    looked_up, computed = (fusing._own(student, thought, kept) for kept in (True, False))
    for rows in fusing.batches_of(70):
        for x, y in zip(looked_up(rows), computed(rows)): assert torch.equal(x, y)


def test_whole_tensors_are_those_of_the_parts():
    parts = made()
    whole = filled(iter(parts), 10)
    assert all(torch.equal(x, whole[name]) for name, x in joined(parts).items())
    column = columns_of([shard_of(parts[0], 0, 4)])["k"]
    assert torch.equal(rows_of(column, [2, 0]), rows_of(parts[0]["k"], [2, 0]))
    with pytest.raises(ValueError, match="^filled: 8 of 10 problems: give all of them, in order$"):
        filled(parts[:2], 10)


MEMORY = """
import sys, torch
from rcid.kv.shards import SHARD, load_shards, write_shards
folder, problems = sys.argv[1], int(sys.argv[2])
def own():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"): return int(line.split()[1]) / 1024
def batches():
    for first in range(0, problems, SHARD):
        k = torch.full((SHARD, 8, 4, 32, 32), 1. + first)             # 8 MB
        yield dict(k=k, mask=torch.ones(SHARD, 32).bool())
def watched(parts):
    for part in parts:
        seen.append(own())
        yield part
seen = [own()]
write_shards(folder, watched(batches()), problems)
print(max(seen) - seen[0])
seen = [own()]
k = load_shards(folder)["k"]
for rows in torch.randperm(problems).split(16):
    batch = k[rows]
    assert batch[:, 0, 0, 0, 0].tolist() == (1. + rows // SHARD * SHARD).tolist()
    seen.append(own())
print(max(seen) - seen[0])
"""

def test_memory_does_not_grow_with_the_problems(tmp_path, root):
    """384 MB of targets, of which some shards of 8 MB and a batch of 2 are in memory. Pages of mapped files are the
    system's to drop: what is counted is the process's own memory."""
    run = [sys.executable, "-c", MEMORY, str(tmp_path/"targets"), str(48 * 64)]
    written, read = map(float, subprocess.run(run, cwd=root, check=True, capture_output=True, text=True).stdout.split())
    assert sum(file.stat().st_size for file in (tmp_path/"targets").iterdir()) > 380e6
    assert written < 150 and read < 24, (written, read)
