"""What trains and says nothing: shares of a batch that are averaged as if they were equal, controls that are none,
caches of another teacher, padded heads, probabilities of zero."""

import copy, json, math, os, signal, subprocess, sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
import pytest, torch
import torch.nn.functional as F
from conftest import ROOT, environment
from rcid.align import align_tokens, hsic1, layer_cka
from rcid.align.tokens import cross_kl, shared_vocabulary
from rcid.causal import Site, capture, write
from rcid.data import load_pairs
from rcid.data.holdout import styled_problems
from rcid.data.reasoning import encode_problems
from rcid.distill import (
    METHODS,
    DistillConfig,
    SignalRequest,
    distill,
    divergence,
    model_hash,
    plain_distill,
    teacher_targets,
    train_language,
)
from rcid.distill.method import Signals
from rcid.distill.methods import DIITO
from rcid.kv import (
    KV_METHODS,
    AlignedKV,
    KVCache,
    KVObjective,
    LatentModel,
    RegressionKVLoss,
    attention_kl,
    codi_loss,
    diagnose_losses,
    kv_attention,
    kv_regression,
    with_latents,
)
from rcid.kv.compress import decode_score
from rcid.kv.fusion_targets import FusionTargets
from rcid.kv.recording import Teacher, record_teacher, load_recording
from rcid.models import common_vocab, get_adapter, load_model, save_model, shrink, train_tokenizer

SITES = (Site(0, "s2"), Site(1, "end"))
CONFIG = DistillConfig(sites=SITES, layer_map={0: 0, 1: 0, 2: 1, 3: 1}, steps=3, batch=4, lr=1e-3, log_every=1)
KINDS = ("forward", "reverse", "jsd", "skew")
NEVER = -torch.inf


@contextmanager
def without_complaint():
    "An error of the kind that is looked for here is a failed assertion."
    try: yield
    except (ValueError, FloatingPointError) as e: raise AssertionError(f"refused: {e}") from e


@pytest.fixture(scope="module")
def toy(make_model, tokenizers):
    "A random teacher of four layers and sixteen pairs."
    return make_model("llama", d_model=32, heads=2, kv_heads=1, d_mlp=64), load_pairs(
        "ioi", tokenizers["llama"], split="train", n=16
    )


@pytest.fixture(scope="module")
def thinking():
    "Tokenizer, forty problems, a teacher and a maker of students that think in places."
    problems = [p.styled("equation") for p in styled_problems(n=40, steps=(1, 2), operations="+-", largest=20)]
    tokenizer = train_tokenizer([p.text for p in problems], vocab=500)
    make = lambda **sizes: load_model(dict(vocab=len(tokenizer), d_mlp=64) | sizes, dtype="float32", device="cpu")[0]
    teacher = make(arch="qwen3", layers=4, d_model=48, heads=4, kv_heads=4, head_dim=16, seed=1)
    student = lambda rounds=2: LatentModel(
        make(arch="llama", layers=2, d_model=32, heads=4, kv_heads=2, head_dim=8, seed=2),
        tokenizer.bos_token_id,
        rounds,
    )
    return tokenizer, encode_problems(problems, tokenizer), teacher, student


# 1. one process and two

JOB = '''
import copy, json, sys
from dataclasses import replace
import torch
from accelerate import PartialState
from rcid.causal import Site
from rcid.core import embedded, seed_all
from rcid.data import load_pairs
from rcid.data.holdout import styled_problems
from rcid.data.reasoning import encode_problems
from rcid.distill import DistillConfig, distill
from rcid.kv import KV_METHODS, LatentModel, Warped, with_latents
from rcid.kv.aligner import AlignedKV
from rcid.kv.fusion_targets import FusionTargets
from rcid.kv.multi_teacher import KVFusion
from rcid.models import load_model, shrink, train_tokenizer
torch.set_num_threads(1)
seed_all(0)
state, results = PartialState(cpu=True), {}
def keep():
    if state.is_main_process: json.dump(results, open(sys.argv[1], "w"))
def case(name, student, teacher, data, method, c):
    try:
        results[name] = [
            {k: v for k, v in h.items() if k != "step"} for h in distill(student, teacher, data, method, c).history
        ]
    except ValueError as e:
        results[name] = f"{e}"
    keep()
tok = train_tokenizer(
    [f" {n}" for n in embedded("names")["first_names"]] * 3 + [t["text"] for t in embedded("ioi")["templates"]],
    vocab=1500,
    bos=True,
)
teacher, _ = load_model(
    dict(arch="llama", vocab=len(tok), layers=4, d_model=32, heads=2, kv_heads=1, d_mlp=64),
    dtype="float32",
    device="cpu",
)
short, long = load_pairs("ioi", tok, split="train", n=20), load_pairs(
    "ioi", tok, split="train", n=20, variant="ood_long"
)
def joined(a, b): # pairs of very unequal lengths, one after the other
    wide = b.clean_ids.shape[1]
    pad = lambda x: (
        torch.nn.functional.pad(x, (0, wide - x.shape[1])) if x.ndim == 2 and x.shape[1] == a.clean_ids.shape[1] else x
    )
    both = lambda x, y: torch.stack([pad(x), y], 1).flatten(0, 1)
    tensors = {
        k: both(getattr(a, k), getattr(b, k))
        for k in (
            "clean_ids",
            "corrupt_ids",
            "attention_mask",
            "answer_pos",
            "correct_token_id",
            "wrong_token_id",
            "template_id",
            "entity_ids",
        )
    }
    return replace(
        a, **tensors, key_positions={r: both(a.key_positions[r], b.key_positions[r]) for r in a.key_positions}
    )
mixed = joined(short, long)
c = DistillConfig(
    sites=(Site(0, "s2"), Site(1, "end")), layer_map={0: 0, 1: 0, 2: 1, 3: 1}, steps=3, batch=4, lr=1e-3, log_every=1
)
for name, data, method, config in (
    ("rcid", short, "rcid", replace(c, batch=2)),
    ("shuffled", short, "rcid_shuffled", replace(c, batch=2)),
    ("shuffled of four", mixed, "rcid_shuffled", c),
    ("kl at all tokens", mixed, "standard_kd", replace(c, kl_at="all")),
    ("kl on pairs at all tokens", mixed, "standard_kd_pairs", replace(c, kl_at="all")),
    ("fitnets", mixed, "fitnets", c),
    ("micro-batches", mixed, "fitnets", replace(c, kl_at="all", batch=8, micro_batch=3)),
    ("five pairs for a batch of eight", mixed[:5], "standard_kd", replace(c, batch=8)),
    ("cka", mixed, "cka", c),
):
    case(name, shrink(teacher, 2), teacher, data, method, config)
problems = [p.styled("equation") for p in styled_problems(n=40, steps=(1, 2, 3), operations="+-", largest=400)]
words = train_tokenizer([p.text for p in problems], vocab=320)
data = encode_problems(problems, words)
make = lambda **sizes: load_model(dict(vocab=len(words), d_mlp=64) | sizes, dtype="float32", device="cpu")[0]
thinker = make(arch="qwen3", layers=4, d_model=48, heads=4, kv_heads=4, head_dim=16, seed=1)
student = lambda: LatentModel(
    make(arch="llama", layers=2, d_model=32, heads=4, kv_heads=2, head_dim=8, seed=2), words.bos_token_id, 2
)
for name in ("latent_sft", "latent_kd", "kava", "kv_structured"):
    case(name, student(), thinker, data, replace(KV_METHODS[name], latents=4, fit_steps=2), c)
case(
    "kv cka", student(), thinker, data, replace(KV_METHODS["latent_sft"], latents=4, kv=Warped(loss=None, cka=0.05)), c
)
plain, g = make(
    arch="qwen3", layers=2, d_model=32, heads=4, kv_heads=2, head_dim=8, seed=3
), torch.Generator().manual_seed(0)
thought = with_latents(data[:12], 4, words.bos_token_id)
def fusion_targets(*have): # two teachers, each there for the problems of its list
    n, seq = len(thought), thought.input_ids.shape[1]
    targets = {}
    for name, there in zip("ab", have):
        mask = thought.attention_mask.bool() & torch.tensor([i in there for i in range(n)])[:, None]
        targets[name] = AlignedKV(
            *(torch.randn(n, 2, 2, seq, 8, generator=g) * mask[:, None, None, :, None] for _ in "kv"), mask
        )
    return FusionTargets(
        thought, targets, torch.randn(n, 16, generator=g), {name: torch.randn(16, generator=g) for name in targets}
    )
for name, have, how in (
    ("fixed", (range(12), range(12)), {}),
    ("some taught", ((0, 1, 2, 3, 4, 7, 9), (0, 2, 4, 5, 9)), {}),
    ("govern", (range(12), range(12)), dict(fusion="govern")),
    ("router", (range(12), range(0, 12, 2)), dict(fusion="learnable", load=5.0, entropy=0.1)),
    ("a share without teachers", ((1,), (1, 5)), dict(fusion="learnable", load=5.0)),
):
    case(name, copy.deepcopy(plain), plain, fusion_targets(*have), KVFusion(**how), c)
results["processes"] = state.num_processes
keep()
if state.num_processes > 1: state.destroy_process_group()
'''


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    "The same runs by one process and by two."
    folder = tmp_path_factory.mktemp("processes")
    (folder/"job.py").write_text(JOB)
    env = environment(ROOT, OMP_NUM_THREADS="1")
    command = lambda name, *how: [sys.executable, *how, str(folder/"job.py"), str(folder/f"{name}.json")]
    start = lambda *words: subprocess.Popen(command(*words), cwd=ROOT, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    jobs, said = [start("one"), start("two", *two)], []
    for job in jobs:
        try: said.append(job.communicate(timeout=180)[0])
        except subprocess.TimeoutExpired:                                   # processes that wait for one another
            os.killpg(job.pid, signal.SIGKILL)
            said.append(job.communicate()[0])
    files = [folder/"one.json", folder/"two.json"]
    assert all(f.exists() for f in files), "\n".join(s[-3000:] for s in said)
    return tuple(json.loads(f.read_text()) for f in files)


def same(a, b):
    assert isinstance(a, list) and isinstance(b, list), (a, b)
    assert a == [{k: pytest.approx(v, rel=1e-4, abs=1e-4) for k, v in h.items()} for h in b]


def test_a_batch_is_shuffled_before_it_is_shared_out(processes):
    one, two = processes
    same(two["shuffled"], one["shuffled"])
    same(two["shuffled of four"], one["shuffled of four"])
    same(two["rcid"], one["rcid"])
    assert two["shuffled"][0]["method_loss"] != pytest.approx(two["rcid"][0]["method_loss"], rel=1e-2)


@pytest.mark.parametrize(
    "name",
    ("kl at all tokens", "kl on pairs at all tokens", "fitnets", "micro-batches", "five pairs for a batch of eight"),
)
def test_pairs_and_tokens_weigh_the_same_in_one_process_and_in_two(processes, name):
    same(processes[1][name], processes[0][name])


@pytest.mark.parametrize(
    "name", ("latent_sft", "latent_kd", "kava", "kv_structured", "fixed", "some taught", "govern", "router")
)
def test_kv_methods_weigh_the_same_in_one_process_and_in_two(processes, name):
    same(processes[1][name], processes[0][name])


def test_processes_without_a_taught_problem_wait_for_nobody(processes):
    one, two = processes
    assert "a share without teachers" in two and two.get("processes") == 2, "the processes never came to an end"
    same(two["a share without teachers"], one["a share without teachers"])


@pytest.mark.parametrize("name", ("cka", "kv cka"))
def test_what_compares_a_whole_batch_refuses_several_processes(processes, name):
    one, two = processes
    assert (
        isinstance(one[name], list)
        and isinstance(two[name], str)
        and "start it with one process" in two[name]
        and "\n" not in two[name]
    )


def test_shuffled_pairs_need_a_partner(toy):
    teacher, pairs = toy
    with pytest.raises(ValueError, match="one pair in a batch, which would be its own partner") as e:
        distill(shrink(teacher, 2), teacher, pairs, "rcid_shuffled", replace(CONFIG, batch=1))
    assert "\n" not in str(e.value)


def test_a_short_last_batch_weighs_less_in_the_diagnosis():
    rows = [[1., 2., 3., 4.], [5., 6., 7., 8.], [100.]]
    d = diagnose_losses(lambda some: dict(ce=sum(some) / len(some), kv=1.), rows, dict(ce=1., kv=1.)).rows
    assert d[0]["mean"] == pytest.approx(sum(map(sum, rows)) / 9) and d[1]["mean"] == 1
    even = diagnose_losses(lambda some: dict(ce=sum(some) / len(some)), rows[:2], dict(ce=1.)).rows[0]
    assert even["mean"] == 4.5 and even["std"] == pytest.approx(math.sqrt(8))


def test_biased_cka_is_a_mean_over_batches(toy):
    teacher, pairs = toy
    student = shrink(teacher, 2)
    batches = [dict(input_ids=b.clean_ids, attention_mask=b.attention_mask) for b in (pairs[:14], pairs[14:])]
    def hsic(x, y, n): return (x - x.mean(0)).mT.matmul(y - y.mean(0)).square().sum() / (n - 1)**2
    sums = torch.zeros(3, dtype=torch.float64)
    for b in batches:
        with torch.no_grad(), capture(teacher, [2]) as t, capture(student, [1]) as s:
            get_adapter(teacher).trunk(**b), get_adapter(student).trunk(**b)
        keep = (
            b["attention_mask"].bool()
            & (b["attention_mask"].cumsum(1) > 1)
            & (b["input_ids"] != (teacher.config.bos_token_id if teacher.config.bos_token_id is not None else -1))
        )
        x, y = t[2][keep].double(), s[1][keep].double()
        sums += torch.stack([hsic(x, y, len(x)), hsic(x, x, len(x)), hsic(y, y, len(x))])
    got = layer_cka(teacher, student, batches, debiased=False)[2, 1]
    assert got.item() == pytest.approx((sums[0] / (sums[1] * sums[2]).sqrt()).item(), abs=1e-6)


# 2. padded vocabularies

def padded(model, more: int):
    "The same model whose head and embedding have more rows."
    wide = copy.deepcopy(model)
    wide.resize_token_embeddings(get_adapter(model).vocab + more, mean_resizing=False)
    return wide


@pytest.mark.parametrize("kl_at", ("answer", "all"))
def test_padding_of_a_head_changes_no_training(toy, kl_at):
    teacher, pairs = toy
    config, wide = replace(CONFIG, kl_at=kl_at), padded(teacher, 128)
    for method in ("standard_kd", "rcid", "diito", "fitnets"):
        plain = distill(shrink(teacher, 2), teacher, pairs, method, config).history
        with without_complaint(): got = distill(shrink(teacher, 2), wide, pairs, method, config).history
        assert got == [pytest.approx(h, rel=1e-5) for h in plain], method
    with without_complaint():
        assert plain_distill(shrink(teacher, 2), wide, pairs, "standard_kd", config) == pytest.approx(
            plain_distill(shrink(teacher, 2), teacher, pairs, "standard_kd", config), rel=1e-5
        )
        # or the student's head is the padded one
        wider = distill(padded(shrink(teacher, 2), 128), teacher, pairs, "standard_kd", config).history
    assert wider == [
        pytest.approx(h, rel=1e-5) for h in distill(shrink(teacher, 2), teacher, pairs, "standard_kd", config).history
    ]


def test_other_entry_points_take_padded_heads(toy, thinking):
    teacher, pairs = toy
    language = lambda t: train_language(
        shrink(teacher, 2), pairs.clean_ids, pairs.attention_mask, teacher=t, steps=2, batch=4, lr=1e-3
    )
    tokenizer, data, thinker, student = thinking
    objective = lambda t: KVObjective(replace(KV_METHODS["latent_kd"], latents=3), student(), t, data, CONFIG)
    with without_complaint():
        same_losses, a, b = language(padded(teacher, 64)), objective(padded(thinker, 64)), objective(thinker)
    assert same_losses == pytest.approx(language(teacher), rel=1e-5)
    parts = [{k: v.item() for k, v in x.parts([0, 1, 2], 0, x.start()).items()} for x in (a, b)]
    assert parts[0] == pytest.approx(parts[1], rel=1e-5)


def test_qwen_sizes_are_one_vocabulary(tokenizers):
    pairs = load_pairs("ioi", tokenizers["qwen2"], split="train", n=4)
    make = lambda vocab, layers: load_model(
        dict(arch="qwen2", vocab=vocab, layers=layers, d_model=8, heads=2, kv_heads=1, d_mlp=16),
        dtype="float32",
        device="cpu",
    )[0]
    with without_complaint():
        result = distill(make(151_936, 2), make(152_064, 4), pairs, "standard_kd_pairs", replace(CONFIG, steps=1))
    assert result.steps == 1


def test_tokens_beyond_the_prefix_and_other_vocabularies_are_refused(toy):
    teacher, pairs = toy
    vocab, student = get_adapter(teacher).vocab, shrink(teacher, 2)
    beyond = replace(
        pairs, clean_ids=torch.where(torch.arange(pairs.clean_ids.shape[1]) == 2, vocab + 5, pairs.clean_ids)
    )
    for data, wide, message in (
        (beyond, 64, f"the data hold token {vocab + 5}"),
        (pairs, 1025, "more than padding"),
        (replace(pairs, correct_token_id=pairs.correct_token_id + vocab), 1024, "the data hold token"),
    ):
        with pytest.raises(ValueError, match=f"vocabulary mismatch.*{message}.*resize_token_embeddings") as e:
            distill(student, padded(teacher, wide), data, "standard_kd", CONFIG)
        assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="the data hold token"):
        train_language(student, beyond.clean_ids, teacher=padded(teacher, 64), steps=1, batch=4, lr=1e-3)
    # nothing is known of the data
    with pytest.raises(ValueError, match="vocabulary mismatch"): common_vocab(padded(teacher, 8), student)


# 3. caches

class Halved(torch.nn.Module):
    def forward(self, w): return w / 2

@contextmanager
def hooked(module, kind):
    handle = (
        module.register_forward_hook(lambda m, args, out: out * 1.5)
        if kind == "hook"
        else module.register_forward_pre_hook(lambda m, args: (args[0] * 1.5, *args[1:]))
    )
    try:
        yield
    finally:
        handle.remove()

@contextmanager
def changed(teacher, how, pairs):
    "The teacher in another state."
    layer = teacher.model.layers[1]
    if how == "write":
        with write(teacher, {Site(1, "s2"): torch.zeros(teacher.config.hidden_size)}, pairs.key_positions): yield
    elif how in ("hook", "pre-hook"):
        with hooked(layer.mlp, how): yield
    elif how == "parametrization":
        torch.nn.utils.parametrize.register_parametrization(layer.mlp.down_proj, "weight", Halved())
        try:yield
        finally:
            torch.nn.utils.parametrize.remove_parametrizations(layer.mlp.down_proj, "weight", leave_parametrized=False)
    elif how == "a forward of its own":
        layer.mlp.forward = lambda x, plain=layer.mlp.forward: plain(x) * 1.5
        try:yield
        finally: del layer.mlp.forward
    elif how == "rotation":
        teacher.model.rotary_emb.inv_freq.mul_(0.5)
        try:yield
        finally: teacher.model.rotary_emb.inv_freq.mul_(2)
    elif how == "attention scale":
        layer.self_attn.scaling *= 3
        try:yield
        finally: layer.self_attn.scaling /= 3
    elif how == "autocast":
        with torch.autocast("cpu", torch.bfloat16): yield

STATES = (
    "write",
    "hook",
    "pre-hook",
    "parametrization",
    "a forward of its own",
    "rotation",
    "attention scale",
    "autocast",
)

@pytest.mark.parametrize("how", STATES)
def test_targets_of_a_changed_teacher_are_its_own(toy, tmp_path, how):
    teacher, pairs = toy
    teacher = copy.deepcopy(teacher)
    request = SignalRequest(corrupt=False, layers=(1,))
    def targets(folder):
        torch.manual_seed(0)
        return {k: v.clone() for k, v in teacher_targets(teacher, pairs, request, folder).items()}
    plain = targets(tmp_path)
    with changed(teacher, how, pairs): fresh, got = targets(None), targets(tmp_path)
    assert not torch.equal(fresh["final"], plain["final"]) and all(torch.equal(got[k], fresh[k]) for k in fresh)
    after = targets(tmp_path)
    assert all(torch.equal(after[k], plain[k]) for k in plain)             # and none of its numbers stay behind


def test_another_attention_kernel_or_number_format_is_another_file(toy, tmp_path):
    teacher, pairs = toy
    files = lambda: len(list(tmp_path.iterdir()))
    teacher_targets(teacher, pairs, SignalRequest(), tmp_path)
    kernel = teacher.config._attn_implementation
    try:
        teacher.config._attn_implementation = "eager" if kernel != "eager" else "sdpa"
        teacher_targets(teacher, pairs, SignalRequest(), tmp_path)
    finally: teacher.config._attn_implementation = kernel
    assert files() == 2
    teacher_targets(copy.deepcopy(teacher).to(torch.bfloat16), pairs, SignalRequest(), tmp_path)
    teacher_targets(teacher, pairs, SignalRequest(), tmp_path)
    assert files() == 3


def test_a_teacher_that_says_nan_is_not_said_to_need_more_bits(toy):
    teacher, pairs = toy
    teacher = copy.deepcopy(teacher)
    with torch.no_grad(): teacher.model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"^the teacher's hidden states hold NaN or inf \(pairs 0 to 31\): it") as e:
        teacher_targets(teacher, pairs, SignalRequest(), dtype=torch.bfloat16)
    assert "\n" not in str(e.value)


def test_hooks_of_the_libraries_do_not_count(toy, tmp_path):
    teacher, pairs = toy
    teacher = copy.deepcopy(teacher)
    teacher(pairs.clean_ids[:2], output_hidden_states=True)                # transformers leaves hooks that record
    teacher_targets(teacher, pairs, SignalRequest(), tmp_path)
    teacher_targets(teacher, pairs, SignalRequest(), tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_kv_targets_of_a_changed_teacher_are_its_own(thinking, tmp_path):
    _, data, teacher, student = thinking
    method = replace(KV_METHODS["latent_kd"], latents=3, a_kl=1.0)
    def final(folder):
        objective = KVObjective(method, student(), teacher, data, replace(CONFIG, targets_dir=folder))
        objective.start()
        return objective.targets["final"][:]
    plain = final(str(tmp_path))
    with hooked(teacher.model.layers[1].mlp, "hook"): fresh, got = final(None), final(str(tmp_path))
    assert torch.equal(got, fresh) and not torch.equal(got, plain) and torch.equal(final(str(tmp_path)), plain)


def test_a_checkpoint_of_a_student_that_thinks_otherwise_is_not_taken(thinking, tmp_path, capsys):
    _, data, teacher, student = thinking
    config = replace(CONFIG, steps=4, checkpoint_every=2)
    method = replace(KV_METHODS["latent_sft"], latents=3)
    def trip(model, step):
        if step == 3: raise KeyboardInterrupt
        return {}
    kept = replace(config, checkpoint_dir=str(tmp_path/"run"))
    with pytest.raises(KeyboardInterrupt): distill(student(1), teacher, data, method, kept, probe=trip)
    again, whole = distill(student(3), teacher, data, method, kept), distill(student(3), teacher, data, method, config)
    assert model_hash(again.student) == model_hash(whole.student) and "resumed" not in "".join(capsys.readouterr())


def test_a_checkpoint_of_the_plain_teacher_is_not_taken_by_a_changed_one(toy, tmp_path, capsys):
    teacher, pairs = toy
    def trip(model, step):
        if step == 2: raise KeyboardInterrupt
        return {}
    kept = replace(CONFIG, checkpoint_every=1, checkpoint_dir=str(tmp_path/"run"))
    with pytest.raises(KeyboardInterrupt): distill(shrink(teacher, 2), teacher, pairs, "standard_kd", kept, probe=trip)
    student = shrink(teacher, 2)
    with hooked(teacher.model.layers[3].mlp, "hook"): distill(student, teacher, pairs, "standard_kd", kept)
    assert "resumed" not in "".join(capsys.readouterr())


def test_a_teacher_with_another_config_or_tokenizer_is_heard_again(tmp_path):
    problems = styled_problems(n=4, steps=(1,), operations="+-", largest=20)
    texts = [p.styled("equation").text for p in problems]
    tokenizer, other = train_tokenizer(texts, vocab=400), train_tokenizer(texts[::-1], vocab=300)
    model, _ = load_model(dict(arch="qwen3", layers=2, vocab=len(tokenizer)), dtype="float32", device="cpu")
    teacher, path = Teacher(name="a", folder=str(tmp_path/"model")), tmp_path/"recording.safetensors"
    def keys(tokenizer):
        save_model(model, tokenizer, tmp_path/"model")
        return load_recording(teacher, record_teacher(teacher, problems, path), tokenizer).cache.k
    first, rope = keys(tokenizer), model.config.rope_parameters
    model.config.rope_parameters = rope | dict(rope_theta=50.)
    turned = keys(tokenizer)
    assert turned.shape == first.shape and not torch.equal(turned, first)
    model.config.rope_parameters = rope
    assert torch.equal(keys(tokenizer), first) and keys(other).shape[3] > first.shape[3]


def test_lessons_are_known_by_all_that_is_learnt_from(thinking):
    tokenizer, data, *_ = thinking
    thought = with_latents(data, 3, tokenizer.bos_token_id)
    zeros = torch.zeros(len(data), 2, 2, thought.input_ids.shape[1], 8)
    target = AlignedKV(zeros, zeros, thought.attention_mask.bool())
    hashes = {
        FusionTargets(thought, {"a": target}, features, {"a": prototype}).content_hash()
        for features in (torch.zeros(40, 4), torch.ones(40, 4))
        for prototype in (torch.zeros(4), torch.ones(4))
    }
    assert len(hashes) == 4


# 4. probabilities of zero

def test_divergence_of_an_impossible_token_golden():
    s, t = torch.tensor([0., 0., 1.], requires_grad=True), torch.tensor([0., NEVER, 1.])
    loss = divergence(s, t)
    assert (
        loss.item()
        == pytest.approx(math.log((2 + math.e) / (1 + math.e)), abs=1e-6)
        == pytest.approx(0.23818, abs=1e-5)
    )
    loss.backward()
    q, p = s.detach().softmax(0), t.softmax(0)
    assert torch.allclose(s.grad, q - p, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", (1., 2.))
def test_a_token_that_neither_allows_is_no_token(kind, temperature):
    g = torch.Generator().manual_seed(0)
    s, t = torch.randn(5, 6, generator=g), torch.randn(5, 6, generator=g)
    gap = torch.full((5, 1), NEVER)
    wide_s, wide_t = (torch.cat([x[:, :2], gap, x[:, 2:]], 1) for x in (s, t))
    narrow, wide = s.clone().requires_grad_(), wide_s.clone().requires_grad_()
    a, b = divergence(narrow, t, kind, temperature), divergence(wide, wide_t, kind, temperature)
    a.sum().backward(), b.sum().backward()
    assert (
        torch.allclose(a, b, atol=1e-6)
        and (wide.grad[:, 2] == 0).all()
        and torch.allclose(wide.grad[:, [0, 1, 3, 4, 5, 6]], narrow.grad, atol=1e-6)
    )
    assert divergence(wide_s, wide_s, kind, temperature).abs().max() < 1e-6
    # the student alone allows it
    mixed = divergence(torch.cat([s[:, :6], s[:, :1]], 1), torch.cat([t, gap], 1), kind, temperature)
    assert mixed.isfinite().all() if kind != "reverse" else (mixed == torch.inf).all()
    # the teacher alone allows it
    lone = divergence(torch.cat([s, gap], 1), torch.cat([t, t[:, :1]], 1), kind, temperature)
    assert (lone == torch.inf).all() if kind == "forward" else lone.isfinite().all()
    # what is broken stays visible
    assert divergence(torch.full((1, 3), math.nan), t[:1, :3], kind).isnan().all()


@contextmanager
def never_says(model, token):
    handle = model.lm_head.register_forward_hook(
        lambda m, args, out: out.masked_fill(torch.arange(out.shape[-1]) == token, NEVER)
    )
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("method", ("standard_kd", "standard_kd_pairs", "jsd", "skew_kl", "rcid", "diito"))
def test_a_teacher_that_rules_a_token_out_can_be_learnt_from(toy, method):
    teacher, pairs = toy
    student = shrink(teacher, 2)
    with never_says(teacher, 7), without_complaint(): result = distill(student, teacher, pairs, method, CONFIG)
    assert all(math.isfinite(h["loss"]) for h in result.history) and all(
        p.isfinite().all() for p in student.parameters()
    )


def test_a_student_that_rules_out_what_the_teacher_says_stops_the_run(toy):
    teacher, pairs = toy
    student = shrink(teacher, 2)
    with never_says(student, 7), pytest.raises(FloatingPointError, match="loss is inf at step 0") as e:
        distill(student, teacher, pairs, "standard_kd", CONFIG)
    assert "\n" not in str(e.value)


def test_impossible_tokens_across_tokenizers(tokenizers):
    fine, coarse = train_tokenizer(["the store and the bank"] * 3, vocab=264), tokenizers["qwen3"]
    groups, shared = align_tokens(fine, coarse, "When Mary and John went to the store"), shared_vocabulary(fine, coarse)
    g = torch.Generator().manual_seed(0)
    s, t = (torch.randn(len(ids), len(tok), generator=g) for ids, tok in zip(groups.ids, (fine, coarse)))
    unused = next(i for i in shared[1].tolist() if i not in groups.ids[1])
    t[:, unused] = NEVER
    s.requires_grad_()
    loss = cross_kl(s, t, groups, shared)
    loss.sum().backward()
    t[:, unused] = -60.
    assert (
        loss.isfinite().all()
        and s.grad.isfinite().all()
        and torch.allclose(loss, cross_kl(s, t, groups, shared), atol=1e-4)
    )


def test_masked_attention_is_learnt_from_and_broken_attention_is_seen():
    g = torch.Generator().manual_seed(0)
    q_s, k_s, q_t, k_t = (torch.randn(2, 1, 2, 5, 4, generator=g) for _ in range(4))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    q_s.requires_grad_()
    attention_kl(q_s, k_s, q_t, k_t, mask).backward()
    assert q_s.grad.isfinite().all() and kv_attention(q_t, k_t, mask, log=True).isneginf().any()
    k_t[0, 0, 0, 1, 0] = math.nan                                          # at a valid place
    assert attention_kl(q_s, k_s, q_t, k_t, mask).isnan()


# 5. temperature

def test_diito_uses_the_temperature(toy):
    teacher, pairs = toy
    want, seen = [], []
    @dataclass(frozen=True)
    class Spy(DIITO):
        def loss(self, s, t, state):
            want.append(divergence(s.swapped, t.swapped, temperature=3.).mean().item())
            return super().loss(s, t, state)
    seen += [
        h["method_loss"]
        for h in distill(shrink(teacher, 2), teacher, pairs, Spy(), replace(CONFIG, temperature=3.0)).history[1:]
    ]
    assert seen == pytest.approx(want, rel=1e-6) and len(seen) == CONFIG.steps
    cold = distill(shrink(teacher, 2), teacher, pairs, "diito", CONFIG).history[0]["method_loss"]
    assert cold != pytest.approx(want[0], rel=1e-3)


def test_the_kl_of_latent_kd_uses_the_temperature(thinking):
    _, data, teacher, student = thinking
    objective = KVObjective(
        replace(KV_METHODS["latent_kd"], latents=3), student(), teacher, data, replace(CONFIG, temperature=3.0)
    )
    state, rows = objective.start(), [0, 1, 2]
    with torch.no_grad():
        got, thought = objective.parts(rows, 0, state)["kl"], objective.thought[rows]
        final = objective.of_student(thought)[0]
        logits = [
            (
                get_adapter(objective.student).lm_head(final[i, a - 1 : e - 1]),
                get_adapter(teacher).lm_head(objective.targets["final"][[i]][0, : e - a]),
            )
            for i, (_, _, a, e) in enumerate(thought.segments.tolist())
        ]
        want = divergence(torch.cat([s for s, _ in logits]), torch.cat([t for _, t in logits]), temperature=3.).mean()
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


# parts of the KV loss compare keys with keys and values with values, whatever the batch they are a share of

@pytest.mark.parametrize("loss", ("mse", "smooth_l1"))
@pytest.mark.parametrize("layer_std", (False, True))
def test_keys_are_compared_with_keys(loss, layer_std):
    g = torch.Generator().manual_seed(0)
    k_s, v_s, k_t, v_t = (torch.randn(2, 3, 2, 5, 4, generator=g) for _ in range(4))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    parts = RegressionKVLoss(loss, layer_std)(k_s, v_s, k_t, v_t, mask)
    assert torch.equal(parts["k"], kv_regression(k_s, k_t, mask, kind=loss, layer_std=layer_std)) and torch.equal(
        parts["v"], kv_regression(v_s, v_t, mask, kind=loss, layer_std=layer_std)
    )


# 6. what a docstring says of its source

def test_codi_reads_the_residual_before_the_final_norm(thinking):
    _, data, teacher, student = thinking
    objective = KVObjective(replace(KV_METHODS["latent_sft"], latents=3, a_codi=1.0), student(), teacher, data, CONFIG)
    objective.start()
    with torch.no_grad(), capture(teacher) as hidden:
        final = get_adapter(teacher).trunk(data.input_ids, data.attention_mask)
    at, last = torch.arange(len(data)), objective.targets["hidden"][:][:, -1]
    assert torch.allclose(last, hidden[get_adapter(teacher).n_layers - 1][at, data.cue_pos], atol=1e-5)
    assert torch.allclose(
        get_adapter(teacher).final_norm(last), final[at, data.cue_pos], atol=1e-4
    ) and not torch.allclose(last, final[at, data.cue_pos], atol=1e-2)
    assert "before the final norm" in codi_loss.__doc__ and "CODI's code: after it" in codi_loss.__doc__


def test_rkv_spares_no_token_by_default():
    # tokens 0 and 1 are alike, the others are alone
    keys = torch.eye(8)[torch.tensor([0, 0, 1, 2, 3, 4, 5, 6])][None, None, None]
    score = decode_score(
        KVCache(keys, keys, torch.ones(1, 8), q=torch.zeros(1, 1, 1, 8, 8)), lam=0.0, window=2, recent=1
    )[0, 0, 0, :6]
    cosine = keys[0, 0, 0] @ keys[0, 0, 0].T - torch.eye(8)
    # the paper: token 0's only, so latest, look-alike is 1; token 1's is 0
    cosine[0, 1] = 0
    cosine[1, 0] = 0
    assert torch.allclose(score, -(cosine.sum(0) / 8).softmax(0)[:6])
    assert "by the paper's rule" in decode_score.__doc__ and "index default" in decode_score.__doc__


def test_docstrings_say_where_they_leave_their_source():
    for method, words in (("fitnets", "one hint layer"), ("cka", "debiased"), ("diito", "any two inputs")):
        assert words in type(METHODS[method]).__doc__, method
