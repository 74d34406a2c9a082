"""Preferences (§3.2.1): prompts and two variants of a chat model -> pairs of compared answers.

    each prompt    ->  two answers, from two variants, at varying temperatures
    an annotator   ->  which one is better, how much (four ratings), and whether each is safe

    python -m data.preferences --prompts mine.jsonl --annotator person --out out/mine/v1.jsonl

--annotator tinytown is a script that compares by the facts of the toy world. --annotator person
asks at the terminal; the person can skip a pair, take back the last label, stop at any time and
continue later with the same command. Whether the answers are safe is asked about safety prompts.
--annotator nobody writes the answers as "a" and "b", for labelling with another tool, which must
rename them to "chosen" and "rejected" and should add "rating". In all three cases train_rm.py reads
the file.

The paper does not say how its variants differ. ours: the second variant is an earlier version, or
an interpolation of the weights: --blend 0.7 is 70% of the way from --other to --chat.
"""

import copy
import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from common.run import Output, check_jsonl, checkpoint_files, load_fitting, run_script
from common.settings import check_settings
from common.training import all_gather, derive_seed, is_main, local_part, print0, setup
from data.files import data_paths, read_and_count, read_objects, write_records
from data.formats import RATINGS
from data.records import Prompt, answer_again, prompt_to_messages, to_prompt
from llama2 import Dtype, Tokenizer, Transformer, generate, load, load_json, respond


@dataclass
class Settings:
    # the two variants
    chat: str = "out/sft"  # the newest chat model
    other: str = "out/pretrain"  # an earlier version, or the base model of --chat
    blend: float = 0.0  # weight of --chat in the second variant; 0: --other itself
    temperatures: tuple = (0.7, 1.0, 1.2)  # one is drawn for each answer
    max_new_tokens: int = 90  # longest answer, in tokens
    device: str = "auto"  # cuda, mps or cpu
    dtype: Dtype = "auto"  # of matrix products; auto: bfloat16 where it is faster
    # prompts and annotator
    prompts: tuple = ("out/tinytown/compare-v1.jsonl",)  # {"prompt", "is_safety"}, one per line
    skip_bad: bool = False  # skip records that do not fit, and count them
    annotator: Literal["tinytown", "person", "nobody"] = "tinytown"  # who compares the answers
    ask_safety: bool = False  # ask a person about safety for every pair, not only safety prompts
    out: str = "out/preferences/v1.jsonl"  # the pairs (paper: 1,418,091)
    overwrite: bool = False  # replace an existing file
    seed: int = 1  # for sampling and for the annotator's noise

    ONLY_IF = {"ask_safety": ("annotator", "person")}
    # The same file may be requested with other values of these. They do not change its content.
    MAY_CHANGE = ("out", "overwrite", "device", "ask_safety")


# ----------------------------------------------------------------------------------------- answers
def interpolate(chat: Transformer, other: Transformer, blend: float) -> Transformer:
    """A model with the weights blend * chat + (1 - blend) * other."""
    if blend == 0:
        return other
    other_weights = other.state_dict()
    variant = copy.deepcopy(chat)
    for name, weight in variant.state_dict().items():
        weight.copy_(blend * weight + (1 - blend) * other_weights[name])
    return variant


def answer_all(
    model: Transformer, tok: Tokenizer, prompts: list[Prompt], seed: int, config: Settings, sampler
) -> list[str]:
    """One answer to each prompt, at a temperature drawn for the prompt."""
    rng = random.Random(seed)
    temperatures = [rng.choice(config.temperatures) for _ in prompts]
    texts = [""] * len(prompts)
    for temperature in config.temperatures:
        indices = [i for i in range(len(prompts)) if temperatures[i] == temperature]
        dialogs = [prompt_to_messages(prompts[i].text) for i in indices]
        options = config.max_new_tokens, temperature, seed
        answers = respond(model, tok, dialogs, *options, sampler=sampler)
        for i, answer in zip(indices, answers):
            texts[i] = answer
    return texts


def generate_pairs(
    variants, tok: Tokenizer, prompts, seed: int, config: Settings, sampler=generate
) -> list[list[str]]:
    """[[answer a, answer b], ...], one from each variant, in random order."""
    rng = random.Random(seed)
    first = answer_all(variants[0], tok, prompts, derive_seed(seed, "first"), config, sampler)
    second = answer_all(variants[1], tok, prompts, derive_seed(seed, "second"), config, sampler)
    return [rng.sample(both, 2) for both in zip(first, second)]


def load_variants(config: Settings, device):
    """([chat model, second variant], tokenizer). ValueError if they do not fit together."""
    sources = Path(config.other) / "sources.json"
    if not config.blend and sources.exists() and "train_pretrain.py" in load_json(sources):
        print0(
            f"{config.other} is a base model, which does not know the chat format: its answers are "
            "too easy to tell from those of the chat model; --blend 0.7 makes them harder to tell"
        )
    chat, tok = load(config.chat, device, config.dtype, Transformer)
    other = load_fitting(config.other, Transformer, chat, tok, config.chat)
    shapes = [replace(model.args, max_seq_len=1) for model in (chat, other)]
    if config.blend and shapes[0] != shapes[1]:
        raise ValueError(f"{config.other} and {config.chat} have different shapes: use --blend 0")
    return [chat, interpolate(chat, other, config.blend)], tok


def read_prompts(config: Settings, tok: Tokenizer, context: int) -> list[tuple[Prompt, dict]]:
    """[(prompt, its record), ...]."""

    def parse(record):
        prompt = to_prompt(record, tok, context)
        if config.annotator == "tinytown" and "truth" not in record:
            raise ValueError(
                "not a prompt of Tinytown, and its annotator needs the truth: use "
                "--annotator person or nobody"
            )
        return prompt, record

    return read_and_count(config.prompts, parse, config.skip_bad, "prompt")


# --------------------------------------------------------------------------------------- annotators
def compare_by_tinytown(pairs, seed: int) -> list[dict]:
    """Preference records of (prompt, answer a, answer b)."""
    from tinytown.annotator import compare  # the only import of the toy world in data/

    records = []
    for prompt, a, b in pairs:
        # The annotator's noise belongs to the pair: in another round, it is another.
        rng = random.Random(f"annotator {seed} {prompt['prompt']} {a} {b}")
        records.append(compare(rng, prompt, a, b))
    return records


def unlabelled_pairs(pairs) -> list[dict]:
    """Records of (prompt, answer a, answer b) that are not compared yet."""
    records = []
    for prompt, a, b in pairs:
        kind = "safety" if prompt.get("is_safety") else "helpfulness"
        records.append({"prompt": prompt["prompt"], "a": a, "b": b, "kind": kind})
    return records


def choose(question: str, letters: str) -> str:
    """Ask until the answer is one of the letters."""
    letter = ""
    while letter not in list(letters):
        letter = input(f"{question} [{'/'.join(letters)}] ").strip().lower()
    return letter


def show_prompt(prompt) -> str:
    """A prompt for a person to read: a text as it is, messages with their roles."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def ask_comparison(pair, ask_safety: bool) -> dict | str:
    """Ask a person to compare two answers, at the terminal or through a pipe.

    Returns the preference record, or "s" (skip this pair) or "u" (undo the last label). Without
    ask_safety the record does not say which answers are safe: None.
    """
    print(f"{show_prompt(pair['prompt'])}\n  a) {pair['a']}\n  b) {pair['b']}")
    better = choose("which is better; s skips the pair, u takes back the last label", "absu")
    if better in "su":
        return better
    rating = choose("how much: 1 significantly 2 better 3 slightly 4 negligibly", "1234")
    safe = {"a": None, "b": None}
    if ask_safety:
        safe = {answer: choose(f"is {answer} safe", "yn") == "y" for answer in "ab"}
    worse = "b" if better == "a" else "a"
    return {
        "prompt": pair["prompt"],
        "chosen": pair[better],
        "rejected": pair[worse],
        "rating": RATINGS[int(rating) - 1],
        "chosen_safe": safe[better],
        "rejected_safe": safe[worse],
        "kind": pair["kind"],
    }


def identity(record: dict, *answers: str) -> str:
    """The prompt and both answers of a pair or of its label, in a form that can be compared."""
    return json.dumps([record.get("prompt"), sorted(record[key] for key in answers)])


def label_by_person(pairs_path: Path, config: Settings):
    """Label pairs one by one. Each label is saved at once, and the next call continues.

    A label belongs to the pair with its prompt and answers, so labels may be removed by hand. A
    pair that the person skips is removed from the file of pairs.
    """
    pairs = dict(enumerate(pair for _, pair in read_objects(pairs_path, a=str, b=str)))
    labels, others = {}, []  # {number of a pair: its label}, newest last; labels of no pair
    unlabelled = {}  # {what a label repeats of its pair: numbers of such pairs}
    for number, pair in pairs.items():
        unlabelled.setdefault(identity(pair, "a", "b"), []).append(number)
    if Path(config.out).exists():
        for _, record in read_objects(config.out, chosen=str, rejected=str):
            numbers = unlabelled.get(identity(record, "chosen", "rejected"))
            if numbers:
                labels[numbers.pop(0)] = record
            else:
                others.append(record)
    if others:
        print(f"{len(others)} labels in {config.out} are kept, but belong to no pair of this file")
    try:
        while waiting := [number for number in pairs if number not in labels]:
            number = waiting[0]
            print(f"\n{len(labels) + 1} of {len(pairs)}")
            pair = pairs[number]
            record = ask_comparison(pair, config.ask_safety or pair["kind"] == "safety")
            if record == "s":
                del pairs[number]
                write_records(pairs_path, pairs.values())
                continue
            if record != "u":
                labels[number] = record
            elif labels:
                labels.popitem()
            write_records(config.out, others + [labels[number] for number in sorted(labels)])
    except (EOFError, KeyboardInterrupt):
        pass
    rest = "the same command continues, and " if len(labels) < len(pairs) else ""
    print(
        f"\n{len(labels)} of {len(pairs)} compared, in {config.out}: {rest}"
        f"python train_rm.py --init {config.chat} --data {config.out} --out FOLDER trains on them"
    )


# -------------------------------------------------------------------------------------------- main
def make_pairs(config: Settings, device, rank: int, sampler=generate) -> list[dict]:
    """Two answers to each prompt, compared by Tinytown's annotator or not compared yet.

    sampler: llama2.generate or a function like it.
    """
    variants, tok = load_variants(config, device)
    context = min(variant.args.max_seq_len for variant in variants)
    prompts, records = zip(*read_prompts(config, tok, context))
    seed = derive_seed(config.seed, "pairs", rank)
    mine = local_part(prompts)
    mine = answer_again(variants[0], tok, mine, config.max_new_tokens, 1.0, seed, context)
    answers = all_gather(generate_pairs(variants, tok, mine, seed, config, sampler))
    # train_rm.py leaves out pairs with an empty answer, so no person should have to compare them.
    may_be_empty = config.annotator == "tinytown"
    pairs = []
    for prompt, record, (a, b) in zip(all_gather(mine), records, answers):
        if a.split() != b.split() and (may_be_empty or (a.strip() and b.strip())):
            record = record | {"prompt": prompt.text, "is_safety": prompt.is_safety}
            pairs.append((record, a, b))
    n_left_out = len(prompts) - len(pairs)
    what = "equal answers" if may_be_empty else "equal answers, or with an empty one,"
    print0(f"{n_left_out:,} pairs of {what} left out: they teach a reward model nothing")
    if config.annotator == "tinytown":
        return compare_by_tinytown(pairs, config.seed)
    return unlabelled_pairs(pairs)


def main(config: Settings):
    """Write the pairs, unless the file exists; then let a person compare them, if asked to."""
    check_settings(config, may_be_zero=("blend", "temperatures"), at_most_one=("blend",))
    device, rank, _ = setup(config.device)
    person = config.annotator == "person"
    check_jsonl(config.out)
    # A person labels one pair at a time, so the answers are kept in a file of their own.
    path = Path(f"{config.out}.pairs.jsonl") if person else Path(config.out)
    files = data_paths(config.prompts) + checkpoint_files(config.chat, config.other)
    if Path(config.out).exists() and not path.exists() and not config.overwrite:
        raise ValueError(
            f"{config.out} exists and has no labels of this run: choose another "
            "--out, or --overwrite it"
        )
    output = Output(path, config, files)
    if output.exists:
        print0(f"{path} exists already")
    else:
        records = make_pairs(config, device, rank, output.sampler)
        if is_main():
            if person and Path(config.out).exists():
                # --overwrite: labels of the old answers do not belong to the new ones.
                Path(config.out).replace(f"{config.out}.old")
                print0(f"the labels of the old answers are in {config.out}.old")
            output.write(write_records, records)
        print0(f"{len(records):,} pairs in {path}")
    if person and is_main():
        label_by_person(path, config)


if __name__ == "__main__":
    run_script(main, Settings, {})
