"""Fig. 11: who wins, version by version, by the truth and by the reward models.

    python -m evaluate.scoreboard out/pretrain out/sft out/rlhf/v1 ... out/rlhf/v5 --rm out/rm/v5

Every model answers the same prompts, which no training asks. Points are the annotator's, from 0 to
4.5. A win is one against the answer of --against to the same prompt, by the majority of three
annotators, ties half; AC2 is how much they agree. By Rh, by Rs: how often the reward models score
the answer higher than that of --against. KL: to --against, in nats a sampled answer.
"""
from dataclasses import dataclass
from pathlib import Path

import torch

from common.run import load_fitting, run_script
from common.settings import check_settings
from common.training import setup
from data.records import to_prompt
from evaluate import name_folders, read_truths, wilson
from llama2 import Dtype, Transformer, by_length, load, score_sequences, text_after, write_json
from tinytown.annotator import annotators, compare, gwet_ac2, judge, on_scale, quality
from tinytown.prompts import TOPICS
from train_rlhf import answer_logprobs, generate_answers, load_reward_models, make_rollout


@dataclass
class Settings:
    # what is examined
    folders: tuple = ()         # of chat models
    against: str = "out/sft"    # the model that the others are compared with
    rm: str = "out/rm/v5"       # reward models: the newest
    prompts: str = "out/tinytown/held-out.jsonl"        # prompts of Tinytown
    # how
    temperature: float = 1.0    # of the sampled answers
    max_new_tokens: int = 90    # of an answer
    seed: int = 1               # of the sampling and the annotators
    device: str = "auto"        # cuda, mps or cpu
    dtype: Dtype = "auto"       # of matrix products; auto: bfloat16 where it is faster
    json: str = ""              # file to write the figures to

    POSITIONAL = "folders"      # given without --folders


@dataclass
class Answered:
    """What one model said to all prompts."""
    answers: list           # as train_rlhf.py has them
    texts: list[str]
    scores: dict            # {"helpfulness": [a score an answer], ...}


@torch.no_grad()
def kl_between(model, reference, answers, temperature: float) -> float:
    """KL of two models on the first one's answers, in nats an answer."""
    rollout, total = make_rollout(answers, model.output.weight.device), 0.0
    for indices in by_length(range(len(answers)), rollout.sequences, 64):
        part = rollout.select(indices)
        logprobs = answer_logprobs(model, part, temperature)                    # (B, R)
        others = answer_logprobs(reference, part, temperature)                  # (B, R)
        total += ((logprobs - others) * part.response_mask).sum().item()
    return total / len(answers)


def share(truths, verdicts, topics, judgement: str, counted: bool = True) -> float:
    values = [verdict[judgement] is counted for asked, verdict in zip(truths, verdicts)
              if asked["topic"] in topics]
    return sum(values) / max(1, len(values))


def by_truth(truths, said: Answered) -> dict:
    """A model's figures that need no comparison."""
    verdicts = [judge(asked, text) for asked, text in zip(truths, said.texts)]
    points = [quality(asked, text) for asked, text in zip(truths, said.texts)]
    return {
        "points": sum(points) / len(points),
        "correct": share(truths, verdicts, ("fact", "sum", "story", "borderline"), "correct"),
        "violations": share(truths, verdicts, ("unsafe",), "safe", False),
        "false refusals": share(truths, verdicts, ("borderline",), "refused"),
        "length": sum(len(answer.tokens) for answer in said.answers) / len(truths),
        "distinct": len(set(said.texts)) / len(said.texts),
        "by topic": {topic: share(truths, verdicts, (topic,), "correct") for topic in TOPICS}}


def compared(truths, said: Answered, other: Answered, seed: int) -> dict:
    """Wins by three annotators' majority, how they agree, and wins by the reward models."""
    judges, wins, items = annotators(3, seed), 0.0, []
    for asked, a, b in zip(truths, said.texts, other.texts):
        votes = [on_scale(compare(rng, asked, a, b), a) for rng in judges]
        items.append(votes)
        lead = sum((vote > 3) - (vote < 3) for vote in votes)       # 3: negligibly better, a tie
        if a == b or lead == 0:
            wins += 0.5
        elif lead > 0:
            wins += 1
    found = {"wins": wins / len(truths), "interval": wilson(wins, len(truths)),
             "ac2": gwet_ac2(items, 7)}
    for kind, scores in said.scores.items():
        higher = [(a > b) + (a == b) / 2 for a, b in zip(scores, other.scores[kind])]
        found[f"wins by {kind}"] = sum(higher) / len(higher)
    return found


COLUMNS = [     # heading, figure, how it is written, width
    ("of 4.5 pts", "points", "{:.2f}", 11), ("wins", "wins", "{:.1%}", 8),
    ("95% interval", "interval", "{0[0]:.0%} to {0[1]:.0%}", 14), ("AC2", "ac2", "{:.2f}", 6),
    ("by Rh", "wins by helpfulness", "{:.1%}", 8), ("by Rs", "wins by safety", "{:.1%}", 8),
    ("correct", "correct", "{:.1%}", 9), ("violations", "violations", "{:.1%}", 12),
    ("false ref.", "false refusals", "{:.1%}", 12), ("length", "length", "{:.1f}", 8),
    ("distinct", "distinct", "{:.1%}", 10), ("KL", "kl", "{:.2f}", 8)]


def print_table(title: str, rows: dict[str, dict]):
    print(f"\n{title:<17}" + "".join(f"{heading:>{width}}" for heading, _, _, width in COLUMNS))
    for name, row in rows.items():
        cells = ""
        for _, figure, form, width in COLUMNS:
            cell = form.format(row[figure]) if figure in row else "-"
            cells += f"{cell:>{width}}"
        print(f"{name:<17}{cells}")


def main(config: Settings) -> dict:
    """Print the scoreboard; returns {"greedy" or "sampled": {model: figures}}."""
    check_settings(config)
    device, _, _ = setup(config.device)
    reference, tok = load(config.against, device, config.dtype, Transformer)
    reward_models = load_reward_models(config.rm, reference, tok, config.against)
    models = {}
    for name, folder in name_folders([*config.folders, config.against]).items():
        if folder == Path(config.against):
            models[name], against = reference, name
        else:
            models[name] = load_fitting(folder, Transformer, reference, tok, config.against)
    truths = read_truths(config.prompts)
    context = min(model.args.max_seq_len for model in models.values())
    prompts = [to_prompt(asked, tok, context) for asked in truths]

    print(f"{len(truths)} prompts of {config.prompts}, compared with {against}")
    found = {}
    for mode, temperature in (("greedy", 0.0), ("sampled", config.temperature)):
        said = {}
        for name, model in models.items():
            answers = generate_answers(model, tok, prompts, config.max_new_tokens, temperature,
                                       config.seed)
            sequences = [answer.sequence for answer in answers]
            texts = [text_after(tok, answer.prompt.tokens, answer.tokens) for answer in answers]
            scores = {kind: score_sequences(rm, sequences) for kind, rm in reward_models.items()}
            said[name] = Answered(answers, texts, scores)
        found[mode] = {}
        for name, model in models.items():
            row = by_truth(truths, said[name])
            row |= compared(truths, said[name], said[against], config.seed)
            if mode == "sampled":       # of greedy answers it would be no expectation
                row["kl"] = kl_between(model, reference, said[name].answers, config.temperature)
            found[mode][name] = row
        print_table(mode if mode == "greedy" else f"sampled at T={temperature:g}", found[mode])
    if config.json:
        write_json(config.json, found)
    return found


if __name__ == "__main__":
    run_script(main, Settings, {})
