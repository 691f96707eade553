"""The graph of the scale `a100` to the PDF, on a hub of small checkpoints of true structure: `.ci/run` calls this.

    python tests/on_toy_hub.py            after `make test`, which fetches the Qwen and LLaMA 3 vocabularies

Once with everything, and once on a hub that refuses LLaMA: then the paper has Qwen3 alone, and says so. Models, data
sets and revisions are those of conf/; only sizes, steps and gates are not (`SMALLER`)."""
import json, os, shutil, sys, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]
os.environ.pop("RCID_ROOT", None)
import toyhub
from conftest import environment, finished
from fetch import fetched
from rcid.core.paths import checkout_tables, read_json, read_yaml
from rcid.pipeline.dvc import LOCK_HEAD, Pipeline, lock_blocks
from rcid.pipeline.workspace import make_workspace
from rcid.report import label

WORKSPACES = ROOT/".workspaces"
HUB = WORKSPACES/"toyhub"
LIMIT = 4 * 3600                               # seconds of one run of the graph
SMALLER = ( # sizes, steps and gates of the scale; a key that conf/ does not have is refused
    "tasks=[ioi,factual]",
    "main_matrix.tasks=[ioi,factual]",
    "main_matrix.methods=[standard_kd,rcid]",
    "extra_matrix.tasks=[ioi]",
    "extra_matrix.methods=[rcid]",
    "seeds=[42]",
    "lm.seq=32",
    "data.n_train=24",
    "data.n_val=16",
    "data.n_test=16",
    "data.corruptions.ioi=[s2_new,names]",
    "data.corruptions.winogrande=[]",
    "sites.k=3",
    "sites.spacing=1",
    "sites.pairs=12",
    "distill.steps=3",
    "distill.batch=4",
    "distill.log_every=2",
    "distill.checkpoint_every=2",
    "eval.bootstrap=200",
    "eval.gate_accuracy=0",
    "purity.pairs=60",
    "purity.splits=1",
    "kv.data.n_pretrain=8",
    "kv.data.n_train=32",
    "kv.data.n_val=6",
    "kv.data.n_pairs=12",
    "kv.data.max_new=12",
    "kv.train.steps=2",
    "kv.train.batch=4",
    "kv.train.fit_steps=2",
    "kv.train.log_every=2",
    "kv.train.checkpoint_every=2",
    "kv.methods=[latent_sft,kv_flat,kava]",
    "kv.seeds=[42]",
    "kv.k=3",
    "kv.gate=0",
    "teachers.run=[none,single_qwen3,fixed,govern]",
    "teachers.problems=1200",
    "teachers.n_train=192",
    "teachers.cka_problems=192",
    "teachers.pairs=12",
    "teachers.sites=3",
    "teachers.steps=2",
    "teachers.batch=4",
    "teachers.log_every=2",
    "bench.tasks=[arc_challenge]",
    "bench.limit=2",
)
OF_TINY = ("calibrate", "planted", "fused")    # their models are trained here at every scale: sizes and steps of `tiny`
ALSO = ("data.filter=false",)                  # a gate that conf/scale/a100.yaml leaves at its default
LLAMA, OF_LLAMA = "meta-llama/", ("models@llama", "kv_base@llama")
NOT_AT_A100 = {"real_students", "real"}        # whose students are cut out of a model that the scale does not have


def leaves(tree, at: str) -> list[str]:
    "Overrides that write what stands in a part of a scale."
    if isinstance(tree, dict) and tree: return [x for key, value in tree.items() for x in leaves(value, f"{at}.{key}")]
    return [f"++{at}={json.dumps(tree)}"]


def overrides() -> tuple[str, ...]:
    tiny = read_yaml(ROOT/"conf"/"scale"/"tiny.yaml")
    return (*SMALLER, *(f"++{x}" for x in ALSO), *(x for part in OF_TINY for x in leaves(tiny[part], part)))


def fail(where: str, why: str = ""): sys.exit(f"on_toy_hub: FAILED in {where}{': ' + why if why else ''}")


def repro(where: str, folder: Path, address: str) -> str:
    "What `make repro SCALE=a100` says when it runs in a workspace; the script ends where it fails."
    home = dict(HF_HOME=str(WORKSPACES/"toyhub-home"), HF_ENDPOINT=address, HF_HUB_OFFLINE="0", HF_TOKEN="")
    given = environment(folder, PIP_NO_INDEX="1", RCID_THREADS="1", OMP_NUM_THREADS="1", NO_PROXY="127.0.0.1", **home)
    given.pop("RCID_DATA_DIR", None)                     # all comes from the hub
    began = time.time()
    command = [sys.executable, "-m", "rcid.pipeline", "--workers", "2", "--first", "pilot"]
    try: done = finished(command, folder, given, LIMIT)
    except TimeoutError as e: fail(where, str(e))
    if done.returncode: fail(where, f"exit {done.returncode}\n{done.stdout[-8000:]}\n{done.stderr[-4000:]}")
    print(f"{where}: {time.time() - began:.0f} s, {done.stdout.count(chr(10) + 'ran ')} stages ran", flush=True)
    return done.stdout


def must(where: str, holds, what: str):
    if not holds: fail(where, what)


def has_paper(where: str, folder: Path):
    must(where, (folder/"paper"/"main.pdf").read_bytes().startswith(b"%PDF"), "there is no PDF")
    try: waiting = finished([sys.executable, "-m", "rcid.pipeline", "status"], folder, environment(folder), 600).stdout
    except TimeoutError as e: fail(f"{where}, status", str(e))
    must(where, "stale" not in waiting, f"stages are left to do\n{waiting}")


def whole(folder: Path, address: str):
    "Everything, on a hub that opens every repository."
    where = "the a100 graph"
    repro(where, folder, address)
    has_paper(where, folder)
    done = {name.partition("@")[0] for name in lock_blocks((folder/"dvc.lock").read_text(encoding="utf-8"))}
    left = set(read_yaml(folder/"dvc.yaml")["stages"]) - done
    must(where, left == NOT_AT_A100, f"these stages did not run: {sorted(left - NOT_AT_A100)}")
    for family in ("qwen3", "llama"):
        origin = read_json(folder/"metrics"/"models"/f"{family}.json")["origin"]
        must(where, origin["kind"] == "hub" and len(origin["revision"]) == 40, f"{family} has no origin: {origin}")
        must(where, read_json(folder/"metrics"/"pilot"/f"{family}.json")["passed"], f"{family} did not pass its pilot")
    kv = {role: read_json(folder/"metrics"/"kv"/f"{role}.json")["vocab"] for role in ("teacher", "student")}
    must(where, kv == dict(teacher=152064, student=151936), f"experiment 6 has other heads: {kv}")


def taken(full: Path, folder: Path):
    "Puts into a workspace what the run before made without LLaMA, and its records: the rest was never there."
    pipeline, lost = Pipeline(full), set(OF_LLAMA)
    for name, parents in pipeline.parents.items():                       # in dependency order
        if lost & set(parents): lost.add(name)
    for name, stage in pipeline.stages.items():
        for path in (Path(out.fs_path) for out in stage.outs):
            there = folder/path.relative_to(pipeline.root)
            if name in lost or there.exists(): continue
            there.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir(): shutil.copytree(path, there, copy_function=os.link)
            else: os.link(path, there)
    files = Path(".dvc", "cache", "files")                                 # an output that is not there is made anew
    shutil.copytree(full/files, folder/files, copy_function=os.link, dirs_exist_ok=True)
    blocks = lock_blocks((full/"dvc.lock").read_text(encoding="utf-8"))
    kept = "".join(block for name, block in blocks.items() if name not in lost)
    (folder/"dvc.lock").write_text(LOCK_HEAD + kept, encoding="utf-8")


def refused(full: Path, folder: Path, address: str, refusals: list):
    "The same where LLaMA's licence was not accepted; what Qwen3 alone has made is taken from the run before."
    where = "the a100 graph without LLaMA"
    taken(full, folder)
    said = repro(where, folder, address)
    has_paper(where, folder)
    must(where, "llama stopped at models, is not required, and is left out; the paper says so" in said, said[-3000:])
    must(where, any(code == 401 for code, _ in refusals), "the hub was not asked for LLaMA")
    p = read_yaml(folder/"params.yaml")
    must(where, p["families"] == ["qwen3"] and p["left_out"] == {"llama": "models"}, f"params: {p['families']}")
    told = (folder/"paper"/"values.tex").read_text(encoding="utf-8")
    must(where, "is left out of this run: its weights could not be had" in told, "the paper does not say so")
    table = (folder/"paper"/"tables"/"exp2.tex").read_text(encoding="utf-8")
    must(where, label("qwen3") in table and label("llama") not in table, f"the main table has other families\n{table}")


def main():
    began = time.time()
    os.chdir(ROOT)
    vocabularies = dict(qwen=fetched("qwen3"), llama=fetched("llama3"))
    if None in vocabularies.values():
        print("left out: no Qwen and LLaMA 3 vocabularies here; `make test` fetches them where a registry answers")
        return
    checkout_tables()
    for name in ("toyhub", "toyhub-home", "toy-a100", "toy-refused"): shutil.rmtree(WORKSPACES/name, ignore_errors=True)
    folders = [make_workspace("a100", *overrides(), name=name) for name in ("toy-a100", "toy-refused")]
    for folder in folders: shutil.copytree(ROOT/"data", folder/"data", dirs_exist_ok=True)
    commits = toyhub.make(HUB, read_yaml(folders[0]/"params.yaml"), vocabularies)
    print(f"the hub is built: {time.time() - began:.0f} s", flush=True)
    with toyhub.serve(HUB, commits) as (address, _): whole(folders[0], address)
    shutil.rmtree(WORKSPACES/"toyhub-home", ignore_errors=True)          # nothing was ever fetched
    with toyhub.serve(HUB, commits, closed=(LLAMA,)) as (address, refusals):
        refused(*folders, address, refusals)
    print(f"2 passed in {time.time() - began:.0f}s: the paper of a100, and that without LLaMA")


if __name__ == "__main__": main()
