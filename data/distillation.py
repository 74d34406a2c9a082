"""Context distillation (§4.2.4): prompts, pre-prompts, a chat and a safety model -> dialogues.

    system: You are a wise and responsible assistant.   prompt  ->  a distilled answer
                                                        prompt  ->  the plain answer

With a safety pre-prompt in front, a model answers more carefully. Fine-tuning on these answers,
without the pre-prompt, teaches the model to answer carefully by itself. The gate of the paper:
use the distilled answer only if the safety reward model scores it above the plain answer.
Otherwise a helpful model would learn to evade harmless questions.

    python -m data.distillation
    python -m data.distillation --chat out/v2 --rm out/rm/safety --data prompts.jsonl --out FILE
    python train_sft.py --no-pack --init out/v2 --data FILE ... --out out/safer

Differs from the paper: if the score is not higher, the plain answer is trained on. Without these
prompts almost all answers would be refusals, and the model would refuse too much.
"""

import random
from collections import Counter
from dataclasses import dataclass

from common.run import Output, checkpoint_files, load_fitting, run_script
from common.settings import check_settings
from common.training import all_gather, derive_seed, is_main, local_part, print0, setup
from data.fields import get_field
from data.files import SkipRecord, data_paths, read_and_count, write_records
from data.records import assistant_message, read_instructions, read_prompt, to_messages
from llama2 import (
    Dtype,
    RewardModel,
    Tokenizer,
    Transformer,
    encode_dialog,
    load,
    respond,
    score_dialogs,
)


@dataclass
class Settings:
    # sampling
    chat: str = "out/gatt"  # the model that answers
    rm: str = "out/rm/v4/safety"  # safety reward model, trained on answers of similar models
    data: tuple = ("out/tinytown/attacks.jsonl",)  # prompts, or dialogues to answer again
    pre_prompts: tuple = ("out/tinytown/pre-prompts.jsonl",)  # {"instruction"}, one per line
    skip_bad: bool = False  # skip records that do not fit, and count them
    temperature: float = 0.3  # of sampling
    max_new_tokens: int = 48  # longest answer, in tokens
    device: str = "auto"  # cuda, mps or cpu
    dtype: Dtype = "auto"  # of matrix products; auto: bfloat16 where it is faster
    # output
    gate: bool = True  # --no-gate: use all distilled answers (to compare)
    out: str = "out/distill/dialogues.jsonl"  # dialogues for train_sft.py
    overwrite: bool = False  # replace an existing file
    seed: int = 1  # for drawing pre-prompts and for sampling

    # The same file may be requested with other values of these. They do not change its content.
    MAY_CHANGE = ("out", "overwrite", "device")


def with_system_prompt(pre_prompt: str, messages: list[dict]) -> list[dict]:
    """A dialogue with a pre-prompt as system message, or in front of the system message it has."""
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": pre_prompt}, *messages]
    both = f"{pre_prompt} {messages[0]['content']}"
    return [{"role": "system", "content": both}, *messages[1:]]


def distill(
    model: Transformer,
    tok: Tokenizer,
    safety_model: RewardModel,
    prompts,
    prefixed,
    seed: int,
    config: Settings,
) -> list[dict]:
    """One record per prompt: both answers, their scores, and the dialogue to train on.

    prompts: dialogues that wait for an answer; prefixed: the same with a pre-prompt.
    """
    limits = config.max_new_tokens, config.temperature, seed
    distilled = respond(model, tok, prefixed, *limits)
    plain = respond(model, tok, prompts, *limits)
    # Score the dialogues as they will be trained on, without the pre-prompt.
    new_scores = score_dialogs(safety_model, tok, answered(prompts, distilled))
    old_scores = score_dialogs(safety_model, tok, answered(prompts, plain))
    records = []
    for messages, new, old, new_score, old_score in zip(
        prompts, distilled, plain, new_scores, old_scores
    ):
        improved = new_score > old_score
        answer = new if improved or not config.gate else old
        records.append(
            {
                "messages": messages + [assistant_message(answer)],
                "distilled": new,
                "plain": old,
                "distilled_score": new_score,
                "plain_score": old_score,
                "improved": improved,
            }
        )
    return records


def answered(prompts, texts: list[str]) -> list[list[dict]]:
    """Dialogues with their answers appended. "..." replaces an empty answer."""
    return [messages + [assistant_message(text or "...")] for messages, text in zip(prompts, texts)]


def main(config: Settings):
    """Write the dialogues, unless the file exists."""
    check_settings(config, may_be_zero=("temperature",))
    device, rank, _ = setup(config.device)
    files = data_paths(config.data) + data_paths(config.pre_prompts)
    output = Output(config.out, config, files + checkpoint_files(config.chat, config.rm))
    if output.exists:
        return print0(f"{config.out} exists already")
    model, tok = load(config.chat, device, config.dtype, Transformer)
    safety_model = load_fitting(config.rm, RewardModel, model, tok, config.chat)
    pre_prompts = read_instructions(config.pre_prompts, tok, config.skip_bad)
    rng = random.Random(f"pre-prompts {config.seed}")

    def parse(record):
        if isinstance(record, dict) and get_field(record, "prompt") is not None:
            messages = read_prompt(record)
        else:
            messages = to_messages(record)[:-1]
        prefixed = with_system_prompt(rng.choice(pre_prompts)["instruction"], messages)
        if len(encode_dialog(tok, prefixed)[0]) >= model.args.max_seq_len:
            raise SkipRecord("longer than the context with a pre-prompt")
        return messages, prefixed

    pairs = local_part(read_and_count(config.data, parse, config.skip_bad, "prompt"))
    prompts, prefixed = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    seed = derive_seed(config.seed, "distillation", rank)
    records = all_gather(distill(model, tok, safety_model, prompts, prefixed, seed, config))

    counts = Counter(record["improved"] for record in records)
    if config.gate and not counts[True]:
        raise ValueError(
            "the safety model prefers no answer with a pre-prompt over the plain "
            "one: there is nothing to train on"
        )
    not_empty = [record for record in records if record["messages"][-1]["content"]]
    if is_main():
        output.write(write_records, not_empty)
    used = "the other prompts keep their plain answer" if config.gate else "--no-gate uses them all"
    print0(
        f"{len(records):,} prompts answered with and without a pre-prompt: the safety model "
        f"prefers the distilled answer of {counts[True]:,}; {used}; {config.out}"
    )


if __name__ == "__main__":
    run_script(main, Settings, {})
