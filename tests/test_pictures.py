"""Pictures in library notebooks: a code host shows them, and their cells draw the same bytes again."""

import base64, json
import pytest
from conftest import ROOT
from rcid.core.notebooks import PICTURE, clean
from rcid.pipeline.pictures import drawn, illustrated


def pictures(text: str) -> list[bytes]:
    cells = json.loads(text)["cells"]
    return [base64.b64decode(o["data"]["image/png"]) for c in cells for o in c.get("outputs", [])]


@pytest.mark.parametrize("notebook", illustrated(), ids=lambda path: path.stem)
def test_a_picture_is_there_and_small(notebook):
    text = notebook.read_text(encoding="utf-8")
    cells = [c for c in json.loads(text)["cells"] if PICTURE in c["metadata"].get("tags", [])]
    assert all(len(c["outputs"]) == 1 for c in cells), "run make pictures"
    assert all(p.startswith(b"\x89PNG") and len(p) < 150_000 for p in pictures(text))
    assert clean(json.loads(text)) == json.loads(text)


@pytest.mark.parametrize("name", ("04_align/02_layers", "05_distill/00_losses"))
def test_a_cell_draws_the_same_bytes_again(name):
    "After a new default run the pictures of real teachers are others: make pictures."
    notebook = ROOT/"nbs"/f"{name}.ipynb"
    assert pictures(drawn(notebook)) == pictures(notebook.read_text(encoding="utf-8")), "run make pictures"
