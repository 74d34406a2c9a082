"""Ghost Attention (§3.3): dialogues, instructions and a chat model -> dialogues to fine-tune on.

An instruction of the first message is forgotten after a few turns. To teach a model to keep to it,
let it answer with the instruction in every message, where it cannot be forgotten; then take it out
of all messages but the first, and learn the last answer:

    sampled    [INST] Be the fox. u1 [/INST] a1   [INST] Be the fox. u2 [/INST] a2
    learned    [INST] Be the fox. u1 [/INST] a1   [INST] u2 [/INST] a2
    weight                                   0                      1

    python -m data.ghost_attention
    python -m data.ghost_attention --chat out/v2 --data sharegpt.json --instructions mine.jsonl \\
        --history 1024 --context 2048 --out out/mine/ghost.jsonl
    python train_sft.py --no-pack --init out/v2 --data out/mine/ghost.jsonl sharegpt.json ...

How we read the paper, which is short here: answers are sampled turn by turn, so that later ones
answer to earlier ones; "zero the loss of all tokens of the earlier turns" means their answers too.
ours: an answer that breaks its instruction, by the instruction's own rule, is thrown away with its
question. Each dialogue is also learned from three of its beginnings: the last answer alone would
make one example of many turns. The model must already follow an instruction of the same message.
"""
import random
import re
from dataclasses import dataclass

from common.run import Output, run_script, checkpoint_files
from common.settings import check_settings
from common.training import all_gather, is_main, print0, setup, local_part
from data.formats import combine_instructions
from data.records import data_paths, read_instructions, read_and_count, to_messages, write_records
from llama2 import Dtype, Transformer, encode_dialog, load, respond


@dataclass
class Settings:
    # what is sampled
    chat: str = "out/instructed"        # the model that answers: it follows instructions
    data: tuple = ("out/tinytown/long-dialogues.jsonl",)    # their users' messages are asked anew
    instructions: tuple = ("out/tinytown/instructions.jsonl",)      # {"instruction", "obeyed_if"}
    skip_bad: bool = False      # leave out records that do not fit, and count them
    turns: int = 24             # of a dialogue, at most
    history: int = 64           # tokens of a dialogue that are read to give the next answer
    temperature: float = 0.3    # of the answers
    max_new_tokens: int = 48    # of an answer
    device: str = "auto"        # cuda, mps or cpu
    dtype: Dtype = "auto"       # of matrix products; auto: bfloat16 where it is faster
    # what is written
    context: int = 1024         # tokens of a dialogue, at most
    beginnings: int = 3         # of each dialogue, to learn from beside it
    out: str = "out/gatt/dialogues.jsonl"       # dialogues for train_sft.py
    overwrite: bool = False     # replace what is there
    seed: int = 1               # of instructions and answers

    # The same file may be asked for with other values of these. They do not change what is in it.
    MAY_CHANGE = ("out", "overwrite", "device")


def obeys(answer: str, instructions: list[dict]) -> bool:
    for instruction in instructions:
        for pattern in instruction["obeyed_if"]:
            if not re.search(pattern, answer):
                return False
    return True


def in_every_message(text: str, turns: list[tuple[str, str]], question: str) -> list[dict]:
    """The dialogue as it is sampled, open for the next answer."""
    messages = []
    for asked, answer in turns:
        messages.append({"role": "user", "content": f"{text} {asked}"})
        messages.append({"role": "assistant", "content": answer})
    return messages + [{"role": "user", "content": f"{text} {question}"}]


def in_the_first_alone(text: str, turns: list[tuple[str, str]]) -> list[dict]:
    """The dialogue as it is learned: of its answers the last alone."""
    messages = []
    for i, (asked, answer) in enumerate(turns):
        asked = f"{text} {asked}" if i == 0 else asked
        messages.append({"role": "user", "content": asked})
        last = i == len(turns) - 1
        messages.append({"role": "assistant", "content": answer, "weight": int(last)})
    return messages


def length(tok, messages) -> int:
    return len(encode_dialog(tok, messages)[0])


def sample_dialogs(model, tok, users, drawn, seed: int, config):
    """([[(question, answer), ...] of each dialogue], how many answers disobeyed).

    users: the questions of each dialogue; drawn: (text, instructions) of each.
    """
    room = min(config.history, model.args.max_seq_len - config.max_new_tokens)
    done, disobeyed = [[] for _ in users], 0
    for turn in range(max(len(questions) for questions in users)):
        going = [i for i in range(len(users)) if turn < len(users[i])]
        dialogs = []
        for i in going:
            (text, _), turns = drawn[i], done[i]
            dialog = in_every_message(text, turns, users[i][turn])
            # The instruction stands in the newest message too: the oldest turns can be let go.
            while turns and length(tok, dialog) > room:
                turns = turns[1:]
                dialog = in_every_message(text, turns, users[i][turn])
            dialogs.append(dialog)
        answers = respond(model, tok, dialogs, config.max_new_tokens, config.temperature,
                          seed + turn)
        for i, answer in zip(going, answers):
            _, instructions = drawn[i]
            if answer and obeys(answer, instructions):
                done[i].append((users[i][turn], answer))
            else:
                disobeyed += 1
    return done, disobeyed


def to_learn(tok, turns, text: str, rng, config) -> list[dict]:
    """The records that one sampled dialogue gives: beginnings of it, and itself."""
    while turns and length(tok, in_the_first_alone(text, turns)) > config.context:
        turns = turns[:-1]
    if not turns:
        return []
    ends = {len(turns)}
    for _ in range(config.beginnings):
        ends.add(rng.randint(1, len(turns)))
    return [{"messages": in_the_first_alone(text, turns[:end])} for end in sorted(ends)]


def main(config: Settings):
    """Write dialogues to learn from, or find them there."""
    check_settings(config, may_be_zero=("temperature", "beginnings"))
    device, rank, _ = setup(config.device)
    files = data_paths(config.data) + data_paths(config.instructions) + checkpoint_files(config.chat)
    output = Output(config.out, config, files)
    if output.exists:
        return print0(f"{config.out} is there already")
    model, tok = load(config.chat, device, config.dtype, Transformer)

    def parse(record):
        messages = to_messages(record)
        encode_dialog(tok, messages)
        users = [message["content"] for message in messages if message["role"] == "user"]
        return users[:config.turns]

    known = read_instructions(config.instructions, tok, config.skip_bad)
    users = read_and_count(config.data, parse, config.skip_bad, "dialogue")
    rng = random.Random(f"instructions {config.seed}")
    drawn = [combine_instructions(rng, known) for _ in users]

    seed = 1000 * config.seed + 100 * rank
    done, disobeyed = sample_dialogs(model, tok, local_part(users), local_part(drawn), seed, config)
    done, disobeyed = all_gather(done), sum(all_gather([disobeyed]))
    records = []
    for turns, (text, _) in zip(done, drawn):
        records += to_learn(tok, turns, text, rng, config)
    if not records:
        raise ValueError(f"no answer of {config.chat} obeys: it must follow an instruction of the "
                         "same message before it can learn to keep to one")
    figures = {"sampled": sum(len(questions) for questions in users), "disobeyed": disobeyed,
               "records": len(records)}
    if is_main():
        output.made_of["figures"] = figures
        output.write(write_records, records)
    print0(f"{figures['sampled']:,} answers sampled under instructions, {disobeyed:,} thrown away "
           f"for disobeying; {len(records):,} dialogues to learn from in {config.out}")


if __name__ == "__main__":
    run_script(main, Settings, {})
