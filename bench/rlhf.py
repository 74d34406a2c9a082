"""RLHF (§3.2.3, §3.4): the scoreboard over seeds, reward hacking, forgetting, Fig. 7 and 8.

    python -m bench.rlhf seeds [--seeds 1 2 3]   the scoreboard: mean and spread
    python -m bench.rlhf hacking                 PPO without its penalty: reward against truth
    python -m bench.rlhf forgetting              the pool of all versions against the last alone
    python -m bench.rlhf curves --seeds 1        reward by number of samples, by temperature
"""
import json
from pathlib import Path

from bench import OUT, figures, paper, print_table, seeds_of, train

VERSIONS = (1, 2, 3, 4)     # by rejection sampling


def scoreboard(seeds):
    boards = [json.loads((paper(seed) / "scoreboard.json").read_text()) for seed in seeds]
    for mode in boards[0]:
        shares, others = {}, {}
        for board in boards:
            for name, row in board[mode].items():
                numbers = {key: value for key, value in row.items() if isinstance(value, float)}
                plain = {key: numbers.pop(key, None) for key in ("points", "length", "kl", "ac2")}
                shares.setdefault(name, []).append(numbers)
                others.setdefault(name, []).append(plain)
        print_table(f"{mode}, %, seeds {seeds}", shares)
        print_table(f"{mode}, seeds {seeds}", others, "{:.2f}", scale=1)


def hacking(seeds):
    variants = {"default": [], "beta 0": ["--beta", 0],
                "beta 0, 4 x lr": ["--beta", 0, "--lr", 2e-4]}
    columns = {}
    for seed in seeds:
        start = paper(seed)
        town = start / "tinytown"
        for name, options in variants.items():
            out = OUT / f"hacking/{seed}/{name.replace(' ', '-').replace(',', '')}"
            train("train_rlhf.py", "--method", "ppo", "--init", start / "rlhf/v4", "--rm",
                  start / "rm/v5", "--prompts", town / "prompts-v5.jsonl", "--val-prompts",
                  town / "prompts-val.jsonl", "--patience", 1000, "--seed", seed, "--out", out,
                  *options)
            found = figures("evaluate.answers", "--samples", out / "samples.jsonl", "--prompts",
                            town / "prompts-val.jsonl")
            rows = {}
            for step, row in found.items():
                rows[f"{step}: reward"] = row["reward"]
                rows[f"{step}: truth"] = row["truth"]
            columns.setdefault(name, []).append(rows)
    print_table(f"iteration: logit(Rc) and points, seeds {seeds}", columns, "{:.2f}", scale=1)


def forgetting(seeds):
    columns = {}
    for seed in seeds:
        start, chat = paper(seed), paper(seed) / "sft"
        alone = []
        for version in VERSIONS:
            out = OUT / f"forgetting/{seed}/v{version}"
            train("train_rlhf.py", "--init", chat, "--rm", start / f"rm/v{version}", "--prompts",
                  start / f"tinytown/prompts-v{version}.jsonl", "--seed", seed, "--out", out)
            alone.append(out)
            chat = out
        for pool, folders in (("all", [start / f"rlhf/v{v}" for v in VERSIONS]), ("last", alone)):
            board = figures("evaluate.scoreboard", *folders, "--against", start / "sft", "--rm",
                            start / "rm/v5", "--prompts", start / "tinytown/held-out.jsonl")
            rows = list(board["sampled"].values())[:len(VERSIONS)]
            for version, row in zip(VERSIONS, rows):
                column = columns.setdefault(f"{pool}, V{version}", [])
                column.append(row["by topic"] | {"points x 100": row["points"]})
    print_table(f"right answers by topic, %, seeds {seeds}", columns)


def curves(seeds):
    """Fig. 7: the best and the median of N samples; Fig. 8: the best by temperature."""
    from data.records import read_prompts
    from llama2 import load
    from train_rlhf import Settings, load_reward_models, sample_k
    start, config, found = paper(seeds[0]), Settings(samples=64), {}
    for name, folder in (("SFT", "sft"), ("V5", "rlhf/v5")):
        policy, tok = load(start / folder)
        models = load_reward_models(start / "rm/v5", policy, tok, start / folder)
        prompts = read_prompts([start / "tinytown/prompts-val.jsonl"], tok, 256)[:64]
        for temperature in (0.6, 0.8, 1.0, 1.2, 1.4):
            _, _, rewards = sample_k(policy, tok, models, prompts, temperature, 1, config)
            for n in (1, 2, 4, 8, 16, 32, 64):
                few = rewards[:, :n]
                row = found.setdefault(f"{name}, T={temperature}", [{}])[0]
                row[f"best of {n}"] = few.amax(1).mean().item()
                row[f"median of {n}"] = few.median(1).values.mean().item()
    print_table("logit(Rc), Fig. 7 and 8", found, "{:.2f}", scale=1)
    Path(OUT / "curves.json").write_text(json.dumps(found, indent=1))


def main():
    parts = {"seeds": scoreboard, "hacking": hacking, "forgetting": forgetting, "curves": curves}
    part, seeds = seeds_of(__doc__, parts)
    parts[part](seeds)


if __name__ == "__main__":
    main()
