"""Accidents: after each, a rerun ends with the results of an undisturbed run, or the launcher says what is wrong.
Nothing wrong is ever taken for good.

`make faults` runs all of it and writes the table tests/faults.json; the test suite runs a selection.
"""

import json, os, random, re, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest, toy
from conftest import ROOT, output_of, run
from rcid.pipeline.local import end_all, marked

TABLE = ROOT/"tests"/"faults.json"
ROWS = {}                                        # fault -> outcomes
FAST = {"TOY_PACE": "0.02"}
FULL = os.environ.get("RCID_FAULTS") == "write"  # make faults
KILLS = 24 if FULL else 12


def note(fault: str, outcome: str): ROWS.setdefault(fault, []).append(outcome)


@pytest.fixture(scope="module", autouse=True)
def table():
    "With RCID_FAULTS=write: the outcomes of this run, as the committed table."
    yield
    if not FULL or not ROWS: return
    count = lambda outcomes: {
        "tried": len(outcomes),
        "same results": outcomes.count("same"),
        "refused in one line": outcomes.count("refused"),
        "wrong": sum(o not in ("same", "refused") for o in outcomes),
    }
    # a part of the tests renews its part of the table
    old = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    TABLE.write_text(
        json.dumps(old | {fault: count(outcomes) for fault, outcomes in ROWS.items()}, indent=1, ensure_ascii=False)
        + "\n",
        encoding="utf-8",
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    "The results of a serial `dvc repro` that nothing disturbed."
    folder = toy.make(tmp_path_factory.mktemp("undisturbed")/"toy")
    toy.dvc(folder, "repro", "-q", TOY_PACE="0")
    return toy.results(folder)


@pytest.fixture
def folder(tmp_path): return toy.make(tmp_path/"toy")


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory, undisturbed):
    folder = toy.make(tmp_path_factory.mktemp("finished")/"toy")
    code, said = toy.launch(folder, "--workers", "2", TOY_PACE="0")
    assert code == 0 and toy.results(folder) == undisturbed, said
    return folder


@pytest.fixture
def finished(finished_once, tmp_path):
    "A copy of a finished workspace; results and DVC's cache are still the same files."
    subprocess.run(["cp", "-a", finished_once, tmp_path/"finished"], check=True)
    return tmp_path/"finished"


def converges(folder: Path, undisturbed: dict, fault: str, *args: str, **env: str) -> str:
    "Runs again without the fault and demands the results of the undisturbed run; returns what was said."
    code, said = toy.launch(folder, "--workers", "2", *args, **{**FAST, **env})
    same = code == 0 and toy.results(folder) == undisturbed
    note(fault, "same" if same else "wrong")
    assert same, said
    return said


def refused(said: str, words: str, fault: str) -> str:
    "The one line that says what is wrong."
    lines = [l for l in said.splitlines() if re.search(words, l)]
    good = bool(lines) and len(lines[0]) < 600 and "Traceback" not in said
    note(fault, "refused" if good else "wrong")
    assert good, said
    return lines[0]


# kills

def kill_at_random(folder: Path, command: tuple[str, ...], env: dict, kills: int, longest: float, seed: int) -> int:
    """Runs the command again and again, each time killing something of it (-9) at a random moment; returns the kills
    that hit. Then one run to the end."""
    rng, hits = random.Random(seed), 0
    for _ in range(4 * kills):
        if hits == kills: break
        with open(folder / "killed.log", "a") as log:
            process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)
        limit = time.monotonic() + rng.uniform(0.2, longest)
        while process.poll() is None and time.monotonic() < limit: time.sleep(0.01)
        if process.poll() == 0: break                                      # all was done
        if process.poll() is not None: continue
        victims, what = marked(folder), rng.choice(("all", "launcher", "worker"))
        if what in ("all", "launcher"): process.kill()
        if what == "all":
            for pid in victims: _kill(pid)
        if what == "worker" and victims: _kill(rng.choice(victims))
        hits += 1
        # the launcher goes on with what does not need it; then it too
        if what == "worker":
            time.sleep(rng.uniform(0, 0.5))
            process.kill()
        process.wait()
    return hits


def _kill(pid: int):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


@pytest.mark.slow
def test_killed_at_random_moments(folder, undisturbed):
    hits = 0
    # a quick machine ends before some kills: go on until there are enough
    for round_ in range(15):
        for part in ("dvc.lock", "out", "metrics", "result.json", ".dvc/cache", "checkpoints"):
            shutil.rmtree(folder/part, ignore_errors=True)
            if (folder/part).is_file(): (folder/part).unlink()
        hits += kill_at_random(
            folder,
            (sys.executable, "-m", "rcid.pipeline", "--workers", "4"),
            toy.environment(folder, TOY_PACE="0.05"),
            KILLS - hits,
            2.5,
            seed=round_,
        )
        code, said = toy.launch(folder, "--workers", "4", **FAST)
        assert code == 0 and toy.results(folder) == undisturbed, said
        if hits >= KILLS: break
    end_all(folder)
    for _ in range(hits): note("kill -9 of launcher, worker or all, toy pipeline", "same")
    assert hits >= 5 * KILLS // 6 and "up to date" in toy.dvc(folder, "repro")


@pytest.mark.slow
def test_worker_killed_under_a_living_launcher(folder, undisturbed):
    process = toy.start(folder, "--workers", "2", TOY_PACE="0.1")
    while not (log := folder / "logs" / "stages" / "train@a.log").exists() or "step 2" not in log.read_text():
        time.sleep(0.02)
    victim = next(t for t in toy.trail(folder) if t["stage"] == "a")["pid"]
    _kill(victim)
    said, _ = process.communicate(timeout=60)
    assert (
        process.returncode == 1 and "skipped gather: needs train@a" in said and said.count("ran     train@") == 7
    ), said
    refused(said, "^failed  train@a: ", "kill -9 of a worker")
    converges(folder, undisturbed, "kill -9 of a worker")
    # from its checkpoint, and only it
    assert toy.trail(folder)[-1]["stage"] == "a" and toy.trail(folder)[-1]["start"] >= 2


@pytest.mark.slow
@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_interrupted(folder, undisturbed, number):
    process = toy.start(folder, "--workers", "2", TOY_PACE="0.2")
    while len(toy.trail(folder)) < 2: time.sleep(0.02)
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + number and "stopped: " in said and marked(folder) == [], said
    assert not list((folder/"out").glob("train-*")) and json.loads((folder/".dvc"/"tmp"/"rwlock").read_text()) == {}
    converges(folder, undisturbed, signal.Signals(number).name)


# two at once


@pytest.mark.slow
@pytest.mark.parametrize(
    "first, second",
    (("launch", "launch"), ("launch", "repro"), ("repro", "launch"), ("repro", "repro"))[: None if FULL else 2],
)
def test_two_at_once(folder, undisturbed, first, second):
    command = lambda what: [
        sys.executable,
        "-m",
        *(("rcid.pipeline", "--workers", "2") if what == "launch" else ("dvc", "repro")),
    ]
    processes = []
    for what in (first, second):
        processes.append(
            subprocess.Popen(
                command(what),
                cwd=folder,
                env=toy.environment(folder, TOY_PACE="0.05"),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        time.sleep(1.5)
    said = [p.communicate(timeout=120)[0] for p in processes]
    for p, text, what in zip(processes, said, (first, second)):
        if p.returncode:
            refused(
                text,
                "another launcher is at work|busy|is being blocked by|Unable to acquire lock|failed to reproduce",
                "two runs at once",
            )
        assert "Traceback" not in text
    converges(folder, undisturbed, "two runs at once")


# disks

@pytest.fixture
def small_disk(tmp_path):
    "A function: folder, size in kB -> a disk of that size mounted there."
    mounted = []
    def mount(where: Path, size: int) -> Path:
        where.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", where], capture_output=True, text=True
        )
        if done.returncode: pytest.skip(f"cannot mount a disk here: {done.stderr.strip()}")
        mounted.append(where)
        return where
    yield mount
    for where in mounted: subprocess.run(["umount", "-l", where], capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "part, kb",
    ((".dvc/cache", 24), ("out", 8), (".dvc/cache", 48), ("checkpoints", 8), ("metrics", 12))[: None if FULL else 2],
)
def test_disk_full(folder, undisturbed, small_disk, part, kb):
    disk = small_disk(folder/part, kb)
    code, said = toy.launch(folder, "--workers", "2", **FAST)
    assert code == 1 and disk.is_mount(), said
    refused(said, r"^failed  .*No space left on device", f"disk full: {part}")
    subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
    converges(folder, undisturbed, f"disk full: {part}")


@pytest.mark.slow
def test_disk_full_under_checkpoints_and_targets(small_disk, tmp_path, make_model, pairs):
    from rcid.core.hardware import seed_all
    from rcid.distill import DistillConfig, distill
    from rcid.distill.teacher_cache import model_hash
    from rcid.models import shrink
    seed_all(0)
    teacher = make_model("llama")
    go = lambda **kw: model_hash(
        distill(
            shrink(teacher, 2),
            teacher,
            pairs["llama"]["equal"],
            "standard_kd",
            DistillConfig(steps=6, batch=4, checkpoint_every=2, **kw),
        ).student
    )
    whole = go()
    for part in ("checkpoint_dir", "targets_dir"):
        disk = small_disk(tmp_path/part, 8)
        (disk/"full").write_bytes(b"x" * 8192)
        with pytest.raises(Exception, match="No space left on device|could not write|os error 28") as e:
            go(**{part: str(disk / "run")})
        assert "\n" not in str(e.value)
        note(f"disk full: {part}", "refused")
        assert [p for p in disk.rglob("*") if p.is_file() and p.name != "full"] == []   # nothing half-written
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        note(f"disk full: {part}", "same" if (again := go(**{part: str(disk/"run")})) == whole else "wrong")
        assert again == whole


@pytest.mark.slow
def test_read_only_cache(folder, undisturbed, small_disk):
    disk = small_disk(folder/".dvc"/"cache", 1024)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    code, said = toy.launch(folder, "--workers", "2", **FAST)
    assert code == 1, said
    refused(said, r"^failed  .*Read-only file system", "read-only cache")
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    converges(folder, undisturbed, "read-only cache")


# damage

def flip(file: Path, rng: random.Random, keep_time: bool = False):
    "One bit of a file, in place: what is linked to it changes too."
    times, mode, blob = file.stat(), file.stat().st_mode, bytearray(file.read_bytes())
    blob[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)
    rewrite(file, blob, mode)
    if keep_time: os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def rewrite(file: Path, blob: bytes, mode: int):
    file.chmod(0o644)
    with open(file, "r+b") as f: f.truncate(); f.write(blob)
    file.chmod(mode)


DAMAGED = ("out/train-a.txt", "metrics/train-b.json", "out/source.txt", "result.json")[:None if FULL else 2]


@pytest.mark.slow
@pytest.mark.parametrize("file", DAMAGED)
@pytest.mark.parametrize("how", ("truncated", "bit flipped", "bit flipped, time kept", "deleted"))
def test_damaged_result(finished, undisturbed, file, how):
    rng, path = random.Random(f"{file} {how}"), finished/file
    if how == "truncated": rewrite(path, path.read_bytes()[:1], path.stat().st_mode)
    elif how == "deleted": path.unlink()
    else:
        flip(path, rng, keep_time="kept" in how)
    converges(finished, undisturbed, f"result {how}", *(["--verify"] if "kept" in how else []))


@pytest.mark.slow
@pytest.mark.parametrize("keep_time", (False, True))
def test_damaged_cache(finished, undisturbed, keep_time):
    """Every object of DVC's cache has a flipped bit, still write-protected; the results are gone. Nothing damaged comes
    back."""
    rng = random.Random(keep_time)
    objects = [p for p in (finished/".dvc"/"cache"/"files"/"md5").rglob("*") if p.is_file() and p.stat().st_size]
    for p in objects: flip(p, rng, keep_time)
    for part in ("out", "metrics"): shutil.rmtree(finished/part)
    (finished/"result.json").unlink()
    assert len(objects) > 10
    said = converges(finished, undisturbed, "cached artefact bit flipped" + ", time kept" * keep_time)
    assert said.count("ran     ") == 10, said


@pytest.mark.slow
@pytest.mark.parametrize("file", ("dvc.lock", "params.yaml"))
def test_truncated_settings(finished, undisturbed, file):
    kept = (finished/file).read_bytes()
    for share in (0.3, 0.6, 0.9):
        (finished/file).write_bytes(kept[:int(len(kept) * share)])
        code, said = toy.launch(finished, "--workers", "2", **FAST)
        if code: refused(said, "^rcid: |^failed ", f"truncated {file}")
        else:
            same = toy.results(finished) == undisturbed or file == "params.yaml"
            note(f"truncated {file}", "same" if same else "wrong")
        (finished/file).write_bytes(kept)
    converges(finished, undisturbed, f"truncated {file}")


@pytest.mark.slow
def test_broken_claims_of_a_killed_dvc(folder, undisturbed):
    (folder/".dvc"/"tmp").mkdir(exist_ok=True)
    (folder/".dvc"/"tmp"/"rwlock").write_text('{"read": {"a')
    converges(folder, undisturbed, "half-written claims")


@pytest.mark.slow
def test_damaged_model_and_targets(tmp_path, make_model, tokenizers, pairs):
    from rcid.core.hardware import seed_all
    from rcid.distill.teacher_cache import model_hash, teacher_targets, SignalRequest
    from rcid.models import load_model, save_model
    seed_all(0)
    model, rng = make_model("llama"), random.Random(3)
    for how in ("bit flipped", "truncated"):
        for _ in range(8 if how == "bit flipped" else 2):
            saved = save_model(model, tokenizers["llama"], tmp_path/"model")
            file = rng.choice([p for p in sorted(saved.iterdir()) if p.name != "SHA256SUMS"])
            if how == "truncated":file.write_bytes(file.read_bytes()[:-1])
            else:
                flip(file, rng, keep_time=True)
            with pytest.raises(
                RuntimeError, match=f"could not load .*{re.escape(file.name)} does not match its SHA-256: delete"
            ) as e:
                load_model(str(saved))
            note(f"model {how}", "refused")
        want = SignalRequest(True)
        whole = teacher_targets(model, pairs["llama"]["equal"], want)
        for _ in range(8 if how == "bit flipped" else 2):
            teacher_targets(model, pairs["llama"]["equal"], want, tmp_path/"targets")
            (file,) = (tmp_path/"targets").glob("*.safetensors")
            if how == "truncated":file.write_bytes(file.read_bytes()[:-100])
            else:
                flip(file, rng, keep_time=True)
            again = teacher_targets(model, pairs["llama"]["equal"], want, tmp_path/"targets")
            same = again.keys() == whole.keys() and all(again[k].equal(whole[k]) for k in whole)
            note(f"cached targets {how}", "same" if same else "wrong")
            assert same


@pytest.mark.slow
def test_damaged_checkpoint(tmp_path, make_model, pairs):
    from rcid.core.hardware import seed_all
    from rcid.distill import DistillConfig, distill
    from rcid.distill.teacher_cache import model_hash
    from rcid.models import shrink
    seed_all(0)
    teacher, rng = make_model("llama"), random.Random(5)
    def go(stop=False):
        def probe(student, step):
            if stop and step == 6: raise KeyboardInterrupt                 # after the checkpoint of step 4
            return {}
        return model_hash(
            distill(
                shrink(teacher, 2),
                teacher,
                pairs["llama"]["equal"],
                "standard_kd",
                DistillConfig(steps=6, batch=4, log_every=2, checkpoint_every=4, checkpoint_dir=str(tmp_path / "run")),
                probe,
            ).student
        )
    whole = go()
    for i in range(12):
        with pytest.raises(KeyboardInterrupt): go(stop=True)
        file = rng.choice(sorted((tmp_path/"run").iterdir()))
        how = "bit flipped" if i % 3 else "truncated"
        if how == "truncated":file.write_bytes(file.read_bytes()[:-3])
        else:
            flip(file, rng, keep_time=True)
        same = go() == whole
        note(f"checkpoint {how}", "same" if same else "wrong")
        assert same, file


# clocks, notebooks

@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("faketime"), reason="needs faketime")
@pytest.mark.parametrize("jump", ("+400d", "-400d"))
def test_clock_jumps(folder, undisturbed, jump):
    process = toy.start(folder, "--workers", "2", TOY_PACE="0.1")
    while not (folder/"out"/"train-a.txt").exists(): time.sleep(0.02)
    process.kill(); process.wait()
    jumped = {"LD_PRELOAD": "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1", "FAKETIME": jump}
    converges(folder, undisturbed, "clock jump", **jumped)
    assert toy.launch(folder)[1].startswith("nothing to do")
    for file in [folder/"stage.py", *folder.glob("out/*"), *folder.glob("metrics/*")]: os.utime(file, (0, 0))
    assert toy.launch(folder)[1].startswith("nothing to do")               # another time, the same content
    note("clock jump", "same")


@pytest.mark.slow
def test_a_notebook_that_raises(copy):
    "A stage whose notebook raises: one line, no result; the launcher names what was skipped."
    notebook = copy/"nbs"/"experiments"/"tokenizers.ipynb"
    nb = json.loads(notebook.read_text(encoding="utf-8"))
    nb["cells"].append(
        {
            "cell_type": "code",
            "id": "trouble1",
            "metadata": {},
            "source": ["raise RuntimeError(\"trouble\\nin two lines\")"],
            "execution_count": None,
            "outputs": [],
        }
    )
    nb["cells"] = [c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", []) or c["id"] == "trouble1"]
    notebook.write_text(json.dumps(nb), encoding="utf-8")
    (copy / "dvc.yaml").write_text(
        "stages:\n  a: {cmd: python -m rcid.pipeline.stage tokenizers, deps: [params.yaml], outs:"
        " [runs/tokenizers/tokenizers.ipynb]}\n  b: {cmd: echo > b.txt, deps: [runs/tokenizers/tokenizers.ipynb], outs:"
        " [b.txt]}\n  c: {cmd: echo > c.txt, deps: [params.yaml], outs: [c.txt]}\n"
    )
    (copy/"dvc.lock").unlink(missing_ok=True)
    (copy/".dvc"/"config.local").write_text("[core]\n    no_scm = true\n")
    done = run(copy, sys.executable, "-m", "rcid.pipeline", "--workers", "2")
    said = done.stdout + done.stderr
    assert (
        done.returncode == 1
        and "skipped b: needs a" in said
        and "ran     c" in said
        and not (copy / "runs" / "tokenizers" / "tokenizers.ipynb").exists()
    ), output_of(done)
    assert "trouble" in refused(said, "^failed  a: rcid: .*RuntimeError: trouble", "notebook that raises")


# the real pipeline at tiny scale

QUIET = dict(PIP_NO_INDEX="1", HF_HUB_OFFLINE="1", RCID_THREADS="1", OMP_NUM_THREADS="1")


def lasting(base: Path) -> dict[str, bytes]:
    "What a run of the real pipeline leaves for good, as far as it is text or small."
    return {
        p.relative_to(base).as_posix(): p.read_bytes()
        for part in ("metrics", "runs", "paper", "artifacts/effects")
        for p in sorted((base / part).rglob("*"))
        if p.is_file()
    } | {"dvc.lock": (base / "dvc.lock").read_bytes()}


def kill_stages(workspace: Path, folder: Path, kills: int, seed: int = 11) -> list[str]:
    """In a copy of a finished workspace: takes stages of every kind, last ones first, runs each again and kills at a
    random moment; returns those that were hit."""
    from conftest import environment
    from rcid.pipeline import Pipeline
    shutil.copytree(workspace, folder, ignore=shutil.ignore_patterns("cache", "tmp", "logs", "__pycache__"))
    pipeline, rng, hit, kinds = Pipeline(folder), random.Random(seed), [], {}
    for name in pipeline.stages:
        if name not in ("data.dvc", "code"): kinds.setdefault(name.partition("@")[0], []).append(name)
    some = [rng.choice(names) for names in kinds.values()]
    if kills < len(some):some = rng.sample(some, kills)
    else:
        some += rng.sample([n for names in kinds.values() for n in names if n not in some], kills - len(some))
    for name in sorted(some, key=list(pipeline.stages).index, reverse=True):
        for out in pipeline.stages[name].outs:
            path = Path(out.fs_path)
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        with open(folder/"killed.log", "a") as log:
            process = subprocess.Popen(
                (sys.executable, "-m", "rcid.pipeline", "--workers", "2", name),
                cwd=folder,
                env=environment(folder, **QUIET),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        limit, moment = time.monotonic() + 60, None
        while process.poll() is None and time.monotonic() < (moment or limit):
            # counted from the start of its worker
            if moment is None and marked(folder): moment = time.monotonic() + rng.uniform(0, 9)
            time.sleep(0.01)
        if process.poll() is not None: continue
        victims, what = marked(folder), rng.choice(("all", "launcher", "worker"))
        if what == "worker" and victims:
            _kill(rng.choice(victims))
            time.sleep(rng.uniform(0, 0.5))
        process.kill()
        if what == "all":
            for pid in victims: _kill(pid)
        process.wait()
        hit.append(name)
    return hit


@pytest.mark.slow
@pytest.mark.skipif(not FULL, reason="it runs the whole tiny pipeline once more, eight minutes: `make faults`")
def test_real_pipeline_killed_at_random_moments(workspace, tmp_path):
    "Enough kills to meet every kind of stage."
    folder, wanted = tmp_path/"faults", 24
    hit = kill_stages(workspace, folder, wanted)
    done = run(folder, sys.executable, "-m", "rcid.pipeline", "--workers", "2", **QUIET)
    assert done.returncode == 0, output_of(done)
    a, b = lasting(folder), lasting(workspace)
    for _ in hit: note("kill -9 of launcher, worker or all, real pipeline at tiny scale", "same" if a == b else "wrong")
    assert a == b, [n for n in {*a, *b} if a.get(n) != b.get(n)]
    assert len(hit) >= 5 * wanted // 6                                      # some end before the moment comes
