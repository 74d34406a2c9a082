"""RLHF (§3.2.3, §3.4): the scoreboard over several seeds, reward hacking, forgetting, Fig. 7 and 8.

python -m bench.rlhf seeds [--seeds 1 2 3]   the scoreboard: mean and standard deviation
python -m bench.rlhf control                 PPO, rejection sampling and random answers
python -m bench.rlhf starts                  PPO from SFT and from V1 to V4
python -m bench.rlhf contrasts               reward models without the pairs that annotators wrote
python -m bench.rlhf hacking                 PPO without the KL penalty: reward against truth
python -m bench.rlhf forgetting              pool of all versions, or only the last version
python -m bench.rlhf curves                  reward by number of samples and by temperature

`hacking` also writes out/bench/hacking.json, `curves` writes out/bench/curves.json.
"""

from pathlib import Path

from bench import (
    OUT,
    append_rows,
    evaluate,
    margin,
    parse_args,
    print_table,
    read_results,
    run_paper,
    train,
)
from data.formats import KINDS
from data.records import read_prompts
from llama2 import load, write_json
from train_rlhf import load_reward_models, sample_k

VERSIONS = (1, 2, 3, 4)  # of rejection sampling
V1_LR = 5e-4  # of V1's reward models in paper.sh


def scoreboard(seeds):
    """The scoreboard of paper.sh, over seeds."""
    boards = [read_results(seed, "scoreboard") for seed in seeds]
    for mode in ("greedy", "chat", "sampled"):  # python -m bench.use prints "direct"
        percentages, others = {}, {}
        for board in boards:
            for name, metrics in board[mode].items():
                row = {key: value for key, value in metrics.items() if isinstance(value, float)}
                other = {key: row.pop(key, None) for key in ("points", "length", "kl", "ac2")}
                append_rows(percentages, {name: row})
                append_rows(others, {name: other})
        print_table(f"{mode}, %, seeds {seeds}", percentages)
        print_table(f"{mode}, seeds {seeds}", others, "{:.2f}", scale=1)


def hacking(seeds):
    """Reward hacking: without the KL penalty the reward rises while the true quality falls.

    Writes {variant: [{step: {"reward", "truth", "kl"}} of each seed]}.
    """
    variants = {
        "default": [],
        "beta 0": ["--beta", 0],
        "beta 0, 4 x lr": ["--beta", 0, "--lr", 2.8e-4],
    }
    columns, curves = {}, {}
    for seed in seeds:
        start = run_paper(seed)
        town = start / "tinytown"
        val_prompts = ["--val-prompts", town / "prompts-val.jsonl"]
        for name, options in variants.items():
            out = OUT / f"hacking/{seed}/{name.replace(' ', '-').replace(',', '')}"
            models = ["--init", start / "rlhf/v4", "--rm", start / "rm/v5"]
            data = ["--prompts", town / "prompts-v5.jsonl", *val_prompts]
            # The patience is large enough that early stopping cannot hide the effect.
            options = ["--patience", 1000, "--seed", seed, "--out", out, *options]
            train("train_rlhf.py", "--method", "ppo", *models, *data, *options)
            data = ["--samples", out / "samples.jsonl", "--prompts", town / "prompts-val.jsonl"]
            row, curve = {}, {}
            for step, metrics in evaluate("evaluate.answers", *data).items():
                curve[step] = {key: metrics.get(key) for key in ("reward", "truth", "kl")}
                row[f"{step}: reward"] = metrics["reward"]
                row[f"{step}: truth"] = metrics["truth"]
            append_rows(columns, {name: row})
            append_rows(curves, {name: curve})
    print_table(f"iteration: logit(Rc) and points, seeds {seeds}", columns, "{:.2f}", scale=1)
    write_json(OUT / "hacking.json", curves)


def forgetting(seeds):
    """Fine-tuning on the best answers of all versions, or only of the last, which forgets more."""
    columns = {}
    for seed in seeds:
        start, chat = run_paper(seed), run_paper(seed) / "sft"
        without_pool = []
        for version in VERSIONS:
            out = OUT / f"forgetting/{seed}/v{version}"
            models = ["--init", chat, "--rm", start / f"rm/v{version}"]
            data = ["--prompts", start / f"tinytown/prompts-v{version}.jsonl"]
            train("train_rlhf.py", *models, *data, "--seed", seed, "--out", out)
            without_pool.append(out)
            chat = out
        with_pool = [start / f"rlhf/v{version}" for version in VERSIONS]
        for pool, folders in (("all", with_pool), ("last", without_pool)):
            options = ["--against", start / "sft", "--rm", start / "rm/v5"]
            options += ["--prompts", start / "tinytown/held-out.jsonl"]
            results = evaluate("evaluate.scoreboard", *folders, *options)["sampled"]
            for version, metrics in zip(VERSIONS, results.values()):
                row = metrics["by topic"] | {"points x 100": metrics["points"]}
                append_rows(columns, {f"{pool}, V{version}": row})
    print_table(f"right answers by topic, %, seeds {seeds}", columns)


def train_version(out, start, seed, first: str, rm, prompts: str, *options):
    """Train one version from the model in start/first, with the reward models in `rm`.

    By rejection sampling, unless the options give another method. Returns its folder, `out`.
    """
    town = start / "tinytown"
    models = ["--init", start / first, "--rm", rm]
    data = ["--prompts", town / f"{prompts}.jsonl", "--val-prompts", town / "prompts-val.jsonl"]
    train("train_rlhf.py", *models, *data, "--seed", seed, "--out", out, *options)
    return out


def compare(columns: dict, start, *folders):
    """Append the wins of each of these models against each one named before it."""
    options = ["--against", folders[0], "--rm", start / "rm/v5", "--all-pairs"]
    options += ["--prompts", start / "tinytown/held-out.jsonl"]
    for mode, comparisons in evaluate("evaluate.scoreboard", *folders, *options)["direct"].items():
        row = {pair: metrics["wins"] for pair, metrics in comparisons.items()}
        append_rows(columns, {mode: row})


def control(seeds):
    """What does PPO bring, and what do the best answers bring? At equal numbers of samples."""
    from_sft, from_v4 = {}, {}
    for seed in seeds:
        start, out = run_paper(seed), OUT / f"control/{seed}"
        few = "prompts-v5-rejection"  # 8 answers to each prompt: as many samples as PPO takes
        shared = start, seed, "sft", start / "rm/v1"
        random = train_version(out / "random-answers", *shared, few, "--samples", 1)
        best = train_version(out / "rejection-sampling", *shared, few)
        ppo = train_version(out / "ppo", *shared, "prompts-v5", "--method", "ppo")
        compare(from_sft, start, start / "sft", random, best, ppo)
        rlhf = start / "rlhf"
        compare(from_v4, start, rlhf / "v4", rlhf / "v5-rejection", rlhf / "v5")
    title = f"wins, ties half, % with 95% margin, seeds {seeds}"
    print_table(f"from SFT, {title}", from_sft, spread=margin)
    print_table(f"from V4, {title}", from_v4, spread=margin)


def contrasts(seeds):
    """Reward models without the pairs that annotators wrote: what does PPO then find (§4.2.3)?"""
    columns = {}
    for seed in seeds:
        start, out = run_paper(seed), OUT / f"contrasts/{seed}"
        for kind in KINDS:
            data = ["--data", start / "preferences/v1.jsonl", "--lr", V1_LR]
            options = ["--init", start / "sft", "--seed", 100 * seed + 1, "--out", out / "rm"]
            train("train_rm.py", "--kind", kind, *data, *options)
        folders = {}
        for name, rm, version in (
            ("with", start / "rm/v1", OUT / f"control/{seed}/ppo"),  # the same run as in control
            ("without", out / "rm", out / "ppo"),
        ):
            options = rm, "prompts-v5", "--method", "ppo"
            folders[name] = train_version(version, start, seed, "sft", *options)
        options = ["--against", start / "sft", "--rm", start / "rm/v5"]
        options += ["--prompts", start / "tinytown/held-out.jsonl"]
        results = evaluate("evaluate.scoreboard", *folders.values(), *options)["chat"]
        for name, metrics in zip(folders, results.values()):
            row = {key: metrics[key] for key in ("correct", "violations", "false refusals")}
            by_topic = {f"{topic} right": value for topic, value in metrics["by topic"].items()}
            append_rows(columns, {name: row | by_topic | {"points x 100": metrics["points"]}})
    print_table(f"PPO from SFT, as the chat samples, %, seeds {seeds}", columns)


def starts(seeds):
    """Where should PPO start? From each version, with the reward models of the next one."""
    columns = {}
    for seed in seeds:
        start, out, folders = run_paper(seed), OUT / f"starts/{seed}", []
        for version, first in enumerate(["sft", "rlhf/v1", "rlhf/v2", "rlhf/v3", "rlhf/v4"], 1):
            options = [start / f"rm/v{version}", "prompts-v5", "--method", "ppo"]
            folder = out / f"ppo-from-{Path(first).name}"
            folders += [start / first, train_version(folder, start, seed, first, *options)]
        compare(columns, start, *folders)
    print_table(f"wins, ties half, % with 95% margin, seeds {seeds}", columns, spread=margin)


def curves(seeds):
    """Fig. 7: maximum and median reward of N samples. Fig. 8: the same by temperature."""
    K, max_new_tokens, n_prompts = 64, 90, 64
    columns = {}
    for seed in seeds:
        start = run_paper(seed)
        for name, folder in (("SFT", "sft"), ("V5", "rlhf/v5")):
            policy, tok = load(start / folder)
            reward_models = load_reward_models(start / "rm/v5", policy, tok, start / folder)
            prompts = read_prompts([start / "tinytown/prompts-val.jsonl"], tok, 512)[:n_prompts]
            for temperature in (0.6, 0.8, 1.0, 1.2, 1.4):
                sampling = K, max_new_tokens, temperature, seed
                _, _, rewards = sample_k(policy, tok, reward_models, prompts, *sampling)
                row = {}
                for n in (1, 4, 16, 64):
                    first_n = rewards[:, :n]  # (prompts, n)
                    row[f"maximum of {n}"] = first_n.amax(1).mean().item()
                    row[f"median of {n}"] = first_n.quantile(0.5, 1).mean().item()
                append_rows(columns, {f"{name}, T={temperature}": row})
    title = f"logit(Rc) by number of samples and temperature, seeds {seeds}"
    print_table(title, columns, "{:.2f}", scale=1)
    write_json(OUT / "curves.json", columns)


def main():
    parts = {
        "seeds": scoreboard,
        "control": control,
        "starts": starts,
        "contrasts": contrasts,
        "hacking": hacking,
        "forgetting": forgetting,
        "curves": curves,
    }
    part, seeds = parse_args(__doc__, parts)
    parts[part](seeds)


if __name__ == "__main__":
    main()
