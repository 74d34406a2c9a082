"""The evaluations of paper.sh after each stage, over several seeds: mean and standard deviation.

    python -m bench.stages [--seeds 1 2 3]

It reads what paper.sh wrote into results/.
"""

from bench import append_rows, parse_args, print_table, read_results
from data.formats import KINDS


def read_answers(seed: int, name: str) -> dict:
    """{"MODEL" or "MODEL, T=1": {row: fraction}} on the held-out prompts."""
    results = read_results(seed, name)
    results.pop("n")
    return results


def main():
    _, seeds = parse_args(__doc__)
    recalls, sft, reward_models, scoreboard, ghost = [], {}, {}, {}, {}
    for seed in seeds:
        recalls.append({"facts recalled": read_results(seed, "recall")["pretrain"]})
        append_rows(sft, read_answers(seed, "sft"))

        results = read_results(seed, "reward-models")
        for kind in KINDS:
            row = results[f"{kind} pairs, {kind}"]
            if kind == "safety":
                row = row | {"auc": results["separation, safety"]["auc"]}
            perfect = results[f"{kind} pairs, a perfect model"]
            append_rows(reward_models, {f"{kind} model": row, f"perfect, {kind}": perfect})

        for name, metrics in read_results(seed, "scoreboard")["chat"].items():
            keys = ("wins", "correct", "violations", "declines", "false refusals", "distinct")
            row = {key: metrics[key] for key in keys}
            append_rows(scoreboard, {name: row | {"points x 100": metrics["points"]}})
        append_rows(ghost, read_answers(seed, "gatt"))
    print_table(f"after pretraining, %, seeds {seeds}", {"base": recalls})
    print_table(f"fine-tuning, %, seeds {seeds}", sft)
    print_table(f"Table 8, %, seeds {seeds}", reward_models)
    print_table(f"scoreboard, as the chat samples, %, seeds {seeds}", scoreboard)
    print_table(f"without an instruction, %, seeds {seeds}", ghost)


if __name__ == "__main__":
    main()
