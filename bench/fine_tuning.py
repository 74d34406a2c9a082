"""SFT (§3.1): the base model, loss on prompts too, few clean dialogues and many noisy ones.

python -m bench.fine_tuning [--seeds 1 2 3]
"""

from bench import OUT, append_rows, evaluate, parse_args, print_table, run, run_paper, train

CLEAN, NOISY = 960, 9600
# name -> (options of tinytown, options of train_sft.py, weight of the texts of pretraining). All
# variants see about as many tokens: with ten times the epochs, the weight is a tenth.
VARIANTS = {
    "SFT": ([], [], 2),
    "loss on prompts too": ([], ["--no-mask-prompts"], 2),
    f"{CLEAN} clean": (["--dialogues", CLEAN], ["--epochs", 20], 0.2),
    f"{NOISY} half bad": (["--dialogues", NOISY, "--noise", 0.5], [], 2),
}


def main():
    _, seeds = parse_args(__doc__)
    columns = {"greedy": {}, "sampled at T=1": {}}
    for seed in seeds:
        start = run_paper(seed)
        models = {"base": start / "pretrain"}
        for name, (town_options, options, weight) in VARIANTS.items():
            folder = OUT / f"fine-tuning/{seed}/{name.replace(' ', '-')}"
            town, data = folder / "tinytown", folder / "tinytown/dialogues.jsonl"
            run("-m", "tinytown", town, "--seed", seed, *town_options)
            options = ["--out", folder, "--seed", seed, *options]
            options += ["--data", data, f"{town}/replay.jsonl:{weight}"]
            train("train_sft.py", "--init", start / "pretrain", *options)
            models[name] = folder
        options = ["--seed", seed, "--prompts", start / "tinytown/held-out.jsonl"]
        results = evaluate("evaluate.answers", *models.values(), *options)
        results.pop("n")
        # The results have two columns per model, greedy and sampled, named after its folder.
        rows = list(results.values())
        append_rows(columns["greedy"], dict(zip(models, rows[::2])))
        append_rows(columns["sampled at T=1"], dict(zip(models, rows[1::2])))
    for mode, modes_columns in columns.items():
        print_table(f"{mode}, %, seeds {seeds}", modes_columns)


if __name__ == "__main__":
    main()
