"""Examinations: commands that take folders of models, judge them by the truth, print a table.

No training asks them anything, and none of them trains.
"""
import math
from pathlib import Path

from data.records import read_objects
from tinytown.prompts import TOPICS


def read_truths(path) -> list[dict]:
    """Prompts of Tinytown, with what its annotator has to know. Raises ValueError."""
    prompts = []
    for where, record in read_objects(path, prompt=str | list, topic=str):
        if "truth" not in record or record["topic"] not in TOPICS:
            raise ValueError(f"{where}: expected a prompt of Tinytown, with its topic and truth")
        prompts.append(record)
    return prompts


def wilson(successes: float, n: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson's: it stays within 0 and 1)."""
    z, share = 1.96, successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return middle - half, middle + half


def name_folders(folders) -> dict[str, Path]:
    """{how a model is called in a table: its folder}: as many last parts as tell them apart."""
    folders = list(dict.fromkeys(Path(folder) for folder in folders))
    names, parts = [], 0
    while len(set(names)) < len(folders):
        parts += 1
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
    return dict(zip(names, folders))


def percent_table(columns: dict[str, dict[str, float]]) -> str:
    """{column: {row: share}} as text, a line a row; a row that a column lacks is a dash."""
    rows = list(dict.fromkeys(row for column in columns.values() for row in column))
    width = 2 + max(10, *(len(name) for name in columns))
    first = 2 + max(len(row) for row in rows)
    lines = [" " * first + "".join(f"{name:>{width}}" for name in columns)]
    for row in rows:
        cells = [f"{column[row]:.1%}" if row in column else "-" for column in columns.values()]
        lines.append(f"{row:<{first}}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)
