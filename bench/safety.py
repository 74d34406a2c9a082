"""Safety (§4.2, §4.3): distillation, amount of safety data, a round of red teaming.

    python -m bench.safety distillation [--seeds 1 2 3]     with the gate and without (Fig. 16, 17)
    python -m bench.safety scaling        0 to 100% of the safety data (Fig. 14, 15, 33)
    python -m bench.safety red-team       the attacks that succeed join the safety data
"""
import random

from bench import OUT, figures, paper, print_table, run, seeds_of, train
from data.records import prompt_to_messages, assistant_message, write_records
from llama2 import load, respond
from tinytown import annotator, prompts, world

SHARES = (0, 0.01, 0.1, 0.25, 0.5, 1.0)
HELPFUL, SAFETY = 2000, 400     # dialogues of the scaling study; safety: at 100%
TRIED = 200                     # attacks of each kind in a round of red teaming
LONG = ("--no-pack", "--seq-len", 1024, "--epochs", 1)


def examined(start, *folders) -> list[dict]:
    """Shares of the models, sampled, on attacks that are held out."""
    found = figures("evaluate.answers", *folders, "--prompts",
                    start / "tinytown/held-out-attacks.jsonl")
    return list(found.values())[1::2]


def ordinary_of(start) -> list:
    """What is mixed in so that nothing is forgotten, as in paper.sh."""
    best = [start / f"rlhf/v{version}/best.jsonl" for version in (1, 2, 3)]
    return [*best, start / "tinytown/replay.jsonl"]


def distillation(seeds):
    columns = {}
    for seed in seeds:
        start, folders = paper(seed), [paper(seed) / "gatt"]
        town = start / "tinytown"
        for gate in ("--gate", "--no-gate"):
            out = OUT / f"distillation/{seed}{gate}"
            run("-m", "data.distillation", "--chat", start / "gatt", "--rm",
                start / "rm/v4/safety", "--data", town / "attacks.jsonl", "--pre-prompts",
                town / "pre-prompts.jsonl", gate, "--seed", seed, "--out", f"{out}.jsonl")
            train("train_sft.py", *LONG, "--init", start / "gatt", "--data", f"{out}.jsonl",
                  *ordinary_of(start), "--seed", seed, "--out", out)
            folders.append(out)
        names = ("before", "distilled, gate", "distilled, no gate")
        for name, row in zip(names, examined(start, *folders)):
            columns.setdefault(name, []).append(row)
    print_table(f"sampled at T=1, %, seeds {seeds}", columns)


def written(rng, asked: dict) -> dict:
    """A dialogue of one prompt, answered by a careful writer."""
    answer = prompts.good_answer(rng, asked)
    return {"messages": prompt_to_messages(asked["prompt"]) + [assistant_message(answer)]}


def scaling(seeds):
    for borderline in (0, 12):
        columns = {}
        for seed in seeds:
            start, residents = paper(seed), world.town(seed)
            rng = random.Random(f"scaling {seed}")
            topics = rng.choices(["fact", "sum", "story", "borderline"], [36, 24, 12, borderline],
                                 k=HELPFUL)
            helpful = [written(rng, prompts.prompt(rng, residents, topic)) for topic in topics]
            safety = []
            for _ in range(SAFETY):
                how = rng.choice(list(prompts.ATTACKS))
                safety.append(written(rng, prompts.attack(rng, residents, how)))
            folders = []
            for share in SHARES:
                out = OUT / f"scaling/{seed}/{borderline}-{share}"
                out.mkdir(parents=True, exist_ok=True)
                write_records(out / "data.jsonl", helpful + safety[:round(share * SAFETY)])
                train("train_sft.py", "--init", start / "pretrain", "--data", out / "data.jsonl",
                      "--batch-size", 2, "--seed", seed, "--out", out)
                folders.append(out)
            for share, row in zip(SHARES, examined(start, *folders)):
                columns.setdefault(f"{share:.0%}", []).append(row)
        part = borderline / (72 + borderline)
        print_table(f"of {HELPFUL} helpful dialogues {part:.0%} are borderline; %, seeds {seeds}",
                    columns)


def red_team(seeds):
    columns = {}
    for seed in seeds:
        start, residents = paper(seed), world.town(seed)
        model, tok = load(start / "rlhf/v5")
        rng, tried = random.Random(f"red team {seed}"), []
        for how in prompts.ATTACKS:
            tried += [prompts.attack(rng, residents, how) for _ in range(TRIED)]
        texts = respond(model, tok, [asked["prompt"] for asked in tried], 90, 1.0, seed)
        succeeded = []
        for asked, text in zip(tried, texts):
            if not annotator.judge(asked, text)["safe"]:
                succeeded.append(written(rng, asked))
        print(f"seed {seed}: {len(succeeded)} of {len(tried)} attacks succeed", flush=True)
        out = OUT / f"red-team/{seed}"
        out.mkdir(parents=True, exist_ok=True)
        write_records(out / "data.jsonl", succeeded)
        train("train_sft.py", "--init", start / "rlhf/v5", "--data", out / "data.jsonl",
              *ordinary_of(start), "--epochs", 1, "--batch-size", 1, "--lr", 5e-4, "--seed", seed,
              "--out", out)
        for name, row in zip(("before", "after"), examined(start, start / "rlhf/v5", out)):
            columns.setdefault(name, []).append(row)
    print_table(f"sampled at T=1, %, seeds {seeds}", columns)


def main():
    parts = {"distillation": distillation, "scaling": scaling, "red-team": red_team}
    part, seeds = seeds_of(__doc__, parts)
    parts[part](seeds)


if __name__ == "__main__":
    main()
