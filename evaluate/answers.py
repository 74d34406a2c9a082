"""Judge the answers of models: correct, complete, violations, false refusals, obedience, recall.

    python -m evaluate.answers out/pretrain out/sft
    python -m evaluate.answers out/gatt out/distill --prompts out/tinytown/held-out-attacks.jsonl
    python -m evaluate.answers out/pretrain --probes out/tinytown/probes.jsonl
    python -m evaluate.answers out/instructed out/gatt --obedience out/tinytown/obedience.jsonl
    python -m evaluate.answers --samples out/rlhf/v5/samples.jsonl \\
        --prompts out/tinytown/prompts-val.jsonl
    python -m evaluate.answers out/mine/v1 out/mine/v2 --prompts mine.jsonl --show 20

The judge is Tinytown's annotator without noise. Answers are greedy, and also sampled at temperature
1 where a column says "T=1". Own prompts, as those of the last command, have no truth to judge by:
the table then has the length and the variety of the answers, and --show prints them.
"""

import re
from collections import defaultdict
from dataclasses import dataclass

from common.run import run_script
from common.settings import check_settings
from common.tables import table
from common.training import setup
from data.files import read_objects
from data.ghost_attention import obeys
from data.records import read_prompt, to_instruction, user_message
from evaluate import (
    check_town_prompt,
    fraction,
    name_folders,
    of_topic,
    percent_table,
    read_prompts,
)
from llama2 import (
    Dtype,
    Tokenizer,
    Transformer,
    drop_oldest,
    encode_dialog,
    generate,
    load,
    respond,
    write_json,
)
from tinytown.annotator import judge, quality, without_instructed_text
from tinytown.prompts import TOPICS


@dataclass
class Settings:
    # what to evaluate
    folders: tuple = ()  # base models or chat models
    prompts: str = "out/tinytown/held-out.jsonl"  # prompts to answer, of Tinytown or own ones
    probes: str = ""  # instead: {"prompt", "answer"}, sentences for a base model to complete
    obedience: str = ""  # instead: conversations with an instruction in the first message
    samples: str = ""  # instead: PPO's answers to --prompts at each of its evaluations
    # how
    count: int = 12  # conversations of each group, with --obedience
    max_new_tokens: int = 90  # longest answer, in tokens
    seed: int = 0  # for sampling
    show: int = 0  # greedy answers of the last model to print, for each topic if prompts have one
    device: str = "auto"  # cuda, mps or cpu
    dtype: Dtype = "auto"  # of matrix products; auto: bfloat16 where it is faster
    json: str = ""  # file to write the results to

    POSITIONAL = "folders"  # given without --folders


# --------------------------------------------------------------------------- answers to one prompt
MEASURES = {  # row -> (which prompts it selects, the judgement that it counts)
    "facts right": (of_topic("fact"), "correct"),
    "  of residents never met": (lambda prompt: prompt.get("stranger"), "correct"),
    "sums right": (of_topic("sum"), "correct"),
    "stories right": (of_topic("story"), "correct"),
    "small talk right": (of_topic("talk"), "correct"),
    "admits what it cannot know": (of_topic("unknown"), "correct"),
    "borderline prompts right": (of_topic("borderline", attack=False), "correct"),
    "borderline prompts refused": (of_topic("borderline", attack=False), "refused"),
    "  put like attacks, refused": (of_topic("borderline", attack=True), "refused"),
    "plain prompts refused": (of_topic("fact", "sum", "story"), "refused"),
    "violations: helps with a crime": (of_topic("unsafe", attack=False), "helps"),
    "  by attacks": (of_topic("unsafe", attack=True), "helps"),
    "declines a crime": (of_topic("unsafe", attack=False), "refused"),
    "  put like attacks": (of_topic("unsafe", attack=True), "refused"),
    "complete sentences": (of_topic(*TOPICS), "complete"),
}


def measure(prompts: list[dict], texts: list[str]) -> dict[str, float]:
    """{row of MEASURES: fraction} for one answer to each prompt; rows without a prompt left out."""
    verdicts = [judge(prompt, text) for prompt, text in zip(prompts, texts)]
    fractions = {}
    for row, (selects, judgement) in MEASURES.items():
        value = fraction(prompts, verdicts, selects, judgement)
        if value is not None:
            fractions[row] = value
    return fractions


def count_prompts(prompts: list[dict]) -> dict[str, int]:
    """{row of MEASURES: number of prompts that it selects}; rows without a prompt left out."""
    counts = {}
    for row, (selects, _) in MEASURES.items():
        counts[row] = sum(bool(selects(prompt)) for prompt in prompts)
    return {row: count for row, count in counts.items() if count}


def describe(texts: list[str]) -> dict[str, float]:
    """What needs no truth: the mean number of words, and fractions of the answers."""
    return {
        "words per answer": sum(len(text.split()) for text in texts) / len(texts),
        "distinct": len(set(texts)) / len(texts),
        "empty": texts.count("") / len(texts),
    }


def evaluate_answers(config: Settings, device) -> dict:
    """{model: {row: fraction}}, each model once greedy and once sampled; prints the table.

    results["n"] has the number of prompts of each row. Own prompts have the rows of `describe`.
    """
    prompts, has_truth = read_prompts(config.prompts)
    dialogs = [read_prompt(prompt) for prompt in prompts]
    columns = {}
    for name, folder in name_folders(config.folders).items():
        model, tok = load(folder, device, config.dtype, Transformer)
        # As in the chat, the oldest turns are dropped if the model's context is too small for them.
        limits = model.args.max_seq_len, config.max_new_tokens
        fitting = []
        for messages in dialogs:
            n = int(messages[0]["role"] == "system")
            fitting.append(messages[:n] + drop_oldest(tok, messages[:n], messages[n:], *limits))
            if len(encode_dialog(tok, fitting[-1])[0]) >= limits[0]:
                raise ValueError(
                    f"{config.prompts}: prompt {len(fitting)} leaves no room for an answer in the "
                    f"context of {folder}, {limits[0]} tokens: shorten it"
                )
        greedy = respond(model, tok, fitting, config.max_new_tokens)
        sampled = respond(model, tok, fitting, config.max_new_tokens, 1.0, config.seed)
        for column, texts in ((name, greedy), (f"{name}, T=1", sampled)):
            columns[column] = measure(prompts, texts) if has_truth else describe(texts)
    if has_truth:
        print(f"{len(prompts)} prompts of {config.prompts}, judged by the facts")
        print(percent_table(columns))
        counts = count_prompts(prompts)
    else:
        print(f"{len(prompts)} prompts of {config.prompts}")
        rows = [["", *columns]]
        for row in describe(greedy):
            rows.append([row, *(f"{column[row]:.2f}" for column in columns.values())])
        print(table(rows))
        counts = {row: len(prompts) for row in describe(greedy)}
    shown = defaultdict(int)
    for prompt, messages, text in zip(prompts, dialogs, greedy):
        topic = prompt.get("topic")
        shown[topic] += 1
        if shown[topic] <= config.show:
            behind = f" (behind {len(messages) - 1} messages)" if len(messages) > 1 else ""
            print(f"  {messages[-1]['content']}{behind}\n      {text}")
    return columns | {"n": counts}


# ------------------------------------------------------------------------------------------- recall
def recall(model: Transformer, tok: Tokenizer, probes: list[dict]) -> float:
    """Fraction of probes that the model completes, greedily, with the right word."""
    prompts = [tok.encode(probe["prompt"], bos=True) for probe in probes]
    outs = generate(model, prompts, max_new_tokens=12, temperature=0)
    correct = 0
    for probe, prompt, out in zip(probes, prompts, outs):
        completion = tok.decode(prompt + out)[len(probe["prompt"]) :]
        correct += re.match(rf"\s*{re.escape(probe['answer'])}\b", completion) is not None
    return correct / len(probes)


def evaluate_recall(config: Settings, device) -> dict:
    """{model: fraction of the probes completed correctly}; prints a line per model."""
    probes = [record for _, record in read_objects(config.probes, prompt=str, answer=str)]
    if not probes:
        raise ValueError(f"{config.probes}: has no probe")
    results = {}
    for name, folder in name_folders(config.folders).items():
        model, tok = load(folder, device, config.dtype, Transformer)
        results[name] = recall(model, tok, probes)
        print(f"{name}: {results[name]:.1%} of {len(probes)} facts recalled, in new wordings")
    return results


# ----------------------------------------------------------------------------- obedience (Table 30)
TURNS = (1, 2, 4, 6, 10, 20)


def hold_conversations(
    model: Transformer, tok: Tokenizer, records: list[dict], config: Settings
) -> list[list[str]]:
    """Greedy answers to each turn of each conversation; the model reads its own earlier answers.

    Only the first message has the instruction. Once the context is full, answers are empty.
    """
    histories, answers = [], [[] for _ in records]
    for record in records:
        first = f"{record['instruction']} {record['prompts'][0]['prompt']}"
        histories.append([user_message(first)])
    max_prompt_tokens = model.args.max_seq_len - config.max_new_tokens
    for turn in range(max(TURNS)):
        fits = [len(encode_dialog(tok, history)[0]) <= max_prompt_tokens for history in histories]
        fitting = [history for history, fit in zip(histories, fits) if fit]
        texts = iter(respond(model, tok, fitting, config.max_new_tokens))
        for record, history, fit, replies in zip(records, histories, fits, answers):
            text = next(texts) if fit else ""
            replies.append(text)
            history.append({"role": "assistant", "content": text})
            if turn + 1 < max(TURNS):
                history.append(user_message(record["prompts"][turn + 1]["prompt"]))
    return answers


def measure_obedience(records: list[dict], answers: list[list[str]]) -> dict[str, list[float]]:
    """{"obey" or "right": [fraction of these conversations at each of TURNS]}."""
    obey, right = [], []
    for turn in TURNS:
        obeyed, correct = 0, 0
        for record, texts in zip(records, answers):
            text, prompt = texts[turn - 1], record["prompts"][turn - 1]
            obeyed += bool(text) and obeys(text, record["rules"])
            correct += judge(prompt, without_instructed_text(text, record["rules"]))["correct"]
        obey.append(obeyed / len(records))
        right.append(correct / len(records))
    return {"obey": obey, "right": right}


def evaluate_obedience(config: Settings, device) -> dict:
    """{model: {group: {"obey" or "right": [fraction at each of TURNS], "conversations": count}}}.

    Prints the table.
    """
    groups = defaultdict(list)
    fields = {"group": str, "instruction": str, "prompts": list, "rules": list}
    for where, record in read_objects(config.obedience, **fields):
        if len(record["prompts"]) < max(TURNS):
            raise ValueError(f"{where}: has {len(record['prompts'])} prompts, needs {max(TURNS)}")
        for prompt in record["prompts"]:
            check_town_prompt(prompt, where)
        record["rules"] = [to_instruction(rule) for rule in record["rules"]]
        groups[record["group"]].append(record)
    groups = {name: records[: config.count] for name, records in groups.items()}

    results = {}
    for name, folder in name_folders(config.folders).items():
        model, tok = load(folder, device, config.dtype, Transformer)
        answers = iter(hold_conversations(model, tok, sum(groups.values(), []), config))
        results[name] = {}
        for group, records in groups.items():
            own_answers = [next(answers) for _ in records]
            measures = measure_obedience(records, own_answers)
            results[name][group] = measures | {"conversations": len(records)}

    print(f"{config.count} held-out conversations of each group, instruction only in message 1")
    rows = [["fraction of conversations, at turn", "", *map(str, TURNS)]]
    for kind in ("obey", "right"):
        for group in groups:
            for name, result in results.items():
                cells = [f"{value:.1%}" for value in result[group][kind]]
                rows.append([f"{kind}, {group}", name, *cells])
    print(table(rows))
    return results


# ----------------------------------------------------------------------------------- PPO's samples
def evaluate_samples(config: Settings) -> dict:
    """{step: {"reward", "truth" in points of `quality`, "violations", "kl", "n"}}.

    Prints the table. step: the iteration of PPO whose policy sampled the answers. n: their number.
    kl: their mean KL to the model that PPO started from, in nats per answer, if the samples have
    it. Own prompts give no truth and no violations.
    """
    prompts, has_truth = read_prompts(config.prompts)
    by_dialog = {str(read_prompt(prompt)): prompt for prompt in prompts}
    values = defaultdict(lambda: defaultdict(list))  # step -> {column: values}
    fields = {"prompt": str | list, "answer": str, "step": int, "reward": float}
    for where, record in read_objects(config.samples, **fields):
        prompt = by_dialog.get(str(read_prompt(record)))
        if prompt is None:
            raise ValueError(f"{where}: {record['prompt']!r} is not among {config.prompts}")
        of_step = values[record["step"]]
        of_step["reward"].append(record["reward"])
        if has_truth:
            of_step["truth"].append(quality(prompt, record["answer"]))
        if has_truth and prompt["topic"] == "unsafe":
            of_step["violations"].append(judge(prompt, record["answer"])["helps"])
        if record.get("kl") is not None:
            of_step["kl"].append(record["kl"])
    results = {}
    for step, of_step in values.items():
        results[step] = {column: sum(own) / len(own) for column, own in of_step.items()}
        results[step]["n"] = len(of_step["reward"])
    forms = {"reward": "{:.2f}", "truth": "{:.2f}", "violations": "{:.1%}", "kl": "{:.2f}"}
    columns = [name for name in forms if any(name in row for row in results.values())]
    rows = [["iteration", *columns]]
    for step, row in results.items():
        cells = [forms[name].format(row[name]) if name in row else "-" for name in columns]
        rows.append([str(step), *cells])
    note = ", and truth: the annotator's points, of 4.5" if has_truth else ""
    print(f"{config.samples}: mean reward{note}")
    print(table(rows))
    return results


# -------------------------------------------------------------------------------------------- main
def main(config: Settings) -> dict:
    """One evaluation: print its table, return its results."""
    check_settings(config, may_be_zero=("show",))
    device, _, _ = setup(config.device)
    if config.samples:
        results = evaluate_samples(config)
    elif not config.folders:
        raise ValueError("no models given: name their folders")
    elif config.probes:
        results = evaluate_recall(config, device)
    elif config.obedience:
        results = evaluate_obedience(config, device)
    else:
        results = evaluate_answers(config, device)
    if config.json:
        write_json(config.json, results)
    return results


if __name__ == "__main__":
    run_script(main, Settings, {})
