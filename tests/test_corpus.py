"""The tokenizer, and texts that become files of token ids."""

import gzip
import json
import os
import random
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

import train_pretrain
from conftest import ROOT, decode_documents, dialog, write_jsonl
from data import corpus, personal, texts
from llama2 import Tokenizer, encode_dialog
from tinytown import world

SPACES = [
    "",
    " ",
    "  two  spaces  ",
    " leading",
    "trailing ",
    "\ttab\t",
    "line\n\n\nline\r\n",
    "\n",
]
SCRIPTS = [
    "😀👩‍👩‍👧",
    "日本語 Ελληνικά עברית",
    "e\u0301",
    "\ufeffbom",
    "nul\0",
    "a fox lived",
    "12345.67",
]
CONTROLS = ["<s>", "</s> <s>[INST]", "<unk>", "<0x41>"]


# ---------------------------------------------------------------------------------------- tokenizer
@pytest.mark.parametrize("text", SPACES + SCRIPTS + CONTROLS)
def test_decoding_gives_the_text_back_and_text_never_becomes_a_control_token(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert not any(tok.sp.is_control(i) or tok.sp.is_unknown(i) for i in ids)
    sizes = train_pretrain.piece_bytes(tok)
    # The tokenizer adds a space before a text that is not empty.
    assert sum(sizes[i] for i in ids) == len(text.encode()) + bool(text)


def test_bos_and_eos_are_added_on_demand_and_digits_are_split(tok):
    assert tok.encode("a", bos=True, eos=True) == [tok.bos_id, *tok.encode("a"), tok.eos_id]
    assert [tok.sp.id_to_piece(i) for i in tok.encode("907")][-3:] == ["9", "0", "7"]
    assert tok.pad_id == -1
    for encode in (tok.encode, lambda text: encode_dialog(tok, dialog(text))):
        with pytest.raises(ValueError, match="surrogates not allowed"):
            encode("caf\udce9")


def test_a_file_that_is_not_a_usable_tokenizer_is_refused(tmp_path):
    path = tmp_path / "t.model"
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        Tokenizer(path)
    settings = dict(vocab_size=12, model_type="bpe", minloglevel=2)
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a b c d"] * 9), model_writer=file, **settings
        )
    with pytest.raises(ValueError, match="no piece for a space or none for bytes"):
        Tokenizer(path)


@pytest.mark.parametrize(
    "text, size",
    [
        ("ACGTTGCA" * 200_000, 290),
        ("日本語" * 9000, 265),
        ("a\u2028b" * 500, 265),
        ("▃▅▂ 50% of the hens\n" * 50, 290),  # SentencePiece skips lines with U+2585
    ],
)
def test_a_tokenizer_trained_on_unusual_texts_keeps_spaces(tmp_path, text, size):
    (tmp_path / "t.model").write_bytes(corpus.train_tokenizer([text], size))
    tok = Tokenizer(tmp_path / "t.model")
    assert tok.decode(tok.encode("a b  c\n d")) == "a b  c\n d"


# ------------------------------------------------------------------------------------------- corpus
def prepare(folder, *data, **changes):
    """(index, tokenizer, {"s.train": ids, ...}) of texts, made into tokens in a folder."""
    config = dict(data=tuple(map(str, data)), out=str(folder), vocab_size=350) | changes
    index = corpus.main(corpus.Settings(**config))
    ids = {}
    for source in index["sources"]:
        for split in ("train", "val"):
            name = f"{source['name']}.{split}"
            ids[name] = corpus.Shards(folder, name, index["dtype"]).read(0, 10**9).tolist()
    return index, Tokenizer(folder / "tokenizer.model"), ids


def test_shards_read_like_one_list(tmp_path):
    numbers = list(range(100))
    for i, part in enumerate((numbers[:37], numbers[37:38], numbers[38:])):
        np.array(part, dtype="uint16").tofile(tmp_path / f"x.{i:05d}.bin")
    shards = corpus.Shards(tmp_path, "x", "uint16")
    assert len(shards) == 100
    for start, count in [(0, 100), (0, 0), (30, 10), (36, 3), (38, 5), (90, 50), (99, 1)]:
        assert shards.read(start, count).tolist() == numbers[start : start + count]


def test_sources_have_weights_and_the_text_files_of_their_folders(tmp_path, capsys):
    names = (
        "web/a.txt web/b.jsonl web/C.TXT web/notes.md web/d.txt.gz web/._a.txt wiki.txt far/e.txt"
    )
    results = "web/run/best.jsonl web/run/metrics.jsonl web/.ipynb_checkpoints/a.txt"
    for name in (names + " " + results).split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "web/far").symlink_to("../far")
    (tmp_path / "far/back").symlink_to("../web")  # a cycle of links
    specs = [f"{tmp_path}/web:0.5", f"{tmp_path}/wiki.txt", f"{tmp_path}/wiki.txt:2"]
    web, wiki, again = texts.find_sources(specs)
    assert web.weight == 0.5
    assert [Path(file).name for file in web.files] == ["C.TXT", "a.txt", "b.jsonl", "e.txt"]
    assert (wiki.name, wiki.weight, again.name, again.weight) == ("wiki", 1, "wiki~2", 2)
    shown = capsys.readouterr().out
    skipped = "2 hidden, 2 of a run (its folder has metrics.jsonl), 1 .txt.gz, 1 .md"
    assert f"web: not read: {skipped}\n" in shown


def test_each_file_that_a_folder_does_not_give_is_counted(tmp_path, capsys, monkeypatch):
    """Also beyond the nine most common endings; a file with two names is read once."""
    for i in range(20):
        (tmp_path / f"x.e{i}").write_text("x")
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").symlink_to("a.txt")
    assert texts.find_files(tmp_path) == [str(tmp_path / "a.txt")]
    line = capsys.readouterr().out
    assert sum(map(int, re.findall(r"(?<=[:,] )\d+", line))) == 21
    assert "1 second links" in line or "with other endings" in line
    folder = tmp_path / "closed"
    folder.mkdir()
    scandir = os.scandir

    def closed(path):
        if str(path) == str(folder):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(PermissionError):
        texts.find_files(tmp_path)


def test_every_document_is_written_once_between_bos_and_eos(tmp_path, town, monkeypatch):
    """Held-out documents are not in the training data, not even as a copy."""
    monkeypatch.setattr(corpus, "SHARD_TOKENS", 1000)
    stories = town["stories"][:300] + town["stories"][:50]
    lines = [json.dumps(record) + "\n" for record in stories]
    (tmp_path / "s.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    index, tok, ids = prepare(tmp_path / "out", tmp_path / "s.jsonl.gz")
    train, val = (decode_documents(tok, part) for part in ids.values())
    assert sorted(train + val) == sorted(record["text"] for record in stories)
    assert 10 < len(val) < 70
    assert not set(train) & set(val)
    assert len(list((tmp_path / "out").glob("s.train.*.bin"))) > 5
    assert index["dtype"] == "uint16"


def test_copies_of_a_text_in_other_files_are_held_out_together(tmp_path, town):
    for i, record in enumerate(town["stories"][:80]):
        for name in ("a", "b"):
            (tmp_path / f"{name}{i}.txt").write_text(record["text"])
    _, tok, ids = prepare(tmp_path / "out", tmp_path)
    train, val = (set(decode_documents(tok, part)) for part in ids.values())
    assert len(val) > 3
    assert not train & val


def test_of_one_long_document_the_last_tenth_is_held_out(tmp_path, town, monkeypatch):
    """Long documents are encoded in slices, with the same tokens as in one piece."""
    monkeypatch.setattr(corpus, "SLICE_CHARS", 777)
    text = "\n".join(record["text"] for record in town["stories"][:100])
    (tmp_path / "book.txt").write_text(text)
    index, tok, ids = prepare(tmp_path / "out", tmp_path / "book.txt")
    counts = index["sources"][0]["counts"]
    assert counts["documents"] == counts["she"] == 1
    end = int(len(text) * 0.9)
    train, val = ids["book.train"], ids["book.val"]
    assert train == tok.encode(text[:end], bos=True)
    assert tok.decode(train) == text[:end]
    assert (val[0], val[-1], tok.decode(val)) == (tok.bos_id, tok.eos_id, text[end:])


def test_sites_with_much_personal_information_are_left_out(tmp_path, capsys):
    rng, lists, blog = random.Random(0), "http://lists.example/1", "http://blog.example/x"
    pages = [{"text": world.directory_page(rng), "url": lists} for _ in range(20)]
    for _ in range(3):
        pages.append({"text": "write to ada7@mail.example " + world.story(rng), "url": blog})
    pages += [{"text": world.story(rng), "url": blog} for _ in range(40)]
    pages += [{"text": world.directory_page(rng)}]  # without a URL, the page is its own site
    index, tok, ids = prepare(tmp_path / "out", write_jsonl(tmp_path / "web.jsonl", pages))
    text = tok.decode(ids["web.train"] + ids["web.val"])
    assert "phone 555" not in text
    assert "ada7@mail.example" in text
    assert set(index["left_out"]) == {"lists.example", f"{tmp_path}/web.jsonl:64"}
    addresses = sum(page["text"].count("@") for page in pages[:20])
    assert index["left_out"]["lists.example"]["e-mail"] == addresses
    assert "left out for personal information: 2 site(s)" in capsys.readouterr().out


def test_tokens_are_kept_until_the_text_changes(tmp_path, town):
    """A new weight changes no tokens, and a command that fails keeps the old ones."""
    path = write_jsonl(tmp_path / "s.jsonl", town["stories"][:100])
    prepare(tmp_path / "out", path)
    shard = tmp_path / "out/s.train.00000.bin"
    before = shard.stat().st_mtime_ns
    index, _, _ = prepare(tmp_path / "out", f"{path}:3")
    assert shard.stat().st_mtime_ns == before
    assert index["sources"][0]["weight"] == 3
    write_jsonl(path, town["stories"][100:200])
    with pytest.raises(ValueError, match="out was made from other data: .*s.jsonl has changed"):
        prepare(tmp_path / "out", path)
    good = path.read_text()
    for bad, error in ((good + '{"te', "s.jsonl:101: broken JSON"), ("", "empty")):
        path.write_text(bad)
        with pytest.raises(ValueError, match=error):
            prepare(tmp_path / "out", path, overwrite=True)
        assert shard.stat().st_mtime_ns == before
    path.write_text(good)
    prepare(tmp_path / "out", path, overwrite=True)
    assert shard.stat().st_mtime_ns != before


def test_skip_bad_leaves_out_unreadable_lines_and_files_and_counts_them(tmp_path, town, capsys):
    stories = [record["text"] for record in town["stories"][:60]]
    lines = [json.dumps({"text": text}).encode() for text in stories]
    lines[7:7] = [b'{"text": "a', '{"text": "é"}'.encode("latin-1"), b'{"content": "a"}', b"[]"]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "b.txt").write_bytes("one\n\ncafé".encode("latin-1"))
    (tmp_path / "c.txt").write_bytes(b"one\ntwo\0")
    with pytest.raises(ValueError, match="a.jsonl:8: broken JSON"):
        prepare(tmp_path / "out", tmp_path)
    with pytest.raises(ValueError, match="b.txt: line 3: not UTF-8"):
        prepare(tmp_path / "out", tmp_path / "b.txt")
    with pytest.raises(ValueError, match="no text to .*; skipped: .*c.txt: line 2: binary data"):
        prepare(tmp_path / "out", tmp_path / "c.txt", skip_bad=True)
    (tmp_path / "d.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="d.txt: empty"):
        prepare(tmp_path / "out", tmp_path / "d.txt")
    both = f"{tmp_path}/c.txt:3", f"{tmp_path}/d.txt", f"{tmp_path}/a.jsonl:2"
    for _ in range(2):  # the tokens are made, then found; without a source, weights keep theirs
        index, _, _ = prepare(tmp_path / "two", *both, skip_bad=True)
        assert [(source["name"], source["weight"]) for source in index["sources"]] == [("a", 2)]
    _, tok, ids = prepare(tmp_path / "out", tmp_path, skip_bad=True)
    train, val = ids.values()
    assert sorted(decode_documents(tok, train + val)) == sorted(stories)
    shown = capsys.readouterr().out
    assert "'broken JSON': 1, 'not UTF-8 text': 1" in shown
    assert "c.txt: line 2: binary data (a NUL byte)" in shown and "d.txt: empty" in shown


def test_time_to_find_personal_details_grows_linearly():
    """With quadratic time, these texts would take hours."""
    parts = "a|1|A|1 |1 A|a@|a.|@|1-|(|she|+1 |1.|tel:1|Aa |12 Aa |Calle Aa |str. |P.O".split("|")
    for part in parts:
        details = personal.count_details((part * 400_000)[:400_000])
        assert details["e-mail"] <= 1


def test_telephone_numbers_and_addresses_are_found_and_dates_tables_and_code_are_not():
    """The numbers of docs/DATA.md. The one list has ordinary texts, the other real spellings."""
    ordinary, spellings = (
        (ROOT / "tests" / name).read_text(encoding="utf-8").splitlines()
        for name in ("ordinary.txt", "personal.txt")
    )
    assert len(ordinary) >= 60 and len(spellings) >= 40
    wrong = [text for text in ordinary if personal.count_details(f"Then {text} again").total()]
    found = [text for text in spellings if personal.count_details(f"To: {text}, or.").total()]
    precision, recall = len(found) / (len(found) + len(wrong)), len(found) / len(spellings)
    documented = f"precision {precision:.0%}, recall {recall:.0%}"
    assert documented in " ".join((ROOT / "docs/DATA.md").read_text().split())
    assert (wrong, recall > 0.9) == ([], True)


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("(call (555) 123-4567) or (555-123-4567)", ["(555) 123-4567", "555-123-4567"]),
        ("1\u00a0555-123-4567", ["1 555-123-4567"]),
        ("555-123-4567. 3 hens", ["555-123-4567"]),
        ("12 555-123-4567, a555-123-4567, 555-123-4567-8, 555-123-4567 89, 0.555-123-4567", []),
        ("+20240115 103000, +1 234 567 890, +35236450.6, 0.1 020.12345678", []),
        ("call 1234567, call 2019-2020, ISBN 555-123-4567, Boston, MA 02110-1301", []),
    ],
)
def test_a_part_of_a_longer_number_is_no_telephone_number(text, numbers):
    assert personal.telephones(text) == numbers


def test_one_personal_page_does_not_bar_its_site_and_biographies_stay(tmp_path, town):
    stories = [record["text"] for record in town["stories"][:60]]
    pages = [{"text": text, "url": f"https://hens.example/{i}"} for i, text in enumerate(stories)]
    pages += [{"text": "## 2024-01-15\n" * 80, "url": "https://hens.example/changes"}]
    pages += [{"text": "call 555-123-4567\n" * 900, "url": "https://hens.example/staff"}]
    life = "Anna Example (1902-1977), taught here (1931-1938) and there (1945-1966). "
    pages += [{"text": life + text} for text in stories]
    half = [{"text": f"ada{i}@mail.example " * 3, "url": "https://half.example"} for i in range(6)]
    path = write_jsonl(tmp_path / "web.jsonl", pages + half)
    index, _, _ = prepare(tmp_path / "out", path)
    assert list(index["left_out"]) == ["half.example"]
    quiet = [{"text": text, "url": "https://half.example"} for text in stories[:6]]
    index, _, _ = prepare(tmp_path / "two", write_jsonl(path, pages + half + quiet))
    assert index["left_out"] == {}


def test_memory_does_not_grow_with_the_amount_of_text(tmp_path, town, tok, monkeypatch):
    monkeypatch.setattr(corpus, "TOKENIZER_CHARS", 50_000)
    monkeypatch.setattr(corpus, "BATCH_CHARS", 5_000)

    def peak(path):
        config = corpus.Settings(data=(str(path),))
        sources = texts.find_sources(config.data)
        tracemalloc.start()
        left_out, _ = corpus.survey(sources, config)
        documents = corpus.split_documents(sources, left_out, config)
        corpus.write_tokens(documents, tok, tmp_path, "uint16")
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    once = write_jsonl(tmp_path / "once.jsonl", town["stories"][:1000])
    ten_times = write_jsonl(tmp_path / "ten.jsonl", town["stories"][:1000] * 10)
    assert peak(ten_times) < 1.3 * peak(once)
