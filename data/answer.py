"""Answers of a chat model to the prompts of files, for any use: to read, to compare, to judge.

    python -m data.answer out/rlhf/v5 --prompts mine.jsonl --out answers.jsonl
    python -m data.answer out/rlhf/v5 --prompts mine.jsonl --out answers.jsonl --temperature 0.8

The prompts are in the formats of docs/DATA.md. The answers have the order of the prompts, and each
record is {"prompt", "answer"}, which train_sft.py can read, too.
"""

from dataclasses import dataclass

from common.run import Output, checkpoint_files, run_script
from common.settings import check_settings
from common.training import all_gather, derive_seed, is_main, local_part, print0, setup
from data.files import data_paths, write_records
from data.records import answer_again, read_prompts
from llama2 import Dtype, Transformer, load, text_after


@dataclass
class Settings:
    # sampling
    folder: str = ""  # the chat model
    prompts: tuple = ()  # files of {"prompt"}: text or messages
    skip_bad: bool = False  # skip records that do not fit, and count them
    temperature: float = 0.0  # of sampling; 0: greedy
    top_p: float = 0.95  # nucleus sampling; 1: all tokens
    max_new_tokens: int = 200  # longest answer, in tokens
    device: str = "auto"  # cuda, mps or cpu
    dtype: Dtype = "auto"  # of matrix products; auto: bfloat16 where it is faster
    # output
    out: str = ""  # .jsonl file for the answers
    overwrite: bool = False  # replace an existing file
    seed: int = 1  # for sampling

    POSITIONAL = "folder"  # given without --folder
    # The same file may be requested with other values of these. They do not change its content.
    MAY_CHANGE = ("out", "overwrite", "device")


def main(config: Settings):
    """Write the answers, unless the file exists."""
    check_settings(config, may_be_zero=("temperature",), at_most_one=("top_p",))
    if not config.prompts:
        raise ValueError("--prompts: give at least one file")
    device, rank, _ = setup(config.device)
    files = data_paths(config.prompts) + checkpoint_files(config.folder)
    output = Output(config.out, config, files)
    if output.exists:
        return print0(f"{config.out} exists already")
    model, tok = load(config.folder, device, config.dtype, Transformer)
    prompts = read_prompts(config.prompts, tok, model.args.max_seq_len, config.skip_bad)

    seed, limit = derive_seed(config.seed, "answers", rank), config.max_new_tokens
    mine = answer_again(model, tok, local_part(prompts), limit, config.temperature, seed)
    encoded = [prompt.tokens for prompt in mine]
    outs = output.sampler(model, encoded, limit, config.temperature, config.top_p, seed, tok.eos_id)
    answers = []
    for prompt, ids in zip(mine, outs):
        record = {"prompt": prompt.text, "answer": text_after(tok, prompt.tokens, ids)}
        answers.append((record, ids[-1] == tok.eos_id))
    answers = all_gather(answers)
    if is_main():
        output.write(write_records, [record for record, _ in answers])
    cut = sum(not finished for _, finished in answers)
    print0(
        f"{len(answers):,} answers in {config.out}, {cut:,} of them cut off by --max-new-tokens "
        "or by the end of the context"
    )


if __name__ == "__main__":
    run_script(main, Settings, {})
