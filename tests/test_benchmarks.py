"""The committed benchmark results are whole, and the benchmark's own rulers measure what they say. Nothing here is about how fast a machine is."""
import json, sys
import pytest, torch
from conftest import ROOT

sys.path.append(str(ROOT/"tests"/"benchmarks"))
PARTS = ("sweep", "peers", "step", "cka", "startup")


@pytest.fixture(scope="module")
def results(): return json.loads((ROOT/"tests"/"benchmarks"/"results.json").read_text())


def test_results_have_every_part_from_one_thread(results):
    assert set(results) == set(PARTS)
    for part, r in results.items():
        assert r["machine"]["threads"] == 1 and {"cpu", "torch", "transformers", "python"} <= set(r["machine"]), part
        assert r.get("rows"), part


def test_results_agree_with_the_references(results):
    assert all(e["error"] <= 1e-4 for e in results["sweep"]["errors"]) and {e["mode"] for e in results["sweep"]["errors"]} == {"noising", "denoising"}
    assert all(r["difference"] <= 1e-4 for r in results["peers"]["rows"])
    assert all(r["loss_difference"] <= 1e-4 for r in results["step"]["rows"] if r["step"] in ("rcid", "+ fused AdamW"))
    assert all(r["error"] <= 1e-5 for r in results["cka"]["rows"] if r["tool"] == "rcid") and results["cka"]["models"]["error"] <= 1e-5
    assert all(m["peak_mib"] <= m["budget_mib"] for m in results["sweep"]["memory"])


def test_peers_are_there_or_a_note_says_why(results):
    said = json.dumps([r.get("notes") for r in results.values()])
    for part, peers in dict(peers=("transformer-lens", "nnsight", "pyvene"), step=("trl",), cka=("torch_cka", "ckatorch")).items():
        for peer in peers: assert any(peer in json.dumps(row) for row in results[part]["rows"]) or peer.replace("-", "_") in said, peer


def test_a_part_replaces_its_own_numbers_only(tmp_path, monkeypatch):
    import common
    monkeypatch.setattr(common, "RESULTS", tmp_path/"results.json")
    common.save("step", dict(rows=[dict(cost=1 / 3)])), common.save("cka", dict(rows=[])), common.save("step", dict(rows=[dict(cost=2 / 3)]))
    kept = json.loads((tmp_path/"results.json").read_text())
    assert set(kept) == {"step", "cka"} and kept["step"]["rows"] == [{"cost": 0.6667}] and kept["cka"]["machine"]["threads"] == torch.get_num_threads()
