"""From a number of the paper to its line: every key leads to the value that is printed, and to a line that names it."""

import json, random, re, subprocess, sys
import pytest
from conftest import ROOT, environment, needs_results_of
from rcid.core.paths import read_json
from rcid.pipeline import provenance
from rcid.pipeline.asked import main, printed_by
from rcid.pipeline.origins import numbers_page, origins_tex
from rcid.pipeline.provenance import all_keys, artifacts, find_value, stages_by_output, where
from rcid.report.paper import MARK, fill, keys_used
from rcid.report.values import read_values
from ruamel.yaml import YAML

PRINTED = read_values(ROOT/"paper"/"values.tex")
STAGES = YAML(typ="safe").load((ROOT/"dvc.yaml").read_text(encoding="utf-8"))["stages"]


def at(file: str, path: tuple):
    "The value at a path of a JSON."
    content = read_json(ROOT/file)
    for step in path: content = content[step]
    return content


def source_of(line) -> str:
    "The code that a line of an origin stands in: of its cell, or of its module."
    if not line.cell: return (ROOT/line.file).read_text(encoding="utf-8")
    return "".join(json.loads((ROOT/line.file).read_text(encoding="utf-8"))["cells"][line.cell - 1]["source"])


def check(key: str, origin):
    "What an origin says is so: the line is there, names the key's last part, and the command is of a stage."
    first = origin.lines[0]
    assert source_of(first).splitlines()[first.line - 1].strip() == first.text, key
    tails = [key.split(".", n)[-1] for n in range(key.count(".") + 1)]
    names = [*tails, *(t.replace(".", "__") for t in tails), *(t.rsplit(".", 1)[0] + "." for t in tails if "." in t)]
    if origin.file.endswith(".json"): assert any(n in first.text for n in names), (key, first)
    stage = origin.command.split()[-1]
    assert stage.split("@")[0] in STAGES and origin.page == f"nbs/experiments/{origin.page[16:-6]}.ipynb", key
    assert (ROOT/origin.page).exists() and (ROOT/origin.file).exists()


@pytest.mark.parametrize("key", random.Random(18).sample(sorted(all_keys()), 20))
def test_a_key_leads_to_what_is_printed(key):
    origins = where(key, commit=False)
    assert len(origins) == 1 and at(origins[0].file, origins[0].path) == origins[0].value
    if key in PRINTED: assert PRINTED[key] == origins[0].value
    check(key, origins[0])


def test_what_is_printed_is_made_on_its_page():
    "A short name such as `batch` is said by many modules; the page says more of the key, or says it first."
    first = [o.lines[0].file for k in all_keys() for o in where(k, commit=False)]
    assert first and {file.split("/")[1] for file in first} == {"experiments"}


ROWS = [(f"exp{n}", row) for n in (1, 2, 5) for row in read_json(ROOT/"metrics"/f"exp{n}.json")["rows"]]


@pytest.mark.parametrize("number", range(10))
def test_a_cell_of_a_table_leads_to_its_row(number):
    draw = random.Random(number)
    table, row = draw.choice(ROWS)
    field = draw.choice(["accuracy", "perplexity", "consistency.held_out", "spearman.held_out", "iia_flipped.trained"])
    key = f"{table}.{row['family']}.{row['task']}.{row['method']}.{field}"
    (origin,) = where(key, commit=False)
    value = row
    for part in field.split("."): value = value[part]
    assert origin.value == value == at(origin.file, origin.path)
    check(field.split(".")[0], origin)


@pytest.mark.parametrize("label", sorted(k for k in artifacts() if ":" in k))
def test_a_label_leads_to_the_cell_that_writes_its_file(label):
    (origin,) = where(label, commit=False)
    if not (ROOT/origin.file).exists(): needs_results_of(origin.stage)
    assert (ROOT/origin.file).exists() and f"label{{{label}}}" in "".join(
        f.read_text(encoding="utf-8") for f in (ROOT/"paper"/"sections").glob("*.tex")
    )
    name = origin.file.removeprefix("paper/").rsplit(".", 1)[0]
    assert origin.lines[0].file == origin.page and name in origin.lines[0].text
    stages = stages_by_output()
    if origin.file in stages: assert stages[origin.file].name == origin.stage
    else: assert f"runs/{origin.stage}/{origin.stage}.ipynb" in stages      # the page is known, this output is new


def refused_key(key: str, capsys) -> str:
    "The one line that is said of a key that nothing is called."
    assert main([key]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    return said


def test_a_key_that_leads_nowhere_is_one_line_with_its_neighbours(capsys):
    said = refused_key("fig:scater", capsys)
    assert said == f"rcid: nothing is called 'fig:scater'; something like it: {said.split(': ', 3)[-1]}"
    assert "fig:scatter" in said and find_value("exp2.no.such.thing") == []


NUMBERS = [key for key in sorted(set(PRINTED) & set(all_keys())) if re.fullmatch(r"\d[\d.,\\]*", PRINTED[key])]


@pytest.mark.parametrize("key", random.Random(24).sample(NUMBERS, 5))
def test_a_number_is_answered_by_the_keys_that_print_it(key, capsys):
    number = PRINTED[key].replace("\\,", "")
    assert printed_by(number)[key] == PRINTED[key]
    main([number])
    assert f"\n{key} " in capsys.readouterr().out


def test_a_number_is_looked_up_in_one_pass_and_without_a_model(monkeypatch):
    "Not in all files for each of the keys; and nobody waits for torch, transformers or DVC to be told a key."
    passes, files, number = [], provenance.metrics_files, PRINTED[NUMBERS[0]].replace("\\,", "")
    monkeypatch.setattr(provenance, "metrics_files", lambda: passes.append(1) or files())
    assert NUMBERS[0] in printed_by(number) and len(passes) == 1
    code = f"""import sys; from rcid.pipeline.command_line import main
assert main(["where", "{number}"]) == 0 and not {{"torch", "transformers", "dvc"}} & set(sys.modules)"""
    told = dict(cwd=ROOT, env=environment(ROOT), stdout=subprocess.DEVNULL)
    subprocess.run([sys.executable, "-c", code], check=True, **told)


def test_a_number_that_nothing_prints_is_one_line(capsys):
    said = refused_key("123456.789", capsys)
    assert said == "rcid: no sentence and no table prints 123456.789: give it as it is printed, or a key"


def test_a_wrong_cell_is_told_what_its_metrics_file_holds(capsys):
    said = refused_key("exp2.no_such_method.accuracy", capsys)
    assert "something like it" in said
    held = said.split("metrics/exp2.json holds ")[1].split(", ")
    assert held == list(read_json(ROOT/"metrics"/"exp2.json"))


def test_help_and_a_place_without_results_are_answered(monkeypatch, tmp_path, capsys):
    main(["--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("usage: rcid where") and all(k in shown for k in ("tab:exp2", "claim.exp2a.repair"))
    named = [line.split()[0].rstrip(",") for line in shown.splitlines() if line.startswith("  ")]
    for key in named[:-1]: assert where(key, commit=False), key                      # what the help names is there
    monkeypatch.delenv("RCID_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    for argv in ([], ["exp2.rcid.accuracy"]):
        assert main(argv) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith("rcid: no rcid workspace")


def test_the_list_of_origins_links_and_changes_no_word(tmp_path):
    "With the list every printed key is a link; without links the text is that of the paper without a list."
    folder = tmp_path/"paper"
    (folder/"setup").mkdir(parents=True)
    (folder/"main.tex").write_text(
        "\\val{n} models.\n\\claim{x} Then\n\\caption{Rows.}\\label{tab:t}\n\\input{setup/origins}\n", encoding="utf-8"
    )
    (folder/"setup"/"origins.tex").write_text("", encoding="utf-8")
    values = {"n": "six", "claim.x": "It is so."}
    plain = fill(folder, values)
    anchors = "".join(rf"\hypertarget{{where.{k}}}{{:}}" for k in ("n", "claim.x", "tab:t")) + "\n"
    (folder/"setup"/"origins.tex").write_text(anchors, encoding="utf-8")
    linked = fill(folder, values).replace(anchors, "")
    assert linked.startswith(r"\hyperlink{where.n}{six} models.") and linked.count("\\hyperlink{where.") == 3
    for key in ("claim.x", "tab:t"): linked = linked.replace(MARK % key, "")
    assert re.sub(r"\\hyperlink\{where\.[^}]+\}\{([^}]*)\}", r"\1", linked) == plain


def test_every_key_of_the_paper_has_a_line_in_the_list():
    known = set(all_keys())
    keys = [k for k in keys_used(ROOT/"paper") if k in known]
    text = origins_tex(keys)
    assert len(keys) > 40 and [k for k in keys if rf"\hypertarget{{where.{k}}}{{:}}" not in text] == []


def test_the_page_of_the_documentation_has_every_key():
    text = numbers_page()
    assert [k for k in [*all_keys(), *(a for a in artifacts() if ":" in a)] if f"| `{k}` |" not in text] == []
    assert {line.count(" | ") for line in text.splitlines() if line.startswith("| `")} == {2}
    linked = re.findall(r"\]\(experiments/([^)]+)\)", text)
    assert linked and all((ROOT/"runs"/page).exists() for page in linked)
