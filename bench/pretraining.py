"""What up-sampling facts brings and costs at equal tokens (§2.1).

    python -m bench.pretraining [--seeds 1 2 3]
"""
from bench import OUT, figures, last_metrics, print_table, run, seeds_of, train

WEIGHTS = (1, 8)        # of the encyclopedia: the natural mix, and as paper.sh has it


def main():
    _, seeds = seeds_of(__doc__)
    recalled, bits = {}, {}
    for seed in seeds:
        town = OUT / f"pretraining/{seed}/tinytown"
        run("-m", "tinytown", town, "--seed", seed)
        others = [town / f"{name}.jsonl" for name in ("stories", "web", "arithmetic")]
        for weight in WEIGHTS:
            out = OUT / f"pretraining/{seed}/weight-{weight}"
            run("-m", "data.corpus", "--out", out / "tokens", "--data",
                f"{town}/encyclopedia.jsonl:{weight}", *others)
            train("train_pretrain.py", "--data", out / "tokens", "--out", out, "--seed", seed)
            found = figures("evaluate.answers", out, "--probes", town / "probes.jsonl")
            column = f"encyclopedia x {weight}"
            (share,) = found.values()
            recalled.setdefault(column, []).append({"facts recalled": share})
            metrics = last_metrics(out)
            bits.setdefault(column, []).append(
                {name: value for name, value in metrics.items() if name.startswith("bits/")})
    print_table(f"%, seeds {seeds}", recalled)
    print_table(f"held-out text, seeds {seeds}", bits, "{:.3f}", scale=1)


if __name__ == "__main__":
    main()
