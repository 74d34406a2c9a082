"""Evaluation: commands that take folders of models, judge them by Tinytown's facts, print tables.

The prompts are held out: no training sees them. Nothing here trains.
"""

import math
from collections import defaultdict
from pathlib import Path

from common.tables import table
from data.files import read_objects
from data.records import read_prompt, to_prompt
from llama2 import Tokenizer
from tinytown.prompts import TOPICS


def read_prompts(
    path, tok: Tokenizer | None = None, context: int = 0, need_truth: bool = False
) -> tuple[list[dict], bool]:
    """(prompts, True if their truth is known: then all of them are Tinytown's). Raises ValueError.

    Own prompts have the format of train_rlhf.py and no "truth"; nobody can judge their answers.
    With a tokenizer, a prompt that leaves no room for an answer in `context` tokens is an error.
    """
    records = list(read_objects(path, prompt=str | list))
    if not records:
        raise ValueError(f"{path}: has no prompt")
    has_truth = need_truth or any("truth" in record for _, record in records)
    for where, record in records:
        if has_truth:
            check_town_prompt(record, where)
        try:
            if tok:
                to_prompt(record, tok, context)
            else:
                read_prompt(record)
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from None
    if not has_truth:
        print(f"{path} has no truths: whatever needs the truth is left out")
    return [record for _, record in records], has_truth


def read_town_prompts(path, tok: Tokenizer | None = None, context: int = 0) -> list[dict]:
    """Tinytown's prompts with what its annotator needs to judge answers. Raises ValueError."""
    prompts, _ = read_prompts(path, tok, context, need_truth=True)
    return prompts


def check_town_prompt(record, where: str):
    """ValueError unless a record is a prompt of Tinytown with all that the annotator needs."""
    known = isinstance(record, dict) and record.get("topic") in TOPICS
    if not known or not {"prompt", "truth", "about", "content"} <= record.keys():
        raise ValueError(f"{where}: expected a prompt of Tinytown, with topic, truth and content")


def of_topic(*topics: str, attack: bool | None = None):
    """A function that tells whether a prompt has one of these topics.

    attack: True selects only prompts of attackers, False only others, None both.
    """

    def selects(prompt: dict) -> bool:
        is_attack = prompt.get("how", "plain") != "plain"
        return prompt["topic"] in topics and attack in (None, is_attack)

    return selects


def fraction(prompts, verdicts, selects, judgement: str) -> float | None:
    """Fraction of the selected prompts whose answer has this judgement; None if there are none.

    verdicts: annotator.judge of one answer to each prompt. judgement: a key of them.
    """
    flags = [verdict[judgement] for prompt, verdict in zip(prompts, verdicts) if selects(prompt)]
    return sum(flags) / len(flags) if flags else None


def mean_by_content(prompts: list[dict], values: list[float]) -> tuple[float, float, int]:
    """(mean, standard error, number of contents) of one value per prompt.

    The values of prompts with the same content are averaged first: a content is one sample, because
    answers to the same question in other words are not independent.
    """
    groups = defaultdict(list)
    for prompt, value in zip(prompts, values):
        groups[prompt["content"]].append(value)
    means = [sum(own) / len(own) for own in groups.values()]
    mean = sum(means) / len(means)
    variance = sum((own - mean) ** 2 for own in means) / max(1, len(means) - 1)
    return mean, math.sqrt(variance / len(means)), len(means)


def wilson(successes: float, n: int) -> tuple[float, float]:
    """(low, high): Wilson's 95% confidence interval of a fraction (Wilson 1927).

    Unlike the normal approximation it stays between 0 and 1, also for small n.
    """
    z, p = 1.96, successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def name_folders(folders) -> dict[str, Path]:
    """{name of a model in tables: its folder}: the last parts of the path, until they differ."""
    folders = list(dict.fromkeys(Path(folder) for folder in folders))
    names, parts = [], 0
    while len(set(names)) < len(folders):
        parts += 1
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
    return dict(zip(names, folders))


def percent_table(columns: dict[str, dict[str, float]]) -> str:
    """{column: {row: fraction}} as a table of percentages; "-" where a column lacks a row."""
    rows = [["", *columns]]
    for name in dict.fromkeys(name for column in columns.values() for name in column):
        cells = [f"{column[name]:.1%}" if name in column else "-" for column in columns.values()]
        rows.append([name, *cells])
    return table(rows)
