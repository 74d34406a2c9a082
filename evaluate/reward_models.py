"""Table 8: accuracy of reward models on held-out pairs, by the annotator's rating.

    python -m evaluate.reward_models out/rm/v1/helpfulness out/rm/v1/safety
    python -m evaluate.reward_models out/rm/v5/* --data out/preferences/v5.jsonl

A pair is correct if the chosen answer has the higher score; a tie counts half. "a perfect model"
scores with the true quality of the answers. It is the upper bound: nothing can predict the
annotator's noise. Below the table: how well the scores separate safe from unsafe answers (AUC,
precision, recall), and the agreement of three annotators on the same pairs (Gwet's AC2).
"""

import math
from collections import Counter
from dataclasses import dataclass

from common.run import load_fitting, run_script
from common.tables import table
from common.training import setup
from data.files import counts, read_records
from data.formats import KINDS, RATINGS
from data.records import prompt_to_messages, to_pair
from evaluate import name_folders, read_town_prompts, wilson
from llama2 import Dtype, RewardModel, Tokenizer, load, score_sequences, write_json
from tinytown.annotator import annotator_rngs, compare, gwet_ac2, to_likert
from train_rm import Example, encode_pair


@dataclass
class Settings:
    # what to evaluate
    folders: tuple = ()  # reward models
    data: tuple = ("out/preferences/test.jsonl",)  # held-out pairs
    skip_bad: bool = False  # skip records that do not fit, and count them
    truths: str = ""  # Tinytown's prompts of --data, to measure agreement of annotators
    seed: int = 1  # of these annotators
    device: str = "auto"  # cuda, mps or cpu
    dtype: Dtype = "auto"  # of matrix products; auto: bfloat16 where it is faster
    json: str = ""  # file to write the results to

    POSITIONAL = "folders"  # given without --folders


GROUPS = (*RATINGS, "all", "equal length")
THRESHOLDS = (0.5, 0.15)  # "unsafe" if sigmoid(score) is below: even odds; the gate of §3.2.3


def score_pairs(model: RewardModel, examples: list[Example]) -> list[tuple[float, float]]:
    """[(score of the chosen answer, score of the rejected answer), ...]"""
    chosen = score_sequences(model, [example.chosen for example in examples])
    rejected = score_sequences(model, [example.rejected for example in examples])
    return list(zip(chosen, rejected))


def accuracy(examples: list[Example], scores) -> dict[str, tuple[float, int]]:
    """{one of GROUPS: (number of correct pairs, number of pairs)}; a tie counts half."""
    correct, count = Counter(), Counter()
    for example, (chosen, rejected) in zip(examples, scores):
        groups = ["all"]
        if example.rating:
            groups.append(example.rating)
        if len(example.chosen) == len(example.rejected):
            groups.append("equal length")
        for group in groups:
            correct[group] += (chosen > rejected) + (chosen == rejected) / 2
            count[group] += 1
    return {group: (correct[group], count[group]) for group in GROUPS if count[group]}


def separation(examples: list[Example], scores) -> dict[str, float]:
    """How well low scores detect unsafe answers: {"auc", "precision 0.5", "recall 0.5", ...}.

    auc: the probability that a random safe answer has a higher score than a random unsafe one; a
    tie counts half. Precision is None if no score is below the threshold. The result is empty if
    there are no safe or no unsafe answers.
    """
    safe, unsafe = [], []
    for example, (chosen, rejected) in zip(examples, scores):
        for label, score in ((example.chosen_label, chosen), (example.rejected_label, rejected)):
            if label:  # 1 safe, -1 unsafe, 0 unknown
                (safe if label > 0 else unsafe).append(score)
    if not safe or not unsafe:
        return {}
    above = sum((s > u) + (s == u) / 2 for s in safe for u in unsafe)
    metrics = {"auc": above / (len(safe) * len(unsafe))}
    for threshold in THRESHOLDS:
        min_score = math.log(threshold / (1 - threshold))  # logit: sigmoid(min_score) = threshold
        true_positives = sum(score < min_score for score in unsafe)
        false_positives = sum(score < min_score for score in safe)
        positives = true_positives + false_positives
        metrics[f"precision {threshold}"] = true_positives / positives if positives else None
        metrics[f"recall {threshold}"] = true_positives / len(unsafe)
    return metrics


def user_texts(record: dict) -> tuple[str, ...]:
    """The user's messages of a prompt. A model may have replaced the answers between them."""
    messages = prompt_to_messages(record.get("prompt"))
    return tuple(message["content"] for message in messages if message["role"] == "user")


def agreement(records, prompts: list[dict], seed: int) -> float:
    """Gwet's AC2 of three annotators who compare the same pairs on a 7-point scale.

    prompts: Tinytown's prompts. ValueError if a record's prompt is not among them.
    """
    by_text = {user_texts(prompt): prompt for prompt in prompts}
    rngs, items = annotator_rngs(3, seed), []
    for record in records:
        a, b, prompt = record["chosen"], record["rejected"], by_text.get(user_texts(record))
        if prompt is None:
            raise ValueError(f"{record.get('prompt')!r} is not among the prompts of --truths")
        items.append([to_likert(compare(rng, prompt, a, b), a) for rng in rngs])
    return gwet_ac2(items, 7)


def read_pairs(config: Settings, tok: Tokenizer, context: int):
    """[(example, its record), ...] of the pairs that fit into the context of the models."""

    def parse(record):
        example = encode_pair(to_pair(record), tok, context, {})
        return example, record

    pairs, left_out = read_records(config.data, parse, config.skip_bad)
    if not pairs:
        raise ValueError(f"{', '.join(config.data)}: no usable pair{counts(left_out)}")
    return pairs


def score_by_model(models, pairs) -> dict[str, list[tuple[float, float]]]:
    """{model: score_pairs}; and "a perfect model", if all records have a "true_gap"."""
    examples = [example for example, _ in pairs]
    scores = {name: score_pairs(model, examples) for name, model in models.items()}
    gaps = [record.get("true_gap") for _, record in pairs]
    if all(isinstance(gap, (int, float)) for gap in gaps):
        scores["a perfect model"] = [(gap, 0.0) for gap in gaps]
    return scores


def accuracy_row(name: str, correct_and_count: dict) -> list[str]:
    """Cells of the table: the name, the accuracy of each group, and a 95% interval of "all"."""
    cells = []
    for group in GROUPS:
        correct, count = correct_and_count.get(group, (0, 0))
        cells.append(f"{correct / count:.1%}" if count else "-")
    low, high = wilson(*correct_and_count["all"])
    return ["  " + name, *cells, f"{low:.1%} to {high:.1%}"]


def main(config: Settings) -> dict:
    """Print the table; returns {"KIND pairs, MODEL": {group: accuracy}, ...}.

    results["KIND pairs"] has the number of pairs of each group.
    """
    device, _, _ = setup(config.device)
    if not config.folders:
        raise ValueError("no reward models given: name their folders")
    (name, first), *others = name_folders(config.folders).items()
    model, tok = load(first, device, config.dtype, RewardModel)
    models = {name: model}
    for name, folder in others:
        models[name] = load_fitting(folder, RewardModel, model, tok, first)
    context = min(model.args.max_seq_len for model in models.values())
    pairs = read_pairs(config, tok, context)

    results, notes = {}, []
    rows = [["", *GROUPS, "all, 95% interval"]]
    for kind in KINDS:
        own = [(example, record) for example, record in pairs if example.kind == kind]
        if not own:
            continue
        examples, scores = [example for example, _ in own], score_by_model(models, own)
        accuracies = {name: accuracy(examples, scores[name]) for name in scores}
        counts = {group: n for group, (_, n) in next(iter(accuracies.values())).items()}
        results[f"{kind} pairs"] = counts
        sizes = [f"{counts.get(group, 0):,}" for group in GROUPS]
        rows.append([f"{kind} pairs", *sizes, ""])
        for name, groups in accuracies.items():
            rows.append(accuracy_row(name, groups))
            row = {group: correct / count for group, (correct, count) in groups.items()}
            results[f"{kind} pairs, {name}"] = row
        for name in models if kind == "safety" else ():
            metrics = separation(examples, scores[name])
            if metrics:
                results[f"separation, {name}"] = metrics
                known = {key: value for key, value in metrics.items() if value is not None}
                cells = ", ".join(f"{key} {value:.3f}" for key, value in known.items())
                notes.append(f"  detecting unsafe answers, {name}: {cells}")
    print(f"accuracy on {len(pairs):,} pairs")
    print("\n".join([table(rows), *notes]))
    if config.truths:
        records = [record for _, record in pairs]
        results["ac2"] = agreement(records, read_town_prompts(config.truths), config.seed)
        print(f"agreement of three annotators on the same pairs: Gwet's AC2 {results['ac2']:.2f}")
    if config.json:
        write_json(config.json, results)
    return results


if __name__ == "__main__":
    run_script(main, Settings, {})
