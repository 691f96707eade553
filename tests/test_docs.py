"""The documentation site and the way into it: what a reader meets first, and what is cut off nowhere."""

import itertools, json, re, subprocess
from pathlib import Path
from conftest import ROOT
from rcid.core.paths import read_json, read_yaml
from rcid.pipeline.docs import GUIDES, _place, experiment_pages, in_columns, page, to_runs
from rcid.pipeline.docs_look import CONF, CSS


def test_the_guides_that_are_asked_for_first_are_there_and_stand_first():
    guides = sorted((ROOT/"nbs"/"guides").glob("*.ipynb"), key=_place)
    assert [g.stem for g in guides[: len(GUIDES)]] == list(GUIDES) and len(guides) > len(GUIDES)
    assert sorted([Path("b.ipynb"), Path("index.ipynb")], key=_place)[0].name == "index.ipynb"


def test_the_smallest_run_that_the_guide_names_is_there():
    "Stages, file and list are those of the scale `tiny`: its matrix with the guide's method in it."
    cells = read_json(ROOT/"nbs"/"guides"/"add_a_method_or_task.ipynb")["cells"]
    (text,) = (s for c in cells if (s := "".join(c["source"])).startswith("## The smallest run"))
    tiny = read_yaml(ROOT/"conf"/"scale"/"tiny.yaml")
    matrix = tiny["extra_matrix"]
    methods = [*matrix["methods"], "relational"]
    runs = itertools.product(matrix["families"], matrix["tasks"], methods, map(str, tiny["seeds"]))
    named = re.findall(r"evaluate_extra@([\w-]+)", text)
    assert len(named) == 2 and set(named) <= {"-".join(run) for run in runs}
    assert "`extra_matrix.methods` of `conf/scale/tiny.yaml`" in text and "nbdev_export" in text


def test_no_cell_is_left_out_by_the_notebook_tests_unasked():
    "nbdev_test runs no cell with a call of `nbdev_export` in it, whatever else the cell does."
    for file in sorted((ROOT/"nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in file.parts: continue
        for cell in read_json(file)["cells"]:
            left_out = cell["cell_type"] == "code" and "nbdev_export(" in "".join(cell["source"])
            assert not left_out, f"{file.name}, cell {cell['id']}: run the command nbdev_export instead"


def test_long_lines_are_broken_at_every_width():
    everywhere = re.sub(r"@media[^{]*\{(?:[^{}]*\{[^{}]*\})*\s*\}", "", CSS)
    assert "@media" in CSS and "@media" not in everywhere
    rule = re.search(r"\.highlight pre, div\.cell_output pre \{([^}]*)\}", everywhere)[1]
    assert "white-space: pre-wrap" in rule and "overflow-wrap: anywhere" in rule
    assert "fit.js" in CONF.format(name="n", author="a", copyright="c", version="0")


def test_printed_columns_are_scrolled_and_prose_is_broken():
    printed = lambda *lines: [dict(output_type="stream", name="stdout", text=[line + "\n" for line in lines])]
    assert in_columns(printed("part    stages   minutes", "models      11       1.9"))
    assert not in_columns(printed("Two sentences.  One wide space.", "And a long one." * 20)) and not in_columns([])
    returned = dict(output_type="execute_result", data={"text/plain": "a   b\nc   d"}, metadata={})
    assert in_columns([returned]) and not in_columns([dict(returned, data=returned["data"] | {"text/html": "<p>"})])
    code = dict(cell_type="code", id="a", metadata={}, source="print(1)", outputs=printed("a   b", "c   d"))
    assert page(dict(cells=[code]))["cells"][0]["metadata"] == dict(tags=["columns"])
    assert "div.tag_columns div.cell_output pre { white-space: pre; overflow-x: auto; }" in CSS


def test_links_to_an_experiment_lead_to_the_pages_of_its_runs(monkeypatch, tmp_path):
    monkeypatch.setattr("rcid.pipeline.docs.root", lambda: tmp_path)
    link = "what [one](../experiments/exp2a.ipynb) and [two](../experiments/heal.ipynb) say"
    assert to_runs(link) == "what one and two say"                               # nothing was run
    title = dict(cell_type="markdown", id="a", metadata={}, source="# Heal\n\n> A line.\n\n$1$")
    for run in ("heal/llama", "heal/qwen3", "exp2a/exp2a"):
        assert to_runs(link).startswith("what one and ")                         # only some were run
        (tmp_path/"runs"/run).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/"runs"/f"{run}.ipynb").write_text(json.dumps(dict(cells=[title])), encoding="utf-8")
    assert to_runs(link) == "what [one](../experiments/exp2a/exp2a.ipynb) and [two](../experiments/heal.md) say"
    site = tmp_path/"site"
    assert "experiments/exp2a/exp2a\nexperiments/heal\n" in experiment_pages(site)
    listed = (site/"experiments"/"heal.md").read_text(encoding="utf-8")
    assert listed.startswith("# Heal\n") and "llama <heal/llama>\nqwen3 <heal/qwen3>\n" in listed
    (cell,) = read_json(site/"experiments"/"heal"/"qwen3.ipynb")["cells"]
    assert cell["source"] == "# Heal: qwen3\n\n> A line.\n\n$1$"                # one title, not two


def test_links_of_notebooks_lead_to_files():
    found = 0
    for file in sorted((ROOT/"nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in file.parts: continue
        for cell in read_json(file)["cells"]:
            if cell["cell_type"] != "markdown": continue
            for link in re.findall(r"\]\((?!https?:|#|mailto:)([^)\s#]+)", "".join(cell["source"])):
                if link.startswith("../runs/"): continue                         # there after a run
                found += 1
                assert (file.parent/link).exists(), f"{file.name}: {link}"
    assert found > 10


def test_setup_refuses_an_old_python_in_one_line(tmp_path):
    for name in ("settings.ini", "setup.py", "pyproject.toml"): (tmp_path/name).write_text("", encoding="utf-8")
    old = tmp_path/"python3.9"
    old.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    old.chmod(0o755)
    command = ["make", "-f", str(ROOT/"Makefile"), ".venv/.ready", f"PYTHON={old}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and not (tmp_path/".venv").exists()
    assert f"rcid needs Python 3.11 or newer, and {old} is not: make setup PYTHON=python3.12" in done.stderr


def test_a_word_is_explained_once():
    text = (ROOT/"CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Words")[2].partition("\n## ")[0]
    words = [word for word in re.findall(r"(?m)^\| ([^|]+?) \|", text) if word != "word"]
    assert len(words) > 40 and sorted({word for word in words if words.count(word) > 1}) == []
