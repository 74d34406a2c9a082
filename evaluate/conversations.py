"""Ordinary conversations of eight turns: is the last answer as good as the first?

    python -m evaluate.conversations out/sft out/rlhf/v5 out/gatt --rm out/rm/v5/helpfulness

The model reads its own earlier answers; when the context is full, the oldest turns are dropped, as
in the chat. Some conversations ask what the dialogues of fine-tuning ask, the others what no
training asks. In a third group the second message gives an instruction ("Always answer as the
fox.") and the fifth takes it back; in the others nobody gives one. Every turn has the same
contents, so the turns can be compared. For each group and turn: the fraction of correct answers.
Over all turns: answers in a role that no instruction in force asks for ("The fox says: ..."),
answers that obey the one in force, and repeats: wrong answers with the text of an earlier answer in
the same conversation. Beside them: the mean score of a reward model for correct answers by turn,
which should not fall.
"""

import re
from collections import defaultdict
from dataclasses import dataclass

from common.run import load_fitting, run_script
from common.settings import check_settings
from common.tables import table
from common.training import setup
from data.files import read_objects
from data.ghost_attention import obeys
from data.records import assistant_message, user_message
from evaluate import check_town_prompt, name_folders, wilson
from llama2 import (
    Dtype,
    RewardModel,
    Tokenizer,
    Transformer,
    drop_oldest,
    load,
    respond,
    score_dialogs,
    write_json,
)
from tinytown.annotator import judge, without_instructed_text
from tinytown.conversations import INSTRUCTIONS


@dataclass
class Settings:
    # what is evaluated
    folders: tuple = ()  # of chat models
    conversations: str = "out/tinytown/conversations.jsonl"  # {"group", "prompts"}, one per line
    rm: str = ""  # a helpfulness model, to score the correct answers
    # how
    temperatures: tuple = (0.0, 0.8)  # 0: greedy; above 0 with top-p 0.95, as the chat samples
    max_new_tokens: int = 90  # longest answer, in tokens
    seed: int = 1  # for sampling
    device: str = "auto"  # cuda, mps or cpu
    dtype: Dtype = "auto"  # of matrix products; auto: bfloat16 where it is faster
    json: str = ""  # file to write the results to

    POSITIONAL = "folders"  # given without --folders


# Every kind of instruction has a rule, such as "The {v} says: ?", with a word in place of {v}.
ROLE = re.compile("|".join(rule.replace("{v}", r"\w+") for *_, rule in INSTRUCTIONS.values()))


@dataclass
class Reply:
    """One answer in a conversation."""

    text: str
    correct: bool
    in_role: bool
    repeated: bool
    obeyed: bool | None  # the instruction in force; None without one
    score: float | None = None  # of a reward model, for a correct answer


def answer_turns(
    model: Transformer, tok: Tokenizer, records: list[dict], temperature: float, config: Settings
) -> tuple[list[list[Reply]], list[list[list[dict]]]]:
    """(replies[turn][conversation], the dialogues up to each of them)."""
    histories, replies, dialogs = [[] for _ in records], [], []
    for turn in range(len(records[0]["prompts"])):
        for i, record in enumerate(records):
            history = histories[i] + [user_message(record["prompts"][turn]["prompt"])]
            context = model.args.max_seq_len
            histories[i] = drop_oldest(tok, [], history, context, config.max_new_tokens)
        texts = respond(
            model,
            tok,
            histories,
            config.max_new_tokens,
            temperature,
            config.seed + turn,
            top_p=0.95 if temperature else 1.0,
        )
        replies.append([])
        for i, (record, text) in enumerate(zip(records, texts)):
            prompt = record["prompts"][turn]
            rules = prompt.get("rules", [])  # the instruction that is in force
            plain = without_instructed_text(text, rules)
            correct = judge(prompt, plain)["correct"]
            earlier = [reply[i].text for reply in replies[:-1]]
            repeated = not correct and text in earlier
            in_role, obeyed = bool(ROLE.match(plain)), obeys(text, rules) if rules else None
            replies[-1].append(Reply(text, correct, in_role, repeated, obeyed))
            histories[i] = histories[i] + [assistant_message(text or "...")]
        dialogs.append(list(histories))
    return replies, dialogs


def score_correct(
    reward_model: RewardModel, tok: Tokenizer, replies: list[list[Reply]], dialogs
) -> None:
    """Set the score of each correct reply."""
    for of_turn, its_dialogs in zip(replies, dialogs):
        correct = [i for i, reply in enumerate(of_turn) if reply.correct]
        scores = score_dialogs(reward_model, tok, [its_dialogs[i] for i in correct])
        for i, score in zip(correct, scores):
            of_turn[i].score = score


def measure(replies: list[list[Reply]], indices: list[int]) -> dict:
    """Metrics of the conversations with these indices: lists have one value per turn."""
    metrics = {"n": len(indices), "correct": [], "in role": [], "repeats": 0, "score": []}
    metrics["obeyed"] = []
    for of_turn in replies:
        own = [of_turn[i] for i in indices]
        metrics["correct"].append(sum(reply.correct for reply in own) / len(own))
        metrics["in role"].append(sum(reply.in_role for reply in own) / len(own))
        metrics["repeats"] += sum(reply.repeated for reply in own)
        instructed = [reply.obeyed for reply in own if reply.obeyed is not None]
        metrics["obeyed"].append(sum(instructed) / len(instructed) if instructed else None)
        scores = [reply.score for reply in own if reply.score is not None]
        metrics["score"].append(sum(scores) / len(scores) if scores else None)
    metrics["repeats"] /= len(indices) * len(replies)
    metrics["in role, all turns"] = sum(metrics["in role"]) / len(replies)
    obeyed = [value for value in metrics["obeyed"] if value is not None]
    metrics["obeyed, all turns"] = sum(obeyed) / len(obeyed) if obeyed else None
    return metrics


def in_role_after_stop(metrics: dict) -> float | None:
    """The fraction of answers in a role after the last turn with an instruction in force.

    None if there was no instruction, or if no turn is after it.
    """
    instructed = [turn for turn, value in enumerate(metrics["obeyed"]) if value is not None]
    after = metrics["in role"][instructed[-1] + 1 :] if instructed else []
    return sum(after) / len(after) if after else None


def print_tables(results: dict[str, dict[str, dict]], n_turns: int):
    """Print {model: {group: metrics}}: correct answers by turn, roles, repeats and scores."""
    turns = [str(turn + 1) for turn in range(n_turns)]
    columns = ["95% of the last", "in role", "after stop", "obeyed", "repeats"]
    rows = [["correct, at turn", "", *turns, *columns]]
    scores = [["score of correct answers, at turn", "", *turns]]
    for name, groups in results.items():
        for group, metrics in groups.items():
            last, n = metrics["correct"][-1], metrics["n"]
            low, high = wilson(last * n, n)
            cells = [f"{value:.0%}" for value in metrics["correct"]]
            obeyed, after_stop = metrics["obeyed, all turns"], in_role_after_stop(metrics)
            cells += [f"{low:.0%} to {high:.0%}", f"{metrics['in role, all turns']:.1%}"]
            cells += ["-" if after_stop is None else f"{after_stop:.1%}"]
            cells += ["-" if obeyed is None else f"{obeyed:.0%}", f"{metrics['repeats']:.1%}"]
            rows.append([group, name, *cells])
            if any(score is not None for score in metrics["score"]):
                cells = ["-" if score is None else f"{score:.2f}" for score in metrics["score"]]
                scores.append([group, name, *cells])
    print(table(rows))
    if len(scores) > 1:
        print("\n" + table(scores))


def read_conversations(path) -> list[dict]:
    """The conversations of a file, which must all have the same number of turns, or ValueError."""
    records = []
    for where, record in read_objects(path, group=str, prompts=list):
        for prompt in record["prompts"]:
            check_town_prompt(prompt, where)
            if not isinstance(prompt["prompt"], str):
                raise ValueError(f"{where}: expected prompts of one message, as text")
        if not record["prompts"]:
            raise ValueError(f"{where}: has no prompts")
        if records and len(record["prompts"]) != len(records[0]["prompts"]):
            raise ValueError(f"{where}: has another number of prompts than the first conversation")
        records.append(record)
    if not records:
        raise ValueError(f"{path}: has no conversation")
    return records


def main(config: Settings) -> dict:
    """Print the tables; returns {model: {group: metrics}}."""
    check_settings(config, may_be_zero=("temperatures",))
    device, _, _ = setup(config.device)
    if not config.folders:
        raise ValueError("no models given: name their folders")
    records = read_conversations(config.conversations)
    groups = defaultdict(list)
    for i, record in enumerate(records):
        groups[record["group"]].append(i)

    results = {}
    for name, folder in name_folders(config.folders).items():
        model, tok = load(folder, device, config.dtype, Transformer)
        if config.rm:
            reward_model = load_fitting(config.rm, RewardModel, model, tok, folder)
        for temperature in config.temperatures:
            replies, dialogs = answer_turns(model, tok, records, temperature, config)
            if config.rm:
                score_correct(reward_model, tok, replies, dialogs)
            row = name if temperature == 0 else f"{name}, T={temperature:g}"
            results[row] = {group: measure(replies, own) for group, own in groups.items()}
    n_turns = len(records[0]["prompts"])
    print(f"{len(records)} conversations of {config.conversations}")
    print_tables(results, n_turns)
    if config.json:
        write_json(config.json, results)
    return results


if __name__ == "__main__":
    run_script(main, Settings, {})
