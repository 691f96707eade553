"""Targets on disk: what is read is what was made, losses are the same bit for bit, 16 bits round once, a shard that is
missing or was changed is refused, and memory grows with the batch and not with the problems."""

import copy, itertools, subprocess, sys
from dataclasses import replace
from types import SimpleNamespace
import pytest, torch
from rcid.core.paths import read_yaml
from rcid.core.tensors import load_tensors
from rcid.data.reasoning import encode_problems, word_problems
from rcid.distill import DistillConfig, distill
from rcid.kv import KV_METHODS, AttentionWeighting, KVMethod, KVObjective, KVShape, LatentModel, MapProjectionAligner
from rcid.kv import Column, RegressionKVLoss, Warped, columns_of, kept_shards, load_shards, method_of, write_shards
from rcid.kv.shards import shard_of
from rcid.models import load_model, train_tokenizer

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


def joined(parts):
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}


@pytest.mark.parametrize("rows", ([9, 0, 4, 3], [1], [5, 5, 5], slice(2, 7), slice(None), torch.tensor([8, 1, -1])))
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
    (folder,) = tmp_path.iterdir()
    file = sorted(folder.iterdir())[1]
    whole = file.read_bytes()
    if how == "truncated": file.write_bytes(whole[:-40])
    elif how == "changed": file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    else: file.write_bytes(sorted(folder.iterdir())[0].read_bytes())
    with pytest.raises(ValueError) as error: load_shards(folder)
    assert str(folder) in one_line(error) and "make" in one_line(error)
    again = kept_shards(tmp_path, (), lambda: parts, 10)
    assert torch.equal(again["k"][:], joined(parts)["k"]) and load_tensors(file)


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
    (folder,) = tmp_path.iterdir()
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
