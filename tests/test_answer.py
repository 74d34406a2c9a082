"""data.answer: the answers of a chat model to the prompts of a file."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from common.run import run_script
from conftest import EXACT, dialog, write_jsonl
from data import answer
from data.files import read_json
from data.records import read_answers
from llama2 import load, respond


@pytest.fixture
def config(tmp_path, base):
    records = [
        {"prompt": "Who are you?"},
        {"prompt": dialog("a", "b", "c")},
        {"prompt": "Hi.", "system": "Be kind.", "history": [["x", "y"]]},
        {"prompt": "word " * 300},
        {"prompt": dialog("a", "b", "c"), "own_answers": True},
    ]
    path = str(write_jsonl(tmp_path / "prompts.jsonl", records))
    out = str(tmp_path / "out.jsonl")
    return answer.Settings(str(base), (path,), out=out, max_new_tokens=6, **EXACT)


def read(config):
    return [record for _, record in read_json(config.out)]


def test_each_prompt_that_fits_gets_the_answer_of_the_chat_model(config, capsys):
    answer.main(config)
    records, (model, tok) = read(config), load(config.folder)
    wanted = [
        dialog("Who are you?"),
        dialog("a", "b", "c"),
        dialog("x", "y", "Hi.", system="Be kind."),
    ]
    own = respond(model, tok, [dialog("a")], config.max_new_tokens)[0]
    wanted.append(dialog("a", own, "c"))
    prompts = [record["prompt"] for record in records]
    assert prompts == ["Who are you?", *wanted[1:]]
    assert [record["answer"] for record in records] == respond(model, tok, wanted, 6)
    assert all(record.keys() == {"prompt", "answer"} for record in records)
    output = capsys.readouterr().out
    assert "no room for an answer in 256 tokens" in output
    assert "4 answers in" in output
    assert len(read_answers([config.out], tok, 256)) == 4


def test_sampled_answers_repeat_with_their_seed_only(config, tmp_path):
    answers = []
    for i, seed in enumerate((1, 1, 2)):
        sampled = replace(config, temperature=1.0, seed=seed, out=str(tmp_path / f"{i}.jsonl"))
        answer.main(sampled)
        answers.append(read(sampled))
    assert answers[0] == answers[1] != answers[2]


def test_existing_answers_are_replaced_only_with_overwrite(config, capsys):
    answer.main(config)
    before = read(config)
    answer.main(config)
    assert "out.jsonl exists already" in capsys.readouterr().out
    longer = replace(config, max_new_tokens=9)
    with pytest.raises(ValueError, match="made with other settings: max_new_tokens was 6, now 9"):
        answer.main(longer)
    assert read(config) == before
    answer.main(replace(longer, overwrite=True))
    assert read(config) != before


@pytest.mark.parametrize(
    "words, error",
    [
        (["BASE", "--out", "a.jsonl"], "--prompts: give at least one file"),
        (["BASE", "--prompts", "PROMPTS"], "--out: expected a file"),
        (["BASE", "--prompts", "PROMPTS", "--out", "a.txt"], "a name that ends with .jsonl"),
        (["BASE", "--prompts", "PROMPTS", "--out", "PROMPTS"], "is also an input"),
        (["nowhere", "--prompts", "PROMPTS", "--out", "a.jsonl"], "nowhere: no checkpoint here"),
        (["--out", "a.jsonl"], "required: folder"),
        (["--prompts", "PROMPTS", "BASE"], "no folder given: --prompts takes all words after it"),
    ],
)
def test_a_mistake_is_one_line(config, tmp_path, monkeypatch, capsys, words, error):
    monkeypatch.chdir(tmp_path)
    names = {"BASE": config.folder, "PROMPTS": config.prompts[0]}
    monkeypatch.setattr(sys, "argv", ["answer.py", *(names.get(word, word) for word in words)])
    with pytest.raises(SystemExit) as e:
        run_script(answer.main, answer.Settings, {})
    shown = capsys.readouterr().err
    assert (e.value.code, shown.count("\n")) == (2, 1)
    assert error in shown
    assert Path(config.prompts[0]).read_text().startswith('{"prompt": "Who are you?"}')
