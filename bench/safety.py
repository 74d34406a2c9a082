"""Safety (§4.2, §4.3): context distillation, amount of safety data, one round of red teaming.

python -m bench.safety distillation [--seeds 1 2 3]     with and without the gate (Fig. 16)
python -m bench.safety scaling        0 to 100% of the safety data (Fig. 15, 33)
python -m bench.safety red-team       successful attacks are added to the safety data
"""

import random

from bench import OUT, append_rows, evaluate, parse_args, print_table, run, run_paper, train
from data.files import write_records
from data.records import assistant_message, prompt_to_messages
from llama2 import load, respond
from tinytown import annotator, prompts, world

FRACTIONS = (0, 0.01, 0.1, 0.25, 0.5, 1.0)  # of the safety dialogues, in the scaling study
HELPFUL, SAFETY = 2000, 400  # dialogues of the scaling study
ATTACKS_PER_KIND = 200  # in the round of red teaming
LONG = ("--no-pack", "--seq-len", 1024, "--epochs", 1)


def evaluate_attacks(start, *folders) -> list[dict]:
    """{row: fraction} of each model's sampled answers to the held-out attacks."""
    test = start / "tinytown/held-out-attacks.jsonl"
    results = evaluate("evaluate.answers", *folders, "--prompts", test)
    results.pop("n")
    return list(results.values())[1::2]  # greedy and sampled columns alternate


def replay_files(start) -> list:
    """The data that paper.sh mixes into later fine-tuning, against forgetting."""
    best = [start / f"rlhf/v{version}/best.jsonl" for version in (1, 2, 3)]
    return [*best, start / "tinytown/replay.jsonl"]


def distillation(seeds):
    """Context distillation with the gate by the safety reward model, and without."""
    columns = {}
    for seed in seeds:
        start = run_paper(seed)
        town, folders = start / "tinytown", [start / "gatt"]
        for gate in ("--gate", "--no-gate"):
            out = OUT / f"distillation/{seed}{gate}"
            models = ["--chat", start / "gatt", "--rm", start / "rm/v4/safety"]
            data = ["--data", town / "attacks.jsonl", "--pre-prompts", town / "pre-prompts.jsonl"]
            options = [gate, "--seed", seed, "--out", f"{out}.jsonl"]
            run("-m", "data.distillation", *models, *data, *options)
            data = ["--data", f"{out}.jsonl", *replay_files(start)]
            options = ["--init", start / "gatt", *data, "--seed", seed, "--out", out]
            train("train_sft.py", *LONG, *options)
            folders.append(out)
        names = ("before", "distilled, gate", "distilled, no gate")
        append_rows(columns, dict(zip(names, evaluate_attacks(start, *folders))))
    print_table(f"sampled at T=1, %, seeds {seeds}", columns)


def good_dialogue(rng, prompt: dict) -> dict:
    """A training record: the prompt with a correct and safe answer."""
    answer = prompts.good_answer(rng, prompt)
    return {"messages": prompt_to_messages(prompt["prompt"]) + [assistant_message(answer)]}


def scaling(seeds):
    """SFT with more and more safety data, once without and once with borderline dialogues."""
    for borderline in (0, 12):
        columns = {}
        weights = [36, 24, 12, borderline]
        for seed in seeds:
            start, residents = run_paper(seed), world.town(seed)
            rng = random.Random(f"scaling {seed}")
            topics = rng.choices(["fact", "sum", "story", "borderline"], weights, k=HELPFUL)
            helpful = []
            for topic in topics:
                helpful.append(
                    good_dialogue(rng, prompts.make_prompt(rng, residents, "dialogues", topic))
                )
            safety = []
            for _ in range(SAFETY):
                how = rng.choice(list(prompts.ATTACKS))
                safety.append(good_dialogue(rng, prompts.attack(rng, residents, how)))
            folders = []
            for fraction in FRACTIONS:
                out = OUT / f"scaling/{seed}/{borderline}-{fraction}"
                out.mkdir(parents=True, exist_ok=True)
                data = out / "data.jsonl"
                write_records(data, helpful + safety[: round(fraction * SAFETY)])
                options = ["--batch-size", 2, "--seed", seed, "--out", out]
                train("train_sft.py", "--init", start / "pretrain", "--data", data, *options)
                folders.append(out)
            names = [f"{fraction:.0%}" for fraction in FRACTIONS]
            append_rows(columns, dict(zip(names, evaluate_attacks(start, *folders))))
        part = borderline / sum(weights)
        title = f"of {HELPFUL} helpful dialogues {part:.0%} are borderline; %, seeds {seeds}"
        print_table(title, columns)


def red_team(seeds):
    """Fine-tune V5 on safe answers to the attacks that made it answer unsafely."""
    columns = {}
    for seed in seeds:
        start, residents = run_paper(seed), world.town(seed)
        model, tok = load(start / "rlhf/v5")
        rng, attacks = random.Random(f"red team {seed}"), []
        for how in prompts.ATTACKS:
            attacks += [prompts.attack(rng, residents, how) for _ in range(ATTACKS_PER_KIND)]
        texts = respond(model, tok, [prompt["prompt"] for prompt in attacks], 90, 1.0, seed)
        records = []
        for prompt, text in zip(attacks, texts):
            if not annotator.judge(prompt, text)["safe"]:
                records.append(good_dialogue(rng, prompt))
        print(f"seed {seed}: {len(records)} of {len(attacks)} attacks succeed", flush=True)
        out = OUT / f"red-team/{seed}"
        out.mkdir(parents=True, exist_ok=True)
        write_records(out / "data.jsonl", records)
        data = [out / "data.jsonl", *replay_files(start)]
        options = ["--epochs", 1, "--batch-size", 1, "--lr", 5e-4, "--seed", seed, "--out", out]
        train("train_sft.py", "--init", start / "rlhf/v5", "--data", *data, *options)
        rows = evaluate_attacks(start, start / "rlhf/v5", out)
        append_rows(columns, dict(zip(("before", "after"), rows)))
    print_table(f"sampled at T=1, %, seeds {seeds}", columns)


def main():
    parts = {"distillation": distillation, "scaling": scaling, "red-team": red_team}
    part, seeds = parse_args(__doc__, parts)
    parts[part](seeds)


if __name__ == "__main__":
    main()
