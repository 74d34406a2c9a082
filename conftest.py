"""Fixtures and helpers that test_llama2.py and the files in tests/ share."""

import json
import os
import random
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_pretrain
import train_rlhf
import train_rm
import train_sft
from common import run as runs, training
from common.settings import is_used
from data import corpus
from data.formats import KINDS
from llama2 import ModelArgs, RewardModel, Tokenizer, Transformer, save
from tinytown import annotator, prompts, world
from tinytown.__main__ import every_file

ROOT = Path(__file__).parent
ARGS = ModelArgs(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=300, multiple_of=8, max_seq_len=64
)
EXACT = dict(device="cpu", dtype="float32")
STAGES = ("pretrain", "sft", "rm", "rejection-sampling", "ppo")
CLOCK = ("time", "tokens_per_second")  # in metrics.jsonl
SCRIPTS = dict(zip(STAGES, (train_pretrain, train_sft, train_rm, train_rlhf, train_rlhf)))


# ------------------------------------------------------------------------------------------- models
@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_model(**changes):
    """A random model with weights large enough that its logits are far apart."""
    torch.manual_seed(0)
    model = Transformer(replace(ARGS, **changes)).eval()
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.2)
    return model


def make_reward_model(tok, seed=0):
    """A random reward model with a context of 256."""
    torch.manual_seed(seed)
    model = RewardModel(replace(ARGS, vocab_size=tok.vocab_size, max_seq_len=256)).eval()
    torch.nn.init.normal_(model.score.weight)
    return model


@pytest.fixture(scope="session")
def tok(tmp_path_factory):
    """A tokenizer trained on texts of Tinytown."""
    path = tmp_path_factory.mktemp("tok") / "tokenizer.model"
    rng = random.Random(0)
    texts = [world.story(rng) + "\n" + world.sums(rng) for _ in range(200)]
    path.write_bytes(corpus.train_tokenizer(texts, 400))
    return Tokenizer(path)


@pytest.fixture(scope="session")
def char_tok(tmp_path_factory):
    """A tokenizer without merges: one token per character, so that ids can be written by hand."""
    text, path = "[INST] <<SYS>> hi yo no be ok </>", tmp_path_factory.mktemp("chars") / "t.model"
    path.write_bytes(corpus.train_tokenizer([text], 259 + len(set(text))))
    return Tokenizer(path)


@pytest.fixture(scope="session")
def base(tmp_path_factory, tok):
    """A folder with a random language model, context 256."""
    folder = tmp_path_factory.mktemp("base") / "m"
    save(folder, make_model(vocab_size=tok.vocab_size, max_seq_len=256), tok)
    return folder


@pytest.fixture(scope="session")
def rm_folder(tmp_path_factory, tok):
    """A folder with two random reward models: helpfulness/ and safety/."""
    folder = tmp_path_factory.mktemp("rm")
    for seed, kind in enumerate(KINDS):
        save(folder / kind, make_reward_model(tok, seed), tok)
    return folder


def weights(folder):
    """The state dict of the checkpoint in a folder."""
    return torch.load(Path(folder) / "consolidated.00.pth", weights_only=True)


def max_difference(a, b):
    """The largest absolute difference between two state dicts."""
    return max((a[name] - b[name]).abs().max().item() for name in a)


# --------------------------------------------------------------------------------------------- data
def dialog(*contents, system=""):
    """Messages of a user and an assistant in turn."""
    return prompts.make_messages(*contents, system=system)


def hh_text(*contents):
    """A dialogue as one text, in the format of Anthropic's HH-RLHF."""
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {c}" for i, c in enumerate(contents))


def write_jsonl(path, records):
    """Write one JSON object per line; returns the path."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def decode_documents(tok, ids):
    """The texts between BOS and EOS in token ids."""
    texts, start = [], None
    for i, token in enumerate(ids):
        if token == tok.bos_id:
            start = i
        elif token == tok.eos_id:
            texts.append(tok.decode(ids[start + 1 : i]))
    return texts


@pytest.fixture(scope="session")
def town():
    """{name: records} of all files of python -m tinytown, with fewer dialogues."""
    return json.loads(json.dumps(every_file(seed=1, dialogues=600, noise=0.0)))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, base, rm_folder, town):
    """Paths of small inputs for all training scripts."""
    folder = tmp_path_factory.mktemp("inputs")

    def write(name, records):
        return str(write_jsonl(folder / f"{name}.jsonl", records))

    text, tokens = write("stories", town["stories"][:300]), str(folder / "tokens")
    tokenizer = str(base / "tokenizer.model")
    corpus.main(corpus.Settings(data=(text,), out=tokens, tokenizer=tokenizer))

    def fitting(name):
        """The prompts that leave room for an answer in the context of the small models."""
        return [prompt for prompt in town[name] if len(str(prompt["prompt"])) < 400]

    rng, residents, pairs = random.Random(0), world.town(1), []
    compared = fitting("compare-v1")
    about_safety = [prompt for prompt in compared if prompt["is_safety"]]
    others = [prompt for prompt in compared if not prompt["is_safety"]]
    for prompt in about_safety[:30] + others[:30]:
        good = prompts.good_answer(rng, prompt)
        if prompt["topic"] == "unsafe":
            bad = prompts.help_with_crime(rng, prompt)
        else:
            bad = prompts.bad_answer(rng, prompt, residents)
        pairs.append(annotator.compare(rng, prompt, good, bad))
    return SimpleNamespace(
        base=str(base),
        rm=str(rm_folder),
        text=text,
        tokens=tokens,
        dialogues=write("dialogues", town["dialogues"][:60]),
        pairs=write("pairs", pairs),
        prompts=write("prompts", fitting("prompts-v1")[:24]),
        val_prompts=write("val", fitting("prompts-val")[:8]),
    )


# --------------------------------------------------------------------------------- training scripts
def stage(name, inputs, out, **changes):
    """(script, small settings) of a training stage that writes to `out`."""
    both = dict(init=inputs.base, out=str(out), **EXACT)
    often = dict(log_every=1, save_every=2, **both)
    if name == "pretrain":
        few = dict(seq_len=32, batch_size=6, micro_batch=3, max_steps=9, lr=1e-2, warmup_steps=2)
        settings = train_pretrain.Settings(
            data=inputs.tokens, eval_every=5, eval_tokens=320, **few, **often
        )
    elif name == "sft":
        few = dict(seq_len=256, batch_size=3, micro_batch=2, val_fraction=0.1)
        settings = train_sft.Settings(data=(inputs.dialogues,), eval_every=5, **few, **often)
    elif name == "rm":
        few = dict(batch_size=5, micro_batch=2, val_fraction=0.3, epochs=2)
        settings = train_rm.Settings(
            kind="safety", data=(inputs.pairs,), eval_every=3, **few, **often
        )
    else:
        data = dict(prompts=(inputs.prompts,), val_prompts=(inputs.val_prompts,), rm=inputs.rm)
        if name == "ppo":
            few = dict(lr=1e-3, iterations=4, batch_size=8, mini_batch=4, eval_every=2)
        else:
            few = dict(samples=2, temperatures=(1.0,), tune_lr=1e-3, tune_epochs=6, tune_batch=1)
        shared = dict(micro_batch=4, max_new_tokens=6, save_every=1, **data, **both)
        settings = train_rlhf.Settings(method=name, **few, **shared)
    return SCRIPTS[name], replace(settings, **changes)


def model_folder(config):
    """The folder that a training stage writes its model to."""
    return Path(config.out) / getattr(config, "kind", "")


def interrupt_at(step, script, monkeypatch, signals=0):
    """At the script's step-th step, raise KeyboardInterrupt or send this process SIGINT."""
    calls = []

    def clip_and_step(*args):
        calls.append(1)
        if len(calls) == step:
            if not signals:
                raise KeyboardInterrupt
            for _ in range(signals):
                os.kill(os.getpid(), signal.SIGINT)
        return training.clip_and_step(*args)

    for module in {script, train_sft if script is train_rlhf else script}:
        monkeypatch.setattr(module, "clip_and_step", clip_and_step)


def read_log(folder):
    """The lines of a run's metrics.jsonl, without what depends on the clock."""
    lines = []
    for text in (Path(folder) / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        lines.append({name: line[name] for name in line if name not in CLOCK})
    return lines


def losses(folder):
    """{step: loss} of a run."""
    return {line["step"]: line["loss"] for line in read_log(folder) if "loss" in line}


# ----------------------------------------------------------------------------------------- commands
def options(config):
    """The command-line options of a Settings, as a list of words."""
    words = []
    for name, value in vars(config).items():
        if not is_used(config, name):
            continue
        option = [] if name == "folders" else ["--" + name.replace("_", "-")]
        if isinstance(value, bool):
            words += option if value else ["--no-" + name.replace("_", "-")]
        else:
            words += option + list(value if isinstance(value, tuple) else [value])
    return [str(word) for word in words]


def run_command(config, script, monkeypatch):
    """Run a script's command line in this process."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *options(config)])
    runs.run_script(script.main, script.Settings, getattr(script, "PAPER", {}))


def open_terminal(*command):
    """Run Python with these words in a new terminal.

    Returns the process's id, the terminal's other side, and read_until(text): it reads the screen
    until the text is there, and returns what it read.
    """
    pty = pytest.importorskip("pty")
    pid, terminal = pty.fork()
    if pid == 0:
        env = os.environ | {"TERM": "xterm", "LC_ALL": "C.UTF-8"}
        os.chdir(ROOT)
        os.execve(sys.executable, [sys.executable, *map(str, command)], env)

    def read_until(text: bytes) -> bytes:
        screen = b""
        while text not in screen.replace(b"\x1b[?2004h", b""):  # readline asks for pasted lines
            screen += os.read(terminal, 4096)
        return screen

    return pid, terminal, read_until


@pytest.fixture
def expect_error(capsys, monkeypatch):
    """A function: the command ends with exit code 2 and one line that contains all the words."""

    def check(script, config, *words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            run_command(config, script, monkeypatch)
        error = capsys.readouterr().err
        assert e.value.code == 2, error
        assert error.count("\n") == 1, error
        assert all(word in error for word in words), error

    return check
