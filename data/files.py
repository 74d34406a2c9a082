"""Files of JSON records: reading, weights of files, holding out, writing.

A file is .jsonl, .jsonl.gz (one record per line) or .json (one array). Errors name file and line.
"""

import gzip
import json
import random
import re
import zlib
from collections import Counter
from pathlib import Path

from common.training import print0
from data.fields import SkipRecord, unused_keys
from llama2 import write_atomic

BOM = b"\xef\xbb\xbf"  # byte order mark: some editors write it at the start of a file


def read_json(path):
    """Yield (where, record) for each record of a file; for a broken line, (where, a ValueError).

    Raises ValueError if the file as a whole cannot be read, such as a broken .gz.
    """
    path = Path(path)
    if not path.name.lower().endswith((".jsonl", ".jsonl.gz", ".json")):
        raise ValueError(f"{path}: expected a .jsonl, .jsonl.gz or .json file")
    open_file = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with open_file(path, "rb") as file:
            beginning = file.read(4096)
            if beginning.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in beginning[:2]:
                raise ValueError(f"{path}: UTF-16 or UTF-32, expected UTF-8: convert it first")
            beginning = beginning.removeprefix(BOM).lstrip()
            file.seek(0)
            if beginning.startswith(b"["):  # one array, whatever the file name ends with
                records = parse_json(file.read().removeprefix(BOM))
                if isinstance(records, ValueError):
                    raise ValueError(f"{path}: {records}")
                for number, record in enumerate(records, 1):
                    yield f"{path}: record {number}", record
                return
            for number, line in enumerate(file, 1):
                line = line.removeprefix(BOM).strip()
                if line:
                    yield f"{path}:{number}", parse_json(line)
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise ValueError(f"{path}: broken gzip file ({e})") from None


def parse_json(text: bytes):
    """The value of a JSON text, or a ValueError that says why it has none."""
    try:
        value = json.loads(text.decode())  # bytes would be guessed to be UTF-16
        if rb"\ud" in text.lower():  # a lone surrogate, "\ud800", is valid JSON but not text
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeError as e:
        return ValueError(f"not UTF-8 text ({e.reason}); convert it first")
    except (ValueError, RecursionError) as e:
        return ValueError(f"broken JSON ({e}); expected a record per line or one array")


def split_weight(spec: str) -> tuple[str, float]:
    """(path, weight) of FILE:WEIGHT, how often the file's content is used. No weight means 1."""
    path, _, weight = str(spec).rpartition(":")
    if not path or Path(spec).exists():  # no weight, or the file name has a colon
        return str(spec), 1.0
    if not re.fullmatch(r"[-+]?[\d.][\d.,e+-]*|nan|inf", weight):  # as in C:\\data or https://
        raise ValueError(f"{spec} does not exist; a weight after a colon is a number above 0")
    if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", weight) or float(weight) == 0:
        raise ValueError(f"{spec}: {weight!r} is not a weight: expected a number above 0")
    return path, float(weight)


def data_paths(specs) -> list[str]:
    """The paths in FILE[:WEIGHT] ..., without the weights."""
    return [split_weight(spec)[0] for spec in specs]


def read_records(specs, parse, skip_bad: bool = False, seed: int = 1) -> tuple[list, Counter]:
    """(parse(record) for each record of FILE[:WEIGHT] ..., {reason: number of skipped records}).

    A weight of 2 repeats each example; 0.5 draws half of them at random, but at least one. Prints
    the keys of a file that nothing reads, if they are not known to be harmless.
    """
    examples, left_out = [], Counter()
    for spec in specs:
        path, weight = split_weight(spec)
        lines, parsed, unused = read_json(path), [], set()
        if weight < 1:  # draw before parsing, which takes longer
            lines = list(lines)
            count = max(round(len(lines) * weight), min(1, len(lines)))
            lines = random.Random(seed).sample(lines, count)
        for where, record in lines:
            try:
                if isinstance(record, ValueError):
                    raise record
                parsed.append(parse(record))
                unused |= unused_keys(record)
            except SkipRecord as e:
                left_out[str(e)] += 1
            except ValueError as e:
                if not skip_bad:
                    raise ValueError(
                        f"{where}: {e}; correct it, or --skip-bad skips such records"
                    ) from None
                left_out[shared_reason(e)] += 1
        if unused:
            print0(f"{path}: keys not used: {', '.join(sorted(unused))}")
        whole, rest = divmod(max(weight, 1), 1)
        examples += parsed * int(whole)
        examples += random.Random(seed).sample(parsed, round(len(parsed) * rest))
    shown = Counter(dict(left_out.most_common(6)))
    others = left_out.total() - shown.total()
    return examples, shown + Counter({"other reasons": others})


def shared_reason(error: ValueError) -> str:
    """An error's reason without names and numbers, so that equal reasons are counted together."""
    reason = re.split(r" \(|; |, expected", str(error))[0]
    return re.sub(r"'[^']*'", "...", re.sub(r"(?<!UTF-)\d+", "N", reason))


def first_question(messages: list[dict]) -> str:
    """The user's first message. Dialogues with the same one belong to the same split."""
    return next(message["content"] for message in messages if message["role"] == "user").strip()


def hold_out(examples, key, fraction: float, seed: int):
    """(training examples, held-out ones), split by key(example).

    Examples with equal keys are in the same part, so no held-out content occurs in training.
    Raises ValueError if no example is left for training.
    """
    keys = sorted({key(example) for example in examples})
    random.Random(seed).shuffle(keys)
    held_out = set(keys[: round(len(keys) * fraction)])
    train, val = [], []
    for example in examples:
        if key(example) in held_out:
            val.append(example)
        else:
            train.append(example)
    if examples and not train:
        raise ValueError(f"--val-fraction {fraction} holds out all of the {len(val)} examples")
    return train, val


def counts(left_out) -> str:
    """{reason: number of records} as text that ends a line; empty if nothing was left out."""
    reasons = [f"{number:,} ({reason})" for reason, number in left_out.items()]
    return f", left out: {', '.join(reasons)}" if reasons else ""


def check_split(what: str, train, val, left_out, keep: str):
    """Print the sizes of both parts. ValueError if there is nothing to train on, or if --keep best
    has nothing to evaluate on."""
    if keep == "best" and not val:
        raise ValueError("--keep best: nothing is held out; see --val-fraction")
    if not train:
        raise ValueError(f"no {what} to train on{counts(left_out)}")
    cut = sum(example.cut for example in train + val)
    print0(
        f"{len(train):,} {what}s, {len(val):,} held out, {cut:,} cut to the context"
        f"{counts(left_out)}"
    )


def read_objects(path, **types):
    """Yield (where, record) of a file whose records are objects with typed fields.

    types: the type of each field, as in read_objects(path, prompt=str). Raises ValueError.
    """
    for where, record in read_json(path):
        if isinstance(record, ValueError):
            raise ValueError(f"{where}: {record}")
        for name, expected in types.items():
            if not isinstance(record, dict) or not isinstance(record.get(name), expected):
                names = ", ".join(f'"{name}"' for name in types)
                raise ValueError(
                    f"{where}: expected an object with {names}; {name!r} is missing "
                    "or of another type"
                )
        yield where, record


def write_records(path, records):
    """Write one JSON object per line, atomically."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    write_atomic(path, lambda file: file.write("".join(lines).encode()))


def read_and_count(specs, parse, skip_bad: bool, what: str) -> list:
    """parse(record) for all records; prints how many. ValueError if there is none."""
    examples, left_out = read_records(specs, parse, skip_bad)
    names = ", ".join(str(spec) for spec in specs)
    if not examples:
        raise ValueError(f"{names}: no {what} to use{counts(left_out)}")
    print0(f"{len(examples):,} {what}s of {names}{counts(left_out)}")
    return examples
