"""docs/GPU.md: its commands, and README's torchrun, with two processes; bench/gpu.sh on a CPU."""

import os
import re
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from test_own_data import run_words
from torch.distributed.run import get_args_parser

import train_pretrain
from conftest import ROOT, make_model, weights
from llama2 import SIZES, save

SMALL = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=8)  # for tiny and 1B
SHORT = {  # options that make a command take seconds; the rest of --recipe paper stays
    "train_pretrain.py": "--seq-len 64 --batch-size 4 --max-steps 3 --eval-tokens 256",
    "train_sft.py": "--seq-len 256 --batch-size 8 --epochs 1",
    "train_rm.py": "--batch-size 16",
    "train_rlhf.py": "--batch-size 4 --mini-batch 4 --iterations 2 --max-new-tokens 6",
    "data.preferences": "--max-new-tokens 6",
}
TWO_PROCESSES = """import sys
import pytest
import torch.distributed as dist
from llama2 import SIZES
from test_gpu import SMALL
from test_own_data import run_words

SIZES["1B"] = SIZES["tiny"] = SMALL
# Each command would leave the group at its end, and a process can join only one.
leave, dist.destroy_process_group = dist.destroy_process_group, lambda: None
with pytest.MonkeyPatch.context() as patch:
    for line in open(sys.argv[1]).read().splitlines():
        run_words(line.split("\\t"), patch)
        assert dist.get_world_size() == 2, line
leave()
"""
STUB = """#!/bin/sh
(IFS="\t"; echo "$*") >> "$0.commands"
case "$*" in
    *bench.gpu\\ machine*) echo "| CPU | fast | - |"; echo "| no row";;
    *llama2.py\\ chat*) exit 3;;
esac
"""


def commands_of(page: str) -> list[str]:
    """The commands of a page: all lines of its blocks of code, and those in backquotes."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
    quoted = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    lines = [line for line in "".join(blocks).splitlines() if line]
    lines += [code for code in quoted if re.search(r"^(torchrun|python|bash) |\.(py|sh)\b", code)]
    return [" ".join(line.split()) for line in lines if " " in line]


def commands(part: str) -> list[str]:
    """The commands of docs/GPU.md with these words, and those of README with torchrun."""
    lines = commands_of("docs/GPU.md")
    lines += [line for line in commands_of("README.md") if line.startswith("torchrun")]
    return [line for line in lines if part in line]


def short(command: str) -> tuple[SimpleNamespace, list[str]]:
    """(torchrun's options, the words after them with options that make it short)."""
    options = get_args_parser().parse_args(command.split()[1:])
    name = options.training_script
    words = [*options.training_script_args, *SHORT[name].split()]
    # The precision of a GPU, and the same one on every CPU.
    words += ["--device", "cpu", "--dtype", "bfloat16"]
    return options, ["-m"] * options.module + [name, *words]


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
    model = make_model(n_kv_heads=4, vocab_size=tok.vocab_size).bfloat16()  # as Meta's
    save(folder / "llama-2-7b", model, tok)
    for name in ("mine", "pairs", "prompts", "val", "compare"):
        path = dict(mine=inputs.dialogues, pairs=inputs.pairs, val=inputs.val_prompts)
        shutil.copy(path.get(name, inputs.prompts), folder / f"{name}.jsonl")
    return folder


TESTED = {
    "torchrun --nproc_per_node=8 ": 7,
    "torchrun --nnodes=2 ": 1,
    "-m common.memory ": 2,
    "bash bench/gpu.sh": 2,
}


def test_every_command_of_the_page_is_run_by_a_test_of_this_file():
    for command in commands(""):
        assert any(words in command for words in TESTED), f"no test runs {command}"
    assert {words: len(commands(words)) for words in TESTED} == TESTED


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_planners_commands_run(monkeypatch, capsys):
    for command in commands("-m common.memory "):
        run_words(command.split()[1:], monkeypatch)
        assert "in all" in capsys.readouterr().out


# --------------------------------------------------------------------------------- bench/gpu.sh
@pytest.fixture(scope="module")
def script(folder):
    """(what bench/gpu.sh wrote on a CPU, words of its commands), with a stub in place of Python."""
    stub = folder / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    command = commands("bash bench/gpu.sh")[1].split()
    assert command[:2] == ["DEVICE=cpu", "SIZE=tiny"]
    environment = os.environ | {"PYTHON": str(stub), "OUT": str(folder / "out/gpu")}
    environment |= dict(word.split("=") for word in command[:2])
    result = subprocess.run(command[2:], cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = (folder / "python.commands").read_text().splitlines()
    return result, [line.split("\t") for line in lines]


def test_the_script_goes_on_after_a_failure_and_ends_with_a_table(script, folder):
    result, words = script
    assert result.returncode == 1
    *_, heading, _, cpu, failed = result.stdout.splitlines()
    assert heading.startswith("| bench/gpu.sh, ")
    assert cpu == "| CPU | fast | - |"
    assert failed.startswith("| `llama2.py chat") and "**failed** with exit code 3" in failed
    assert len(words) > words.index([word for word in words if "chat" in word][0]) + 5
    assert result.stdout.endswith((folder / "out/gpu/table.md").read_text())


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_commands_of_the_script_run_with_one_process(script, monkeypatch, capsys):
    monkeypatch.setitem(SIZES, "tiny", SMALL)
    monkeypatch.chdir(ROOT)
    # `bench.gpu stop` replaces it.
    monkeypatch.setattr(train_pretrain, "clip_and_step", train_pretrain.clip_and_step)
    for words in script[1]:
        if "torch.distributed.run" not in words and not words[-1].startswith("losses: below"):
            run_words(words, monkeypatch)
    rows = re.findall(r"^\| .* \|$", capsys.readouterr().out, re.M)
    assert len(rows) == 13
    assert "| first importance ratio 1.000000; first KL 0.000000 |" in "".join(rows)
    for what in ("the same run again", "stopped and resumed"):
        [row] = [row for row in rows if what in row]
        assert "losses differ by 0, weights by 0" in row


# --------------------------------------------------------------------------------- two processes
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_commands_with_torchrun_run_with_two_processes(folder, script, inputs, monkeypatch):
    """One torchrun for all, because importing torch takes long."""
    lines, outputs = [], []
    for command in commands("torchrun --nproc_per_node=8"):
        options, words = short(command)
        assert options.nproc_per_node == "8"
        lines.append(words)
        outputs.append(folder / words[words.index("--out") + 1])
    of_script = [words for words in script[1] if "torch.distributed.run" in words]
    lines += [words[words.index("--nproc_per_node=2") + 1 :] for words in of_script]
    shutil.copytree(inputs.tokens, folder / "out/gpu/tokens", dirs_exist_ok=True)
    (folder / "commands").write_text("\n".join(map("\t".join, lines)))
    (folder / "script.py").write_text(TWO_PROCESSES)
    words = ("--standalone", "--nproc_per_node=2", "script.py", "commands")
    assert torchrun(folder, *words).wait() == 0
    for out in outputs:
        assert out.suffix == ".jsonl" or [*out.rglob("consolidated.00.pth")], out
        assert out.exists()
    assert len(of_script) == 4
    assert {weight.dtype for weight in weights(folder / "out/chat-7b").values()} == {torch.float32}


def test_two_machines_run_the_command_of_the_page(folder):
    """Two torchruns with a process each, in place of eight. What "..." stands for is ours."""
    [command], [of_one] = commands("torchrun --nnodes=2 "), commands("--out out/chat-7b")
    more = of_one.split("train_sft.py ")[1].replace("chat-7b", "chat-two")
    options, words = short(command.replace("...", more))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    assert (options.rdzv_endpoint, options.nproc_per_node) == ("HOST:29500", "8")
    start = command.split(" train_sft.py")[0].split()[1:]
    start = [word.replace("HOST:29500", address).replace("node=8", "node=1") for word in start]
    words = [*start, "--local_addr=localhost", ROOT / words[0], *words[1:]]
    nodes = [torchrun(folder, *words) for _ in range(2)]
    assert [node.wait() for node in nodes] == [0, 0]
    assert (folder / "out/chat-two/consolidated.00.pth").exists()
