"""The code is plain: short lines, short modules, and imports that go one way. The floors stand in pyproject.toml."""

import ast, json
import pytest
from conftest import ROOT

WIDTH = 120                  # characters of a line
LENGTH = 300                 # lines of an exported module
MODULES = sorted(p for p in (ROOT/"rcid").rglob("*.py") if p.name != "_modidx.py")     # without the generated index
WRITTEN_BY_HAND = ("Makefile", "dvc.yaml", "setup.py", ".ci/run")


def code_of(name: str) -> list[tuple[str, str]]:
    "(where, line) of the code in a file of the repository; of a notebook its code cells."
    text = (ROOT/name).read_text(encoding="utf-8")
    if not name.endswith(".ipynb"): return [(f"{name}:{i}", line) for i, line in enumerate(text.splitlines(), 1)]
    found = []
    for cell in json.loads(text)["cells"]:
        if cell["cell_type"] != "code": continue
        for i, line in enumerate("".join(cell["source"]).splitlines(), 1):
            found.append((f"{name} cell {cell['id']}:{i}", line))
    return found


def group_of(name: str) -> str | None:
    "The part of the repository whose lines are looked at together; None for what is no code of ours."
    folder = name.rsplit("/", 1)[0] if "/" in name else ""
    if name.startswith("nbs/") and name.endswith(".ipynb"): return folder
    if name.startswith("tests/") and name.endswith(".py"): return "tests"
    if name.startswith("conf/") or name in WRITTEN_BY_HAND: return "settings"
    return None


GROUPS = sorted(
    [p.relative_to(ROOT).as_posix() for p in [ROOT/"nbs", *(ROOT/"nbs").iterdir()] if any(p.glob("*.ipynb"))]
    + ["tests", "settings"]
)


@pytest.mark.parametrize("group", GROUPS)
def test_no_line_is_long(tracked, group):
    lines = [found for name in tracked if group_of(name) == group for found in code_of(name)]
    assert lines, f"no code in {group}"
    assert [f"{where} has {len(line)} characters" for where, line in lines if len(line) > WIDTH] == []


def test_every_notebook_is_in_a_group(tracked):
    groups = {group_of(name) for name in tracked if name.endswith(".ipynb") and name.startswith("nbs/")}
    assert groups <= set(GROUPS)


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_module_is_short_and_names_what_it_imports(module):
    text = module.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LENGTH
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert "rcid" not in [a.name.split(".")[0] for a in node.names], "use from ... import"
        elif isinstance(node, ast.ImportFrom):
            assert "*" not in [a.name for a in node.names]


def test_imports_go_one_way(capfd):
    "The contracts of pyproject.toml: a floor imports only from the floors below it in the list, without a circle."
    from importlinter.cli import lint_imports
    status = lint_imports(config_filename=str(ROOT/"pyproject.toml"), no_cache=True)
    assert status == 0, capfd.readouterr().out


# what lies below the top level of transformers moves between its versions (the library was run on 5.17 and 5.23): a
# family's own modules are asked through `get_adapter`, and nothing of them is imported
DEEP = {
    ("rcid/kv/latent.py", "transformers.modeling_outputs"),
    ("rcid/models/lora_folder.py", "transformers.utils"),
    ("rcid/models/tokenizers.py", "transformers.convert_slow_tokenizer"),
    ("rcid/pipeline/command_line.py", "transformers.utils"),
}


def test_little_is_imported_from_below_the_top_of_transformers():
    found = set()
    for module in MODULES:
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level: names = [node.module]
            where = module.relative_to(ROOT).as_posix()
            found |= {(where, name) for name in names if name.startswith("transformers.")}
    assert found == DEEP
