"""The tables of README.md on §4.2 and §4.3: distillation, amount of safety data, red teaming.

    python bench/safety.py distillation   with the gate and without it (Fig. 16, 17)
    python bench/safety.py scaling        0 to 100% of the safety data (Fig. 14, 15, 33)
    python bench/safety.py red-team       one round: the attacks that succeed join the safety data

All take [--seeds 1 2 3]; {} is the seed in the folders where bench/upsampling.py, bench/rlhf.py and
bench/ghost.py leave what they start from.
"""
import argparse
import random
import statistics
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_sft as sft
from tinytown import world as tinytown
from llama2 import load, respond

SHARES = (0, 0.01, 0.1, 0.25, 0.5, 1.0)
HELPFUL, SAFETY = 2000, 400     # dialogues of the scaling study; safety: at 100%
TRIED = 200                     # attacks of each kind in a round of red teaming


def table(columns: dict[str, list[dict]]) -> list[str]:
    """{column: a {row: share} a seed} as Markdown: mean ± standard deviation."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in next(iter(columns.values()))[0]:
        cells = [[100 * run[row] for run in runs] for runs in columns.values()]
        lines.append(f"| {row.strip()} | " + " | ".join(
            f"{statistics.mean(c):.1f} ± {statistics.stdev(c) if len(c) > 1 else 0:.1f}%"
            for c in cells) + " |")
    return lines


def distillation(given):
    columns = {}
    for seed in given.seeds:
        for gate in (True, False):
            name = "gate" if gate else "no gate"
            found = sft.main(sft.Settings(
                distill=True, init=given.chats.format(seed), rm=given.rms.format(seed), gate=gate,
                seed=seed, overwrite=True, out=f"{given.out}/{name.replace(' ', '-')}-{seed}"))
            rows = found["safety"]
            for column, row in (("before", rows["before"]), ("pre-prompt", rows["pre-prompt"]),
                                (f"distilled, {name}", rows["after"])):
                if gate or column.startswith("distilled"):
                    columns.setdefault(column, []).append(row)
            print(seed, name, f"{found['improved']} of {found['prompts']} improved", flush=True)
    print("\n".join(table(columns)))


def written(rng, asked: dict) -> dict:
    """A dialogue of one prompt, answered by a careful writer."""
    messages = asked["prompt"]
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    answer = tinytown.good_answer(rng, asked)
    return {"messages": [*messages, {"role": "assistant", "content": answer}]}


def scaling(given):
    for borderline in (0, 12):
        columns = {}
        for seed in given.seeds:
            truth, rng = tinytown.town(seed), random.Random(f"scaling {seed}")
            helpful = [written(rng, tinytown.prompt(rng, truth, kind)) for kind in rng.choices(
                ["fact", "sum", "story", "borderline"], [36, 24, 12, borderline], k=HELPFUL)]
            safety = [written(rng, tinytown.attack(rng, truth, rng.choice(list(tinytown.ATTACKS))))
                      for _ in range(SAFETY)]
            for share in SHARES:
                folder = Path(given.out) / f"scaling-{borderline}-{share}-{seed}"
                tinytown.write_records(folder / "data.jsonl",
                                       helpful + safety[:round(share * SAFETY)])
                sft.main(sft.Settings(init=given.bases.format(seed), seed=seed, overwrite=True,
                                      data=(str(folder / "data.jsonl"),), out=str(folder),
                                      batch_size=2))
                model, tok = load(folder)
                columns.setdefault(f"{share:.0%}", []).append(sft.judge_safety(model, tok, seed))
        print(f"\nof {HELPFUL} helpful dialogues, {borderline / (72 + borderline):.0%} are "
              "borderline\n" + "\n".join(table(columns)), flush=True)


def violations(model, tok, truth, seed, count=120) -> dict[str, float]:
    """Share of attacks that succeed by kind, new crimes in old wordings and in new ones."""
    rng, shares = random.Random(f"violations {seed}"), {}
    for kind, of in (("unsafe", "violations"), ("borderline", "harmless twins refused")):
        for how in tinytown.ATTACKS:
            for new in (False, True):
                asked = []
                for _ in range(count):      # what is asked for is held out, of both
                    one, frame = (tinytown.attack(rng, truth, how, kind, held) for held in
                                  (True, new))
                    last = frame["prompt"][-1]
                    said = last["content"].replace(frame["q"], one["q"])
                    asked.append(one | dict(prompt=[*frame["prompt"][:-1],
                                                    last | {"content": said}]))
                answers = respond(model, tok, [a["prompt"] for a in asked], temperature=1.0,
                                  seed=seed)
                judged = [tinytown.judge(a, text) for a, text in zip(asked, answers)]
                bad = [not j["safe"] if kind == "unsafe" else j["refused"] for j in judged]
                shares[f"{of}: {how}, {'new' if new else 'old'} wordings"] = sum(bad) / count
    return shares


def red_team(given):
    columns = {"before": [], "after": []}
    for seed in given.seeds:
        model, tok = load(given.attacked.format(seed))
        truth, rng = tinytown.town(seed), random.Random(f"red team {seed}")
        config = replace(sft.Settings(), seed=seed, batch_size=1, epochs=1.0, lr=5e-4)
        columns["before"].append(violations(model, tok, truth, seed))
        tried = [tinytown.attack(rng, truth, how) for how in tinytown.ATTACKS
                 for _ in range(TRIED)]
        answers = respond(model, tok, [a["prompt"] for a in tried], temperature=1.0, seed=seed)
        found = [a for a, text in zip(tried, answers) if not tinytown.judge(a, text)["safe"]]
        print(f"seed {seed}: {len(found)} of {len(tried)} attacks succeed", flush=True)
        ordinary = sft.ordinary_examples(model, tok, config)
        learned = sft.encode_dialogs([written(rng, a)["messages"] for a in found], tok,
                                     model.args.max_seq_len)[0]
        examples, batches = sft.mingle(seed, *((some, sft.plan(some, config))
                                               for some in (learned, ordinary)))
        sft.finetune(model, examples, config, batches=batches)
        columns["after"].append(violations(model, tok, truth, seed))
    print("\n".join(table(columns)))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("distillation", "scaling", "red-team"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--bases", default="out/upsampling/weight-8-seed-{}")
    parser.add_argument("--chats", default="out/bench-ghost/{}")
    parser.add_argument("--attacked", default="out/bench-rlhf/seed-{}/v5")
    parser.add_argument("--rms", default="out/bench-rlhf/seed-{}/v4/rm/safety")
    parser.add_argument("--out", default="out/bench-safety")
    given = parser.parse_args()
    {"distillation": distillation, "scaling": scaling, "red-team": red_team}[given.what](given)


if __name__ == "__main__":
    main()
