"""Peak host memory of the stages of the a100 scale at its true widths: python tests/benchmarks/true_widths.py
[qwen3 llama kv]

Models of the published widths, heads and vocabularies with random weights: the students of experiments 1 to 5 whole
and their teachers of two and of four layers, Qwen2-7B and Qwen2-1.5B of four layers with two numbers of problems.
Stages run one by one in a workspace on this CPU, in float32, where a card would hold the models; what they are given
(pairs, steps) is little, and the method FitNets, as so few rows determine no orthogonal map. Writes true_widths.json:
gigabytes of each stage and of the weights, which the budget page (nbs/experiments/budget.ipynb) extrapolates to all
layers and problems. A part that is named is measured again alone; a run that was stopped goes on. Needs the real
vocabularies (stage `tokenizers`), 21 GB of free memory, 20 GB of disk and an hour."""

import gc, json, os, shutil, subprocess, sys, time
from pathlib import Path
import torch
from common import HERE, machine
from rcid.core import read_json, root, write_json
from rcid.models import save_model
from rcid.pipeline.workspace import make_workspace
from rcid.report.budget import SHAPES, _of_shape

LEAST = ("seeds=[42]", "tasks=[ioi]", "extra_matrix.families=[]", "extra_matrix.tasks=[ioi]", "eval.gate_accuracy=0",
    "eval.bootstrap=200", "main_matrix.tasks=[ioi]", "main_matrix.methods=[fitnets]", "data.n_train=8", "data.n_val=4",
    "data.n_test=8", "sites.pairs=8", "data.corruptions.ioi=[names]", "~data.corruptions.factual",
    "~data.corruptions.winogrande", "distill.steps=2", "distill.batch=4", "lm.source=samples", "lm.samples=120",
    "lm.seq=32", "lm.path=null", "lm.hub=null")
PAIRS = ("models", "data", "pilot", "text", "heal", "sites", "distill", "evaluate")
KV = ("kv_data", "kv_models role=teacher", "kv_models role=student", "kv_diagnose",
    "kv_distill method=kv_flat seed=42", "kv_distill method=kv_structured seed=42", "kv_distill method=kava seed=42")
LEAST_KV = ("kv.methods=[kv_flat,kv_structured,kava]", "kv.seeds=[42]", "kv.gate=0", "kv.data.source=path",
    "kv.data.n_pretrain=8", "kv.data.n_val=4",
    "kv.data.n_test=4", "kv.data.n_pairs=4", "kv.data.max_new=4", "kv.train.steps=2", "kv.train.batch=4",
    "kv.train.fit_steps=2", "+kv.train.together_steps=2", "kv.inside=[]")
FAMILIES = dict(
    qwen3=("Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B"), llama=("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-1B"))


def checkpoint(name: str, layers: int | None, tokenizer, folder: Path) -> Path:
    "Random bf16 weights of a published shape, with as many layers as are asked for."
    if (folder/"config.json").exists(): return folder
    torch.manual_seed(0)
    cut = {} if layers is None else dict(num_hidden_layers=layers)
    save_model(_of_shape(name, "cpu", torch.bfloat16, **cut), tokenizer, folder)
    gc.collect()
    return folder


def weights_of(folder: Path) -> float:
    "Gigabytes of a checkpoint in float32, as a stage on this CPU holds it; the files are bfloat16."
    return 2 * sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9


def peak(folder: Path, stage: str):
    "Runs a stage in a process of its own, and notes the gigabytes at its worst moment; a noted one is not run again."
    log = read_json(folder/"peaks.json")
    if stage in log: return
    env = {**os.environ, "RCID_ROOT": str(folder), "PYTHONPATH": str(folder), "RCID_THREADS": "2"}
    began = time.time()
    child = subprocess.Popen([sys.executable, "-m", "rcid.pipeline.stage", *stage.split()], cwd=folder, env=env)
    _, status, usage = os.wait4(child.pid, 0)
    if status: sys.exit(f"true_widths: {stage} failed in {folder}")
    log[stage] = round(usage.ru_maxrss * 1024 / 1e9, 2)
    print(f"{stage}: {log[stage]:.2f} GB in {time.time() - began:.0f} s", flush=True)
    write_json(folder/"peaks.json", log)


def least(name: str, models: list[Path], *overrides: str) -> Path:
    "A workspace of the a100 scale with little to do; one that a stopped run left goes on."
    folder = make_workspace("a100", *LEAST, *overrides, name=name)
    if (folder/"peaks.json").exists(): return folder
    shutil.copytree(root()/"data", folder/"data", dirs_exist_ok=True)
    shutil.rmtree(folder/"weights", ignore_errors=True)
    for model in models: shutil.copytree(model, folder/"weights"/model.name, copy_function=os.link)
    subprocess.run([sys.executable, "-m", "rcid.pipeline.stage", "code"], cwd=folder, check=True,
        env={**os.environ, "RCID_ROOT": str(folder), "PYTHONPATH": str(folder)})
    write_json(folder/"peaks.json", {})
    return folder


def instead(key: str, path: Path) -> list[str]:
    "Overrides that put a folder in the place of a repository."
    return [f"~{key}.hub", f"~{key}.revision", f"+{key}.path=weights/{path.name}"]


def of_pairs(family: str, layers: int, weights: Path, tokenizer) -> dict:
    "Gigabytes of every stage of experiments 1 to 5, the teacher with so many layers."
    teacher, student = FAMILIES[family]
    paths = [checkpoint(teacher, layers, tokenizer, weights/f"{family}-teacher-{layers}"),
        checkpoint(student, None, tokenizer, weights/f"{family}-student")]
    folder = least(f"widths-{family}-{layers}", paths, f"families=[{family}]", f"main_matrix.families=[{family}]",
        f"models.{family}.required=false",                     # random weights pass no gate
        *instead(f"models.{family}.teacher", paths[0]), *instead(f"models.{family}.student", paths[1]))
    at = dict(family=family, task="ioi", method="fitnets", seed=42)
    for stage in PAIRS:
        takes = dict(distill=at, evaluate=at, sites=dict(family=family, task="ioi")).get(stage, dict(family=family))
        peak(folder, " ".join([stage, *(f"{k}={v}" for k, v in takes.items())]))
    log = read_json(folder/"peaks.json")
    shutil.rmtree(folder)
    return dict(stages={stage.split()[0]: gb for stage, gb in log.items()}, layers=layers,
        teacher=weights_of(paths[0]), student=weights_of(paths[1]))


def of_kv(layers: int, problems: int, weights: Path, tokenizer) -> dict:
    "Gigabytes of every stage of experiment 6, teacher and student with so many layers."
    paths = [checkpoint(f"Qwen/{name}", layers, tokenizer, weights/f"{name}-{layers}")
        for name in ("Qwen2-7B-Instruct", "Qwen2-1.5B-Instruct")]
    folder = least(f"widths-kv-{layers}-{problems}", paths, *LEAST_KV, f"kv.data.n_train={problems}",
        *instead("kv.teacher.spec", paths[0]), *instead("kv.student.spec", paths[1]))
    for stage in KV: peak(folder, stage)
    log = read_json(folder/"peaks.json")
    shutil.rmtree(folder)
    return dict(stages=log, layers=layers, problems=problems, teacher=weights_of(paths[0]),
        student=weights_of(paths[1]))


def main(parts: list[str]):
    from transformers import AutoTokenizer
    weights, file = root()/".workspaces"/"widths", HERE/"true_widths.json"
    if wrong := set(parts) - {*FAMILIES, "kv"}: sys.exit(f"true_widths: no part {sorted(wrong)}: {__doc__}")
    for part in parts or [*FAMILIES, "kv"]:
        read = AutoTokenizer.from_pretrained(root()/"artifacts"/"tokenizers"/("llama3" if part == "llama" else "qwen3"))
        if part == "kv": said = [of_kv(layers, n, weights, read) for layers, n in ((2, 32), (4, 32), (4, 96))]
        else: said = [of_pairs(part, layers, weights, read) for layers in (2, 4)]
        known = read_json(file)["parts"] if file.exists() else {}
        write_json(file, dict(machine=machine(), parts=known | {part: said}))


if __name__ == "__main__": main(sys.argv[1:])
