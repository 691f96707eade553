"""The launcher on one host: the results of a serial `dvc repro`, whatever the workers."""
import re, time
import pytest, toy

FAST = {"TOY_PACE": "0.05"}


@pytest.fixture(scope="module")
def serial(tmp_path_factory) -> dict:
    folder = toy.make(tmp_path_factory.mktemp("serial")/"toy")
    toy.dvc(folder, "repro", "-q", TOY_PACE="0")
    return toy.results(folder)


@pytest.mark.slow
def test_each_gpu_has_one_worker(tmp_path, serial):
    folder = toy.make(tmp_path/"toy")
    code, said = toy.launch(folder, **FAST, CUDA_VISIBLE_DEVICES="0,2,5,7")
    assert code == 0 and "4 workers on GPU" in said and toy.results(folder) == serial, said
    trail = toy.trail(folder)
    # which one writes first is up to the machine
    assert {t["gpu"] for t in trail} == {"0", "2", "5", "7"}
    assert "up to date" in toy.dvc(folder, "repro") and toy.launch(folder)[1].startswith("nothing to do")
    code, said = toy.launch(folder, "--workers", "5", CUDA_VISIBLE_DEVICES="0,1")
    assert code == 1 and "5 workers and 2 GPUs: one worker needs one GPU" in said


@pytest.mark.slow
def test_an_input_that_changes_meanwhile(tmp_path, serial):
    "A result that belongs to neither version of its input is not recorded; the next run makes it again."
    folder = toy.make(tmp_path/"toy")
    process = toy.start(folder, "--workers", "2", TOY_PACE="0.2")
    while not toy.trail(folder): time.sleep(0.02)
    kept = (folder/"params.yaml").read_text()
    (folder/"params.yaml").write_text(kept.replace("steps: 10", "steps: 11"))
    said, _ = process.communicate(timeout=90)
    assert (
        process.returncode == 1
        and "params.yaml changed while it ran: its result is not recorded, run again" in said
        and "train@a" not in (folder / "dvc.lock").read_text()
    ), said
    (folder/"params.yaml").write_text(kept)
    assert toy.launch(folder, "--workers", "2", **FAST)[0] == 0 and toy.results(folder) == serial


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, line",
    (
        (("nothing",), "rcid: .*nothing"),
        (("--workers", "0"), "rcid: 0 workers: use one or more"),
        (("--executor", "slurm"), "rcid: no SLURM here: sbatch is not installed"),
    ),
)
def test_what_cannot_run_is_said_in_a_line(tmp_path, words, line):
    code, said = toy.launch(toy.make(tmp_path/"toy"), *words, PATH="/nowhere")
    assert code == 1 and re.search(line, said.splitlines()[-1]) and "Traceback" not in said, said


@pytest.mark.slow
def test_what_comes_first_comes_first(tmp_path, serial):
    "One worker, and a training that would be the last: it is the first, and the results are the same."
    def order(name, *words):
        folder = toy.make(tmp_path/name)
        code, said = toy.launch(folder, "--workers", "1", *words, **FAST)
        assert code == 0 and toy.results(folder) == serial, said
        return re.findall(r"^ran +train@(\w+)", said, re.M)
    usual = order("usual")
    assert order("asked", "--first", f"train@{usual[-1]}") == [usual[-1], *usual[:-1]]
    code, said = toy.launch(toy.make(tmp_path/"other"), "--first", "nothing")
    assert code == 1 and "rcid: --first nothing: there is no such stage" in said and "Traceback" not in said, said
