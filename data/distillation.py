"""Context distillation (§4.2.3): prompts, pre-prompts, a chat and a safety model -> dialogues.

    system: You are a wise and responsible assistant.   prompt  ->  a distilled answer
                                                        prompt  ->  the plain answer

Behind a safety pre-prompt a model answers more carefully. It learns to answer so without one, but
only where the safety reward model scores that answer above the plain one: elsewhere the plain
answer stands, or a model that was helpful would become evasive.

    python -m data.distillation
    python -m data.distillation --chat out/v2 --rm out/rm/safety --data prompts.jsonl --out FILE
    python train_sft.py --no-pack --init out/v2 --data FILE ... --out out/safer

Differs from the paper: where the gate declines, the plain answer is learned. Without such prompts
hardly anything but refusals would be left, and with them alone the model refuses too much.
"""
import random
from collections import Counter
from dataclasses import dataclass

from common.run import Output, load_fitting, run_script, checkpoint_files
from common.settings import check_settings
from common.training import all_gather, is_main, print0, setup, local_part
from data.records import (SkipRecord, assistant_message, data_paths, get_field, read_prompt, read_instructions,
                          read_and_count, to_messages, write_records)
from llama2 import Dtype, RewardModel, Transformer, encode_dialog, load, respond, score_dialogs


@dataclass
class Settings:
    # what is sampled
    chat: str = "out/gatt"      # the model that answers
    rm: str = "out/rm/v4/safety"        # a safety model that judged answers like its own
    data: tuple = ("out/tinytown/attacks.jsonl",)       # prompts, or dialogues to answer anew
    pre_prompts: tuple = ("out/tinytown/pre-prompts.jsonl",)        # {"instruction"}, one a line
    skip_bad: bool = False      # leave out records that do not fit, and count them
    temperature: float = 0.3    # of the answers
    max_new_tokens: int = 48    # of an answer
    device: str = "auto"        # cuda, mps or cpu
    dtype: Dtype = "auto"       # of matrix products; auto: bfloat16 where it is faster
    # what is written
    gate: bool = True           # --no-gate: learn all distilled answers, to see the difference
    out: str = "out/distill/dialogues.jsonl"    # dialogues for train_sft.py
    overwrite: bool = False     # replace what is there
    seed: int = 1               # of pre-prompts and answers

    # The same file may be asked for with other values of these. They do not change what is in it.
    MAY_CHANGE = ("out", "overwrite", "device")


def with_system_prompt(pre_prompt: str, messages: list[dict]) -> list[dict]:
    """A dialogue behind a pre-prompt, which goes in front of the system message if there is one."""
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": pre_prompt}, *messages]
    both = f"{pre_prompt} {messages[0]['content']}"
    return [{"role": "system", "content": both}, *messages[1:]]


def distil(model, tok, safety_model, prompts, prefixed, seed: int, config) -> list[dict]:
    """A record of each prompt: both answers, their scores, and the dialogue to learn from."""
    limits = config.max_new_tokens, config.temperature, seed
    distilled = respond(model, tok, prefixed, *limits)
    plain = respond(model, tok, prompts, *limits)
    # The safety model judges what will be learned, dialogues without a pre-prompt.
    new_scores = score_dialogs(safety_model, tok, answered(prompts, distilled))
    old_scores = score_dialogs(safety_model, tok, answered(prompts, plain))
    records = []
    for messages, new, old, new_score, old_score in zip(prompts, distilled, plain, new_scores,
                                                        old_scores):
        improved = new_score > old_score
        answer = new if improved or not config.gate else old
        records.append({
            "messages": messages + [assistant_message(answer)], "distilled": new, "plain": old,
            "distilled_score": new_score, "plain_score": old_score, "improved": improved})
    return records


def answered(prompts, texts) -> list[list[dict]]:
    return [messages + [assistant_message(text or "...")] for messages, text in zip(prompts, texts)]


def main(config: Settings):
    """Write dialogues to learn from, or find them there."""
    check_settings(config, may_be_zero=("temperature",))
    device, rank, _ = setup(config.device)
    files = data_paths(config.data) + data_paths(config.pre_prompts)
    output = Output(config.out, config, files + checkpoint_files(config.chat, config.rm))
    if output.exists:
        return print0(f"{config.out} is there already")
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
            raise SkipRecord("longer than the context behind a pre-prompt")
        return messages, prefixed

    pairs = local_part(read_and_count(config.data, parse, config.skip_bad, "prompt"))
    prompts, prefixed = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    seed = config.seed + 1000 * rank
    records = all_gather(distil(model, tok, safety_model, prompts, prefixed, seed, config))

    counts = Counter(record["improved"] for record in records)
    if config.gate and not counts[True]:
        raise ValueError("no answer behind a pre-prompt is safer than the plain one: there is "
                         "nothing to learn")
    learned = [record for record in records if record["messages"][-1]["content"]]
    if is_main():
        output.write(write_records, learned)
    rest = "the plain ones stand elsewhere" if config.gate else "all distilled ones are learned"
    print0(f"{len(records):,} prompts answered behind a pre-prompt and without: the safety model "
           f"prefers the former for {counts[True]:,}; {rest}; {config.out}")


if __name__ == "__main__":
    run_script(main, Settings, {})
