"""docs/GPU.md: its commands, and README's torchrun, with two processes and tiny models."""

import os
import re
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
from test_own_data import execute
from torch.distributed.run import get_args_parser

from conftest import ROOT, make_model
from llama2 import save

SMALL = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=8)  # for 1B
SHORT = {  # options that make a command take seconds; the rest of --recipe paper stays
    "train_pretrain.py": "--seq-len 64 --batch-size 4 --max-steps 3 --eval-tokens 256",
    "train_sft.py": "--seq-len 256 --batch-size 8 --epochs 1",
    "train_rm.py": "--batch-size 16",
    "train_rlhf.py": "--iterations 2 --max-new-tokens 6",
    "data.preferences": "--max-new-tokens 6",
}
TWO_PROCESSES = """import sys
import pytest
import torch.distributed as dist
from llama2 import SIZES
from test_gpu import SMALL
from test_own_data import execute

SIZES["1B"] = SMALL
# Each command would leave the group at its end, and a process can join only one.
leave, dist.destroy_process_group = dist.destroy_process_group, lambda: None
with pytest.MonkeyPatch.context() as patch:
    for command in open(sys.argv[1]).read().splitlines():
        execute(command, patch)
        assert dist.get_world_size() == 2, command
leave()
"""


def commands_of(page: str) -> list[str]:
    """The commands of a page: all lines of its blocks of code, and those in backquotes."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
    quoted = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    lines = [line for line in "".join(blocks).splitlines() if line]
    lines += [code for code in quoted if re.search(r"^(torchrun|python|bash) |\.(py|sh) ", code)]
    return [" ".join(line.split()) for line in lines]


def short(command: str) -> tuple[SimpleNamespace, str]:
    """(torchrun's options, the words after them with options that make it short)."""
    options = get_args_parser().parse_args(command.split()[1:])
    name = options.training_script
    words = [*options.training_script_args, *SHORT[name].split()]
    # The precision of a GPU, and the same one on every CPU.
    words += ["--device", "cpu", "--dtype", "bfloat16"]
    return options, " ".join(["-m"] * options.module + [name, *words])


def torchrun(folder, *words):
    """Start torchrun in a folder."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, words)]
    return subprocess.Popen(command, cwd=folder, env=os.environ | {"PYTHONPATH": path})


@pytest.fixture(scope="module")
def folder(tmp_path_factory, inputs, tok):
    """The files that the commands read."""
    folder = tmp_path_factory.mktemp("gpu")
    shutil.copytree(inputs.tokens, folder / "out/mine/tokens")
    save(folder / "llama-2-7b", make_model(n_kv_heads=4, vocab_size=tok.vocab_size), tok)
    for name in ("mine", "pairs", "prompts", "val", "compare"):
        path = dict(mine=inputs.dialogues, pairs=inputs.pairs, val=inputs.val_prompts)
        shutil.copy(path.get(name, inputs.prompts), folder / f"{name}.jsonl")
    return folder


def commands(part: str) -> list[str]:
    """The commands of docs/GPU.md with these words, and those about GPUs in README."""
    lines = commands_of("docs/GPU.md")
    lines += [line for line in commands_of("README.md") if re.search("torchrun|memory", line)]
    return [line for line in lines if part in line]


TESTED = {"torchrun --nproc_per_node=8 ": 7, "torchrun --nnodes=2 ": 1, "-m common.memory ": 3}


def test_every_command_of_the_page_is_run_by_a_test_of_this_file():
    for command in commands(""):
        assert any(words in command for words in TESTED), f"no test runs {command}"
    assert {words: len(commands(words)) for words in TESTED} == TESTED


def test_the_commands_with_torchrun_run_with_two_processes(folder):
    """One torchrun for all, because importing torch takes long."""
    lines, outputs = [], []
    for command in commands("torchrun --nproc_per_node=8"):
        options, line = short(command)
        assert options.nproc_per_node == "8"
        lines.append(line)
        outputs.append(folder / line.split("--out ")[1].split()[0])
    (folder / "commands").write_text("\n".join(lines))
    (folder / "script.py").write_text(TWO_PROCESSES)
    words = ("--standalone", "--nproc_per_node=2", "script.py", "commands")
    assert torchrun(folder, *words).wait() == 0
    for out in outputs:
        assert out.suffix == ".jsonl" or [*out.rglob("consolidated.00.pth")], out
        assert out.exists()


def test_two_machines_run_the_command_of_the_page(folder):
    """Two torchruns with a process each, in place of eight. What "..." stands for is ours."""
    [command], [of_one] = commands("torchrun --nnodes=2 "), commands("--out out/chat-7b")
    more = of_one.split("train_sft.py ")[1].replace("chat-7b", "chat-two")
    options, line = short(command.replace("...", more))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    assert (options.rdzv_endpoint, options.nproc_per_node) == ("HOST:29500", "8")
    start = command.split(" train_sft.py")[0].split()[1:]
    start = [word.replace("HOST:29500", address).replace("node=8", "node=1") for word in start]
    words = [*start, "--local_addr=localhost", ROOT / line.split()[0], *line.split()[1:]]
    nodes = [torchrun(folder, *words) for _ in range(2)]
    assert [node.wait() for node in nodes] == [0, 0]
    assert (folder / "out/chat-two/consolidated.00.pth").exists()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_planners_commands_run(monkeypatch, capsys):
    for command in commands("-m common.memory "):
        execute(command.removeprefix("python "), monkeypatch)
        assert "in all" in capsys.readouterr().out
