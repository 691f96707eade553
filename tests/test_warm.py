"""A stage that is a fork of the warm process: the bytes of one started cold, nothing stale, no accident that lasts."""
import json, shutil, sys
from pathlib import Path
import pytest
from conftest import ROOT, output_of, run
from test_silent_pipeline import notebook
from rcid.pipeline.warm import stage_words

SEEN = """
import os, sys, random, numpy, torch
import matplotlib.pyplot as plt
import transformers, rcid.distill, rcid.eval.stats
from tqdm.auto import tqdm
print(sorted(os.environ), sys.path, sys.argv[0], __name__, os.getcwd(), hash("a word"), torch.get_num_threads())
print(len({random.random(), numpy.random.rand(), torch.rand(1).item()}), os.isatty(0), os.getsid(0) == os.getpid())
for i in tqdm(range(3)): print(i)
plt.plot([1, 2, 4]);
"""
DRAWN = "import random, numpy, torch\nprint('drawn', random.random(), numpy.random.rand(), torch.rand(1).item())"
READS = "import rcid.eval.stats as stats\nprint('value', getattr(stats, 'ADDED', None))"
WAITS = "import time, pathlib\npathlib.Path('logs/waits').touch()\ntime.sleep(8)\nprint('waited')"
FAILS = "import sys\nprint('said on the way', file=sys.stderr)\n1 / 0"
BOOKS = {"seen": SEEN, "drawn": DRAWN, "reads": READS, "waits": WAITS, "fails": FAILS}

SCRIPT = """
import json, os, signal, sys, time
from contextlib import ExitStack
from pathlib import Path
from rcid.pipeline.dvc import Job
from rcid.pipeline.local import Local, marked
folder, out = Path.cwd(), {}
signal.signal(signal.SIGINT, signal.SIG_IGN)              # as a shell's "&" does, and children inherit it

def begin(pool, name):
    pool.start(Job(name, f"python -m rcid.pipeline.stage {name}", str(folder), {"DVC_STAGE": name}, [], ExitStack()))
    return pool.running[name][2]

def wait(pool):
    while not (done := pool.ended()): time.sleep(0.01)
    return done[0][1]

def stage(pool, name, key):
    process = begin(pool, name)
    code = wait(pool)
    record = folder/"runs"/name/f"{name}.ipynb"
    text = record.read_text() if code == 0 else None
    warm = hasattr(process, "pipe") and process.process is None
    out[key] = {"code": code, "warm": warm, "record": text, "log": pool.log(name).read_text()}

def waiting(pool, what):
    (folder/"logs"/"waits").unlink(missing_ok=True)
    process = begin(pool, "waits")
    while not (folder/"logs"/"waits").exists(): time.sleep(0.01)
    what(process)
    return wait(pool) if pool.running else None

os.environ["RCID_WARM"] = "0"
cold = Local(1, folder)
for name in ("seen", "fails"): stage(cold, name, f"cold {name}")
stopped = []
waiting(cold, lambda p: stopped.extend(cold.stop(20)))
out["cold stopped"] = [[job.name for job in stopped], cold.log("waits").read_text(), marked(folder)]
del os.environ["RCID_WARM"]
pool = Local(1, folder)
for name in ("seen", "fails", "reads"): stage(pool, name, f"warm {name}")
for n in (1, 2): stage(pool, "drawn", f"drawn {n}")
out["number"] = waiting(pool, lambda p: os.kill(p.pid, signal.SIGTERM))
first = pool.warm.process.pid
with open(folder/"rcid"/"eval"/"stats.py", "a") as f: f.write("\\nADDED = 7\\n")
stage(pool, "reads", "changed")
out["renewed"] = pool.warm.process.pid != first
stopped = []
waiting(pool, lambda p: stopped.extend(pool.stop(5)))
out["stopped"] = [[job.name for job in stopped], pool.log("waits").read_text(), marked(folder)]
pool = Local(1, folder)
out["runs on"] = waiting(pool, lambda p: (os.kill(pool.warm.process.pid, signal.SIGKILL), pool.warm.process.wait()))
stage(pool, "reads", "after the kill")
pool.stop()
pool = Local(1, folder)
begin(pool, "reads")
pool.warm.process.kill()                                  # before it has started anything
out["never started"] = wait(pool)
pool.stop()
out["left"] = marked(folder)
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> dict:
    "What happened to stages that were started warm and cold, killed, stopped, and whose modules changed."
    folder = tmp_path_factory.mktemp("warm")/"here"
    shutil.copytree(ROOT/"rcid", folder/"rcid", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT/"params.yaml", folder/"params.yaml")
    (folder/"nbs"/"experiments").mkdir(parents=True)
    for name, code in BOOKS.items():
        (folder/"nbs"/"experiments"/f"{name}.ipynb").write_text(notebook(code), encoding="utf-8")
    done = run(folder, sys.executable, "-c", SCRIPT, timeout=600, RCID_WARM="1", RCID_THREADS="1")
    assert done.returncode == 0, output_of(done)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_warm_stage_leaves_the_bytes_of_a_cold_one(outcome):
    cold, warm = outcome["cold seen"], outcome["warm seen"]
    assert (cold["code"], cold["warm"]) == (0, False) and (warm["code"], warm["warm"]) == (0, True), warm["log"]
    assert warm["record"].replace("'RCID_WARM', ", "") == cold["record"].replace("'RCID_WARM', ", "")
    assert "image/png" in warm["record"], "the picture is compared too"


@pytest.mark.slow
def test_a_warm_stage_draws_numbers_of_its_own(outcome):
    "Where a notebook sets no seed, two forks of one process must not draw the same numbers."
    first, second = outcome["drawn 1"]["record"], outcome["drawn 2"]["record"]
    line = [next(l for l in r.splitlines() if "drawn 0" in l).split() for r in (first, second)]
    assert all(a != b for a, b in zip(line[0][-3:], line[1][-3:])), line


@pytest.mark.slow
def test_a_failing_warm_stage_says_what_a_cold_one_says(outcome):
    cold, warm = outcome["cold fails"], outcome["warm fails"]
    assert warm["warm"] and (warm["code"], cold["code"]) == (1, 1)
    assert warm["log"].splitlines()[-1] == cold["log"].splitlines()[-1]
    assert warm["log"].splitlines()[-1].startswith("rcid: fails fails: ZeroDivisionError"), warm["log"]


@pytest.mark.slow
def test_changed_modules_are_not_served_stale(outcome):
    assert "value None" in outcome["warm reads"]["record"]
    assert "value 7" in outcome["changed"]["record"] and outcome["changed"]["warm"] and outcome["renewed"]


@pytest.mark.slow
def test_a_killed_warm_process_is_survived(outcome):
    assert outcome["runs on"] == 0, "a stage that it has started goes on"
    after = outcome["after the kill"]
    assert after["code"] == 0 and not after["warm"] and "value 7" in after["record"], "later ones start cold"
    assert outcome["never started"] == 0, "as does one that it was to start"


@pytest.mark.slow
def test_a_killed_or_stopped_warm_stage_is_told_as_a_cold_one(outcome):
    assert outcome["number"] == -15
    for which in ("cold stopped", "stopped"):
        names, log, left = outcome[which]
        assert names == ["waits"] and log.splitlines()[-1] == "rcid: interrupted" and left == [], which
    assert outcome["left"] == []


@pytest.mark.parametrize(
    "command",
    ("python stage.py x", "python -m rcid.pipeline.stage x; true", "python -m rcid.pipeline.stage $X", "false"),
)
def test_only_a_plain_stage_is_forked(command, monkeypatch):
    monkeypatch.setenv("RCID_ROOT", str(ROOT))
    env = {"PATH": str(Path(sys.executable).parent)}
    assert stage_words(command, ROOT, env) is None
    assert stage_words("python -m rcid.pipeline.stage models family=llama", ROOT, env) == ["models", "family=llama"]
    assert stage_words("python -m rcid.pipeline.stage models", ROOT.parent, env) is None
    assert stage_words("python -m rcid.pipeline.stage models", ROOT, {"PATH": "/usr/bin"}) is None
