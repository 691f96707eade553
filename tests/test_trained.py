"""A student on disk is what training changed: it comes back whole, and another beginning is refused. Weights that are
read in sixteen bits learn in float32."""

import json
from dataclasses import replace
from itertools import islice
import pytest, torch
from safetensors.torch import load_file
from conftest import ROOT
from rcid.core.paths import CHECKSUMS
from rcid.data.reasoning import encode_problems, word_problems
from rcid.distill import DistillConfig, distill
from rcid.kv import KV_METHODS, LatentModel
from rcid.models import load_model, save_model, save_trained, train_tokenizer

PROBLEMS = list(islice(word_problems("train", style="equation", steps=(2,), operations="+-", largest=9), 36))


@pytest.fixture(scope="module")
def began(tmp_path_factory):
    "A tokenizer, problems, and the checkpoint in bfloat16 that a student begins as, with its teacher."
    folder, words = tmp_path_factory.mktemp("began"), train_tokenizer([p.text for p in PROBLEMS], vocab=300)
    sizes = dict(vocab=len(words), d_model=32, heads=4, d_mlp=48)
    base, _ = load_model(
        dict(arch="llama", layers=2, kv_heads=2, head_dim=8, seed=2) | sizes, dtype="bfloat16", device="cpu"
    )
    teacher, _ = load_model(
        dict(arch="qwen3", layers=3, kv_heads=4, head_dim=16, seed=1) | sizes, dtype="float32", device="cpu"
    )
    return save_model(base, words, folder/"base"), words, encode_problems(PROBLEMS, words), teacher


@pytest.fixture(scope="module")
def learned(began):
    "A KV student that was read in float32 and has learned at the learning rate of the paper."
    base, words, data, teacher = began
    student, _ = load_model(base, dtype="float32", device="cpu")
    method = replace(KV_METHODS["kava"], fit_steps=2, latents=3)
    config = DistillConfig(steps=20, batch=4, lr=5e-5, log_every=20)
    distill(LatentModel(student, words.bos_token_id, 2), teacher, data, method, config)
    return student


def test_small_steps_of_a_kv_student_are_not_rounded_away(began, learned):
    "In 16 bits 7 % of the weights moved."
    before, _ = load_model(began[0], dtype="float32", device="cpu")
    layers = list(zip(before.model.layers.parameters(), learned.model.layers.parameters(), strict=True))
    assert sum(int((p != q).sum()) for p, q in layers) > .95 * sum(p.numel() for p, _ in layers)
    assert torch.equal(before.model.embed_tokens.weight, learned.model.embed_tokens.weight)


@pytest.mark.parametrize("page", ("kv_distill", "kv_fuse"))
def test_the_pages_read_what_they_train_in_float32_and_write_what_changed(page):
    cells = json.loads((ROOT/"nbs"/"experiments"/f"{page}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    own, base = ("plain", "kv") if page == "kv_distill" else ("student", "kv_base")
    loads = next(line for line in code.splitlines() if line.startswith((f"{own}, _ =", f"{own}, tokenizer =")))
    assert f'"artifacts/{base}/student"' in loads and 'dtype="float32"' in loads
    # a thinker is written with what its thinking needs, and else as `save_trained` does
    saves = "save_latent(student, tokenizer, " if page == "kv_distill" else "_trained(student, tokenizer, "
    assert saves in code and "save_pretrained" not in code


def test_a_student_on_disk_is_its_layers_in_sixteen_bits(began, learned, tmp_path):
    base, words, *_ = began
    save_trained(learned, words, tmp_path/"student", base)
    kept = load_file(tmp_path/"student"/"trained.safetensors")
    assert kept and {t.dtype for t in kept.values()} == {torch.bfloat16}
    assert all("layers." in name or name == "model.norm.weight" for name in kept)
    again, tokenizer = load_model(tmp_path/"student", dtype="float32", device="cpu")
    for (name, p), q in zip(learned.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(q[1], p.bfloat16().float()), name
    assert tokenizer("1 + 2")["input_ids"] == words("1 + 2")["input_ids"]
    half, _ = load_model(tmp_path/"student", dtype="bfloat16", device="cpu")
    assert half.dtype == torch.bfloat16 and torch.equal(half.lm_head.weight, again.lm_head.weight.bfloat16())


def test_what_nothing_changed_is_nothing(began, tmp_path):
    base, words, *_ = began
    student, _ = load_model(base, dtype="float32", device="cpu")
    save_trained(student, words, tmp_path/"student", base)
    assert not load_file(tmp_path/"student"/"trained.safetensors")
    again, _ = load_model(tmp_path/"student", dtype="float32", device="cpu")
    assert all(torch.equal(p, q) for p, q in zip(student.parameters(), again.parameters(), strict=True))


def test_another_beginning_is_refused(began, learned, tmp_path):
    base, words, _, teacher = began
    save_model(teacher, words, tmp_path/"other")
    with pytest.raises(ValueError, match="is not what this model began as: its .* absent|here it is"):
        save_trained(learned, words, tmp_path/"student", tmp_path/"other")
    assert not (tmp_path/"student").exists()
    fresh, _ = load_model(base, dtype="float32", device="cpu")
    save_model(fresh, words, tmp_path/"own")
    save_trained(learned, words, tmp_path/"student", tmp_path/"own")
    (tmp_path/"own"/CHECKSUMS).write_text("")
    with pytest.raises(RuntimeError, match="own is no longer what it began as; make it again"):
        load_model(tmp_path/"student", device="cpu")
    (tmp_path/"student"/"trained.safetensors").write_bytes(b"0")
    with pytest.raises(RuntimeError, match="trained.safetensors does not match its SHA-256"):
        load_model(tmp_path/"student", device="cpu")
