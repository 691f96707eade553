"""Results depend on the repository and its params alone; what is printed was measured; what was not seen is said."""

import json, os, re, signal, subprocess, sys, time
from pathlib import Path
from typing import get_args
import matplotlib
import pytest
import torch
from conftest import ROOT, output_of, page, run
from rcid.core import load_params, read_json, sha256
from rcid.core.params import Lm
from rcid.pipeline.workspace import compose_params
from rcid.data import general_text
from ruamel.yaml import YAML

yaml = YAML(typ="safe")
DVC = yaml.load((ROOT/"dvc.yaml").read_text(encoding="utf-8"))
NOTEBOOKS = [n for n in sorted((ROOT/"nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in n.parts]


def code_of(notebook: Path) -> str:
    return "\n".join(
        "".join(c["source"])
        for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        if c["cell_type"] == "code"
    )


# text

def test_healing_text_is_not_what_this_python_documents(monkeypatch):
    """Every source of `lm.source` gives the same documents, or the same refusal, when Python's own documentation is
    another one."""
    from pydoc_data import topics
    def texts():
        out = {}
        for source in get_args(Lm.model_fields["source"].annotation):
            for split in ("train", "test"):
                try:out[source, split] = general_text(split, source)
                except (FileNotFoundError, ValueError) as e: out[source, split] = str(e)
        return out
    before = texts()
    monkeypatch.setattr(topics, "topics", {str(i): f"Another release says {i}." for i in range(30)})
    assert len(before) > 3 and texts() == before


def test_nothing_reads_what_ships_inside_python():
    "No module or notebook takes text from the standard library, whose releases differ."
    files = [*(ROOT/"rcid").rglob("*.py"), *NOTEBOOKS]
    bad = re.compile(r"pydoc_data|^\s*(?:import|from) (?:this|antigravity|lib2to3|idlelib)\b|\blicense\(\)", re.M)
    assert len(files) > 100 and [f.name for f in files if bad.search(f.read_text(encoding="utf-8"))] == []


def test_general_text_enters_by_one_stage():
    "Every stage whose notebook reads general text depends on the text that the stage `text` wrote, and so on its hash."
    readers = {s for s, d in DVC["stages"].items() if (m := re.search(r"pipeline\.stage (\w+) family=", d["cmd"]))
               and re.search(r"general_text|saved_text", code_of(ROOT/"nbs"/"experiments"/f"{m[1]}.ipynb"))}
    assert {"heal", "baseline", "evaluate", "evaluate_extra"} <= readers
    for stage in readers:
        assert (
            "artifacts/text/${item.family}" in DVC["stages"][stage]["deps"]
        ), f"{stage} reads text that DVC does not know"


def test_a_teacher_tells_the_same_text_in_every_process(models, tokenizers):
    import rcid.data
    assert hasattr(rcid.data, "draw_documents"), "no healing text from the teacher itself"
    model, tok = models["qwen3"], tokenizers["qwen3"]
    model.train()
    state, drawn = torch.random.get_rng_state(), rcid.data.draw_documents(model, tok, 12, 16, batch=8)
    torch.manual_seed(7); torch.rand(3)
    assert rcid.data.draw_documents(model, tok, 12, 16, batch=8) == drawn and len(set(drawn)) == 12
    assert all(m.training for m in model.modules())                         # the model is the user's
    model.eval(); torch.random.set_rng_state(state)
    assert rcid.data.draw_documents(model, tok, 12, 16, seed=1, batch=8) != drawn


def test_a_mute_model_and_unknown_sources_are_refused(make_model, tokenizers, tmp_path):
    from rcid.data import healing_text, saved_text
    tok, model = tokenizers["llama"], make_model("llama", layers=1)
    with torch.no_grad():                                                   # every next token is the end
        model.model.norm.weight.zero_(); model.lm_head = torch.nn.Linear(64, len(tok)); model.lm_head.weight.zero_()
        model.lm_head.bias.copy_(torch.eye(len(tok))[tok.eos_token_id] * 1e4)
    with pytest.raises(RuntimeError, match="none of 20 documents has a word"):
        healing_text("samples", model, tok, 20, 4)
    with pytest.raises(ValueError, match="no source 'embedded': there are 'path' and 'hub', and 'samples'"):
        healing_text("embedded", model, tok, 20, 4)
    with pytest.raises(FileNotFoundError, match=r"no train text in .*run `dvc repro` \(stage text\)"):
        saved_text(tmp_path, "train")
    compose_params(tmp_path/"params.yaml", "scale=tiny", "lm.source=hub")
    with pytest.raises(ValueError, match="text from a hub needs id, name and revision"):
        load_params(tmp_path / "params.yaml")


def test_text_from_a_hub_is_of_one_revision(monkeypatch):
    import datasets
    asked = []
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *a, **kw: asked.append((a, kw))
        or [dict(text=" = One = \n"), dict(text="Words.\n"), dict(text=" = Two = \n")],
    )
    hub = load_params_of("a100").lm.hub
    assert hub and re.fullmatch(r"[0-9a-f]{40}", hub["revision"])
    assert (
        len(general_text("test", "hub", hub=hub)) == 2
        and asked[0][1]["revision"] == hub["revision"]
        and asked[0][0][0] == hub["id"]
    )


def load_params_of(scale):
    import tempfile
    with tempfile.TemporaryDirectory() as d:
        compose_params(f"{d}/params.yaml", f"scale={scale}")
        return load_params(f"{d}/params.yaml")


def test_every_hub_setting_names_a_revision():
    def specs(x):
        if isinstance(x, dict):
            if "hub" in x and isinstance(x["hub"], str): yield x
            for v in x.values(): yield from specs(v)
    found = [s for f in (ROOT/"conf").rglob("*.yaml") for s in specs(yaml.load(f.read_text(encoding="utf-8")))]
    assert (
        len(found) > 5
        and [s["hub"] for s in found if not re.fullmatch(r"[0-9a-f]{40}", str(s.get("revision", "")))] == []
    )


# figures

HOSTILE = {
    "font.family": "serif",
    "savefig.facecolor": "#123456",
    "axes.facecolor": "#eeeeee",
    "axes.titleweight": "bold",
    "savefig.bbox": "tight",
    "pdf.compression": 9,
    "image.interpolation": "bilinear",
    "legend.shadow": True,
    "axes.prop_cycle": matplotlib.cycler(color=["red"]),
    "xtick.direction": "in",
    "axes.grid": True,
    "hatch.linewidth": 5,
}


def figures(folder: Path) -> dict[str, str]:
    from rcid.report import effect_heatmap, method_intervals, save_figure
    row = lambda m: dict(
        family="llama",
        task="ioi",
        method=m,
        accuracy=0.9,
        accuracy_ci=[0.8, 1.0],
        consistency=dict(trained=0.5, held_out=0.4),
        consistency_ci=dict(trained=[0.4, 0.6], held_out=[0.3, 0.5]),
    )
    point = lambda step: dict(step=step, loss=1., accuracy=.5, route=.1, kl=2.)
    made = {
        "heatmap": effect_heatmap(
            {"a teacher": dict(roles=["io", "end"], score=[[1.0, 2.0], [3.0, None]], selected=[[0, "io"]])}
        ),
        "methods": method_intervals([row("undistilled"), row("rcid")]),
        "curves": page("exp2").learning_curves({"llama": {"rcid": [[point(0), point(5)]]}}),
    }
    return {name: sha256(save_figure(f, folder/name)) for name, f in made.items()}


def test_figures_ignore_the_matplotlibrc_of_the_user(tmp_path):
    plain = figures(tmp_path/"plain")
    with matplotlib.rc_context(HOSTILE):
        before = dict(matplotlib.rcParams)
        theirs = figures(tmp_path/"theirs")
        assert dict(matplotlib.rcParams) == before                          # and leave it as it was
    assert theirs == plain


def test_importing_the_report_changes_no_setting():
    code = (
        "import matplotlib; a = dict(matplotlib.rcParams); import rcid.report, rcid.report.paper;"
        " print(a == dict(matplotlib.rcParams))"
    )
    assert run(ROOT, sys.executable, "-c", code).stdout.strip() == "True"


def test_startup_files_of_the_user_stay_out_of_the_pages(tmp_path):
    "A user's IPython startup file is no input of the documentation, and executing a page prints nothing."
    done = one_page(tmp_path, "'theirs' in globals()")
    assert "'text/plain': 'False'" in done.stdout or "\"False\"" in done.stdout, output_of(done)


def test_a_figure_leaves_the_same_picture_in_every_page(tmp_path):
    "Without %matplotlib inline, which the stages `pilot` and `sites` have never asked for."
    source = "from rcid.report.style import panels\nfigure, _ = panels(1, 1, 2, 1)\nfigure"
    first, second = (one_page(tmp_path/name, source).stdout for name in ("one", "two"))
    assert "image/png" in first and first == second


def one_page(tmp_path: Path, source: str):
    (tmp_path/"home"/"profile_default"/"startup").mkdir(parents=True, exist_ok=True)
    (tmp_path/"home"/"profile_default"/"startup"/"00.py").write_text("theirs = 1\n")
    folder = tmp_path/"nbs"
    folder.mkdir(parents=True, exist_ok=True)
    cell = dict(cell_type="code", id="one", metadata={}, source=source, outputs=[], execution_count=None)
    (folder/"page.ipynb").write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)))
    code = (
        "from pathlib import Path; from rcid.pipeline.docs import execute; nb ="
        f" execute(Path({str(folder/'page.ipynb')!r}), Path({str(tmp_path/'cache')!r})); print([o['data'] for c in"
        " nb['cells'] for o in c['outputs'] if 'data' in o])"
    )
    env = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**env, "IPYTHONDIR": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_a_page_is_executed_without_a_warning(tmp_path):
    done = one_page(tmp_path, "1 + 1")
    assert done.returncode == 0 and "'2'" in done.stdout, output_of(done)
    assert done.stderr == "" and len(done.stdout.splitlines()) == 1, done.stderr


# claims

def test_no_split_half_is_called_a_bound():
    "Split halves of four templates tend below 0: they bound nothing."
    printed = [*(ROOT/"paper"/"sections").glob("*.tex"), *(ROOT/"rcid").rglob("*.py"), *NOTEBOOKS]
    half, bound = r"split[- _]?hal(?:f|ves)", r"(?:\bceiling|do no better than|upper bound)"
    bad = re.compile(f"{half}.{{0,200}}{bound}|{bound}.{{0,200}}{half}", re.I)
    found = [
        f"{f.name}: {l.strip()[:100]}"
        for f in printed
        for l in f.read_text(encoding="utf-8").splitlines()
        if bad.search(l)
    ]
    assert len(printed) > 100 and found == []
    gpu = json.loads((ROOT/"tests"/"benchmarks"/"gpu.json").read_text(encoding="utf-8"))
    assert not bad.search(json.dumps(gpu))


# dvc plots

def test_dvc_plots_show_what_the_readme_promises(tmp_path):
    "`dvc plots show` and `dvc plots diff` work without network and draw rows of the committed metrics."
    plots = {
        name: p
        for entry in DVC.get("plots", [])
        for name, p in (entry if isinstance(entry, dict) else {entry: {}}).items()
    }
    assert len(plots) >= 4, "dvc.yaml names no plots"
    sources = {f for p in plots.values() for f in p["y"]}
    outs = [o if isinstance(o, str) else next(iter(o)) for s in DVC["stages"].values() for o in s.get("outs", [])]
    assert sources <= set(outs), "a plot of rows that no stage makes"
    from rcid.report import read_matrix, write_plots
    p = load_params()
    keys = list(dict.fromkeys((f, t) for f, t, *_ in p.cells))
    write_plots(
        read_matrix(ROOT / "metrics", "distill", p),
        read_json(ROOT / "metrics" / "exp2.json")["rows"],
        {(f, t): read_json(ROOT / "metrics" / "sites" / f"{f}-{t}.json") for f, t in keys},
        tmp_path / "metrics" / "plots",
    )
    for command in (("git", "init", "-q"), ("dvc", "init", "-q")): assert run(tmp_path, *command).returncode == 0
    (tmp_path/".dvc"/"plots").mkdir(exist_ok=True)
    for f in (ROOT/".dvc"/"plots").glob("*.json"): (tmp_path/".dvc"/"plots"/f.name).write_bytes(f.read_bytes())
    with open(tmp_path/"dvc.yaml", "w") as f: yaml.dump({"plots": DVC["plots"]}, f)
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b.c")
    for command in ((*git, "add", "-A"), (*git, "commit", "-qm", "one")): assert run(tmp_path, *command).returncode == 0
    done = run(tmp_path, "dvc", "plots", "show", "-o", "shown")
    assert done.returncode == 0 and "WARNING" not in done.stderr + done.stdout, output_of(done)
    page = (tmp_path/"shown"/"index.html").read_text(encoding="utf-8")
    specs = [json.loads(s) for s in re.findall(r"var spec = (\{.*?\});\n", page)]
    assert len(specs) == len(plots) and "<DVC_" not in page
    for s in specs:
        rows = s["data"]["values"]
        fields = set(re.findall(r'"field": "(\w+)"', json.dumps({k: v for k, v in s.items() if k != "data"})))
        assert len(rows) > 10 and all(fields <= set(r) for r in rows), s["title"]
    curves = tmp_path/"metrics"/"plots"/"curves.json"
    curves.write_text(json.dumps([{**r, "accuracy": .5} for r in json.loads(curves.read_text())]))
    done = run(tmp_path, "dvc", "plots", "diff", "-o", "compared")
    assert done.returncode == 0, output_of(done)
    revs = {
        v["rev"]
        for s in re.findall(
            r"var spec = (\{.*?\});\n", (tmp_path / "compared" / "index.html").read_text(encoding="utf-8")
        )
        for v in json.loads(s)["data"]["values"]
    }
    assert revs == {"HEAD", "workspace"}


# what the tests do not look at

def test_make_test_fetches_before_it_tests():
    lines = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    at = lambda what: next((i for i, l in enumerate(lines) if what in l), None)
    assert at("tests/fetch.py") is not None and at("tests/fetch.py") < at("wait $fetching") < at("-m pytest")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc to see processes in")
def test_a_failed_notebook_stops_the_fetching_too(tmp_path):
    "With programs in their places: one whose child would fetch for minutes, and a notebook that fails."
    pid = tmp_path/"pid"
    for name, lines in (
        ("python", f'[ "$1" != tests/fetch.py ] || {{ sleep 300 >/dev/null 2>&1 & echo $! > {pid}; wait; }}'),
        ("nbdev_test", f"while [ ! -s {pid} ]; do sleep .1; done; exit 1"),
    ):
        (tmp_path/name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path/name).chmod(0o755)
    done = run(ROOT, "make", "-o", ".venv/.ready", "test", f"BIN={tmp_path}")
    assert done.returncode and "== tests" not in done.stdout, output_of(done)
    child = int(pid.read_text())
    def runs() -> bool:
        try: return bool(Path(f"/proc/{child}/cmdline").read_bytes())             # empty: dead, not yet asked after
        except OSError: return False
    try:
        until = time.time() + 10
        while runs() and time.time() < until: time.sleep(.1)
        assert not runs(), "still fetching"
    finally:
        if runs(): os.kill(child, signal.SIGKILL)


def test_skipped_tests_are_counted_by_reason(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n@pytest.mark.parametrize('i', range(3))\ndef test_a(i): pytest.skip('no moon')\ndef test_b():"
        " pass\n"
    )
    done = run(
        ROOT,
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "conftest",
        "--rootdir",
        str(tmp_path),
        "-c",
        os.devnull,
        str(tmp_path / "test_some.py"),
        PYTHONPATH=f"{ROOT}/tests:{ROOT}",
    )
    assert "3 skipped: no moon" in done.stdout, output_of(done)


def test_what_is_fetched_is_checked_and_kept(tmp_path, monkeypatch):
    "A whole folder is not fetched again, a damaged one is, and no network is one line."
    sys.path.insert(0, str(ROOT/"tests"))
    assert (ROOT/"tests"/"fetch.py").exists(), "nothing is fetched for the tests"
    import fetch
    from rcid.core.paths import broken_checksums
    from rcid.models import byte_tokenizer
    asked = []
    def from_wheel(name, folder):
        asked.append(name)
        byte_tokenizer().save_pretrained(folder)
    monkeypatch.setattr("rcid.models.real_tokenizer", from_wheel)
    monkeypatch.setitem(fetch.PLACES, "qwen3", (tmp_path/"qwen3",))
    assert fetch.fetched("qwen3") is None
    for _ in range(2): fetch.fetch("qwen3")
    assert asked == ["qwen3"] and fetch.fetched("qwen3") == tmp_path/"qwen3" and not broken_checksums(tmp_path/"qwen3")
    (tmp_path/"qwen3"/"tokenizer.json").write_text("{}")
    fetch.fetch("qwen3")
    assert asked == ["qwen3"] * 2 and not broken_checksums(tmp_path/"qwen3")
