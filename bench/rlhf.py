"""The tables and curves of README.md on §3.2.3 and §3.4, after `make` or for several seeds.

    python bench/rlhf.py seeds [--seeds 1 2 3]   the scoreboard of whole runs: mean and spread
    python bench/rlhf.py hacking     PPO without the KL penalty beside the default, after `seeds`
    python bench/rlhf.py forgetting  the pool of all versions against the last version's alone
    python bench/rlhf.py curves      Fig. 7 and 8, after `make`: reward by samples and temperature

Data go to FOLDER (default out/bench-rlhf). `seeds` takes bases, chat models and reward models from
where bench/upsampling.py, bench/sft.py and bench/rm.py leave them ({} is the seed).
"""
import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import train_rlhf as rlhf
from tinytown import world as tinytown
from llama2 import load, write_json

COLUMNS = {     # of the scoreboard -> heading; those in PLAIN are no shares
    "helpfulness": "points of 4.5", "win rate": "wins against SFT", "ac2": "AC2",
    "helpfulness model": "by Rh", "safety model": "by Rs", "correct": "correct",
    "violations": "violations", "false_refusals": "false refusals", "length": "tokens",
    "distinct": "distinct", "kl": "KL to SFT"}
PLAIN = ("helpfulness", "length", "kl", "ac2")
N_MAX, TEMPERATURES = 64, (0.6, 0.8, 1.0, 1.2, 1.4)


def settings(given, seed=1, **changes):
    return rlhf.Settings(init=given.chats.format(seed), base=given.bases.format(seed),
                         rm=given.rms.format(seed), seed=seed, overwrite=True, **changes)


def table(runs) -> list[str]:
    """Mean ± standard deviation over runs of {row: {column: value}}, as Markdown."""
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row in runs[0]:
        cells = []
        for column in COLUMNS:
            values = [run[row][column] for run in runs]
            scale, form = ((1, "{:.2f} ± {:.2f}") if column in PLAIN
                           else (100, "{:.1f} ± {:.1f}%"))
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


def curves(given, out):
    config = rlhf.Settings(samples=N_MAX)      # of what make left
    _, tok = load(config.init)
    judges = rlhf.load_judges(config.rm, "cpu")
    prompts = rlhf.draw_prompts(config, 0, 64, tok, 256)
    found = {"fig7": {}, "fig8": {}}
    for name, folder in (("SFT", config.init), ("RLHF", f"{config.out}/v{config.versions + 1}")):
        for temperature in TEMPERATURES:
            model, _ = load(folder)
            rewards = rlhf.sample_best(model, tok, judges, prompts, temperature, config, 1)[1]
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
    """PPO from V4 with the penalty, as in the whole runs, and without: held-out prompts' reward by
    the reward models, and in truth."""
    for name, changes in (("default", None), ("beta 0", dict(beta=0.0)),
                          ("beta 0, 4 x lr", dict(beta=0.0, lr=2e-4))):
        for seed in given.seeds:
            run = out / f"seed-{seed}"
            folder = run / "v5"
            if changes:
                folder = out / f"hacking-{name.replace(' ', '-').replace(',', '')}-{seed}"
                policy, tok = load(run / "v4")
                rlhf.one_version(settings(given, seed, patience=1000, **changes), "ppo", folder, 5,
                                 policy, tok, rlhf.load_judges(run / "v5/rm", "cpu"), (), None)
            print(f"\n{name}, seed {seed}: iteration, KL, reward, truth, length")
            for row in map(json.loads, (folder / "metrics.jsonl").open()):
                if "truth" in row:
                    print(row["step"], *(f"{row.get(key, float('nan')):.2f}"
                                         for key in ("kl", "held_out", "truth", "length")),
                          flush=True)


def forgetting(given, out):
    """V1 to V4 on the pool of all versions, as in the whole runs, and of the last alone."""
    kinds, points = list(tinytown.KINDS), {}
    for seed in given.seeds:
        alone = settings(given, seed, pool="last", iterations=0, out=str(out / f"last-{seed}"))
        if not (Path(alone.out) / "v4").exists():
            rlhf.run_versions(alone, Path(alone.out), torch.device("cpu"), 0, 1, print)
        for pool, folder in (("all", out / f"seed-{seed}"), ("last", Path(alone.out))):
            for version in range(1, alone.versions + 1):
                model, tok = load(folder / f"v{version}")
                asked = rlhf.read_prompts((("", p) for p in tinytown.held_out_prompts(
                    tinytown.town(seed), rlhf.HELD_OUT_OF_A_KIND)), tok, model.args.max_seq_len)
                ids = rlhf.sample_answers(model, asked, 1.0, alone, 1, tok.eos_id)
                found = {kind: [] for kind in kinds}
                for p, a in zip(asked, ids):
                    text = rlhf.text_after(tok, p["tokens"], a)
                    found[p["kind"]].append(tinytown.quality(p, text))
                points.setdefault((pool, version), []).append(
                    [statistics.mean(found[kind]) for kind in kinds])
    print("| pool, version |", " | ".join(kinds), "|")
    for (pool, version), rows in points.items():
        cells = [f"{statistics.mean(c):.2f} ± {statistics.stdev(c) if len(c) > 1 else 0:.2f}"
                 for c in zip(*rows)]
        print(f"| {pool}, V{version} |", " | ".join(cells), "|")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("seeds", "curves", "hacking", "forgetting"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--bases", default="out/upsampling/weight-8-seed-{}")
    parser.add_argument("--chats", default="out/bench-sft/SFT-{}")
    parser.add_argument("--rms", default="out/bench-rm/{}")
    parser.add_argument("--out", default="out/bench-rlhf")
    given = parser.parse_args()
    Path(given.out).mkdir(parents=True, exist_ok=True)
    dict(seeds=seeds, curves=curves, hacking=hacking, forgetting=forgetting)[given.what](
        given, Path(given.out))


if __name__ == "__main__":
    main()
