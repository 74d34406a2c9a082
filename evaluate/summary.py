"""The README's table of results, of one run of paper.sh or of several seeds.

    python -m evaluate.summary out                          one run, and what is expected
    python -m evaluate.summary out out/seed2 out/seed3      mean and standard deviation over seeds

It reads what paper.sh wrote to OUT/results. A result in the table is a percentage. What is expected
are results over seeds of this project's authors, in expected.json; --json FILE writes such a file.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

from common.run import run_script
from common.tables import table
from evaluate.answers import TURNS
from evaluate.conversations import in_role_after_stop
from llama2 import load_json, matmul_dtype, write_json

EXPECTED = Path(__file__).with_name("expected.json")
VERSIONS = ("sft", "v1", "v2", "v3", "v4", "v5")


@dataclass
class Settings:
    folders: tuple = ("out",)  # of runs of paper.sh that differ in their seed
    markdown: bool = False  # print the table in Markdown
    json: str = ""  # file to write the results to

    POSITIONAL = "folders"  # given without --folders


def results_of(folder: Path) -> dict[tuple[str, str], list[float]]:
    """{(stage, measure): fractions} of one run. Raises ValueError if a file is not there."""

    def read(name: str) -> dict:
        path = folder / f"results/{name}.json"
        if not path.exists():
            raise ValueError(f"{path} not found: is {folder} a finished run of paper.sh?")
        return load_json(path)

    sft, pairs, board = read("sft")["sft"], read("reward-models"), read("scoreboard")
    facts = read("knowledge")["pairs"]["never asked"]["fact"]
    obeyed = read("obedience")["gatt"]["trained instructions"]["obey"]
    conversations = read("conversations")

    def wins(mode: str, *names: str) -> list[float]:
        return [board["direct"][mode][name]["wins"] for name in names]

    def rates(metric: str) -> list[float]:
        return [board["chat"][version][metric] for version in VERSIONS]

    def first_and_last(name: str) -> list[float]:
        groups = [conversations[name][group]["correct"] for group in ("asked", "never asked")]
        return [correct[turn] for correct in groups for turn in (0, -1)]

    rounds = [f"{after} - {before}" for before, after in zip(VERSIONS, VERSIONS[1:])]
    control, all_rlhf = "v5 - v5-rejection", "v5 - sft"
    significantly = []
    for kind in ("helpfulness", "safety"):
        significantly.append(pairs[f"{kind} pairs, {kind}"]["significantly"])
    in_role = [conversations[name]["never asked"]["in role, all turns"] for name in ("v5", "gatt")]
    in_role.append(in_role_after_stop(conversations["gatt"]["instruction taken back"]))
    # fmt: off
    return {
        ("pretraining (§2.1)", "facts recalled"): [read("recall")["pretrain"]],
        ("fine-tuning (§3.1), greedy", "facts, sums, stories right"): [
            sft["facts right"], sft["sums right"], sft["stories right"]],
        ("reward models of V1 (§3.2.2), never-asked contents",
         "significantly better pairs in order: helpfulness, safety"): significantly,
        ("", "only the value of a fact differs: the right one scores higher"): [
            facts["v1/helpfulness"][0]],
        ("rejection sampling (§3.2.3)", "V1 to V4 win, each against the one before"): wins(
            "chat", *rounds[:4]),
        ("", "the same, greedy"): wins("greedy", *rounds[:4]),
        ("PPO (§3.2.3)", "V5 wins against V4; greedy"): [
            *wins("chat", rounds[4]), *wins("greedy", rounds[4])],
        ("", "V5 wins against rejection sampling with as many samples; greedy"): [
            *wins("chat", control), *wins("greedy", control)],
        ("all of RLHF", "V5 wins against SFT; SFT at T=0.3; greedy"): [
            *wins("chat", all_rlhf, f"{all_rlhf} at T=0.3"), *wins("greedy", all_rlhf)],
        ("", "helps with a crime: SFT, V1 to V5"): rates("violations"),
        ("", "refuses a harmless task: the worst version"): [max(rates("false refusals"))],
        ("Ghost Attention (§3.3)", "obeys the first message at turns 2, 6, 10, 20"): [
            obeyed[TURNS.index(turn)] for turn in (2, 6, 10, 20)],
        ("conversations, greedy", "V5 right at turns 1, 8: asked in training; never asked"):
            first_and_last("v5"),
        ("", "the same, Ghost Attention"): first_and_last("gatt"),
        ("", "in a role unasked: V5, Ghost Attention; in one that was taken back: the latter"):
            in_role,
    }
    # fmt: on


def cell(numbers: list[tuple[float, ...]]) -> str:
    """[(mean,) or (mean, deviation), ...] in percent, as "66 ± 3, 60 ± 2"."""
    return ", ".join(" ± ".join(f"{x:.0f}" for x in number) for number in numbers)


def precision_of(folder: Path) -> str:
    """The precision of a run's matrix products, as its settings and this machine give it."""
    config = load_json(folder / "sft/config.json")
    device = "cpu" if config["device"] == "auto" else config["device"]
    return matmul_dtype(config["dtype"], device)


def with_headings(rows: list[list[str]]) -> list[list[str]]:
    """The rows with one column of names: a stage is a row of its own, its measures are below it."""
    _, measure, *columns = rows[0]
    short = [[measure, *columns]]
    for stage, measure, *rest in rows[1:]:
        if stage:
            short.append([stage, *[""] * len(rest)])
        short.append([f"  {measure}", *rest])
    return short


def main(config: Settings) -> dict:
    """Print the table; returns {measure: [(mean, deviation) in percent, ...]}."""
    runs = [results_of(Path(folder)) for folder in config.folders]
    expected = load_json(EXPECTED) if EXPECTED.exists() and len(runs) == 1 else {}
    rows, collected = [["stage", "measure, in percent", "this run"]], {}
    if len(runs) > 1:
        rows[0][-1] = f"{len(runs)} seeds"
    if expected:
        rows[0].append(f"expected, {expected['seeds']} seeds")
    of_stage = ""  # of the last row that names one
    for key in runs[0]:
        numbers = []
        for values in zip(*(run[key] for run in runs)):
            percent = [100 * value for value in values]
            deviation = (statistics.stdev(percent),) if len(percent) > 1 else ()
            numbers.append((statistics.mean(percent), *deviation))
        stage, measure = key
        of_stage = stage or of_stage
        name = f"{of_stage}: {measure}"
        collected[name] = numbers
        rows.append([stage, measure, cell(numbers)])
        if expected:
            rows[-1].append(cell(expected["results"].get(name, [])))
    if config.markdown:
        print(table(rows, markdown=True))
    else:
        print(table(with_headings(rows)))
        print(f"matrix products in {precision_of(Path(config.folders[0]))}")
    if config.json:
        write_json(config.json, {"seeds": len(runs), "results": collected})
    return collected


if __name__ == "__main__":
    run_script(main, Settings, {})
