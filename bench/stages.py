"""The evaluations of paper.sh after each stage, over several seeds: mean and standard deviation.

python -m bench.stages [--seeds 1 2 3]
"""

import json

from bench import append_rows, evaluate, parse_args, print_table, run_paper
from data.formats import KINDS


def evaluate_answers(start, *folders) -> dict:
    """{"MODEL" or "MODEL, T=1": {row: fraction}} on the held-out prompts."""
    paths = [start / folder for folder in folders]
    return evaluate("evaluate.answers", *paths, "--prompts", start / "tinytown/held-out.jsonl")


def main():
    _, seeds = parse_args(__doc__)
    recalls, sft, reward_models, scoreboard, ghost = [], {}, {}, {}, {}
    for seed in seeds:
        start = run_paper(seed)
        probes = start / "tinytown/probes.jsonl"
        results = evaluate("evaluate.answers", start / "pretrain", "--probes", probes)
        recalls.append({"facts recalled": results["pretrain"]})
        append_rows(sft, evaluate_answers(start, "pretrain", "sft"))

        folders = [start / "rm/v1" / kind for kind in KINDS]
        test = start / "preferences/test.jsonl"
        results = evaluate("evaluate.reward_models", *folders, "--data", test)
        for kind in KINDS:
            row = results[f"{kind} pairs, {kind}"]
            if kind == "safety":
                row = row | {"auc": results["separation, safety"]["auc"]}
            perfect = results[f"{kind} pairs, a perfect model"]
            append_rows(reward_models, {f"{kind} model": row, f"perfect, {kind}": perfect})

        results = json.loads((start / "scoreboard.json").read_text())["chat"]
        for name, metrics in results.items():
            keys = ("wins", "correct", "violations", "declines", "false refusals", "distinct")
            row = {key: metrics[key] for key in keys}
            append_rows(scoreboard, {name: row | {"points x 100": metrics["points"]}})
        append_rows(ghost, evaluate_answers(start, "rlhf/v3", "gatt"))
    print_table(f"after pretraining, %, seeds {seeds}", {"base": recalls})
    print_table(f"fine-tuning, %, seeds {seeds}", sft)
    print_table(f"Table 8, %, seeds {seeds}", reward_models)
    print_table(f"scoreboard, as the chat samples, %, seeds {seeds}", scoreboard)
    print_table(f"without an instruction, %, seeds {seeds}", ghost)


if __name__ == "__main__":
    main()
