"""evaluate.figures and evaluate.drawings, on the files of a made-up run."""

import json
import math
import xml.etree.ElementTree

import pytest

from common.settings import describe_settings
from conftest import ROOT
from data.formats import KINDS, RATINGS
from evaluate import drawings, figures, wilson
from evaluate.figures import Point, Settings, fractions, means

ALL = figures.FIGURES + drawings.DRAWINGS
NAMES = [figure.__name__ for figure in ALL]
N = {topic: 40 for topic in ("fact", "sum", "story", "unsafe", "borderline", "talk", "unknown")}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, list):
        path.write_text("".join(json.dumps(record) + "\n" for record in value))
    else:
        path.write_text(json.dumps(value))


def scoreboard(wins: float) -> dict:
    pairs = ("v1 - sft", "v2 - v1", "v3 - v2", "v4 - v3", "v5 - v4", "v5 - sft")
    direct = {pair: {"wins": wins, "margin": 0.02, "contents": 90} for pair in pairs}
    row = {"correct": 0.7, "violations": 0.1, "false refusals": 0.05, "n": N}
    scores = {kind: [math.sin(i) for i in range(280)] for kind in KINDS}
    calibration = {kind: [[-1.0, 1.5], [0.0, 2.5], [2.0, 4.0]] for kind in KINDS}
    return {
        "direct": {"chat": direct},
        "chat": dict.fromkeys(figures.VERSIONS, row),
        "sampled": dict.fromkeys(figures.VERSIONS, row | {"scores": scores}),
        "calibration": calibration,
    }


def make_run(folder, tok, wins=0.6):
    """The files of a run of paper.sh that figures are drawn from."""
    results = folder / "results"
    write(results / "scoreboard.json", scoreboard(wins))
    looks = {str(step): {"reward": 2.0, "truth": 3.0, "kl": 0.1, "n": 64} for step in (0, 10, 20)}
    write(results / "ppo.json", looks)
    of_group = {"n": 100, "correct": [0.9] * 8}
    groups = {"asked": of_group, "never asked": of_group}
    write(results / "conversations.json", dict.fromkeys(("sft", "v5", "gatt"), groups))
    obey = {"obey": [1.0, 0.9, 0.8, 0.8, 0.7, 0.6], "conversations": 12}
    groups = {"trained instructions": obey, "a kind never trained": obey}
    write(results / "obedience.json", {"instructed": groups, "gatt": groups})
    accuracy = {}
    for kind in KINDS:
        accuracy[f"{kind} pairs"] = dict.fromkeys(RATINGS, 50)
        for model in (kind, "a perfect model"):
            accuracy[f"{kind} pairs, {model}"] = dict.fromkeys(RATINGS, 0.7)
    write(results / "reward-models.json", accuracy)

    training = [{"step": step, "loss": 1.0} for step in (10, 20)]
    held_out = {"val/web": 1.2, "val/stories": 0.8, "val_loss": 1.1}
    for stage in ("pretrain", "sft"):
        write(folder / stage / "metrics.jsonl", [*training, {"step": 20} | held_out])
    (folder / "sft/tokenizer.model").write_bytes(tok.proto)
    texts = ("What is 1 plus 1?", "2.", "And 2 plus 2?", "4.")
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    write(folder / "tinytown/dialogues.jsonl", [{"messages": messages}])
    sampling = {"by n": {"1": [1.0, 1.0], "8": [2.0, 1.1]}, "tried": {"0.5": [1.0, 0.1]}}
    for version in ("v1", "v2", "v3", "v4"):
        write(folder / "rlhf" / version / "sampling.json", sampling)
    answer = {"pieces": ["<s>", "\u2581a", "\u2581b", "</s>"], "start": 2}
    answer |= {"reward": 3.0, "whitened": 0.5}
    for key in ("logprobs", "kl", "values", "rewards", "advantages", "returns"):
        answer[key] = [-0.001, 0.5]
    write(folder / "rlhf/v5/rollout.json", {"step": 1, "answers": [answer]})
    return folder


@pytest.fixture
def run(tmp_path, tok):
    return make_run(tmp_path / "run", tok)


def draw(*runs, out, only=()):
    """Write the figures of both modules; returns {name: bytes}."""
    config = Settings(tuple(map(str, runs)), only, str(out))
    figures.write_figures(config, ALL)
    return {path.stem: path.read_bytes() for path in out.iterdir()}


# ------------------------------------------------------------------------------ without matplotlib
def test_without_matplotlib_one_line_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install -r requirements-figures.txt"):
        draw(tmp_path, out=tmp_path / "svg")
    assert (ROOT / "requirements-figures.txt").exists()


def test_bars_are_an_interval_of_one_run_and_the_range_of_several():
    assert fractions([[0.5, 1.0]], 10) == [Point(0.5, *wilson(5, 10)), Point(1.0, *wilson(10, 10))]
    assert fractions([[0.5, 0.5]], [10, 20])[1] == Point(0.5, *wilson(10, 20))
    assert fractions([[0.25], [0.75]], 10) == [Point(0.5, 0.25, 0.75)]
    assert means([[2.0]]) == [Point(2.0, 2.0, 2.0)]
    assert means([[1.0], [2.0], [6.0]]) == [Point(3.0, 1.0, 6.0)]


def test_every_setting_of_the_figures_has_a_description():
    described = {name: text for _, name, text in describe_settings(Settings)}
    assert described.keys() == vars(Settings()).keys()


# --------------------------------------------------------------------------------- with matplotlib
def test_every_figure_is_drawn_from_the_files_of_a_run(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    drawn = draw(run, out=tmp_path / "svg")
    assert drawn.keys() == set(NAMES), capsys.readouterr().out
    for svg in drawn.values():
        assert xml.etree.ElementTree.fromstring(svg).tag.endswith("svg")


def test_the_same_files_give_the_same_bytes(run, tmp_path):
    pytest.importorskip("matplotlib")
    some = ("evolution", "reward_shift", "pipeline")
    first, second = (draw(run, out=tmp_path / name, only=some) for name in "ab")
    assert first == second
    assert not any(b"dc:date" in svg for svg in first.values())


def test_other_seeds_and_reward_hacking_are_drawn_if_they_are_there(run, tok, tmp_path):
    pytest.importorskip("matplotlib")
    other = make_run(tmp_path / "other", tok, wins=0.7)
    alone = draw(run, out=tmp_path / "a", only=("evolution", "ppo"))
    both = draw(run, other, out=tmp_path / "b")
    assert both.keys() == set(NAMES) and both["evolution"] != alone["evolution"]
    looks = {step: {"reward": 4.0, "truth": 1.0, "kl": 9.0} for step in ("0", "10")}
    write(run / "bench/hacking.json", {"default": [looks], "beta 0": [looks, looks]})
    assert draw(run, out=tmp_path / "c", only=("ppo",))["ppo"] != alone["ppo"]


def test_a_figure_whose_file_or_key_is_missing_is_left_out_and_named(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    missing = run / "results/obedience.json"
    missing.unlink()
    looks = {"0": {"reward": 2.0, "truth": 3.0}}
    write(run / "results/ppo.json", looks)  # without "n"
    drawn = draw(run, out=tmp_path / "svg", only=("obedience", "ppo", "kv_cache"))
    assert drawn.keys() == {"kv_cache"}
    output = capsys.readouterr().out
    assert f"obedience: left out: {missing} is not there" in output
    assert "ppo: left out: its files have no 'n'" in output


def test_wrong_names_and_folders_are_refused(run, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="--only evolutoin: expected some of evolution"):
        draw(run, out=tmp_path / "svg", only=("evolutoin",))
    with pytest.raises(ValueError, match="gone: no such folder"):
        draw(run, tmp_path / "gone", out=tmp_path / "svg")


@pytest.mark.parametrize("figure", ALL)
def test_a_figure_can_be_read_at_the_width_of_a_phone(run, figure):
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context(figures.STYLE):
        drawn = figure([run])
    assert drawn.get_figwidth() * 72 <= 360
    texts = [text for text in drawn.findobj(matplotlib.text.Text) if text.get_text()]
    assert texts and min(text.get_fontsize() for text in texts) >= 9
    canvas = drawn.bbox
    for text in drawn.texts:  # title and note
        box = text.get_window_extent()
        assert canvas.x0 <= box.x0 and box.x1 <= canvas.x1, text.get_text()
