"""Answers to many prompts: lines of progress, and an interruption loses no finished answer.

    outs = sample_with_progress(path, made_of, generate, model, prompts, *options)
    forget(path)        once the result is written, delete what was kept

The first call returns generate(model, prompts, *options). Meanwhile it keeps finished answers in a
file PATH.HASH.jsonl. If the process is interrupted, the same call in a new process reads them and
samples the rest. The result is the same as without the interruption. The hash is of all that the
answers depend on, so that one path serves several calls, and processes with different prompts.
"""

import hashlib
import json
import time
from pathlib import Path

from common.training import print0
from llama2 import write_atomic

SECONDS = 10  # between lines of progress


def sample_with_progress(path, made_of: dict, generate, model, prompts, *options) -> list:
    """generate(model, prompts, *options), with finished answers kept in a file; see above.

    made_of: what the model's weights depend on, such as the fingerprints of its files.
    generate: a function with `known` and `report`, such as `llama2.generate`.
    """
    contents = {"made_of": made_of, "options": options, "prompts": sha(prompts)}
    header = json.dumps(contents)
    path = Path(f"{path}.{sha(contents)}.jsonl")
    known = read_known(path, header)
    if known:
        print0(f"{len(known):,} of {len(prompts):,} answers are known from {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    start = f"{header}\n{json.dumps(known)}\n".encode()
    write_atomic(path, lambda file: file.write(start))
    started = last = time.time()

    def report(done, total, new):
        nonlocal last
        with open(path, "a") as file:
            file.write(json.dumps(new) + "\n")
        now = time.time()
        if now - last >= SECONDS:
            seconds = (now - started) * (total - done) / (done - len(known))
            left = f"{seconds // 60:.0f}:{seconds % 60:02.0f}"
            print0(f"sampled {done:,} of {total:,} answers, left {left}")
            last = now

    return generate(model, prompts, *options, known=known, report=report)


def read_known(path: Path, header: str) -> dict[int, list[int]]:
    """{index of a prompt: ids of its answer} in a file of `sample_with_progress`."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    known = {}
    if lines and lines[0] == header + "\n":
        for line in lines[1:]:
            try:
                known |= {int(i): ids for i, ids in json.loads(line).items()}
            except ValueError:  # the process was killed while it wrote this line
                break
    return known


def forget(path):
    """Delete the answers that were kept under this path."""
    path = Path(path)
    for file in path.parent.glob(f"{path.name}.*.jsonl"):
        file.unlink(missing_ok=True)  # another process may be deleting them, too


def sha(value) -> str:
    """A hash of a JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
