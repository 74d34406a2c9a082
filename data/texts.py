"""Reads the texts that data.corpus --data names, one document at a time.

.txt                one document per file
.jsonl, .jsonl.gz   one document per line: {"text": ..., "url": ... (optional)}
"""

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from data.fields import get_field
from data.files import read_json, shared_reason, split_weight

KNOWN = (".txt", ".jsonl", ".jsonl.gz")


@dataclass
class Source:
    """One entry of --data."""

    name: str
    files: list[str]
    weight: float
    counts: Counter = field(default_factory=Counter)  # filled in by the first pass


def find_sources(specs) -> list[Source]:
    """A Source for each FILE_OR_FOLDER[:WEIGHT]. ValueError if one is missing or has no text."""
    sources, names = [], Counter()
    for spec in specs:
        path, weight = split_weight(spec)
        path = Path(path)
        if not path.exists():
            raise ValueError(f"--data {spec}: {path} does not exist")
        files = find_files(path) if path.is_dir() else [str(path)]
        if not files or not files[0].lower().endswith(KNOWN):
            raise ValueError(f"--data {spec}: expected {', '.join(KNOWN)}, or a folder of them")
        name = re.sub(r"\W+", "-", path.resolve().name.split(".")[0])
        names[name] += 1
        if names[name] > 1:
            name = f"{name}~{names[name]}"
        sources.append(Source(name, files, weight))
    return sources


def find_files(root: Path) -> list[str]:
    """The text files in a folder and its subfolders; prints how many other files there are.

    Links are followed, and a file with several names is read once. Raises OSError if a folder
    cannot be read.
    """
    texts, others, visited = [], Counter(), set()

    def stop(error: OSError):
        raise error

    for folder, folders, names in os.walk(root, followlinks=True, onerror=stop):
        if os.path.realpath(folder) in visited:  # a link that leads back to a folder above
            folders.clear()
            continue
        visited.add(os.path.realpath(folder))
        # Hidden files and folders belong to an editor or to the system.
        others["hidden"] += sum(name.startswith(".") for name in folders + names)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = sorted(name for name in names if not name.startswith("."))
        if "metrics.jsonl" in names:  # the folder of a run, whose files are not training text
            others["of a run (its folder has metrics.jsonl)"] += len(names)
            continue
        for name in names:
            path = Path(folder, name)
            if not name.lower().endswith(KNOWN):
                others["".join(path.suffixes[-2:]) or name] += 1
            elif os.path.realpath(path) in visited:
                others["second links"] += 1
            else:
                visited.add(os.path.realpath(path))
                texts.append(path)
    if others := +others:  # without zeros
        shown = others.most_common(9)
        rest = others.total() - sum(n for _, n in shown)
        ends = [f"{n} {end}" for end, n in shown] + [f"{rest} with other endings"] * (rest > 0)
        print(f"{root}: not read: " + ", ".join(ends))
    return [str(path) for path in sorted(texts)]


@dataclass
class Document:
    """A text to pretrain on."""

    text: str
    where: str  # file and line
    host: str = ""  # of the url, if there is one

    @property
    def site(self) -> str:
        """The unit that is left out as a whole: all pages of a host, or a document without url."""
        return self.host or self.where


def read_documents(source: Source, skipped: Counter | None):
    """Yield the documents of a source.

    A line or file that cannot be read raises ValueError. If `skipped` is a Counter, it is skipped
    and counted there.
    """
    for path in source.files:
        is_text = path.lower().endswith(".txt")
        for where, record in [(path, read_text(path))] if is_text else read_json(path):
            try:
                document = to_document(record, where)
            except ValueError as e:
                if skipped is None:
                    raise ValueError(f"{where}: {e}; correct it, or --skip-bad skips it") from None
                # A text file may be a whole book, so report each one with its name and line.
                skipped[f"{where}: {e}" if is_text else shared_reason(e)] += 1
                continue
            if document.text:
                yield document


def read_text(path: str) -> dict | ValueError:
    """The text of a .txt file as {"text"}, or a ValueError that says why it cannot be read."""
    data = Path(path).read_bytes()
    try:
        text, bad = data.decode("utf-8-sig"), data.find(b"\0")
        reason = "binary data (a NUL byte); expected UTF-8 text"
    except UnicodeDecodeError as e:
        bad, reason = e.start, f"not UTF-8 text ({e.reason}); convert it first"
    if bad >= 0:
        line = data[:bad].count(b"\n") + 1
        return ValueError(f"line {line}: {reason}")
    return {"text": text}


def to_document(record, where: str) -> Document:
    """{"text", "url"} -> Document. Raises ValueError."""
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError('expected an object {"text": "..."}')
    host = re.match(r"(?:\w+://)?([^/]+)", str(get_field(record, "url") or ""))
    return Document(record["text"], where, host[1] if host else "")
