"""The large scales before anything is paid for: counts of the 8B models, the a100 matrix, the conversion of the gpu
scale."""

import sys
import pytest, torch
from conftest import output_of, run
from rcid.causal import Site
from rcid.core import load_params
from rcid.pipeline.workspace import compose_params
from rcid.distill import DistillConfig
from rcid.models import get_adapter, shrink, to_qwen3
from rcid.report.budget import SHAPES, _Kernels, layer_bytes, narrow_model, parameters, run_budget, shaped_model
from rcid.report.budget import step_kernels, training_memory

KNOWN = {
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "Qwen/Qwen2-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2-1.5B-Instruct": 1_543_714_304,
}
TIED = ("Qwen/Qwen3-0.6B", "meta-llama/Llama-3.2-1B", "Qwen/Qwen2-1.5B-Instruct")


@pytest.fixture(scope="module")
def shapes(): return {n: shaped_model(n) for n in SHAPES}


@pytest.fixture(scope="module")
def a100(tmp_path_factory):
    file = tmp_path_factory.mktemp("a100")/"params.yaml"
    compose_params(file, "scale=a100")
    return load_params(file)


@pytest.mark.parametrize("name", KNOWN)
def test_parameter_counts_are_the_published_ones(shapes, name):
    model = shapes[name]
    assert parameters(model) == KNOWN[name] and all(p.is_meta for p in model.parameters())
    a = get_adapter(model)
    assert (a.lm_head.weight is a.embed.weight) == (name in TIED)


def test_unknown_shape():
    with pytest.raises(ValueError, match="no shape of 'gpt2': there are Qwen/Qwen3-8B"): shaped_model("gpt2")


def test_memory_is_the_sum_of_its_parts(shapes):
    student, teacher = shapes["Qwen/Qwen3-0.6B"], shapes["Qwen/Qwen3-8B"]
    m = training_memory(student, teacher, 1000, 32)
    trained = sum(p.numel() for p in student.model.layers.parameters()) + 1024
    assert (
        m["student"] == 4 * KNOWN["Qwen/Qwen3-0.6B"]
        and m["teacher"] == 2 * KNOWN["Qwen/Qwen3-8B"]
        and (m["gradients"], m["adamw"]) == (4 * trained, 8 * trained)
    )
    assert m["activations"] == 28 * 1000 * layer_bytes(student) and m["logits"] == 20 * 32 * 151936
    assert m["total"] == sum(v for k, v in m.items() if k != "total")


@pytest.mark.parametrize("method", ("standard_kd", "standard_kd_pairs", "fitnets", "rcid"))
def test_budget_of_a_run(shapes, pairs, method):
    p = pairs["qwen3"]["equal"]
    c = DistillConfig(
        sites=(Site(10, "s2"), Site(20, "end")), layer_map={l: l * 28 // 36 for l in range(36)}, steps=10, batch=4
    )
    b = run_budget(shapes["Qwen/Qwen3-0.6B"], shapes["Qwen/Qwen3-8B"], p, method, c, peak=1e12, share=.5)
    assert (
        b["seconds"] == pytest.approx(b["flops"] / 5e11)
        and b["memory_recomputed"] < b["memory"]
        and b["flops"] > 10 * b["step_flops"]
    )
    tokens, seq = b["tokens"] / 40, p.clean_ids.shape[1]
    trunk = sum(x.numel() for x in shapes["Qwen/Qwen3-0.6B"].model.layers.parameters())
    # the last layer runs whole at the answers only
    assert 6 * trunk * tokens * 4 * 27 / 28 < b["step_flops"] and tokens < 2 * seq
    hidden = {"standard_kd": 1, "standard_kd_pairs": 2, "fitnets": 1 + 28 * seq, "rcid": 2 + 2 * 2}[method]
    assert b["targets"] == 2 * hidden * 4096 * len(p)


def test_a100_is_36_and_12_runs(a100):
    count = lambda b: len(b.families) * len(b.tasks) * len(b.methods) * len(a100.seeds)
    assert count(a100.main_matrix) == 36 and count(a100.extra_matrix) == 12 and len(set(a100.cells)) == 48
    assert a100.main_matrix.families == ["qwen3"] and a100.extra_matrix.families == ["llama"] and a100.distill.bf16
    for family in a100.models.values():
        for side in (family.teacher, family.student): assert len(side["revision"]) == 40 and side["hub"] in SHAPES


def test_a100_resolves_in_dvc(copy):
    "`dvc repro --dry --force` names every cell of the matrix, without a model, a hub or a GPU."
    compose_params(copy/"params.yaml", "scale=a100")
    (copy/".dvc"/"config.local").write_text("[core]\n    no_scm = true\n", encoding="utf-8")
    for options in (("--force",), ("--force", "--allow-missing")):
        done = run(copy, sys.executable, "-m", "dvc", "repro", "--dry", *options)
        assert done.returncode == 0, output_of(done)
        cells = [l for l in done.stdout.splitlines() if l.startswith("> python -m rcid.pipeline.stage distill ")]
        assert len(cells) == len(set(cells)) == 48 and sum("family=llama" in c for c in cells) == 12
        assert {c.replace("run distill", "run evaluate") for c in cells} <= set(done.stdout.splitlines())


# the conversion

def turned(model, scales):
    """Every head's projection is a rotation times a number, and no norm adds a constant to a square: heads then have
    one scale on all tokens, exactly."""
    turn = lambda: torch.linalg.qr(torch.randn(32, 32))[0]
    model.config.rms_norm_eps = 1e-12
    for m in model.modules():
        if hasattr(m, "variance_epsilon"): m.variance_epsilon = 1e-12
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.copy_(torch.cat([s * turn() for s in scales]))
            layer.self_attn.k_proj.weight.copy_(turn())
    return model


@pytest.mark.parametrize("scales, equal", [((1., 1.), True), ((3., 3.), True), ((.3, 3.), False)])
def test_conversion_keeps_what_a_shared_norm_can(make_model, scales, equal):
    torch.manual_seed(0)
    ids = torch.randint(250, (6, 20))
    llama = turned(make_model("llama", d_model=32, heads=2, kv_heads=1, head_dim=32, d_mlp=64), scales)
    before = {k: v.clone() for k, v in llama.state_dict().items()}
    qwen, lost = to_qwen3(llama, ids)
    with torch.no_grad(): a, b = (m(ids).logits for m in (llama, qwen))
    assert (
        torch.allclose(a, b, atol=1e-4) == equal
        and (float(lost[0].max()) < 1e-4) == equal
        and float(lost[1].max()) < 1e-4
    )
    assert (
        qwen.config.model_type == "qwen3"
        and qwen.config.rope_parameters == llama.config.rope_parameters
        and qwen.lm_head.weight is qwen.model.embed_tokens.weight
    )
    for k, v in before.items(): assert torch.equal(llama.state_dict()[k], v) and torch.equal(qwen.state_dict()[k], v)


def test_only_llama_is_converted(models):
    with pytest.raises(ValueError, match="cannot convert a qwen3 model: only llama"):
        to_qwen3(models["qwen3"], torch.zeros(1, 4, dtype=torch.long))


# kernels

def test_kernels_are_operations_that_are_no_views():
    with _Kernels() as kernels:
        x = torch.ones(2, 3)                                          # 1
        y = (x @ x.T).view(4)[1:]                                     # 1: transposed, viewed and cut
        y.add_(1)                                                     # 1
    assert sum(kernels.done.values()) == 3


def test_what_launches_nothing_is_no_kernel():
    "Memory that is reserved, a number that the host reads, a view, a record of the profiler."
    x = torch.ones(2, 3)
    with _Kernels() as kernels:
        torch.empty(3), torch.empty_like(x), x.new_empty(2), torch.empty_strided((2, 3), (3, 1))
        x.detach(), x.t(), x.reshape(6), x[0].expand(4, 3)
        x[0, 0].item(), bool(x[0, 0])
        with torch.profiler.record_function("step"): pass
    assert not sum(kernels.done.values()) and len(kernels.done) > 7, kernels.done
    with _Kernels() as kernels, torch.inference_mode(): x.exp().sum().item()
    assert sum(kernels.done.values()) == 2, kernels.done


def test_a_layer_more_is_so_many_kernels_more(pairs, tokenizers):
    teacher = narrow_model("Qwen/Qwen3-8B", len(tokenizers["qwen3"]))
    few, c = pairs["qwen3"]["equal"], DistillConfig(batch=4, bf16=True)
    def counted(layers): return step_kernels(shrink(teacher, layers), teacher, few, "standard_kd_pairs", c)
    two, three, four = (counted(n) for n in (2, 3, 4))
    assert four - three == three - two > 100
