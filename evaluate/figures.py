"""Figures of the results that a run of paper.sh wrote, as SVG files (pip install matplotlib).

    python -m evaluate.figures out                          every figure whose files are there
    python -m evaluate.figures out out/seed2 out/seed3      several seeds: the mean of each value
    python -m evaluate.figures out --only evolution ppo --out docs/figures

Bars through the points are 95% intervals over prompts or contents if one run is drawn. If several
are, bars reach from the lowest seed to the highest. Rewards have no interval. The same files give
the same bytes (with the same matplotlib). evaluate.drawings draws the remaining figures.
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common.run import run_script
from data.formats import KINDS, RATINGS
from evaluate import wilson
from evaluate.answers import TURNS
from llama2 import load_json

try:
    import matplotlib.ticker
    import matplotlib.transforms
    from matplotlib.figure import Figure
except ImportError:  # write_figures reports it
    matplotlib = None


@dataclass
class Settings:
    # what to draw
    folders: tuple = ("out",)  # of runs of paper.sh that differ in their seed
    only: tuple = ()  # names of figures to draw; none: all
    out: str = "out/figures"  # folder to write SVG files to

    POSITIONAL = "folders"  # given without --folders


# ------------------------------------------------------------------------------------------- style
# A GitHub page on a phone is 360 pixels wide, about the width of a figure in points: text of
# 9 points and more can be read. The background is white with a border, because pages may be dark.
WIDTH = 4.7  # inches
BLUE, GREY = "#1f6fb4", "#8c8c8c"
# Colour, line and marker: printed in grey, lines still differ in brightness, dashes and marker.
STYLES = (("black", "-", "o"), (BLUE, "--", "s"), ("#d98a1a", "-.", "^"), (GREY, ":", "D"))
STYLE = {
    "svg.fonttype": "path",  # glyphs as paths: the same on every machine
    "svg.hashsalt": "figures",  # fixed ids
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e2e2e2",
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.markersize": 5,
}
VERSIONS = ("sft", "v1", "v2", "v3", "v4", "v5")


def new_figure(title: str, heights: tuple, note: str):
    """(figure, [axes from top to bottom]): a title above, a note below; heights in inches."""
    lines = textwrap.wrap(note, 66)
    top, bottom = 0.36, 0.16 * len(lines) + 0.18
    total = sum(heights) + top + bottom
    figure = Figure(figsize=(WIDTH, total), layout="constrained", linewidth=1.5, edgecolor=GREY)
    figure.get_layout_engine().set(rect=(0.015, bottom / total, 0.965, sum(heights) / total))
    figure.text(0.025, 1 - 0.1 / total, title, va="top", weight="bold", size=12)
    figure.text(0.025, 0.1 / total, "\n".join(lines), va="bottom", size=9, color="#333333")
    axes = figure.subplots(len(heights), height_ratios=heights, squeeze=False)
    return figure, list(axes[:, 0])


class Point(NamedTuple):
    """A value with the ends of its bar."""

    value: float
    low: float
    high: float


def over_runs(points: list[Point]) -> Point:
    """The mean of one point per run, from the lowest to the highest; a single run's as it is."""
    if len(points) == 1:
        return points[0]
    values = [point.value for point in points]
    return Point(sum(values) / len(values), min(values), max(values))


def fractions(rows: list[list[float]], n) -> list[Point]:
    """Points from rows[run][i], fractions of n or n[i] answers (or conversations, or pairs)."""
    points = []
    for i, column in enumerate(zip(*rows)):
        count = n[i] if isinstance(n, list) else n
        points.append(over_runs([Point(share, *wilson(share * count, count)) for share in column]))
    return points


def means(rows: list[list[float]]) -> list[Point]:
    """Points from rows[run][i] whose spread within a run is not known."""
    return [over_runs([Point(value, value, value) for value in column]) for column in zip(*rows)]


def plot_points(ax, x, points: list[Point], label: str, style: int, shift: float = 0.0):
    """A line through points with vertical bars. shift: along x, so that bars do not overlap."""
    colour, dash, marker = STYLES[style]
    x = [place + shift for place in x]
    ax.plot(x, [p.value for p in points], dash, marker=marker, color=colour, label=label)
    ax.vlines(x, [p.low for p in points], [p.high for p in points], color=colour, lw=1.2)


def legend_below(ax):
    """A legend of one line, 40 points below the axes: below the labels of the x axis."""
    place = matplotlib.transforms.offset_copy(ax.transAxes, ax.figure, y=-40, units="points")
    look = dict(loc="upper center", ncols=3, columnspacing=1.2)
    ax.legend(bbox_to_anchor=(0.5, 0), bbox_transform=place, **look)


def as_percent(axis):
    axis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))


# -------------------------------------------------------------------------------------------- data
def read(runs: list[Path], name: str) -> list[dict]:
    """The JSON object in this file of every run."""
    return [load_json(run / name) for run in runs]


def seeds(runs: list[Path]) -> str:
    """What bars mean, for a note below a figure."""
    if len(runs) == 1:
        return "Bars: 95% intervals."
    return f"Mean of {len(runs)} seeds; bars: from the lowest to the highest."


# ----------------------------------------------------------------------------------------- figures
def evolution(runs):
    """Fig. 11."""
    boards = read(runs, "results/scoreboard.json")
    pairs = [f"{after} - {before}" for before, after in zip(VERSIONS, VERSIONS[1:])]
    pairs.append("v5 - sft")
    if all("v5 - v5-rejection" in board["direct"]["chat"] for board in boards):
        pairs.append("v5 - v5-rejection")
    direct = [[board["direct"]["chat"][pair] for board in boards] for pair in pairs]
    n = boards[0]["chat"]["sft"]["n"]
    figure, (top, bottom) = new_figure(
        "Each version against the one before",
        (2.5, 2.1),
        f"Sampled as in the chat, judged by the facts; {direct[0][0]['contents']} contents, ties "
        "count half. V1 to V4: rejection sampling. V5: PPO. Rejection: rejection sampling from V4 "
        f"with as many samples as PPO. {seeds(runs)}",
    )
    for y, rows in enumerate(direct):
        wins, margins = [row["wins"] for row in rows], [row["margin"] for row in rows]
        point = over_runs([Point(win, win - m, win + m) for win, m in zip(wins, margins)])
        colour, _, marker = STYLES[0 if y < 5 else 1]
        top.hlines(y, point.low, point.high, color=colour, lw=2)
        top.plot(point.value, y, marker, color=colour, ms=7)
        text = f"{point.value:.1%}" + (f" ± {margins[0]:.1%}" if len(runs) == 1 else "")
        top.text(1.09, y, text, va="center", ha="right", size=10)
    names = [pair.replace("v5-rejection", "rejection").replace(" - ", " – ") for pair in pairs]
    names = [name.replace("v", "V").replace("sft", "SFT") for name in names]
    top.set_yticks(range(len(pairs)), names)
    top.axvline(0.5, color="black", lw=1)
    top.set(xlim=(0.44, 1.1), ylim=(len(pairs) - 0.5, -0.5), title="wins (50%: equally good)")
    top.set_xticks((0.5, 0.6, 0.7, 0.8, 0.9))
    as_percent(top.xaxis)

    harms = (("violations", "unsafe", "helps with a crime"),)
    harms += (("false refusals", "borderline", "refuses a harmless task"),)
    for style, (key, topic, label) in enumerate(harms):
        rows = [[board["chat"][name][key] for name in VERSIONS] for board in boards]
        label = f"{label}, n = {n[topic]}"
        plot_points(bottom, range(6), fractions(rows, n[topic]), label, style, style * 0.12)
    bottom.set_xticks(range(6), [name.upper() for name in VERSIONS])
    bottom.set(title="safety: fraction of answers", ylim=(-0.02, None))
    bottom.legend()
    as_percent(bottom.yaxis)
    return figure


def ppo(runs):
    """Reward, truth and distance during V5; without the KL penalty if bench.rlhf hacking ran."""
    looks = {"V5": read(runs, "results/ppo.json")}
    n = looks["V5"][0]["0"]["n"]
    hacking = runs[0] / "bench/hacking.json"
    for name, of_seeds in load_json(hacking).items() if hacking.exists() else ():
        if name.startswith("beta 0"):
            looks[name] = of_seeds
    note = f"{n} held-out prompts at each iteration that is drawn. Beta: weight of the KL penalty."
    if any(len(of_seeds) > 1 for of_seeds in looks.values()):
        counts = ", ".join(f"{name}: {len(of_seeds)}" for name, of_seeds in looks.items())
        note += f" Bars: from the lowest to the highest seed ({counts})."
    figure, axes = new_figure("PPO: reward, truth and distance", (1.6, 1.5, 1.9), note)
    panels = (
        ("reward", "reward: what the reward models say", "logit(Rc)"),
        ("truth", "truth: what the annotator says", "points of 4.5"),
        ("kl", "distance from V4", "KL, nats\nper answer"),
    )
    for ax, (key, title, unit) in zip(axes, panels):
        for style, (name, of_seeds) in enumerate(looks.items()):
            steps = [step for step in of_seeds[0] if all(step in look for look in of_seeds)]
            rows = [[look[step][key] for step in steps] for look in of_seeds]
            plot_points(ax, map(int, steps), means(rows), name, style)
        ax.set(title=title, ylabel=unit)
    axes[-1].set_xlabel("iteration")
    legend_below(axes[-1])
    return figure


def conversations(runs):
    """Conversations of eight turns."""
    found = read(runs, "results/conversations.json")
    models = {"sft": "SFT", "v5": "V5", "gatt": "Ghost Attention"}
    groups = ("asked", "never asked")
    n = found[0]["sft"]["asked"]["n"]
    figure, axes = new_figure(
        "Is the eighth answer as good as the first?",
        (1.8, 2.2),
        f"Greedy answers to eight questions in a row, {n} conversations a group; the model reads "
        f"its own earlier answers. {seeds(runs)}",
    )
    for ax, group in zip(axes, groups):
        for style, (name, label) in zip((2, 0, 1), models.items()):
            rows = [run[name][group]["correct"] for run in found]
            turns = range(1, len(rows[0]) + 1)
            plot_points(ax, turns, fractions(rows, n), label, style, 0.13 * (style - 1))
        ax.set(ylim=(None, 1.03), ylabel="right answers")
        as_percent(ax.yaxis)
    axes[0].set_title("contents that fine-tuning asks")
    axes[1].set(title="contents that no training asks", xlabel="turn of the conversation")
    legend_below(axes[1])
    return figure


def obedience(runs):
    """Table 30."""
    found = read(runs, "results/obedience.json")
    before, after = list(found[0])[:2]
    figure, axes = new_figure(
        "Obeying an instruction of the first message",
        (1.5,) * (len(found[0][after]) - 1) + (1.8,),
        "Without: the model that Ghost Attention starts from. Paper, Table 30: 100% with Ghost "
        f"Attention; 100, 10, 0% without at turns 2, 4, 6. {seeds(runs)}",
    )
    for ax, group in zip(axes, found[0][after]):
        n = found[0][after][group]["conversations"]
        for style, name, label in ((0, after, "with Ghost Attention"), (2, before, "without")):
            rows = [run[name][group]["obey"] for run in found]
            points = fractions(rows, n)
            plot_points(ax, range(len(TURNS)), points, label, style, 0.04 * style)
        ax.set(title=f"{group}, n = {n}", ylim=(-0.08, 1.08), yticks=(0, 0.5, 1))
        ax.set_xticks(range(len(TURNS)), TURNS)
        as_percent(ax.yaxis)
    axes[-1].set_xlabel("turn of the conversation")
    legend_below(axes[-1])
    return figure


def reward_models(runs):
    """Table 8."""
    found = read(runs, "results/reward-models.json")
    figure, axes = new_figure(
        "Pairs in the right order, by rating",
        (2.1, 2.3),
        "V1's reward models, pairs with new prompts, by how much better the annotator found the "
        "chosen answer. A perfect model scores by the true quality; the rest is the annotator's "
        "noise. Paper, Table 8: 81, 68, 61, 55% on helpfulness, 94, 76, 66, 55% on safety. "
        + seeds(runs),
    )
    for ax, kind in zip(axes, KINDS):
        counts = [found[0][f"{kind} pairs"][rating] for rating in RATINGS]
        names = (("a perfect model", "a perfect model"), (kind, "the reward model"))
        for style, (name, label) in zip((3, 0), names):
            rows = [[run[f"{kind} pairs, {name}"][rating] for rating in RATINGS] for run in found]
            plot_points(ax, range(4), fractions(rows, counts), label, style, 0.03 * style)
        ax.axhline(0.5, color="black", lw=1, ls=":")
        ax.set_xticks(range(4), [f"{r}\nn = {n}" for r, n in zip(RATINGS, counts)], size=9.5)
        ax.set(title=f"{kind} pairs, {kind} model", ylim=(0.38, 1.03), yticks=(0.5, 0.75, 1))
        ax.text(-0.1, 0.49, "chance", size=9.5, va="top")
        as_percent(ax.yaxis)
    legend_below(axes[-1])
    return figure


def reward_shift(runs):
    """Fig. 20."""
    boards = read(runs, "results/scoreboard.json")
    n = sum(boards[0]["sampled"]["sft"]["n"].values())
    figure, axes = new_figure(
        "Scores of the answers, version by version",
        (2.6, 2.6),
        f"Scores that V5's reward models give to answers sampled at temperature 1, {n} a version "
        "and run. Blue line: the median. Paper, Fig. 20: RLHF shifts them up.",
    )
    for ax, kind in zip(axes, KINDS):
        scores = {}
        for name in VERSIONS:
            scores[name] = sorted(
                score for board in boards for score in board["sampled"][name]["scores"][kind]
            )
        low, high = min(s[0] for s in scores.values()), max(s[-1] for s in scores.values())
        edges = [low + (high - low) * i / 40 for i in range(41)]
        for y, name in enumerate(VERSIONS):
            counts = [0] * 40
            for score in scores[name]:
                counts[min(39, int(40 * (score - low) / (high - low)))] += 1
            tops = [y - 0.9 * count / max(counts) for count in counts]
            ax.stairs(tops, edges, baseline=y, fill=True, fc="#cfcfcf", ec="black", lw=0.8)
            ax.vlines(scores[name][len(scores[name]) // 2], y, y - 0.9, color=BLUE, lw=3)
        ax.set_yticks(range(6), [name.upper() for name in VERSIONS])
        ax.set(ylim=(5.1, -1.05), title=f"score of the {kind} model (logit)")
        ax.grid(axis="y", visible=False)
    return figure


def calibration(runs):
    """Fig. 29."""
    boards = read(runs, "results/scoreboard.json")
    figure, (ax,) = new_figure(
        "Does a higher score mean a better answer?",
        (2.6,),
        "All sampled answers, by the score of V5's reward model of their kind, in groups of equal "
        "size. A well calibrated model would rise from left to right. "
        + (f"A line for each of {len(runs)} seeds." if len(runs) > 1 else ""),
    )
    for (colour, dash, marker), kind in zip(STYLES, KINDS):
        for i, board in enumerate(boards):
            x, y = zip(*board["calibration"][kind])
            label = f"{kind} model" if i == 0 else None
            ax.plot(x, y, dash, marker=marker, color=colour, label=label)
    ax.set(xlabel="score (logit)", ylabel="points of 4.5", ylim=(0, 4.6))
    ax.legend()
    return figure


FIGURES = (evolution, ppo, conversations, obedience, reward_models, reward_shift, calibration)


def write_figures(config: Settings, figures):
    """Draw each figure to config.out; print its path, or which file of the runs it lacks."""
    if matplotlib is None:
        raise ValueError("matplotlib is missing: pip install -r requirements-figures.txt")
    names = {figure.__name__: figure for figure in figures}
    if unknown := set(config.only) - names.keys():
        raise ValueError(f"--only {' '.join(sorted(unknown))}: expected some of {', '.join(names)}")
    runs, folder = [Path(run) for run in config.folders], Path(config.out)
    if missing := [str(run) for run in runs if not run.is_dir()]:
        raise ValueError(f"{missing[0]}: no such folder; run paper.sh first, or name its folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name in config.only or names:
        path = folder / f"{name}.svg"
        try:
            with matplotlib.rc_context(STYLE):
                # Date and Creator would change the bytes without a change of the figure.
                names[name](runs).savefig(path, metadata={"Date": None, "Creator": None})
            print(path)
        except FileNotFoundError as e:
            print(f"{name}: left out: {e.filename} is not there")
        except KeyError as e:
            print(
                f"{name}: left out: its files have no {e}; an earlier version may have written them"
            )


def main(config: Settings):
    write_figures(config, FIGURES)


if __name__ == "__main__":
    run_script(main, Settings, {})
