"""Write all files of Tinytown: what a stage reads, what it is examined with.

    python -m tinytown [FOLDER] [--seed N]

A seed gives the same bytes on every machine. Open the files: every stage begins with one of them.
"""
import argparse
import json
import os
import random
from pathlib import Path

from tinytown import prompts, world

VERSIONS = 5            # V1 to V5 of §3.2.3, each with prompts of its own
FIRST_PAIRS = 12500     # comparisons before V1, and before each later version
LATER_PAIRS = 1000
REPLAYED = {"encyclopedia": 1000, "arithmetic": 800, "stories": 300}


def as_lines(records: list[dict]) -> bytes:
    """One JSON object a line."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def write_files(folder: Path, contents: dict[Path, bytes], overwrite: bool):
    """Write files whole; those that hold other things are replaced only if that is asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in contents.items():
        if path.exists() and path.read_bytes() != content and not overwrite:
            raise ValueError(f"{path} holds something else: choose another FOLDER, or --overwrite")
    for path, content in contents.items():
        beside = Path(f"{path}.tmp")
        beside.write_bytes(content)
        os.replace(beside, path)


def every_file(seed: int, dialogues: int, noise: float) -> dict[str, list[dict]]:
    """{name of a file: its records}."""
    residents = world.town(seed)
    texts = world.documents(residents, seed)
    # §2, and the probes that find out what was learned
    files = dict(texts)
    files["probes"] = world.probes(residents)
    # §3.1; what no dialogue asks
    files["dialogues"] = prompts.dialogues(residents, dialogues, seed, noise)
    files["held-out"] = prompts.held_out_prompts(residents, seed=seed)
    # §3.2: prompts to compare answers to, new ones like them to test reward models on
    first = prompts.preference_prompts(residents, FIRST_PAIRS, seed)
    files["compare-v1"] = first
    files["compare-test"] = prompts.preference_prompts(residents, 2000, -seed, unlike=first)
    for version in range(2, VERSIONS + 1):
        files[f"compare-v{version}"] = prompts.preference_prompts(
            residents, LATER_PAIRS, 1000 * seed + 100 + version)
    # §3.2.3: prompts of each version; others, to see when PPO is to stop
    for version in range(1, VERSIONS + 1):
        count = 320 if version < VERSIONS else 7680
        files[f"prompts-v{version}"] = prompts.preference_prompts(
            residents, count, 1000 * seed + 10 + version)
    files["prompts-val"] = prompts.preference_prompts(residents, 256, 1000 * seed + 10)
    # §3.3: to follow an instruction, to keep to it, and not to forget all else meanwhile
    files["instructed"] = prompts.instructed_dialogues(residents, 3000, seed)
    files["long-dialogues"] = prompts.long_dialogues(residents, 540, 24, seed)
    files["instructions"] = prompts.instructions(prompts.TRAINED_KINDS)
    files["obedience"] = prompts.obedience(residents, 40, 20, seed)
    files["replay"] = replayed(texts, seed)
    # §4.2: attackers, and a safe assistant's pre-prompts
    files["attacks"] = prompts.attacks(residents, 1200, seed)
    files["held-out-attacks"] = prompts.held_out_attacks(residents, seed=seed)
    files["pre-prompts"] = prompts.pre_prompts()
    return files


def replayed(texts: dict[str, list[dict]], seed: int) -> list[dict]:
    """Some of the texts of pretraining: mixed in later, they keep it from being forgotten."""
    rng = random.Random(seed)
    found = []
    for source, count in REPLAYED.items():
        found += rng.sample(texts[source], count)
    return found


def main():
    parser = argparse.ArgumentParser(prog="python -m tinytown", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="out/tinytown")
    parser.add_argument("--seed", type=int, default=1, help="of all that is by chance (default: 1)")
    parser.add_argument("--dialogues", type=int, default=4800, help="how many (default: 4800)")
    parser.add_argument("--noise", type=float, default=0.0,
                        help="share of bad answers in the dialogues (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace files of another town")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    given = parser.parse_args()
    if given.dialogues < 1 or not 0 <= given.noise <= 1:
        parser.error("--dialogues must be at least 1, --noise from 0 to 1")
    folder, contents = Path(given.folder), {}
    for name, records in every_file(given.seed, given.dialogues, given.noise).items():
        path = folder / f"{name}.jsonl"
        contents[path] = as_lines(records)
        print(f"{path}  {len(records):,} records, {len(contents[path]):,} bytes")
    try:
        write_files(folder, contents, given.overwrite)
    except (ValueError, OSError) as e:
        parser.error(e)


if __name__ == "__main__":
    main()
