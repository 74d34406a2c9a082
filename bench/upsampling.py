"""What up-sampling facts brings and costs at equal tokens (§2.1): prints the table of README.md.

python bench/upsampling.py [--seeds 1 2 3] [--weights 1 8] [--out out/upsampling]
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_pretrain as pretrain


def row(name, values, form):
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return (
        f"| {name} | {form.format(statistics.mean(values))} ± {form.format(spread)} | "
        + ", ".join(form.format(v) for v in values)
        + " |"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1, 2, 3], help="of town, weights and data order"
    )
    parser.add_argument(
        "--weights", type=float, nargs="+", default=[1.0, 8.0], help="of the encyclopedia"
    )
    parser.add_argument("--out", default="out/upsampling", help="folder of the runs")
    given = parser.parse_args()
    tables = []
    for weight in given.weights:
        runs = [
            pretrain.main(
                pretrain.Settings(
                    facts_weight=weight,
                    seed=seed,
                    overwrite=True,
                    out=f"{given.out}/weight-{weight:g}-seed-{seed}",
                )
            )
            for seed in given.seeds
        ]
        tables += [
            f"\nencyclopedia x {weight:g}, seeds {given.seeds}:",
            "| measure | mean ± sd | each |",
            "|---|---|---|",
            row("facts recalled", [100 * run["recall"] for run in runs], "{:.1f}%"),
            row("epochs of the encyclopedia", [run["epochs"][0] for run in runs], "{:.1f}"),
        ]
        tables += [
            row(f"{name}, bits a byte", [run["loss"][name][1] for run in runs], "{:.3f}")
            for name in runs[0]["loss"]
        ]
    print("\n".join(tables))


if __name__ == "__main__":
    main()
