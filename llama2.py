"""Llama 2 in one file: model, tokenizer, sampling, checkpoints, and what the scripts share.

Shapes: B batch, T queries, S keys, D dim, H heads, K kv heads, hd head_dim, F ffn, V vocabulary.

    §2.2  ModelArgs, SIZES, RMSNorm, rotate, Attention (GQA), FeedForward (SwiGLU), Transformer
    §2.2  Tokenizer (SentencePiece BPE, digits split, bytes as fallback)
    A.2.1 KVCache, kv_cache_bytes
    §3.1  encode_dialog (the chat format of Meta's released code)
    §2.2  adamw, lr_at (warm-up, then cosine to a tenth)

Parameter names, shapes and folders are those of Meta's release, so its weights load as they are.
Nothing here is global: the cache is an argument, randomness comes from an explicit generator,
forward returns logits.

    python llama2.py complete FOLDER "text"     continue a text with a trained model
    python llama2.py chat FOLDER                talk to a chat model
"""
import argparse
import contextlib
import dataclasses
import gzip
import inspect
import io
import json
import math
import os
import pickle
import re
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel


# -------------------------------------------------------------------------------------------- model
@dataclass
class ModelArgs:
    """The shape of a model, named as in Meta's params.json; ValueError if it cannot be."""
    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None       # None: as many as n_heads (MHA); 1: MQA; between: GQA
    vocab_size: int = 32000
    multiple_of: int = 256              # the FFN's width is rounded up to a multiple of this
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_seq_len: int = 4096             # the context, in tokens

    def __post_init__(self):
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of",
                     "max_seq_len"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"ModelArgs: {name}={value!r} must be a whole number above 0")
        for name in ("ffn_dim_multiplier", "norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not (name == "ffn_dim_multiplier" and value is None) and not value > 0:
                raise ValueError(f"ModelArgs: {name}={value!r} must be above 0")
        dim, heads, kv_heads = self.dim, self.n_heads, self.n_kv_heads
        if dim % heads:
            raise ValueError(f"ModelArgs: dim={dim} is not divisible by n_heads={heads}")
        if self.head_dim % 2:
            raise ValueError(f"ModelArgs: dim={dim} / n_heads={heads} is a head of {self.head_dim};"
                             " rotary embeddings turn pairs, so it must be even")
        if heads % kv_heads:
            raise ValueError(f"ModelArgs: n_heads={heads} not divisible by n_kv_heads={kv_heads}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        hidden = int(2 * 4 * self.dim / 3)      # SwiGLU has three matrices: as many parameters
        hidden = int(hidden * (self.ffn_dim_multiplier or 1))
        return -(-hidden // self.multiple_of) * self.multiple_of


# 7B to 70B: Meta's params.json; 1B: TinyLlama's shape; 15M, 110M: llama2.c's; tiny: a laptop's
SIZES = {
    "tiny": dict(dim=128, n_layers=4, n_heads=4, n_kv_heads=2, multiple_of=32),
    "15M": dict(dim=288, n_layers=6, n_heads=6, multiple_of=32),
    "110M": dict(dim=768, n_layers=12, n_heads=12, multiple_of=32),
    "1B": dict(dim=2048, n_layers=22, n_heads=32, n_kv_heads=4),
    "7B": dict(dim=4096, n_layers=32, n_heads=32),
    "13B": dict(dim=5120, n_layers=40, n_heads=40),
    "34B": dict(dim=8192, n_layers=48, n_heads=64, n_kv_heads=8),
    "70B": dict(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, ffn_dim_multiplier=1.3,
                multiple_of=4096),
}


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        x32 = x.float()                         # 16-bit squares lose the small values
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return (x32 * scale).type_as(x) * self.weight


def rotations(args: ModelArgs, positions):
    """positions (..., T) -> complex64 (..., T, 1, hd/2): how far each position turns each pair."""
    pairs = torch.arange(0, args.head_dim, 2, device=positions.device)
    angles = positions[..., None] * args.rope_theta ** (-pairs / args.head_dim)
    return torch.polar(torch.ones_like(angles), angles).unsqueeze(-2)


def rotate(x, turns):
    """Turn each interleaved pair (x[2i], x[2i+1]) of x (B, T, H, hd): scores depend on distance."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))         # (B, T, H, hd/2)
    return torch.view_as_real(pairs * turns).flatten(-2).type_as(x)         # (B, T, H, hd)


class KVCache:
    """Keys and values of the tokens so far, allocated once for `batch` rows of `length` slots.

    Prompts of different lengths are aligned right: row b's first `pad[b]` slots are padding, and no
    token attends to them. `used` counts the filled slots; it advances in Transformer.hidden alone.
    """
    def __init__(self, args: ModelArgs, batch: int, length: int, pad=None, device="cpu",
                 dtype=torch.float32):
        shape = (args.n_layers, batch, args.n_kv_heads, length, args.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.pad = (torch.zeros(batch, dtype=torch.long) if pad is None else pad).to(device)
        self.used = 0

    def append(self, layer: int, k, v):
        """Write k, v (B, K, T, hd) behind the filled slots; returns all so far, (B, K, S, hd)."""
        end = self.used + k.size(2)
        if end > self.k.size(3):
            raise ValueError(f"the KV cache has {self.k.size(3)} slots, and {end} are needed")
        self.k[layer, :, :, self.used:end] = k
        self.v[layer, :, :, self.used:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def keep(self, rows):
        """Drop all rows but these (1-d tensor of indices)."""
        self.k, self.v, self.pad = self.k[:, rows], self.v[:, rows], self.pad[rows]

    def positions_and_mask(self, T: int):
        """Of the next T tokens: positions (B, T), and what each may see, (B, 1, T, S)."""
        slots = torch.arange(self.used + T, device=self.pad.device)
        queries = slots[self.used:, None]                                       # (T, 1)
        visible = (slots <= queries) & (slots >= self.pad[:, None, None])       # (B, T, S)
        visible |= slots == queries     # a padding token sees itself: no keys at all would be NaN
        return (slots[self.used:] - self.pad[:, None]).clamp(min=0), visible[:, None]


def kv_cache_bytes(args: ModelArgs, batch: int, length: int, bytes_per_value: int = 2) -> int:
    """Bytes of a KVCache; GQA divides them by n_heads / n_kv_heads (A.2.1)."""
    return 2 * args.n_layers * batch * args.n_kv_heads * length * args.head_dim * bytes_per_value


class Attention(nn.Module):
    """Causal attention; each key/value head serves n_heads / n_kv_heads query heads."""
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.hd = args.head_dim
        self.wq = nn.Linear(args.dim, args.n_heads * self.hd, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * self.hd, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * self.hd, bias=False)
        self.wo = nn.Linear(args.n_heads * self.hd, args.dim, bias=False)

    def forward(self, x, turns, mask, cache, layer, weights=None):
        q = self.wq(x).unflatten(-1, (-1, self.hd))                             # (B, T, H, hd)
        k = self.wk(x).unflatten(-1, (-1, self.hd))                             # (B, T, K, hd)
        v = self.wv(x).unflatten(-1, (-1, self.hd)).transpose(1, 2)             # (B, K, T, hd)
        q, k = rotate(q, turns).transpose(1, 2), rotate(k, turns).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(layer, k, v)                                    # (B, K, S, hd)
        if weights is not None:
            weights.append(attention_weights(q, k, mask))                       # (B, H, T, S)
        # is_causal aligns queries and keys top left: right without a cache, wrong for a later chunk
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                             enable_gqa=k.size(1) != q.size(1))
        return self.wo(out.transpose(1, 2).flatten(2))          # (B, H, T, hd) -> (B, T, D)


def attention_weights(q, k, mask):
    """What attention weighs the values with, (B, H, T, S), of q (B, H, T, hd), k (B, K, S, hd).

    To be looked at (Fig. 9); the model's own path never forms them.
    """
    k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)                      # (B, H, S, hd)
    scores = q @ k.transpose(2, 3) * q.size(3) ** -0.5                          # (B, H, T, S)
    mask = torch.ones_like(scores, dtype=torch.bool).tril() if mask is None else mask
    return scores.masked_fill(~mask, -math.inf).softmax(-1)


class FeedForward(nn.Module):
    """SwiGLU: w1 is the gate, w3 goes up, w2 comes down."""
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.ffn_dim, bias=False)
        self.w2 = nn.Linear(args.ffn_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.ffn_dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x, turns, mask, cache, layer, weights=None):
        x = x + self.attention(self.attention_norm(x), turns, mask, cache, layer, weights)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """Tokens (B, T) int64 -> logits (B, T, V). Logit t predicts token t+1.

    With a cache, the tokens continue those it holds; without, they are whole sequences.
    """
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Block(args) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        # ours, the paper gives none: std 1/sqrt(columns), near the usual 0.02 at 7B; wo and w2
        # write into the residual stream: scaled so that its variance does not grow with depth
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("wo.weight", "w2.weight"))
                nn.init.normal_(p, std=(p.size(1) * (2 * args.n_layers if residual else 1)) ** -0.5)

    def hidden(self, tokens, cache: KVCache | None = None, weights: list | None = None):
        """tokens (B, T) -> the last layer's output, normed, (B, T, D); see `forward`.

        weights: a list to which each layer's attention weights (B, H, T, S) are added.
        """
        T = tokens.size(1)
        if cache is not None:
            positions, mask = cache.positions_and_mask(T)
        elif T > self.args.max_seq_len:
            raise ValueError(f"{T} tokens do not fit the context of {self.args.max_seq_len}")
        else:
            positions, mask = torch.arange(T, device=tokens.device), None
        turns = rotations(self.args, positions)
        x = self.tok_embeddings(tokens)                                         # (B, T, D)
        for layer, block in enumerate(self.layers):
            x = block(x, turns, mask, cache, layer, weights)
        if cache is not None:
            cache.used += T
        return self.norm(x)

    def forward(self, tokens, cache: KVCache | None = None):
        return self.output(self.hidden(tokens, cache))                          # (B, T, V)


class RewardModel(Transformer):
    """Tokens (B, T) -> scores (B, T): one number in place of next-token logits (§3.2.2).

    The score of a dialogue is read at its last token, the EOS behind the answer.
    """
    def __init__(self, args: ModelArgs):
        super().__init__(args)
        del self.output
        self.score = nn.Linear(args.dim, 1, bias=False)
        # ours: small, so that what it says at random need not be unlearned first
        nn.init.normal_(self.score.weight, std=0.1 * (args.dim + 1) ** -0.5)

    def forward(self, tokens, cache: KVCache | None = None):
        return self.score(self.hidden(tokens, cache)).squeeze(-1)               # (B, T)


def last_scores(model, rows):
    """The scores (B,) of B token lists of any lengths, each at its last token."""
    device = next(model.parameters()).device
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    last = torch.tensor([[len(row) - 1] for row in rows], device=device)        # (B, 1)
    return model(tokens.to(device)).gather(1, last).squeeze(1)


# ---------------------------------------------------------------------------------------- tokenizer
class Tokenizer:
    """A SentencePiece model. Text never becomes a control id: "<s>" in a text is three characters.

    There is no padding id (Meta's is -1): rows are padded with 0 and masked by position.
    """
    def __init__(self, path):
        self.proto = Path(path).read_bytes()
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=self.proto)
        except RuntimeError as e:
            why = str(e).splitlines()[0]
            raise ValueError(f"{path}: not a SentencePiece model ({why})") from None
        self.vocab_size, self.pad_id = self.sp.vocab_size(), self.sp.pad_id()
        self.bos_id, self.eos_id = self.sp.bos_id(), self.sp.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{path}: has no <s> or no </s>, with which documents begin and end")
        self._newline = self.sp.encode("\n")
        self.adds_space = self.sp.decode(self.sp.encode("a") * 2) != "aa"   # before every text

    def encode(self, text: str, bos=False, eos=False, continuing=False) -> list[int]:
        """`continuing`: it follows other text, so SentencePiece's space in front is left out."""
        # SentencePiece writes a space as U+2581, so a real U+2581 is spelt in bytes
        first, *rest = text.split("\u2581")
        ids = self._encode_after_newline(first) if continuing else self.sp.encode(first)
        for part in rest:
            ids += [self.sp.piece_to_id(f"<0x{byte:02X}>") for byte in b"\xe2\x96\x81"]
            ids += self._encode_after_newline(part)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def _encode_after_newline(self, text):
        return self.sp.encode("\n" + text)[len(self._newline):]

    def decode(self, ids: list[int]) -> str:
        return self.sp.decode(ids)

    def piece_bytes(self) -> list[int]:
        """Bytes of text that each id stands for; 0 for control ids."""
        sp = self.sp
        return [0 if sp.is_control(i) or sp.is_unknown(i) else 1 if sp.is_byte(i)
                else len(sp.id_to_piece(i).replace("\u2581", " ").encode())
                for i in range(self.vocab_size)]

    @staticmethod
    def train(texts, vocab_size: int, path):
        """Fit BPE as in §2.2 to an iterable of strings and write it to `path`."""
        model = io.BytesIO()
        lines = [line for text in texts for line in text.split("\n") if line]
        # the chat format's tags among them become three tokens, as Llama 2's are, not eight or nine
        lines += [" ".join(TAGS)] * min(5000, len(lines) // 4)
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines), model_writer=model, model_type="bpe",
                vocab_size=vocab_size, split_digits=True, byte_fallback=True,
                character_coverage=0.9999, normalization_rule_name="identity",
                remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
                max_sentence_length=1 << 20, minloglevel=2)
        except RuntimeError as e:
            most = re.search(r"value <= (\d+)", str(e))
            least = re.search(r"required_chars\. \d+ vs (\d+)", str(e))
            hint = f"at most {most[1]}" if most else f"at least {least[1]}" if least else e
            raise ValueError(f"a vocabulary of {vocab_size} does not fit this text, which needs "
                             f"{hint}: set --vocab-size") from None
        write_atomic(path, lambda file: file.write(model.getvalue()))


# -------------------------------------------------------------------------------------- chat format
TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


def without_tags(text: str) -> str:
    """What a model wrote, without the format's tags: with them it would not be accepted back."""
    while any(tag in text for tag in TAGS):     # taking one out may join the halves of another
        for tag in TAGS:
            text = text.replace(tag, "")
    return text.strip()


def encode_dialog(tok: Tokenizer, messages: list[dict]) -> tuple[list[int], list[int]]:
    """[{"role", "content"}, ...] -> (tokens, mask), as Meta's chat code lays a dialogue out.

    BOS [INST] <<SYS>>\\n system \\n<</SYS>>\\n\\n user [/INST] answer EOS BOS [INST] user [/INST]

    An unanswered last message is left open. mask: 1 on answers and their EOS, where loss counts.
    Raises ValueError, naming the message, for roles out of order and for contents that hold a tag.
    """
    for i, message in enumerate(messages):
        tag = next((tag for tag in TAGS if tag in message["content"]), None)
        if tag:
            raise ValueError(f"message {i + 1} contains {tag}, which is part of the chat format")
    has_system = bool(messages) and messages[0]["role"] == "system"
    turns = messages[has_system:]
    for i, message in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if message["role"] != expected:
            at = i + 1 + has_system
            raise ValueError(f"message {at} has role {message['role']!r}, expected {expected!r}: "
                             "roles are (system,) user, assistant, user, ...")
    if not turns:
        raise ValueError("a dialogue needs a user's message")
    tokens, mask = [], []
    for i in range(0, len(turns), 2):
        user = turns[i]["content"].strip()
        if i == 0 and has_system:
            user = f"<<SYS>>\n{messages[0]['content'].strip()}\n<</SYS>>\n\n{user}"
        asked = f"[INST] {user} [/INST]"
        ids = tok.encode(asked, bos=True)
        answered = 0
        if i + 1 < len(turns):
            whole = tok.encode(f"{asked} {turns[i + 1]['content'].strip()} ", bos=True, eos=True)
            assert whole[:len(ids)] == ids, "this tokenizer joins the format's tags with an answer"
            ids, answered = whole, len(whole) - len(ids)
        tokens += ids
        mask += [0] * (len(ids) - answered) + [1] * answered
    return tokens, mask


def as_messages(prompt) -> list[dict]:
    """A prompt, a text or messages, as messages; ValueError unless the user has the last word."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not (isinstance(messages, list) and messages and all(
            isinstance(m, dict) and isinstance(m.get("content"), str)
            and m.get("role") in ("system", "user", "assistant") for m in messages)):
        raise ValueError('"prompt" is neither a string nor a list of {"role", "content"}')
    if messages[-1]["role"] != "user":
        raise ValueError('"prompt" does not end with a message of the user')
    return messages


# ----------------------------------------------------------------------------------------- sampling
def top_p_filter(probs, top_p: float):
    """Zero all of probs (B, V) but the fewest likeliest that sum to top_p or more."""
    ranked, order = probs.sort(-1, descending=True)
    ranked[ranked.cumsum(-1) - ranked >= top_p] = 0     # what stands before a token suffices
    return torch.zeros_like(probs).scatter(-1, order, ranked)


def sample(logits, temperature: float, top_p: float, generator):
    """logits (B, V) -> ids (B,). Temperature 0 is greedy."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = torch.softmax(logits.float() / temperature, -1)
    if top_p < 1:
        probs = top_p_filter(probs, top_p)
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1)


@torch.inference_mode()
def decode(model, prompts, max_new_tokens, temperature, top_p, seed, eos_id):
    """Yield (prompts, ids), two equally long lists, for each step of decoding; see `generate`."""
    context, device = model.args.max_seq_len, model.output.weight.device
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty: begin it with the BOS id")
        if len(prompt) > context:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens, the context only {context}")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature={temperature} must be at least 0, and top_p={top_p} above 0 "
                         "and at most 1")
    generator = torch.Generator(device).manual_seed(seed)
    left = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
    rows = [i for i in range(len(prompts)) if left[i] > 0]      # row of the batch -> its prompt
    if not rows:
        return
    longest = max(len(prompts[i]) for i in rows)
    pad = torch.tensor([longest - len(prompts[i]) for i in rows])
    tokens = torch.tensor([[0] * int(p) + prompts[i] for i, p in zip(rows, pad)], device=device)
    cache = KVCache(model.args, len(rows), longest + max(left), pad, device,
                    model.output.weight.dtype)
    done = [False] * len(rows)
    while not all(done):
        logits = model.output(model.hidden(tokens, cache)[:, -1])               # (B, V)
        ids = sample(logits, temperature, top_p, generator)                     # (B,)
        fresh = [(b, rows[b], token) for b, token in enumerate(ids.tolist()) if not done[b]]
        for b, i, token in fresh:
            left[i] -= 1
            done[b] = token == eos_id or left[i] == 0
        yield [i for _, i, _ in fresh], [token for _, _, token in fresh]
        tokens = ids[:, None]                                                   # (B, 1)
        if sum(done) * 2 >= len(done) and not all(done):    # half the rows take half the time
            alive = [b for b in range(len(rows)) if not done[b]]
            index = torch.tensor(alive, device=device)
            cache.keep(index)
            tokens, rows, done = tokens[index], [rows[b] for b in alive], [False] * len(alive)


def generate(model, prompts, max_new_tokens: int, temperature: float = 1.0, top_p: float = 1.0,
             seed: int = 0, eos_id: int = -1) -> list[list[int]]:
    """Continue prompts, lists of ids of any lengths -> the new ids of each, EOS included.

    An answer ends with EOS, after max_new_tokens, or where the context is full; it is finished if
    its last id is EOS. Raises ValueError for a prompt that is empty or longer than the context.
    """
    outs = [[] for _ in prompts]
    for rows, ids in decode(model, prompts, max_new_tokens, temperature, top_p, seed, eos_id):
        for row, token in zip(rows, ids):
            outs[row].append(token)
    return outs


def generate_batches(model, prompts, max_new_tokens: int, temperature: float = 1.0, seed: int = 0,
                     eos_id: int = -1, batch_size: int = 256) -> list[list[int]]:
    """As `generate`, of more prompts than fit one batch."""
    outs = []
    for at in range(0, len(prompts), batch_size):
        outs += generate(model, prompts[at:at + batch_size], max_new_tokens, temperature,
                         seed=seed + at, eos_id=eos_id)
    return outs


def respond(model, tok: Tokenizer, dialogs, max_new_tokens: int = 90, temperature: float = 0.0,
            seed: int = 0) -> list[str]:
    """The answers, as text, to dialogues whose last message is a user's."""
    prompts = [encode_dialog(tok, messages)[0] for messages in dialogs]
    outs = generate_batches(model, prompts, max_new_tokens, temperature, seed, tok.eos_id)
    return [text_after(tok, ids, new) for ids, new in zip(prompts, outs)]


def text_after(tok: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    """The text of ids sampled behind a prompt's."""
    return without_tags(tok.decode(prompt + ids)[len(tok.decode(prompt)):])


def by_length(indices, rows, size: int) -> list[list[int]]:
    """Indices of rows in parts of at most `size`, like lengths together: little padding."""
    order = sorted(indices, key=lambda i: len(rows[i]))
    return [order[at:at + size] for at in range(0, len(order), size)]


@torch.inference_mode()
def score_rows(model: RewardModel, rows, batch_size: int = 256) -> list[float]:
    """The scores of token lists of any lengths, each at its last token."""
    scores = [0.0] * len(rows)
    for part in by_length(range(len(rows)), rows, batch_size):
        for i, value in zip(part, last_scores(model, [rows[i] for i in part]).tolist()):
            scores[i] = value
    return scores


def score(model: RewardModel, tok, dialogs) -> list[float]:
    """The rewards of dialogues, lists of messages: of one too long for the context, of its end."""
    context = model.args.max_seq_len
    return score_rows(model, [encode_dialog(tok, messages)[0][-context:] for messages in dialogs])


def stream(model, tok: Tokenizer, prompt: list[int], max_new_tokens: int, temperature: float = 1.0,
           top_p: float = 1.0, seed: int = 0):
    """Yield the continuation of one prompt as text, token by token, whole characters only."""
    ids, shown = list(prompt), tok.decode(prompt)
    for _, new in decode(model, [prompt], max_new_tokens, temperature, top_p, seed, tok.eos_id):
        ids += new
        text = tok.decode(ids)
        if not text.endswith("\ufffd"):
            yield text[len(shown):]
            shown = text
    yield tok.decode(ids)[len(shown):]


# -------------------------------------------------------------------------------------- checkpoints
def write_atomic(path, write):
    """Let write(file) fill a file beside `path`, then rename it: path is whole, or as it was."""
    beside = Path(f"{path}.tmp")
    with open(beside, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_json(path, value):
    write_atomic(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def save(folder, model, tok: Tokenizer):
    """Write a checkpoint folder in Meta's layout; the weights last, as a sign that it is whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "params.json", dataclasses.asdict(model.args))
    write_atomic(folder / "tokenizer.model", lambda file: file.write(tok.proto))
    write_atomic(folder / "consolidated.00.pth", lambda file: torch.save(model.state_dict(), file))


def merge_shards(shards):
    """Join Meta's tensor-parallel shards: by columns where a matrix's input was split."""
    def join(name):
        parts = [shard[name] for shard in shards]
        by_columns = name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight"))
        return parts[0] if parts[0].dim() < 2 else torch.cat(parts, 1 if by_columns else 0)
    return {name: join(name) for name in shards[0] if name != "rope.freqs"}     # which we compute


def load(folder, device="cpu", dtype=torch.float32, kind=None):
    """(model, tokenizer) of a checkpoint folder, ours or Meta's; ValueError says what is wrong.

    The model is a RewardModel where the folder holds one; `kind` demands one or a Transformer.
    """
    folder = Path(folder)
    files = sorted(folder.glob("consolidated.*.pth"))
    tokenizers = [folder / "tokenizer.model", folder.parent / "tokenizer.model"]    # Meta: one up
    tokenizer = next((path for path in tokenizers if path.is_file()), None)
    if not files or not tokenizer or not (folder / "params.json").is_file():
        raise ValueError(f"{folder}: no checkpoint here: params.json, consolidated.00.pth and "
                         "tokenizer.model are needed; name a folder that training wrote, or Meta's")
    tok = Tokenizer(tokenizer)
    params = json.loads((folder / "params.json").read_text())
    if params.get("vocab_size", -1) == -1:      # as in Meta's files
        params["vocab_size"] = tok.vocab_size
    unknown = sorted(params.keys() - {field.name for field in dataclasses.fields(ModelArgs)})
    if unknown:
        raise ValueError(f"{folder}/params.json: {', '.join(unknown)}: not a setting of Llama 2")
    try:
        shards = [torch.load(file, map_location="cpu", weights_only=True) for file in files]
        weights = merge_shards(shards)
        with torch.device("meta"):
            made = (RewardModel if "score.weight" in weights else Transformer)(ModelArgs(**params))
        made.load_state_dict(weights, assign=True)
    except (RuntimeError, KeyError, EOFError, OSError, ValueError, pickle.UnpicklingError) as e:
        why = " ".join(str(e).split())[:300]
        raise ValueError(f"{folder}: the weights cannot be loaded: {why}") from None
    if kind not in (None, type(made)):
        words = {Transformer: "a language model", RewardModel: "a reward model"}
        raise ValueError(f"{folder}: holds {words[type(made)]}, expected {words[kind]}")
    return made.to(device=device, dtype=dtype).eval(), tok


# ---------------------------------------------------------------------- what the four scripts share
def describe_settings(cls):
    """{field: its trailing comment} of a settings dataclass: the comments are the documentation."""
    source = "".join(inspect.getsource(c) for c in cls.__mro__[:-1])
    return dict(re.findall(r"^    (\w+): .*?#\s*(.*)$", source, re.M))


def parse_settings(cls, paper: dict, description: str, argv=None):
    """A `cls` from the command line, an --option a field; --recipe paper starts from `paper`."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: stop(f"{message}; --help lists every setting")
    if paper:
        parser.add_argument("--recipe", choices=("laptop", "paper"), default="laptop",
                            help="whose values to start from (default: laptop)")
    comments = describe_settings(cls)
    for field in dataclasses.fields(cls):
        how = {bool: dict(action=argparse.BooleanOptionalAction), tuple: dict(nargs="+")}
        beside = f"; paper: {paper[field.name]}" if field.name in paper else ""
        text = f"{comments[field.name]} (default: {field.default}{beside})"
        parser.add_argument("--" + field.name.replace("_", "-"), help=text.replace("%", "%%"),
                            default=argparse.SUPPRESS, **how.get(field.type, dict(type=field.type)))
    given = vars(parser.parse_args(argv))
    return cls(**(paper if given.pop("recipe", "") == "paper" else {}) | given)


def stop(message):
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def run_script(main, cls, paper: dict):
    """Parse, call main(settings), and turn a user's mistake into one line and exit code 2."""
    try:
        main(parse_settings(cls, paper, sys.modules[main.__module__].__doc__))
        if dist.is_initialized():
            dist.barrier()      # none leaves while rank 0 still writes: that would end them all
    except (ValueError, OSError) as e:
        if isinstance(e, OSError) and e.filename is None:
            raise                               # no file of the user's: a fault to be seen whole
        stop(f"{e.filename}: {e.strerror}" if isinstance(e, OSError) else e)
    except KeyboardInterrupt:
        print("\ninterrupted; --resume goes on from the last save", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def setup(device: str = "auto"):
    """(device, rank, world): joins torchrun's process group and shares out the cores."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if world > 1:       # else each process would take every core, or, as torchrun has it, just one
        torch.set_num_threads(max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return torch.device(device), rank, world


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_json(path):
    """Yield (where, record) of a .jsonl, .jsonl.gz or .json file; ValueError if it is none."""
    path, open_file = Path(path), gzip.open if str(path).endswith(".gz") else open
    if not path.name.endswith((".jsonl", ".jsonl.gz", ".json")):
        raise ValueError(f"{path}: expected a .jsonl, .jsonl.gz or .json file")
    try:
        with open_file(path, "rb") as file:
            if path.suffix == ".json":
                records = json.load(file)
                if not isinstance(records, list):
                    raise ValueError(f"{path}: expected one array of records")
                yield from ((f"{path}: record {i}", record) for i, record in enumerate(records, 1))
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path}:{number}"
                    yield where, json.loads(line)
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text; convert it first") from None
    except json.JSONDecodeError as e:
        at = f":{number}" if path.suffix != ".json" else ""
        raise ValueError(f"{path}{at}: broken JSON ({e})") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise ValueError(f"{path}: broken gzip file ({e})") from None


def wilson(successes: float, n: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson's: it stays within 0 and 1)."""
    z, share = 1.96, successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return middle - half, middle + half


def processes() -> tuple[int, int]:
    """(rank, world) of this process in the group, if there is one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def everyones(items: list) -> list:
    """The items of all processes, in the order in which items[rank::world] was dealt."""
    if not dist.is_initialized():
        return items
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def all_sum(tensor):
    """Sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def autocast(device):
    """bfloat16 matrix products on a GPU; everything in float32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def adamw(model, lr, weight_decay, beta1, beta2, eps):
    """AdamW that decays matrices only: shrinking a norm's gain would fight the norm."""
    params = list(model.parameters())
    groups = [dict(params=[p for p in params if p.dim() >= 2], weight_decay=weight_decay),
              dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps,
                             fused=params[0].device.type != "mps")


def lr_at(step: int, max_steps: int, warmup_steps: int, lr: float, min_lr: float) -> float:
    """Of step 0, 1, ...: linear up over warmup_steps, then a cosine that ends at min_lr."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, max_steps - 1 - warmup_steps)
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * min(done, 1))) / 2


def require(config, positive=(), **ranges):
    """ValueError, naming the option, for a setting not above 0, or not in name=(least, below)."""
    for name in (*positive, *ranges):
        value, (least, below) = getattr(config, name), ranges.get(name, (0, math.inf))
        if not least <= value < below or name in positive and value == 0:
            expected = "above 0" if name in positive else f"at least {least} and below {below}"
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be {expected}")


def open_run(config):
    """(config.out, state to resume from or None). ValueError where a run would be lost unasked."""
    out = Path(config.out)
    finished, unfinished = (out / "consolidated.00.pth").exists(), (out / "resume.pt").exists()
    if finished and not config.overwrite:
        raise ValueError(f"{out} holds a finished run: choose another --out, or --overwrite it")
    if unfinished and not (config.resume or config.overwrite):
        raise ValueError(f"{out} holds an unfinished run: --resume it, choose another --out, or "
                         "--overwrite it")
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()     # can it be written? find out now, not after hours
    if not unfinished or config.overwrite:
        return out, None
    check_same_settings(out, config)
    return out, torch.load(out / "resume.pt", map_location="cpu", weights_only=True)


def check_same_settings(out, config):
    """ValueError if the run in `out` began with other settings than it is to go on with."""
    before = json.loads((out / "config.json").read_text())
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    changed = [name for name in now if before.get(name) != now[name]
               and name not in ("resume", "overwrite", "out", "device", "workers")]
    if changed:
        raise ValueError(f"{out}: cannot be resumed with other settings than it began with: "
                         + ", ".join(f"{k} was {before.get(k)}, now {now[k]}" for k in changed))


def begin_run(out, config):
    """The moment at which what --overwrite gives up is removed, and new settings are written."""
    for name in ("consolidated.00.pth", "resume.pt", "metrics.jsonl", "summary.txt"):
        (out / name).unlink(missing_ok=True)
    write_json(out / "config.json", dataclasses.asdict(config))


def save_resume(out, **state):
    """All that going on as if never stopped takes, in one file: no kill can part it."""
    write_atomic(out / "resume.pt", lambda file: torch.save(state, file))


def write_summary(out, lines):
    """Print a run's last words, and keep them."""
    summary = "\n".join(lines) + "\n"
    print("\n" + summary)
    write_atomic(Path(out) / "summary.txt", lambda file: file.write(summary.encode()))


def end_run(out, lines, model, tok):
    """The summary, then the model; what resuming took goes last."""
    write_summary(out, lines)
    save(out, model, tok)
    (out / "resume.pt").unlink(missing_ok=True)


class Log:
    """The progress line of a loop and its metrics.jsonl, one JSON object a logged step."""
    def __init__(self, out, max_steps: int, step: int = 0, quiet: bool = False):
        self.path, self.max_steps, self.quiet = Path(out) / "metrics.jsonl", max_steps, quiet
        self.first, self.start = step, time.time()
        if not quiet:       # steps behind the point of resuming will be logged again
            kept = self.path.read_text().splitlines(True) if step else []
            kept = [line for line in kept
                    if line.endswith("\n") and json.loads(line)["step"] <= step]
            write_atomic(self.path, lambda file: file.write("".join(kept).encode()))

    def write(self, step: int, **metrics):
        if not self.quiet:
            with open(self.path, "a") as file:
                file.write(json.dumps(dict(step=step, **metrics)) + "\n")

    def progress(self, step: int, loss: float, lr: float, tokens_per_step: int, shown=(), **more):
        """One line for a logged step; `more` are a stage's own figures, of which it has `shown`."""
        if not self.quiet:
            seconds = (time.time() - self.start) / (step - self.first)      # a step
            left, rate = round(seconds * (self.max_steps - step)), tokens_per_step / seconds
            figures = "".join(f"{name} {more[name]:.3f}  " for name in shown if name in more)
            print(f"step {step:>{len(str(self.max_steps))}}/{self.max_steps}  loss {loss:.3f}  "
                  f"{figures}lr {lr:.1e}  {rate:,.0f} tokens/s  "
                  f"left {left // 60}:{left % 60:02d}", flush=True)
            self.write(step, loss=loss, lr=lr, tokens_per_s=round(rate), **more)


def fit(model, batches, loss_sum, count, config, log=None, state=None, keep=None, tokens=0):
    """Train in place, a step a batch, and a batch a list of rows; returns the last loss.

    The loss of a batch is loss_sum(engine, some of its rows), summed, / count(all its rows): each
    process knows the whole batch, so neither micro-batches nor processes change a gradient. config:
    lr, warmup_steps, weight_decay, beta1, beta2, eps, grad_clip, micro_batch (rows), log_every,
    save_every. `state` is what keep(**state) was given every save_every steps: training goes on
    from there. tokens: in a batch, for the log.
    """
    rank, world = processes()
    device = next(model.parameters()).device
    optimizer = adamw(model, config.lr, config.weight_decay, config.beta1, config.beta2, config.eps)
    first, mean = 0, None
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    engine = DistributedDataParallel(model) if world > 1 else model
    model.train()
    for step in range(first, len(batches)):
        lr = lr_at(step, len(batches), config.warmup_steps, config.lr, config.lr / 10)
        for group in optimizer.param_groups:
            group["lr"] = lr
        mine = batches[step][rank::world] or batches[step][:1]      # all take part in each step
        idle, total = len(batches[step]) <= rank, count(batches[step])
        parts = [mine[at:at + config.micro_batch] for at in range(0, len(mine), config.micro_batch)]
        loss = torch.zeros((), device=device)
        for i, part in enumerate(parts):    # DDP averages over processes, once: in the last pass
            alone = world > 1 and i < len(parts) - 1
            with engine.no_sync() if alone else contextlib.nullcontext(), autocast(device):
                share = loss_sum(engine, part) / total * (0 if idle else 1)
                (share * world).backward()
            loss += share.detach()
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done % config.log_every == 0 or done == len(batches):
            mean = all_sum(loss).item()
            if log:
                log.progress(done, mean, lr, tokens)
        if keep and done % config.save_every == 0:
            keep(model=model.state_dict(), optimizer=optimizer.state_dict(), step=done)
    model.eval()
    return mean


# ------------------------------------------------------------------------------------- command line
@dataclass
class Sampling:
    max_new_tokens: int = 200   # tokens to write at most
    temperature: float = 0.8    # 0: always the likeliest token
    top_p: float = 0.95         # sample from the likeliest tokens that make up this share
    seed: int = 0               # of the sampling
    device: str = "auto"        # cuda, mps, cpu


@dataclass
class ChatSettings(Sampling):
    reward: str = ""            # folder of a reward model: shows its score of each answer


def say(pieces) -> str:
    """Print pieces of text as they come; returns them all. Ctrl-C ends the text alone."""
    text = ""
    with contextlib.suppress(KeyboardInterrupt):
        for piece in pieces:
            print(piece, end="", flush=True)
            text += piece
    print()
    return text


def complete(folder, text, s: Sampling):
    model, tok = load(folder, setup(s.device)[0], kind=Transformer)
    print(text, end="", flush=True)
    say(stream(model, tok, tok.encode(text, bos=True), s.max_new_tokens, s.temperature, s.top_p,
               s.seed))


HELP = "/system TEXT sets a system message, /reset forgets the dialogue, /quit ends (or Ctrl-D)"


def chat(folder, s: ChatSettings):
    """A dialogue in the terminal, or through a pipe: a line a message."""
    with contextlib.suppress(ImportError):
        import readline     # noqa: F401, history and editing for input()
    device = setup(s.device)[0]
    model, tok = load(folder, device, kind=Transformer)
    judge = load(s.reward, device, kind=RewardModel) if s.reward else None
    prompt = "> " if sys.stdin.isatty() else ""
    print(f"{folder}: {HELP}")
    system, turns = [], []
    for seed in range(s.seed, sys.maxsize):     # another seed for each answer
        try:
            line = input(prompt).strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            print()
            continue
        command, _, rest = line.partition(" ")
        if command == "/quit":
            break
        elif command in ("/reset", "/system"):
            turns = []
            if command == "/system":
                system = [{"role": "system", "content": rest}] if rest.strip() else []
            told = f", system message: {system[0]['content']}" if system else ""
            print(f"(a new dialogue{told})")
        elif command.startswith("/"):
            print(f"({HELP})")
        elif line:
            turns = answer(model, tok, system, turns + [{"role": "user", "content": line}], s, seed)
            if judge and turns and turns[-1]["role"] == "assistant":
                print(f"(reward {score(*judge, [system + turns])[0]:.2f})")


def answer(model, tok, system, turns, s: Sampling, seed) -> list[dict]:
    """Stream the answer to the last of turns; returns the dialogue with it, cut to the context."""
    try:
        room = model.args.max_seq_len - min(s.max_new_tokens, model.args.max_seq_len // 2)
        dropped = 0
        while len(ids := encode_dialog(tok, system + turns)[0]) > room and len(turns) > 1:
            turns, dropped = turns[2:], dropped + 1     # a user's message and its answer
        if dropped:
            print(f"(the context of {model.args.max_seq_len} tokens is full: the oldest {dropped} "
                  "turn(s) are forgotten)")
        pieces = stream(model, tok, ids, s.max_new_tokens, s.temperature, s.top_p, seed)
        text = say(piece.lstrip() if i == 0 else piece for i, piece in enumerate(pieces))
    except ValueError as e:
        print(f"({e})")
        return turns[:-1]
    return turns + [{"role": "assistant", "content": without_tags(text)}]


COMMANDS = {"complete": (complete, Sampling, 2, 'complete FOLDER "text": continue a text'),
            "chat": (chat, ChatSettings, 1, "chat FOLDER: a dialogue; " + HELP)}


def main(argv):
    if argv[:1] not in (["complete"], ["chat"]):
        stop('expected: complete FOLDER "text", or chat FOLDER; --help after either lists settings')
    run, settings, count, usage = COMMANDS[argv[0]]
    given, options = argv[1:1 + count], argv[1 + count:]
    if "--help" in argv or "-h" in argv:
        options = ["--help"]
    elif len(given) < count or given[0].startswith("--"):
        stop(f"expected: {usage}")
    try:
        run(*given, parse_settings(settings, {}, usage, options))
    except ValueError as e:
        stop(e)


if __name__ == "__main__":
    main(sys.argv[1:])
