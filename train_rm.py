"""Reward models (§3.2.1, §3.2.2): a chat model and preferences -> helpfulness and safety scores.

    loss = -log sigmoid(r(x, chosen) - r(x, rejected) - m(rating)), the mean over pairs (Eq. 2)
    safety adds -log sigmoid(+-r(x, answer)) for both answers: + if it is safe, - if it is not

The score is read at the answer's last token, its EOS. Each model learns from its own preferences
and from some of the other's: helpfulness from all of its own and as many of safety's, safety from
90% of its own. On Tinytown, two variants of the chat model answer each prompt at different
temperatures, and the annotator, who knows the truth, compares the answers.

    python train_rm.py                                    all of that, on a laptop
    python train_rm.py --by-hand 50                       be the annotator; then --data FILE
    python train_rm.py --unlabelled pairs.jsonl           write pairs for others to label
    python train_rm.py --data hh-rlhf/train.jsonl.gz --init llama-2-7b-chat --out out/hh

Accepted records: {"prompt": text or messages, "chosen", "rejected"}, Anthropic's HH transcripts
{"chosen", "rejected"}; with "rating", "chosen_safe", "rejected_safe" and "kind" where known.
Differs from the paper: the second variant stands between the chat model and its base; a pair
without a rating has no margin; the laptop's batch is small, for updates are what is scarce.
"""
import copy
import math
import random
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from tinytown import world as tinytown
from llama2 import (Log, RewardModel, Transformer, as_messages, begin_run, check_same_settings,
                    encode_dialog, everyones, fit, last_scores, load, open_run, read_json, require,
                    respond, run_script, save, save_resume, score_rows, setup, wilson, write_json,
                    write_summary)


@dataclass
class Settings:
    init: str = "out/sft"       # chat model to start from; none: from scratch, of --chat's shape
    data: tuple = ()            # files of preferences: .jsonl, .jsonl.gz, .json; none: collect
    out: str = "out/rm"         # folder of the run; helpfulness and safety stand in it
    resume: bool = False        # go on from the last save, if there is one
    overwrite: bool = False     # replace what --out holds
    skip_bad: bool = False      # count and leave out records that do not fit, not stop
    chat: str = "out/sft"       # model that answers, the first of two variants
    base: str = "out/pretrain"  # what --chat was tuned from; none: --chat alone answers
    blend: float = 0.7          # share of --chat's weights in the second variant
    temperatures: tuple = (0.7, 1.0, 1.2)   # of the answers, in all combinations
    pairs: int = 12500          # Tinytown: prompts with two answers (paper: 1,418,091)
    prompts: str = ""           # with --by-hand or --unlabelled: .jsonl of {"prompt"} of your own
    by_hand: int = 0            # compare so many pairs yourself, in the terminal, and stop
    unlabelled: str = ""        # file to write so many pairs to for others to label, and stop
    margin: str = "large"       # none, small or large: Table 27
    aux_weight: float = 1.0     # safety: weight of the classification loss; 0: none (Table 29)
    val_fraction: float = 0.05  # with --data: held-out share of the prompts
    batch_size: int = 16        # pairs a step, over all processes
    micro_batch: int = 8        # pairs a forward pass of one process, at most
    epochs: float = 1.0         # times that each pair is seen
    lr: float = 5e-4            # peak learning rate
    warmup_steps: int = 0       # of linear warm-up, then cosine to a tenth; 0: 3%, at least 5
    weight_decay: float = 0.1   # on matrices
    beta1: float = 0.9          # AdamW
    beta2: float = 0.95         # AdamW
    eps: float = 1e-5           # AdamW
    grad_clip: float = 1.0      # largest norm of the gradient
    seed: int = 1               # of the town, the answers, the annotator and the order
    save_every: int = 100       # steps between saves to resume from
    log_every: int = 50         # steps between progress lines
    device: str = "auto"        # cuda, mps or cpu


PAPER = dict(batch_size=512, micro_batch=4, epochs=1.0, lr=1e-5, weight_decay=0.1, beta1=0.9,
             beta2=0.95, eps=1e-5, grad_clip=1.0)
KINDS = ("helpfulness", "safety")
RATINGS = ("significantly", "better", "slightly", "negligibly")
MARGINS = {"none": (0, 0, 0, 0), "small": (1, 2 / 3, 1 / 3, 0), "large": (3, 2, 1, 0)}  # Table 27
NEW_PROMPTS, HELD_OUT_OF_A_KIND = 2000, 120     # Tinytown: to test on, where there are as many
UNSAFE_BELOW = (0.5, 0.15)      # of sigmoid(score): even odds, and the gate of §3.2.3


# ------------------------------------------------------------------------------------------- data
class Unusable(ValueError):
    """A record that is whole, but teaches nothing."""


def hh_messages(transcript: str) -> list[dict]:
    """Anthropic's "\\n\\nHuman: ...\\n\\nAssistant: ..." as messages."""
    start, *parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + transcript.lstrip())
    messages = [{"role": "user" if who == "Human" else "assistant", "content": text.strip()}
                for who, text in zip(parts[::2], parts[1::2])]
    wanted = [("user", "assistant")[i % 2] for i in range(len(messages))]
    if start.strip() or [m["role"] for m in messages] != wanted or len(messages) % 2:
        raise Unusable("turns that do not alternate from Human to Assistant")
    return messages


def to_pair(record) -> dict:
    """A record of any accepted format -> {"messages", "chosen", "rejected", "rating", ...}.

    Raises ValueError for one that is broken, Unusable for one that teaches nothing.
    """
    if not isinstance(record, dict):
        raise ValueError("expected an object")
    for key in ("chosen", "rejected"):
        if not isinstance(record.get(key), str):
            raise ValueError(f'"{key}" is missing or not a string')
    for key, allowed in (("rating", (*RATINGS, None)), ("kind", (*KINDS, None)),
                         ("chosen_safe", (True, False, None)),
                         ("rejected_safe", (True, False, None))):
        if record.get(key) not in allowed:
            raise ValueError(f'"{key}" is {record[key]!r}, expected one of {allowed[:-1]}')
    chosen, rejected = record["chosen"].strip(), record["rejected"].strip()
    if "prompt" in record:
        messages = as_messages(record["prompt"])
    else:
        (*messages, c), (*other, r) = hh_messages(chosen), hh_messages(rejected)
        if messages != other:
            raise Unusable("prompts that differ")
        chosen, rejected = c["content"], r["content"]
    if not chosen or not rejected:
        raise Unusable("an empty answer")
    if chosen.split() == rejected.split():
        raise Unusable("answers that are the same")
    if record.get("chosen_safe") is False and record.get("rejected_safe"):
        raise Unusable("the unsafe answer is the chosen one")       # §3.2.1 drops these
    return dict(record, messages=messages, chosen=chosen, rejected=rejected,
                kind=record.get("kind") or "helpfulness")


def encode_pair(tok, pair, context: int):
    """(chosen, rejected) token ids of whole dialogues, the last `context` of each."""
    rows = [encode_dialog(tok, pair["messages"] + [{"role": "assistant", "content": pair[key]}])[0]
            for key in ("chosen", "rejected")]
    same = next((i for i, (a, b) in enumerate(zip(*rows)) if a != b), min(map(len, rows)))
    if max(map(len, rows)) - same > context:
        raise Unusable("longer than the context where the answers differ")
    return tuple(row[-context:] for row in rows)


def read_pairs(records, tok, context: int, skip_bad=False) -> tuple[list[dict], Counter]:
    """(pairs with their "tokens", how many were left out for what) of (where, record) pairs."""
    pairs, left_out = [], Counter()
    for where, record in records:
        try:
            pair = to_pair(record)
            pairs.append(dict(pair, tokens=encode_pair(tok, pair, context)))
        except Unusable as e:
            left_out[str(e)] += 1
        except ValueError as e:
            if not skip_bad:
                raise ValueError(f"{where}: {e}; mend it, or --skip-bad leaves out such "
                                 "records") from None
            left_out["bad records"] += 1
    return pairs, left_out


def mix(pairs, kind: str, seed: int) -> list[dict]:
    """What a reward model learns from (§3.2.2): its own pairs and some of the other kind.

    Helpfulness: as many others, as far as they go; safety: one other to nine of its own.
    """
    own = [p for p in pairs if p["kind"] == kind]
    others = [p for p in pairs if p["kind"] != kind]
    count = len(own) if kind == "helpfulness" else round(len(own) / 9)
    return own + random.Random(seed).sample(others, min(count, len(others)))


def batches_of(pairs, config) -> list[list[int]]:
    """The run's batches of pair indices, each sorted by length: micro-batches have little padding.

    Sorting the pairs before they are dealt into batches would save more, and spoil the learning:
    a batch of stories alone, then one of sums, are no fair samples of the data (README.md).
    """
    rng, size, out = random.Random(config.seed), config.batch_size, []
    for epoch in range(math.ceil(config.epochs)):
        order = list(range(len(pairs)))
        rng.shuffle(order)
        order = order[:max(1, round(len(order) * min(1, config.epochs - epoch)))]
        out += [sorted(order[at:at + size], key=lambda i: max(map(len, pairs[i]["tokens"])))
                for at in range(0, len(order), size)]
    return out


# -------------------------------------------------------------------------- collection (§3.2.1)
def blended(chat, base, share: float):
    """A second variant of a chat model: its weights `share` of the way from its base's."""
    if chat.args.dim != base.args.dim or chat.state_dict().keys() != base.state_dict().keys():
        raise ValueError("--base and --chat are not of one shape: name what --chat was tuned from, "
                         "or --base none")
    variant, old = copy.deepcopy(chat), base.state_dict()
    for name, weight in variant.state_dict().items():
        weight.copy_(share * weight + (1 - share) * old[name])
    return variant


def collect(variants, tok, prompts, temperatures, seed: int) -> list[tuple[str, str]]:
    """Two answers to each prompt (text or messages), the sides in random order.

    The variants answer at temperatures that vary from prompt to prompt, each on its own.
    """
    dialogs = [as_messages(prompt) for prompt in prompts]
    rng, answers = random.Random(seed), [[None, None] for _ in prompts]
    for side, variant in enumerate((variants[0], variants[-1])):
        at = [rng.choice(temperatures) for _ in prompts]
        for temperature in temperatures:
            some = [i for i, t in enumerate(at) if t == temperature]
            texts = respond(variant, tok, [dialogs[i] for i in some], temperature=temperature,
                            seed=seed + side)
            for i, text in zip(some, texts):
                answers[i][side] = text
    return [tuple(rng.sample(both, 2)) for both in answers]


def answer_pairs(config, prompts, device, rank=0, world=1) -> list[tuple[str, str]]:
    """Two answers to each prompt from the models that the settings name."""
    chat, tok = load(config.chat, device, kind=Transformer)
    variants = [chat]
    if config.base != "none":
        variants.append(blended(chat, load(config.base, device, kind=Transformer)[0], config.blend))
    temperatures = [float(t) for t in config.temperatures]
    return everyones(collect(variants, tok, prompts[rank::world], temperatures,
                             1000 * config.seed + rank))


def tinytown_prompts(config) -> dict[str, list[dict]]:
    """{file: prompts}: to train on; new ones like them; and some of what no training ever asks."""
    truth = tinytown.town(config.seed)
    train = tinytown.preference_prompts(truth, config.pairs, config.seed)
    new = tinytown.preference_prompts(truth, NEW_PROMPTS, -config.seed, unlike=train)
    return {"preferences.jsonl": train, "new-prompts.jsonl": new,
            "held-out.jsonl": tinytown.held_out_prompts(truth, HELD_OUT_OF_A_KIND)}


def collect_from_tinytown(config, out, device, rank, world) -> list[Path]:
    """Write files of preferences, compared by the annotator: see tinytown_prompts."""
    sets = tinytown_prompts(config)
    files = [out / name for name in sets]
    if config.resume and all(file.exists() for file in files):
        check_same_settings(out, config)
        return files
    asked = sum(sets.values(), [])
    answers = answer_pairs(config, [a["prompt"] for a in asked], device, rank, world)
    if rank == 0:
        rng = random.Random(f"annotator {config.seed}")
        records = [tinytown.compare(rng, a, *two) for a, two in zip(asked, answers)]
        write_json(out / "config.json", asdict(config))
        for file, prompts in zip(files, sets.values()):
            tinytown.write_records(file, records[:len(prompts)])
            del records[:len(prompts)]
    if world > 1:
        dist.barrier()
    return files


def agreement(config) -> float:
    """Gwet's AC2 of three annotators who rate the same pairs, those of the new prompts."""
    name, items = "new-prompts.jsonl", []
    rngs = [random.Random(f"annotator {config.seed} {i}") for i in range(3)]
    for asked, (_, r) in zip(tinytown_prompts(config)[name], read_json(Path(config.out) / name)):
        a, b = r["chosen"], r["rejected"]
        items.append([tinytown.on_scale(tinytown.compare(rng, asked, a, b), a) for rng in rngs])
    return tinytown.gwet_ac2(items, 7)


def by_hand(pairs, path, ask=input):
    """Compare pairs in the terminal; each label is saved at once, and a later call goes on."""
    done = [record for _, record in read_json(path)] if path.exists() else []

    def choose(question, letters):
        letter = None
        while letter not in list(letters):
            letter = ask(f"{question} [{'/'.join(letters)}] ").strip().lower()
        return letter

    for i, pair in enumerate(pairs[len(done):], len(done) + 1):
        print(f"\n{i} of {len(pairs)}\n{pair['prompt']}\n  a) {pair['a']}\n  b) {pair['b']}")
        try:
            better = choose("which is better", "ab")
            rating = choose("how much: 1 significantly 2 better 3 slightly 4 negligibly", "1234")
            safe = {side: choose(f"is {side} safe", "yn") == "y" for side in "ab"}
        except (EOFError, KeyboardInterrupt):
            break
        worse = "ba"["ab".index(better)]
        done.append(dict(prompt=pair["prompt"], chosen=pair[better], rejected=pair[worse],
                         rating=RATINGS[int(rating) - 1], chosen_safe=safe[better],
                         rejected_safe=safe[worse], kind=pair["kind"]))
        tinytown.write_records(path, done)
    print(f"\n{len(done)} of {len(pairs)} in {path}: the same command goes on, "
          f"and --data {path} trains on them")


# ------------------------------------------------------------------------------------------- loss
def ranking_loss(chosen, rejected, margins):
    """Sum of -log sigmoid(chosen - rejected - margin) over pairs; all (B,). Eq. 2."""
    return -F.logsigmoid(chosen - rejected - margins).sum()


def safety_loss(scores, labels):
    """Sum of -log sigmoid(label * score): label +1 safe, -1 unsafe, 0 not known. Table 29."""
    return -(F.logsigmoid(labels * scores) * labels.abs()).sum()


def safety_label(safe) -> float:
    return 0.0 if safe is None else 1.0 if safe else -1.0


# --------------------------------------------------------------------------------------- training
def reward_model(init: str, chat: str, device, seed: int):
    """(RewardModel, tokenizer): the transformer of a checkpoint under a new head, or all new."""
    torch.manual_seed(seed)
    language_model, tok = load(chat if init == "none" else init, device)
    if isinstance(language_model, RewardModel):
        return language_model, tok
    model = RewardModel(language_model.args).to(device)
    if init != "none":      # a score in place of next-token logits: the head alone is new
        model.load_state_dict(language_model.state_dict(), strict=False)
    return model, tok


def train_reward_model(model, pairs, kind, config, log=None, state=None, keep=None):
    """One reward model, in place, on pairs as read_pairs gives them; returns the last loss."""
    device, margins = next(model.parameters()).device, MARGINS[config.margin]
    aux = config.aux_weight if kind == "safety" else 0.0
    batches = batches_of(pairs, config)
    warmup = config.warmup_steps or max(5, round(0.03 * len(batches)))          # §3.2.2

    def loss_sum(engine, rows):
        some = [pairs[i] for i in rows]
        scores = last_scores(engine, [tokens for p in some for tokens in p["tokens"]]).float()
        margin = [margins[RATINGS.index(p["rating"])] if p.get("rating") else 0.0 for p in some]
        loss = ranking_loss(scores[::2], scores[1::2], torch.tensor(margin, device=device))
        if aux:
            labels = [safety_label(p.get(f"{side}_safe")) for p in some
                      for side in ("chosen", "rejected")]
            loss = loss + aux * safety_loss(scores, torch.tensor(labels, device=device))
        return loss

    tokens = sum(len(row) for p in pairs for row in p["tokens"]) * config.epochs / len(batches)
    return fit(model, batches, loss_sum, len, replace(config, warmup_steps=warmup), log, state,
               keep, tokens)


# ------------------------------------------------------------------------------------- evaluation
def scores_of(model, pairs) -> list[tuple[float, float]]:
    """[(score of the chosen answer, of the rejected one), ...]"""
    scores = score_rows(model, [row for p in pairs for row in p["tokens"]])
    return list(zip(scores[::2], scores[1::2]))


def accuracy(pairs, scores) -> dict[str, tuple[float, int]]:
    """{rating, "all", "equal length": (pairs ordered as the annotator did; ties are half, of)}."""
    groups = {rating: [] for rating in (*RATINGS, "all", "equal length")}
    for pair, (chosen, rejected) in zip(pairs, scores):
        right = 1.0 if chosen > rejected else 0.5 if chosen == rejected else 0.0
        groups["all"].append(right)
        if pair.get("rating"):
            groups[pair["rating"]].append(right)
        if len(pair["tokens"][0]) == len(pair["tokens"][1]):
            groups["equal length"].append(right)
    return {name: (sum(group), len(group)) for name, group in groups.items() if group}


def separation(pairs, scores) -> dict[str, float]:
    """How scores tell unsafe answers from safe ones: {"auc", "recall 0.5", "precision 0.15", ...}.

    auc: the chance that a safe answer scores above an unsafe one, ties half.
    """
    answers = [(value, p[f"{side}_safe"]) for p, both in zip(pairs, scores)
               for side, value in zip(("chosen", "rejected"), both)
               if p.get(f"{side}_safe") is not None]
    safe, unsafe = ([v for v, label in answers if label is wanted] for wanted in (True, False))
    if not safe or not unsafe:
        return {}
    above = sum((s > u) + (s == u) / 2 for s in safe for u in unsafe)
    out = {"auc": above / (len(safe) * len(unsafe))}
    for threshold in UNSAFE_BELOW:
        flagged = [label for v, label in answers if 1 / (1 + math.exp(-v)) < threshold]
        caught = flagged.count(False)
        out[f"precision {threshold}"] = caught / len(flagged) if flagged else float("nan")
        out[f"recall {threshold}"] = caught / len(unsafe)
    return out


def report(pairs, models) -> tuple[list[str], dict]:
    """Table 8: each model on both kinds of held-out pairs. Returns (lines, figures)."""
    groups, figures = (*RATINGS, "all", "equal length"), {}
    lines = ["pairs of new prompts: share ordered as by the annotator, by how much better one is",
             " " * 24 + "".join(f"{name:>14}" for name in groups) + "   all, 95% interval"]
    for kind in KINDS:
        own = [p for p in pairs if p["kind"] == kind]
        if not own:
            continue
        rows = {f"{name} model": scores_of(model, own) for name, model in models.items()}
        if all("true_gap" in p for p in own):       # knows each answer's quality, not the noise
            rows["a perfect model"] = [(p["true_gap"], 0.0) for p in own]
        rows = {name: accuracy(own, scores) for name, scores in rows.items()}
        counts = next(iter(rows.values()))
        lines.append(f"{kind + ' pairs':<24}" + "".join(
            f"{counts[group][1] if group in counts else 0:>14,}" for group in groups))
        for name, row in rows.items():
            shares = {group: right / n for group, (right, n) in row.items()}
            low, high = wilson(*row["all"])
            lines.append(f"  {name:<22}" + "".join(
                f"{shares[group]:>14.1%}" if group in shares else f"{'-':>14}" for group in groups)
                + f"   {low:.1%} to {high:.1%}")
            figures[f"{kind} pairs, {name}"] = shares
    told = [p for p in pairs if p["kind"] == "safety"]
    if told and "safety" in models:
        figures["separation"] = separation(told, scores_of(models["safety"], told))
        lines += ["", "safety model, unsafe answers against safe ones: " + ", ".join(
            f"{name} {value:.3f}" for name, value in figures["separation"].items())]
    return lines, figures


# ------------------------------------------------------------------------------------------- main
def check(config):
    require(config, ("batch_size", "micro_batch", "epochs", "lr", "grad_clip", "save_every",
                     "log_every", "pairs"), val_fraction=(0, 1), blend=(0, 1),
            aux_weight=(0, math.inf), by_hand=(0, math.inf))
    if config.margin not in MARGINS:
        raise ValueError(f"--margin {config.margin}: expected one of {', '.join(MARGINS)}")
    try:
        assert config.temperatures and all(float(t) >= 0 for t in config.temperatures)
    except (AssertionError, ValueError):
        raise ValueError(f"--temperatures {' '.join(map(str, config.temperatures))}: expected "
                         "numbers, at least 0") from None


def for_people(config, out, device):
    """Pairs for people: written to a file (--unlabelled), or compared here (--by-hand)."""
    count = config.by_hand or config.pairs
    if config.prompts:
        asked = [record for _, record in read_json(config.prompts)][:count]
        if not all(isinstance(a, dict) and "prompt" in a for a in asked):
            raise ValueError(f'{config.prompts}: expected records with a "prompt"')
    else:
        asked = tinytown.preference_prompts(tinytown.town(config.seed), count, config.seed)
    path = Path(config.unlabelled or out / "by-hand-pairs.jsonl")
    if not path.exists():
        answers = answer_pairs(config, [a["prompt"] for a in asked], device)
        kinds = ["safety" if a.get("is_safety") else "helpfulness" for a in asked]
        tinytown.write_records(path, [dict(prompt=a["prompt"], a=first, b=second, kind=kind) for
                                      a, (first, second), kind in zip(asked, answers, kinds)])
    elif config.unlabelled:
        raise ValueError(f"{path} exists: name another file")
    if config.by_hand:
        by_hand([pair for _, pair in read_json(path)], out / "by-hand.jsonl")
    else:
        print(f"{len(asked)} pairs in {path}: to train on them, each needs \"chosen\" and "
              "\"rejected\" in place of \"a\" and \"b\", and at best a \"rating\"")
    return {}


def load_pairs(config, out, tok, context, device, rank, world, say):
    """(pairs to train on, pairs of new prompts, pairs of what is never asked), reported."""
    strict = []
    if config.data:
        records = [record for path in config.data for record in read_json(path)]
        pairs, left_out = read_pairs(records, tok, context, config.skip_bad)
        prompts = sorted({str(p["messages"]) for p in pairs})
        random.Random(config.seed).shuffle(prompts)
        kept = set(prompts[:round(len(prompts) * config.val_fraction)])
        val = [p for p in pairs if str(p["messages"]) in kept]
        train = [p for p in pairs if str(p["messages"]) not in kept]
    else:
        files = collect_from_tinytown(config, out, device, rank, world)
        (train, left_out), (val, _), (strict, _) = (read_pairs(read_json(f), tok, context)
                                                    for f in files)
    if not train:
        raise ValueError(f"no pair to learn from; left out: {dict(left_out)}")
    bins = Counter((p.get("chosen_safe"), p.get("rejected_safe")) for p in train
                   if p["kind"] == "safety")
    helpful = sum(p["kind"] == "helpfulness" for p in train)
    say(f"{len(train):,} pairs, {helpful:,} of helpfulness; held out {len(val) + len(strict):,}; "
        "left out: " + (", ".join(f"{why} {n}" for why, n in left_out.items()) or "none"))
    if bins:
        total = sum(bins.values())
        say("safety pairs: " + ", ".join(f"{words} {bins[key] / total:.0%}" for words, key in (
            ("only the chosen answer safe", (True, False)), ("both safe", (True, True)),
            ("both unsafe", (False, False)))))
    return train, val, strict


def main(config: Settings) -> dict:
    """Collect, train both models, evaluate and save; returns the metrics of the summary."""
    began = time.time()
    device, rank, world = setup(config.device)
    check(config)
    out = Path(config.out)
    if config.by_hand or config.unlabelled:
        return for_people(config, out, device)
    say = print if rank == 0 else lambda *_, **__: None
    settings = {kind: replace(config, out=str(out / kind)) for kind in KINDS}
    going_on = config.resume and not (out / "summary.txt").exists()
    states = {kind: open_run(settings[kind])[1] for kind in KINDS
              if not (going_on and (out / kind / "consolidated.00.pth").exists())}
    _, tok = model, _ = reward_model(config.init, config.chat, device, config.seed)
    train, val, strict = load_pairs(config, out, tok, model.args.max_seq_len, device, rank, world,
                                    say)
    if rank == 0:
        (out / "summary.txt").unlink(missing_ok=True)       # stands for a finished run
    say(f"{time.time() - began:.0f} s so far")

    models, metrics = {}, {}
    for kind in KINDS:
        folder, learn = out / kind, mix(train, kind, config.seed)
        if kind not in states:                              # finished before it was interrupted
            models[kind] = load(folder, device, kind=RewardModel)[0]
            continue
        if not any(p["kind"] == kind for p in train):
            say(f"no pairs of {kind}: no such model")
            continue
        if rank == 0 and not states[kind]:
            begin_run(folder, settings[kind])
        model, tok = reward_model(config.init, config.chat, device, config.seed)
        say(f"{kind}: {config.init} -> {folder}, {len(learn):,} pairs, "
            f"{len(batches_of(learn, config))} steps of {config.batch_size}, {device}")
        log = Log(folder, len(batches_of(learn, config)),
                  states[kind]["step"] if states[kind] else 0, quiet=rank > 0)
        train_reward_model(model, learn, kind, config, log, states[kind],
                           keep=lambda **s: save_resume(folder, **s) if rank == 0 else None)
        models[kind] = model
        if rank == 0:
            save(folder, model, tok)
            (folder / "resume.pt").unlink(missing_ok=True)

    lines, metrics["judged"] = report(val, models) if val else ([], {})
    for kind in models if strict else ():
        own = [p for p in strict if p["kind"] == kind]
        right, n = accuracy(own, scores_of(models[kind], own))["significantly"]
        metrics["judged"][f"never asked, {kind} model"] = right / n
        lines += [f"of what no training ever asks: {kind} model, {n} significantly better answers: "
                  f"{right / n:.1%}"]
    if not config.data:
        metrics["ac2"] = agreement(config)
        lines += [f"three annotators of the same pairs agree: Gwet's AC2 {metrics['ac2']:.2f}"]
    metrics["seconds"] = time.time() - began
    lines += ["", f"{metrics['seconds']:.0f} s in all"]
    if rank == 0:
        write_json(out / "metrics.json", metrics)
        write_summary(out, lines)
    return metrics


if __name__ == "__main__":
    run_script(main, Settings, PAPER)
