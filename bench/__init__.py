"""Ablations: the project's own commands in a loop over seeds, and a table of the results.

All results are in out/bench, one folder per seed. Finished runs are not repeated. Most ablations
need a whole run of paper.sh for each seed, which takes half an hour on two cores.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

from common.tables import table

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("out/bench")
# The 97.5% quantiles of Student's t distribution with 1, 2, ... degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def parse_args(description: str, parts=()):
    """(part, seeds) from the command line of an ablation; part is None if there is only one."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if parts:
        parser.add_argument("part", choices=parts)
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[1, 2, 3],
        help="paper.sh runs for each (about half an hour) unless out/bench has it (default: 1 2 3)",
    )
    args = parser.parse_args()
    return getattr(args, "part", None), args.seeds


def run(*argv):
    """Run one of the project's Python commands. If it fails, exit with its code."""
    words = [str(word) for word in argv]
    print("==", *words, flush=True)
    process = subprocess.run([sys.executable, *words], cwd=ROOT)
    if process.returncode:  # the command has printed the error
        sys.exit(process.returncode)


def train(script: str, *argv):
    """Run a training script, or resume it; a finished run is left as it is."""
    run(script, "--resume", *argv)


def run_paper(seed: int) -> Path:
    """Run paper.sh with this seed, unless it is finished; returns its folder."""
    folder = OUT / f"seed-{seed}"
    if not (folder / "finished").exists():
        changes = {"OUT": str(folder), "SEED": str(seed), "PYTHON": sys.executable}
        subprocess.run(["bash", "paper.sh"], cwd=ROOT, env=os.environ | changes, check=True)
        (folder / "finished").touch()
    return folder


def read_results(seed: int, name: str) -> dict:
    """What the examination `name` of paper.sh found, such as "scoreboard"."""
    return json.loads((run_paper(seed) / f"results/{name}.json").read_text())


def evaluate(command: str, *argv) -> dict:
    """Run a command of evaluate/; returns what it writes with --json."""
    path = OUT / "figures.json"
    OUT.mkdir(parents=True, exist_ok=True)
    run("-m", command, *argv, "--json", path)
    return json.loads(path.read_text())


def last_metrics(folder) -> dict:
    """The last line of a run's log."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])


def deviation(values: list[float]) -> float:
    """The sample standard deviation."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def margin(values: list[float]) -> float:
    """Half of the 95% confidence interval of the mean, by Student's t; NaN for one value."""
    n = len(values)
    if n == 1:
        return math.nan
    return T_QUANTILES[n - 2] * statistics.stdev(values) / math.sqrt(n)


def append_rows(columns: dict[str, list[dict]], results: dict[str, dict]):
    """Append one seed's {column: {row: value}} to {column: [{row: value} of each seed]}."""
    for name, row in results.items():
        columns.setdefault(name, []).append(row)


def print_table(
    title: str, columns: dict[str, list[dict]], form: str = "{:.1f}", scale=100, spread=deviation
):
    """Print {column: [{row: value} of each seed]} in Markdown: mean ± spread."""
    rows = [["", *columns]]
    for row in dict.fromkeys(row for column in columns.values() for row in column[0]):
        cells = []
        for column in columns.values():
            values = [scale * seed[row] for seed in column if seed.get(row) is not None]
            numbers = (statistics.mean(values), spread(values)) if values else ()
            cells.append(" ± ".join(form.format(number) for number in numbers) or "-")
        rows.append([row.strip(), *cells])
    print(f"\n{title}\n\n{table(rows, markdown=True)}")
