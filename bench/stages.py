"""What each stage brings, over seeds: the examinations of paper.sh, mean and spread.

    python -m bench.stages [--seeds 1 2 3]
"""
import json

from bench import figures, paper, print_table, seeds_of
from data.formats import KINDS


def answers(start, *folders):
    """{"MODEL" or "MODEL, T=1": shares} on the held-out prompts."""
    return figures("evaluate.answers", *(start / folder for folder in folders), "--prompts",
                   start / "tinytown/held-out.jsonl")


def collect(columns: dict, found: dict):
    """Put one seed's figures behind those of the others."""
    for name, row in found.items():
        columns.setdefault(name, []).append(row)


def main():
    _, seeds = seeds_of(__doc__)
    tuned, judges, board, ghost, recall = {}, {}, {}, {}, []
    for seed in seeds:
        start = paper(seed)
        town = start / "tinytown"
        found = figures("evaluate.answers", start / "pretrain", "--probes", town / "probes.jsonl")
        recall.append({"facts recalled": found["pretrain"]})
        collect(tuned, answers(start, "pretrain", "sft"))

        found = figures("evaluate.reward_models", *(start / "rm/v1" / kind for kind in KINDS),
                        "--data", start / "preferences/test.jsonl")
        auc = {"auc": found["separation, safety"]["auc"]}
        for kind in KINDS:
            collect(judges, {f"{kind} model": found[f"{kind} pairs, {kind}"],
                             f"perfect, {kind}": found[f"{kind} pairs, a perfect model"]})
        judges["safety model"][-1] |= auc

        for name, row in json.loads((start / "scoreboard.json").read_text())["sampled"].items():
            kept = {key: row[key] for key in ("wins", "correct", "violations", "false refusals",
                                              "distinct")}
            collect(board, {name: kept | {"points x 100": row["points"]}})
        collect(ghost, answers(start, "rlhf/v3", "gatt"))
    print_table(f"after pretraining, %, seeds {seeds}", {"base": recall})
    print_table(f"fine-tuning, %, seeds {seeds}", tuned)
    print_table(f"Table 8, %, seeds {seeds}", judges)
    print_table(f"scoreboard, sampled, %, seeds {seeds}", board)
    print_table(f"without an instruction, %, seeds {seeds}", ghost)


if __name__ == "__main__":
    main()
