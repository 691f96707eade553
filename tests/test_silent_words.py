"""What is said of sources: every file that is cited exists, and a docstring that names a paper says where it differs."""
import inspect, json, re
from pathlib import Path
import numpy as np, pytest
from conftest import ROOT

CITED = re.compile(r"(?<![\w./{}*-])((?:nbs|tests|rcid|paper|conf)/[\w./-]+\.(?:ipynb|py|tex|yaml|json|sh)|[A-Z][A-Z_]+\.(?:md|cff))\b")
MADE = ("tests/faults.json",)                              # written by `make faults`
FREE = ("paper/main.", "paper/figures", "paper/tables")    # outputs of the pipeline


def texts(tracked):
    for name in tracked:
        if name.endswith(".py") and name.startswith(("tests/", "rcid/")): yield name, (ROOT/name).read_text(encoding="utf-8")
        if name.endswith(".ipynb"):
            cells = json.loads((ROOT/name).read_text(encoding="utf-8"))["cells"]
            yield name, "\n".join("".join(c["source"]) for c in cells)
        if name.endswith(".md"): yield name, (ROOT/name).read_text(encoding="utf-8")


def cites(text: str) -> list[str]:
    "Repository files that comments, docstrings and prose of a text point to."
    prose = re.findall(r"#[^\n]*|\"\"\".*?\"\"\"|(?m:^[A-Za-z>*`|-][^\n]*$)", text, re.S)
    return sorted({m for p in prose for m in CITED.findall(p)})


def test_a_citation_is_found():
    assert cites('"""METHOD.md section 3"""') == ["METHOD.md"] and cites("x = 1 # see nbs/a/b.ipynb") == ["nbs/a/b.ipynb"]


def test_every_cited_file_is_in_the_repository(tracked):
    mine = ("tests/test_silent_words.py",)
    missing = [(name, cited) for name, text in texts(tracked) if name not in mine for cited in cites(text)
               if not (ROOT/cited).exists() and cited not in MADE and not cited.startswith(FREE)
               and not name.startswith("tests/test_editing")]
    assert missing == []


def test_selectivity_is_what_its_docstring_says():
    "Task on unseen types minus control on seen ones; not the one test set of Hewitt and Liang."
    from rcid.eval.purity import probe_purity
    rng = np.random.default_rng(0)
    entity = np.repeat(np.arange(40), 6)
    label = entity % 2
    spelled = np.eye(40)[entity] + .01 * rng.normal(size=(240, 40))                      # features that only spell the type
    r = probe_purity(spelled[None], spelled[None], label, entity[:, None], np.zeros(240, int), splits=4, n_boot=50)
    assert r.d["control"][0] > .9 and r.d["control_unseen"][0] < .75                     # remembered, not known of the unseen
    assert r.d["selectivity"][0] == pytest.approx(r.d["accuracy"][0] - r.d["control"][0])
    assert r.d["accuracy_seen"][0] > .9 > r.d["accuracy"][0]                             # the task too is remembered only
    says = probe_purity.__doc__
    assert "unseen types" in says and "seen types" in says, says
