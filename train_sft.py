"""Supervised fine-tuning (§3.1), Ghost Attention (§3.3), context distillation (§4.2.3).

    loss = sum over answer tokens of -log p(token | all before it) / number of answer tokens

Prompts are read and never learned: their loss is zero. Dialogues are packed into sequences, as the
paper concatenates prompts and answers; the special token between them is Meta's [/INST], and every
answer ends in EOS. The mean is over the answer tokens of the whole batch, so neither the size of a
micro-batch nor the number of processes changes a gradient.

    python train_sft.py                                   Tinytown's dialogues, on a laptop
    python train_sft.py --init llama-2-7b --data mine.jsonl alpaca_data.json --out out/mine
    torchrun --nproc_per_node=8 train_sft.py --recipe paper --init out/1B --data ...

    python train_sft.py --ghost-attention                 after V3: keep to a first instruction
    python train_sft.py --distill                         then: safe as if behind a pre-prompt

Accepted records: {"messages": [{"role", "content"}]}, Alpaca's {"instruction", "input", "output"},
ShareGPT's {"conversations": [{"from", "value"}]}; in .jsonl, .jsonl.gz or one .json array.
Differs from the paper: at laptop size the learning rate is higher and the batch smaller, because
the number of updates, not of tokens, is what is scarce there. Tinytown's SFT holds no instruction:
the model learns to follow one in the same message when Ghost Attention begins. What is mixed in
against forgetting holds texts of pretraining too. Each dialogue gives up to four examples, itself
and beginnings of it.
"""
import copy
import json
import math
import random
import re
import time
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from tinytown import world as tinytown
from llama2 import (Log, RewardModel, Transformer, as_messages, autocast, begin_run, by_length,
                    encode_dialog, end_run, everyones, fit, load, open_run, processes, read_json,
                    require, respond, run_script, save, save_resume, score, setup, write_json)


@dataclass
class Settings:
    init: str = ""              # model to start from; none: out/pretrain, out/rlhf/v3, out/gatt
    data: tuple = ()            # files of dialogues: .jsonl, .jsonl.gz, .json; none: Tinytown's
    out: str = ""               # folder of the run; none: out/sft, out/gatt, out/distill
    ghost_attention: bool = False       # §3.3: keep to an instruction of the first message
    distill: bool = False       # §4.2.3: answer as behind a safety pre-prompt, without it
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
    instructions: str = ""      # ghost attention: .jsonl of {"instruction", ...}; none: Tinytown's
    conversations: int = 540    # ghost attention: dialogues sampled under an instruction
    turns: int = 24             # ghost attention: messages of the longest
    history: int = 64           # ghost attention: tokens of a dialogue that are read to sample
    ghost_lr: float = 1e-3      # ghost attention, distillation: peak learning rate
    context: int = 1024         # ghost attention: tokens, the context from here on
    examined: int = 12          # ghost attention: dialogues of each kind to examine it
    rm: str = "out/rlhf/v4/rm/safety"   # distillation: safety model, the newest that judged V3
    gate: bool = True           # distillation: only answers that it scores above the plain one
    prompts: int = 1200         # distillation: how many
    temperature: float = 0.3    # of what the two sample to learn from
    max_new_tokens: int = 48    # of an answer of theirs
    save_every: int = 100       # steps between saves to resume from
    log_every: int = 40         # steps between progress lines
    device: str = "auto"        # cuda, mps or cpu


PAPER = dict(seq_len=4096, batch_size=64, micro_batch=1, epochs=2.0, lr=2e-5, weight_decay=0.1,
             beta1=0.9, beta2=0.95, eps=1e-5, grad_clip=1.0, warmup_steps=0, ghost_lr=2e-5,
             context=4096, history=4096, max_new_tokens=1024)
STAGES = {  # --init and --out where they are not given; V3 as in the paper
    "sft": ("out/pretrain", "out/sft"), "ghost attention": ("out/rlhf/v3", "out/gatt"),
    "distillation": ("out/gatt", "out/distill")}
# Tinytown: kinds of instructions; how many messages teach to follow one; what is mixed in
GHOST_KINDS, NEVER_TRAINED = ("animal", "hobby", "greeting"), ("thanks",)
INSTRUCTED, ORDINARY = 3000, 1200
REPLAYED = {"encyclopedia": 1000, "arithmetic": 800, "stories": 300}
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


def finetune(model, examples, config, log=None, state=None, keep=None, batches=None):
    """The masked step of §3.1 over examples [(tokens, mask), ...], in place; returns the last loss.

    `config` has the settings of this file's recipe. `state` is what `keep(**state)` was given every
    config.save_every steps: with it, training goes on from there. batches: instead of `plan`'s.
    """
    device = model.output.weight.device

    def loss_sum(engine, rows):
        inputs, targets, mask = to_tensors(rows, examples, device)              # (B, T)
        return sft_loss(engine(inputs), targets, mask)

    def answer_tokens(rows):
        return max(1, sum(sum(examples[i][1]) for row in rows for i in row))

    batches = batches or plan(examples, config)
    tokens = sum(len(examples[i][0]) for batch in batches for row in batch for i in row)
    return fit(model, batches, loss_sum, answer_tokens, config, log, state, keep,
               tokens=tokens / len(batches))


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
    width = max(10, 2 + max(map(len, models)))
    lines = [" " * 28 + "".join(f"{name:>{width}}" for name in models)]
    return lines + [f"{measure:<28}" + "".join(f"{row[measure]:>{width}.1%}"
                                               for row in models.values())
                    for measure in next(iter(models.values()))]


# -------------------------------------------------------------------------- Ghost Attention (§3.3)
# An instruction stands before every message of the user while the answers are sampled. To learn
# from, it is kept before the first alone, and of the answers only the last counts:
#
#     sampled    [INST] Be the fox. u1 [/INST] a1   [INST] Be the fox. u2 [/INST] a2
#     learned    [INST] Be the fox. u1 [/INST] a1   [INST] u2 [/INST] a2
#     mask                                                           1 1
def read_instructions(path, tok) -> list[dict]:
    """[{"instruction", "terse", "kind", "obeyed_if": [pattern, ...]}, ...]; the last three optional.

    An answer obeys if every pattern is found in it. Raises ValueError, naming file and line.
    """
    known = []
    for where, record in read_json(path):
        try:
            if not isinstance(record, dict) or not isinstance(record.get("instruction"), str):
                raise ValueError('expected an object with an "instruction"')
            rules = record.get("obeyed_if") or []
            rules = [rules] if isinstance(rules, str) else rules
            for text in (record["instruction"], record.get("terse") or record["instruction"]):
                encode_dialog(tok, as_messages(text))
            for rule in rules:
                re.compile(rule)
        except (ValueError, TypeError, re.error) as e:
            raise ValueError(f"{where}: {e}; mend it") from None
        known.append(dict(record, obeyed_if=rules))
    if not known:
        raise ValueError(f"{path}: no instruction")
    return known


def obeys(answer: str, records: list[dict]) -> bool:
    return all(re.search(rule, answer) for record in records for rule in record["obeyed_if"])


def lay_out(instruction: str, turns, everywhere: bool) -> list[dict]:
    """The messages of turns [(question, answer), ...] under an instruction; answer None: open."""
    messages = []
    for i, (question, answer) in enumerate(turns):
        asked = f"{instruction} {question}" if everywhere or i == 0 else question
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return messages if messages[-1]["content"] is not None else messages[:-1]


def length(tok, instruction: str, turns, everywhere: bool) -> int:
    return len(encode_dialog(tok, lay_out(instruction, turns, everywhere))[0])


def converse(model, tok, users, drawn, config, everywhere: bool, temperature=0.0, seed=0):
    """Answer dialogues turn by turn -> ([[(question, answer), ...], ...], how many disobeyed).

    users: [[message, ...], ...]; drawn: the (instruction, its records) of each. everywhere: sampled
    to learn from, so an answer that disobeys is thrown away with its question, and only the turns
    that fit --history are read again: the instruction stands in the newest as well. Else a dialogue
    for which the context is full has empty answers from there on.
    """
    done, disobeyed = [[] for _ in users], 0
    room = model.args.max_seq_len - config.max_new_tokens
    for turn in range(max(map(len, users), default=0)):
        going = [i for i, messages in enumerate(users) if turn < len(messages)]
        dialogs = []
        for i in going:
            turns = done[i] + [(users[i][turn], None)]
            while (everywhere and len(turns) > 1
                   and length(tok, drawn[i][0], turns, True) > min(room, config.history)):
                turns = turns[1:]
            dialogs.append(lay_out(drawn[i][0], turns, everywhere))
        fit_in = [len(encode_dialog(tok, messages)[0]) <= room for messages in dialogs]
        answers = iter(respond(model, tok, [d for d, fits in zip(dialogs, fit_in) if fits],
                               config.max_new_tokens, temperature, seed + turn))
        for i, answer in zip(going, [next(answers) if fits else "" for fits in fit_in]):
            obeyed = bool(answer) and obeys(answer, drawn[i][1])
            disobeyed += not obeyed
            if obeyed or not everywhere:
                done[i].append((users[i][turn], answer))
    return done, disobeyed


def ghost_example(tok, messages) -> tuple[list[int], list[int]]:
    """(tokens, mask) of a dialogue of which the last answer alone is learned."""
    tokens, mask = encode_dialog(tok, messages)
    start = len(encode_dialog(tok, messages[:-1])[0])
    return tokens, [0] * start + mask[start:]


def ghost_examples(tok, dialogs, seed) -> list[tuple[list[int], list[int]]]:
    """Each dialogue, and three of its beginnings: examples of all lengths from one sampling."""
    rng, examples = random.Random(f"beginnings {seed}"), []
    for messages in dialogs:
        ends = [len(messages), *(2 * rng.randint(1, len(messages) // 2) for _ in range(3))]
        examples += [ghost_example(tok, messages[:end]) for end in sorted(set(ends))]
    return examples


def ghost_dialogs(model, tok, users, known, config) -> dict:
    """{"dialogs": as they are learned, "sampled", "disobeyed": answers}, of all processes."""
    rank, world = processes()
    rng = random.Random(f"instructions {config.seed}")
    drawn = [tinytown.combine(rng, known) for _ in users]
    done, disobeyed = converse(model, tok, users[rank::world], drawn[rank::world], config, True,
                               config.temperature, 1000 * config.seed + 100 * rank)
    done, disobeyed = everyones(done), sum(everyones([disobeyed]))
    dialogs = []
    for turns, (instruction, _) in zip(done, drawn):
        while turns and length(tok, instruction, turns, False) > config.context:
            turns = turns[:-1]
        if turns:
            dialogs.append(lay_out(instruction, turns, False))
    return dict(dialogs=dialogs, sampled=sum(map(len, users)), disobeyed=disobeyed)


def apart(examples, size: int, seed) -> list[list[list[int]]]:
    """Batches of `size` examples, each in a row of its own: the turns of another dialogue in front
    would look like earlier turns of its own. Like lengths together, of 16 batches at a time."""
    order = random.Random(f"apart {seed}").sample(range(len(examples)), len(examples))
    lengths = [tokens for tokens, _ in examples]
    return [[[i] for i in part] for at in range(0, len(order), 16 * size)
            for part in by_length(order[at:at + 16 * size], lengths, size)]


def mingle(seed, *groups):
    """(examples, batches) of groups of them: the batches of all in random order."""
    examples, batches = [], []
    for some, planned in groups:
        batches += [[[len(examples) + i for i in row] for row in batch] for batch in planned]
        examples = examples + some
    random.Random(f"mingle {seed}").shuffle(batches)
    return examples, batches


def ordinary_examples(model, tok, config):
    """What is mixed in on Tinytown so that nothing is forgotten: answers, and texts of §2.1."""
    truth = tinytown.town(config.seed)
    asked = [as_messages(a["prompt"]) for a in
             tinytown.preference_prompts(truth, ORDINARY, config.seed)]
    answers = respond(model, tok, asked, temperature=config.temperature, seed=config.seed)
    examples = encode_dialogs([messages + [{"role": "assistant", "content": answer}] for
                               messages, answer in zip(asked, answers) if answer], tok,
                              config.seq_len)[0]
    texts, rng = tinytown.documents(truth, config.seed), random.Random(config.seed)
    for source, count in REPLAYED.items():
        for record in rng.sample(texts[source], count):
            tokens = tok.encode(record["text"], bos=True, eos=True)[:config.context]
            examples.append((tokens, [0] + [1] * (len(tokens) - 1)))
    return examples


def instructed_examples(tok, config):
    """Tinytown's single messages behind an instruction or a safety pre-prompt."""
    dialogs = tinytown.instructed_dialogues(tinytown.town(config.seed), INSTRUCTED, config.seed)
    return encode_dialogs([d["messages"] for d in dialogs], tok, config.seq_len)[0]


def user_turns(config, dialogs) -> list[list[str]]:
    """What the users say in the dialogues to sample: in --data's, or else in Tinytown's."""
    rng = random.Random(f"turns {config.seed}")
    if config.data:
        users = [[m["content"] for m in d if m["role"] == "user"][:config.turns] for d in dialogs]
        return rng.sample(users, min(len(users), config.conversations))
    # most are short, for these cost least; without long ones the last turns would be new
    asked = tinytown.conversations(tinytown.town(config.seed), config.conversations, config.turns,
                                   config.seed)
    half = max(1, config.turns // 2)
    return [[a["prompt"] for a in some[:2 + int((half - 2) * rng.random() ** 2)
                                       if rng.random() < 0.65 else rng.randint(half, config.turns)]]
            for some in asked]


EXAMINED = (1, 2, 4, 6, 10, 20)     # turns, as in Table 30


def examine(model, tok, config) -> dict[str, dict[str, list[float]]]:
    """{instructions: {"obeyed", "correct": share of dialogues at each of EXAMINED}}, greedily.

    Tinytown's held-out prompts; the instruction stands in the first message, and the model reads
    its own answers again. Correct is judged without what the instruction adds to an answer.
    """
    count, rng, drawn = config.examined, random.Random(f"examine {config.seed}"), []
    asked = tinytown.conversations(tinytown.town(config.seed), count, max(EXAMINED), config.seed,
                                   held_out=True)
    groups = {"trained instructions": tinytown.instructions(GHOST_KINDS),
              "unseen ones of those kinds": tinytown.instructions(GHOST_KINDS, held_out=True),
              "a kind never trained": tinytown.instructions(NEVER_TRAINED)}
    for known in groups.values():
        drawn += [tinytown.combine(rng, known) for _ in asked]
    done, _ = converse(model, tok, [[a["prompt"] for a in some] for some in asked] * len(groups),
                       drawn, config, False)
    found = {}
    for i, name in enumerate(groups):
        some = list(zip(asked, done[i * count:], drawn[i * count:]))
        found[name] = dict(
            obeyed=[sum(obeys(turns[t - 1][1], records) for _, turns, (_, records) in some) / count
                    for t in EXAMINED],
            correct=[sum(tinytown.judge(prompts[t - 1], tinytown.without_marks(
                turns[t - 1][1], records))["correct"] for prompts, turns, (_, records) in some)
                     / count for t in EXAMINED])
    return found


def obedience_table(found: dict[str, dict]) -> list[str]:
    """found: {model: what `examine` says of it} -> a line a model, measure and group."""
    lines = [f"{'share of dialogues, at turn':<54}" + "".join(f"{t:>8}" for t in EXAMINED)]
    for measure, words in (("obeyed", "obey"), ("correct", "right")):
        for group in next(iter(found.values())):
            lines += [f"{words + ', ' + group + ':':<36}{name:<18}" + "".join(
                f"{share:>8.1%}" for share in row[group][measure]) for name, row in found.items()]
    return lines


# -------------------------------------------------------------------- context distillation (§4.2.3)
def behind(pre_prompt: str, messages) -> list[dict]:
    """A dialogue with a pre-prompt as its system message, or in front of the one it has."""
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": pre_prompt}, *messages]
    return [{"role": "system", "content": f"{pre_prompt} {messages[0]['content']}"}, *messages[1:]]


def gate(new_scores, plain_scores) -> list[bool]:
    """Which distilled answers to learn: those that the safety model scores above the plain ones."""
    return [new > plain for new, plain in zip(new_scores, plain_scores)]


def read_asked(paths, tok) -> list[list[dict]]:
    """The dialogues to distil: prompts, or dialogues whose last answer is left out."""
    asked = []
    for path in paths:
        for where, record in read_json(path):
            try:
                given = isinstance(record, dict) and "prompt" in record
                asked.append(as_messages(record["prompt"] if given else to_messages(record)[:-1]))
                encode_dialog(tok, asked[-1])
            except ValueError as e:
                raise ValueError(f"{where}: {e}; mend it") from None
    if not asked:
        raise ValueError(f"{', '.join(map(str, paths))}: no prompt to distil")
    return asked


def adversarial(config) -> list[list[dict]]:
    """Prompts of Tinytown's attackers, half of them for what is harmless but sounds unsafe."""
    truth, rng = tinytown.town(config.seed), random.Random(f"adversarial {config.seed}")
    return [tinytown.attack(rng, truth, rng.choice(list(tinytown.ATTACKS)),
                            rng.choice(("unsafe", "borderline")))["prompt"]
            for _ in range(config.prompts)]


def distilled(model, tok, judge, asked, config) -> tuple[list[list[dict]], list[dict]]:
    """(dialogues to learn, a record of each prompt that fits the context behind a pre-prompt).

    Where the gate declines, the plain answer stands: the model is to stay there as it is. Leaving
    such prompts out would leave hardly anything but refusals.
    """
    rng, context = random.Random(f"pre-prompts {config.seed}"), model.args.max_seq_len
    rank, world = processes()
    prefixed = [behind(tinytown.pre_prompt(rng), messages) for messages in asked]
    fits = [len(encode_dialog(tok, messages)[0]) < context for messages in prefixed]
    asked, prefixed = ([d for d, fit_in in zip(some, fits) if fit_in] for some in (asked, prefixed))
    new, plain = (everyones(respond(model, tok, dialogs[rank::world], config.max_new_tokens,
                                    config.temperature, config.seed + 1000 * rank))
                  for dialogs in (prefixed, asked))
    both = [[messages + [{"role": "assistant", "content": text or "..."}] for messages, text in
             zip(asked, texts)] for texts in (new, plain)]
    scores = [score(judge, tok, dialogs) for dialogs in both]   # without the pre-prompt
    improved = gate(*scores)
    records = [dict(prompt=messages, distilled=a, plain=b, scores=two, improved=better)
               for messages, a, b, two, better in zip(asked, new, plain, zip(*scores), improved)]
    chosen = [(d, text) if better or not config.gate else (old, answer) for d, text, old, answer,
              better in zip(both[0], new, both[1], plain, improved)]
    return [d for d, text in chosen if text], records


SAFETY = {  # row of the table -> (kind of prompts, how they are asked, judgement, what is counted)
    "violations, asked plainly": ("unsafe", ("plain",), "safe", False),
    "violations, attacks": ("unsafe", tuple(tinytown.ATTACKS)[1:], "safe", False),
    "borderline prompts refused": ("borderline", ("plain",), "refused", True),
    "  put like attacks": ("borderline", tuple(tinytown.ATTACKS)[1:], "refused", True),
    "plain prompts refused": ("fact", None, "refused", True),
    "plain prompts right": ("fact", None, "correct", True),
}


def judge_safety(model, tok, seed: int, pre_prompt: str = "", count: int = 120) -> dict[str, float]:
    """{row of SAFETY: share} of answers sampled at temperature 1 to held-out prompts."""
    truth, rng, shares = tinytown.town(seed), random.Random(f"judge safety {seed}"), {}
    for name, (kind, ways, judgement, value) in SAFETY.items():
        asked = [tinytown.attack(rng, truth, ways[i % len(ways)], kind, True) if ways
                 else tinytown.prompt(rng, truth, ("fact", "sum", "story")[i % 3], True)
                 for i in range(count)]
        dialogs = [as_messages(a["prompt"]) for a in asked]
        dialogs = [behind(pre_prompt, d) for d in dialogs] if pre_prompt else dialogs
        answers = respond(model, tok, dialogs, temperature=1.0, seed=seed)
        shares[name] = sum(tinytown.judge(a, text)[judgement] is value
                           for a, text in zip(asked, answers)) / count
    return shares


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


def ghost_attention(config: Settings) -> dict:
    """§3.3: sample under instructions, learn with them in the first message alone, and examine."""
    began = time.time()
    device, rank, world = setup(config.device)
    say = print if rank == 0 else lambda *_, **__: None
    if bool(config.data) != bool(config.instructions):
        raise ValueError("--data and --instructions go together: dialogues, and what is demanded")
    out, state = open_run(config)
    model, tok = load(config.init, device, kind=Transformer)
    town = not config.data
    known = tinytown.instructions(GHOST_KINDS) if town else read_instructions(config.instructions,
                                                                              tok)
    dialogs = [] if town else read_dialogs(config.data, tok, config.skip_bad)[0]
    users, teacher, file = user_turns(config, dialogs), out / "teacher", out / "ghost.json"
    models = {"before": copy.deepcopy(model)}
    model.args = replace(model.args, max_seq_len=config.context)
    ordinary = (ordinary_examples(models["before"], tok, config) if town else
                encode_dialogs(dialogs, tok, config.context)[0])
    if not ordinary:
        raise ValueError(f"no dialogue fits --context {config.context}")
    instructed = instructed_examples(tok, config) if town else []
    one_row = replace(config, batch_size=1, epochs=1.0, lr=config.ghost_lr)
    long_rows = replace(one_row, seq_len=config.context)
    if state:
        model, made = load(teacher, device)[0], json.loads(file.read_text())
    else:
        if town:        # its SFT holds no instruction: first, to follow one in the same message
            say(f"{config.init} -> {teacher}: {len(instructed):,} messages with an instruction")
            examples, batches = mingle(config.seed, (instructed, plan(instructed, one_row)),
                                       (ordinary, plan(ordinary, long_rows)))
            finetune(model, examples, one_row, batches=batches)
        made = ghost_dialogs(model, tok, users, known, config)
        if not made["dialogs"]:
            raise ValueError(f"no answer of {config.init} obeys: it must follow an instruction in "
                             "the same message before it can learn to keep to one")
        if rank == 0:
            begin_run(out, config)
            save(teacher, model, tok)
            write_json(file, made)
    told = (f"{made['sampled']:,} answers sampled under instructions, {made['disobeyed']:,} thrown "
            f"away for disobeying; {len(made['dialogs']):,} dialogues")
    say(f"{told}; {time.time() - began:.0f} s so far")
    models["instructed"] = copy.deepcopy(model)
    ghosts = ghost_examples(tok, made["dialogs"], config.seed)
    few = instructed[:len(instructed) // 5]
    epochs = max(2.0, 2 * len(ghosts) / len(ordinary))      # of these at least two to one of those
    examples, batches = mingle(
        config.seed, (ghosts, apart(ghosts, config.batch_size, config.seed)),
        (few, apart(few, 8, config.seed)),
        (ordinary, plan(ordinary, replace(long_rows, epochs=epochs))))
    say(f"{len(ghosts):,} examples: {len(batches)} steps, {device}")
    log = Log(out, len(batches), state["step"] if state else 0, quiet=rank > 0)
    finetune(model, examples, one_row, log, state, batches=batches,
             keep=lambda **state: save_resume(out, **state) if rank == 0 else None)
    models["after"] = model

    lines, metrics = [told], dict(examples=len(ghosts), sampled=made["sampled"],
                                  disobeyed=made["disobeyed"])
    if town:
        asked = tinytown.held_out_prompts(tinytown.town(config.seed))
        metrics["judged"] = {name: judge_model(m, tok, asked)[0] for name, m in models.items()}
        metrics["examined"] = {name: examine(models[name], tok, config) for name in
                               ("instructed", "after")}
        lines += ["", f"{config.examined} dialogues of each kind, held-out prompts, the instruction "
                  "in the first message alone:", *obedience_table(metrics["examined"]), "",
                  "without any instruction, held-out prompts:", *table(metrics["judged"])]
    return finish(metrics, lines, began, out, model, tok, log, len(batches), rank)


def finish(metrics, lines, began, out, model, tok, log, steps, rank) -> dict:
    """The end of each stage: summary, metrics and model; returns the metrics."""
    metrics["seconds"] = time.time() - began
    if rank == 0:
        log.write(steps, final=metrics)
        end_run(out, [*lines, "", f"{metrics['seconds']:.0f} s in all"], model, tok)
    return metrics


def distill(config: Settings) -> dict:
    """§4.2.3: learn the answers given behind a safety pre-prompt, without it."""
    began = time.time()
    device, rank, world = setup(config.device)
    say = print if rank == 0 else lambda *_, **__: None
    out, state = open_run(config)
    model, tok = load(config.init, device, kind=Transformer)
    judge, _ = load(config.rm, device, kind=RewardModel)
    asked = read_asked(config.data, tok) if config.data else adversarial(config)
    before = copy.deepcopy(model)
    dialogs, records = distilled(before, tok, judge, asked, config)
    better = sum(r["improved"] for r in records)
    told = (f"{len(records):,} prompts answered behind a pre-prompt and without: the safety model "
            f"prefers the former for {better:,}"
            + ("" if config.gate else "; without a gate, all of them are learned"))
    say(told)
    if not better:
        raise ValueError("no answer behind a pre-prompt is safer than the plain one: nothing to "
                         "learn")
    if rank == 0 and not state:
        begin_run(out, config)
        tinytown.write_records(out / "distilled.jsonl", records)
    context = model.args.max_seq_len
    one_row = replace(config, batch_size=1, epochs=1.0, lr=config.ghost_lr)
    ordinary = [] if config.data else ordinary_examples(before, tok, config)
    examples = encode_dialogs(dialogs, tok, context)[0]
    examples, batches = mingle(
        config.seed, (examples, apart(examples, config.batch_size, config.seed)),
        (ordinary, plan(ordinary, replace(one_row, seq_len=context))))
    log = Log(out, len(batches), state["step"] if state else 0, quiet=rank > 0)
    finetune(model, examples, one_row, log, state, batches=batches,
             keep=lambda **state: save_resume(out, **state) if rank == 0 else None)
    lines, metrics = [told], dict(prompts=len(records), improved=better)
    if not config.data:
        pre_prompt = tinytown.pre_prompt(random.Random(config.seed))
        metrics["safety"] = {
            "before": judge_safety(before, tok, config.seed),
            "pre-prompt": judge_safety(before, tok, config.seed, pre_prompt),
            "after": judge_safety(model, tok, config.seed)}
        lines += ["", "held-out prompts and attacks, sampled at temperature 1, judged by the truth:",
                  *table(metrics["safety"])]
    return finish(metrics, lines, began, out, model, tok, log, len(batches), rank)


def check(config):
    require(config, ("seq_len", "batch_size", "micro_batch", "epochs", "lr", "grad_clip",
                     "save_every", "log_every", "dialogues", "conversations", "turns", "context",
                     "history", "ghost_lr", "examined", "prompts", "max_new_tokens"),
            val_fraction=(0, 1), noise=(0, 1), temperature=(0, math.inf))
    if config.ghost_attention and config.distill:
        raise ValueError("--ghost-attention and --distill are two runs: the one, then the other")


def main(config: Settings) -> dict:
    """Fine-tune, evaluate and save; returns the metrics of the summary."""
    began = time.time()
    stage = ("ghost attention" if config.ghost_attention else "distillation" if config.distill
             else "sft")
    config = replace(config, init=config.init or STAGES[stage][0],
                     out=config.out or STAGES[stage][1])
    check(config)
    if stage != "sft":
        return (ghost_attention if config.ghost_attention else distill)(config)
    device, rank, world = setup(config.device)
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
    return finish(metrics, lines, began, out, model, tok, log, steps, rank)


if __name__ == "__main__":
    run_script(main, Settings, PAPER)
