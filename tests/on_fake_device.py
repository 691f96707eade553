"""The tiny graph on a device that refuses what a GPU refuses, with the numbers of the CPU: `.ci/run` calls this.

    python tests/on_fake_device.py            after `make test`, whose workspace holds the CPU's numbers
    python tests/on_fake_device.py --all      every stage of the graph, and not one of each page (twice as long)

The teachers that take minutes to train (`models`, `kv_base`) are those of the CPU; they are trained for a few steps on
both devices in a second, small run. Then the ten lines of the README, the guide that measures models, every method, and
a teacher whose layers are on two devices."""
import json, math, os, shutil, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(HERE/"fakegpu"), str(ROOT)]
os.environ.pop("RCID_ROOT", None)
os.environ.pop("RCID_DEVICE", None)
import fakegpu
from conftest import TINY, environment, finished
from rcid.core.paths import checkout_tables
from rcid.pipeline.dvc import LOCK_HEAD, lock_blocks
from rcid.pipeline.workspace import make_workspace

WORKSPACES = ROOT/".workspaces"
LIMIT = 4 * 3600                         # seconds of one command
NEAR = 1e-5                              # relative, or absolute below 1
TAKEN = ("models@", "kv_base@")          # stages whose results are the CPU's
FOLDERS = ("data", "artifacts/models", "artifacts/kv_base", *(f"{part}/{name}" for part in ("metrics", "runs")
    for name in ("models", "kv_base")))  # where these results and what they need lie
ONE_OF_EACH = (                          # with what they need, every page that runs a model; first the README's student
    "distill@llama-ioi-standard_kd_pairs-42",
    "pilot@qwen3", "baseline@qwen3-ioi", "evaluate@qwen3-ioi-rcid-42", "evaluate_extra@qwen3-factual-rcid-42",
    "probe@qwen3-ioi", "calibrate", "real_plan",
    "planted@qwen3-early_late", "real@released-ioi", "kv_baseline", "kv_distill@kava-42", "kv_distill@kv_structured-42",
    "kv_diagnose", "kv_teachers@llama_prompted", "kv_fuse@learnable-42", "bench@learnable-42", "fused@first_early-0")
# pages that only read numbers
NO_MODEL = ("budget", "paper", "exp1", "exp2", "exp2a", "exp2b", "exp3", "exp4", "exp5", "exp6", "exp7")
FEW = ("models.llama.pretrain_steps=3", "models.qwen3.pretrain_steps=3", "teachers.models.llama.steps=3",
    "teachers.models.qwen3.steps=3", "teachers.models.student.steps=3")
GUIDE = "measure_your_own"


def fail(where: str, why: str = ""): sys.exit(f"on_fake_device: FAILED in {where}{': ' + why if why else ''}")


def run(where: str, folder: Path, *command: str, device: bool = True) -> str:
    "What a command says in a workspace, its stages on the fake device; the script ends where it fails."
    given = environment(folder, PIP_NO_INDEX="1", HF_HUB_OFFLINE="1", RCID_THREADS="1", OMP_NUM_THREADS="1")
    if device: given |= dict(RCID_DEVICE="fakegpu", RCID_FAKEGPU=str(WORKSPACES/"fakegpu"))
    began = time.time()
    try: done = finished([sys.executable, *command], folder, given, LIMIT)
    except TimeoutError as e: fail(where, str(e))
    if done.returncode: fail(where, f"exit {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}")
    print(f"{where}: {time.time() - began:.0f} s", flush=True)
    return done.stdout


def workspace(name: str, *overrides: str) -> Path:
    "A fresh workspace in which torch finds the fake device."
    shutil.rmtree(WORKSPACES/name, ignore_errors=True)
    folder = make_workspace("tiny", *TINY, *overrides, name=name)
    shutil.copytree(ROOT/"data", folder/"data", dirs_exist_ok=True)
    fakegpu.announce(folder)
    return folder


def differences(cpu, device, at: str = ""):
    "What in two metrics is not the same, line by line."
    if isinstance(cpu, dict) and isinstance(device, dict):
        for key in sorted({*cpu, *device}, key=str):
            if key in cpu and key in device: yield from differences(cpu[key], device[key], f"{at}.{key}")
            else: yield f"{at}.{key} is only there on {'the CPU' if key in cpu else 'the device'}"
    elif isinstance(cpu, list) and isinstance(device, list) and len(cpu) == len(device):
        for i, (x, y) in enumerate(zip(cpu, device)): yield from differences(x, y, f"{at}[{i}]")
    elif isinstance(cpu, (int, float)) and isinstance(device, (int, float)):
        same = cpu == device or math.isnan(cpu) and math.isnan(device) or abs(cpu - device) <= NEAR * max(1, abs(cpu))
        if not same: yield f"{at} is {cpu} on the CPU and {device} on the device"
    elif isinstance(cpu, str) and cpu.startswith("artifacts/"):
        # the name of the file is a hash of all that made it, the device included
        if Path(cpu).parent != Path(device).parent: yield f"{at} is {cpu} on the CPU and {device} on the device"
    elif cpu != device: yield f"{at} is {str(cpu)[:60]} on the CPU and {str(device)[:60]} on the device"


def compared(where: str, cpu: Path, device: Path, every: bool = True) -> int:
    "The number of metrics files, of both or (`every`) of the CPU; the script ends where one of them differs."
    files = sorted(f.relative_to(cpu) for f in cpu.rglob("*.json"))
    if not every: files = [f for f in files if (device/f).exists()]
    if not files: fail(where, "there are no metrics on the " + ("CPU" if every else "device"))
    wrong = []
    for file in files:
        if not (device/file).exists(): wrong.append(f"{file} was not written on the device")
        else: wrong += [f"{file}: {d}" for d in differences(*(json.loads((f/file).read_text()) for f in (cpu, device)))]
    if wrong: fail(where, f"{len(wrong)} numbers differ\n" + "\n".join(wrong[:40]))
    return len(files)


def page(stage: str) -> str: return stage.split("@")[0]


def graph(every: bool) -> int:
    "One stage of every page, or all, but those of TAKEN; the number of metrics that agree."
    cpu = make_workspace("tiny", *TINY, name="test")
    shutil.copytree(ROOT/"data", cpu/"data", dirs_exist_ok=True)
    run("the graph on the CPU (what is stale)", cpu, "-m", "rcid.pipeline", "--workers", "2", device=False)
    device = workspace("device")
    for name in FOLDERS: shutil.copytree(cpu/name, device/name, dirs_exist_ok=True)
    blocks = lock_blocks((cpu/"dvc.lock").read_text(encoding="utf-8"))
    taken = "".join(block for name, block in blocks.items() if name.startswith(TAKEN))
    (device/"dvc.lock").write_text(LOCK_HEAD + taken, encoding="utf-8")
    where = "the graph on the device"
    run(where, device, "-m", "rcid.pipeline", "--workers", "2", *(() if every else ONE_OF_EACH))
    ran = {page(stage) for stage in lock_blocks((device/"dvc.lock").read_text(encoding="utf-8"))}
    if left := {page(stage) for stage in blocks} - ran - set(() if every else NO_MODEL):
        fail(where, f"no stage of {', '.join(sorted(left))} ran: name one in ONE_OF_EACH")
    return compared(where, cpu/"metrics", device/"metrics", every)


def taught() -> int:
    "The stages of TAKEN with a few steps, on both devices."
    folder = workspace("device-few", *FEW)
    shutil.rmtree(folder/"kept", ignore_errors=True)
    targets = ("models@llama", "models@qwen3", "kv_base@llama", "kv_base@student")
    for device in (False, True):
        where = f"models and kv_base, few steps, on the {'device' if device else 'CPU'}"
        run(where, folder, "-m", "rcid.pipeline", "--workers", "2", *targets, device=device)
        if device: continue
        shutil.move(folder/"metrics", folder/"kept")
        for name in (".dvc/cache", "artifacts", "runs"): shutil.rmtree(folder/name)
        (folder/"dvc.lock").unlink()
    return compared(where, folder/"kept", folder/"metrics")


TEN_LINES = """
import json, os
from rcid.core import read_json
keep = read_json("metrics/models/llama.json")["student_layers"]
for cell in json.load(open("nbs/index.ipynb"))["cells"]:
    source = "".join(cell["source"])
    if cell["cell_type"] != "code": continue
    before, found, after = source.partition("keep=[")
    if found: source = f"{before}keep={keep}" + after.partition("]")[2]
    exec(source)
assert str(next(teacher.parameters()).device).startswith(os.environ.get("RCID_DEVICE", "cpu"))
"""


def own_lines() -> int:
    "The ten lines of the README say the same on both devices."
    where = "the ten lines of the README"
    say = [run(f"{where}, on the {name}", WORKSPACES/"device", "-c", TEN_LINES, device=name == "device")
           for name in ("CPU", "device")]
    if "route D" not in say[0] or say[0] != say[1]: fail(where, "on the CPU\n{}\non the device\n{}".format(*say))
    return 1


def guide() -> int:
    "The guide that measures models; the others read the committed results, or ask for the CPU."
    command = (str(Path(sys.executable).with_name("nbdev_test")), "--path", f"nbs/guides/{GUIDE}.ipynb")
    run(f"guide {GUIDE}", WORKSPACES/"device", *command, "--n_workers", "0")
    return 1


def every_method() -> int:
    run("every method", WORKSPACES/"device", str(HERE/"fakegpu"/"every_method.py"))
    return 1


def several_devices() -> int:
    run("a teacher on two devices", WORKSPACES/"device", str(HERE/"fakegpu"/"several_devices.py"))
    return 1


def main():
    began, done = time.time(), 0
    os.chdir(ROOT)
    checkout_tables()
    os.environ["RCID_FAKEGPU"] = str(WORKSPACES/"fakegpu")
    import torch
    fakegpu.library(torch)
    print(f"the device is built: {time.time() - began:.0f} s", flush=True)
    done += graph("--all" in sys.argv[1:])
    done += taught()
    with ThreadPoolExecutor(2) as two:
        checks = own_lines, guide, every_method, several_devices
        for finished in [two.submit(check) for check in checks]: done += finished.result()
    print(f"{done} passed in {time.time() - began:.0f}s: metrics as on the CPU, README, guide, methods, two devices")


if __name__ == "__main__": main()
