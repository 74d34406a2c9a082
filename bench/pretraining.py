"""Up-sampling factual sources (§2.1): what it gains and costs at equal training tokens.

python -m bench.pretraining [--seeds 1 2 3]
"""

from bench import OUT, append_rows, evaluate, last_metrics, parse_args, print_table, run, train

WEIGHTS = (1, 8)  # of the encyclopedia: its natural proportion, and the weight in paper.sh


def main():
    _, seeds = parse_args(__doc__)
    recalls, bits_per_byte = {}, {}
    for seed in seeds:
        town = OUT / f"pretraining/{seed}/tinytown"
        run("-m", "tinytown", town, "--seed", seed)
        others = [town / f"{name}.jsonl" for name in ("stories", "web", "arithmetic")]
        for weight in WEIGHTS:
            out = OUT / f"pretraining/{seed}/weight-{weight}"
            data = [f"{town}/encyclopedia.jsonl:{weight}", *others]
            run("-m", "data.corpus", "--out", out / "tokens", "--data", *data)
            train("train_pretrain.py", "--data", out / "tokens", "--out", out, "--seed", seed)
            results = evaluate("evaluate.answers", out, "--probes", town / "probes.jsonl")
            column = f"encyclopedia x {weight}"
            (recall,) = results.values()
            append_rows(recalls, {column: {"facts recalled": recall}})
            metrics = last_metrics(out)
            bits = {key: value for key, value in metrics.items() if key.startswith("bits/")}
            append_rows(bits_per_byte, {column: bits})
    print_table(f"%, seeds {seeds}", recalls)
    print_table(f"held-out text, seeds {seeds}", bits_per_byte, "{:.3f}", scale=1)


if __name__ == "__main__":
    main()
