"""Ablations: the project's own commands, in a loop over seeds, and a table.

Everything is written below out/bench, a folder a seed; what is finished is not run again. Most
begin with a whole run of paper.sh for each seed, which takes a quarter of an hour on two cores.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("out/bench")


def seeds_of(description: str, parts=()):
    """The command line of an ablation: (which part, if there are several, the seeds)."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    if parts:
        parser.add_argument("part", choices=parts)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    given = parser.parse_args()
    return getattr(given, "part", None), given.seeds


def run(*argv):
    """One of the project's commands, as it would be typed."""
    words = [str(word) for word in argv]
    print("==", *words, flush=True)
    done = subprocess.run([sys.executable, *words], cwd=ROOT)
    if done.returncode:     # it has said why
        sys.exit(done.returncode)


def train(script: str, *argv):
    """A run of a train script, which is gone on with, or left alone where it is finished."""
    run(script, "--resume", *argv)


def paper(seed: int) -> Path:
    """The folder of a whole run of paper.sh."""
    folder = OUT / f"seed-{seed}"
    if not (folder / "finished").exists():
        changes = {"OUT": str(folder), "SEED": str(seed), "PYTHON": sys.executable}
        subprocess.run(["bash", "paper.sh"], cwd=ROOT, env=os.environ | changes, check=True)
        (folder / "finished").touch()
    return folder


def figures(command: str, *argv) -> dict:
    """What an examination finds."""
    path = OUT / "figures.json"
    OUT.mkdir(parents=True, exist_ok=True)
    run("-m", command, *argv, "--json", path)
    return json.loads(path.read_text())


def last_metrics(folder) -> dict:
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])


def spread(values: list[float], form: str = "{:.1f}") -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return form.format(statistics.mean(values)) + " ± " + form.format(deviation)


def print_table(title: str, columns: dict[str, list[dict]], form: str = "{:.1f}", scale=100):
    """{column: [{row: value} of each seed]} as Markdown: mean ± standard deviation."""
    print(f"\n{title}\n\n| | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    rows = list(dict.fromkeys(row for column in columns.values() for row in column[0]))
    for row in rows:
        cells = []
        for column in columns.values():
            values = [scale * seed[row] for seed in column if seed.get(row) is not None]
            cells.append(spread(values, form) if values else "-")
        print(f"| {row.strip()} | " + " | ".join(cells) + " |")
