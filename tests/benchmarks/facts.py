"""How many pairs the public facts give before a teacher's filter: python tests/benchmarks/facts.py

By table and by the vocabulary of a real model; `both` are those that fit Qwen3 and LLaMA 3 together. No subject is in
two pairs of a table. Needs RCID_DATA_DIR and what tests/fetch.py fetches; writes facts.json.
"""

import json, sys
from common import HERE, cpu, show

sys.path.append(str(HERE.parent))
TABLES = ("lama", "counterfact", "lre")
VOCABULARIES = ("SmolLM2", "qwen3", "llama3")
MOST = 10**6                 # more than there are


def pairs_of(table, tokenizers, long_answers=False):
    "All pairs of a table, read by the first tokenizer, that fit every tokenizer."
    from rcid.data import load_for_all
    beside = tokenizers[1] if len(tokenizers) > 1 else None
    options = dict(source="path", dataset=table, subject_tokens="any", beside=beside, long_answers=long_answers)
    return load_for_all("factual", tokenizers, ["subject"], "all", MOST, **options)[0]["subject"]


def counted(table, who, tokenizers):
    "One row of the record."
    seconds, pairs = cpu(lambda: pairs_of(table, tokenizers))
    changed = (pairs.clean_ids != pairs.corrupt_ids).sum(1)                  # (pair): tokens of a subject
    longest = int(changed.max())
    subjects = len(set(pairs.entity_ids.flatten().tolist()))
    lengths = {str(k): int((changed == k).sum()) for k in range(1, longest + 1)}
    return dict(table=table, vocabulary=who, pairs=len(pairs), subjects=subjects, with_long_answers=len(
        pairs_of(table, tokenizers, long_answers=True)), subject_tokens=lengths, cpu_seconds=round(seconds, 1))


def main():
    from transformers import AutoTokenizer
    from fetch import fetched
    tokenizers = {name: [AutoTokenizer.from_pretrained(fetched(name))] for name in VOCABULARIES}
    tokenizers["both"] = tokenizers["qwen3"] + tokenizers["llama3"]
    rows = [counted(table, who, some) for table in TABLES for who, some in tokenizers.items()]
    show("Pairs of public facts", [{k: v for k, v in row.items() if k != "subject_tokens"} for row in rows])
    (HERE/"facts.json").write_text(json.dumps(dict(rows=rows), indent=1) + "\n")


if __name__ == "__main__": main()
