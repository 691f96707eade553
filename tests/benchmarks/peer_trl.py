"""TRL's GKDTrainer on the batch of step.py, off-policy (lmbda 0), forward KL (beta 0), against the plain loop in the
same process. Run by step.py."""

import json, statistics, sys, time
from importlib.metadata import version
import torch, transformers
import plain_step
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer

folder, out = sys.argv[1:]
job, t = json.loads(open(f"{folder}/job.json").read()), load_file(f"{folder}/pairs.safetensors")
load = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
teacher, student, ids, last = (
    load(job["teacher"]).eval(),
    load(job["student"]),
    torch.cat([t["clean"], t["corrupt"]]),
    int(t["answer"].max()),
)
weights = {k: v.clone() for k, v in student.state_dict().items()}


class Clock(TrainerCallback):
    def __init__(self): self.times = []
    def on_step_begin(self, *_, **__): self.start = time.process_time()
    def on_step_end(self, *_, **__): self.times.append(time.process_time() - self.start)


def gkd(everywhere):
    "CPU seconds of the steps. TRL looks at tokens with a label; for the answer, at the last of them."
    labels = ids if everywhere else torch.where(torch.arange(ids.shape[1]) == last, ids, -100)
    collate = lambda rows: dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=labels,
        prompts=ids[:, :1],
        prompt_attention_mask=torch.ones_like(ids[:, :1]),
    )
    plain_step.trained_parameters(student)
    clock = Clock()
    config = GKDConfig(
        output_dir=f"{folder}/trl",
        lmbda=0.0,
        beta=0.0,
        temperature=1.0,
        per_device_train_batch_size=len(ids),
        max_steps=len(job["lrs"]),
        learning_rate=job["lrs"][0],
        weight_decay=0.0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        data_collator=collate,
        train_dataset=Dataset.from_dict({"messages": [[{"role": "user", "content": "x"}]] * 4 * len(ids)}),
        processing_class=AutoTokenizer.from_pretrained(job["teacher"]),
        callbacks=[clock],
    )
    trainer.train()
    return clock.times


rows = []
for kl_at in ("answer", "all tokens"):
    ratios, seconds = [], []
    for _ in range(job["rounds"]):
        student.load_state_dict(weights)
        unit = statistics.median(
            plain_step.run(student, teacher, t["clean"], t["corrupt"], t["answer"], job["lrs"], kl_at != "answer")[1][
                1:
            ]
        )
        student.load_state_dict(weights)
        seconds.append(statistics.median(gkd(kl_at != "answer")[1:]))
        ratios.append(seconds[-1] / unit)
    rows.append(
        dict(
            kl_at=kl_at,
            step=f"trl {version('trl')} GKDTrainer",
            cost=statistics.median(ratios),
            seconds=statistics.median(seconds),
            transformers=transformers.__version__,
        )
    )
json.dump(rows, open(out, "w"))
