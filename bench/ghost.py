"""The table and the picture of README.md on §3.3 (Table 30, Fig. 9).

    python bench/ghost.py seeds [--seeds 1 2 3]   obedience by turn, before and after Ghost Attention
    python bench/ghost.py attention [--model out/gatt]    Fig. 9: back to the instruction, by turn

`seeds` starts from V3 of `make rlhf-seeds` ({} is the seed), on more dialogues than `make` takes
time for. `attention` compares the model that Ghost Attention left with the one it began from.
"""
import argparse
import random
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import train_sft as sft
from tinytown import world as tinytown
from llama2 import encode_dialog, load, write_json

CONVERSATIONS, EXAMINED = 1200, 40
LOOKED_AT = 40      # dialogues of Fig. 9


def seeds(given):
    runs = []
    for seed in given.seeds:
        config = sft.Settings(ghost_attention=True, init=given.init.format(seed), seed=seed,
                              out=f"{given.out}/{seed}", conversations=CONVERSATIONS,
                              examined=EXAMINED, overwrite=True)
        runs.append(sft.main(config))
    print(f"\nseeds {given.seeds}: mean ± standard deviation\n")
    print("| | at turn |", " | ".join(map(str, sft.EXAMINED)), "|")
    print("|---|---|" + "---|" * len(sft.EXAMINED))
    for measure in ("obeyed", "correct"):
        for group in runs[0]["examined"]["after"]:
            for name in runs[0]["examined"]:
                rows = [[100 * share for share in run["examined"][name][group][measure]]
                        for run in runs]
                print(f"| {measure}, {group} | {name} |", " | ".join(
                    f"{statistics.mean(c):.0f} ± {statistics.stdev(c) if len(c) > 1 else 0:.0f}%"
                    for c in zip(*rows)), "|")
    for name in runs[0]["judged"]:
        print(f"\nwithout an instruction, {name}: " + ", ".join(
            f"{measure.strip()} {statistics.mean(run['judged'][name][measure] for run in runs):.0%}"
            for measure in sft.MEASURES))


def looks_back(model, tok, instruction, turns):
    """The largest attention, over all layers and heads, that any token of an answer pays to each
    token of the instruction: (turns, instruction tokens)."""
    messages = sft.lay_out(instruction, turns, everywhere=False)
    first, last = (len(tok.encode(text, bos=True)) for text in ("[INST]", f"[INST] {instruction}"))
    weights, rows = [], []
    with torch.inference_mode():
        model.hidden(torch.tensor([encode_dialog(tok, messages)[0]]), weights=weights)
    most = torch.stack(weights).amax((0, 1, 2))                                 # (T, T)
    for turn in range(len(turns)):
        start, end = (len(encode_dialog(tok, messages[:2 * turn + part])[0]) for part in (1, 2))
        rows.append(most[start - 1:end - 1, first:last].amax(0))    # where they are predicted
    return torch.stack(rows)


def attention(given):
    model, tok = load(given.model)
    models = {"with": model, "without": load(f"{given.model}/teacher")[0]}
    config, rng = sft.Settings(), random.Random(9)
    asked = tinytown.conversations(tinytown.town(given.seeds[0]), LOOKED_AT, max(sft.EXAMINED),
                                   held_out=True)
    drawn = [tinytown.combine(rng, tinytown.instructions(sft.GHOST_KINDS)) for _ in asked]
    users = [[a["prompt"] for a in some] for some in asked]
    done, _ = sft.converse(model, tok, users, drawn, config, everywhere=False)
    found = {}
    for name, one in models.items():        # both read the same dialogues
        maps = [looks_back(one, tok, text, turns) for (text, _), turns in zip(drawn, done)
                if turns[-1][1]]        # else the context was full
        found[name] = dict(by_turn=torch.stack([m.amax(1) for m in maps]).mean(0).tolist(),
                           first_dialogue=maps[0].tolist())
    Path(given.out).mkdir(parents=True, exist_ok=True)
    write_json(f"{given.out}/fig9.json", found | dict(instruction=drawn[0][0]))
    print(f"largest attention from a turn's answer to the instruction, mean of {len(maps)}")
    print("| turn |", " | ".join(map(str, sft.EXAMINED)), "|")
    for name, row in found.items():
        print(f"| {name} Ghost Attention |",
              " | ".join(f"{row['by_turn'][t - 1]:.2f}" for t in sft.EXAMINED), "|")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("seeds", "attention"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--init", default="out/bench-rlhf/seed-{}/v3")
    parser.add_argument("--model", default="out/gatt")
    parser.add_argument("--out", default="out/bench-ghost")
    given = parser.parse_args()
    dict(seeds=seeds, attention=attention)[given.what](given)


if __name__ == "__main__":
    main()
