"""The tables of README.md on §3.2.2: accuracy by rating, and what margin, safety loss, chat
checkpoint, amount of data and a second epoch bring.

    python bench/rm.py [--seeds 1 2 3] [--bases F{}] [--chats F{}] [--out FOLDER]

Bases and chat models are those that bench/upsampling.py and bench/sft.py leave ({} is the seed).
"""
import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_rm as rm
from llama2 import load, read_json

VARIANTS = {    # name -> (which model, changed settings, share of the pairs)
    "margin none": ("helpfulness", dict(margin="none"), 1),
    "margin small": ("helpfulness", dict(margin="small"), 1),
    "from scratch": ("helpfulness", dict(init="none"), 1),
    "1/8 of the pairs": ("helpfulness", {}, 1 / 8),
    "1/4 of the pairs": ("helpfulness", {}, 1 / 4),
    "1/2 of the pairs": ("helpfulness", {}, 1 / 2),
    "two epochs": ("helpfulness", dict(epochs=2.0), 1),
    "no safety loss": ("safety", dict(aux_weight=0.0), 1),
    "from scratch, safety": ("safety", dict(init="none"), 1),
}


def measure(model, kind, val):
    """{group: accuracy} of one model on the held-out pairs of its own kind, and its separation."""
    own = [p for p in val if p["kind"] == kind]
    scores = rm.scores_of(model, own)
    out = {group: right / n for group, (right, n) in rm.accuracy(own, scores).items()}
    return out | (rm.separation(own, scores) if kind == "safety" else {})


def one_seed(config):
    """{name: measures} of the full models and of each variant, all on the same pairs."""
    full = rm.main(config)["judged"]
    out = Path(config.out)
    results = {name: row for name, row in full.items() if isinstance(row, dict)}
    results.pop("separation")
    results |= {name: {"significantly": share} for name, share in full.items()
                if isinstance(share, float)}
    context, tok = (lambda m, t: (m.args.max_seq_len, t))(*load(config.chat))
    train, val = (rm.read_pairs(read_json(out / name), tok, context)[0]
                  for name in ("preferences.jsonl", "new-prompts.jsonl"))
    for kind in rm.KINDS:
        results[f"as it is, {kind}"] = measure(load(out / kind)[0], kind, val)
    for name, (kind, changes, share) in VARIANTS.items():
        c = replace(config, **changes)
        model, _ = rm.reward_model(c.init, c.chat, "cpu", c.seed)
        some = train[:round(share * len(train))]
        rm.train_reward_model(model, rm.mix(some, kind, c.seed), kind, c)
        results[name] = measure(model, kind, val)
        print(f"seed {c.seed}, {name}: " + ", ".join(
            f"{group} {value:.3f}" for group, value in results[name].items()), flush=True)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--bases", default="out/upsampling/weight-8-seed-{}")
    parser.add_argument("--chats", default="out/bench-sft/SFT-{}")
    parser.add_argument("--out", default="out/bench-rm")
    given = parser.parse_args()
    runs = []
    for seed in given.seeds:
        chat = given.chats.format(seed)
        runs.append(one_seed(rm.Settings(init=chat, chat=chat, base=given.bases.format(seed),
                                         seed=seed, out=f"{given.out}/{seed}", overwrite=True)))
    print(f"\nseeds {given.seeds}: mean ± standard deviation, %")
    groups = list(dict.fromkeys(group for row in runs[0].values() for group in row))
    print("| |", " | ".join(groups), "|")
    print("|---|" + "---|" * len(groups))
    for name in runs[0]:
        cells = []
        for group in groups:
            values = [100 * run[name][group] for run in runs if group in run[name]]
            spread = statistics.stdev(values) if len(values) > 1 else 0
            cells.append(f"{statistics.mean(values):.1f} ± {spread:.1f}" if values else "")
        print(f"| {name} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
