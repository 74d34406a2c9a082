"""Progress while answers are sampled: what is kept, what is used again, what is printed."""

import json

import pytest

import llama2
from common import progress
from common.progress import forget, sample_with_progress
from conftest import make_model
from llama2 import generate

PROMPTS = [[1, 5 + i] + [9] * (i % 4) for i in range(10)]
OPTIONS = 6, 1.0, 1.0, 3, 2  # max_new_tokens, temperature, top_p, seed, eos_id


@pytest.fixture(autouse=True)
def batches(monkeypatch):
    """The numbers of prompts of all sampled batches, which have at most three."""
    sizes, decode = [], llama2.decode

    def counted(model, prompts, *args):
        sizes.append(len(prompts))
        return decode(model, prompts, *args)

    monkeypatch.setattr(llama2, "decode", counted)
    monkeypatch.setattr(llama2, "max_batch_size", lambda *_: 3)
    return sizes


def interrupted_after(n):
    """generate, with Ctrl-C right after the n-th batch."""

    def generate_some(*args, known, report):
        calls = []

        def report_and_stop(*news):
            report(*news)
            calls.append(1)
            if len(calls) == n:
                raise KeyboardInterrupt

        return generate(*args, known=known, report=report_and_stop)

    return generate_some


def sample(path, generate=generate, made_of=None, prompts=PROMPTS, options=OPTIONS):
    return sample_with_progress(path, made_of or {"chat": "a"}, generate, MODEL, prompts, *options)


MODEL = make_model()


def test_generate_reports_each_batch_and_skips_those_that_are_known(batches):
    news = []
    whole = generate(MODEL, PROMPTS, *OPTIONS, report=lambda *new: news.append(new))
    assert [(done, total) for done, total, _ in news] == [(3, 10), (6, 10), (9, 10), (10, 10)]
    answers = {i: ids for _, _, new in news for i, ids in new.items()}
    assert [answers[i] for i in range(10)] == whole
    batches.clear()
    known = news[1][2] | dict([next(iter(news[2][2].items()))])  # a batch, and one of the next
    assert generate(MODEL, PROMPTS, *OPTIONS, known=known) == whole
    assert batches == [3, 3, 1]  # the half-known batch is sampled as a whole


def test_an_interruption_loses_no_batch_and_changes_no_answer(tmp_path, batches):
    whole = generate(MODEL, PROMPTS, *OPTIONS)
    batches.clear()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            sample(tmp_path / "kept", interrupted_after(1))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes() + b'{"0": [1, ')  # killed while it wrote a line
    assert sample(tmp_path / "kept") == whole
    assert batches == [3, 3, 3, 1]
    assert sample(tmp_path / "kept") == whole
    assert len(batches) == 4
    forget(tmp_path / "kept")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        dict(made_of={"chat": "b"}),
        dict(prompts=[*PROMPTS[1:], PROMPTS[0]]),
        dict(options=(6, 0.5, 1.0, 3, 2)),
        dict(options=(6, 1.0, 1.0, 4, 2)),
    ],
)
def test_answers_of_another_model_or_other_options_are_never_used(tmp_path, batches, change):
    sample(tmp_path / "kept")
    (file,) = tmp_path.iterdir()
    batches.clear()
    sample(tmp_path / "kept", **change)
    assert batches == [3, 3, 3, 1]
    (other,) = set(tmp_path.iterdir()) - {file}
    other.write_bytes(file.read_bytes())  # under the wrong name: its first line is another
    sample(tmp_path / "kept", **change)
    assert batches == [3, 3, 3, 1] * 2


def test_the_first_line_says_what_the_answers_were_made_of(tmp_path):
    sample(tmp_path / "kept", made_of={"files": {"chat": "1 bytes 0f"}})
    (file,) = tmp_path.iterdir()
    header = json.loads(file.read_text().splitlines()[0])
    assert header["made_of"] == {"files": {"chat": "1 bytes 0f"}}
    assert header["options"] == list(OPTIONS)


def test_a_line_of_progress_comes_every_ten_seconds(tmp_path, monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "time", lambda: clock[0])

    def slow(*args, known, report):
        def report_later(*new):
            clock[0] += 6
            report(*new)

        return generate(*args, known=known, report=report_later)

    sample(tmp_path / "kept", slow)
    lines = ["sampled 6 of 10 answers, left 0:08", "sampled 10 of 10 answers, left 0:00"]
    assert capsys.readouterr().out.splitlines() == lines
