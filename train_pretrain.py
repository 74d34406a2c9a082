"""Pretraining (§2): raw text -> a tokenizer and a base model.

    loss = mean over tokens of -log p(token t+1 | tokens 0..t)

Documents are packed: BOS document EOS BOS document EOS ..., cut into sequences wherever they fall;
attention may cross from one document into the next. Every source has a weight: 2 = seen twice as
often as its size (§2.1 up-samples factual sources). Sites with much personal information are left
out. A tenth of the documents, chosen by hash, is held out; of a source with too few documents for
that, the last tenth of each.

    python train_pretrain.py                                      Tinytown, on a laptop
    python train_pretrain.py --data book.txt web/:0.5 wiki.jsonl.gz:3 --out out/mine
    torchrun --nproc_per_node=8 train_pretrain.py --recipe paper --size 1B --data ...

Differs from the paper: sites with personal information are not known beforehand, so they are found
by counting e-mail addresses, telephone numbers and street addresses. Memory is plain DDP's: at 16
bytes a parameter for weights, gradients and optimizer, an 80 GB A100 has room for about 3B.
"""
import contextlib
import gzip
import hashlib
import heapq
import itertools
import json
import math
import multiprocessing
import re
import time
import zlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from tinytown import world as tinytown
from llama2 import (SIZES, Log, ModelArgs, Tokenizer, Transformer, adamw, all_sum, autocast,
                    begin_run, cores, end_run, generate, lr_at, open_run, require, run_script,
                    save_resume, setup, write_atomic, write_json)


@dataclass
class Settings:
    data: tuple = ()            # FILE_OR_FOLDER[:WEIGHT] ..., .txt .jsonl .jsonl.gz; none: Tinytown
    facts_weight: float = 8.0   # Tinytown: weight of the encyclopedia; 1 = the natural mix (§2.1)
    probes: str = ""            # .jsonl of {"prompt", "answer"}: tests recall; Tinytown has its own
    out: str = "out/pretrain"   # folder of the run
    resume: bool = False        # go on from the last save, if there is one
    overwrite: bool = False     # replace what --out holds
    size: str = "tiny"          # tiny, 15M, 110M, 1B, 7B, 13B, 34B, 70B
    tokenizer: str = ""         # a SentencePiece model to use; none: train one on the data
    vocab_size: int = 1024      # of the tokenizer that is trained
    max_personal: float = 2.0   # personal details per 1,000 characters that bar a site; 0: keep all
    val_fraction: float = 0.1   # held-out share of each source
    seq_len: int = 128          # tokens a sequence: the context
    batch_size: int = 16        # sequences a step, over all processes
    micro_batch: int = 16       # sequences a forward pass of one process, at most
    max_steps: int = 1100       # optimizer steps
    lr: float = 3e-3            # peak learning rate (paper: 1.5e-4 for 34B and 70B)
    warmup_steps: int = 40      # steps of linear warm-up, then cosine to a tenth of the peak
    weight_decay: float = 0.1   # on matrices
    beta1: float = 0.9          # AdamW
    beta2: float = 0.95         # AdamW
    eps: float = 1e-5           # AdamW
    grad_clip: float = 1.0      # largest norm of the gradient
    seed: int = 1               # of the town, the initial weights and the order of the data
    eval_every: int = 500       # steps between validations
    eval_tokens: int = 65536    # of each source, at most
    save_every: int = 100       # steps between saves to resume from
    log_every: int = 50         # steps between progress lines
    workers: int = 0            # processes that prepare the data; 0: one a core
    device: str = "auto"        # cuda, mps or cpu


PAPER = dict(size="7B", vocab_size=32000, val_fraction=0.001, seq_len=4096, batch_size=1024,
             micro_batch=1, max_steps=500_000, lr=3e-4, warmup_steps=2000, weight_decay=0.1,
             beta1=0.9, beta2=0.95, eps=1e-5, grad_clip=1.0)
TINYTOWN = ("encyclopedia", "stories", "web", "arithmetic")
PERSONAL = {
    "e-mail": re.compile(r"[\w.+-]+@[\w-]+\.\w[\w.-]*"),
    "telephone": re.compile(r"\+?\d[\d ()-]{5,}\d"),
    "address": re.compile(r"\b\d{1,5} (?:[A-Z]\w+ ){1,3}"
                          r"(?:Street|St|Road|Rd|Avenue|Ave|Lane|Ln|Drive|Way)\b"),
}
PRONOUNS = {group: re.compile(rf"\b(?:{words})\b", re.I) for group, words in {   # §4.1, Table 9
    "she": "she|her|hers|herself", "he": "he|him|his|himself",
    "they": "they|them|their|theirs|themselves",
    "1st person": "i|me|my|mine|myself|we|us|our|ours|ourselves",
    "2nd person": "you|your|yours|yourself"}.items()}
PIECE = 1 << 16                     # characters of a text file that are read and encoded at a time
TOKENIZER_CHARS = 4_000_000         # a sample of this size trains the tokenizer
SHARD_TOKENS = 100_000_000


# ------------------------------------------------------------------------------------------ sources
@dataclass
class Source:
    name: str
    files: list
    weight: float
    docs: int = 0                   # what the scan counts; val_docs: those held out by hash
    chars: int = 0
    val_docs: int = 0
    pronouns: dict = field(default_factory=lambda: dict.fromkeys(PRONOUNS, 0))


def find_sources(specs) -> list[Source]:
    """FILE_OR_FOLDER[:WEIGHT], ... -> sources. Raises ValueError for what is missing or unknown."""
    sources = []
    for spec in specs:
        path, _, weight = spec.rpartition(":")
        if not path or Path(spec).exists():
            path, weight = spec, "1"
        path = Path(path)
        if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", weight) or float(weight) == 0:
            raise ValueError(f"--data {spec}: {weight!r} is no weight: expected a number above 0")
        if not path.exists():
            raise ValueError(f"--data {spec}: {path} does not exist")
        known = (".txt", ".jsonl", ".jsonl.gz")
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        files = [file for file in inside if file.name.endswith(known)]
        if not files:
            raise ValueError(f"--data {spec}: expected {', '.join(known)}, or a folder of them")
        name = path.resolve().name.split(".")[0]
        taken = sum(s.name.split("~")[0] == name for s in sources)
        sources.append(Source(f"{name}~{taken + 1}" if taken else name, files, float(weight)))
    return sources


@dataclass
class Piece:
    """A document, or a part of a long one, and where it comes from."""
    site: str
    text: str
    first: bool = True
    last: bool = True
    alone: bool = False             # the site is this document and nothing else
    key: str = ""                   # what decides by hash whether the document is held out


def read_text(path):
    """Yield a text file, which is one document, in Pieces: memory does not grow with it."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            ahead, first = file.read(PIECE), True
            while ahead:
                text, ahead = ahead, file.read(PIECE)
                if "\0" in text:
                    raise ValueError(f"{path}: binary data (a NUL byte); expected UTF-8 text")
                yield Piece(str(path), text, first, not ahead, key=path.name)
                first = False
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not UTF-8 text ({e.reason}); convert it first") from None


def read_records(path):
    """Yield the documents {"text": ..., "url": ... (optional)} of a .jsonl or .jsonl.gz file."""
    try:
        with (gzip.open if path.name.endswith(".gz") else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield from read_record(line, f"{path}:{number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise ValueError(f"{path}: broken gzip file ({e})") from None


def read_record(line, where):
    try:
        record = json.loads(line)
        text = record["text"]
        if not isinstance(text, str):
            raise TypeError
        text.encode()                   # a lone surrogate, "\\ud800", is valid JSON and no text
    except UnicodeError:
        raise ValueError(f"{where}: not UTF-8 text; convert it first") from None
    except ValueError as e:
        raise ValueError(f"{where}: broken JSON ({e})") from None
    except (KeyError, TypeError):
        raise ValueError(f'{where}: expected an object {{"text": "..."}}') from None
    host = re.match(r"(?:\w+://)?([^/]+)", str(record.get("url") or ""))
    if text:
        yield Piece(host[1] if host else where, text, alone=not host, key=text)


def read_pieces(path):
    """Yield a file's documents as Pieces. Raises ValueError with the file and line at fault."""
    return (read_text if path.name.endswith(".txt") else read_records)(path)


def batches(items, size=1 << 20):
    """Group tuples that end in a Piece into lists of about `size` characters: a worker's share."""
    batch, chars = [], 0
    for item in items:
        batch.append(item)
        chars += len(item[-1].text)
        if chars >= size:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def held_out(key: str, fraction: float) -> bool:
    return zlib.crc32(key.encode()) < fraction * 2**32


# -------------------------------------------------------------------- preparation: scan, then write
def scan_batch(batch):
    """For each piece: its personal details by kind, and its groups of pronouns. In a worker."""
    return [(i, piece, [len(kind.findall(piece.text)) for kind in PERSONAL.values()],
             {group for group, words in PRONOUNS.items() if words.search(piece.text)})
            for i, piece in batch]


def too_personal(counts, chars, limit):
    """Several details, and many for the length."""
    return limit > 0 and sum(counts) >= 3 and sum(counts) * 1000 > limit * chars


def scan(sources, pool, config):
    """First pass: count; find the sites to leave out; draw a sample of text for the tokenizer.

    Returns dropped {site: [details by kind ..., characters]}, all named sites likewise, and the
    sample [(site, text), ...]. Memory grows with the number of sites, not with the text.
    """
    sites, dropped, sample, sampled, seen = {}, {}, [], 0, set()
    pieces = ((i, piece) for i, source in enumerate(sources)
              for path in source.files for piece in read_pieces(path))
    results = itertools.chain.from_iterable(pool.imap(scan_batch, batches(pieces)))
    for i, piece, personal, pronouns in results:
        source, size = sources[i], len(piece.text)
        source.docs += piece.first
        source.chars += size
        source.val_docs += piece.first and held_out(piece.key, config.val_fraction)
        seen = set() if piece.first else seen
        for group in pronouns - seen:           # a document counts once, in however many pieces
            source.pronouns[group] += 1
        seen |= pronouns
        if not piece.alone:
            so_far = sites.get(piece.site, [0] * (len(PERSONAL) + 1))
            sites[piece.site] = [a + b for a, b in zip(so_far, [*personal, size])]
        elif too_personal(personal, size, config.max_personal):
            dropped[piece.site] = [*personal, size]
        # the pieces with the smallest hashes are a fair sample, whatever the size of the whole
        rank = -zlib.crc32(piece.text.encode())
        heapq.heappush(sample, (rank, len(sample), piece.site, piece.text))
        sampled += size
        while sampled > TOKENIZER_CHARS and len(sample) > 1:
            sampled -= len(heapq.heappop(sample)[-1])
    for source in sources:
        if not source.chars:
            raise ValueError(f"{source.files[0]}: empty: there is no text to learn from")
    dropped |= {site: counts for site, counts in sites.items()
                if too_personal(counts[:-1], counts[-1], config.max_personal)}
    return dropped, sites, [entry[2:] for entry in sorted(sample)]


def encode_batch(batch):
    """[(source, split, Piece), ...] -> [(source, split, array of ids), ...]. In a worker."""
    encode = encode_batch.tok.encode
    return [(i, split, np.array(encode(p.text, bos=p.first, eos=p.last, continuing=not p.first),
                                dtype=np.uint32)) for i, split, p in batch]


def start_worker(tokenizer):
    encode_batch.tok = Tokenizer(tokenizer)


def split_pieces(sources, dropped, sites, config):
    """Second pass: yield (source, "train" or "val", Piece) of all that is kept."""
    for i, source in enumerate(sources):
        by_hash = 0 < source.val_docs < source.docs
        for piece in itertools.chain.from_iterable(map(read_pieces, source.files)):
            if piece.site in dropped:
                continue
            if by_hash:
                yield i, "val" if held_out(piece.key, config.val_fraction) else "train", piece
                continue
            start = 0 if piece.first else end
            end = start + len(piece.text)
            whole = end if piece.first and piece.last else sites[piece.site][-1]
            cut = int(whole * (1 - config.val_fraction))
            if start < cut:
                yield i, "train", replace(piece, text=piece.text[:cut - start],
                                          last=piece.last and end <= cut)
            if end > cut:   # the held-out part stands on its own: BOS comes before it
                yield i, "val", replace(piece, text=piece.text[max(cut - start, 0):],
                                        first=start <= cut)


def write_shards(folder, items, pool, dtype):
    """Write token ids to folder/SOURCE.SPLIT.NNN.bin; returns {"SOURCE.SPLIT": tokens}."""
    counts, files = {}, {}
    for i, split, ids in itertools.chain.from_iterable(pool.imap(encode_batch, batches(items))):
        name = f"{i}.{split}"
        while len(ids):
            shard, at = divmod(counts.get(name, 0), SHARD_TOKENS)
            if at == 0:
                if name in files:
                    files[name].close()
                files[name] = open(folder / f"{name}.{shard:03d}.bin", "wb")
            part, ids = ids[:SHARD_TOKENS - at], ids[SHARD_TOKENS - at:]
            files[name].write(part.astype(dtype).tobytes())
            counts[name] = counts.get(name, 0) + len(part)
    for file in files.values():
        file.close()
    return counts


def fingerprint(config, sources):
    """What the tokens on disk depend on; other than this, they can be used again."""
    files = [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns]
             for source in sources for p in source.files]
    tokenizer = config.tokenizer and hashlib.sha256(Path(config.tokenizer).read_bytes()).hexdigest()
    return [files, [len(source.files) for source in sources], tokenizer or config.vocab_size,
            config.max_personal, config.val_fraction]


def prepare(config, sources, folder, say):
    """Text -> folder/tokenizer.model and shards of token ids, or what is there of the same text.

    Returns the index: number type, tokens of each source and split, and the data report.
    """
    made_of, index_file = fingerprint(config, sources), folder / "index.json"
    if index_file.exists():
        index = json.loads(index_file.read_text())
        if index["made_of"] == made_of:
            say(f"tokens: those in {folder} are of this text")
            return index
    folder.mkdir(parents=True, exist_ok=True)
    for old in [index_file, *folder.glob("*.bin")]:
        old.unlink(missing_ok=True)
    workers, tokenizer = config.workers or cores(), folder / "tokenizer.model"
    with multiprocessing.Pool(workers) as pool:
        dropped, sites, sample = scan(sources, pool, config)
    if config.tokenizer:
        proto = Tokenizer(config.tokenizer).proto
        write_atomic(tokenizer, lambda file: file.write(proto))
    else:
        say(f"tokenizer: BPE of {config.vocab_size} tokens, from a sample of the text")
        Tokenizer.train((text for site, text in sample if site not in dropped), config.vocab_size,
                        tokenizer)
    dtype = "uint16" if Tokenizer(tokenizer).vocab_size <= 1 << 16 else "uint32"
    with multiprocessing.Pool(workers, start_worker, (tokenizer,)) as pool:
        tokens = write_shards(folder, split_pieces(sources, dropped, sites, config), pool, dtype)
    index = dict(made_of=made_of, dtype=dtype, tokens=tokens,
                 dropped={site: dict(zip([*PERSONAL, "characters"], counts))
                          for site, counts in sorted(dropped.items())},
                 sources=[asdict(source) | {"files": len(source.files)} for source in sources])
    write_json(index_file, index)       # last: where it stands, the shards are whole
    return index


# -------------------------------------------------------------------------------- tokens to batches
class Shards:
    """The token ids of one source and split: files, memory-mapped, read as one sequence."""
    def __init__(self, folder, name, dtype):
        files = sorted(Path(folder).glob(f"{name}.*.bin"))
        self.parts = [np.memmap(path, dtype, "r") for path in files]
        self.starts = np.cumsum([0] + [len(part) for part in self.parts])

    def __len__(self):
        return int(self.starts[-1])

    def read(self, start: int, count: int):
        """int64 array of ids start, ..., start+count-1, or up to the end."""
        end = min(start + count, len(self))
        out = [part[max(start - first, 0):end - first]
               for part, first in zip(self.parts, self.starts)
               if first < end and start < first + len(part)]
        return np.concatenate(out).astype(np.int64) if out else np.zeros(0, np.int64)


class Mixture:
    """Draws sequences from sources by weight x size, and within a source epoch by epoch, shuffled.

    Its whole state is `used`, the sequences drawn from each source: all that resuming needs.
    """
    def __init__(self, sources: list[Shards], weights, seq_len, seed):
        self.sources, self.seq_len, self.seed = sources, seq_len, seed
        sizes = np.array([len(s) * w for s, w in zip(sources, weights)], dtype=float)
        self.shares = sizes / sizes.sum()
        self.used = [0] * len(sources)

    def batch(self, step: int, count: int):
        """(count, seq_len + 1) ids: inputs are all but the last, targets all but the first."""
        rng = np.random.default_rng((self.seed, step))
        chosen = rng.choice(len(self.sources), count, p=self.shares)
        return torch.from_numpy(np.stack([self.sequence(s) for s in chosen]))

    def sequence(self, s: int):
        tokens, T = self.sources[s], self.seq_len
        windows = (len(tokens) - 1) // T
        epoch, i = divmod(self.used[s], windows)
        self.used[s] += 1
        # a walk whose stride shares no factor with the number of windows meets each once: a shuffle
        rng = np.random.default_rng((self.seed, s, epoch))
        shift, start = int(rng.integers((len(tokens) - 1) % T + 1)), int(rng.integers(windows))
        stride = int(rng.integers(1, windows + 1))
        while math.gcd(stride, windows) != 1:
            stride = stride % windows + 1
        return tokens.read(shift + (start + stride * i) % windows * T, T + 1)

    def epochs(self, s: int):
        return self.used[s] * self.seq_len / len(self.sources[s])


# --------------------------------------------------------------------------------------- evaluation
@torch.inference_mode()
def evaluate(model, tokens: Shards, tok, config, device, rank, world):
    """Held-out loss: (nats a token, bits a byte). The second compares across tokenizers."""
    T, sizes = config.seq_len, torch.tensor(tok.piece_bytes(), device=device)
    starts = list(range(0, min(len(tokens) - 1, config.eval_tokens), T))[rank::world]
    total = torch.zeros(3, dtype=torch.float64, device=device)      # nats, tokens, bytes
    for at in range(0, len(starts), config.micro_batch):
        windows = [torch.from_numpy(tokens.read(start, T + 1))
                   for start in starts[at:at + config.micro_batch]]
        rows = nn.utils.rnn.pad_sequence(windows, batch_first=True, padding_value=-1).to(device)
        inputs, targets = rows[:, :-1].clamp(min=0), rows[:, 1:]            # (B, T)
        with autocast(device):
            logits = model(inputs)                                          # (B, T, V)
        nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1,
                               reduction="sum")
        real = targets >= 0
        # the space that SentencePiece puts before a document is not in the text
        extra = (real & (inputs == tok.bos_id)).sum() if tok.adds_space else 0
        total += torch.stack([nats, real.sum(), sizes[targets[real]].sum() - extra]).double()
    nats, count, size = all_sum(total).tolist()
    return nats / count, nats / math.log(2) / size


def recall(model, tok, probes) -> float:
    """Share of probes whose greedy continuation is the answer."""
    prompts = [tok.encode(probe["prompt"], bos=True) for probe in probes]
    outs = generate(model, prompts, max_new_tokens=12, temperature=0)
    said = [tok.decode(prompt + out)[len(probe["prompt"]):]
            for probe, prompt, out in zip(probes, prompts, outs)]
    return sum(re.match(rf"\s*{re.escape(probe['answer'])}\b", text) is not None
               for probe, text in zip(probes, said)) / len(probes)


def read_probes(path):
    try:
        probes = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        if probes and all(isinstance(p["prompt"] + p["answer"], str) for p in probes):
            return probes
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f'{path}: expected lines of {{"prompt": "...", "answer": "..."}}')


# ----------------------------------------------------------------------------------------- report
def data_report(index, sources, epochs, shares) -> list[str]:
    lines = [f"{'source':<14}{'documents':>10}{'train tokens':>14}{'held out':>10}{'weight':>8}"
             f"{'share':>8}{'epochs':>8}"]
    for i, source in enumerate(sources):
        train, val = (index["tokens"].get(f"{i}.{split}", 0) for split in ("train", "val"))
        lines.append(f"{source.name:<14}{index['sources'][i]['docs']:>10,}{train:>14,}{val:>10,}"
                     f"{source.weight:>8g}{shares[i]:>8.1%}{epochs[i]:>8.2f}")
    counted = index["sources"]
    docs = sum(s["docs"] for s in counted)
    lines.append("documents with pronouns (§4.1): " + ", ".join(
        f"{group} {sum(s['pronouns'][group] for s in counted) / docs:.0%}" for group in PRONOUNS))
    lines.append(f"left out for personal information: {len(index['dropped'])} site(s)")
    by_size = sorted(index["dropped"].items(), key=lambda item: -item[1]["characters"])
    lines += [f"  {site}: " + ", ".join(f"{n:,} {kind}" for kind, n in counts.items())
              for site, counts in by_size[:5]]
    return lines


def samples(model, tok, val, sources) -> list[str]:
    """A continuation of the beginning of each source's held-out text."""
    lines = ["", "samples (held-out beginning | what the model adds):"]
    for source, tokens in zip(sources, val):
        prompt = tokens.read(0, 12).tolist()
        if not prompt:
            continue
        out = generate(model, [prompt], 60, temperature=0.8, top_p=0.95, eos_id=tok.eos_id)[0]
        text, start = tok.decode(prompt + out), tok.decode(prompt)
        lines.append(f"  {source.name}: {start}|{text[len(start):]}".replace("\n", "\n    "))
    return lines


# --------------------------------------------------------------------------------------------- main
def check(config, world):
    """Refuse settings that cannot work; returns the sequences of one forward pass."""
    if config.size not in SIZES:
        raise ValueError(f"--size {config.size}: expected one of {', '.join(SIZES)}")
    require(config, ("vocab_size", "seq_len", "batch_size", "micro_batch", "max_steps", "lr",
                     "grad_clip", "eval_every", "eval_tokens", "save_every", "log_every",
                     "facts_weight"))
    if not 0 < config.val_fraction < 1:
        raise ValueError(f"--val-fraction {config.val_fraction}: must be between 0 and 1")
    micro = min(config.micro_batch, config.batch_size // world)
    if not micro or config.batch_size % (world * micro):
        raise ValueError(f"--batch-size {config.batch_size} does not divide into {world} "
                         f"process(es) x --micro-batch {config.micro_batch}")
    return micro


def load_data(config, out, rank, world, say):
    """Everything about the data: sources, index, tokenizer, train and val Shards, and probes."""
    town = None if config.data else out / "tinytown"
    if town and rank == 0:
        tinytown.write(town, config.seed)
    if world > 1:
        dist.barrier()
    sources = find_sources(config.data or [
        f"{town}/{name}.jsonl:{config.facts_weight if name == 'encyclopedia' else 1}"
        for name in TINYTOWN])
    probes = read_probes(config.probes or town / "probes.jsonl") if config.probes or town else []
    folder = out / "tokens"
    if rank == 0:
        prepare(config, sources, folder, say)
    if world > 1:
        dist.barrier()
    index = json.loads((folder / "index.json").read_text())
    tok = Tokenizer(folder / "tokenizer.model")
    train, val = ([Shards(folder, f"{i}.{split}", index["dtype"]) for i in range(len(sources))]
                  for split in ("train", "val"))
    for source, tokens in zip(sources, train):
        if len(tokens) <= config.seq_len:
            raise ValueError(f"{source.name}: {len(tokens)} tokens to train on are less than one "
                             f"sequence of {config.seq_len} and its next token: give more text or "
                             "a smaller --seq-len")
    return sources, index, tok, train, val, probes


def main(config: Settings) -> dict:
    """Train, evaluate and save; returns the metrics of the summary."""
    began = time.time()
    device, rank, world = setup(config.device)
    micro = check(config, world)
    say = print if rank == 0 else lambda *_, **__: None
    out, state = open_run(config)
    sources, index, tok, train, val, probes = load_data(config, out, rank, world, say)
    mixture = Mixture(train, [s.weight for s in sources], config.seq_len, config.seed)

    torch.manual_seed(config.seed)
    args = ModelArgs(**SIZES[config.size], vocab_size=tok.vocab_size, max_seq_len=config.seq_len)
    model = Transformer(args).to(device)
    optimizer = adamw(model, config.lr, config.weight_decay, config.beta1, config.beta2, config.eps)
    first = 0
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, mixture.used = state["step"], state["used"]
    elif rank == 0:
        begin_run(out, config)
    engine = DistributedDataParallel(model) if world > 1 else model
    log = Log(out, config.max_steps, first, quiet=rank > 0)
    say(f"{config.size}: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{config.max_steps} steps of {config.batch_size} x {config.seq_len} tokens, {device}"
        + (f", from step {first}" if first else ""))

    def validate(step):
        model.eval()
        losses = {s.name: evaluate(model, v, tok, config, device, rank, world)
                  for s, v in zip(sources, val) if len(v) > 1}
        say(f"step {step}  held out, bits a byte:  "
            + "  ".join(f"{name} {bits:.3f}" for name, (_, bits) in losses.items()))
        log.write(step, seconds=time.time() - began,
                  **{f"val/{name}": nats for name, (nats, _) in losses.items()},
                  **{f"bits/{name}": bits for name, (_, bits) in losses.items()})
        model.train()
        return losses

    for step in range(first, config.max_steps):
        lr = lr_at(step, config.max_steps, config.warmup_steps, config.lr, config.lr / 10)
        for group in optimizer.param_groups:
            group["lr"] = lr
        rows = mixture.batch(step, config.batch_size)[rank::world].to(device).split(micro)
        loss = torch.zeros((), device=device)
        for i, row in enumerate(rows):      # DDP averages over processes, once: in the last pass
            alone = world > 1 and i < len(rows) - 1
            with engine.no_sync() if alone else contextlib.nullcontext(), autocast(device):
                logits = engine(row[:, :-1])                                # (B, T, V)
                part = F.cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten()) / len(rows)
                part.backward()
            loss += part.detach()
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done % config.log_every == 0 or done == config.max_steps:
            log.progress(done, all_sum(loss).item() / world, lr, config.batch_size * config.seq_len)
        if done % config.eval_every == 0 and done < config.max_steps:
            validate(done)
        if done % config.save_every == 0 and rank == 0:
            save_resume(out, model=model.state_dict(), optimizer=optimizer.state_dict(), step=done,
                        used=mixture.used)

    losses = validate(config.max_steps)
    model.eval()
    epochs = [mixture.epochs(s) for s in range(len(sources))]
    recalled = recall(model, tok, probes) if probes else None
    metrics = dict(loss=losses, recall=recalled, epochs=epochs)
    lines = data_report(index, sources, epochs, mixture.shares)
    lines += ["", f"{'held-out loss':<14}{'nats a token':>14}{'bits a byte':>14}"]
    lines += [f"{name:<14}{nats:>14.3f}{bits:>14.3f}" for name, (nats, bits) in losses.items()]
    if probes:
        lines += ["", f"facts recalled: {recalled:.1%} of {len(probes)} probes, "
                      "each worded as no text it was trained on words that fact"]
    lines += samples(model, tok, val, sources)
    metrics["seconds"] = time.time() - began
    lines += ["", f"{metrics['seconds']:.0f} s in all"]
    if rank == 0:
        log.write(config.max_steps, final=metrics)
        end_run(out, lines, model, tok)
    return metrics


if __name__ == "__main__":
    run_script(main, Settings, PAPER)
