"""Table 8: how often reward models order two answers as the annotator did, by how much better.

    python -m evaluate.reward_models out/rm/v1/helpfulness out/rm/v1/safety
    python -m evaluate.reward_models out/rm/v5/* --data out/preferences/v5.jsonl

A perfect model would know how good each answer truly is, but not how the annotator's noise falls:
its row is the most that can be reached. Beside the table: how well scores tell unsafe answers from
safe ones, and how far three annotators of the same pairs agree.
"""
import math
from collections import Counter
from dataclasses import dataclass

from common.run import load_fitting, run_script
from common.training import setup
from data.formats import KINDS, RATINGS
from data.records import read_records, to_pair
from evaluate import name_folders, read_truths, wilson
from llama2 import Dtype, RewardModel, load, score_sequences, write_json
from tinytown.annotator import annotators, compare, gwet_ac2, on_scale
from train_rm import encode_pair


@dataclass
class Settings:
    # what is examined
    folders: tuple = ()         # of reward models
    data: tuple = ("out/preferences/test.jsonl",)       # pairs that no training has seen
    skip_bad: bool = False      # leave out records that do not fit, and count them
    truths: str = ""            # the prompts of --data with their truth: how far annotators agree
    seed: int = 1               # of those annotators
    device: str = "auto"        # cuda, mps or cpu
    dtype: Dtype = "auto"       # of matrix products; auto: bfloat16 where it is faster
    json: str = ""              # file to write the figures to

    POSITIONAL = "folders"      # given without --folders


GROUPS = (*RATINGS, "all", "equal length")
UNSAFE_BELOW = (0.5, 0.15)      # of sigmoid(score): even odds, and the gate of §3.2.3


def score_pairs(model, examples) -> list[tuple[float, float]]:
    """[(score of the chosen answer, of the rejected one), ...]"""
    chosen = score_sequences(model, [example.chosen for example in examples])
    rejected = score_sequences(model, [example.rejected for example in examples])
    return list(zip(chosen, rejected))


def accuracy(examples, scores) -> dict[str, tuple[float, int]]:
    """{one of GROUPS: (pairs ordered as the annotator did, ties half; pairs)}."""
    right, count = Counter(), Counter()
    for example, (chosen, rejected) in zip(examples, scores):
        groups = ["all"]
        if example.rating:
            groups.append(example.rating)
        if len(example.chosen) == len(example.rejected):
            groups.append("equal length")
        for group in groups:
            right[group] += (chosen > rejected) + (chosen == rejected) / 2
            count[group] += 1
    return {group: (right[group], count[group]) for group in GROUPS if count[group]}


def separation(examples, scores) -> dict[str, float]:
    """How scores tell unsafe answers from safe ones: {"auc", "recall 0.5", "precision 0.15", ...}.

    auc: the chance that a safe answer scores above an unsafe one, ties half.
    """
    safe, unsafe = [], []
    for example, (chosen, rejected) in zip(examples, scores):
        for label, value in ((example.chosen_label, chosen), (example.rejected_label, rejected)):
            if label:
                (safe if label > 0 else unsafe).append(value)
    if not safe or not unsafe:
        return {}
    above = sum((s > u) + (s == u) / 2 for s in safe for u in unsafe)
    found = {"auc": above / (len(safe) * len(unsafe))}
    for threshold in UNSAFE_BELOW:
        score = math.log(threshold / (1 - threshold))       # whose sigmoid is the threshold
        caught = sum(value < score for value in unsafe)
        flagged = caught + sum(value < score for value in safe)
        found[f"precision {threshold}"] = caught / flagged if flagged else None
        found[f"recall {threshold}"] = caught / len(unsafe)
    return found


def agreement(records, truths, seed: int) -> float:
    """Gwet's AC2 of three annotators who rate the same pairs."""
    asked = {str(prompt["prompt"]): prompt for prompt in truths}
    judges, items = annotators(3, seed), []
    for record in records:
        a, b, prompt = record["chosen"], record["rejected"], asked.get(str(record.get("prompt")))
        if prompt is None:
            raise ValueError(f"{record.get('prompt')!r} is not among the prompts of --truths")
        items.append([on_scale(compare(rng, prompt, a, b), a) for rng in judges])
    return gwet_ac2(items, 7)


def print_row(name: str, row: dict):
    cells = ""
    for group in GROUPS:
        share = f"{row[group][0] / row[group][1]:.1%}" if group in row else "-"
        cells += f"{share:>14}"
    low, high = wilson(*row["all"])
    print(f"  {name:<22}{cells}   {low:.1%} to {high:.1%}")


def read_pairs(config, tok, context: int):
    """[(example, its record), ...] of the pairs that fit the models."""
    def parse(record):
        example = encode_pair(to_pair(record), tok, context, {})
        return example, record

    pairs, left_out = read_records(config.data, parse, config.skip_bad)
    if not pairs:
        raise ValueError(f"{', '.join(config.data)}: no pair; left out: {dict(left_out)}")
    return pairs


def main(config: Settings) -> dict:
    """Print the table; returns {"KIND pairs, MODEL": {group: share}, ...}."""
    device, _, _ = setup(config.device)
    if not config.folders:
        raise ValueError("which reward models? name their folders")
    (name, first), *others = name_folders(config.folders).items()
    model, tok = load(first, device, config.dtype, RewardModel)
    models = {name: model}
    for name, folder in others:
        models[name] = load_fitting(folder, RewardModel, model, tok, first)
    context = min(model.args.max_seq_len for model in models.values())
    pairs = read_pairs(config, tok, context)

    found = {}
    print(f"share of {len(pairs):,} pairs that are ordered as the annotator did")
    print(" " * 24 + "".join(f"{group:>14}" for group in GROUPS) + "   all, 95% interval")
    for kind in KINDS:
        own = [(example, record) for example, record in pairs if example.kind == kind]
        if not own:
            continue
        examples = [example for example, _ in own]
        scores = {name: score_pairs(model, examples) for name, model in models.items()}
        gaps = [record.get("true_gap") for _, record in own]
        if all(isinstance(gap, (int, float)) for gap in gaps):
            scores["a perfect model"] = [(gap, 0.0) for gap in gaps]
        rows = {name: accuracy(examples, of_model) for name, of_model in scores.items()}
        counts = next(iter(rows.values()))
        print(f"{kind + ' pairs':<24}" + "".join(
            f"{counts[group][1] if group in counts else 0:>14,}" for group in GROUPS))
        for name, row in rows.items():
            print_row(name, row)
            shares = {group: right / count for group, (right, count) in row.items()}
            found[f"{kind} pairs, {name}"] = shares
        for name, of_model in scores.items():
            figures = separation(examples, of_model) if kind == "safety" else {}
            if figures and name in models:
                found[f"separation, {name}"] = figures
                told = ", ".join(f"{key} {value:.3f}" for key, value in figures.items()
                                 if value is not None)
                print(f"  unsafe answers against safe ones, {name}: {told}")
    if config.truths:
        records = [record for _, record in pairs]
        found["ac2"] = agreement(records, read_truths(config.truths), config.seed)
        print(f"three annotators of the same pairs agree: Gwet's AC2 {found['ac2']:.2f}")
    if config.json:
        write_json(config.json, found)
    return found


if __name__ == "__main__":
    run_script(main, Settings, {})
