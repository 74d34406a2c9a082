"""Base against SFT, loss on prompts too, few clean dialogues against many noisy ones (§3.1).

    python -m bench.fine_tuning [--seeds 1 2 3]
"""
from bench import OUT, figures, paper, print_table, run, seeds_of, train

CLEAN, NOISY = 480, 4800
VARIANTS = {    # each sees about as many tokens as the others: Tinytown's options, SFT's
    "SFT": ([], []),
    "loss on prompts too": ([], ["--no-mask-prompts"]),
    f"{CLEAN} clean": (["--dialogues", CLEAN], ["--epochs", 20]),
    f"{NOISY} half bad": (["--dialogues", NOISY, "--noise", 0.5], []),
}


def main():
    _, seeds = seeds_of(__doc__)
    columns = {}
    for seed in seeds:
        start = paper(seed)
        models = {"base": start / "pretrain"}
        for name, (town_options, options) in VARIANTS.items():
            folder = OUT / f"fine-tuning/{seed}/{name.replace(' ', '-')}"
            run("-m", "tinytown", folder / "tinytown", "--seed", seed, *town_options)
            train("train_sft.py", "--init", start / "pretrain", "--out", folder, "--seed", seed,
                  "--data", folder / "tinytown/dialogues.jsonl", *options)
            models[name] = folder
        found = figures("evaluate.answers", *models.values(), "--seed", seed,
                        "--prompts", start / "tinytown/held-out.jsonl")
        # The examination names a model by its folder: two columns each, greedy and sampled.
        for i, row in enumerate(found.values()):
            name = list(models)[i // 2]
            mode = "sampled at T=1" if i % 2 else "greedy"
            columns.setdefault(mode, {}).setdefault(name, []).append(row)
    for mode, table in columns.items():
        print_table(f"{mode}, %, seeds {seeds}", table)


if __name__ == "__main__":
    main()
