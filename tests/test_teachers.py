"""Several teachers: one in memory at a time, missing ones have no weight, order does not matter, and what is
compared cost the same."""

import copy, gc, json, shutil, weakref
import pytest, torch
from rcid.align import map_layers
from rcid.core import load_params, read_json
from rcid.data.holdout import check_parts, load_parts, save_parts, split_problems, styled_problems
from rcid.data.reasoning import encode_problems
from rcid.distill import DistillConfig, distill
from rcid.distill.cost import Budget, check_equal
from rcid.kv import KVCache, Router, fuse, router_regulariser, with_latents
from rcid.kv.fusion import masked_share
from rcid.kv import recording as recording_module
from rcid.kv.places import TIMES, place_matrices
from rcid.kv.fusion_targets import FusionTargets, layer_cka_at_places, make_fusion_targets, own_kv
from rcid.kv.multi_teacher import KVFusion, routing
from rcid.kv.recording import TeacherRecording, Teacher, record_teacher, load_recording
from rcid.kv.shards import NOTE
from rcid.models import load_model, save_model, train_tokenizer

FUSIONS = ("fixed", "similarity", "learnable", "govern")


@pytest.fixture(scope="module")
def problems(): return styled_problems(n=40, steps=(1,), operations="+-", largest=20)


@pytest.fixture(scope="module")
def folders(problems, tmp_path_factory):
    "Two untrained teachers of other tokenizers, layers, heads and RoPE, a second checkpoint of one, and a student."
    sizes = {
        "a": dict(
            arch="llama", layers=4, heads=4, kv_heads=1, head_dim=24, rope={"rope_type": "linear", "factor": 2.0}
        ),
        "b": dict(arch="qwen3", layers=3, heads=4, kv_heads=2, head_dim=8, rope_theta=1e6),
        "a_later": dict(arch="llama", layers=4, heads=4, kv_heads=1, head_dim=24, seed=7),
        "student": dict(arch="qwen3", layers=2, heads=2, kv_heads=2, head_dim=16),
    }
    out = {}
    for name, spec in sizes.items():
        tokenizer = train_tokenizer(
            [p.styled("words" if name[0] == "a" else "equation").text for p in problems],
            vocab=420 if name == "b" else 520,
            bos=name[0] == "a",
        )
        model, _ = load_model({**spec, "vocab": len(tokenizer)}, dtype="float32", device="cpu")
        out[name] = save_model(model, tokenizer, tmp_path_factory.mktemp("teachers")/name)
    return out


def load(folder): return load_model({"path": str(folder)}, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def recorded(folders, problems, tmp_path_factory):
    """Four teachers of three models. They are untrained, so they are missing everywhere; here they are there all the
    same."""
    folder, out = tmp_path_factory.mktemp("recorded"), {}
    for t in (
        Teacher(name="a", folder=str(folders["a"]), style="words"),
        Teacher(name="prompted", folder=str(folders["a"]), style="words", before="Think. "),
        Teacher(name="later", folder=str(folders["a_later"]), style="words"),
        Teacher(name="b", folder=str(folders["b"])),
    ):
        h = load_recording(t, record_teacher(t, problems, folder/f"{t.name}.safetensors"), load(t.folder)[1])
        out[t.name] = TeacherRecording(
            t,
            h.data,
            KVCache(h.cache.k, h.cache.v, h.data.attention_mask, h.cache.q, True),
            torch.ones_like(h.available),
            h.rope,
        )
    return out


@pytest.fixture
def student(folders, problems):
    model, tokenizer = load(folders["student"])
    words = encode_problems([p.styled("equation") for p in problems], tokenizer)
    return model, tokenizer, words, with_latents(words, 4, tokenizer.pad_token_id)


# what a teacher can be

def test_one_model_under_two_prompts_and_two_checkpoints(recorded):
    a, prompted, later = recorded["a"], recorded["prompted"], recorded["later"]
    assert all(
        p.prompt == "Think. " + q.prompt for p, q in zip(prompted.data.problems, a.data.problems)
    ) and a.data.input_ids.equal(later.data.input_ids)
    assert not torch.allclose(a.cache.k, later.cache.k) and prompted.cache.seq > a.cache.seq


def test_samples_are_drawn_by_seed_and_wrong_ones_are_missing(folders, problems):
    model, tokenizer = load(folders["b"])
    one, two, again = (
        Teacher(name="s", folder=str(folders["b"]), sample=s, longest=12).read(problems[:2], model, tokenizer)
            for s in (1, 2, 1)
    )
    # untrained: nothing ends in the right number
    assert one == again == [None, None] and two == [None, None]
    answer = iter(
        [f"{p.styled('equation').reasoning}\nThe answer is: {v}" for p, v in zip(problems, [problems[0].value, "99"])]
    )
    model.generate = lambda ids, **kw: torch.cat([ids, torch.tensor([tokenizer(next(answer))["input_ids"]])], 1)
    drawn = Teacher(name="s", folder=str(folders["b"]), sample=1).read(problems[:2], model, tokenizer)
    assert drawn[0].reasoning == problems[0].reasoning["equation"] and drawn[1] is None


def test_one_teacher_in_memory_at_a_time(folders, problems, tmp_path, monkeypatch):
    alive, most, real = [], [], recording_module.load_model
    def counting(*args, **kw):
        gc.collect()
        most.append(sum(w() is not None for w in alive))
        model, tokenizer = real(*args, **kw)
        alive.append(weakref.ref(model))
        return model, tokenizer
    monkeypatch.setattr(recording_module, "load_model", counting)
    for i, name in enumerate(("a", "b", "a_later")):
        record_teacher(Teacher(name=name, folder=str(folders[name])), problems, tmp_path / f"{i}.safetensors")
    gc.collect()
    assert most == [0, 0, 0] and all(w() is None for w in alive) and len(alive) == 3
    record_teacher(Teacher(name="a", folder=str(folders["a"])), problems, tmp_path/"0.safetensors")
    # what is recorded is not recorded again
    assert len(alive) == 3


def test_lessons_hold_targets_and_nothing_of_the_teachers(recorded, student):
    model, _, words, thought = student
    def held(names):
        gc.collect()
        l = make_fusion_targets(model, words, thought, {n: recorded[n] for n in names}, fit_steps=0)
        return (
            sum(x.numel() for t in l.targets.values() for x in (t.k, t.v, t.mask))
            + sum(x.numel() for x in (l.features, *l.prototypes.values())),
            l.targets["b"].k.shape,
        )
    (one, shape), (three, _) = held(["b"]), held(["b", "a", "later"])
    per_teacher = 2 * shape.numel() + thought.input_ids.numel() + shape[1] * shape[2] * shape[4]
    assert three - one == 2 * per_teacher


# fusion, in training

@pytest.mark.parametrize("fusion", FUSIONS)
def test_twice_the_same_teacher_is_one_teacher(fusion, recorded, student):
    model, _, words, thought = student
    whole, c = make_fusion_targets(model, words, thought, recorded, fit_steps=5), DistillConfig(
        steps=5, batch=8, lr=1e-3, log_every=1
    )
    def run(names):
        l = FusionTargets(
            thought,
            {n: whole.targets[t] for n, t in names.items()},
            whole.features,
            {n: whole.prototypes[t] for n, t in names.items()},
        )
        s = copy.deepcopy(model)
        return (
            [p["loss"] for p in distill(s, s, l, KVFusion(fusion=fusion), c).history],
            torch.cat([p.flatten() for p in s.parameters()]).detach(),
            routing(l),
        )
    once, twice = run({"a": "a"}), run({"x": "a", "y": "a"})
    assert max(abs(x - y) for x, y in zip(once[0], twice[0])) < 1e-6 and (once[1] - twice[1]).abs().max() < 1e-6
    ab, ba = run({"a": "a", "b": "b"}), run({"b": "b", "a": "a"})
    assert max(abs(x - y) for x, y in zip(ab[0], ba[0])) < 1e-5 and torch.allclose(
        ab[2][0], ba[2][0].flip(1), atol=1e-4
    )


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_missing_teacher_has_weight_0_and_a_problem_without_any_teaches_no_keys(fusion, recorded, student):
    model, _, words, thought = student
    fusion_targets = make_fusion_targets(model, words, thought, {n: recorded[n] for n in ("a", "b")}, fit_steps=0)
    for name, rows in (("b", slice(3)), ("a", slice(1))): fusion_targets.targets[name].mask[rows] = False
    c = DistillConfig(steps=3, batch=8, lr=1e-3, log_every=1)
    distill(copy.deepcopy(model), model, fusion_targets, KVFusion(fusion=fusion), c)
    w, there = routing(fusion_targets)
    assert (
        (w[:3, 1] == 0).all()
        and torch.allclose(w[1:3, 0], torch.ones(2))
        and (w[0] == 0).all()
        and torch.allclose(w[3:].sum(1), torch.ones(len(w) - 3), atol=1e-5)
    )
    assert not there[0].any()


@pytest.mark.parametrize("entropy", (0., .1, -.1))
def test_router_learns_with_missing_teachers(entropy):
    router, available = Router(5), torch.tensor([[True, False], [True, True]])
    weights = masked_share(router(torch.randn(2, 5), torch.randn(2, 5)), available)
    router_regulariser(weights, available, entropy, .1).backward()
    assert all(p.grad.isfinite().all() for p in router.parameters())


def test_rotation_does_not_enter(folders, problems, tmp_path, student):
    """Keys are compared before RoPE: a teacher whose base is another one, with the same weights, has the same keys of
    its first layer."""
    model, tokenizer = load(folders["b"])
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 100.0}
    other = type(model)(model.config); other.load_state_dict(model.state_dict())
    save_model(other, tokenizer, tmp_path/"other")
    a, b = (
        load_recording(t, record_teacher(t, problems, tmp_path / f"{t.name}.safetensors", dtype=torch.float32),
            tokenizer)
        for t in (Teacher(name="one", folder=str(folders["b"])), Teacher(name="two", folder=str(tmp_path / "other")))
    )
    assert torch.allclose(a.cache.k[:, 0], b.cache.k[:, 0], atol=1e-4) and not torch.allclose(
        a.cache.k[:, 1], b.cache.k[:, 1], atol=1e-3
    )


def test_cka_map_finds_the_layers_that_are_the_same(recorded, student):
    model, _, words, thought = student
    k, v = own_kv(model, thought)
    shuffled = torch.stack([k[:, 1], torch.randn_like(k[:, 0]), k[:, 0]], 1), torch.stack(
        [v[:, 1], torch.randn_like(v[:, 0]), v[:, 0]], 1
    )
    cka = layer_cka_at_places(shuffled, (k, v), thought.attention_mask.bool())
    assert map_layers(2, 3, "cka", cka=cka) == [2, 0]
    weighted = map_layers(2, 3, "cka", cka=cka, top_k=2)
    assert all(abs(sum(w for _, w in row) - 1) < 1e-6 and row[0][0] == want for row, want in zip(weighted, [2, 0]))
    make_fusion_targets(
        model,
        words,
        thought,
        {"b": recorded["b"]},
        layer_maps={"b": map_layers(2, 3, "cka", cka=cka, top_k=2)},
        fit_steps=0,
    )


def test_layers_of_a_teacher_that_has_no_problem_right():
    "Not a word about batches of a CKA: it is the teacher who has nothing to say."
    k, nobody = torch.zeros(3, 1, 2, 4, 8), torch.zeros(3, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="none of these problems right.*train it longer, or leave it out") as e:
        layer_cka_at_places((k, k), (k, k), nobody)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("projection", ("structured", "zspace"))
def test_every_alignment_gives_targets(time, projection, recorded, student, folders):
    model, tokenizer, words, thought = student
    variants = {n: recorded[n] for n in ("a", "b")}
    fusion_targets = make_fusion_targets(
        model,
        words,
        thought,
        variants,
        time,
        None,
        projection,
        tokenizer,
        {n: load(folders[n])[1] for n in variants},
        fit_steps=0,
    )
    for t in fusion_targets.targets.values():
        assert (
            t.k.isfinite().all()
            and t.v.isfinite().all()
            and t.mask.any(1).all()
            and not (t.mask & ~thought.attention_mask.bool()).any()
        )


@pytest.mark.parametrize(
    "change",
    (
        dict(parts="k"),
        dict(parts="v"),
        dict(depth="shallow"),
        dict(depth="deep"),
        dict(vote="teacher", fusion="govern"),
    ),
)
def test_ablations_change_the_loss_and_not_the_cost(change, recorded, student):
    model, _, words, thought = student
    fusion_targets, c = make_fusion_targets(
        model, words, thought, {n: recorded[n] for n in ("a", "b", "later")}, fit_steps=0
    ), DistillConfig(steps=2, batch=8, lr=1e-3, log_every=1)
    def run(m): s = copy.deepcopy(model); return distill(s, s, fusion_targets, m, c)
    whole, part = run(KVFusion(fusion=change.get("fusion", "fixed"))), run(KVFusion(**change))
    assert whole.history[-1]["method_loss"] != part.history[-1]["method_loss"] and (whole.tokens, whole.flops) == (
        part.tokens,
        part.flops,
    )


def test_two_voters_have_no_majority(recorded, student):
    model, _, words, thought = student
    fusion_targets, c = make_fusion_targets(model, words, thought, {n: recorded[n] for n in ("a", "b")},
        fit_steps=0), DistillConfig(
        steps=2, batch=8, lr=1e-3, log_every=1
    )
    def run(m): s = copy.deepcopy(model); return [p["loss"] for p in distill(s, s, fusion_targets, m, c).history]
    for vote in ("coordinate", "teacher"):
        assert max(abs(x - y) for x, y in zip(run(KVFusion()), run(KVFusion(fusion="govern", vote=vote)))) < 1e-6


# bad input

@pytest.mark.parametrize("wrong", (dict(fusion="mean"), dict(time="rkv_decode"), dict(depth="middle"),
    dict(wieghts=(1.0,))))
def test_a_setting_that_does_not_exist(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): KVFusion(**wrong)


def test_a_setting_of_params_is_the_method(root):
    """What `params.yaml` says of a fusion and of a teacher is what runs, field by field,
        and an unknown field is refused
    by name."""
    teachers = load_params().teachers
    for setting in teachers.settings.values():
        method = KVFusion(**vars(setting))
        assert all(getattr(method, name) == value for name, value in vars(setting).items())
    for variant in teachers.variants.values():
        teacher = Teacher(name="x", folder="", **vars(variant))
        assert (teacher.model, teacher.style, teacher.before) == (variant.model, variant.style, variant.before)


def test_a_run_of_another_cost_is_refused(student):
    model, _, words, thought = student
    fusion_targets, c = FusionTargets(thought, {}, torch.zeros(len(thought), 4), {}), DistillConfig(steps=2, batch=8)
    KVFusion().objective(model, model, fusion_targets, c)
    plan = fusion_targets.taken.plan
    with pytest.raises(ValueError, match=r"this run would take Budget\(steps=2.*not the agreed Budget\(steps=3"):
        distill(model, model, fusion_targets, KVFusion(budget=plan._replace(steps=3)), c)
    check_equal({"x": plan, "y": plan})
    for field in Budget._fields:
        with pytest.raises(ValueError, match=f"x and y cannot be compared: .* {field};"):
            check_equal({"x": plan, "y": plan._replace(**{field: getattr(plan, field) + 1})})


def test_a_teacher_that_does_not_keep_the_text(folders, problems, tmp_path):
    model, tokenizer = load(folders["b"])
    from tokenizers import normalizers
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    save_model(model, tokenizer, tmp_path/"lower")
    with pytest.raises(ValueError, match="teacher low: tokenizer .* does not keep the text: from byte 0 on"):
        record_teacher(Teacher(name="low", folder=str(tmp_path / "lower")), problems, tmp_path / "x.safetensors")
    assert not (tmp_path/"x.safetensors").exists()


def test_a_recording_that_was_changed_and_a_teacher_that_is_gone(folders, problems, tmp_path):
    teacher, path = Teacher(name="b", folder=str(folders["b"])), tmp_path/"b.safetensors"
    (file,) = record_teacher(teacher, problems[:4], path).glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="does not match its SHA-256"):
        load_recording(teacher, path, load(folders["b"])[1])
    with pytest.raises(FileNotFoundError, match="teacher gone: no weights"):
        record_teacher(Teacher(name="gone", folder=str(tmp_path/"nothing")), problems, tmp_path/"x.safetensors")


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_recordings_whose_names_differ_after_a_dot(folders, problems, tmp_path):
    "`Llama-3.1` and `Llama-3.2` had one note: RoPE, availability and problems of one were those of the other."
    said = {}
    for name, model in (("Llama-3.1", "a"), ("Llama-3.2", "b")):
        t = Teacher(name=name, folder=str(folders[model]), before="" if model == "a" else "Think. ")
        said[name] = t, record_teacher(t, problems[:6 if model == "a" else 4], tmp_path/name)
    heard = {name: load_recording(t, path, load(t.folder)[1]) for name, (t, path) in said.items()}
    one, two = heard.values()
    assert len(one.available) == len(one.data) == 6 and len(two.available) == len(two.data) == 4
    assert one.rope.head_dim == 24 and two.rope.head_dim == 8 and one.key != two.key
    assert two.data.problems[0].prompt.startswith("Think. ") and not one.data.problems[0].prompt.startswith("Think. ")
    assert sorted(f.name for f in tmp_path.iterdir() if f.is_dir()) == ["Llama-3.1", "Llama-3.2"]
    assert not list(tmp_path.glob("*.json")) and all((path/NOTE).exists() for _, path in said.values())


def test_a_note_of_another_recording(folders, problems, tmp_path):
    teacher = Teacher(name="b", folder=str(folders["b"]))
    tokenizer = load(folders["b"])[1]
    path = record_teacher(teacher, problems[:4], tmp_path/"one")
    other = record_teacher(teacher, problems[4:8], tmp_path/"two")
    own = (path/NOTE).read_text()
    shutil.copy(other/NOTE, path/NOTE)
    with pytest.raises(ValueError) as error: load_recording(teacher, path, tokenizer)
    assert "00000000.safetensors does not belong to the note.json beside it: delete" in one_line(error)
    note = json.loads(own)
    for change in (dict(available=note["available"][:3]), dict(problems=note["problems"][:3])):
        (path/NOTE).write_text(json.dumps(note | change))
        with pytest.raises(ValueError) as error: load_recording(teacher, path, tokenizer)
        assert f"{path}: note.json and shards are of [3, 4] problems: delete it and record it again" == one_line(error)
    (path/NOTE).write_text("{}")
    with pytest.raises(ValueError, match="does not belong to the note.json") as error:
        load_recording(teacher, path, tokenizer)
    one_line(error)
    (path/NOTE).unlink()
    with pytest.raises(FileNotFoundError, match="note.json is missing") as error:
        load_recording(teacher, path, tokenizer)
    one_line(error)
    record_teacher(teacher, problems[:4], path)                    # what has no note is recorded again
    assert (path/NOTE).read_text() == own and len(load_recording(teacher, path, tokenizer).data) == 4


def test_a_recording_replaces_nothing_but_a_recording(folders, problems, tmp_path, monkeypatch):
    def never(*_, **__): raise AssertionError("a teacher was loaded for nothing")
    (tmp_path/"mine").mkdir()
    (tmp_path/"mine"/"thesis.tex").write_text("years of work")
    monkeypatch.setattr(recording_module, "load_model", never)
    teacher = Teacher(name="b", folder=str(folders["b"]))
    with pytest.raises(ValueError, match="mine holds thesis.tex, not written by rcid") as error:
        record_teacher(teacher, problems[:4], tmp_path/"mine")
    one_line(error)
    assert (tmp_path/"mine"/"thesis.tex").read_text() == "years of work"
    with pytest.raises(ValueError, match="^teacher b: no problems to record"): record_teacher(teacher, [], tmp_path/"x")


RECORD = """
import sys, time
from pathlib import Path
from rcid.data.holdout import styled_problems
from rcid.kv import recording
from rcid.kv.recording import Teacher, load_recording, record_teacher
folder, teacher = Path(sys.argv[1]), Teacher(name="b", folder=sys.argv[2])
plain = recording.load_model
def counted(*args, **how):
    print("loaded")
    return plain(*args, **how)
recording.load_model = counted
problems = styled_problems(n=40, steps=(1,), operations="+-", largest=20)
(folder/f"ready-{sys.argv[3]}").touch()
while not (folder/"go").exists(): time.sleep(.001)
path = record_teacher(teacher, problems, folder/"said.3")
tokenizer = plain({"path": teacher.folder}, dtype="float32", device="cpu")[1]
assert len(load_recording(teacher, path, tokenizer).data) == 40
"""

def test_processes_that_record_at_once(folders, tmp_path, at_once):
    said = at_once(RECORD, 2, tmp_path, str(tmp_path), str(folders["b"]))
    assert "".join(said).count("loaded") == 1, "one recorded, the other waited"
    assert [f.name for f in tmp_path.iterdir() if f.is_dir()] == ["said.3"]


def test_a_recording_is_read_by_numbers_too(folders, problems, tmp_path):
    teacher = Teacher(name="b", folder=str(folders["b"]))
    path = record_teacher(teacher, problems[:6], tmp_path/"b")
    far, near = (load_recording(teacher, path, load(folders["b"])[1], stream=stream).cache for stream in (True, False))
    for row in (4, -1, torch.tensor(2)):
        some, same = far[row], near[[int(row)]]
        assert torch.equal(some.k, same.k) and torch.equal(some.mask, same.mask) and len(some) == 1
        assert torch.equal(some.positions, same.positions)


def test_a_time_alignment_that_is_not_there(recorded, student):
    _, _, words, thought = student
    with pytest.raises(ValueError, match="unknown time alignment 'dtw'"):
        place_matrices("dtw", recorded["b"].data, words, thought)
    with pytest.raises(ValueError, match="soft needs both tokenizers"):
        place_matrices("soft", recorded["b"].data, words, thought)


def test_no_teacher_left_and_wrong_weights(recorded, student):
    model, _, words, thought = student
    fusion_targets = make_fusion_targets(model, words, thought, {n: recorded[n] for n in ("a", "b")}, fit_steps=0)
    t = list(fusion_targets.targets.values())
    none = t[0].mask.clone(); none[5] = False
    with pytest.raises(ValueError, match="no teacher is left for sample 5"): fuse([x.k for x in t], [none, none])
    with pytest.raises(ValueError, match="1 fixed weights for 2 teachers"):
        KVFusion(weights=(1.0,)).objective(model, model, fusion_targets, DistillConfig(steps=1, batch=4))
    absent = TeacherRecording(recorded["b"].teacher, recorded["b"].data, recorded["b"].cache,
        torch.zeros(len(thought), dtype=torch.bool))
    with pytest.raises(ValueError, match="teacher b is missing for all 40 problems"):
        make_fusion_targets(model, words, thought, {"b": absent})


def test_parts_are_disjoint_and_hashed(problems, tmp_path):
    parts = split_problems(problems, {"teacher": .6, "student": .3, "test": .1})
    path = save_parts(parts, tmp_path/"parts.json")
    assert load_parts(path) == parts
    with pytest.raises(ValueError, match="the parts teacher and student share 1 problems"):
        check_parts(parts | {"student": [*parts["student"], parts["teacher"][0]]})
    written = read_json(path)
    written["student"]["problems"].append(written["teacher"]["problems"][0])
    path.write_text(json.dumps(written))
    with pytest.raises(ValueError, match="'student' does not match its SHA-256"): load_parts(path)
