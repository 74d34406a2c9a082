"""The commands that make data with models: preferences and Ghost Attention."""

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import llama2
from conftest import EXACT, dialog, make_model, write_jsonl
from data import files, ghost_attention, preferences, records
from evaluate.reward_models import user_texts
from llama2 import save, write_json
from tinytown import annotator


def preference_settings(inputs, out, **changes):
    models = dict(chat=inputs.base, other=inputs.base, max_new_tokens=4, **EXACT)
    config = preferences.Settings(prompts=(inputs.prompts,), out=str(out), **models)
    return replace(config, **changes)


def read(path):
    return [record for _, record in files.read_json(path)]


def test_both_models_answer_at_all_temperatures_and_in_either_order(monkeypatch):
    calls = []

    def respond(model, tok, dialogs, max_new_tokens, temperature, seed, sampler):
        calls.append((model, max_new_tokens))
        return [f"{model} {temperature} {d[0]['content']}" for d in dialogs]

    monkeypatch.setattr(preferences, "respond", respond)
    config = preferences.Settings(temperatures=(0.5, 1.0), max_new_tokens=33)
    sixty = [records.Prompt(f"p{i}", False, [1]) for i in range(60)]
    pairs = preferences.generate_pairs(["new", "old"], None, sixty, 0, config)
    assert set(calls) == {("new", 33), ("old", 33)}
    assert all(text.endswith(f" p{i}") for i, pair in enumerate(pairs) for text in pair)
    assert {a.split()[0] for a, _ in pairs} == {"new", "old"}
    temperatures = {(a.split()[1], b.split()[1]) for a, b in pairs}
    assert temperatures == {(a, b) for a in ("0.5", "1.0") for b in ("0.5", "1.0")}


def test_blended_weights_are_a_weighted_mean_of_two_models():
    chat, other = make_model(), make_model()
    other.norm.weight.data.mul_(3)
    blended = preferences.interpolate(chat, other, 0.25).state_dict()["norm.weight"]
    assert torch.allclose(blended, 0.25 * chat.norm.weight + 0.75 * other.norm.weight)
    assert preferences.interpolate(chat, other, 0) is other


def test_a_base_model_that_answers_unblended_is_named(tmp_path, inputs, capsys):
    base = shutil.copytree(inputs.base, tmp_path / "base")
    for source, blend, named in (
        ("train_pretrain.py", 0.0, True),
        ("train_pretrain.py", 0.7, False),
        ("train_sft.py", 0.0, False),
    ):
        write_json(base / "sources.json", {source: "1 bytes 0"})
        config = preference_settings(inputs, tmp_path / "p.jsonl", other=str(base), blend=blend)
        preferences.load_variants(config, "cpu")
        assert ("is a base model" in capsys.readouterr().out) == named


def test_tinytown_annotator_labels_each_prompt_once(tmp_path, inputs, monkeypatch, capsys):
    config = preference_settings(inputs, tmp_path / "v1.jsonl")
    preferences.main(config)
    labels, wanted = read(config.out), read(inputs.prompts)
    assert list(map(user_texts, labels)) == list(map(user_texts, wanted))
    # Where a prompt asks for it, the earlier answers are the chat model's own.
    own = [prompt.get("own_answers", False) for prompt in wanted]
    assert [a["prompt"] != b["prompt"] for a, b in zip(labels, wanted)] == own
    assert 0 < sum(own) < sum(isinstance(prompt["prompt"], list) for prompt in wanted)
    for record, prompt in zip(labels, wanted):
        chosen, rejected = (annotator.quality(prompt, record[a]) for a in ("chosen", "rejected"))
        assert record["true_gap"] == chosen - rejected
    monkeypatch.setattr(preferences, "load", None)  # no model is needed any more
    preferences.main(config)
    assert "v1.jsonl exists already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="made with other settings: max_new_tokens was 4, now 5"):
        preferences.main(replace(config, max_new_tokens=5))
    Path(f"{config.out}.made-of.json").unlink()
    with pytest.raises(ValueError, match="v1.jsonl exists"):
        preferences.main(config)


def test_both_variants_and_all_processes_sample_with_seeds_of_their_own(inputs, monkeypatch):
    seeds = []

    def answer_all(model, tok, prompts, seed, config, sampler):
        seeds.append(seed)
        return [f"{seed} {i}" for i in range(len(prompts))]

    monkeypatch.setattr(preferences, "answer_all", answer_all)
    for seed, rank in ((1, 0), (1, 1), (2, 0), (1, 0)):
        preferences.make_pairs(preference_settings(inputs, "", seed=seed), "cpu", rank)
    assert len(set(seeds[:6])) == 6
    assert seeds[6:] == seeds[:2]


def test_pairs_that_were_interrupted_continue_and_give_the_same_file(tmp_path, inputs, monkeypatch):
    whole, part = (preference_settings(inputs, tmp_path / f"{name}.jsonl") for name in "ab")
    batches, limit, decode = [], 1000, llama2.decode
    monkeypatch.setattr(llama2, "max_batch_size", lambda *_: 4)

    def counted(*args):
        if len(batches) == limit:
            raise KeyboardInterrupt
        batches.append(1)
        return decode(*args)

    monkeypatch.setattr(llama2, "decode", counted)
    preferences.main(whole)
    needed, limit = len(batches), len(batches) * 2 - 2
    with pytest.raises(KeyboardInterrupt):
        preferences.main(part)
    assert list(tmp_path.glob("*sampled*"))
    batches, limit = [], 1000
    preferences.main(part)
    assert len(batches) < needed
    assert Path(part.out).read_bytes() == Path(whole.out).read_bytes()
    assert not list(tmp_path.glob("*sampled*"))


def test_own_answers_leave_room_for_the_variant_with_the_smaller_context(tmp_path, tok, base):
    """The other model answers the same prompts, and has half of the chat model's context."""
    other = tmp_path / "other"
    save(other, make_model(vocab_size=tok.vocab_size, max_seq_len=128), tok)
    prompt = dict(prompt=dialog(*"abcde"), own_answers=True)
    path = write_jsonl(tmp_path / "q.jsonl", [prompt] * 8)
    config = preferences.Settings(
        chat=str(base),
        other=str(other),
        prompts=(str(path),),
        annotator="nobody",
        max_new_tokens=40,
        **EXACT,
    )
    assert len(preferences.make_pairs(config, "cpu", 0)) == 8


@pytest.mark.parametrize("annotator, empty", [("tinytown", 0), ("person", 8), ("nobody", 8)])
def test_pairs_of_equal_answers_are_left_out_whoever_compares_them(
    tmp_path, inputs, monkeypatch, capsys, annotator, empty
):
    """A person does not see empty answers either, because no reward model learns from them."""
    wanted = read(inputs.prompts)
    # Every third pair differs in spaces only.
    answers = iter([["x y", "a", "a"] * 8, ["x  y", "b", " "] * 8])
    monkeypatch.setattr(preferences, "answer_all", lambda *_: next(answers))
    config = preference_settings(inputs, tmp_path / "p.jsonl", annotator=annotator)
    pairs = preferences.make_pairs(config, "cpu", 0)
    kept = (1,) if empty else (1, 2)
    texts = [user_texts(prompt) for i, prompt in enumerate(wanted) if i % 3 in kept]
    assert [user_texts(pair) for pair in pairs] == texts
    assert f"{8 + empty} pairs of equal answers" in capsys.readouterr().out


def test_the_annotators_noise_belongs_to_the_pair():
    """The i-th pairs of two rounds have other noise; the same pair has the same, wherever it is."""
    fact = dict(topic="fact", name="Mira", attribute="pet", truth="goat", about="Mira's pet")

    def choices(pairs):
        records = preferences.compare_by_tinytown(pairs, seed=1)
        return [record["chosen"] == pair[1] for record, pair in zip(records, pairs)]

    rounds = []
    for name in "pq":
        prompts = [fact | dict(prompt=f"{name}{i}", is_safety=False) for i in range(200)]
        rounds.append([(prompt, "A pet goat.", "A pet goat!") for prompt in prompts])
    first, second = map(choices, rounds)
    agree = sum(a == b for a, b in zip(first, second))
    assert 70 < sum(first) < 130
    assert 70 < agree < 130
    assert choices(rounds[0][::-1]) == first[::-1]


def test_a_person_can_label_pairs_and_continue_later(tmp_path, inputs, monkeypatch, capsys):
    data = [dict(prompt=f"p{i}", is_safety=i == 0) for i in range(3)]
    path, out = write_jsonl(tmp_path / "q.jsonl", data), tmp_path / "labels.jsonl"
    config = preference_settings(inputs, out, prompts=(str(path),), annotator="person")
    typed = iter(["?", "b", "2", "n", "y", "a"])

    def type_next(_):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", type_next)
    answers = itertools.cycle([["x y", "x", "z"], ["y x", "y", "z"]])  # the last pair is equal
    monkeypatch.setattr(preferences, "answer_all", lambda *_: next(answers))
    preferences.main(config)
    assert "1 pairs of equal answers, or with an empty one, left out" in capsys.readouterr().out
    pair = read(tmp_path / "labels.jsonl.pairs.jsonl")[0]
    label = dict(prompt="p0", chosen=pair["b"], rejected=pair["a"], rating="better", kind="safety")
    assert read(out) == [label | dict(chosen_safe=True, rejected_safe=False)]
    typed = iter(["a", "1"])
    preferences.main(config)
    assert [record["prompt"] for record in read(out)] == ["p0", "p1"]
    kinds = [record["kind"] for record in read(out)]
    assert kinds == ["safety", "helpfulness"]
    # The second prompt is not about safety, so nobody asked.
    assert read(out)[1]["chosen_safe"] is None
    output = capsys.readouterr().out
    assert f"2 of 2 compared, in {out}: python train_rm.py --init {config.chat} --data" in output
    other = write_jsonl(tmp_path / "other.jsonl", [dict(prompt="new")])
    with pytest.raises(ValueError, match="made with other settings: prompts was"):
        preferences.main(replace(config, prompts=(str(other),)))
    before = other.read_bytes()
    with pytest.raises(ValueError, match="other.jsonl exists and has no labels"):
        preferences.main(replace(config, out=str(other)))
    assert other.read_bytes() == before
    labels = out.read_bytes()
    typed = iter([])  # new answers, and nobody labels them
    preferences.main(replace(config, seed=5, overwrite=True))
    assert not out.exists()
    assert Path(f"{out}.old").read_bytes() == labels


def test_a_person_can_skip_a_pair_and_take_back_a_label(tmp_path, inputs, monkeypatch, capsys):
    """Also after a pause: a skipped pair does not come back, other labels keep their pairs."""
    data = [dict(prompt=f"p{i}") for i in range(5)]
    path, out = write_jsonl(tmp_path / "q.jsonl", data), tmp_path / "labels.jsonl"
    config = preference_settings(inputs, out, prompts=(str(path),), annotator="person")
    texts = itertools.cycle([["x"] * 5, ["y"] * 5])
    monkeypatch.setattr(preferences, "answer_all", lambda *_: next(texts))
    typed = []

    def type_next(_):
        if not typed:
            raise EOFError
        return typed.pop(0)

    monkeypatch.setattr("builtins.input", type_next)
    typed += ["u", "a", "1", "s", "b", "2"]  # p0; skip p1; p2
    preferences.main(config)
    assert [record["prompt"] for record in read(out)] == ["p0", "p2"]
    assert "2 of 4 compared" in capsys.readouterr().out
    typed += ["u", "a", "4", "b", "3"]  # p2 again; p3
    preferences.main(config)
    labels = [(record["prompt"], record["rating"]) for record in read(out)]
    assert labels == [("p0", "significantly"), ("p2", "negligibly"), ("p3", "slightly")]
    typed += ["b", "1", "n", "y"]
    preferences.main(replace(config, ask_safety=True))
    assert read(out)[-1]["prompt"] == "p4"
    assert {read(out)[-1]["chosen_safe"], read(out)[-1]["rejected_safe"]} == {True, False}
    assert all(isinstance(records.to_pair(record), records.Pair) for record in read(out)[:3])


def test_a_label_removed_by_hand_is_asked_again_and_no_other(tmp_path, monkeypatch, capsys):
    """The labels keep the order of the pairs, and a label of another pair is kept."""
    config = preferences.Settings(out=str(tmp_path / "labels.jsonl"))
    pairs = [dict(prompt=f"p{i}", a="x", b="y", kind="helpfulness") for i in range(3)]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", pairs + pairs[:1])  # the last is a copy
    typed = []

    def type_next(_):
        if not typed:
            raise EOFError
        return typed.pop(0)

    def label(keys):
        typed[:] = keys
        preferences.label_by_person(pairs, config)
        assert not typed
        return [record["prompt"] for record in read(config.out)]

    monkeypatch.setattr("builtins.input", type_next)
    assert label("a1b2b3a4") == ["p0", "p1", "p2", "p0"]
    labels = read(config.out)
    write_jsonl(tmp_path / "labels.jsonl", [labels[2] | {"prompt": "other"}, *labels[2:]])
    capsys.readouterr()
    assert label("b1ua2a1") == ["other", "p0", "p1", "p2", "p0"]
    shown = capsys.readouterr().out
    assert "1 labels in" in shown and "4 of 4 compared" in shown
    assert shown.count("p1") == 2 and "p2\n" not in shown


def test_a_person_reads_messages_as_a_dialogue(monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda _: "s")
    messages = [dict(role="system", content="Be brief."), *dialog("Hi?", "Yes.", "And?")]
    pair = dict(prompt=messages, a="x", b="y", kind="safety")
    assert preferences.ask_comparison(pair, False) == "s"
    lines = ["system: Be brief.", "user: Hi?", "assistant: Yes.", "user: And?", "  a) x", "  b) y"]
    assert capsys.readouterr().out.splitlines() == lines


def test_pairs_without_an_annotator_have_no_label(tmp_path, inputs):
    data = [dict(prompt="Say a."), dict(prompt="b", is_safety=True)]
    path = write_jsonl(tmp_path / "q.jsonl", data)
    out = tmp_path / "p.jsonl"
    config = preference_settings(inputs, out, prompts=(str(path),), annotator="nobody")
    preferences.main(config)
    kinds = [(record["prompt"], record["kind"]) for record in read(config.out)]
    assert kinds == [("Say a.", "helpfulness"), ("b", "safety")]
    assert all(isinstance(record["a"] + record["b"], str) for record in read(config.out))
    with pytest.raises(ValueError, match=f"{path}:1: not a prompt of Tinytown"):
        preferences.main(replace(config, annotator="tinytown", overwrite=True))


def test_ghost_attention_command_writes_training_dialogues(tmp_path, base, monkeypatch, capsys):
    dialogs = [dict(messages=dialog("One?", "It is.", f"Two {i}?", "It is.")) for i in range(8)]
    fox = dict(instruction="Be the fox.", terse="Fox!", obeyed_if=["^The fox says: ?"])
    config = ghost_attention.Settings(
        chat=str(base),
        out=str(tmp_path / "g.jsonl"),
        max_new_tokens=6,
        system=0.0,
        alone=0.0,
        data=(str(write_jsonl(tmp_path / "d.jsonl", dialogs)),),
        instructions=(str(write_jsonl(tmp_path / "i.jsonl", [fox | {"kind": "animal"}])),),
        **EXACT,
    )
    with pytest.raises(ValueError, match="no answer of .* obeys .* train_sft.py --no-pack --init"):
        ghost_attention.main(config)

    def obey(model, tok, dialogs, *_, sampler):
        return ["The fox says: yes."] * len(dialogs)

    monkeypatch.setattr(ghost_attention, "respond", obey)
    ghost_attention.main(config)
    assert "16 answers sampled under instructions, 0 of them removed" in capsys.readouterr().out
    written = [record["messages"] for record in read(config.out)]
    assert 8 < len(written) <= 16
    assert sum(messages[0]["content"].startswith("Fox! ") for messages in written) < len(written)
    # Only the first message has the instruction, and the prefix is removed from the answers.
    assert not any("ox" in m["content"] for messages in written for m in messages[2::2])


@pytest.mark.parametrize("turns", [("hen " * 200, "Yes."), ("Hi?", "Yes.", "hen " * 200, "No.")])
def test_ghost_attention_leaves_out_a_dialogue_with_a_message_beyond_the_context(
    tmp_path, base, monkeypatch, capsys, turns
):
    dialogs = [dict(messages=dialog(*turns)), dict(messages=dialog("One?", "It is."))]
    config = ghost_attention.Settings(
        chat=str(base),
        out=str(tmp_path / "g.jsonl"),
        data=(str(write_jsonl(tmp_path / "d.jsonl", dialogs)),),
        instructions=(str(write_jsonl(tmp_path / "i.jsonl", [dict(instruction="Be a fox.")])),),
        max_new_tokens=6,
        **EXACT,
    )

    def answer(model, tok, dialogs, *_, sampler):
        lengths = [ghost_attention.length(tok, messages) for messages in dialogs]
        assert max(lengths) < model.args.max_seq_len
        return ["yes"] * len(dialogs)

    monkeypatch.setattr(ghost_attention, "respond", answer)
    ghost_attention.main(config)
    output = capsys.readouterr().out
    assert "1 dialogues left out: a message with its instruction" in output
    assert '1 instructions have no "obeyed_if"' in output
    short = sum(len(messages["messages"]) == 2 for messages in dialogs)
    assert f"{short} of 2 dialogues have one question" in output
    write_jsonl(tmp_path / "d.jsonl", dialogs[:1])
    with pytest.raises(ValueError, match="d.jsonl fits the context of"):
        ghost_attention.main(replace(config, overwrite=True))
