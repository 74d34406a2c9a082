"""Command lines: settings and a user's mistakes."""

import gzip
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import llama2
import train_pretrain
import train_rlhf
import train_rm
import train_sft
from common import run as runs
from common.settings import check_settings, parse_settings
from conftest import (
    EXACT,
    ROOT,
    STAGES,
    make_model,
    make_reward_model,
    model_folder,
    options,
    stage,
    write_jsonl,
)
from data import corpus, distillation, preferences
from evaluate import answers, figures, reward_models, scoreboard
from llama2 import save


# --------------------------------------------------------------------------------------- settings
def test_settings_come_from_the_command_line_and_help_names_the_papers_value(capsys):
    def parse(*argv):
        return parse_settings(train_sft.Settings, train_sft.PAPER, "", argv)

    assert parse() == train_sft.Settings()
    paper = parse("--recipe", "paper", "--lr", "0.5", "--data", "a", "b:2", "--resume", "--no-pack")
    assert (paper.lr, paper.seq_len, paper.data) == (0.5, 4096, ["a", "b:2"])
    assert (paper.resume, paper.pack) == (True, False)
    # No abbreviations: the command to resume, which is printed, removes --overwrite by name.
    for wrong in (["--over"], ["--learning-rate", "1"]):
        with pytest.raises(SystemExit) as e:
            parse(*wrong)
        error = capsys.readouterr().err
        assert (e.value.code, error.count("\n")) == (2, 1)
        assert wrong[0] in error
    with pytest.raises(SystemExit):
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "peak learning rate (default: 0.001; --recipe paper: 2e-05)" in shown
    numbers = parse_settings(train_rlhf.Settings, {}, "", ["--temperatures", "0.5", "1"])
    assert numbers.temperatures == [0.5, 1.0]
    folders = parse_settings(answers.Settings, {}, "", ["out/a", "out/b", "--show", "2"])
    assert (folders.folders, folders.show) == (["out/a", "out/b"], 2)


def test_a_setting_that_would_change_nothing_is_refused_by_name(capsys):
    def error(cls, *argv):
        with pytest.raises(SystemExit) as e:
            parse_settings(cls, {"size": "7B"}, "", argv)
        assert e.value.code == 2
        return capsys.readouterr().err

    given = ("--lr", "7", "--temperature", "1", "--beta", "9", "--seed", "2")
    line = error(train_rlhf.Settings, *given)
    assert "--lr, --beta: needs --method ppo" in line and "--seed" not in line
    line = error(train_rlhf.Settings, "--method", "ppo", "--samples", "2")
    assert "--samples: needs --method rejection-sampling" in line
    line = error(train_pretrain.Settings, "--init", "base", "--size", "tiny")
    assert "--size: cannot be given with --init" in line
    for cls, given, needs in (
        (train_rm.Settings, ["--aux-weight", "3"], "--aux-weight: needs --kind safety"),
        (preferences.Settings, ["--ask-safety"], "--ask-safety: needs --annotator person"),
        (corpus.Settings, ["--tokenizer", "t", "--vocab-size", "9"], "given with --tokenizer"),
    ):
        assert needs in error(cls, *given)
    paper = ["--recipe", "paper", "--init", "base"]  # the recipe's own size was not given
    assert parse_settings(train_pretrain.Settings, {"size": "7B"}, "", paper).init == "base"
    both = "--iterations 10 --eval-every 5 --val-prompts a --earlier b".split()  # as in paper.sh
    for method in ("ppo", "rejection-sampling"):
        parse_settings(train_rlhf.Settings, {}, "", ["--method", method, *both])


def test_folders_behind_a_list_option_and_negative_numbers_get_a_line_that_says_so(capsys):
    def error(cls, *argv):
        with pytest.raises(SystemExit) as e:
            parse_settings(cls, {}, "", argv)
        assert e.value.code == 2
        return capsys.readouterr().err

    line = error(reward_models.Settings, "--data", "p.jsonl", "rm/safety")
    assert "no folders given: --data takes all words after it (p.jsonl rm/safety)" in line
    assert parse_settings(figures.Settings, {}, "", ["--only", "loss"]).folders == ("out",)
    for number in ("-1e-3", "-.5", "-1", "-inf"):
        config = parse_settings(train_sft.Settings, {}, "", ["--lr", number])
        with pytest.raises(ValueError, match=f"--lr {float(number)}: must be above 0"):
            check_settings(config, may_be_zero=("show",))


# ------------------------------------------------------------------------------- a user's mistakes
LR = ("pretrain", "sft", "rm", "ppo")  # rejection sampling has --tune-lr
BAD_SETTINGS = [
    *[(name, dict(lr=0.0), ["--lr 0.0: must be above 0"]) for name in STAGES if name in LR],
    *[(name, dict(lr=float("nan")), ["--lr nan"]) for name in STAGES if name in LR],
    ("rejection-sampling", dict(tune_lr=0.0), ["--tune-lr 0.0: must be above 0"]),
    *[(name, dict(seed=-1), ["--seed -1: must be 0 or above 0"]) for name in STAGES],
    *[(name, dict(seed=1 << 60), ["--seed", "must be at most"]) for name in STAGES],
    *[(name, dict(out=""), ["--out: expected a file or folder"]) for name in STAGES],
    *[(name, dict(init="nowhere"), ["nowhere", "no checkpoint here"]) for name in STAGES],
    *[(name, dict(device="cuda"), ["--device cuda: not on this machine"]) for name in STAGES],
    *[(name, dict(device="foo"), ["--device foo: not on this machine"]) for name in STAGES],
    *[
        (name, dict(resume=True), ["--resume continues the run", "--overwrite deletes it", "only"])
        for name in STAGES
    ],
    ("corpus", dict(vocab_size=30000), ["vocabulary of 30000", "at most"]),
    ("corpus", dict(vocab_size=5), ["vocabulary of 5", "at least"]),
    ("corpus", dict(vocab_size=0), ["--vocab-size 0: must be above 0"]),
    ("corpus", dict(val_fraction=1.5), ["--val-fraction 1.5: must be at most 1"]),
    ("corpus", dict(tokenizer=__file__), ["not a SentencePiece model"]),
    ("pretrain", dict(init="", size="8B"), ["8B", "tiny"]),
    ("pretrain", dict(data="gone"), ["gone", "python -m data.corpus"]),
    ("pretrain", dict(seq_len=10**6), ["stories", "less than one sequence", "--seq-len"]),
    ("pretrain", dict(warmup_steps=-5), ["--warmup-steps -5"]),
    ("sft", dict(data=()), ["--data: give at least one"]),
    ("sft", dict(data=("gone.jsonl",)), ["gone.jsonl", "No such file"]),
    ("sft", dict(data=(__file__,)), [f"{__file__}: expected a .jsonl"]),
    ("sft", dict(epochs=0), ["--epochs 0: must be above 0"]),
    ("sft", dict(seq_len=8), ["no dialogue to train on", "longer than --seq-len"]),
    ("sft", dict(val_fraction=2.0), ["--val-fraction 2.0: must be at most 1"]),
    ("sft", dict(val_fraction=1.0), ["--val-fraction 1.0 holds out all"]),
    ("rm", dict(val_fraction=1.0), ["--val-fraction 1.0 holds out all"]),
    ("sft", dict(val_fraction=0.0, keep="best"), ["--keep best: nothing is held out"]),
    ("rm", dict(val_fraction=0.0, keep="best"), ["--keep best: nothing is held out"]),
    ("rm", dict(aux_weight=-1.0), ["--aux-weight -1.0"]),
    ("rejection-sampling", dict(temperatures=()), ["--temperatures: give at least one"]),
    ("rejection-sampling", dict(temperatures=(0.0,)), ["--temperatures 0.0: must be above 0"]),
    ("rejection-sampling", dict(rm="nowhere"), ["nowhere/helpfulness", "no checkpoint here"]),
    ("rejection-sampling", dict(max_new_tokens=1), ["no answer within --max-new-tokens 1"]),
    ("rejection-sampling", dict(earlier=("nowhere",)), ["nowhere/best.jsonl"]),
    ("ppo", dict(batch_size=6), ["--batch-size 6 must be divisible by --mini-batch 4"]),
    ("ppo", dict(val_prompts=()), ["--val-prompts: give at least one"]),
    ("ppo", dict(gamma=1.5), ["--gamma 1.5: must be at most 1"]),
    ("ppo", dict(beta=-1.0), ["--beta -1.0"]),
]


@pytest.mark.parametrize("name, changes, words", BAD_SETTINGS)
def test_a_bad_setting_is_one_line_and_deletes_no_finished_run(
    tmp_path, inputs, expect_error, name, changes, words
):
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    if name == "corpus":
        script, config = corpus, corpus.Settings(data=(inputs.text,), out=str(tmp_path / "out"))
    else:
        script, config = stage(name, inputs, tmp_path / "out")
    result = "text.train.00000.bin" if name == "corpus" else "consolidated.00.pth"
    result = model_folder(config) / result
    result.parent.mkdir(parents=True)
    result.write_bytes(b"finished")
    if name != "corpus":
        (result.parent / "config.json").write_text("{}")
    expect_error(script, replace(config, overwrite=True, **changes), *words)
    assert result.read_bytes() == b"finished"


def test_no_command_writes_into_a_folder_of_other_files(tmp_path, inputs, expect_error):
    """Not even with --overwrite: tokens into a model's folder, a model beside a tokenizer."""
    model, tokens = tmp_path / "model", tmp_path / "tokens"
    model.mkdir()
    (model / "consolidated.00.pth").write_bytes(b"weights")
    config = corpus.Settings(data=(inputs.text,), out=str(model), overwrite=True)
    expect_error(corpus, config, "holds a model", "choose another folder")
    tokens.mkdir()
    (tokens / "tokenizer.model").write_bytes(b"tokenizer")
    script, config = stage("sft", inputs, tokens, overwrite=True)
    expect_error(script, config, "holds tokenizer.model", "choose another --out")
    assert (tokens / "tokenizer.model").read_bytes() == b"tokenizer"
    assert list(model.iterdir()) == [model / "consolidated.00.pth"]


GOOD_LINE = b'{"text": "a fox"}\n'


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("none.txt", None, ["none.txt", "does not exist"]),
        ("a.pdf", b"x", [".txt, .jsonl"]),
        ("empty.txt", b"", ["empty"]),
        ("empty.jsonl", b"\n\n", ["empty"]),
        ("latin.txt", "naïve café".encode("latin-1"), ["latin.txt", "not UTF-8"]),
        ("l.jsonl", GOOD_LINE + '{"text": "é"}'.encode("latin-1"), ["l.jsonl:2", "not UTF-8"]),
        ("binary.txt", b"ab\0cd" * 50, ["binary.txt", "binary"]),
        ("a.jsonl", GOOD_LINE + b'{"text": "a\n', ["a.jsonl:2", "broken JSON"]),
        ("b.jsonl", GOOD_LINE + b'{"content": "a"}\n', ["b.jsonl:2", '"text"']),
        ("c.jsonl", b'["a"]\n', ["c.jsonl: record 1", '"text"']),
        ("d.jsonl", b'{"text": 5}\n', ["d.jsonl:1", '"text"']),
        ("e.jsonl", b'{"text": "\\ud800"}\n', ["e.jsonl:1", "UTF-8"]),
        ("f.jsonl.gz", b"not gzip", ["f.jsonl.gz", "gzip"]),
        ("g.jsonl.gz", gzip.compress(GOOD_LINE * 99)[:-9], ["g.jsonl.gz", "gzip"]),
    ],
)
def test_a_bad_text_is_one_line_and_writes_no_tokens(tmp_path, expect_error, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    config = corpus.Settings(data=(str(tmp_path / name),), out=str(tmp_path / "tokens"))
    expect_error(corpus, config, *words)
    assert not (tmp_path / "tokens/index.json").exists()


def test_models_with_another_tokenizer_are_refused_in_one_line(
    tmp_path, inputs, char_tok, expect_error
):
    base, other, other_rm = inputs.base, str(tmp_path / "other"), str(tmp_path / "rm")
    save(other, make_model(vocab_size=char_tok.vocab_size), char_tok)
    for kind in ("safety", "helpfulness"):
        save(Path(other_rm) / kind, make_reward_model(char_tok), char_tok)
    fact = dict(topic="fact", name="Mira", attribute="pet", truth="goat", about="Mira's pet")
    fact |= dict(prompt="Tell me Mira's pet.", is_safety=False)
    held_out = str(write_jsonl(tmp_path / "h.jsonl", [fact]))
    pre_prompts = (str(write_jsonl(tmp_path / "i.jsonl", [{"instruction": "Be the fox."}])),)
    safety, data = (f"{inputs.rm}/safety", f"{other_rm}/safety"), (inputs.prompts,)
    board, out = dict(against=base, prompts=held_out), str(tmp_path / "o.jsonl")
    for script, settings in (
        (scoreboard, dict(folders=(other,), rm=inputs.rm, **board)),
        (scoreboard, dict(folders=(base,), rm=other_rm, **board)),
        (reward_models, dict(folders=safety, data=(inputs.pairs,))),
        (preferences, dict(chat=base, other=other, prompts=data, out=out)),
        (distillation, dict(chat=base, rm=safety[1], data=data, pre_prompts=pre_prompts, out=out)),
    ):
        config = script.Settings(**settings, **EXACT)
        expect_error(script, config, "has another tokenizer than")
    script, config = stage("pretrain", inputs, tmp_path / "out", init=other)
    expect_error(script, config, "has another tokenizer than", "data.corpus --tokenizer")
    script, config = stage("ppo", inputs, tmp_path / "out", rm=other_rm)
    expect_error(script, config, "rm/helpfulness has another tokenizer than", base)


def test_a_command_does_not_replace_its_own_inputs(tmp_path, inputs, expect_error):
    base, data = tmp_path / "base", tmp_path / "prompts.jsonl"
    save(base, *llama2.load(inputs.base))
    data.write_bytes(Path(inputs.prompts).read_bytes())
    before = (base / "consolidated.00.pth").read_bytes()
    for name in ("sft", "pretrain", "rejection-sampling"):
        script, config = stage(name, inputs, base, init=str(base), overwrite=True)
        expect_error(script, config, "which this run starts from")
    models = dict(chat=inputs.base, other=inputs.base, **EXACT)
    config = preferences.Settings(prompts=(str(data),), out=str(data), overwrite=True, **models)
    expect_error(preferences, config, "prompts.jsonl is also an input")
    assert (base / "consolidated.00.pth").read_bytes() == before
    assert data.read_bytes() == Path(inputs.prompts).read_bytes()


def in_use(lock):
    raise runs.Timeout(lock.lock_file)


def read_only(lock):
    raise PermissionError(13, "Permission denied", str(lock.lock_file))


@pytest.mark.parametrize("acquire", [in_use, read_only])
def test_an_output_in_use_or_not_writable_is_one_line(
    tmp_path, inputs, expect_error, monkeypatch, acquire
):
    """An error of the lock stands in for another process, and for rights that root always has."""
    models = dict(chat=inputs.base, other=inputs.base, **EXACT)
    path = str(tmp_path / "p.jsonl")
    monkeypatch.setattr(runs.FileLock, "acquire", acquire)
    for script, config in (
        (preferences, preferences.Settings(prompts=(inputs.prompts,), out=path, **models)),
        (corpus, corpus.Settings(data=(inputs.text,), out=str(tmp_path / "tokens"))),
        stage("sft", inputs, tmp_path / "sft"),
        stage("pretrain", inputs, tmp_path / "pretrain"),
    ):
        if acquire == in_use:
            expect_error(script, config, f"{config.out} is in use by another process")
        else:
            expect_error(script, config, Path(config.out).name, "Permission denied")


def test_an_output_inside_a_file_is_one_line(tmp_path, inputs, expect_error):
    for name in ("sft", "pretrain"):
        script, config = stage(name, inputs, Path(inputs.text) / "x")
        expect_error(script, config, "stories.jsonl")


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def out_of_memory_on_a_cpu(*_):
    raise RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
    )


def infinite_loss(logits, *_):
    return logits.sum() * float("inf")


@pytest.mark.parametrize(
    "loss, words",
    [
        (out_of_memory, ["out of memory: lower --micro-batch"]),
        (out_of_memory_on_a_cpu, ["out of memory: lower --micro-batch"]),
        (infinite_loss, ["the gradient is NaN or infinite", "nothing was saved in OUT yet"]),
    ],
)
def test_a_failure_in_the_first_step_is_one_line(
    tmp_path, inputs, expect_error, monkeypatch, loss, words
):
    _, config = stage("sft", inputs, tmp_path / "out")
    monkeypatch.setattr(train_sft, "sft_loss", loss)
    expect_error(train_sft, config, *(word.replace("OUT", config.out) for word in words))


def test_characters_that_the_terminal_lacks_are_replaced_and_bad_bytes_end_no_chat(base):
    def run(encoding, *command, lines=b""):
        command = [sys.executable, "llama2.py", *command]
        env = os.environ | {"PYTHONIOENCODING": encoding}
        result = subprocess.run(command, cwd=ROOT, input=lines, capture_output=True, env=env)
        assert (result.returncode, result.stderr) == (0, b"")
        return result.stdout

    few = ("--max-new-tokens", "1")
    text = "hen \N{CHICKEN}"
    assert run("cp1252", "complete", str(base), text, *few).startswith(b"hen ?")
    lines = b"hi\n\xff\n/reset\n"
    output = run("utf-8:strict", "chat", str(base), *few, lines=lines)
    assert b"(this is not UTF-8 text" in output and b"(a new dialogue)" in output


def test_a_closed_pipe_ends_a_run_without_a_traceback(tmp_path, inputs):
    _, config = stage("sft", inputs, tmp_path / "out", epochs=500)
    command = [sys.executable, "train_sft.py", *options(config)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


@pytest.mark.parametrize(
    "command, words",
    [
        (["chat", "BASE", "--device", "foo"], "foo"),
        (["complete", "BASE"], 'expected: complete FOLDER "text"'),
        (["chat", "BASE", "Hello!"], 'chat FOLDER -p "text"'),
        (["complete", "BASE", "a", "--reward", "SAFETY"], "--reward belongs to chat"),
        (["complete", "BASE", "a", "-p", "b"], 'complete FOLDER "text", or chat FOLDER'),
        (["chat", "BASE", "-p", " "], "your message is empty"),
        (["chat", "BASE", "-p", "[INST] a"], "your message contains [INST]"),
        (["chat", "BASE", "-p", "word " * 300], "with the answer the context of 256 has room for"),
        (["chat", "BASE", "--top-p", "2"], "top_p=2"),
        (["complete", "BASE", "caf\udce9"], "the text is not UTF-8"),
        (["complete", "BASE", "a", "--temperature", "nan"], "temperature=nan"),
        (["complete", "BASE", "a", "--temperature", "-1e-3"], "temperature=-0.001"),
        (["complete", "BASE", "word " * 300], "a context of 256 has no room for more"),
        (["complete", "BASE", "FULL"], "the text has 256 tokens: a context of 256 has no room"),
        (["chat", "BASE", "--seed", "9223372036854775807"], "--seed 9223372036854775807: must be"),
        (["chat", "SAFETY"], "holds a reward model, expected a language model"),
        (["chat", "BASE", "--reward", "BASE"], "holds a language model, expected a reward model"),
    ],
)
def test_a_mistake_at_the_command_line_of_llama2_is_one_line(
    base, rm_folder, capsys, command, words
):
    folders = {"BASE": str(base), "SAFETY": str(rm_folder / "safety"), "FULL": "0" * 254}
    with pytest.raises(SystemExit) as e:
        llama2.main([folders.get(word, word) for word in command])
    error = capsys.readouterr().err
    assert (e.value.code, error.count("\n")) == (2, 1)
    assert words in error


def test_a_missing_file_that_nobody_typed_is_named_as_a_default():
    path = train_rlhf.Settings.val_prompts[0]
    assert runs.where_from(train_rlhf.Settings, path) == ". It is the default of --val-prompts"
    assert runs.where_from(train_rlhf.Settings, "mine.jsonl") == ""
