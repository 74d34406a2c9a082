"""Dialogues, preference pairs, prompts and instructions: formats, errors, held-out data."""

import gzip
import json
import re

import pytest

import train_rm
import train_sft
from conftest import dialog, hh_text, make_model, write_jsonl
from data import fields, files, records
from llama2 import encode_dialog

USER, ANSWER = dialog("a", "b")
PAIR = dict(prompt="a", chosen="b", rejected="c")
NOTHING = (None, float("nan"), "")  # what tables have in an empty cell


# --------------------------------------------------------------------------------- formats accepted
def test_every_dialogue_format_becomes_the_same_messages():
    messages = dialog("What is it?", "A fox.")
    brief = dialog("What is it?", "A fox.", system="Be brief.")
    longer = dialog("How many legs?", "Four.", "What is it?", "A fox.")
    alpaca = {"instruction": "What is it?", "input": "", "output": "A fox."}
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A fox."}]
    sharegpt = {"id": 1, "conversations": turns}
    for record in ({"messages": messages}, alpaca, alpaca | {"input": None}, sharegpt):
        assert records.to_messages(record) == messages
        assert records.to_messages(record | {"system": "Be brief."}) == brief
        assert records.to_messages(record | {"history": [["How many legs?", "Four."]]}) == longer
    turns = [{"from": "system", "value": "Be brief."}, *turns]
    assert records.to_messages({"conversations": turns}) == brief
    transcript = hh_text("What is it?") + "\n\nAssistant:"
    assert records.to_messages(dict(instruction=transcript, output="A fox.")) == messages
    sampled = records.to_messages({"prompt": "What is it?", "answer": "A fox."})
    assert [m["content"] for m in sampled] == ["What is it?", "A fox."]
    with_input = {"instruction": "Name it.", "input": "A red animal.", "output": "A fox."}
    assert records.to_messages(with_input)[0]["content"] == "Name it.\n\nA red animal."
    weighted = [USER, ANSWER | {"weight": 0}]
    assert records.to_messages({"messages": weighted})[1]["weight"] == 0


@pytest.mark.parametrize("empty", NOTHING)
def test_empty_and_unknown_fields_of_a_dialogue_are_ignored(empty):
    known = dict(conversations=empty, system=empty, history=empty, label=empty)
    unknown = dict(tools="[]", images=[], source="web", id=7, score=0.5)
    assert records.to_messages({"messages": [USER, ANSWER], **known, **unknown}) == [USER, ANSWER]


def test_every_preference_format_becomes_the_same_pair():
    before, good, bad = dialog("a", "b", "c"), "good", "bad"
    chosen, rejected = ({"role": "assistant", "content": text} for text in (good, bad))
    turns = [{"from": ("human", "gpt")[i % 2], "value": "abc"[i]} for i in range(3)]
    last = {name: {"from": "gpt", "value": name} for name in (good, bad)}
    both = dict(chosen=good, rejected=bad)
    whole = dict(chosen=[*before, chosen], rejected=[*before, rejected])
    texts = dict(chosen=hh_text("a", "b", "c", good), rejected=hh_text("a", "b", "c", bad))
    for record in (
        dict(prompt=before, chosen=good, rejected="bad "),
        dict(prompt=hh_text("a", "b", "c") + "\n\nAssistant:", chosen=" good", rejected=bad),
        dict(prompt=hh_text("a", "b", "c"), rating=float("nan"), **both),
        dict(prompt="c", history=[["a", "b"]], chosen_safe=None, **both),
        dict(prompt=before, chosen=[chosen], rejected=[rejected]),
        dict(prompt=before, chosen=chosen, rejected=rejected, rating=None, kind=""),
        dict(conversations=turns, chosen=last[good], rejected=last[bad]),
        texts,
        texts | {"prompt": "c"},
        whole,
        whole | {"prompt": "c", "score": 3},
    ):
        pair = records.to_pair(record)
        assert (pair.messages, pair.chosen, pair.rejected) == (before, good, bad)
        assert pair.kind == "helpfulness"
        assert records.to_pair(record, kind="safety").kind == "safety"
        assert records.to_pair(record | {"kind": "helpfulness"}, kind="safety").kind == pair.kind


def test_a_transcript_may_contain_human_and_empty_lines_inside_a_turn():
    user = "I ask Human: x"
    record = dict(chosen=hh_text(user, "one\n\ntwo"), rejected=hh_text(user, "one"))
    pair = records.to_pair(record)
    assert (pair.messages, pair.chosen) == (dialog(user), "one\n\ntwo")


def test_prompts_include_their_system_message_and_history(tok):
    whole = dialog("a", "b", "c", system="Be brief.")
    for record in (
        dict(prompt=whole, is_safety=None, label="a reference answer"),
        dict(prompt="c", system="Be brief.", history=[["a", "b"]]),
        dict(prompt=hh_text("a", "b", "c"), system="Be brief."),
    ):
        prompt = records.to_prompt(record, tok, 200)
        assert prompt.tokens == encode_dialog(tok, whole)[0]
        assert prompt.is_safety is False
        again = records.to_prompt(dict(prompt=prompt.text), tok, 200)
        assert records.prompt_to_messages(again.text)
    assert records.to_prompt(dict(prompt="c", system=None), tok, 200).text == "c"


# ---------------------------------------------------------------------------------- formats refused
BAD = {
    "dialogue": [
        (["a"], "expected an object"),
        ({"words": "a"}, 'expected "messages"'),
        ({"messages": []}, '"messages" is not a list'),
        ({"messages": [dict(role="judge", content="a")]}, "message 1 has the unknown role 'judge'"),
        ({"messages": [dict(role=["user"], content="a")]}, "has the unknown role ['user']"),
        ({"messages": [dict(role="tool", content="c")]}, "message 1 has the unknown role 'tool'"),
        ({"messages": [dict(role="user", content=[{"type": "text"}])]}, "message 1 is not a str"),
        ({"messages": [dict(role="user", content="b", weight=0.5)]}, 'has "weight" 0.5'),
        ({"messages": [dict(role="user", content=5), USER, ANSWER]}, "message 1 is not a string"),
        ({"messages": [{"role": "user"}]}, 'message 1 lacks "content"'),
        ({"messages": [USER, USER, ANSWER]}, "message 2 has role 'user'"),
        ({"messages": dialog("a", " ")}, "message 2, an answer, is empty"),
        ({"messages": dialog("a", "b", "c")}, "the last message has no answer"),
        ({"messages": dialog("[INST] a", "b")}, "message 1 contains [INST]"),
        ({"messages": dialog("<|im_start|>user", "b")}, "message 1 contains '<|im_start|>'"),
        ({"messages": dialog("\ud800", "b")}, "surrogates not allowed"),
        ({"messages": [USER | {"loss_mask": 0}]}, '"loss_mask" is not supported'),
        ({"messages": [ANSWER | {"tool_calls": [{}]}]}, '"tool_calls" is not supported'),
        ({"messages": [USER, ANSWER], "label": False}, '"label" is not supported'),
        ({"messages": [USER, ANSWER], "tools": [{}]}, '"tools" is not supported'),
        ({"messages": [USER, ANSWER], "weight": 0}, '"weight" is not supported'),
        ({"messages": [USER, ANSWER], "system": ["c"]}, "message 1 is not a string"),
        ({"messages": [USER, ANSWER], "history": 5}, '"history" is not a list of pairs'),
        ({"messages": [USER, ANSWER], "history": ["a"]}, '"history" is not a list of pairs'),
        ({"messages": [USER, ANSWER], "history": [["a", 5]]}, "message 2 is not a string"),
        ({"conversations": "a"}, '"conversations" is not a list'),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "message 1 has role 'assistant'"),
        ({"instruction": "a"}, '"output" is missing'),
        ({"instruction": "a", "input": 21, "output": "b"}, '"input" is 21'),
        ({"instruction": "a", "output": "b", "images": ["c"]}, '"images" is not supported'),
        ({"instruction": "Do.\n\n### Response:", "output": "b"}, "contains '### Response:'"),
        ({"instruction": None, "output": "b"}, 'expected "messages"'),
        ({"instruction": 5, "output": "b"}, '"prompt" is neither'),
    ],
    "pair": [
        ("text", "expected an object"),
        (dict(chosen="b"), 'expected a "prompt", or transcripts'),
        (dict(instruction="a", chosen="b", rejected="c"), 'expected a "prompt", or transcripts'),
        (dict(prompt="a", chosen="b"), '"rejected" is missing'),
        (PAIR | dict(prompt=5), '"prompt" is neither'),
        (PAIR | dict(prompt=[USER, ANSWER]), "does not end with a message of the"),
        (PAIR | dict(prompt=[USER] * 3), "message 2 has role 'user'"),
        (PAIR | dict(prompt="[INST]"), "message 1 contains [INST]"),
        (PAIR | dict(chosen=["b"]), '"chosen" is not a list of objects'),
        (PAIR | dict(chosen=5), '"chosen" is 5, neither'),
        (PAIR | dict(chosen=[USER]), '"chosen" does not end with an answer'),
        (PAIR | dict(margin=2.5), '"margin" is not supported'),
        (PAIR | dict(rating=3), '"rating" is 3'),
        (PAIR | dict(rating="much"), "\"rating\" is 'much'"),
        (PAIR | dict(kind="taste"), "\"kind\" is 'taste'"),
        (PAIR | dict(chosen_safe="yes"), "\"chosen_safe\" is 'yes'"),
        (PAIR | dict(chosen_safe=0), '"chosen_safe" is 0'),
        (PAIR | dict(rejected_safe=1.0), '"rejected_safe" is 1.0'),
    ],
    "prompt": [
        ("p", 'expected an object with a "prompt"'),
        (dict(prompt="p", is_safety="yes"), "\"is_safety\" is 'yes'"),
        (dict(prompt="p", is_safety=1), '"is_safety" is 1'),
        (dict(prompt="p", own_answers="yes"), "\"own_answers\" is 'yes'"),
        (dict(prompt=None), '"prompt" is neither'),
        (dict(prompt="p", images=["c.png"]), '"images" is not supported'),
        (dict(prompt="p", history=[["q", None]]), "message 2 is not a string"),
        (dict(prompt=[ANSWER]), "does not end with a message"),
        (dict(prompt="[INST] p"), "part of the chat format"),
    ],
    "instruction": [
        ("x", 'expected an object with an "instruction"'),
        (dict(terse="x"), 'expected an object with an "instruction"'),
        (dict(instruction="Be [/INST] kind."), "part of the chat format"),
        (dict(instruction="Be kind.", terse="<<SYS>>"), "part of the chat format"),
        (dict(instruction="Be kind.", terse=5), '"terse" must be a string'),
        (dict(instruction="Be kind.", obeyed_if="(kind"), "unterminated subpattern"),
        (dict(instruction="Be kind.", obeyed_if=[3]), "is not a regular expression"),
    ],
}
GOOD = {
    "dialogue": {"messages": [USER, ANSWER]},
    "pair": PAIR,
    "prompt": {"prompt": "a"},
    "instruction": {"instruction": "Be kind."},
}


def make_parser(kind, tok):
    return {
        "dialogue": lambda record: train_sft.encode_example(record, tok, 64),
        "pair": lambda record: train_rm.encode_pair(records.to_pair(record), tok, 64, {}),
        "prompt": lambda record: records.to_prompt(record, tok, 64),
    }[kind]


@pytest.mark.parametrize("kind, record, error", [(k, *bad) for k in BAD for bad in BAD[k]])
def test_a_bad_record_is_an_error_with_its_line_or_is_skipped(tmp_path, tok, kind, record, error):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, (GOOD[kind], record, GOOD[kind]))))

    def read(skip_bad):
        if kind == "instruction":
            return records.read_instructions([path], tok, skip_bad), {error: 1}
        return files.read_records([path], make_parser(kind, tok), skip_bad)

    with pytest.raises(ValueError, match=re.escape(f"{path}:2: ")) as e:
        read(skip_bad=False)
    assert error in str(e.value)
    good, left_out = read(skip_bad=True)
    assert (len(good), list(left_out.values())) == (2, [1])


BROKEN = [b'{"a": ', b'{"a": "\xe9"}', b'{"a": "\\ud800"}', b'{"a":' * 9999, b"9" * 5000]


@pytest.mark.parametrize("line", BROKEN)
def test_a_broken_line_is_an_error_with_its_place_or_is_skipped(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b"\n" + b'{"a": 2}\n')
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}:2: (broken JSON|not UTF-8)"):
        files.read_records([path], lambda record: record)
    good, left_out = files.read_records([path], lambda record: record, skip_bad=True)
    assert good == [{"a": 1}, {"a": 2}]
    assert list(left_out) in (["broken JSON"], ["not UTF-8 text"])


USELESS_PAIRS = [
    (dict(chosen=hh_text("a", "b"), rejected=hh_text("a", "b")), "the same"),
    (dict(chosen=hh_text("a", "b c"), rejected=hh_text("a", "b  c\n")), "the same"),
    (dict(chosen=hh_text("a", "b", "c"), rejected=hh_text("a", "b")), "alternate"),
    (dict(chosen=hh_text("a", "b") + "\n\nAssistant: c", rejected=hh_text("a", "b")), "alternate"),
    (dict(chosen="\n\nAssistant: c", rejected=hh_text("a", "b")), "alternate"),
    (dict(chosen="Once" + hh_text("a", "b"), rejected=hh_text("a", "b")), "alternate"),
    (dict(chosen=hh_text("a", "b"), rejected=hh_text("z", "c")), "prompts that differ"),
    (dict(chosen=hh_text("a", "b", "c", "d"), rejected=hh_text("a", "x")), "prompts that differ"),
    (dict(chosen=hh_text("a", ""), rejected=hh_text("a", "x")), "empty"),
    (PAIR | dict(chosen_safe=False, rejected_safe=True), "unsafe"),
    (dict(prompt="word " * 200, chosen="yes" + " w" * 99, rejected="no" + " w" * 99), "context"),
]


def test_pairs_without_a_usable_difference_are_left_out_and_counted(tmp_path, tok):
    parse = make_parser("pair", tok)
    for record, reason in USELESS_PAIRS:
        with pytest.raises(files.SkipRecord, match=reason):
            parse(record)
    useless = [record for record, _ in USELESS_PAIRS]
    good, left_out = files.read_records(
        [write_jsonl(tmp_path / "p.jsonl", [PAIR, *useless])], parse
    )
    assert (len(good), sum(left_out.values())) == (1, len(useless))


def test_prompts_without_room_for_an_answer_are_left_out_and_counted(tmp_path, tok, capsys):
    path = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "a"}] + [{"prompt": "word " * 99}] * 3)
    assert len(records.read_prompts([path], tok, 64)) == 1
    expected = f"1 prompts of {path}, left out: 3 (no room for an answer in 64 tokens)\n"
    assert capsys.readouterr().out == expected
    with pytest.raises(ValueError, match=r"no prompt to use, left out: 4 \(no room for"):
        records.read_prompts([path], tok, 5)


# ------------------------------------------------------------------------------------- own answers
def ask_again(tok, *contents, system="", own_answers=True, context=200):
    record = dict(prompt=dialog(*contents, system=system), own_answers=own_answers)
    return records.to_prompt(record, tok, context)


def test_the_models_own_answers_replace_those_of_a_dialogue_turn_by_turn(tok, monkeypatch):
    """It answers later questions after it has read its own earlier answers, as in use."""
    seen = []

    def respond(model, tok, dialogs, max_new_tokens, temperature, seed):
        texts = [[message["content"] for message in messages] for messages in dialogs]
        seen.append((texts, max_new_tokens, temperature, seed))
        return ["" if messages[-1] == "quiet" else f"own {messages[-1]}" for messages in texts]

    monkeypatch.setattr(records, "respond", respond)
    prompts = [
        ask_again(tok, "a", "x", "b", "y", "c"),
        ask_again(tok, "d", "z", "e", own_answers=False),
        ask_again(tok, "f", "z", "g", system="s"),
        ask_again(tok, "quiet", "kept", "h"),
        records.to_prompt(dict(prompt="i", own_answers=True), tok, 200),
    ]
    again = records.answer_again(make_model(max_seq_len=200), tok, prompts, 9, 0.5, 1)
    contents = [[m["content"] for m in prompt.text] for prompt in again[:4]]
    assert contents[0] == ["a", "own a", "b", "own b", "c"]
    assert again[1] is prompts[1]
    assert contents[2] == ["s", "f", "own f", "g"]
    assert contents[3] == ["quiet", "kept", "h"]  # an empty answer replaces nothing
    assert again[4].text in ("i", dialog("i"))
    for prompt in again[:4]:
        assert prompt.tokens == encode_dialog(tok, prompt.text)[0]
    texts = sum((texts for texts, *_ in seen), [])
    assert ["a", "own a", "b"] in texts
    assert {(count, temperature) for _, count, temperature, _ in seen} == {(9, 0.5)}
    assert len({seed for *_, seed in seen}) == len(seen)
    assert prompts[0].text == dialog("a", "x", "b", "y", "c")  # the file's record is unchanged


def test_a_dialogue_that_its_own_answers_would_make_too_long_keeps_those_of_the_file(
    tok, monkeypatch
):
    def respond(model, tok, dialogs, *_):
        return ["the fox " * 9] * len(dialogs)

    monkeypatch.setattr(records, "respond", respond)
    prompts = [ask_again(tok, *"abc"), ask_again(tok, *"abcde"), ask_again(tok, *"abc")]
    (longer,) = records.answer_again(make_model(max_seq_len=200), tok, prompts[:1], 9, 1.0, 1)
    model = make_model(max_seq_len=len(longer.tokens) + 1)
    again = records.answer_again(model, tok, prompts, 9, 1.0, 1)
    assert again == [longer, prompts[1], longer]


def test_own_answers_may_fill_the_context_before_the_last_question(tok):
    prompt = ask_again(tok, *"abcdefg")
    model = make_model(max_seq_len=len(prompt.tokens) + 5, vocab_size=tok.vocab_size)
    assert records.answer_again(model, tok, [prompt], 40, 1.0, 1) == [prompt]


# -------------------------------------------------------------------------------------------- files
def test_files_may_have_lines_or_an_array_whatever_their_names(tmp_path):
    data = [{"a": 1}, {"a": "\u2028é"}]
    lines, array, bom = (
        "\n".join(map(json.dumps, data)).encode(),
        json.dumps(data).encode(),
        b"\xef\xbb\xbf",
    )
    for name, content in {
        "l.jsonl": lines,
        "l.json": lines,
        "a.json": array,
        "a.jsonl": b"\n " + array,
        "b.json": bom + array,
        "bom.jsonl": bom + lines,
        "crlf.jsonl": lines.replace(b"\n", b"\r\n\r\n"),
        "l.jsonl.gz": gzip.compress(lines),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert [record for _, record in files.read_json(tmp_path / name)] == data
    with pytest.raises(ValueError, match="bom.jsonl:1: expected an object with .* 'prompt' is"):
        list(files.read_objects(tmp_path / "bom.jsonl", prompt=str))
    places = [place for place, _ in files.read_json(tmp_path / "a.json")]
    assert places == [f"{tmp_path}/a.json: record 1", f"{tmp_path}/a.json: record 2"]


def test_a_weight_after_a_file_name_says_how_often_it_is_read(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", range(100))
    with_colon = write_jsonl(tmp_path / "b:2.jsonl", range(3))

    def read(*paths):
        return files.read_records(list(map(str, paths)), lambda record: record)[0]

    assert read(path) == list(range(100))
    assert read(f"{path}:2") == list(range(100)) * 2
    assert len(set(read(f"{path}:0.25"))) == len(read(f"{path}:0.25")) == 25
    assert sorted(read(f"{path}:1.5"))[:2] in ([0, 0], [0, 1])
    assert len(read(f"{path}:1.5")) == 150
    assert read(with_colon, f"{with_colon}:2") == [0, 1, 2] * 3
    for wrong in ("-1", "0", "1e3"):
        with pytest.raises(ValueError, match="is not a weight"):
            read(f"{path}:{wrong}")
    few = write_jsonl(tmp_path / "few.jsonl", range(4))
    assert len(read(f"{few}:0.1")) == 1  # a file that is named contributes something


def test_held_out_examples_and_their_copies_are_not_in_the_training_data():
    examples = [(f"a{i % 20}", i) for i in range(600)]
    train, val = files.hold_out(examples, lambda example: example[0], 0.1, seed=1)
    assert (len(val), len(train)) == (2 * 30, 540)
    assert not {key for key, _ in train} & {key for key, _ in val}
    assert val != files.hold_out(examples, lambda example: example[0], 0.1, seed=2)[1]


def test_a_dialogue_and_its_beginnings_are_held_out_together(tok):
    whole = [dialog(f"Hello {i}", "Hi.", "Who?", "An assistant.") for i in range(40)]
    parts = whole + [messages[:2] for messages in whole]
    parts += [dialog(f" Hello {i}\n", "Yes.", system="Be kind.") for i in range(40)]
    examples = [train_sft.encode_example({"messages": part}, tok, 256) for part in parts]
    train, val = files.hold_out(examples, lambda example: example.opening, 0.2, seed=1)
    assert len(val) == 3 * 8
    assert not {example.opening for example in train} & {example.opening for example in val}

    pairs = [dict(prompt=part[:-1], chosen="Yes.", rejected="No.") for part in parts]
    encoded = [train_rm.encode_pair(records.to_pair(pair), tok, 256, {}) for pair in pairs]
    openings = {example.opening for example in encoded}
    assert openings == {f"Hello {i}" for i in range(40)}


def test_written_answers_are_read_back_with_the_same_tokens(tmp_path, tok):
    prompt = records.to_prompt({"prompt": "Tell me 2 + 3.", "is_safety": True}, tok, 64)
    whole, _ = encode_dialog(tok, dialog("Tell me 2 + 3.", "2 plus 3 is 5."))
    answer = records.Answer(prompt, whole[len(prompt.tokens) :], True)
    record = records.answer_record(answer, tok, reward=1.5)
    assert record["answer"] == "2 plus 3 is 5."
    path = write_jsonl(tmp_path / "best.jsonl", [record])
    assert records.read_answers([path], tok, 64) == [answer]
    assert train_sft.encode_example(record, tok, 64).tokens == whole


@pytest.mark.parametrize("before", [["q"], ["q", "a", "p"], ["p"]])
def test_a_prompt_and_messages_before_the_answer_give_the_longer_dialogue(before):
    prompt = dialog("q", "a", "p", system="s")
    record = dict(prompt=prompt, chosen=dialog(*before, "b"), rejected=dialog(*before, "c"))
    if before == ["q"]:  # neither the beginning, which has a system message, nor the end
        with pytest.raises(ValueError, match='"prompt" and the messages in "chosen"'):
            records.to_pair(record)
    else:
        assert records.to_pair(record).messages == prompt


def test_dialogues_in_one_text_are_refused_and_history_gets_no_loss():
    with pytest.raises(ValueError, match=r'"text" contains \[INST\]'):
        records.to_text({"text": "<s>[INST] hi [/INST] yes </s>"})
    record = dict(prompt="q", answer="a", history=[["p", "b"]])
    weights = [message.get("weight", 1) for message in records.to_messages(record)]
    assert weights == [0, 0, 0, 1]


# --------------------------------------------------------------------- keys and other chat formats
SYSTEM, EMPTY = dialog("a", "b", system="Be a fox."), {"role": "system", "content": " "}
MEANING = [
    "loss_weight masked unmask train_detail training trainOnTurn sys_prompt systemMessage contexts",
    "context input prompt question documents tool_choice available_functions image_url persona",
    "Input CONTEXT article previous_turns earlierMessages options choices hint table knowledge",
    "developer instructions guidelines desirable suffix",
]


@pytest.mark.parametrize("key", " ".join(MEANING).split())
def test_a_key_that_changes_what_a_record_means_is_refused_by_its_name(key):
    refused = pytest.raises(ValueError, match=f'"{key}" is not supported')
    with refused:
        records.to_messages({"messages": [USER, ANSWER], key: 0})
    with refused:
        records.to_messages({"messages": [USER, ANSWER | {key: 0}]})
    if key not in ("prompt", "messages"):
        with refused:
            records.to_pair(PAIR | {key: "x"})


def test_a_key_that_only_repeats_or_describes_the_dialogue_is_harmless():
    assert not fields.unused_keys(dict(system_title="x", score_chosen=1, best_of_n=3, model="x"))
    both = dict(chosen=[USER, ANSWER], rejected=[USER, ANSWER | {"content": "c"}])
    record = dict(prompt="a", messages=[USER, ANSWER], **both, prompt_id="x", score_chosen=5.0)
    assert records.to_messages(record) == [USER, ANSWER]  # UltraFeedback's keys
    assert records.to_pair(record).messages == records.read_prompt(record) == [USER]
    described = dict(system_prompt_id=3, context_length=9, source="web", text="Human: a")
    assert records.to_messages({"messages": [USER, ANSWER], **described}) == [USER, ANSWER]


def test_keys_that_nothing_is_known_of_are_printed_once_a_file(tmp_path, capsys):
    record = dict(messages=[USER | {"mood": 1}, ANSWER], views=3, id=1, model_name="x")
    path = write_jsonl(tmp_path / "a.jsonl", [record] * 3)
    files.read_records([path], records.to_messages)
    assert capsys.readouterr().out == f"{path}: keys not used: mood, views\n"
    # One harmless word is not enough, and a long text does more than to describe a record.
    strange = dict(source_text="The hen", user_profile="a fox", notes="The hen sat. " * 20)
    path = write_jsonl(path, [record | strange])
    files.read_records([path], records.to_messages)
    assert "mood, notes, source_text, user_profile, views" in capsys.readouterr().out


@pytest.mark.parametrize(
    "record",
    [
        dict(prompt="a", completion=" b"),
        dict(prompt=[USER], completion=[ANSWER]),
        dict(prompt="a", response="b"),
        dict(question="a", answer="b"),
        dict(query="a", response="b"),
        dict(instruction="a", response="b</s>"),
        dict(conversation=[USER, EMPTY, ANSWER]),
        dict(messages=[EMPTY, USER, ANSWER], system=" ", label=" "),
        dict(messages=[USER, ANSWER | {"content": "b<|im_end|>\n"}]),
        dict(prompt="a", completion="<s> b </s>"),
        dict(prompt="a", completion="<|begin_of_text|>b<|end_of_sentence|><EOS>"),
        dict(prompt=hh_text("a"), completion=hh_text("", "b").removeprefix("\n\nHuman: ")),
        dict(messages=[EMPTY | {"content": "\u200b\ufeff"}, USER, ANSWER], system="\u2060"),
    ],
)
def test_questions_and_answers_under_other_keys_give_the_same_tokens(tok, record):
    expected = train_sft.encode_example({"messages": [USER, ANSWER]}, tok, 64)
    assert train_sft.encode_example(record, tok, 64) == expected
    record = record | {"system_prompt": "Be a fox."}
    assert train_sft.encode_example(record, tok, 64).tokens == encode_dialog(tok, SYSTEM)[0]


def test_what_an_instruction_is_about_may_be_called_context():
    record = dict(instruction="Who sat?", context="The hen sat.", response="The hen")
    assert records.to_messages(record)[0]["content"] == "Who sat?\n\nThe hen sat."


FOREIGN = [
    "Human:hi\nAssistant:yo\nHuman:2+3?\nAssistant:",
    "### Human: hi### Assistant: yo",
    "Below is a task.\n\n### Instruction:\nhi\n\n### Response:\n",
    "A chat with an AI. USER: hi ASSISTANT:",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>",
    "<bos><start_of_turn>user\nhi<end_of_turn>",
    "<s><|im_start|>user\nhi",
    "Be kind.\n<|user|>\nhi</s>\n<|assistant|>",
    str([USER, ANSWER]),
    json.dumps(USER),
    json.dumps(json.dumps([USER])),
    '[{"role": "tool", "text": "3"}]',
    "[ChatCompletionMessage(content='hi', role='user')]",
    "user: hi\nassistant:",
    "**Human:** hi\n\n**Assistant:**",
    "Human: hi\rAssistant:",
    "用户：hi\u2028助手：",
    "<human>: hi\n<bot>:",
    "[|user|]hi\n[|assistant|]",
    "<bos><|turn>user\nhi<turn|>",
]


@pytest.mark.parametrize("text", FOREIGN)
def test_a_dialogue_of_another_chat_format_is_refused_in_every_field(tok, text):
    for parse, record in (
        (records.to_messages, dict(messages=dialog(text, "b"))),
        (records.to_messages, dict(instruction=text, output="b")),
        (records.to_messages, dict(messages=[USER, ANSWER], history=[[text, "b"]])),
        (records.to_pair, PAIR | dict(prompt=text)),
        (lambda record: records.to_prompt(record, tok, 200), dict(prompt=text)),
        (records.to_text, dict(text=text)),
    ):
        with pytest.raises(ValueError, match="as messages"):
            parse(record)
    with pytest.raises(ValueError, match="as messages"):
        records.to_pair(PAIR | dict(chosen=json.dumps([ANSWER])))


@pytest.mark.parametrize(
    "question, answer",
    [
        ("USER: root logged in. What does the log say?", "a line with ### Instruction: in it"),
        ("Human: is it a species?", "USER: x\nASSISTANT: y"),
        ("What does <|im_start|> mean?", "It begins a turn:\n<|im_start|>user"),
        ("Sum up:\nUser: hi\nAssistant: yo\nThank you.", 'As JSON: {"from": "me", "value": 3}'),
        ("Strike it out.", "<s>it</s>"),
        ("Who said user: root?", "An array ends with a[-1] or <b>it</b>"),
    ],
)
def test_a_text_may_speak_of_other_chat_formats(question, answer):
    messages = dialog(question, answer)
    assert records.to_messages({"messages": messages}) == messages


@pytest.mark.parametrize(
    "part", [" ", "\n", "USER: x\n", "[", "user: x\n", "</s>", "[Message(role=", '{"role": "user"']
)
def test_a_long_text_is_searched_for_marks_in_linear_time(part):
    text = (part * 99999)[:99999]
    fields.check_text(f"a{text}a", 1)
    fields.check_text(f"{text}a", 1)
    fields.without_ends(text)


@pytest.mark.parametrize("blank", ["", " \n", "\u200b", "\ufeff\u00a0"])
def test_an_empty_message_is_no_part_of_a_dialogue(tok, blank):
    for parse, record in (
        (records.to_messages, dict(messages=dialog(blank, "b"))),
        (records.to_messages, dict(messages=[USER, ANSWER], history=[[blank, "b"]])),
        (records.to_pair, PAIR | dict(prompt=dialog(blank))),
        (lambda record: records.to_prompt(record, tok, 99), dict(prompt=dialog(blank))),
        (records.to_text, dict(text=blank)),
        (records.to_pair, PAIR | dict(chosen=blank)),
    ):
        with pytest.raises(files.SkipRecord, match="an empty (message|text|answer)"):
            parse(record)
    with pytest.raises(ValueError, match='"instruction" is empty'):
        records.to_messages(dict(instruction=blank, input="The hen", output="b"))
    with pytest.raises(ValueError, match="message 2, an answer, is empty"):
        records.to_messages(dict(question="a", answer=blank))


def test_a_text_may_have_an_id_but_no_end_mark_and_must_not_be_empty():
    assert records.to_text({"text": "The hen sat.<|endoftext|>", "id": 3}) == "The hen sat."
    with pytest.raises(files.SkipRecord, match="empty text"):
        records.to_text({"text": " "})
    with pytest.raises(ValueError, match='"label" is not supported'):
        records.to_text({"text": "a", "label": 1})


# ------------------------------------------------------------------------ pairs of several turns
def test_a_prompt_beside_whole_dialogues_must_repeat_them():
    whole = dict(chosen=dialog("a", "b"), rejected=dialog("a", "c"))
    assert records.to_pair(whole | dict(prompt=SYSTEM[:2])).messages == SYSTEM[:2]
    earlier = dialog("x", "y", "a")
    assert records.to_pair(whole | dict(prompt=earlier)).messages == earlier
    with pytest.raises(ValueError, match="two different dialogues"):
        records.to_pair(whole | dict(prompt="bye?"))
    answers = dict(chosen="b", rejected="c", prompt="bye?")
    with pytest.raises(ValueError, match='"conversations" is not supported'):
        records.to_pair(answers | dict(conversations=[USER]))


def test_answers_of_several_turns_are_left_out_unless_only_the_last_one_differs():
    chosen, rejected = (dialog("a", text, "more", text + "!")[1:] for text in "bc")
    with pytest.raises(files.SkipRecord, match="answers of several turns"):
        records.to_pair(dict(prompt=[USER], chosen=chosen, rejected=rejected))
    one, other = ([ANSWER, {"role": "user", "content": text}, ANSWER] for text in "mn")
    for rejected_turns in ([ANSWER], other):
        with pytest.raises(files.SkipRecord, match="answers of several turns"):
            records.to_pair(dict(prompt="a", chosen=one, rejected=rejected_turns))
    whole = dict(chosen=SYSTEM, rejected=SYSTEM[1:], prompt="a")
    with pytest.raises(files.SkipRecord, match="prompts that differ"):
        records.to_pair(whole)
    pair = records.to_pair(dict(prompt=[USER], chosen=chosen, rejected=[*chosen[:2], rejected[2]]))
    assert (pair.messages, pair.rejected) == (dialog("a", "b", "more"), "c!")


def test_transcripts_may_be_split_after_the_prompt_and_have_windows_line_ends():
    split = dict(chosen="\n\nAssistant: b", rejected="\n\nAssistant: c")
    split["prompt"] = hh_text("a")
    whole = dict(chosen=hh_text("a", "b"), rejected=hh_text("a", "c"))
    waiting = PAIR | dict(prompt=hh_text("a") + "\n\nAssistant:")
    stripped = {key: text.strip() for key, text in split.items()}
    for record in (split, whole, waiting, stripped):
        windows = {key: text.replace("\n", "\r\n") for key, text in record.items()}
        for pair in map(records.to_pair, (record, windows)):
            assert (pair.messages, pair.chosen, pair.rejected) == ([USER], "b", "c")


# ------------------------------------------------------------------------------- files and counts
def test_all_left_out_records_are_counted_though_few_reasons_are_shown(tmp_path):
    def parse(number):
        raise ValueError("bad " + "x" * number)

    path = write_jsonl(tmp_path / "a.jsonl", range(10))
    _, left_out = files.read_records([path], parse, skip_bad=True)
    assert left_out.total() == 10
    assert left_out["other reasons"] == 4


@pytest.mark.parametrize("name", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_file_in_utf_16_is_named_before_a_line_is_used(tmp_path, name):
    path = tmp_path / "a.jsonl"
    for text in ('{"prompt": "a"}\n' * 3, '[{"prompt": "a"}]'):
        path.write_bytes(text.encode(name))
        with pytest.raises(ValueError, match="UTF-16 or UTF-32, expected UTF-8: convert it first"):
            files.read_records([path], lambda record: record, skip_bad=True)


@pytest.mark.parametrize("spec", [r"C:\data\a.jsonl", "2024-11-28T10:30/a.jsonl", "https://a.b/c"])
def test_a_missing_file_whose_name_has_a_colon_does_not_exist(spec):
    with pytest.raises(ValueError, match="does not exist"):
        files.split_weight(spec)
