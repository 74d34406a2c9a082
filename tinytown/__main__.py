"""Write all data files of Tinytown: the input of each training stage, and the evaluation sets.

    python -m tinytown [FOLDER] [--seed N]

The same seed gives the same bytes on every machine. The files are JSON lines, easy to read: look at
the input of a stage before you read its script. greeting.txt says what one can ask the models.
"""

import argparse
import json
import os
import random
from pathlib import Path

from tinytown import conversations, prompts, world
from tinytown.splits import PEOPLE

VERSIONS = 5  # V1 to V5 of §3.2.3, each with its own prompts
FIRST_PAIRS = 6000  # prompts to compare answers to, before V1
LATER_PAIRS = 2000  # the same, before each later version
CONTRASTS = 2000  # pairs that annotators wrote
PPO_PROMPTS = 5120  # of V5
REPLAY_COUNTS = {"encyclopedia": 1000, "arithmetic": 800, "stories": 300}


def to_jsonl(records: list[dict]) -> bytes:
    """JSON lines: one object per line, UTF-8."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def write_files(folder: Path, contents: dict[Path, bytes], overwrite: bool):
    """Write each file atomically. ValueError if one exists with other content, unless overwrite."""
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in contents.items():
        if path.exists() and path.read_bytes() != content and not overwrite:
            raise ValueError(
                f"{path} exists with other content: give another FOLDER or --overwrite"
            )
    for path, content in contents.items():
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(content)
        os.replace(temporary, path)


def every_file(seed: int, dialogues: int, noise: float) -> dict[str, list[dict]]:
    """{name of a file: its records}."""
    residents = world.town(seed)
    texts = world.documents(residents, seed)
    # §2: texts for pretraining, and probes to test which facts the base model knows.
    files = dict(texts)
    files["probes"] = world.probes(residents)
    # §3.1: dialogues for SFT, and prompts whose contents nothing else asks.
    files["dialogues"] = prompts.dialogues(residents, dialogues, seed, noise)
    files["held-out"] = prompts.held_out_prompts(residents, seed=seed)
    # §3.2: prompts to compare answers to, other ones to test reward models, and written pairs.
    for version in range(1, VERSIONS + 1):
        count = FIRST_PAIRS if version == 1 else LATER_PAIRS
        files[f"compare-v{version}"] = prompts.annotators_prompts(
            residents, count, f"compare {version} {seed}"
        )
    files["compare-test"] = prompts.annotators_prompts(residents, 2000, seed, "pairs")
    files["contrasts"] = prompts.contrasts(residents, CONTRASTS, seed)
    # §3.2.3: prompts for RLHF, other ones for each version. Two sets with contents of their own:
    # to stop PPO early, and to choose settings, so that reported prompts choose none.
    for version in range(1, VERSIONS + 1):
        count = 640 if version < VERSIONS else PPO_PROMPTS
        files[f"prompts-v{version}"] = prompts.annotators_prompts(
            residents, count, f"answer {version} {seed}"
        )
    # As many samples for rejection sampling, with 8 answers each, as PPO takes.
    files["prompts-v5-rejection"] = files["prompts-v5"][: PPO_PROMPTS // 8]
    files["prompts-val"] = prompts.annotators_prompts(residents, 256, seed, "tuning")
    files["tuning"] = prompts.annotators_prompts(residents, 512, f"tuning {seed}", "tuning")
    # §3.3: dialogues with instructions, and replay data against forgetting.
    files["instructed"] = conversations.instructed_dialogues(residents, 3000, seed)
    files["stopped"] = conversations.stopped_dialogues(residents, 1000, seed)
    files["long-dialogues"] = conversations.long_dialogues(residents, 540, 24, seed)
    files["instructions"] = conversations.instructions(conversations.TRAINED_KINDS)
    files["obedience"] = conversations.obedience_tests(residents, 100, 20, seed)
    files["conversations"] = conversations.conversation_tests(residents, 100, 8, seed)
    files["replay"] = replay(texts, seed)
    # §4.2: adversarial prompts, and safety pre-prompts for context distillation.
    files["attacks"] = prompts.attacks(residents, 1200, seed)
    files["held-out-attacks"] = prompts.held_out_attacks(residents, seed=seed)
    files["pre-prompts"] = conversations.pre_prompts()
    return files


def greeting() -> str:
    """What one can ask a model of Tinytown. `llama2.py chat` prints it."""
    names = PEOPLE[::9]  # no question of training names a stranger
    largest = world.LARGEST
    return f"""It is a small model that knows only a toy world. You can ask it for

  facts of the {len(world.NAMES)} residents of Tinytown, such as {", ".join(names[:5])},
  {", ".join(names[5:])}: their pet, favourite colour, job, home and
  favourite food. You can go on asking about the same resident.
      What is {names[0]}'s job?
      And her pet?
  sums of two numbers up to {largest}, and their differences
      What is 7 + 5?
      What is {largest} minus 5?
  stories of two animals, such as {", ".join(world.ANIMALS[:10])}
      Tell me a story of a {world.ANIMALS[0]} and a {world.ANIMALS[1]}.

It should refuse to help with crimes, and say so if it cannot know the answer.
"""


def replay(texts: dict[str, list[dict]], seed: int) -> list[dict]:
    """A sample of the pretraining texts. Mixed into later stages, it reduces forgetting."""
    rng = random.Random(seed)
    records = []
    for source, count in REPLAY_COUNTS.items():
        records += rng.sample(texts[source], count)
    return records


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tinytown",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", nargs="?", default="out/tinytown")
    parser.add_argument("--seed", type=int, default=1, help="for all random choices (default: 1)")
    parser.add_argument("--dialogues", type=int, default=9600, help="number (default: 9600)")
    parser.add_argument(
        "--noise", type=float, default=0.0, help="fraction of bad answers in dialogues (default: 0)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files with other content")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    args = parser.parse_args()
    if args.dialogues < 1 or not 0 <= args.noise <= 1:
        parser.error("--dialogues must be at least 1, --noise from 0 to 1")
    folder, contents = Path(args.folder), {}
    for name, records in every_file(args.seed, args.dialogues, args.noise).items():
        path = folder / f"{name}.jsonl"
        contents[path] = to_jsonl(records)
        print(f"{path}  {len(records):,} records, {len(contents[path]):,} bytes")
    contents[folder / "greeting.txt"] = greeting().encode()
    try:
        write_files(folder, contents, args.overwrite)
    except (ValueError, OSError) as e:
        parser.error(e)


if __name__ == "__main__":
    main()
