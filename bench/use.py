"""How the models of paper.sh do in use, over several seeds.

    python -m bench.use [--seeds 1 2 3]

Direct comparisons of versions (mean and 95% margin over seeds), conversations of eight turns and
what the reward models know (mean and standard deviation). It reads what paper.sh wrote into
results/: scoreboard.json, conversations.json and knowledge.json.
"""

from bench import append_rows, margin, parse_args, print_table, read_results
from evaluate.conversations import in_role_after_stop


def add_comparisons(columns: dict, direct: dict[str, dict]):
    """Wins and ties of each pair of versions, in each way of sampling."""
    for mode, comparisons in direct.items():
        row = {pair: metrics["wins"] for pair, metrics in comparisons.items()}
        ties = {f"{pair}, equal": metrics["equal"] for pair, metrics in comparisons.items()}
        append_rows(columns, {mode: row | ties})


def add_conversations(columns: dict, results: dict[str, dict]):
    """Correct answers at the first, fourth and last turn; answers in a role; repeats."""
    for name, groups in results.items():
        for group, metrics in groups.items():
            correct = metrics["correct"]
            row = {f"correct at turn {turn}": correct[turn - 1] for turn in (1, 4, len(correct))}
            row["in a role, not the one in force"] = metrics["in role, all turns"]
            row["in a role after it was taken back"] = in_role_after_stop(metrics)
            row["repeats"] = metrics["repeats"]
            row["obeys the instruction in force"] = metrics["obeyed, all turns"]
            append_rows(columns, {f"{name}, {group}": row})


def add_scores(columns: dict, results: dict[str, dict]):
    """The mean score of correct answers by turn."""
    for name, groups in results.items():
        for group, metrics in groups.items():
            row = {f"turn {turn + 1}": score for turn, score in enumerate(metrics["score"])}
            append_rows(columns, {f"{name}, {group}": row})


def add_knowledge(columns: dict, results: dict[str, dict]):
    """{judge: {"TOPIC, GROUP": fraction}} of one of the two tables of evaluate.knowledge."""
    judges = {}
    for group, topics in results.items():
        for topic, fractions in topics.items():
            for judge, (value, _) in fractions.items():
                judges.setdefault(judge, {})[f"{topic}, {group}"] = value
    append_rows(columns, judges)


def main():
    _, seeds = parse_args(__doc__)
    direct, conversations, scores, pairs, best = {}, {}, {}, {}, {}
    for seed in seeds:
        add_comparisons(direct, read_results(seed, "scoreboard")["direct"])
        results = read_results(seed, "conversations")
        add_conversations(conversations, results)
        add_scores(scores, results)
        results = read_results(seed, "knowledge")
        add_knowledge(pairs, results["pairs"])
        add_knowledge(best, results["best of K"])
    print_table(f"wins and ties, % with 95% margin, seeds {seeds}", direct, spread=margin)
    print_table(f"conversations, %, seeds {seeds}", conversations)
    print_table(f"score of correct answers, seeds {seeds}", scores, "{:.2f}", scale=1)
    print_table(f"right above wrong, %, seeds {seeds}", pairs)
    print_table(f"right answers, best of K, %, seeds {seeds}", best)


if __name__ == "__main__":
    main()
