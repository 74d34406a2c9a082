"""Reward models (§3.2.2): margin, safety loss, initialization, amount of data, epochs.

python -m bench.rewards [--seeds 1 2 3]
"""

from bench import OUT, append_rows, evaluate, parse_args, print_table, run_paper, train
from llama2 import Transformer, load, save

VARIANTS = {  # name -> (kind, options, fraction of the pairs)
    "as in paper.sh": ("helpfulness", [], 1),
    "margin small": ("helpfulness", ["--margin", "small"], 1),
    "margin none": ("helpfulness", ["--margin", "none"], 1),
    "from scratch": ("helpfulness", ["--init", "SCRATCH"], 1),
    "1/8 of the pairs": ("helpfulness", [], 0.125),
    "1/4 of the pairs": ("helpfulness", [], 0.25),
    "1/2 of the pairs": ("helpfulness", [], 0.5),
    "two epochs": ("helpfulness", ["--epochs", 2], 1),
    "safety, as in paper.sh": ("safety", [], 1),
    "safety, without its loss": ("safety", ["--aux-weight", 0], 1),
    "safety, from scratch": ("safety", ["--init", "SCRATCH"], 1),
}


def make_scratch(start, folder):
    """Save an untrained model of the same shape; returns its folder."""
    model, tok = load(start / "sft")
    save(folder, Transformer(model.args), tok)
    return folder


def main():
    _, seeds = parse_args(__doc__)
    accuracies, separations = {}, {}
    for seed in seeds:
        start = run_paper(seed)
        scratch = make_scratch(start, OUT / f"rewards/{seed}/scratch")
        for name, (kind, options, fraction) in VARIANTS.items():
            out = OUT / f"rewards/{seed}/{name.replace(' ', '-').replace('/', '-')}"
            options = [scratch if word == "SCRATCH" else word for word in options]
            options = ["--out", out, "--seed", seed, *options]
            pairs = [f"{start}/preferences/v1.jsonl:{fraction}"]
            pairs += [f"{start}/tinytown/contrasts.jsonl:{fraction}"]
            init = start / "sft"
            train("train_rm.py", "--kind", kind, "--init", init, "--data", *pairs, *options)
            test = start / "preferences/test.jsonl"
            results = evaluate("evaluate.reward_models", out / kind, "--data", test)
            for key, row in results.items():
                if key == f"{kind} pairs, {kind}":
                    append_rows(accuracies, {name: row})
                elif kind == "safety" and key.startswith("separation"):
                    append_rows(separations, {name: row})
    print_table(f"accuracy on pairs, %, seeds {seeds}", accuracies)
    print_table(f"detecting unsafe answers, %, seeds {seeds}", separations)


if __name__ == "__main__":
    main()
