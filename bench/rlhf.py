"""The tables and curves of README.md on §3.2.3 and §3.4, after `make` or for several seeds.

    python bench/rlhf.py seeds [--seeds 1 2 3]   the scoreboard of whole runs: mean and spread
    python bench/rlhf.py curves      Fig. 7 and 8: reward by samples, and by temperature
    python bench/rlhf.py hacking     PPO without the KL penalty beside the default run
    python bench/rlhf.py forgetting  the pool of all versions against the last version's alone

Data go to FOLDER (default out/bench-rlhf). `seeds` takes bases, chat models and reward models from
where bench/upsampling.py, bench/sft.py and bench/rm.py leave them ({} is the seed).
"""
import argparse
import copy
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import train_rlhf as rlhf
from data import tinytown
from llama2 import load, write_json

POINTS = {"helpfulness": 1, "length": 1, "kl": 1, "ac2": 1}     # the other columns are shares
N_MAX, TEMPERATURES = 64, (0.6, 0.8, 1.0, 1.2, 1.4)


def settings(given, seed=1, **changes):
    return rlhf.Settings(init=given.chats.format(seed), base=given.bases.format(seed),
                         rm=given.rms.format(seed), seed=seed, overwrite=True, **changes)


def table(runs) -> list[str]:
    """Mean ± standard deviation over runs of {row: {column: value}}, as Markdown."""
    columns = [c for c in ("helpfulness", "win rate", "ac2", "helpfulness model", "safety model",
                           "correct", "violations", "false_refusals", "length", "distinct", "kl")]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in runs[0]:
        cells = []
        for column in columns:
            values = [run[row][column] for run in runs]
            scale, form = (1, "{:.2f} ± {:.2f}") if column in POINTS else (100, "{:.1f} ± {:.1f}%")
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(form.format(scale * statistics.mean(values), scale * spread))
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return lines


def seeds(given, out):
    runs = []
    for seed in given.seeds:
        config = settings(given, seed, out=str(out / f"seed-{seed}"),
                          scoreboard=str(out / f"scoreboard-{seed}.json"))
        if not (out / f"seed-{seed}" / "summary.txt").exists():
            rlhf.main(config)
        runs.append(json.loads(Path(config.scoreboard).read_text()))
    for mode in runs[0]:
        print(f"\n{mode}, seeds {given.seeds}\n" + "\n".join(table([run[mode] for run in runs])))


def rewards_at(folder, given, temperature, config, prompts, tok, judges):
    model, _ = load(folder)
    return rlhf.sample_best(model, tok, judges, prompts, temperature, config, 1)[1]


def curves(given, out):
    config = settings(given, samples=N_MAX)
    _, tok = load(config.init)
    judges = rlhf.load_judges(config.rm, "cpu")
    prompts = rlhf.draw_prompts(config, 0, 64, tok, 256)
    found = {"fig7": {}, "fig8": {}}
    for name, folder in (("SFT", config.init), ("RLHF", given.rlhf)):
        for temperature in TEMPERATURES:
            rewards = rewards_at(folder, given, temperature, config, prompts, tok, judges)  # (N, 64)
            for n in (1, 2, 4, 8, 16, 32, 64):
                some = rewards[:, :n]
                row = dict(max=some.amax(1).mean().item(),
                           median=some.quantile(0.5, 1).mean().item())
                found["fig8"].setdefault(name, {}).setdefault(n, {})[temperature] = row["max"]
                if temperature == 1.0:
                    found["fig7"].setdefault(name, {})[n] = row
    for figure, data in found.items():
        write_json(out / f"{figure}.json", data)
        print(figure, json.dumps(data, indent=1))


def hacking(given, out):
    """PPO from the last rejection-sampled version, with and without the penalty."""
    for name, changes in (("default", {}), ("no penalty", dict(beta=0.0)),
                          ("no penalty, 4 x lr", dict(beta=0.0, lr=2e-4))):
        for seed in given.seeds:
            config = settings(given, seed, patience=1000, **changes)
            version = Path(given.rlhf.format(seed)).parent
            policy, tok = load(version / f"v{config.versions}")
            newest = version / f"v{config.versions + 1}" / "rm"
            judges = rlhf.load_judges(newest if newest.exists() else config.rm, "cpu")
            folder = out / f"hacking-{name.replace(' ', '-')}-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            prompts = rlhf.draw_prompts(config, config.versions + 1,
                                        config.batch_size * config.iterations, tok, 256)
            held_out = rlhf.draw_prompts(config, 0, rlhf.VALIDATION, tok, 256)
            rlhf.ppo(policy, tok, judges, prompts, held_out, config,
                     rlhf.Log(folder, config.iterations))
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
            print(f"\n{name}, seed {seed}: iteration, KL, reward, truth, length")
            for row in rows:
                if "truth" in row:
                    print(row["step"], *(f"{row.get(key, float('nan')):.2f}"
                                         for key in ("kl", "held_out", "truth", "length")))


def forgetting(given, out):
    """Rejection sampling on the pool of all versions, and on the last version's samples alone."""
    for pool in ("all", "last"):
        for seed in given.seeds:
            config = settings(given, seed, pool=pool, iterations=0,
                              out=str(out / f"pool-{pool}-{seed}"))
            _, tok = load(config.init)
            folder = Path(config.out)
            if not (folder / "config.json").exists():
                rlhf.open_versions(config, folder, 0)
                rlhf.run_versions(config, folder, torch.device("cpu"), 0, 1, print)
            asked = rlhf.read_prompts((("", p) for p in tinytown.held_out_prompts(
                tinytown.town(seed), 120)), tok, 256)
            for version in range(1, config.versions + 1):
                model, _ = load(folder / f"v{version}")
                ids = [a[0] for a in rlhf.sample_answers(model, asked, 1, 1.0, config, 1,
                                                         tok.eos_id)]
                points = {}
                for p, a in zip(asked, ids):
                    points.setdefault(p["kind"], []).append(
                        tinytown.quality(p, rlhf.text_of(tok, p, a)))
                print(f"pool {pool}, seed {seed}, V{version}: " + ", ".join(
                    f"{kind} {statistics.mean(some):.2f}" for kind, some in points.items()),
                    flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("seeds", "curves", "hacking", "forgetting"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--bases", default="out/upsampling/weight-8-seed-{}")
    parser.add_argument("--chats", default="out/bench-sft/SFT-{}")
    parser.add_argument("--rms", default="out/bench-rm/{}")
    parser.add_argument("--rlhf", default="out/bench-rlhf/seed-{}/v5")
    parser.add_argument("--out", default="out/bench-rlhf")
    given = parser.parse_args()
    Path(given.out).mkdir(parents=True, exist_ok=True)
    dict(seeds=seeds, curves=curves, hacking=hacking, forgetting=forgetting)[given.what](
        given, Path(given.out))


if __name__ == "__main__":
    main()
