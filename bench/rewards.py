"""Reward models (§3.2.2): what margin, safety loss, chat model, amount of data, epochs bring.

    python -m bench.rewards [--seeds 1 2 3]
"""
from bench import OUT, figures, paper, print_table, seeds_of, train
from llama2 import Transformer, load, save

VARIANTS = {    # name -> (kind, options, share of the pairs)
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
    """A model of the same shape that knows nothing."""
    model, tok = load(start / "sft")
    save(folder, Transformer(model.args), tok)
    return folder


def main():
    _, seeds = seeds_of(__doc__)
    accuracy, separation = {}, {}
    for seed in seeds:
        start = paper(seed)
        scratch = make_scratch(start, OUT / f"rewards/{seed}/scratch")
        for name, (kind, options, share) in VARIANTS.items():
            out = OUT / f"rewards/{seed}/{name.replace(' ', '-').replace('/', '-')}"
            options = [scratch if word == "SCRATCH" else word for word in options]
            pairs = f"{start}/preferences/v1.jsonl:{share}"
            train("train_rm.py", "--kind", kind, "--init", start / "sft", "--data", pairs,
                  "--out", out, "--seed", seed, *options)
            found = figures("evaluate.reward_models", out / kind, "--data",
                            start / "preferences/test.jsonl")
            own = next(row for key, row in found.items() if key.startswith(f"{kind} pairs"))
            accuracy.setdefault(name, []).append(own)
            if kind == "safety":
                told = next(row for key, row in found.items() if key.startswith("separation"))
                separation.setdefault(name, []).append(told)
    print_table(f"pairs ordered as the annotator did, %, seeds {seeds}", accuracy)
    print_table(f"unsafe answers against safe ones, %, seeds {seeds}", separation)


if __name__ == "__main__":
    main()
