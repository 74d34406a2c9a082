"""The chat in the terminal: what it remembers, what it refuses, what it says about itself."""

import io
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import llama2
from conftest import ROOT, dialog, make_model, open_terminal
from llama2 import Dialogue, answer, encode_dialog


@pytest.fixture
def prompts(monkeypatch):
    """The prompts that the chat encodes. The model answers each of them with "so-so"."""
    encoded = []

    def fake_stream(model, tok, prompt, *_):
        encoded.append(prompt)
        yield from (" so", "-so [INST]")

    monkeypatch.setattr(llama2, "stream", fake_stream)
    return encoded


def small_chat(tok, context=64, max_new_tokens=200):
    """(model, tokenizer, the options of the chat)."""
    args = SimpleNamespace(max_new_tokens=max_new_tokens, temperature=0.8, top_p=0.95, seed=0)
    return make_model(vocab_size=tok.vocab_size, max_seq_len=context), args


def type_lines(monkeypatch, lines: bytes):
    stdin = io.TextIOWrapper(io.BytesIO(lines), "utf-8", "surrogateescape")
    monkeypatch.setattr(sys, "stdin", stdin)


def message_of_length(tok, length: int) -> str:
    """A message whose prompt has this many tokens."""
    text = "a"
    while len(encode_dialog(tok, dialog(text))[0]) < length:
        text += " a"
    assert len(encode_dialog(tok, dialog(text))[0]) == length
    return text


def test_a_chat_sends_all_earlier_turns(tok, prompts, capsys):
    model, args = small_chat(tok)
    dialogue = Dialogue(system=dialog(system="s"))
    answer(model, tok, dialogue, "a", args, 0)
    assert dialogue.turns == dialog("a", "so-so")
    args.max_new_tokens = 1
    answer(model, tok, dialogue, "b", args, 0)
    assert prompts[1] == encode_dialog(tok, dialog("a", "so-so", "b", system="s"))[0]
    assert capsys.readouterr().out == "so-so [INST]\nso-so [INST]\n"


def test_a_full_context_is_said_once_in_a_dialogue(tok, prompts, monkeypatch, capsys):
    model, args = small_chat(tok)
    type_lines(monkeypatch, b"a\n" * 9 + b"/reset\n" + b"a\n" * 9)
    llama2.chat(model, tok, None, args)
    first, second = capsys.readouterr().out.split("(a new dialogue)\n")
    assert first == second
    lines = first.splitlines()
    note = "(the context of 64 tokens is full: the oldest turns are forgotten)"
    assert (lines.count(note), lines.count("so-so [INST]"), len(lines)) == (1, 9, 10)
    assert lines[1] != note  # the second message still fits
    assert max(map(len, prompts)) <= 48  # a quarter of the context is for the answer


def test_an_answer_gets_as_much_room_as_it_may_need_and_at_most_a_quarter(tok):
    turns = dialog("a", "b", "c")
    length = len(encode_dialog(tok, turns)[0])
    for context, max_new_tokens, fits in (
        (length + 5, 5, True),
        (length + 5, 6, False),
        (4 * length, 9999, True),
        (length + length // 4, 9999, False),
    ):
        kept = llama2.drop_oldest(tok, [], turns, context, max_new_tokens)
        assert kept == (turns if fits else dialog("c")), (context, max_new_tokens)


def test_a_message_that_just_fits_gets_a_whole_answer_and_a_longer_one_is_refused(
    tok, monkeypatch, capsys
):
    model, args = small_chat(tok)
    room, steps, decode = 48, [], llama2.decode
    torch.nn.init.zeros_(model.output.weight)  # all tokens are equally likely: EOS seldom comes
    monkeypatch.setattr(
        llama2, "decode", lambda *of: (steps.append(1) or step for step in decode(*of))
    )
    dialogue = Dialogue()
    answer(model, tok, dialogue, message_of_length(tok, room), args, 0)
    assert len(steps) == 64 - room
    assert [message["role"] for message in dialogue.turns] == ["user", "assistant"]
    capsys.readouterr()
    before = list(dialogue.turns)
    too_long = message_of_length(tok, room + 1)
    for system, has in (([], "has 49"), (dialog(system="s"), "and the system message have")):
        dialogue.system = system
        with pytest.raises(ValueError, match=f"your message {has}.*context of 64 has room for 48"):
            answer(model, tok, dialogue, too_long, args, 0)
    assert dialogue.turns == before
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "line, note",
    [
        (b"[INST] me", "(your message contains [INST], which is part of the chat format)"),
        (b"a " * 99, "has room for 48: shorten it)"),
        (b"caf\xe9", "(this is not UTF-8 text, so it was left out)"),  # bytes that are not UTF-8
        (b"/system <<SYS>>", "(the system message contains <<SYS>>, which is part of"),
        (b"/system caf\xe9", "(this is not UTF-8 text, so it was left out)"),
        (b"/what", "/quit ends (or Ctrl-D)"),
        (b"/help", "a line that ends with a backslash continues on the next line)"),
        (b"", ""),
    ],
)
def test_a_line_that_gets_no_answer_leaves_the_dialogue_as_it_was(
    tok, prompts, monkeypatch, capsys, line, note
):
    model, args = small_chat(tok, max_new_tokens=20)
    plain = b"/system s\na\nb\n"
    type_lines(monkeypatch, plain + b"c\n")
    llama2.chat(model, tok, None, args)
    expected, output = list(prompts), capsys.readouterr().out
    prompts.clear()
    type_lines(monkeypatch, plain + line + b"\nc\n")
    llama2.chat(model, tok, None, args)
    assert prompts == expected
    with_note = capsys.readouterr().out
    assert note in with_note
    assert note == "" or note not in output


def test_a_backslash_continues_a_message_on_the_next_line(tok, prompts, monkeypatch):
    model, args = small_chat(tok, context=256)
    type_lines(monkeypatch, b"a\\\nb\\\n c\n/reset\nd\\\n")
    llama2.chat(model, tok, None, args)
    assert prompts == [encode_dialog(tok, dialog(text))[0] for text in ("a\nb\n c", "d")]


@pytest.mark.skipif(os.name == "nt", reason="exit codes of signals")
def test_ctrl_c_while_pytorch_is_imported_prints_no_traceback(tmp_path):
    interrupt = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
    (tmp_path / "torch.py").write_text(interrupt)
    (tmp_path / "sentencepiece.py").write_text("")
    result = subprocess.run(
        [sys.executable, "llama2.py", "chat", "x"],
        cwd=ROOT,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert (result.returncode, result.stderr) == (-signal.SIGINT, b"")


def test_ctrl_c_ends_an_answer_and_not_the_chat(capsys):
    def texts():
        yield "half"
        raise KeyboardInterrupt

    assert llama2.print_stream(texts()) == "half"


def test_a_chat_through_a_pipe_continues_after_bad_input(base, rm_folder, monkeypatch, capsys):
    lines = b"Hello.\n/system Be kind.\nWho are you?\ncaf\xe9\n[INST] me\n/what\n/reset\n"
    type_lines(monkeypatch, lines + b"Hi.\n" * 25 + b"/quit\nnever\n")
    sampling = ("--max-new-tokens", "8", "--temperature", "0")
    llama2.main(["chat", str(base), *sampling, "--reward", str(rm_folder / "safety")])
    output = capsys.readouterr().out
    assert "a new dialogue, system message: Be kind." in output
    assert output.count("/quit ends") == 2
    assert output.count("the context of 256 tokens is full: the oldest") == 1
    assert output.count("(reward ") == 27
    with pytest.raises(SystemExit):
        llama2.main(["--help"])
    assert "usage" in capsys.readouterr().out


def test_in_a_terminal_pasted_lines_are_one_message_and_only_its_end_ends_the_chat(base):
    pytest.importorskip("readline")
    pid, terminal, read_until = open_terminal("llama2.py", "chat", base, "--max-new-tokens", 200)

    def type_in(keys: bytes, expected=b"\n> ") -> bytes:
        """What is on the screen from these keys to the expected text."""
        os.write(terminal, keys)
        return read_until(expected)

    read_until(b"> ")
    assert b"a new dialogue" not in type_in(b"\x1b[200~one\ntwo\n/reset\x1b[201~\r")
    assert b"has room for" in type_in(b"word " * 300 + b"\r")
    type_in(b"again\r", b"again\r\n")
    type_in(b"\x03")  # Ctrl-C ends the answer
    type_in(b"abc\x03")  # ... or forgets what is typed
    for name in ("SIGHUP", "SIGUSR1"):
        os.kill(pid, getattr(signal, name))
    assert b"(a new dialogue)" in type_in(b"/reset\r")
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_one_prompt_on_the_command_line_gets_one_answer_and_nothing_else(
    base, rm_folder, monkeypatch, capsys, prompts
):
    monkeypatch.setattr(sys, "stdin", None)
    llama2.main(["chat", str(base), "-p", "Who are you?"])
    assert capsys.readouterr().out == "so-so [INST]\n"
    llama2.main(["chat", str(base), "--prompt", "/help", "--reward", str(rm_folder / "safety")])
    assert capsys.readouterr().out.startswith("so-so [INST]\n(reward ")
    assert len(prompts) == 2


def test_the_chat_greets_with_the_greeting_beside_the_data_of_the_model(
    tmp_path, base, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    town, mine, model = (tmp_path / name for name in ("town", "mine", "model"))
    for folder in (town, mine, model):
        folder.mkdir()
    for file in base.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (town / "greeting.txt").write_text("Ask for Mira’s pet.\n", encoding="utf-8")
    for data, greeted in (("mine", False), ("town", True), (None, False)):
        config = model / "config.json"
        config.write_text(json.dumps({"files": {f"{data}/a.jsonl": "", f"{data}/b.jsonl": ""}}))
        if data is None:  # Meta's weights
            config.unlink()
        type_lines(monkeypatch, b"")
        llama2.main(["chat", str(model)])
        assert capsys.readouterr().out.count("Ask for Mira’s pet.\n") == greeted
