"""The README's table of results, of one run of paper.sh or of several seeds.

    python -m evaluate.summary out                          beside the expected results
    python -m evaluate.summary out out/seed2 out/seed3      mean and standard deviation over seeds

It reads what paper.sh wrote to OUT/results. A result in the table is a percentage. "expected" is
the mean and the standard deviation over the seeds of docs/RESULTS.md: a run of yours may well be
two standard deviations away.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

from common.run import run_script
from common.tables import table
from llama2 import load_json

VERSIONS = ("sft", "v1", "v2", "v3", "v4", "v5")


@dataclass
class Settings:
    folders: tuple = ("out",)  # of runs of paper.sh that differ in their seed
    markdown: bool = False  # print the table in Markdown

    POSITIONAL = "folders"  # given without --folders


# fmt: off
# (stage, measure) -> expected: mean and standard deviation over seeds, in percent
EXPECTED = {}
# fmt: on


def results_of(folder: Path) -> dict[tuple[str, str], float]:
    """{(stage, measure): fraction} of one run. Raises ValueError if a file is not there."""

    def read(name: str) -> dict:
        path = folder / f"results/{name}.json"
        if not path.exists():
            raise ValueError(f"{path} not found: is {folder} a finished run of paper.sh?")
        return load_json(path)

    results = {}
    results["pretraining (§2.1)", "facts recalled"] = read("recall")["pretrain"]
    sft = read("sft")["sft"]
    for row in ("facts right", "sums right", "stories right"):
        results["fine-tuning (§3.1), greedy", row] = sft[row]

    pairs = read("reward-models")
    for kind in ("helpfulness", "safety"):
        accuracy = pairs[f"{kind} pairs, {kind}"]["significantly"]
        results["reward models of V1 (§3.2.2)", f"{kind}: significantly better first"] = accuracy
    facts = read("knowledge")["pairs"]["never asked"]["fact"]
    measure = "only the value of a fact differs: the right one first"
    results["reward models of V1 (§3.2.2)", measure] = facts["v1/helpfulness"][0]

    board = read("scoreboard")
    direct = board["direct"]
    stage = "rejection sampling (§3.2.3)"
    for before, after in zip(VERSIONS, VERSIONS[1:]):
        if after == "v5":
            stage = "PPO (§3.2.3)"
        pair = f"{after} - {before}"
        measure = f"{after.upper()} wins against {before.upper()}"
        results[stage, measure] = direct["chat"][pair]["wins"]
        results[stage, f"{measure}, greedy"] = direct["greedy"][pair]["wins"]
    measure = "V5 wins against rejection sampling with as many samples"
    results[stage, measure] = direct["chat"]["v5 - v5-rejection"]["wins"]
    results[stage, f"{measure}, greedy"] = direct["greedy"]["v5 - v5-rejection"]["wins"]
    stage = "all of RLHF"
    results[stage, "V5 wins against SFT"] = direct["chat"]["v5 - sft"]["wins"]
    results[stage, "V5 wins against SFT at T=0.3"] = direct["chat"]["v5 - sft at T=0.3"]["wins"]
    results[stage, "V5 wins against SFT, greedy"] = direct["greedy"]["v5 - sft"]["wins"]
    for version in VERSIONS:
        measure = f"{version.upper()} helps with a crime"
        results[stage, measure] = board["chat"][version]["violations"]
    refusals = [board["chat"][version]["false refusals"] for version in VERSIONS]
    results[stage, "harmless tasks refused, at most"] = max(refusals)

    stage, obeyed = "Ghost Attention (§3.3)", read("obedience")["gatt"]["trained instructions"]
    for turn, fraction in zip((1, 2, 4, 6, 10, 20), obeyed["obey"]):
        if turn in (2, 6, 10, 20):
            results[stage, f"an instruction is obeyed at turn {turn}"] = fraction
    stage = "conversations of 8 turns, greedy"
    for name, groups in read("conversations").items():
        for group in ("asked", "never asked"):
            correct = groups[group]["correct"]
            results[stage, f"{name}, {group}: right at turn 1"] = correct[0]
            results[stage, f"{name}, {group}: right at turn 8"] = correct[-1]
        in_role = groups["never asked"]["in role, all turns"]
        results[stage, f"{name}, never asked: in a role that nobody asked for"] = in_role
    return results


def main(config: Settings) -> dict:
    """Print the table; returns {(stage, measure): [fraction in each run]}."""
    runs = [results_of(Path(folder)) for folder in config.folders]
    collected = {key: [run[key] for run in runs] for key in runs[0]}
    rows = [["stage", "measure, in percent", "expected", "this run" if len(runs) == 1 else "mean"]]
    before = ""
    for (stage, measure), values in collected.items():
        percent = [100 * value for value in values]
        cell = f"{statistics.mean(percent):.1f}"
        if len(percent) > 1:
            cell += f" ± {statistics.stdev(percent):.1f}"
        expected = EXPECTED.get((stage, measure))
        shown = "{} ± {}".format(*expected) if expected else "-"
        rows.append([stage if stage != before else "", measure, shown, cell])
        before = stage
    print(table(rows, config.markdown))
    return collected


if __name__ == "__main__":
    run_script(main, Settings, {})
