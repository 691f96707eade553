"""A hub on this machine: checkpoints of the true structure with a few thousand weights beside true vocabularies.

Sharded safetensors, heads of 151,936, 152,064 and 128,256 logits, the norms, biases, RoPE scalings and tied heads of
the paper's models, the real Qwen and LLaMA 3 vocabularies as these models ship them, gsm8k, WikiText and ARC as data
sets of a few rows. `serve` answers as a hub does, also for a repository whose licence was not accepted."""
import hashlib, json, random, shutil, threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from urllib.parse import unquote, urlsplit

WIDTH, LAYERS = 32, 4
NO_SOURCE = {"gsm8k": "e" * 40, "arc": "a" * 40}         # commits of what conf/ asks for without naming a revision

THINGS, WEATHER, DEEDS = (words.split() for words in ("river stone tree cloud field wind road hill",
    "old cold dark wet green slow deep still", "rose fell turned stopped grew began ended passed"))
LLAMA_ROPE = dict(rope_theta=500000.0, rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=8192)
FAMILIES = { # what does not shrink
    "qwen3": dict(model_type="qwen3", vocab_size=151936, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        max_position_embeddings=40960, rope_theta=1000000.0, rms_norm_eps=1e-6, attention_bias=False,
        bos_token_id=151643, eos_token_id=151645),
    "llama": dict(model_type="llama", vocab_size=128256, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=131072, rms_norm_eps=1e-5, bos_token_id=128000, eos_token_id=128001),
    "qwen2": dict(model_type="qwen2", vocab_size=151936, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=32768, rope_theta=1000000.0, rms_norm_eps=1e-6, use_sliding_window=False,
        sliding_window=32768, max_window_layers=28, bos_token_id=151643, eos_token_id=151645),
}
MODELS = { # repository: family, what else its config.json says, layers, does its attention solve IOI?
    "Qwen/Qwen3-8B": ("qwen3", dict(tie_word_embeddings=False), LAYERS, True),
    "Qwen/Qwen3-0.6B": ("qwen3", dict(tie_word_embeddings=True), LAYERS - 1, False),
    "meta-llama/Llama-3.1-8B": ("llama", dict(tie_word_embeddings=False,
        rope_parameters=dict(factor=8.0, **LLAMA_ROPE)), LAYERS, True),
    "meta-llama/Llama-3.2-1B": ("llama", dict(tie_word_embeddings=True,
        rope_parameters=dict(factor=32.0, **LLAMA_ROPE)), LAYERS - 1, True),
    "Qwen/Qwen2-7B-Instruct": ("qwen2", dict(tie_word_embeddings=False, vocab_size=152064), LAYERS, False),
    "Qwen/Qwen2-1.5B-Instruct": ("qwen2", dict(tie_word_embeddings=True), LAYERS - 1, False),
}
TOKENIZERS = { # what is in tokenizer_config.json: Qwen has no token for a beginning, LLaMA none for padding
    "qwen": dict(tokenizer_class="Qwen2Tokenizer", bos_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        unk_token=None, model_max_length=131072, add_prefix_space=False, clean_up_tokenization_spaces=False,
        chat_template="{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"),
    "llama": dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>", model_max_length=131072, clean_up_tokenization_spaces=True),
}


def model_of(family: str, said: dict, layers: int, solves: bool):
    """Random weights in bfloat16. Where it solves IOI every layer looks at all words alike and takes away what it sees
    there: a name that was said twice loses more than one that was said once."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    sizes = dict(hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=layers, dtype="bfloat16")
    torch.manual_seed(layers)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**FAMILIES[family], **sizes, **said}))
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(std=0.5)
        if not said["tie_word_embeddings"]: model.lm_head.weight.copy_(model.get_input_embeddings().weight)
        for layer in model.model.layers if solves else ():
            a = layer.self_attn
            size = a.v_proj.weight.shape[0]                               # keys and values of all groups
            each, head = size // model.config.num_key_value_heads, a.head_dim
            a.q_proj.weight.mul_(0.1)
            if family == "qwen3": a.q_norm.weight.fill_(0.1)
            torch.nn.init.eye_(a.v_proj.weight)
            a.o_proj.weight.zero_()
            for h in range(model.config.num_attention_heads):             # two heads of a group share its part
                at = h // 2 * each
                a.o_proj.weight[at:at + each, h * head:(h + 1) * head] = -0.02 * torch.eye(each)
    return model.to(torch.bfloat16)


def commit_of(repository: str, conf: dict) -> str:
    "The revision that the params pin a model to."
    found = {s["revision"] for s in specs(conf) if s.get("hub") == repository}
    if len(found) != 1: raise ValueError(f"conf/ names {repository} at {len(found)} revisions: expected one")
    return found.pop()


def specs(tree) -> list[dict]:
    "Every `{hub: ...}` in params."
    if not isinstance(tree, dict): return []
    own = [tree] if isinstance(tree.get("hub"), str) else []                # of text `hub` is a section
    return own + [s for value in tree.values() for s in specs(value)]


def write_model(name: str, folder: Path, vocabularies: dict[str, Path]):
    "Two or more files of weights with their index, config, tokenizer, and what generation should do."
    family, said, layers, solves = MODELS[name]
    model_of(family, said, layers, solves).save_pretrained(folder, max_shard_size="8MB")
    kind = "llama" if family == "llama" else "qwen"
    shutil.copyfile(vocabularies[kind]/"tokenizer.json", folder/"tokenizer.json")
    (folder/"tokenizer_config.json").write_text(json.dumps(TOKENIZERS[kind]))
    ends = dict(eos_token_id=FAMILIES[family]["eos_token_id"], bos_token_id=FAMILIES[family]["bos_token_id"])
    (folder/"generation_config.json").write_text(json.dumps(dict(do_sample=True, temperature=0.6, top_p=0.9) | ends))


def write_rows(folder: Path, config: str, **parts: list[dict]):
    "A data set of JSON lines, as its card says."
    lines = [f"- config_name: {config}", "  data_files:"]
    for part, rows in parts.items():
        lines += [f"  - split: {part}", f"    path: {config}/{part}.jsonl"]
        (folder/config).mkdir(parents=True, exist_ok=True)
        (folder/config/f"{part}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder/"README.md").write_text("---\nconfigs:\n" + "\n".join(lines) + "\n---\n")


def gsm8k(part: str, n: int) -> list[dict]:
    "Rows of GSM8K, one in ten without an equation."
    from rcid.data.reasoning import word_problems
    rows = []
    for i, p in enumerate(islice(word_problems(part, style="calculator", steps=(2,), operations="+-", largest=20), n)):
        reasoning = "It is as it was." if i % 10 == 9 else p.reasoning
        rows.append(dict(question=p.prompt, answer=f"{reasoning}\n#### {p.value}"))
    return rows


def articles(n: int, seed: int) -> list[dict]:
    "Lines of WikiText: a title between equals signs, and paragraphs, which name no entity of a test."
    draw = random.Random(seed)
    def said(): return f" The {draw.choice(THINGS)} was {draw.choice(WEATHER)} when it {draw.choice(DEEDS)} . \n"
    return [dict(text=line) for i in range(n) for line in (f" = Article {i} = \n", *(said() for _ in range(10)))]


def arc(n: int) -> list[dict]:
    choices = dict(text=["a plant", "a stone", "a river", "a cloud"], label=["A", "B", "C", "D"])
    return [dict(id=f"toy-{i}", question=f"Which of these needs light, {i} hours a day?", choices=choices,
        answerKey="A") for i in range(n)]


def make(folder: Path, conf: dict, vocabularies: dict[str, Path]) -> dict[str, str]:
    "Repositories below `folder/models` and `folder/datasets`; `kind/name` -> commit."
    commits = {}
    for name in MODELS:
        write_model(name, folder/"models"/name, vocabularies)
        commits[f"models/{name}"] = commit_of(name, conf)
    text = conf["lm"]["hub"]
    for name, commit, config, parts in (
        (text["id"], text["revision"], text["name"],
            dict(train=articles(40, 1), validation=articles(40, 3), test=articles(20, 2))),
        ("openai/gsm8k", NO_SOURCE["gsm8k"], "main", dict(train=gsm8k("train", 160), test=gsm8k("test", 20))),
        ("allenai/ai2_arc", NO_SOURCE["arc"], "ARC-Challenge", {s: arc(4) for s in ("train", "validation", "test")}),
    ):
        write_rows(folder/"datasets"/name, config, **parts)
        commits[f"datasets/{name}"] = commit
    return commits


class Answers(BaseHTTPRequestHandler):
    "What a hub answers to those who only read."
    protocol_version = "HTTP/1.1"
    folder, commits, closed, asked = Path(), {}, (), []          # `serve` sets them

    def log_message(self, *args): pass

    def say(self, code: int, body: bytes = b"", **headers: str):
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(body)

    def json(self, thing): self.say(200, json.dumps(thing).encode(), Content_Type="application/json")

    def refuse(self, code: int, kind: str, why: str):
        self.asked.append((code, self.path))
        self.say(code, json.dumps({"error": why}).encode(), X_Error_Code=kind, X_Error_Message=why)

    def repository(self, words: list[str]) -> tuple[str, Path, str] | None:
        "Name, folder and commit of what these words of a path begin with; says so where there is none."
        kind, name = words[0], "/".join(words[1:3])
        if f"{kind}/{name}" in self.commits: return name, self.folder/kind/name, self.commits[f"{kind}/{name}"]
        return self.refuse(404, "RepoNotFound", f"there is no {kind} {name}")

    def is_closed(self, name: str) -> bool:
        if not any(name.startswith(part) for part in self.closed): return False
        self.refuse(401, "GatedRepo", f"Access to model {name} is restricted. You must have access to it and be"
            " authenticated to access it. Please log in.")
        return True

    def do_HEAD(self): self.do_GET()

    def do_GET(self):
        words = [unquote(w) for w in urlsplit(self.path).path.strip("/").split("/")]
        if words[0] == "api": return self.about(words[1:])
        if words[0] != "datasets": words = ["models", *words]
        if "resolve" not in words[:4]: return self.refuse(404, "EntryNotFound", "this hub has no pages")
        if not (found := self.repository(words)): return None
        name, folder, commit = found
        if self.is_closed(name): return None
        if words[4] not in (commit, "main"): return self.refuse(404, "RevisionNotFound", f"no revision {words[4]}")
        file = folder.joinpath(*words[5:])
        if not file.is_file(): return self.refuse(404, "EntryNotFound", f"no {file.name}")
        body = file.read_bytes()
        self.say(200, body, X_Repo_Commit=commit, ETag=f'"{hashlib.sha1(body).hexdigest()}"')

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        words = [unquote(w) for w in urlsplit(self.path).path.strip("/").split("/")]
        if not (found := self.repository(words[1:4])): return None
        said = json.loads(body) if body.startswith(b"{") else {"paths": []}
        return self.json([e for e in entries(found[1], "", True) if e["path"] in said["paths"]])

    def about(self, words: list[str]):
        if not (found := self.repository(words)): return None
        name, folder, commit = found
        if words[3:4] == ["auth-check"]: return None if self.is_closed(name) else self.json({})
        if words[3:4] == ["tree"]:
            recursive = "recursive=true" in urlsplit(self.path).query.lower()
            return self.json(entries(folder, "/".join(words[5:]), recursive))
        if words[3:4] == ["revision"] and words[4] not in (commit, "main"):
            return self.refuse(404, "RevisionNotFound", f"no revision {words[4]}")
        files = [dict(rfilename=e["path"]) for e in entries(folder, "", True) if e["type"] == "file"]
        return self.json(dict(id=name, sha=commit, siblings=files, private=False, gated=False, tags=[], downloads=0))


def entries(folder: Path, below: str, recursive: bool) -> list[dict]:
    "Files and folders, as a hub lists them."
    found = sorted((folder/below).rglob("*") if recursive else (folder/below).glob("*"))
    return [dict(type="file" if f.is_file() else "directory", path=f.relative_to(folder).as_posix(),
        size=f.stat().st_size if f.is_file() else 0, oid=hashlib.sha1(str(f).encode()).hexdigest()) for f in found]


@contextmanager
def serve(folder: Path, commits: dict[str, str], closed: tuple[str, ...] = ()):
    "The address of the hub and a list of what it refused; `closed`: beginnings of names that ask for a licence."
    refusals = []
    handler = type("Hub", (Answers,), dict(folder=folder, commits=commits, closed=closed, asked=refusals))
    hub = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try: yield f"http://127.0.0.1:{hub.server_port}", refusals
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
