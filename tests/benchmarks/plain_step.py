"""A distillation step without rcid: the plain loop, and the same with the parts of the fast one switched on."""
import time
import torch
import torch.nn.functional as F


def trained_parameters(student):
    "The layers and the final norm; embeddings and head are frozen, as in `rcid.distill` by default."
    student.requires_grad_(False)
    chosen = [p for n, p in student.named_parameters() if n.startswith("model.layers.") or n == "model.norm.weight"]
    for p in chosen: p.requires_grad_(True)
    return chosen


def run(
    student,
    teacher,
    clean,
    corrupt,
    answer,
    lrs,
    everywhere=False,
    cached=False,
    joined=False,
    head_at_answer=False,
    fused=False,
):
    """One step for each of `lrs`; the loss and the CPU seconds of each. `cached`: the teacher's last hidden states are
    known before."""
    batches = [torch.cat([clean, corrupt])] if joined else [clean, corrupt]
    answers = [answer.repeat(2)] if joined else [answer, answer]
    at = lambda x, a: x if everywhere else x[torch.arange(len(a)), a]
    hidden = lambda model, ids: model.model(input_ids=ids, use_cache=False).last_hidden_state
    def logits(model, ids, a):
        if head_at_answer and not everywhere: return model.lm_head(at(hidden(model, ids), a))
        return at(model(input_ids=ids, use_cache=False).logits, a)
    parameters = trained_parameters(student)
    optimizer = torch.optim.AdamW(parameters, lr=0., weight_decay=0., foreach=False, fused=fused)
    with torch.no_grad(): kept = [at(hidden(teacher, ids), a) for ids, a in zip(batches, answers)] if cached else None
    losses, seconds = [], []
    for lr in lrs:
        start = time.process_time()
        with torch.no_grad():
            wanted = (
                [teacher.lm_head(h) for h in kept]
                if cached
                else [logits(teacher, ids, a) for ids, a in zip(batches, answers)]
            )
        loss = 0.
        for ids, a, z in zip(batches, answers, wanted):
            log_q, log_p = F.log_softmax(logits(student, ids, a), -1), F.log_softmax(z, -1)
            loss = loss + (log_p.exp() * (log_p - log_q)).sum(-1).mean() / len(batches)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.)
        for group in optimizer.param_groups: group["lr"] = lr
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item()), seconds.append(time.process_time() - start)
    return losses, seconds
