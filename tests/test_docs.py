"""The documentation site and the way into it: what a reader meets first, and what is cut off nowhere."""

import itertools, re, subprocess
from pathlib import Path
from conftest import ROOT
from rcid.core.paths import read_json, read_yaml
from rcid.pipeline.docs import GUIDES, _place
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
