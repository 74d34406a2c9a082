"""The README's path for own data, and what the commands say where there is no truth."""

import gzip
import io
import json
import re
import runpy
import shlex
import sys
from dataclasses import replace

import pytest

import llama2
import train_rm
from conftest import EXACT, ROOT, dialog, hh_text, run_command, stage, write_jsonl
from data.files import read_json
from evaluate import answers, scoreboard

# ---------------------------------------------------------------------------- the README's commands
SHORT = {  # options that make a command of the README take seconds
    "data.corpus": "--vocab-size 400",
    "train_pretrain.py": "--max-steps 40 --seq-len 64 --eval-tokens 640",
    "evaluate.scoreboard": "--max-new-tokens 6",
    "train_sft.py": "--epochs 4 --batch-size 2",
    "data.preferences": "--max-new-tokens 12",
    "train_rm.py": "--val-fraction 0 --lr 1e-4",
    "train_rlhf.py": "--iterations 2 --max-new-tokens 40",
    "data.ghost_attention": "--max-new-tokens 12",
    "llama2.py": "--max-new-tokens 5",
}


def execute(command, monkeypatch):
    """Run `python command` in this process, because importing torch takes long."""
    if command.startswith("train_rlhf.py"):
        is_ppo = "--method ppo" in command
        command += " --batch-size 4 --mini-batch 4" if is_ppo else " --samples 2"
    run_words(shlex.split(command), monkeypatch)


def run_words(words, monkeypatch):
    """Run Python with these words in this process."""
    module = words[0] == "-m"
    name, *options = words[1:] if module else words
    monkeypatch.setattr(sys, "argv", [name, *options])
    if module:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(ROOT / name), run_name="__main__")


def write_own_data(folder):
    """The files of the README's path for own data, in the formats of public data sets."""
    colours = "red blue green white black yellow".split()
    pages, alpaca, sharegpt, wanted, hh_rlhf, ultrafeedback = [], [], [], [], [], []
    instructed = []
    for i in range(60):
        colour, wrong = colours[i % 6], colours[(i + 1) % 6]
        question, good, bad = f"Colour {i}?", f"It is {colour}.", f"It is {wrong}."
        pages.append({"text": f"Box {i % 7} is {colour}. You can ask for a {colour} box."})
        alpaca.append(dict(instruction=question, input="", output=good, text="### Instruction:"))
        instructed.append(dict(messages=dialog(f"Be brief. {question}", good)))
        wanted.append({"prompt": f"Say the colour {i}.", "is_safety": i % 5 == 0})
        pair = dict(chosen=hh_text(question, good), rejected=hh_text(question, bad))
        hh_rlhf.append(pair)
        pair = dict(chosen=dialog(question, good), rejected=dialog(question, bad))
        scores = dict(prompt_id="9f", score_chosen=8.5, score_rejected=5.0)
        ultrafeedback.append(dict(prompt=question, messages=pair["chosen"], **pair, **scores))
    for i in range(9):
        turns = "And?", f"It is {colours[i % 6]}.", "So?", "No."
        turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(turns)]
        sharegpt.append({"id": f"identity_{i}", "conversations": turns})
    (folder / "book.txt").write_text("A red box and a blue box stand on a shelf.\n" * 50)
    (folder / "alpaca.json").write_text(json.dumps(alpaca, indent=4))
    (folder / "sharegpt.json").write_text(json.dumps(sharegpt, indent=2))
    lines = "".join(json.dumps(record) + "\n" for record in hh_rlhf[:20])
    (folder / "hh-rlhf.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for name, data in {
        "pages": pages,
        "prompts": wanted[:12],
        "val": wanted[12:18],
        "compare": wanted[18:48],
        "test": wanted[48:52],
        "instructed": instructed[:20],
        "ultrafeedback": ultrafeedback[:20],
        "instructions": [{"instruction": "Be brief."}],
    }.items():
        write_jsonl(folder / f"{name}.jsonl", data)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_readmes_commands_for_own_data_run_as_written(tmp_path, monkeypatch, capsys):
    """Texts, dialogues, labels by a person, two versions, a scoreboard, Ghost Attention, a chat.

    Letters that do not fit a question are asked again, so what is piped suits all prompts.
    """
    write_own_data(tmp_path)
    small = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=16)
    monkeypatch.setitem(llama2.SIZES, "tiny", small)  # the README's models, in seconds
    commands = []
    for page, before in (("README.md", "## Your own data"), ("docs/DATA.md", "A further round")):
        block = (ROOT / page).read_text().split(before)[1].split("```")[1]
        commands += re.findall(r"^python (.*)$", block.replace("\\\n", " "), re.M)
    assert len(commands) == 12 + 3
    for command in commands:
        name = re.search(r"(\w+\.py|(?<=-m )\S+)", command)[1]
        typed = "Colour 3?\n" if name == "llama2.py" else "b\n3\ny\ny\n" * 30
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        monkeypatch.chdir(tmp_path)
        exact = "" if name == "data.corpus" else "--dtype float32"  # the same on every CPU
        execute(f"{command} {SHORT[name]} {exact}", monkeypatch)
        output = capsys.readouterr().out
        expected = {
            "data.preferences": r"(\d+) of \1 compared",
            "train_sft.py": "cut to the context\n",  # nothing was left out
            "evaluate.scoreboard": "4 prompts of test.jsonl, compared with chat",
        }
        assert re.search(expected.get(name, ""), output), command
        if "ultrafeedback" in command:
            n_pairs = int(re.search(r"(\d+) pairs", output)[1])
            assert n_pairs > 40  # 40 public pairs and the person's labels
        if name == "llama2.py":
            assert len(output.splitlines()) >= 2  # the chat has answered
    assert {"v1", "v2", "v3", "instructed", "gatt"} <= {
        path.name for path in (tmp_path / "out/mine").iterdir()
    }


# -------------------------------------------------------------------------------- without a truth
def own_prompts(inputs):
    """Prompts as a user has them: neither topic nor truth."""
    records = []
    for _, record in read_json(inputs.val_prompts):
        records.append({key: record[key] for key in ("prompt", "is_safety")})
    return records


def test_the_scoreboard_of_own_prompts_has_what_needs_no_truth(tmp_path, inputs, capsys):
    path = str(write_jsonl(tmp_path / "own.jsonl", own_prompts(inputs)))
    models = dict(folders=(inputs.base,), against=inputs.base, rm=inputs.rm)
    config = scoreboard.Settings(prompts=path, max_new_tokens=5, **models, **EXACT)
    results = scoreboard.main(config)
    output = capsys.readouterr().out
    assert output.count("own.jsonl has no truths: whatever needs the truth is left out") == 1
    assert results.keys() == {"greedy", "chat", "sampled"}
    (row,) = results["sampled"].values()
    scores, kl = row.pop("scores"), row.pop("kl")
    assert (len(scores["helpfulness"]), kl) == (8, pytest.approx(0, abs=1e-3))
    (greedy,) = results["greedy"].values()
    by_scores = {f"{what} {kind}" for what in ("mean", "wins by") for kind in scores}
    assert row.keys() == greedy.keys() == {"length", "distinct", *by_scores}
    (heading,) = [line for line in output.splitlines() if line.startswith("greedy")]
    assert heading.split() == "greedy by Rh by Rs Rh Rs length distinct".split()


def test_answers_to_own_prompts_are_counted_and_shown(tmp_path, inputs, monkeypatch, capsys):
    """A system message and earlier turns in fields of their own are part of the prompt."""
    seen = []

    def respond(model, tok, dialogs, *_):
        seen.extend(len(messages) for messages in dialogs)
        return ["one two", "one two", ""]

    monkeypatch.setattr(answers, "respond", respond)
    records = [dict(prompt="a"), dict(prompt="b", topic="news"), dict(prompt="c", system="s")]
    path = str(write_jsonl(tmp_path / "own.jsonl", records))
    config = answers.Settings(folders=(inputs.base,), prompts=path, show=1, **EXACT)
    columns = answers.main(config)
    assert seen == [1, 1, 2] * 2
    third = pytest.approx(1 / 3)
    expected = {"words per answer": pytest.approx(4 / 3), "distinct": pytest.approx(2 / 3)}
    assert list(columns.values())[:2] == [expected | {"empty": third}] * 2
    assert columns["n"]["distinct"] == 3
    assert "one two" in capsys.readouterr().out


def test_ppos_samples_of_own_prompts_have_a_reward_and_no_truth(tmp_path, inputs):
    records, lines = own_prompts(inputs), []
    for record in records:
        lines.append(dict(step=0, prompt=record["prompt"], answer="Hm.", reward=1.0))
    samples = str(write_jsonl(tmp_path / "samples.jsonl", lines))
    path = str(write_jsonl(tmp_path / "own.jsonl", records))
    config = answers.Settings(samples=samples, prompts=path)
    assert answers.main(config) == {0: {"reward": 1, "n": len(records)}}


def test_one_prompt_with_a_truth_among_own_prompts_is_an_error_with_a_place(
    tmp_path, inputs, expect_error
):
    path = str(write_jsonl(tmp_path / "own.jsonl", [dict(prompt="a"), dict(prompt="b", truth=1)]))
    config = answers.Settings(folders=(inputs.base,), prompts=path, **EXACT)
    expect_error(answers, config, "own.jsonl:1: expected a prompt of Tinytown")


# ------------------------------------------------------------------------------------- few labels
def test_few_labels_give_one_line_for_few_steps_and_one_for_few_held_out_pairs(
    tmp_path, inputs, monkeypatch, capsys
):
    _, config = stage("rm", inputs, tmp_path / "few", batch_size=40, epochs=1)
    run_command(config, train_rm, monkeypatch)
    few = capsys.readouterr().out
    held_out = re.search(r"([0-9]+) held out", few)[1]
    assert f"accuracy on {held_out} held-out pairs says little" in few
    assert "the learning rate never reaches its peak: 5 steps of warm-up, 1 in total" in few
    many = replace(config, out=str(tmp_path / "many"), val_fraction=0.8, batch_size=2)
    run_command(many, train_rm, monkeypatch)
    assert not re.search("says little|never reaches", capsys.readouterr().out)
    none = replace(config, out=str(tmp_path / "none"), val_fraction=0.0)
    run_command(none, train_rm, monkeypatch)
    assert "says little" not in capsys.readouterr().out
