"""Ghost Attention (§3.3): dialogues, instructions and a chat model -> dialogues to fine-tune on.

A chat model forgets an instruction of the first message after a few turns. Ghost Attention samples
answers with the instruction in every user message. For fine-tuning, it then removes the instruction
from all messages but the first, and computes the loss on the last answer only:

    sampled       [INST] Be the fox. u1 [/INST] a1   [INST] Be the fox. u2 [/INST] a2
    trained on    [INST] Be the fox. u1 [/INST] a1   [INST] u2 [/INST] a2
    weight                                      0                      1

    python -m data.ghost_attention
    python -m data.ghost_attention --chat out/v2 --data sharegpt.json --instructions mine.jsonl \\
        --history 1024 --context 2048 --out out/mine/ghost.jsonl
    python train_sft.py --no-pack --init out/v2 --data out/mine/ghost.jsonl sharegpt.json ...

The paper is short here. We read it so that answers are sampled turn by turn, and later answers
continue the sampled ones. A turn is a question with its answer. ours: an answer that disobeys the
instruction, by the instruction's own patterns, is removed with its question. Each dialogue is also
cut after some random turns (--beginnings), so that it gives several examples: with a loss on the
last answer only, many turns would give one example. In some dialogues the instruction becomes a
system message, in some it stands alone in the first message: people use both. The model must
already follow an instruction in the same message.
"""

import random
import re
from dataclasses import dataclass

from common.run import Output, checkpoint_files, run_script
from common.settings import check_settings
from common.training import all_gather, derive_seed, is_main, local_part, print0, setup
from data.files import data_paths, read_and_count, write_records
from data.formats import combine_instructions
from data.records import assistant_message, read_instructions, to_messages, user_message
from llama2 import Dtype, Tokenizer, Transformer, encode_dialog, generate, load, respond


@dataclass
class Settings:
    # sampling
    chat: str = "out/instructed"  # the model that answers; it must follow instructions
    data: tuple = ("out/tinytown/long-dialogues.jsonl",)  # only the users' messages are used
    instructions: tuple = ("out/tinytown/instructions.jsonl",)  # {"instruction", "obeyed_if"}
    skip_bad: bool = False  # skip records that do not fit, and count them
    turns: int = 24  # maximum number of turns per dialogue
    history: int = 64  # latest tokens of a dialogue that the model reads for an answer
    temperature: float = 0.3  # of sampling
    max_new_tokens: int = 90  # longest answer, in tokens
    device: str = "auto"  # cuda, mps or cpu
    dtype: Dtype = "auto"  # of matrix products; auto: bfloat16 where it is faster
    # output
    context: int = 1024  # longest dialogue, in tokens
    system: float = 0.3  # fraction of dialogues whose instruction becomes a system message
    alone: float = 0.1  # fraction of dialogues that begin with the instruction alone
    beginnings: int = 8  # further examples per dialogue, cut after a random turn
    out: str = "out/gatt/dialogues.jsonl"  # dialogues for train_sft.py
    overwrite: bool = False  # replace an existing file
    seed: int = 1  # for drawing instructions and for sampling

    # The same file may be requested with other values of these. They do not change its content.
    MAY_CHANGE = ("out", "overwrite", "device")


def obeys(answer: str, instructions: list[dict]) -> bool:
    """True if all patterns of all instructions match in the answer."""
    for instruction in instructions:
        for pattern in instruction["obeyed_if"]:
            if not re.search(pattern, answer):
                return False
    return True


def instruct_every_message(text: str, turns: list[tuple[str, str]], question: str) -> list[dict]:
    """The dialogue for sampling: the instruction is in every user message, also in the last one."""
    messages = []
    for earlier_question, answer in turns:
        messages.append(user_message(f"{text} {earlier_question}".strip()))
        messages.append(assistant_message(answer))
    return messages + [user_message(f"{text} {question}".strip())]


def instruct_first_message(
    text: str, turns: list[tuple[str, str]], as_system: bool = False
) -> list[dict]:
    """The dialogue for training: the instruction is in the first message only, or a system message.

    All answers but the last one have weight 0.
    """
    messages = [{"role": "system", "content": text}] if as_system else []
    for i, (question, answer) in enumerate(turns):
        if i == 0 and not as_system:
            question = f"{text} {question}".strip()
        messages.append(user_message(question))
        messages.append({**assistant_message(answer), "weight": int(i == len(turns) - 1)})
    return messages


def length(tok: Tokenizer, messages: list[dict]) -> int:
    """The number of tokens of a dialogue."""
    return len(encode_dialog(tok, messages)[0])


def sample_dialogs(
    model: Transformer,
    tok: Tokenizer,
    questions: list[list[str]],
    instructions,
    seed: int,
    config: Settings,
    sampler=generate,
):
    """([[(question, answer), ...] per dialogue], number of answers that disobeyed).

    questions: those of each dialogue; instructions: (text, its instructions) of each dialogue.
    """
    room = min(config.history, model.args.max_seq_len - config.max_new_tokens)
    dialogs, disobeyed = [[] for _ in questions], 0
    for turn in range(max(len(of_one) for of_one in questions)):
        # All dialogues that have this turn get their next answer in one batch.
        active = [i for i in range(len(questions)) if turn < len(questions[i])]
        prompts = []
        for i in active:
            (text, _), turns, question = instructions[i], dialogs[i], questions[i][turn]
            prompt = instruct_every_message(text, turns, question)
            # Drop the oldest turns: the newest message has the instruction, too.
            while turns and length(tok, prompt) > room:
                turns = turns[1:]
                prompt = instruct_every_message(text, turns, question)
            prompts.append(prompt)
        options = config.max_new_tokens, config.temperature, derive_seed(seed, turn)
        answers = respond(model, tok, prompts, *options, sampler=sampler)
        for i, answer in zip(active, answers):
            _, its_instructions = instructions[i]
            if answer and obeys(answer, its_instructions):
                dialogs[i].append((questions[i][turn], answer))
            else:
                disobeyed += 1
    return dialogs, disobeyed


def fits(tok: Tokenizer, questions: list[str], text: str, context: int) -> bool:
    """True if each question with the instruction leaves room for an answer in the context."""
    messages = [instruct_every_message(text, [], question) for question in questions]
    return max(length(tok, message) for message in messages) < context


def to_records(tok: Tokenizer, turns, text: str, rng, config: Settings) -> list[dict]:
    """The training records of one sampled dialogue: the whole of it, and cut after random turns."""
    while turns and length(tok, instruct_first_message(text, turns)) > config.context:
        turns = turns[:-1]
    if not turns:
        return []
    # An instruction that stood alone is a message of its own: its question is empty.
    as_system = turns[0][0] != "" and rng.random() < config.system
    ends = {len(turns)}
    for _ in range(config.beginnings):
        ends.add(rng.randint(1, len(turns)))
    beginnings = [turns[:end] for end in sorted(ends)]
    return [{"messages": instruct_first_message(text, part, as_system)} for part in beginnings]


def main(config: Settings):
    """Write the dialogues, unless the file exists."""
    check_settings(
        config,
        may_be_zero=("temperature", "beginnings", "system", "alone"),
        at_most_one=("system", "alone"),
    )
    device, rank, _ = setup(config.device)
    files = data_paths(config.data) + data_paths(config.instructions)
    output = Output(config.out, config, files + checkpoint_files(config.chat))
    if output.exists:
        return print0(f"{config.out} exists already")
    model, tok = load(config.chat, device, config.dtype, Transformer)

    def parse(record):
        messages = to_messages(record)
        encode_dialog(tok, messages)  # raises ValueError if a message has a tag
        user_texts = [message["content"] for message in messages if message["role"] == "user"]
        return user_texts[: config.turns]

    available = read_instructions(config.instructions, tok, config.skip_bad)
    unchecked = sum(not instruction["obeyed_if"] for instruction in available)
    if unchecked:
        print0(
            f'{unchecked:,} instructions have no "obeyed_if": answers that disobey them are kept'
        )
    questions = read_and_count(config.data, parse, config.skip_bad, "dialogue")
    short = sum(len(of_one) == 1 for of_one in questions)
    if short:
        print0(
            f"{short:,} of {len(questions):,} dialogues have one question: they do not teach to "
            "keep to the instruction of an earlier message"
        )
    rng = random.Random(f"instructions {config.seed}")
    instructions = [combine_instructions(rng, available) for _ in questions]
    for of_one in questions:
        if rng.random() < config.alone:
            of_one.insert(0, "")  # the model answers the instruction itself
            del of_one[config.turns :]
    context = model.args.max_seq_len
    both = list(zip(questions, instructions))
    kept = [(of_one, its) for of_one, its in both if fits(tok, of_one, its[0], context)]
    if len(kept) < len(both):
        print0(
            f"{len(both) - len(kept):,} dialogues left out: a message with its instruction is "
            f"longer than the context of {context} tokens"
        )
    if not kept:
        raise ValueError(f"no dialogue of {', '.join(config.data)} fits the context of {context}")
    questions, instructions = zip(*kept)

    seed = derive_seed(config.seed, "ghost attention", rank)  # each process has its own part
    dialogs, disobeyed = sample_dialogs(
        model, tok, local_part(questions), local_part(instructions), seed, config, output.sampler
    )
    dialogs, disobeyed = all_gather(dialogs), sum(all_gather([disobeyed]))
    records = []
    for turns, (text, _) in zip(dialogs, instructions):
        records += to_records(tok, turns, text, rng, config)
    if not records:
        raise ValueError(
            f"no answer of {config.chat} obeys its instruction: first teach it instructions in the "
            f"same message, with python train_sft.py --no-pack --init {config.chat} --data "
            "instructed.jsonl --out FOLDER"
        )
    sampled = sum(len(of_one) for of_one in questions)
    if is_main():
        output.made_of["figures"] = {
            "sampled": sampled,
            "disobeyed": disobeyed,
            "records": len(records),
        }
        output.write(write_records, records)
    print0(
        f"{sampled:,} answers sampled under instructions, {disobeyed:,} of them removed for "
        f"disobeying; {len(records):,} dialogues in {config.out}"
    )


if __name__ == "__main__":
    run_script(main, Settings, {})
