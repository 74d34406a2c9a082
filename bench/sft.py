"""The table of README.md on §3.1: base, SFT, loss on prompts, few clean against many noisy.

    python bench/sft.py [--seeds 1 2 3] [--bases out/upsampling/weight-8-seed-{}] [--out FOLDER]

The bases are those that bench/upsampling.py leaves; one that is missing is trained first.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_pretrain as pretrain
import train_sft as sft

CLEAN, NOISY, SHARE_BAD = 480, 4800, 0.5
VARIANTS = {  # each sees about as many tokens as the others
    "SFT": {},
    "loss on prompts too": dict(mask_prompts=False),
    f"{CLEAN} clean": dict(dialogues=CLEAN, epochs=20.0),
    f"{NOISY} half bad": dict(dialogues=NOISY, noise=SHARE_BAD),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--bases", default="out/upsampling/weight-8-seed-{}", help="{} is the seed")
    parser.add_argument("--out", default="out/bench-sft")
    given = parser.parse_args()
    rows = {name: [] for name in ["base", *VARIANTS]}
    for seed in given.seeds:
        base = given.bases.format(seed)
        if not (Path(base) / "consolidated.00.pth").exists():
            pretrain.main(pretrain.Settings(out=base, seed=seed, resume=True))
        for name, changes in VARIANTS.items():
            out = f"{given.out}/{name.replace(' ', '-')}-{seed}"
            config = sft.Settings(init=base, seed=seed, overwrite=True, out=out, **changes)
            rows[name].append(sft.main(config)["judged"])
        rows["base"].append({"SFT": rows["SFT"][-1]["base"], "SFT, T=1": rows["SFT"][-1]["base"]})
    for judged, how in (("SFT", "greedy"), ("SFT, T=1", "sampled at temperature 1")):
        print(f"\n{how}; seeds {given.seeds}: mean ± standard deviation\n")
        print("| |", " | ".join(rows), "|")
        print("|---|" + "---|" * len(rows))
        for measure in sft.MEASURES:
            cells = [[100 * run[judged][measure] for run in runs] for runs in rows.values()]
            spread = [statistics.stdev(cell) if len(cell) > 1 else 0 for cell in cells]
            print(f"| {measure.strip()} |", " | ".join(
                f"{statistics.mean(cell):.0f} ± {sd:.0f}%" for cell, sd in zip(cells, spread)), "|")


if __name__ == "__main__":
    main()
