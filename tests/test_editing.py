"""Setup changes this clone only, notebooks merge by cells, and a commit holds clean notebooks and their modules."""
import functools, json, os, re, resource, shutil, signal, subprocess, sys, time, urllib.error, urllib.request
from pathlib import Path
import pytest
from conftest import ROOT, output_of
from rcid.core.params import load_params

HEAVY = ("metrics/", "paper/", "tests/")                                    # not needed to edit
WHO = {"GIT_AUTHOR_NAME": "A", "GIT_AUTHOR_EMAIL": "a@example.org",
       "GIT_COMMITTER_NAME": "A", "GIT_COMMITTER_EMAIL": "a@example.org"}


def environment(folder: Path, home: Path, **more: str) -> dict:
    "The environment of a user at home in `home`, who works in `folder`."
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("GIT_", "JUPYTER", "XDG_", "PYTEST", "IPYTHON"))}
    own = {"HOME": str(home), "PYTHONPATH": str(folder), "GIT_CONFIG_NOSYSTEM": "1", "PYTHON": "false"}  # no install
    return {**kept, **WHO, **own, **more}


def make_clone(folder: Path, tracked: list[str], git: bool = True) -> Path:
    "The sources at `folder`, committed, with an environment that is this one."
    for name in tracked:
        if name.startswith(HEAVY): continue
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT/name, folder/name)
    (folder/".venv").mkdir()
    for name in ("bin", "lib", "share", "pyvenv.cfg"):
        if (Path(sys.prefix)/name).exists(): (folder/".venv"/name).symlink_to(Path(sys.prefix)/name)
    (folder/".venv"/".ready").touch()                                       # nothing is installed in a test
    if git:
        for words in (("init", "-q", "-b", "main"), ("add", "-A"), ("commit", "-q", "-m", "sources")):
            done = run(folder, folder, "git", *words)
            assert done.returncode == 0, output_of(done)
    return folder


def run(folder: Path, home: Path, *words: str, **more: str) -> subprocess.CompletedProcess:
    env = environment(folder, home, **more)
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def git(clone: Path, *words: str) -> subprocess.CompletedProcess:
    return run(clone, clone.parent/"home", "git", *words)


@pytest.fixture
def home(tmp_path) -> Path:
    (tmp_path/"home").mkdir()
    return tmp_path/"home"


@pytest.fixture(scope="module")
def ready(tracked, tmp_path_factory) -> Path:
    "A clone after `make setup`; its tests leave it as it was."
    base = tmp_path_factory.mktemp("ready")
    (base/"home").mkdir()
    folder = make_clone(base/"clone", tracked)
    done = run(folder, base/"home", "make", "setup")
    assert done.returncode == 0, output_of(done)
    return folder


@pytest.fixture
def clone(ready) -> Path:
    "The same, put back afterwards."
    first = git(ready, "rev-parse", "HEAD").stdout.strip()
    yield ready
    git(ready, "checkout", "-q", "-f", "main")
    git(ready, "reset", "-q", "--hard", first)
    git(ready, "clean", "-qfd")


# merges: a small repository with the attributes and the merge drivers of a clone after make setup

def cell(id: str, *lines: str, kind: str = "code", **metadata) -> dict:
    made = {"cell_type": kind, "id": id, "metadata": metadata, "source": "\n".join(lines).splitlines(True)}
    return {**made, "outputs": [], "execution_count": None} if kind == "code" else made


def write(file: Path, *cells: dict):
    file.parent.mkdir(parents=True, exist_ok=True)
    nb = {"cells": list(cells), "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    file.write_text(json.dumps(nb, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def read(file: Path) -> dict:
    "Source by id, in the order of the cells."
    return {c.get("id"): "".join(c["source"]) for c in json.loads(file.read_text(encoding="utf-8"))["cells"]}


class Repo:
    "A repository with one notebook on two branches: `main`, and `theirs` with a name that no shell should read."
    def __init__(self, folder: Path, name: str = "nbs/a.ipynb"):
        self.folder, self.file, self.theirs = folder, folder/name, "theirs'$(touch${IFS}pwned)`touch${IFS}pwned`"

    def git(self, *words, check: bool = True) -> subprocess.CompletedProcess:
        done = run(self.folder, self.folder.parent/"home", "git", *words)
        assert not check or done.returncode == 0, output_of(done)
        return done

    def commit(self, subject: str, *cells: dict):
        write(self.file, *cells)
        self.git("add", "-A")
        self.git("commit", "-q", "-m", subject)

    def diverge(self, base: list, ours: list, theirs: list, subject: str = "theirs"):
        self.commit("base", *base)
        self.git("checkout", "-q", "-b", self.theirs)
        self.commit(subject, *theirs)
        self.git("checkout", "-q", "main")
        self.commit("ours", *ours)

    def cells(self) -> dict: return read(self.file)


@pytest.fixture
def repo(ready, tmp_path, home):
    def make(name: str = "nbs/a.ipynb") -> Repo:
        r = Repo(tmp_path/"small", name)
        r.folder.mkdir()
        r.git("init", "-q", "-b", "main")
        shutil.copy(ready/".gitattributes", r.folder)
        drivers = run(ready, home, "git", "config", "--local", "-z", "--get-regexp", r"^merge\.").stdout
        for key, _, value in (d.partition("\n") for d in drivers.split("\0") if d): r.git("config", key, value)
        return r
    return make


SUBJECTS = ("The student's floor", '"q" $(touch pwned) `touch pwned`', "x'; touch pwned; echo '", "5% | less \\ %P")
BASE = [cell("a", "x = 1"), cell("b", "y = 1"), cell("c", "z = 1")]
OURS = [cell("a", "x = 'ours'"), *BASE[1:]]
THEIRS = [*BASE[:2], cell("c", "z = 'theirs'")]
NAMES = ("nbs/a.ipynb", "nbs/it's $(touch pwned) `touch pwned` \"here\".ipynb")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("way", ("rebase", "merge", "cherry-pick", "stash"))
def test_both_edits_survive(repo, way, subject, name):
    "Whatever the subject, the branch and the file are called; on either side's other cell."
    r = repo(name)
    r.diverge(BASE, OURS, THEIRS, subject)
    if way == "rebase":
        r.git("checkout", "-q", r.theirs)
        r.git("rebase", "-q", "main")
        assert r.git("log", "-1", "--format=%s").stdout.strip() == subject, "the rebase dropped the commit"
    elif way == "merge": r.git("merge", "-q", "-m", subject, r.theirs)
    elif way == "cherry-pick": r.git("cherry-pick", r.theirs)
    else:
        r.git("checkout", "-q", r.theirs)
        r.git("checkout", "-q", "HEAD~1")
        write(r.file, *THEIRS)
        r.git("stash", "push", "-q", "-m", subject)
        r.git("checkout", "-q", "main")
        r.git("stash", "pop", "-q")
    assert r.cells() == {"a": "x = 'ours'", "b": "y = 1", "c": "z = 'theirs'"}
    assert not list(r.folder.rglob("pwned")), "a shell read a subject, a branch or a name"


@pytest.mark.parametrize("way", ("rebase", "merge", "cherry-pick"))
def test_a_conflict_is_a_notebook_with_both_sides(repo, way):
    r = repo()
    base, ours, theirs = (cell("a", "first = 1", f"x = {x}", "last = 1") for x in ("1", "'ours'", "'theirs'"))
    r.diverge([base, *BASE[1:]], [ours, *BASE[1:]], [theirs, BASE[1], cell("c", "z = 3")], SUBJECTS[0])
    if way == "rebase": r.git("checkout", "-q", r.theirs)
    done = r.git(way, "main" if way == "rebase" else r.theirs, check=False)
    assert done.returncode and r.git("ls-files", "--unmerged").stdout, "a conflict must stop"
    assert set(r.cells()) == set("abc")                                     # valid JSON, with the ids
    lines = r.cells()["a"].splitlines()
    assert [l[:8].rstrip() for l in lines if l[:7] in ("<" * 7, "=" * 7, ">" * 7)] == ["<" * 7, "=" * 7, ">" * 7]
    assert {"x = 'ours'", "x = 'theirs'"} <= set(lines) and (lines[0], lines[-1]) == ("first = 1", "last = 1")
    assert r.cells()["b"] == "y = 1" and r.cells()["c"] == "z = 3"          # only that cell


A, B, C, D, O, T = (cell(i, i) for i in "abcdot")
A2, B2, C2, D2 = (cell(i, i.upper()) for i in "abcd")
LINES = (cell("a", *w) for w in (("1", "2", "3"), ("one", "2", "3"), ("1", "2", "three"), ("one", "2", "three")))
MERGES = { # base, ours, theirs, merged
    "lines of one cell": tuple([c] for c in LINES),
    "inserted at the same place": ([A, B], [A, O, B], [A, T, B], [A, O, T, B]),
    "inserted first and last": ([A, B], [O, A, B], [A, B, T], [O, A, B, T]),
    "deleted beside an edit": ([A, B, C], [A, C], [A, B, C2], [A, C2]),
    "deleted by theirs": ([A, B, C], [A2, B, C], [A, B], [A2, B]),
    "inserted after a deleted cell": ([A, B, C], [A, C], [A, B, T, C], [A, T, C]),
    "moved by theirs, edited by ours": ([A, B, C, D], [A, B, C, D2], [D, A, B, C], [D2, A, B, C]),
    "moved by ours, edited by theirs": ([A, B, C, D], [D, A, B, C], [A, B, C, D2], [D2, A, B, C]),
    "the same edit": ([A, B], [A, B2], [A, B2], [A, B2]),
}


@pytest.mark.parametrize("case", MERGES)
def test_merge_by_cells(repo, case):
    base, ours, theirs, merged = MERGES[case]
    r = repo()
    r.diverge(base, ours, theirs)
    done = r.git("merge", "-q", "-m", "both", r.theirs, check=False)
    assert done.returncode == 0, output_of(done)
    assert [*r.cells().items()] == [(c["id"], "".join(c["source"])) for c in merged]


def test_tags_and_kinds_merge_too(repo):
    r = repo()
    base = [cell("a", "x = 1", tags=["parameters"]), cell("b", "text")]
    ours = [cell("a", "x = 1", tags=["parameters", "ours"]), cell("b", "text", kind="markdown")]
    r.diverge(base, ours, [cell("a", "x = 2", tags=["theirs"]), cell("b", "text", "more")])
    r.git("merge", "-q", "-m", "both", r.theirs)
    a, b = json.loads(r.file.read_text())["cells"]
    assert a["metadata"]["tags"] == ["ours", "theirs"] and a["source"] == ["x = 2"]
    assert (b["cell_type"], b["source"]) == ("markdown", ["text\n", "more"]) and "outputs" not in b


@pytest.mark.parametrize("deleted", ("ours", "theirs"))
def test_an_edit_of_a_deleted_cell_is_a_conflict(repo, deleted):
    r = repo()
    sides = {"ours": [A, cell("b", "edited")], "theirs": [A, cell("b", "edited")], deleted: [A]}
    r.diverge([A, B], sides["ours"], sides["theirs"])
    assert r.git("merge", r.theirs, check=False).returncode
    assert "edited" in r.cells()["b"] and f"{deleted}: cell deleted" in r.cells()["b"]


def test_a_file_that_is_no_notebook_is_merged_as_text(repo):
    r = repo()
    r.diverge(BASE, OURS, THEIRS)
    r.git("checkout", "-q", r.theirs)
    r.file.write_text(r.file.read_text().replace('"cells"', "cells, broken 'half'").replace("x = 1", "x = 4"))
    r.git("commit", "-q", "-a", "-m", "broken")
    done = r.git("rebase", "main", check=False)
    assert done.returncode and "x = 'ours'" in r.file.read_text() and "x = 4" in r.file.read_text()


def test_outputs_go_with_their_source(repo):
    "A notebook outside nbs/ may have outputs; theirs come with the cells that they changed."
    r = repo("mine/a.ipynb")
    def shows(c, text): return {**c, "outputs": [{"output_type": "stream", "name": "stdout", "text": [text]}]}
    ours, theirs = [shows(A2, "A"), shows(B, "b, run again")], [shows(A, "a, run again"), shows(B2, "B")]
    r.diverge([shows(A, "a"), shows(B, "b")], ours, theirs)
    r.git("merge", "-q", "-m", "both", r.theirs)
    assert [c["outputs"][0]["text"] for c in json.loads(r.file.read_text())["cells"]] == [["A"], ["B"]]


def test_merge_without_the_environment(repo):
    "A driver whose environment is gone merges as text: both sides stay visible."
    r = repo()
    for key in ("merge.rcid.driver", "merge.nbdev-merge.driver"):
        value = r.git("config", key, check=False).stdout.rstrip("\n")
        if value: r.git("config", key, value.replace(".venv", ".gone"))
    r.diverge(BASE, OURS, THEIRS)
    r.git("merge", "-q", "-m", "both", r.theirs)
    assert r.cells() == {"a": "x = 'ours'", "b": "y = 1", "c": "z = 'theirs'"}


# commits

EDITED = "nbs/00_core/00_paths.ipynb"
MODULE = "rcid/core/paths.py"
MARKS = ("<" * 7 + " ours", "=" * 7, ">" * 7 + " theirs")


def change(file: Path, edit):
    nb = json.loads(file.read_text(encoding="utf-8"))
    edit(nb)
    file.write_text(json.dumps(nb, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def append(name: str, line: str):
    "An edit: `line` at the end of the cell that holds `name`."
    def edit(nb):
        for c in nb["cells"]:
            if name in "".join(c["source"]): c["source"] = [*c["source"], "\n", line]
    return edit


def commit(clone: Path, *words: str): return git(clone, "commit", "-q", "-m", "the user's", *words)


def staged_edit(clone: Path, name: str, edit):
    change(clone/name, edit)
    git(clone, "add", "-A")


def with_outputs(nb: dict):
    code = [c for c in nb["cells"] if c["cell_type"] == "code"]
    for n, c in enumerate(code, 1): c["execution_count"] = n; c["metadata"]["execution"] = {"started": "now"}
    failed = {"output_type": "error", "ename": "E", "evalue": "", "traceback": ["File /home/me/x.py"]}
    code[-1]["outputs"].append(failed)                                      # beside a picture, if it has one
    nb["metadata"]["language_info"] = {"name": "python", "version": "3.11.9"}
    nb["metadata"]["kernelspec"]["display_name"] = "Python 3 (ipykernel)"


@pytest.mark.parametrize("name", (EDITED, "nbs/experiments/exp1.ipynb", "CONTRIBUTING.md", "params.yaml", MODULE))
@pytest.mark.parametrize("mark", (MARKS[0], MARKS[1], f"`{MARKS[2]}`"))
def test_commit_refuses_marks_of_a_merge(clone, name, mark):
    file = clone/name
    if name.endswith(".ipynb"): change(file, lambda nb: nb["cells"][1].update(source=["x = 1\n", f"{mark}\n", "y = 1"]))
    else: file.write_text(file.read_text() + f"{mark}\n")
    git(clone, "add", "-A")
    done = commit(clone)
    assert done.returncode, "committed with the mark of a merge"
    (line,) = [l for l in done.stderr.splitlines() if name in l]
    if name.endswith(".ipynb"): assert f"cell {json.loads(file.read_text())['cells'][1]['id']}" in line


def test_commit_refuses_half_a_notebook(clone):
    file = clone/EDITED
    file.write_text(file.read_text().replace('"cells": [', f'"cells": [\n{MARKS[0]}\n'))
    git(clone, "add", "-A")
    done = commit(clone)
    assert done.returncode and EDITED in done.stderr and len(done.stderr.splitlines()) == 1, output_of(done)


@pytest.mark.parametrize("edited", ("notebook", "module"))
def test_commit_refuses_a_stale_module(clone, edited):
    if edited == "module":
        (clone/MODULE).write_text((clone/MODULE).read_text().replace("CHECKSUMS = ", "CHECKSUMS  = "))
    else: change(clone/EDITED, append("CHECKSUMS = ", "x = 1"))
    git(clone, "add", "-A")
    done = commit(clone)
    assert done.returncode, "committed a module that is not what its notebook exports"
    (line,) = [l for l in done.stderr.splitlines() if MODULE in l]
    assert EDITED in line and "nbdev_export" in line and "nbdev_update" in line
    advised = "nbdev_update" if edited == "module" else "nbdev_export"
    run(clone, clone.parent/"home", str(clone/".venv/bin"/advised))         # works, and keeps the edit
    git(clone, "add", "-A")
    done = commit(clone)
    assert done.returncode == 0, output_of(done)
    assert ("CHECKSUMS  = " if edited == "module" else "\nx = 1") in (clone/MODULE).read_text()


def test_commit_cleans_what_is_staged(clone):
    before = (clone/EDITED).read_text()
    (clone/"CONTRIBUTING.md").write_text("more\n")
    staged_edit(clone, EDITED, with_outputs)
    done = commit(clone)
    assert done.returncode == 0, output_of(done)
    assert git(clone, "show", f"HEAD:{EDITED}").stdout == before == (clone/EDITED).read_text()
    assert git(clone, "status", "--porcelain").stdout == ""


def test_commit_leaves_unstaged_work_alone(clone):
    "What is not staged stays as it is, in a file that is cleaned in the commit and beside it."
    before = (clone/EDITED).read_text()
    (clone/"CONTRIBUTING.md").write_text("more\n")
    staged_edit(clone, EDITED, with_outputs)
    change(clone/EDITED, lambda nb: nb["cells"].append(cell("mine", "not yet")))
    change(clone/"nbs/index.ipynb", with_outputs)
    kept = [(clone/n).read_bytes() for n in (EDITED, "nbs/index.ipynb")]
    done = commit(clone)
    assert done.returncode == 0, output_of(done)
    assert git(clone, "show", f"HEAD:{EDITED}").stdout == before
    assert [(clone/n).read_bytes() for n in (EDITED, "nbs/index.ipynb")] == kept


@pytest.mark.parametrize("words", (("-a",), (EDITED,)))
def test_commit_of_outputs_only_is_no_commit(clone, words):
    change(clone/EDITED, with_outputs)
    done = commit(clone, *words)
    assert done.returncode and len(done.stderr.splitlines()) <= 2, output_of(done)
    assert git(clone, "rev-list", "--count", "HEAD").stdout.strip() == "1"


def test_a_merge_commit_is_checked(clone):
    "A branch brings a module that stays behind its notebook."
    git(clone, "checkout", "-q", "-b", "stale")
    staged_edit(clone, EDITED, append("CHECKSUMS = ", "x = 1"))
    assert commit(clone, "--no-verify").returncode == 0
    git(clone, "checkout", "-q", "main")
    (clone/"CONTRIBUTING.md").write_text("more\n")
    assert commit(clone, "-a").returncode == 0
    done = git(clone, "merge", "-q", "-m", "both", "stale")
    git(clone, "merge", "--abort")
    assert done.returncode and MODULE in done.stderr, output_of(done)


def test_a_rebase_of_notebook_and_module(clone):
    "Two branches edit different cells and export; after the rebase both edits are in the notebook and in its module."
    home, tools = clone.parent/"home", clone/".venv/bin"
    def edit(name: str, line: str):
        change(clone/EDITED, append(name, line))
        assert run(clone, home, str(tools/"nbdev_export")).returncode == 0
        git(clone, "add", "-A")
    git(clone, "checkout", "-q", "-b", "topic")
    edit("def sha256(", "topic = 1")
    assert git(clone, "commit", "-q", "-m", "The student's floor").returncode == 0
    git(clone, "checkout", "-q", "main")
    edit("CHECKSUMS = ", "main = 1")
    assert git(clone, "commit", "-q", "-m", "ours").returncode == 0
    git(clone, "checkout", "-q", "topic")
    done = git(clone, "rebase", "-q", "main")
    if done.returncode:                                                     # both changed the list of public names
        unmerged = git(clone, "diff", "--name-only", "--diff-filter=U").stdout.split()
        assert unmerged and all(name.startswith("rcid/") for name in unmerged), output_of(done)
        run(clone, home, str(tools/"nbdev_export"))
        git(clone, "add", "-A")
        done = git(clone, "-c", "core.editor=true", "rebase", "--continue")
    assert done.returncode == 0, output_of(done)
    code, module = "".join(read(clone/EDITED).values()), (clone/MODULE).read_text()
    assert git(clone, "log", "-1", "--format=%s").stdout == "The student's floor\n"
    assert all(text in both for text in ("topic = 1", "main = 1") for both in (code, module))
    run(clone, home, str(tools/"nbdev_export"))
    assert git(clone, "status", "--porcelain").stdout == ""


def test_export_settles_conflicts_in_modules(clone):
    before = (clone/MODULE).read_text()
    for file in (clone/MODULE, clone/"rcid/_modidx.py"):
        file.write_text(file.read_text().replace("\n", f"\n{MARKS[0]}\n", 20))
    done = run(clone, clone.parent/"home", str(clone/".venv/bin/nbdev_export"))
    assert done.returncode == 0 and (clone/MODULE).read_text() == before, output_of(done)
    assert git(clone, "status", "--porcelain").stdout == ""


def test_the_check_is_quick(clone):
    change(clone/EDITED, lambda nb: nb["cells"].append(cell("new", "x = 1")))
    spent = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])  # CPU seconds
    before = spent()
    done = commit(clone, "-a")
    assert done.returncode == 0 and spent() - before < 3, output_of(done)


def test_clean_keeps_what_is_committed(clone):
    "The one command makes of every notebook that was run what is in git, tags and ids included."
    before = {f: f.read_bytes() for f in sorted((clone/"nbs").rglob("*.ipynb"))}
    for f in before: change(f, with_outputs)
    done = run(clone, clone.parent/"home", "make", "clean-notebooks")
    assert done.returncode == 0, output_of(done)
    assert [f.name for f in before if f.read_bytes() != before[f]] == []
    assert sum(b'"parameters"' in b for b in before.values()) >= 25


def test_the_suite_refuses_marks(clone, tracked):
    for name in tracked:
        if name.startswith("tests/") and name.endswith((".py", ".json")):
            (clone/name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT/name, clone/name)
    change(clone/"nbs/experiments/exp1.ipynb", lambda nb: nb["cells"][0].update(source=[f"{MARKS[0]}\n", "x"]))
    words = (sys.executable, "-m", "pytest", "-q", "-k", "merge", "tests/test_repository.py")
    done = run(clone, clone.parent/"home", *words)
    assert done.returncode == 1 and "exp1.ipynb" in done.stdout, output_of(done)


# setup

def inventory(folder: Path) -> dict:
    return {p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


def test_setup_leaves_the_home_alone(tracked, tmp_path, home):
    (home/".jupyter").mkdir()
    (home/".jupyter"/"jupyter_server_config.py").write_text("c.ServerApp.port = 1\n")
    before = inventory(home)
    folder = make_clone(tmp_path/"clone", tracked)
    done = run(folder, home, "make", "setup")
    assert done.returncode == 0, output_of(done)
    assert inventory(home) == before
    assert run(folder, home, "git", "status", "--porcelain").stdout == ""


def test_setup_leaves_other_hooks_alone(tracked, tmp_path, home):
    "core.hooksPath is a folder for all of the user's repositories."
    hooks = home/"my hooks"
    hooks.mkdir()
    for name in ("post-merge", "pre-commit"): (hooks/name).write_text("#!/bin/sh\nexit 0\n")
    (home/".gitconfig").write_text('[core]\n\thooksPath = "~/my hooks"\n')
    before = inventory(home)
    folder = make_clone(tmp_path/"clone", tracked)
    done = run(folder, home, "make", "setup")
    assert done.returncode == 0 and inventory(home) == before, output_of(done)
    (line,) = [l for l in done.stderr.splitlines() if "core.hooksPath" in l]
    check = line.split("call ")[1].split(" from")[0]
    assert run(folder, home, check).returncode == 0 and Path(check).is_relative_to(folder)


@pytest.mark.parametrize("hook", ("post-merge", "pre-commit"))
def test_setup_keeps_a_hook_of_the_clone(tracked, tmp_path, home, hook):
    folder = make_clone(tmp_path/"clone", tracked)
    mine = folder/".git/hooks"/hook
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("#!/bin/sh\necho mine\n")
    done = run(folder, home, "make", "setup")
    assert done.returncode == 0 and mine.read_text() == "#!/bin/sh\necho mine\n", output_of(done)
    assert (str(mine) in done.stderr) == (hook == "pre-commit")             # we have no post-merge


@pytest.mark.parametrize("where", ("tarball", "inside another repository"))
def test_setup_without_a_repository_says_so(tracked, tmp_path, home, where):
    outer = tmp_path/"outer"
    outer.mkdir()
    if where != "tarball": run(outer, home, "git", "init", "-q")
    folder = make_clone(outer/"rcid", tracked, git=False)
    before = inventory(outer/".git") if where != "tarball" else {}
    done = run(folder, home, "make", "setup", GIT_CEILING_DIRECTORIES=str(tmp_path))
    assert done.returncode == 0, output_of(done)
    assert len([l for l in done.stderr.splitlines() if "not a git repository" in l]) == 1, output_of(done)
    assert (folder/"data"/"ioi.json").exists()
    if where != "tarball": assert inventory(outer/".git") == before, "the hooks of another repository were changed"


@pytest.mark.parametrize("kind", ("a worktree", "a submodule"))
def test_setup_in_other_kinds_of_clone(tracked, tmp_path, home, kind):
    source = make_clone(tmp_path/"clone", tracked)
    folder = tmp_path/"other"/"rcid"
    folder.parent.mkdir()
    if kind == "a worktree": done = run(source, home, "git", "worktree", "add", "-q", "-b", "wt", str(folder))
    else:
        run(folder.parent, home, "git", "init", "-q")
        words = ("-c", "protocol.file.allow=always", "submodule", "add", "-q", str(source), "rcid")
        done = run(folder.parent, home, "git", *words)
    assert done.returncode == 0, output_of(done)
    shutil.copytree(source/".venv", folder/".venv", symlinks=True)
    os.utime(folder/".venv"/".ready")
    done = run(folder, home, "make", "setup")
    assert done.returncode == 0, output_of(done)
    (folder/"CONTRIBUTING.md").write_text(MARKS[0] + "\n")
    assert run(folder, home, "git", "commit", "-q", "-a", "-m", "x").returncode, "the commit check does not run here"


@pytest.mark.parametrize("name", ("two words", "it's $HOME \"here\" `x` 5%"))
def test_setup_in_a_path_with_anything_in_it(tracked, tmp_path, home, name):
    folder = make_clone(tmp_path/name, tracked)
    done = run(folder, home, "make", "setup")
    assert done.returncode == 0 and (folder/"data"/"ioi.json").exists(), output_of(done)
    (folder/"CONTRIBUTING.md").write_text(MARKS[0] + "\n")
    assert "CONTRIBUTING.md" in run(folder, home, "git", "commit", "-q", "-a", "-m", "x").stderr
    r = Repo(folder, "nbs/a.ipynb")
    r.git("checkout", "-q", "CONTRIBUTING.md")
    write(r.file, *BASE)
    r.git("add", "-A")
    r.git("commit", "-q", "--no-verify", "-m", "base")
    r.git("checkout", "-q", "-b", r.theirs)
    for side, branch in ((THEIRS, None), (OURS, "main")):
        if branch: r.git("checkout", "-q", branch)
        write(r.file, *side)
        r.git("commit", "-q", "-a", "-m", "it's", "--no-verify")
    r.git("merge", "-q", "-m", "both", r.theirs, "--no-verify")
    assert r.cells() == {"a": "x = 'ours'", "b": "y = 1", "c": "z = 'theirs'"}


def test_setup_without_a_home(tracked, tmp_path):
    folder = make_clone(tmp_path/"clone", tracked)
    env = environment(folder, tmp_path)
    del env["HOME"]
    done = subprocess.run(["make", "setup"], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and not (folder/"~").exists(), output_of(done)
    assert "[merge " in (folder/".git/config").read_text()


def test_setup_takes_away_the_old_driver(tracked, tmp_path, home):
    "An earlier setup left nbdev's driver, its include and a hook that signs notebooks in the user's home."
    folder = make_clone(tmp_path/"clone", tracked)
    run(folder, home, "git", "config", "--local", "include.path", "../.gitconfig")
    run(folder, home, "git", "config", "--local", "merge.nbdev-merge.driver", "nbdev_merge %O %A %B %P")
    (folder/".gitconfig").write_text('[merge "nbdev-merge"]\n\tdriver = nbdev_merge %O %A %B %P\n')
    (folder/".git/hooks").mkdir(exist_ok=True)
    (folder/".git/hooks/post-merge").write_text("#!/bin/sh\n/some/where/.venv/bin/nbdev_trust\n")
    assert run(folder, home, "make", "setup").returncode == 0
    config = run(folder, home, "git", "config", "--local", "--includes", "--list").stdout
    assert "nbdev" not in config and "include" not in config and not (folder/".git/hooks/post-merge").exists()


# JupyterLab

def start_lab(folder: Path, home: Path):
    "`make lab`, and the address and token of its server; it keeps no standing settings of the user's."
    words = ["make", "lab", "ARGS=--no-browser --port=0 --ServerApp.ip=127.0.0.1"]
    server = subprocess.Popen(words, cwd=folder, env=environment(folder, home), stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL, start_new_session=True)
    for _ in range(240):
        for file in (*folder.glob(".venv/jupyter/runtime/jpserver-*.json"), *home.rglob("jpserver-*.json")):
            try: return server, json.loads(file.read_text())
            except ValueError: pass
        if server.poll() is not None: return server, None
        time.sleep(.25)
    return server, None


def ask(info: dict, method: str, path: str, body: dict | None = None) -> dict:
    data, headers = json.dumps(body).encode() if body else None, {"Authorization": f"token {info['token']}"}
    request = urllib.request.Request(f"{info['url']}api/{path}", method=method, data=data, headers=headers)
    for _ in range(60):
        try: return json.loads(urllib.request.urlopen(request, timeout=20).read() or b"{}")
        except urllib.error.URLError as e:
            if isinstance(e, urllib.error.HTTPError): raise
            time.sleep(.25)                                                 # its file is there before it listens
    raise AssertionError("the server does not answer")


def test_lab_saves_clean_notebooks_and_writes_here_only(tracked, tmp_path, home):
    folder = make_clone(tmp_path/"clone", tracked)
    before, name = (folder/EDITED).read_text(), "scratch.ipynb"
    server, info = start_lab(folder, home)
    try:
        assert info, "make lab does not start a server"
        nb = json.loads(before)
        with_outputs(nb)
        body = {"type": "notebook", "format": "json", "content": nb}
        for path in (EDITED, name): ask(info, "PUT", f"contents/{path}", body)
        ask(info, "POST", "shutdown")
        server.wait(60)
    finally:
        if server.poll() is None: os.killpg(server.pid, signal.SIGTERM)
    assert (folder/EDITED).read_text() == before
    assert "traceback" in (folder/name).read_text()                         # not one of ours: as it was saved
    assert [p for p in inventory(home)] == []
    assert run(folder, home, "git", "status", "--porcelain").stdout.splitlines() == [f"?? {name}"]


EXPERIMENTS = sorted((ROOT/"nbs"/"experiments").glob("*.ipynb"))


def code_cells(notebook: Path) -> list[dict]:
    return [c for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", [*EXPERIMENTS, ROOT/"nbs"/"index.ipynb"], ids=lambda n: n.stem)
def test_an_experiment_runs_where_its_kernel_stands(notebook, monkeypatch):
    "Before anything is read it is in the workspace, whichever folder JupyterLab started the kernel in."
    monkeypatch.chdir(notebook.parent)
    sources = ["".join(c["source"]) for c in code_cells(notebook)]
    first = next(i for i, s in enumerate(sources) if re.search(r"(?m)^(from|import) ", s))
    exec("\n".join(s for s in sources[:first + 1] if not s.startswith("%")), {})
    assert Path.cwd() == ROOT


@pytest.mark.parametrize("notebook", EXPERIMENTS, ids=lambda n: n.stem)
def test_default_coordinates_are_of_the_default_run(notebook):
    "What the parameters cell names is a stage of dvc.yaml with the committed params."
    names = {s.addressing: s.cmd for s in dvc_stages()}
    given = {}
    for c in code_cells(notebook):
        if "parameters" in c["metadata"].get("tags", []): exec("".join(c["source"]), given)
    words = [f"{k}={v}" for k, v in given.items() if k != "__builtins__"]
    plain = f"python -m rcid.pipeline.stage {notebook.stem}"
    assert {plain, " ".join([plain, *words])} & set(names.values())


@functools.cache
def dvc_stages() -> list:
    from dvc.repo import Repo
    return [s for s in Repo(str(ROOT)).index.stages if isinstance(s.cmd, str)]


def test_an_experiment_in_lab_writes_where_the_run_does(tracked, tmp_path, home):
    "Run all, in the folder of the notebook: results are read and written at the root, and no folder is left beside it."
    folder = make_clone(tmp_path/"clone", [*tracked], git=False)
    for name in tracked:
        if name.startswith(("metrics/", "paper/")) and not name.endswith((".pdf", ".png")):
            (folder/name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT/name, folder/name)
    (folder/"metrics"/"exp4.json").unlink()
    code = """
import nbformat
from nbclient import NotebookClient
nb = nbformat.read("nbs/experiments/exp4.ipynb", 4)
NotebookClient(nb, kernel_name="python3", resources={"metadata": {"path": "nbs/experiments"}}).execute()
"""
    done = run(folder, home, sys.executable, "-c", code)
    assert (folder/"metrics"/"exp4.json").exists(), output_of(done)
    assert done.returncode == 0 and not [p for p in (folder/"nbs/experiments").iterdir() if p.is_dir()], output_of(done)


# what a reader sees first

def links(text: str) -> list[str]:
    return [l for l in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in l and not l.startswith("#")]


@pytest.mark.parametrize("page", ("nbs/index.ipynb", "README.md", "CONTRIBUTING.md"))
def test_links_lead_somewhere(page):
    text = (ROOT/page).read_text(encoding="utf-8")
    if page.endswith(".ipynb"): text = "\n".join("".join(c["source"]) for c in json.loads(text)["cells"])
    found = links(text)
    assert [l for l in found if not ((ROOT/page).parent/l).exists()] == [] and (found or page == "CONTRIBUTING.md")


def test_readme_is_what_its_notebook_renders(tracked, tmp_path, home):
    folder = make_clone(tmp_path/"clone", tracked, git=False)
    done = run(folder, home, "make", "readme")
    assert done.returncode == 0 and (folder/"README.md").read_text() == (ROOT/"README.md").read_text(), output_of(done)
    assert inventory(home) == {}                                            # jupyter is at home in .venv


def test_readme_says_what_makes_its_models():
    "In a fresh clone the folders of the ten lines are not there: the text before names the stage that writes them."
    before, _, code = (ROOT/"README.md").read_text(encoding="utf-8").partition("teacher, tokenizer = load_model(")
    folders = re.findall(r'load_model\("(artifacts/[^"]+)"\)', "load_model(" + code)
    written = {out.def_path: s.addressing for s in dvc_stages() for out in s.outs}
    assert len(folders) == 2 and "make repro" in before.split("## Ten lines")[1]
    (named,) = re.findall(r"`dvc repro (\S+)`", before)
    needed = {d.def_path for s in dvc_stages() if s.addressing == named for d in s.deps}
    upstream = {named, *(written[path] for path in needed if path in written)}
    assert {written[f] for f in folders} <= upstream


def test_contributing_explains_the_ways_of_an_edit():
    text = (ROOT/"CONTRIBUTING.md").read_text(encoding="utf-8")
    words = ("nbdev_export", "nbdev_update", "make clean-notebooks", "make check", "make lab", "<<<<<<<", "rebase")
    assert [w for w in words if w not in text] == []
    assert "nbdev_clean" not in text                                        # it keeps outputs, which the tests refuse


def test_lab_takes_arguments():
    done = subprocess.run(["make", "-n", "lab", "ARGS=--no-browser --port=9"], cwd=ROOT, capture_output=True, text=True)
    assert "--no-browser --port=9" in done.stdout and ("--allow-root" in done.stdout) == (os.getuid() == 0)
