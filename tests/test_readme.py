"""The commands that the README and the lessons ask a reader to type, at a size of seconds."""

import io
import re
import shutil
import sys

import pytest
from test_own_data import SHORT, execute

from conftest import ROOT, write_jsonl

SHORTER = SHORT | {  # options that make a command take seconds
    "train_sft.py": "--epochs 1 --batch-size 8 --seq-len 256",
    "train_rm.py": "--batch-size 8",
    "train_rlhf.py": "--iterations 2 --batch-size 4 --mini-batch 4 --max-new-tokens 6 --lr 1e-4",
    "data.preferences": "--max-new-tokens 6",
    "evaluate.answers": "",
    "evaluate.reward_models": "",
    "llama2.py": "--max-new-tokens 5",
    "data.answer": "--max-new-tokens 5",
    "common.memory": "",
}


def commands_of(page: str) -> list[str]:
    """The Python commands of a page: in backquotes, or after "$ " in a block.

    Of a lesson those of its exercises: its others are those of paper.sh. The README's two long
    blocks have tests of their own, in test_own_data.py and test_huggingface.py.
    """
    text = (ROOT / page).read_text()
    if page != "README.md":
        text = text.split("## Exercises")[1].split("\n## ")[0]
    text = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
    quoted = re.findall(r"`(python [^`]+)`", text)
    quoted += re.findall(r"^\$ (python .*)$", (ROOT / page).read_text(), re.M)
    if page == "README.md":
        start = (ROOT / page).read_text().split("## Start")[1].split("\n## ")[0]
        quoted += re.findall(r"^(python .*)$", start, re.M)
    return [" ".join(command.split()).removeprefix("python ") for command in quoted]


def make_out(folder, inputs, town):
    """A finished run of paper.sh as far as the exercises need it, with tiny models."""
    for name in ("pretrain", "sft", "gatt", "rlhf/v4", "rlhf/v5"):
        shutil.copytree(inputs.base, folder / name)
    for version in ("v1", "v5"):
        shutil.copytree(inputs.rm, folder / "rm" / version)
    for name in ("tinytown", "preferences"):
        (folder / name).mkdir()
    for name in ("v1", "test"):
        shutil.copy(inputs.pairs, folder / f"preferences/{name}.jsonl")
    shutil.copy(inputs.dialogues, folder / "tinytown/dialogues.jsonl")
    shutil.copy(inputs.val_prompts, folder / "tinytown/prompts-val.jsonl")
    shutil.copy(inputs.prompts, folder / "tinytown/prompts-v5.jsonl")
    for name, count in (("replay", 20), ("contrasts", 40), ("held-out", 40)):
        write_jsonl(folder / f"tinytown/{name}.jsonl", town[name][:count])
    short = [prompt for prompt in town["compare-v1"] if isinstance(prompt["prompt"], str)]
    write_jsonl(folder / "tinytown/compare-v1.jsonl", short[:400])


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(
    "page", ["README.md", *sorted(map(str, (ROOT / "docs/lesson").glob("*.md")))]
)
def test_the_commands_of_a_page_run_as_written(tmp_path, inputs, town, monkeypatch, capsys, page):
    make_out(tmp_path / "out", inputs, town)
    for name in ("llama-2-7b-chat", "out/mine/chat", "out/quick/rlhf/v2"):
        shutil.copytree(inputs.base, tmp_path / name)
    shutil.copy(inputs.prompts, tmp_path / "test.jsonl")
    monkeypatch.chdir(tmp_path)
    run = 0
    for command in commands_of(page):
        name = re.search(r"(\w+\.py|(?<=-m )\S+)", command)[1]
        if name == "pytest":
            words = re.search(r'-k "?([\w ]+)"?', command)[1]
            tests = (ROOT / "test_llama2.py").read_text()
            assert any(re.search(rf"def test_\w*{word}", tests) for word in words.split(" or "))
            continue
        typed = "What is 2 + 2?\n" if name == "llama2.py" else "a\n2\ny\ny\n" * 30
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        capsys.readouterr()
        exact = "" if name == "common.memory" else "--dtype float32"
        execute(f"{command} {SHORTER[name]} {exact}", monkeypatch)
        assert capsys.readouterr().out, command
        run += 1
    assert run
