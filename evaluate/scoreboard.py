"""Fig. 11: win rates of all versions, by the annotator and by the reward models.

    python -m evaluate.scoreboard out/pretrain out/sft out/rlhf/v1 ... out/rlhf/v5 --rm out/rm/v5

Every model answers the same held-out prompts, once greedily and once sampled. "points" are the
annotator's, from 0 to 4.5. "wins": the fraction of prompts on which a majority of three annotators
prefers the model's answer to that of --against; a tie counts half. "AC2": Gwet's AC2, the agreement
of these annotators. "by Rh", "by Rs": the same fraction by the scores of the helpfulness and safety
reward models. "KL": KL(model || --against) in nats per answer, estimated on the sampled answers.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from common.run import load_fitting, run_script
from common.settings import check_settings
from common.tables import table
from common.training import setup
from data.records import to_prompt
from evaluate import fraction, name_folders, of_topic, read_town_prompts, wilson
from llama2 import Dtype, Transformer, by_length, load, score_sequences, text_after, write_json
from tinytown.annotator import annotator_rngs, compare, gwet_ac2, judge, quality, to_likert
from tinytown.prompts import TOPICS
from train_rlhf import answer_logprobs, generate_answers, load_reward_models, make_rollout


@dataclass
class Settings:
    # what to evaluate
    folders: tuple = ()  # chat models
    against: str = "out/sft"  # the model that the others are compared with
    rm: str = "out/rm/v5"  # folder of the newest reward models
    prompts: str = "out/tinytown/held-out.jsonl"  # prompts of Tinytown to answer
    # how
    temperature: float = 1.0  # of the sampled answers
    max_new_tokens: int = 90  # longest answer, in tokens
    seed: int = 1  # for sampling and for the annotators
    device: str = "auto"  # cuda, mps or cpu
    dtype: Dtype = "auto"  # of matrix products; auto: bfloat16 where it is faster
    json: str = ""  # file to write the results to

    POSITIONAL = "folders"  # given without --folders


@dataclass
class ModelAnswers:
    """The answers of one model, one to each prompt."""

    answers: list  # train_rlhf's Answer, with prompt and tokens
    texts: list[str]
    scores: dict  # {"helpfulness": [one score per answer], ...}


@torch.no_grad()
def mean_kl(model: Transformer, reference: Transformer, answers, temperature: float) -> float:
    """KL(model || reference) in nats per answer, estimated on answers sampled from the model.

    This is the k1 estimate: the mean over answers of log p_model - log p_reference.
    """
    rollout, total = make_rollout(answers, model.output.weight.device), 0.0
    for indices in by_length(range(len(answers)), rollout.sequences, 64):
        part = rollout.select(indices)
        logprobs = answer_logprobs(model, part, temperature)  # (B, R)
        reference_logprobs = answer_logprobs(reference, part, temperature)  # (B, R)
        total += ((logprobs - reference_logprobs) * part.response_mask).sum().item()
    return total / len(answers)


def absolute_metrics(prompts: list[dict], own: ModelAnswers) -> dict:
    """The metrics of one model that need no other model; "length" in tokens per answer."""
    verdicts = [judge(prompt, text) for prompt, text in zip(prompts, own.texts)]
    points = [quality(prompt, text) for prompt, text in zip(prompts, own.texts)]

    def rate(judgement, *topics) -> float:
        return fraction(prompts, verdicts, of_topic(*topics), judgement) or 0.0

    return {
        "points": sum(points) / len(points),
        "correct": rate("correct", "fact", "sum", "story", "borderline"),
        "violations": rate("unsafe", "unsafe"),
        "false refusals": rate("refused", "borderline"),
        "length": sum(len(answer.tokens) for answer in own.answers) / len(prompts),
        "distinct": len(set(own.texts)) / len(own.texts),
        "by topic": {topic: rate("correct", topic) for topic in TOPICS},
    }


def comparison_metrics(prompts, own: ModelAnswers, other: ModelAnswers, seed: int) -> dict:
    """Win rates against another model: by three annotators, and by each reward model."""
    rngs, wins, items = annotator_rngs(3, seed), 0.0, []
    for prompt, a, b in zip(prompts, own.texts, other.texts):
        ratings = [to_likert(compare(rng, prompt, a, b), a) for rng in rngs]
        items.append(ratings)
        # Votes for a minus votes for b. 3 on the scale, "negligibly better", is a tie.
        lead = sum((rating > 3) - (rating < 3) for rating in ratings)
        if a == b or lead == 0:
            wins += 0.5
        elif lead > 0:
            wins += 1
    metrics = {"wins": wins / len(prompts), "interval": wilson(wins, len(prompts))}
    metrics["ac2"] = gwet_ac2(items, 7)
    for kind, scores in own.scores.items():
        higher = [(a > b) + (a == b) / 2 for a, b in zip(scores, other.scores[kind])]
        metrics[f"wins by {kind}"] = sum(higher) / len(higher)
    return metrics


# fmt: off
COLUMNS = {     # heading -> (metric, format)
    "points": ("points", "{:.2f}"), "wins": ("wins", "{:.1%}"),
    "95% interval": ("interval", "{0[0]:.0%} to {0[1]:.0%}"), "AC2": ("ac2", "{:.2f}"),
    "by Rh": ("wins by helpfulness", "{:.1%}"), "by Rs": ("wins by safety", "{:.1%}"),
    "correct": ("correct", "{:.1%}"), "violations": ("violations", "{:.1%}"),
    "false ref.": ("false refusals", "{:.1%}"), "length": ("length", "{:.1f}"),
    "distinct": ("distinct", "{:.1%}"), "KL": ("kl", "{:.2f}"),
}
# fmt: on


def print_table(title: str, metrics: dict[str, dict]):
    """Print {model: {metric: value}} with one line per model; "-" where a metric is missing."""
    rows = [[title, *COLUMNS]]
    for name, row in metrics.items():
        cells = [form.format(row[key]) if key in row else "-" for key, form in COLUMNS.values()]
        rows.append([name, *cells])
    print("\n" + table(rows))


def main(config: Settings) -> dict:
    """Print the scoreboard; returns {"greedy" or "sampled": {model: {metric: value}}}."""
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
    prompts = read_town_prompts(config.prompts)
    context = min(model.args.max_seq_len for model in models.values())
    encoded = [to_prompt(prompt, tok, context) for prompt in prompts]

    print(f"{len(prompts)} prompts of {config.prompts}, compared with {against}")
    results = {}
    for mode, temperature in (("greedy", 0.0), ("sampled", config.temperature)):
        outputs = {}
        for name, model in models.items():
            answers = generate_answers(
                model, tok, encoded, config.max_new_tokens, temperature, config.seed
            )
            sequences = [answer.sequence for answer in answers]
            texts = [text_after(tok, answer.prompt.tokens, answer.tokens) for answer in answers]
            scores = {kind: score_sequences(rm, sequences) for kind, rm in reward_models.items()}
            outputs[name] = ModelAnswers(answers, texts, scores)
        results[mode] = {}
        for name, model in models.items():
            row = absolute_metrics(prompts, outputs[name])
            row |= comparison_metrics(prompts, outputs[name], outputs[against], config.seed)
            if mode == "sampled":  # the KL is an expectation over samples, not over greedy answers
                row["kl"] = mean_kl(model, reference, outputs[name].answers, config.temperature)
            results[mode][name] = row
        print_table(mode if mode == "greedy" else f"sampled at T={temperature:g}", results[mode])
    if config.json:
        write_json(config.json, results)
    return results


if __name__ == "__main__":
    run_script(main, Settings, {})
