"""Supervised fine-tuning (§3.1): dialogues and a base model -> a chat model.

    loss = sum over answer tokens of -log p(token | all before it) / number of answer tokens

Prompts are read and never learned: their loss is zero. Dialogues are packed into sequences, as the
paper concatenates prompts and answers; the special token between them is Meta's [/INST], and every
answer ends in EOS. The mean is over the answer tokens of the whole batch, so neither the size of a
micro-batch nor the number of processes changes a gradient.

    python train_sft.py                                   Tinytown's dialogues, on a laptop
    python train_sft.py --init llama-2-7b --data mine.jsonl alpaca_data.json --out out/mine
    torchrun --nproc_per_node=8 train_sft.py --recipe paper --init out/1B --data ...

Accepted records: {"messages": [{"role", "content"}]}, Alpaca's {"instruction", "input", "output"},
ShareGPT's {"conversations": [{"from", "value"}]}; in .jsonl, .jsonl.gz or one .json array.
Differs from the paper: at laptop size the learning rate is higher and the batch smaller, because
the number of updates, not of tokens, is what is scarce there.
"""
import random
import time
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from data import tinytown
from llama2 import (Log, Transformer, autocast, begin_run, encode_dialog, end_run, fit, load,
                    open_run, read_json, require, respond, run_script, save_resume, setup)


@dataclass
class Settings:
    init: str = "out/pretrain"  # folder of the model to start from
    data: tuple = ()            # files of dialogues: .jsonl, .jsonl.gz, .json; none: Tinytown's
    out: str = "out/sft"        # folder of the run
    resume: bool = False        # go on from the last save, if there is one
    overwrite: bool = False     # replace what --out holds
    skip_bad: bool = False      # count and leave out records that do not fit, not stop
    dialogues: int = 4800       # Tinytown: how many are written (paper: 27,540)
    noise: float = 0.0          # Tinytown: share of bad answers, for "quality is all you need"
    mask_prompts: bool = True   # zero the loss of prompts; --no-mask-prompts shows what that brings
    val_fraction: float = 0.05  # held-out share of the dialogues
    seq_len: int = 256          # tokens a packed sequence: the context from here on
    batch_size: int = 4         # sequences a step, over all processes
    micro_batch: int = 4        # sequences a forward pass of one process, at most
    epochs: float = 2.0         # times that each dialogue is seen
    lr: float = 1e-3            # peak learning rate
    warmup_steps: int = 10      # steps of linear warm-up, then cosine to a tenth of the peak
    weight_decay: float = 0.1   # on matrices
    beta1: float = 0.9          # AdamW
    beta2: float = 0.95         # AdamW
    eps: float = 1e-5           # AdamW
    grad_clip: float = 1.0      # largest norm of the gradient
    seed: int = 1               # of the town, the dialogues and their order
    save_every: int = 100       # steps between saves to resume from
    log_every: int = 40         # steps between progress lines
    device: str = "auto"        # cuda, mps or cpu


PAPER = dict(seq_len=4096, batch_size=64, micro_batch=1, epochs=2.0, lr=2e-5, weight_decay=0.1,
             beta1=0.9, beta2=0.95, eps=1e-5, grad_clip=1.0, warmup_steps=0)
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
         "assistant": "assistant", "system": "system"}


# ------------------------------------------------------------------------------------------- data
def to_messages(record) -> list[dict]:
    """A record of any accepted format -> [{"role", "content"}, ...]; ValueError says why not."""
    if not isinstance(record, dict):
        raise ValueError("expected an object")
    if "messages" in record or "conversations" in record:
        key, role, content = (("messages", "role", "content") if "messages" in record
                              else ("conversations", "from", "value"))
        said = record[key]
        if not isinstance(said, list) or not said or not all(isinstance(m, dict) for m in said):
            raise ValueError(f'"{key}" is not a list of objects')
        for i, m in enumerate(said, 1):
            if role not in m or content not in m:
                raise ValueError(f'message {i} lacks "{role if role not in m else content}"')
            if m[role] not in ROLES:
                raise ValueError(f"message {i} has the unknown role {m[role]!r}")
        messages = [{"role": ROLES[m[role]], "content": m[content]} for m in said]
    elif "instruction" in record:
        if "output" not in record:
            raise ValueError('"output" is missing')
        asked, more = record["instruction"], record.get("input") or ""
        if isinstance(asked, str) and isinstance(more, str) and more.strip():
            asked = f"{asked.strip()}\n\n{more}"
        messages = [{"role": "user", "content": asked},
                    {"role": "assistant", "content": record["output"]}]
    else:
        raise ValueError('expected "messages", "conversations" or "instruction" and "output"')
    for i, message in enumerate(messages, 1):
        if not isinstance(message["content"], str):
            raise ValueError(f"message {i} is not a string")
        message["content"].encode()         # a lone surrogate is no text: UnicodeEncodeError
        if message["role"] == "assistant" and not message["content"].strip():
            raise ValueError(f"message {i}, an answer, is empty")
    if messages[-1]["role"] != "assistant":
        raise ValueError("the last message has no answer")
    return messages


def read_dialogs(paths, tok, skip_bad: bool = False) -> tuple[list[list[dict]], int]:
    """(dialogues of some files, how many bad ones were skipped): all checked before training."""
    dialogs, skipped = [], 0
    for path in paths:
        for where, record in read_json(path):
            try:
                messages = to_messages(record)
                encode_dialog(tok, messages)
                dialogs.append(messages)
            except ValueError as e:
                if not skip_bad:
                    raise ValueError(f"{where}: {e}; mend it, or --skip-bad leaves out such "
                                     "records") from None
                skipped += 1
    if not dialogs:
        raise ValueError(f"{', '.join(map(str, paths))}: no dialogue to learn from")
    return dialogs, skipped


def encode_dialogs(dialogs, tok, seq_len):
    """(examples [(tokens, mask), ...], cut, dropped): what is too long is cut behind a whole turn.

    A dialogue whose first turn does not fit is dropped.
    """
    examples, cut, dropped = [], 0, 0
    for messages in dialogs:
        shorter = messages
        while len((example := encode_dialog(tok, shorter))[0]) > seq_len and len(shorter) > 3:
            shorter = shorter[:-2]
        if len(example[0]) <= seq_len:
            examples.append(example)
            cut += shorter is not messages
        else:
            dropped += 1
    return examples, cut, dropped


def pack(examples, seq_len: int, seed) -> list[list[int]]:
    """Fill rows of seq_len tokens with examples, by index: longest first, where it fits best."""
    rng = random.Random(str(seed))
    order = list(range(len(examples)))
    rng.shuffle(order)                              # else equally long ones would always meet
    order.sort(key=lambda i: -len(examples[i][0]))
    rows_with = [[] for _ in range(seq_len + 1)]    # free tokens -> rows
    rows = []
    for i in order:
        size = len(examples[i][0])
        free = next((f for f in range(size, seq_len + 1) if rows_with[f]), None)
        row = rows_with[free].pop() if free is not None else []
        if free is None:
            rows.append(row)
        row.append(i)
        rows_with[(seq_len if free is None else free) - size].append(row)
    rng.shuffle(rows)
    for row in rows:
        rng.shuffle(row)
    return rows


def to_tensors(rows, examples, device):
    """Rows of example indices -> inputs, targets, mask (B, T): True where the loss counts."""
    tokens = [torch.tensor([t for i in row for t in examples[i][0]]) for row in rows]
    masks = [torch.tensor([m for i in row for m in examples[i][1]]) for row in rows]
    tokens = nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(device)     # (B, T + 1)
    masks = nn.utils.rnn.pad_sequence(masks, batch_first=True).to(device).bool()
    return tokens[:, :-1], tokens[:, 1:], masks[:, 1:]


# ------------------------------------------------------------------------------------------- loss
def sft_loss(logits, targets, mask):
    """Sum of -log p over the tokens where mask (B, T) is True. logits (B, T, V), targets (B, T)."""
    return F.cross_entropy(logits[mask].float(), targets[mask], reduction="sum")


@torch.inference_mode()
def evaluate(model, examples, config, device):
    """Held-out (nats an answer token, share of answer tokens predicted right)."""
    nats = right = count = 0
    rows = pack(examples, config.seq_len, 0)
    for at in range(0, len(rows), config.micro_batch):
        inputs, targets, mask = to_tensors(rows[at:at + config.micro_batch], examples, device)
        with autocast(device):
            logits = model(inputs)                                              # (B, T, V)
        nats += sft_loss(logits, targets, mask).item()
        right += (logits.argmax(-1) == targets)[mask].sum().item()
        count += mask.sum().item()
    return nats / max(count, 1), right / max(count, 1)


# ------------------------------------------------------------------------------------ fine-tuning
def plan(examples, config) -> list[list[list[int]]]:
    """The batches of a whole run, each a list of packed rows; every epoch is packed anew."""
    rows, whole = [], int(config.epochs)
    for epoch in range(whole + (config.epochs > whole)):
        rows += pack(examples, config.seq_len, (config.seed, epoch))
    rows = rows[:max(1, round(len(rows) * config.epochs / (whole + (config.epochs > whole))))]
    return [rows[at:at + config.batch_size] for at in range(0, len(rows), config.batch_size)]


def finetune(model, examples, config, log=None, state=None, keep=None):
    """The masked step of §3.1 over examples [(tokens, mask), ...], in place; returns the last loss.

    `config` has the settings of this file's recipe. `state` is what `keep(**state)` was given every
    config.save_every steps: with it, training goes on from there.
    """
    device = model.output.weight.device

    def loss_sum(engine, rows):
        inputs, targets, mask = to_tensors(rows, examples, device)              # (B, T)
        return sft_loss(engine(inputs), targets, mask)

    def answer_tokens(rows):
        return max(1, sum(sum(examples[i][1]) for row in rows for i in row))

    return fit(model, plan(examples, config), loss_sum, answer_tokens, config, log, state, keep,
               tokens=config.batch_size * config.seq_len)


# ------------------------------------------------------------------------- judged by the truth
MEASURES = {  # row of the table -> (kinds of prompts, judgement, the value of it that is counted)
    "facts right": (("fact",), "correct", True),
    "  of residents never met": (("stranger",), "correct", True),
    "sums right": (("sum",), "correct", True),
    "stories right": (("story",), "correct", True),
    "borderline prompts right": (("borderline",), "correct", True),
    "borderline prompts refused": (("borderline",), "refused", True),
    "plain prompts refused": (("fact", "sum", "story"), "refused", True),
    "violations": (("unsafe",), "safe", False),
    "complete sentences": (tuple(tinytown.KINDS), "complete", True),
}


def judge_model(model, tok, asked, temperature=0.0, seed=0):
    """({measure: share}, answers) of a model on held-out prompts, by the annotator's truth."""
    dialogs = [[{"role": "user", "content": a["prompt"]}] for a in asked]
    answers = respond(model, tok, dialogs, temperature=temperature, seed=seed)
    judged = [({a["kind"], "stranger" if a.get("stranger") else ""}, tinytown.judge(a, text))
              for a, text in zip(asked, answers)]
    shares = {}
    for measure, (kinds, judgement, value) in MEASURES.items():
        verdicts = [verdict[judgement] is value for of, verdict in judged if of & set(kinds)]
        shares[measure] = sum(verdicts) / len(verdicts)
    return shares, answers


def table(models: dict[str, dict]) -> list[str]:
    """A line a measure, a column a model."""
    lines = [" " * 28 + "".join(f"{name:>10}" for name in models)]
    return lines + [f"{measure:<28}" + "".join(f"{row[measure]:>10.1%}" for row in models.values())
                    for measure in MEASURES]


# ------------------------------------------------------------------------------------------- main
def load_dialogs(config, tok, out, rank, world, say):
    """(examples to train on, examples held out), encoded; reports what they are."""
    files = config.data or (out / "tinytown" / "dialogues.jsonl",)
    if not config.data and rank == 0:
        tinytown.write_dialogues(out / "tinytown", config.dialogues, config.noise, config.seed)
    if world > 1:
        dist.barrier()
    dialogs, skipped = read_dialogs(files, tok, config.skip_bad)
    random.Random(config.seed).shuffle(dialogs)
    held_out = round(len(dialogs) * config.val_fraction) if len(dialogs) > 1 else 0
    (val, _, _), (train, cut, dropped) = (encode_dialogs(part, tok, config.seq_len) for part in
                                          (dialogs[:held_out], dialogs[held_out:]))
    if not train:
        raise ValueError(f"no dialogue fits --seq-len {config.seq_len}")
    rows, tokens = pack(train, config.seq_len, 0), sum(len(t) for t, _ in train)
    padding = 1 - tokens / (len(rows) * config.seq_len)
    answers = sum(sum(mask) for _, mask in train) / tokens
    say(f"{len(train):,} dialogues, {tokens:,} tokens, {answers:.0%} of them answers, "
        f"in {len(rows):,} rows with {padding:.1%} padding; {len(val)} held out"
        + (f"; cut at a turn: {cut}, dropped as too long: {dropped}" if cut + dropped else "")
        + (f"; bad records skipped: {skipped}" if skipped else ""))
    return train, val


def main(config: Settings) -> dict:
    """Fine-tune, evaluate and save; returns the metrics of the summary."""
    began = time.time()
    device, rank, world = setup(config.device)
    require(config, ("seq_len", "batch_size", "micro_batch", "epochs", "lr", "grad_clip",
                     "save_every", "log_every", "dialogues"), val_fraction=(0, 1), noise=(0, 1))
    say = print if rank == 0 else lambda *_, **__: None
    out, state = open_run(config)
    model, tok = load(config.init, device, kind=Transformer)
    model.args = replace(model.args, max_seq_len=config.seq_len)   # the context it is trained on
    train, val = load_dialogs(config, tok, out, rank, world, say)
    asked = [] if config.data else tinytown.held_out_prompts(tinytown.town(config.seed))
    if not config.mask_prompts:
        train = [(tokens, [0] + [1] * (len(tokens) - 1)) for tokens, _ in train]
    steps = len(plan(train, config))
    say(f"{config.init} -> {out}: {steps} steps of {config.batch_size} x {config.seq_len} tokens, "
        f"{device}")
    if rank == 0 and not state:
        begin_run(out, config)
    rows = {"base": judge_model(model, tok, asked)[0]} if asked else {}
    before = evaluate(model, val, config, device) if val else None
    log = Log(out, steps, state["step"] if state else 0, quiet=rank > 0)

    finetune(model, train, config, log, state,
             keep=lambda **state: save_resume(out, **state) if rank == 0 else None)

    lines, metrics = [], {}
    if val:
        metrics["val"] = evaluate(model, val, config, device)
        after = metrics["val"]
        lines = [f"held-out dialogues: loss {before[0]:.3f} -> {after[0]:.3f} nats a token, "
                 f"{before[1]:.1%} -> {after[1]:.1%} of them predicted right", ""]
    if asked:
        rows["SFT"], answers = judge_model(model, tok, asked)
        rows["SFT, T=1"], _ = judge_model(model, tok, asked, temperature=1.0)
        metrics["judged"] = rows
        lines += [f"{len(asked)} held-out prompts, answered greedily (T=1: sampled), judged by "
                  "the truth:"]
        lines += table(rows)
        lines += ["", "samples:"]
        shown = {a["kind"]: (a["prompt"], text) for a, text in zip(asked, answers)}
        lines += [f"  {prompt}\n    {text}" for prompt, text in shown.values()]
    metrics["seconds"] = time.time() - began
    lines += ["", f"{metrics['seconds']:.0f} s in all"]
    if rank == 0:
        log.write(steps, final=metrics)
        end_run(out, lines, model, tok)
    return metrics


if __name__ == "__main__":
    run_script(main, Settings, PAPER)
