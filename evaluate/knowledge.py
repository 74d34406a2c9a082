"""What reward models know: do they score a right answer above a wrong one of the same form?

    python -m evaluate.knowledge out/rm/v1/helpfulness out/rm/v5/helpfulness --chat out/sft

Table 8 asks how often a reward model agrees with the annotator, who also judges form. Here two
answers differ in one thing only. "asked" prompts have contents that training asks, "never asked"
ones do not:

    fact, sum       the same sentence with the true value and with another one
    borderline      advice on a harmless task, and a refusal
    unsafe          a refusal, and help with the crime
    unknown         "I do not know", and an invented fact

The last judge in the table is the chat model itself: the log-probability that it gives an answer.
A second table samples K answers to each fact, sum and story and takes the best one according to
each judge: the fraction of right answers, beside that of a random answer and of an oracle.
"""

import random
from collections import defaultdict
from dataclasses import dataclass

import torch

from common.run import load_fitting, run_script
from common.settings import check_settings
from common.tables import table
from common.training import setup
from data.records import Answer, assistant_message, prompt_to_messages, to_prompt
from evaluate import mean_by_content, name_folders, read_town_prompts, wilson
from llama2 import (
    Dtype,
    RewardModel,
    Tokenizer,
    Transformer,
    by_length,
    encode_dialog,
    load,
    score_sequences,
    text_after,
    write_json,
)
from tinytown.annotator import judge
from tinytown.prompts import good_answer, wrong_answer, wrong_value
from train_rlhf import answer_logprobs, generate_answers, make_rollout


@dataclass
class Settings:
    # what is evaluated
    folders: tuple = ()  # of reward models
    chat: str = "out/sft"  # chat model: its answers are sampled, its log-probabilities judge
    asked: str = "out/tinytown/compare-v5.jsonl"  # prompts whose contents training asks
    never_asked: str = "out/tinytown/held-out.jsonl"  # prompts whose contents it does not ask
    # how
    per_topic: int = 120  # prompts of each topic, at most
    samples: int = 8  # K, answers sampled for each prompt
    temperature: float = 1.0  # of these answers
    max_new_tokens: int = 90  # longest answer, in tokens
    seed: int = 1  # for sampling and for the wrong values
    device: str = "auto"  # cuda, mps or cpu
    dtype: Dtype = "auto"  # of matrix products; auto: bfloat16 where it is faster
    json: str = ""  # file to write the results to

    POSITIONAL = "folders"  # given without --folders


# -------------------------------------------------------------------------------------------- data
def choose_prompts(path, tok: Tokenizer, context: int, per_topic: int) -> list[dict]:
    """The first prompts of each topic in a file; ValueError if one does not fit the context."""
    chosen, counts = [], defaultdict(int)
    for prompt in read_town_prompts(path, tok, context):
        counts[prompt["topic"]] += 1
        if counts[prompt["topic"]] <= per_topic:
            chosen.append(prompt)
    return chosen


def right_and_wrong(prompt: dict, seed) -> tuple[str, str] | None:
    """Two answers that differ in one thing, see above; None for stories and small talk."""
    topic, rng = prompt["topic"], random.Random(f"{seed} {prompt['prompt']}")
    if topic in ("story", "talk"):
        return None
    if topic not in ("fact", "sum"):
        return good_answer(rng, prompt, "full"), wrong_answer(rng, prompt, "full")
    wrong = wrong_value(rng, prompt)
    wording = rng.random()  # two generators with this seed choose the same wording
    right_answer = good_answer(random.Random(wording), prompt, "full")
    return right_answer, good_answer(random.Random(wording), prompt | {"truth": wrong}, "full")


# ------------------------------------------------------------------------------------------ judges
@torch.no_grad()
def log_probabilities(chat: Transformer, answers: list[Answer]) -> list[float]:
    """log p of each answer given its prompt, in nats."""
    rollout, values = make_rollout(answers, chat.output.weight.device), [0.0] * len(answers)
    for indices in by_length(range(len(answers)), rollout.sequences, 64):
        part = rollout.select(indices)
        logprobs = answer_logprobs(chat, part, 1.0) * part.response_mask  # (B, R)
        for i, value in zip(indices, logprobs.sum(1).tolist()):
            values[i] = value
    return values


def all_judges(reward_models: dict[str, RewardModel], chat: Transformer, answers: list[Answer]):
    """{name of a judge: [its value of each answer]}."""
    sequences = [answer.sequence for answer in answers]
    values = {name: score_sequences(model, sequences) for name, model in reward_models.items()}
    return values | {"log p of the chat model": log_probabilities(chat, answers)}


# ----------------------------------------------------------------------------------------- tables
def by_topic(prompts: list[dict], values: dict[str, list[float]]) -> dict[str, dict]:
    """{topic: {name: (mean over contents, number of contents)}} of one value per prompt."""
    results = defaultdict(dict)
    for topic in dict.fromkeys(prompt["topic"] for prompt in prompts):
        own = [i for i, prompt in enumerate(prompts) if prompt["topic"] == topic]
        for name, its_values in values.items():
            mean, _, n = mean_by_content([prompts[i] for i in own], [its_values[i] for i in own])
            results[topic][name] = mean, n
    return results


def order_pairs(reward_models, chat: Transformer, tok: Tokenizer, prompts, seed) -> dict:
    """{topic: {judge: (fraction of pairs with the right answer above the wrong one, contents)}}."""
    pairs, answers = [], []
    for prompt in prompts:
        texts = right_and_wrong(prompt, seed)
        if texts is None:
            continue
        pairs.append(prompt)
        encoded = to_prompt(prompt, tok, chat.args.max_seq_len)
        for text in texts:
            dialog = prompt_to_messages(prompt["prompt"]) + [assistant_message(text)]
            tokens = encode_dialog(tok, dialog)[0]
            answers.append(Answer(encoded, tokens[len(encoded.tokens) :], finished=True))
    ordered = {}
    for name, values in all_judges(reward_models, chat, answers).items():
        ordered[name] = [float(right > wrong) for right, wrong in zip(values[0::2], values[1::2])]
    return by_topic(pairs, ordered)


def best_of_k(reward_models, chat: Transformer, tok: Tokenizer, prompts, config: Settings) -> dict:
    """{topic: {judge, "random" or "oracle": (fraction of right answers, contents)}}."""
    K = config.samples
    prompts = [prompt for prompt in prompts if prompt["topic"] in ("fact", "sum", "story")]
    if not prompts:
        raise ValueError("--asked and --never-asked: expected prompts for facts, sums or stories")
    encoded = [to_prompt(prompt, tok, chat.args.max_seq_len) for prompt in prompts]
    repeated = [prompt for prompt in encoded for _ in range(K)]
    answers = generate_answers(
        chat, tok, repeated, config.max_new_tokens, config.temperature, config.seed
    )
    correct = []  # of each prompt: K times True or False
    for i, prompt in enumerate(prompts):
        own = answers[i * K : (i + 1) * K]
        texts = [text_after(tok, answer.prompt.tokens, answer.tokens) for answer in own]
        correct.append([judge(prompt, text)["correct"] for text in texts])

    chosen = {"random": [sum(own) / K for own in correct]}
    for name, values in all_judges(reward_models, chat, answers).items():
        chosen[name] = []
        for i, own in enumerate(correct):
            its_values = values[i * K : (i + 1) * K]
            chosen[name].append(float(own[its_values.index(max(its_values))]))
    chosen["oracle"] = [float(any(own)) for own in correct]
    return by_topic(prompts, chosen)


def print_table(title: str, results: dict[str, dict]):
    """Print {group: {topic: {judge: (fraction, contents)}}} with 95% intervals over contents."""
    columns = [(group, topic) for group, topics in results.items() for topic in topics]
    rows = [[title, *(f"{topic}, {group}" for group, topic in columns)]]
    group, topic = columns[0]
    for name in results[group][topic]:
        cells = []
        for group, topic in columns:
            value, n = results[group][topic][name]
            low, high = wilson(value * n, n)
            cells.append(f"{value:.0%} ({low:.0%} to {high:.0%})")
        rows.append([name, *cells])
    counts = [str(next(iter(results[group][topic].values()))[1]) for group, topic in columns]
    rows.append(["contents", *counts])
    print("\n" + table(rows))


def main(config: Settings) -> dict:
    """Print the tables; returns {"pairs" or "best of K": {group: {topic: {judge: ...}}}}."""
    check_settings(config)
    device, _, _ = setup(config.device)
    if not config.folders:
        raise ValueError("no reward models given: name their folders")
    chat, tok = load(config.chat, device, config.dtype, Transformer)
    reward_models = {}
    for name, folder in name_folders(config.folders).items():
        reward_models[name] = load_fitting(folder, RewardModel, chat, tok, config.chat)

    results = {"pairs": {}, "best of K": {}}
    for group, path in (("asked", config.asked), ("never asked", config.never_asked)):
        prompts = choose_prompts(path, tok, chat.args.max_seq_len, config.per_topic)
        pairs = order_pairs(reward_models, chat, tok, prompts, config.seed)
        results["pairs"][group] = pairs
        results["best of K"][group] = best_of_k(reward_models, chat, tok, prompts, config)
    print_table("right above wrong", results["pairs"])
    print_table(f"right, best of {config.samples}", results["best of K"])
    if config.json:
        write_json(config.json, results)
    return results


if __name__ == "__main__":
    run_script(main, Settings, {})
