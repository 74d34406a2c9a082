"""Drawings that explain the code, most of them with the numbers of a run, as SVG files.

    python -m evaluate.drawings out --out docs/figures

pipeline and kv_cache need no run, but the folder must exist. Settings are those of
evaluate.figures, which draws the results.
"""

import itertools
import textwrap
from pathlib import Path

from common.run import run_script
from data.files import read_objects
from evaluate.figures import (
    BLUE,
    GREY,
    STYLES,
    VERSIONS,
    Settings,
    means,
    new_figure,
    plot_points,
    read,
    write_figures,
)
from llama2 import SIZES, ModelArgs, Tokenizer, encode_dialog, kv_cache_bytes

MONO = {"family": "monospace", "size": 9}
DATA_X, COMMAND_X, MODEL_X = 1.5, 4.85, 8.4  # centres of the columns of the pipeline
# fmt: off
PIPELINE = (  # height, data, commands, section, model and its folder
    (13.0, "texts", "data.corpus\ntrain_pretrain.py", "§2", "base model\nout/pretrain"),
    (10.8, "dialogues", "train_sft.py", "§3.1", "chat model\nout/sft"),
    (7.6, "pairs of\nanswers", "train_rm.py", "§3.2.2", "reward models\nout/rm/v1 to v5"),
    (5.4, "prompts", "train_rlhf.py", "§3.2.3", "next version\nout/rlhf/v1 to v5"),
    (2.7, "instructions", "data.ghost_attention\ntrain_sft.py", "§3.3", "obedient model\nout/gatt"),
    (0.4, "attacks", "data.distillation\ntrain_sft.py", "§4.2.4", "safer model\n(not in make)"),
)
# fmt: on


def show_space(piece: str) -> str:
    """A piece of the tokenizer with "_" for a space, which SentencePiece writes as U+2581."""
    return piece.replace("\u2581", "_")


def pipeline(runs):
    """Fig. 4."""
    figure, (ax,) = new_figure(
        "The whole paper as commands",
        (6.4,),
        "Grey: files that you can open. White: models and their folders. V1 to V4 come from "
        "rejection sampling, V5 from PPO. Ghost Attention starts from V3.",
    )
    ax.set(xlim=(-0.05, 11.05), ylim=(-0.7, 13.8))
    ax.axis("off")

    def arrow(*points):
        ax.plot(*zip(*points), color="black", lw=1.5, solid_capstyle="butt")
        head = dict(arrowstyle="-|>,head_width=0.3,head_length=0.6", fc="black")
        ax.annotate("", points[-1], points[-2], arrowprops=head | dict(shrinkA=0, shrinkB=0))

    def box(x, y, text, **look):
        look = dict(boxstyle="round,pad=0.4") | look
        ax.text(x, y, text, ha="center", va="center", size=10, bbox=look, zorder=5)

    ax.fill_between((0, 11), 4.2, 9.9, color="#f3f3f3", lw=0, zorder=0)
    ax.plot((0, 11, 11, 0, 0), (4.2, 4.2, 9.9, 9.9, 4.2), "--", color=GREY, lw=1.2)
    ax.text(0.2, 4.4, "five rounds, V1 to V5", size=9.5, style="italic")
    for y, data, commands, section, model in PIPELINE:
        arrow((DATA_X + 1.35, y), (MODEL_X - 1.75, y))
        ax.text(COMMAND_X - 0.1, y + 0.12, commands, ha="center", va="bottom", **MONO)
        ax.text(COMMAND_X - 0.1, y - 0.15, section, ha="center", va="top", size=9.5)
        box(DATA_X, y, data, fc="#d9d9d9", lw=0)
        box(MODEL_X, y, model, fc="white", lw=1.6)
    for (upper, *_), (lower, *_) in zip(PIPELINE, PIPELINE[1:]):
        arrow((MODEL_X, upper - 0.6), (MODEL_X, lower + 0.6))
    # The chat model writes the answers that are compared. In the next round it is the new version.
    arrow((MODEL_X - 1.2, 10.5), (DATA_X + 0.5, 8.25))
    ax.text(0.15, 9.3, "data.preferences", **MONO)
    ax.text(0.15, 8.85, "§3.2.1", size=9.5)
    arrow((MODEL_X + 1.6, 5.4), (10.7, 5.4), (10.7, 10.8), (MODEL_X + 1.15, 10.8))
    return figure


def sft_mask(runs):
    """The loss mask of §3.1, on a dialogue that the run trains on."""
    tok = Tokenizer(runs[0] / "sft/tokenizer.model")
    dialogs = read_objects(runs[0] / "tinytown/dialogues.jsonl", messages=list)
    encoded = []
    for _, record in itertools.islice(dialogs, 200):
        if len(record["messages"]) == 4:
            encoded.append(encode_dialog(tok, record["messages"]))
    tokens, mask = min(encoded, key=lambda pair: abs(len(pair[0]) - 48))  # three or four lines
    lines, x = [[]], 0.0  # of (x, width, piece, counts in the loss)
    for token, counts in zip(tokens, mask):
        piece = show_space(tok.sp.id_to_piece(token))
        width = len(piece) + 0.9
        if x + width > 57:
            lines.append([])
            x = 0.0
        lines[-1].append((x, width, piece, counts))
        x += width + 0.25
    figure, (ax,) = new_figure(
        "Which tokens count in the loss of fine-tuning",
        (0.29 * len(lines) + 0.05,),
        "One dialogue as encode_dialog (llama2.py) makes it. White: tokens that are only read. "
        "Dark: tokens whose prediction counts in sft_loss. A _ is a space. Paper, §3.1: the loss "
        "on tokens of the user is zero.",
    )
    ax.set(xlim=(-0.2, 57.2), ylim=(len(lines) - 0.45, -0.55))
    ax.axis("off")
    for y, line in enumerate(lines):
        for x, width, piece, counts in line:
            face, ink = (BLUE, "white") if counts else ("white", "black")
            ax.bar(x, 0.78, width, y - 0.39, align="edge", color=face, ec="#555555", lw=0.8)
            ax.text(x + width / 2, y + 0.02, piece, ha="center", va="center", color=ink, **MONO)
    return figure


def ppo_tokens(runs):
    """The table of train_rlhf.py's docstring, with the numbers of an answer."""
    (rollout,) = read(runs[:1], "rlhf/v5/rollout.json")
    # Of the answers with at most 16 tokens (or else the shortest) the one that changed most.
    answer = min(
        rollout["answers"],
        key=lambda answer: (max(16, len(answer["kl"])), -max(map(abs, answer["kl"]))),
    )
    pieces, start = answer["pieces"], answer["start"]
    prompt = textwrap.wrap("".join(pieces[1:start]).replace("\u2581", " ").strip(), 52)
    n = len(answer["kl"])
    figure, (ax,) = new_figure(
        "One answer of PPO, token by token",
        (0.235 * (n + len(prompt)) + 0.55,),
        f"Iteration {rollout['step']}. Reward of the whole answer, logit(Rc): "
        f"{answer['reward']:.2f}; whitened over the batch: {answer['whitened']:.2f}, added at the "
        "last token. Every token's reward contains -beta KL (Eq. 4). Advantage (gae): dark bars "
        "are above 0, white ones below.",
    )
    ax.set(xlim=(0, 13.6), ylim=(n - 0.4, -2.2 - len(prompt)))
    ax.axis("off")
    for i, line in enumerate(prompt):
        ax.text(0.1, i - 1.6 - len(prompt), line, va="center", **MONO)
    columns = {"log p": ("logprobs", 5.3), "KL": ("kl", 6.7), "value": ("values", 8.2)}
    columns["reward"] = ("rewards", 10.2)
    bold = dict(size=10, weight="bold", va="center")
    ax.text(0.1, -1.1, "token", **bold)
    ax.text(12.1, -1.1, "advantage", ha="center", **bold)
    for name, (_, x) in columns.items():
        ax.text(x, -1.1, name, ha="right", **bold)
    widest = max(map(abs, answer["advantages"])) or 1.0
    for i, advantage in enumerate(answer["advantages"]):
        if i % 2 == 0:
            ax.axhspan(i - 0.5, i + 0.5, color="#efefef", lw=0)
        number = dict(ha="right", va="center", size=9.5)
        ax.text(0.85, i, start + i, color="#555555", **number)
        ax.text(1.1, i, show_space(pieces[start + i]), va="center", **MONO)
        for key, x in columns.values():
            ax.text(x, i, f"{round(answer[key][i], 2) + 0.0:.2f}", **number)
        color = BLUE if advantage > 0 else "white"
        ax.barh(i, 1.3 * advantage / widest, 0.65, left=12.1, color=color, ec="black", lw=0.8)
    ax.plot((12.1, 12.1), (-0.5, n - 0.5), color="black", lw=1)
    return figure


def read_log(runs: list[Path], stage: str, key: str) -> tuple[list[int], list[list[float]]]:
    """(steps at which all runs logged this metric, its values [run][step])."""
    logs = []
    for run in runs:
        lines = [line for _, line in read_objects(run / stage / "metrics.jsonl", step=int)]
        logs.append({line["step"]: line[key] for line in lines if line.get(key) is not None})
    steps = sorted(set.intersection(*map(set, logs)))
    return steps, [[log[step] for step in steps] for log in logs]


def loss(runs):
    """Fig. 5."""
    *_, (_, last) = read_objects(runs[0] / "pretrain/metrics.jsonl", step=int)
    sources = [key for key in last if key.startswith("val/")]
    figure, (top, bottom) = new_figure(
        "Loss in pretraining and in fine-tuning",
        (2.5, 1.8),
        "Thin line: training, the mean since the line's last point. Markers: held-out texts. "
        + (f"Means of {len(runs)} seeds." if len(runs) > 1 else ""),
    )
    panels = ((top, "pretrain", sources), (bottom, "sft", ["val_loss"]))
    for ax, stage, keys in panels:
        steps, rows = read_log(runs, stage, "loss")
        ax.plot(steps, [point.value for point in means(rows)], color="#b5b5b5", lw=1.5)
        for style, key in enumerate(keys):
            steps, rows = read_log(runs, stage, key)
            label = key.removeprefix("val/").replace("val_loss", "held out")
            plot_points(ax, steps, means(rows), label, style)
        ax.set(ylabel="nats per token", ylim=(0, None))
        ax.legend(ncols=2)
    top.set_title("pretraining (§2)")
    bottom.set(title="fine-tuning (§3.1): tokens of answers only", xlabel="step")
    return figure


def best_of_n(runs):
    """Fig. 7 and 8, with the answers that rejection sampling learns from."""
    versions = VERSIONS[1:5]
    rounds = {version: read(runs, f"rlhf/{version}/sampling.json") for version in versions}
    figure, (top, bottom) = new_figure(
        "What rejection sampling can gain",
        (2.1, 2.7),
        "Above: the best of N answers minus their median, mean over prompts (paper, Fig. 7). Each "
        "round has its own reward models: only differences can be compared. Below: the reward at "
        "each temperature that was tried (Fig. 8), bars: 95% intervals"
        + (" of the first seed." if len(runs) > 1 else "."),
    )
    for style, version in enumerate(versions):
        sizes = list(rounds[version][0]["by n"])
        gains = []
        for n in sizes:
            gaps = [found["by n"][n][0] - found["by n"][n][1] for found in rounds[version]]
            gains.append(sum(gaps) / len(gaps))
        colour, dash, marker = STYLES[style]
        x = [int(n) for n in sizes]
        top.plot(x, gains, dash, marker=marker, color=colour, label=version.upper())
        tried = rounds[version][0]["tried"]
        for shift, (temperature, (mean, error)) in enumerate(tried.items()):
            y, face = style + 0.8 * shift / len(tried), (colour, "white")[shift % 2]
            bottom.hlines(y, mean - 1.96 * error, mean + 1.96 * error, color=colour, lw=1.5)
            bottom.plot(mean, y, marker, color=face, mec=colour, ms=7)
            bottom.text(mean + 1.96 * error, y, f"  T = {temperature}", va="center", size=9)
    top.set_xscale("log", base=2)
    top.set_xticks(x, sizes)
    top.set(xlabel="N, answers to a prompt", ylabel="gain, logit(Rc)")
    top.legend(ncols=2)
    bottom.set_yticks([i + 0.2 for i in range(4)], [version.upper() for version in versions])
    bottom.set(ylim=(3.6, -0.4), xlabel="reward, logit(Rc)")
    bottom.margins(x=0.22)
    return figure


def kv_cache(runs):
    """A.2.1, by kv_cache_bytes."""
    figure, (ax,) = new_figure(
        "Grouped-query attention shrinks the cache",
        (3.0,),
        "Keys and values of one sequence in 16 bits, by kv_cache_bytes (llama2.py). MHA: a key "
        "head for every query head. GQA: 8 key heads. MQA: 1. Thick: what Llama 2 has.",
    )
    lengths = [1024 * 2**i for i in range(8)]
    for size, colour in (("70B", "black"), ("7B", BLUE)):
        args = SIZES[size]
        own = ModelArgs(**args).n_kv_heads
        for name, heads, dash in (("MHA", args["n_heads"], "-"), ("GQA", 8, "--"), ("MQA", 1, ":")):
            shape = ModelArgs(**args | {"n_kv_heads": heads})
            gigabytes = [kv_cache_bytes(shape, 1, length) / 1e9 for length in lengths]
            ax.plot(lengths, gigabytes, dash, color=colour, lw=3 if heads == own else 1.3)
            label = f"{size} {name}"  # two of them end at nearly the same height
            va = {"7B MHA": "bottom", "70B GQA": "top"}.get(label, "center")
            ax.text(lengths[-1] * 1.1, gigabytes[-1], label, va=va, size=9.5)
    ax.axvline(4096, color=GREY, lw=1)
    ax.text(4300, 0.012, "context of Llama 2", size=9.5)
    ax.set(xscale="log", yscale="log", ylabel="GB", xlabel="tokens", xlim=(1000, 480000))
    ax.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
    ax.set_yticks((0.1, 1, 10, 100), ("0.1", "1", "10", "100"))
    ax.minorticks_off()
    return figure


DRAWINGS = (pipeline, sft_mask, ppo_tokens, loss, best_of_n, kv_cache)


def main(config: Settings):
    write_figures(config, DRAWINGS)


if __name__ == "__main__":
    run_script(main, Settings, {})
