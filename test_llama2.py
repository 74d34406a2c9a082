"""Tests in the order of the pipeline. A test's name is a claim; its reference is slow and obvious.

    contents    fixtures · llama2.py · tinytown/ · data/ · common/ · the four scripts · evaluate/ ·
                bench/ · the command line
                then the contracts that all stages keep: resuming, processes, micro-batches, bad
                input, finished runs; the house's own rules; and a walk through the whole
"""

import ast
import cmath
import contextlib
import copy
import gzip
import io
import json
import math
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F

import llama2
import train_pretrain as pretrain
import train_rlhf as rlhf
import train_rm as reward
import train_sft as sft
from bench import speed
from bench.ghost import attention_weights
from common import run as runs, training
from common.settings import describe_settings, parse_settings
from data import corpus, distillation, ghost_attention, preferences, records, texts
from data.formats import KINDS, RATINGS, combine_instructions
from evaluate import answers, name_folders, percent_table, reward_models, scoreboard, wilson
from llama2 import (SIZES, KVCache, ModelArgs, RewardModel, RMSNorm, Tokenizer, Transformer,
                    apply_rotary_emb, compute_freqs_cis, encode_dialog, generate, kv_cache_bytes,
                    load, save, stream)
from tinytown import annotator, prompts, world
from tinytown.__main__ import every_file
from tinytown.__main__ import main as write_town

HERE = Path(__file__).parent
ARGS = ModelArgs(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=300, multiple_of=8, max_seq_len=64
)


# ----------------------------------------------------------------------------------------- fixtures
@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tok(tmp_path_factory):
    path = tmp_path_factory.mktemp("tok") / "tokenizer.model"
    rng = random.Random(0)
    texts = [world.story(rng) + "\n" + world.sums(rng) for _ in range(200)]
    path.write_bytes(corpus.train_tokenizer(texts, 400))
    return Tokenizer(path)


@pytest.fixture(scope="session")
def letters(tmp_path_factory):
    """A tokenizer without merges: a piece a character, so that layouts can be written by hand."""
    text, path = "[INST] <<SYS>> hi yo no be ok </>", tmp_path_factory.mktemp("chars") / "t.model"
    path.write_bytes(corpus.train_tokenizer([text], 259 + len(set(text))))
    return Tokenizer(path)


def make_model(**changes):
    """A random model with weights large enough that its logits are far apart."""
    torch.manual_seed(0)
    model = Transformer(replace(ARGS, **changes)).eval()
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.2)
    return model


def make_reward_model(tok, seed=0):
    torch.manual_seed(seed)
    model = RewardModel(replace(ARGS, vocab_size=tok.vocab_size, max_seq_len=256)).eval()
    torch.nn.init.normal_(model.score.weight)
    return model


@pytest.fixture(scope="session")
def base(tmp_path_factory, tok):
    """A folder of a random model with a context of 256."""
    folder = tmp_path_factory.mktemp("base") / "m"
    save(folder, make_model(vocab_size=tok.vocab_size, max_seq_len=256), tok)
    return folder


@pytest.fixture(scope="session")
def judges(tmp_path_factory, tok):
    """A folder of two random reward models."""
    folder = tmp_path_factory.mktemp("judges")
    for seed, kind in enumerate(KINDS):
        save(folder / kind, make_reward_model(tok, seed), tok)
    return folder


@pytest.fixture(scope="session")
def town():
    """{name: records} of all files that python -m tinytown writes, with fewer dialogues."""
    return json.loads(json.dumps(every_file(seed=1, dialogues=600, noise=0.0)))


def write_jsonl(path, found):
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in found]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, tok, base, judges, town):
    """What the four scripts read, small: paths of models and data."""
    folder = tmp_path_factory.mktemp("inputs")
    text = write_jsonl(folder / "stories.jsonl", town["stories"][:300])
    tokens = folder / "tokens"
    tokenizer = base / "tokenizer.model"
    corpus.main(
        corpus.Settings(data=(str(text),), out=str(tokens), tokenizer=str(tokenizer))
    )
    rng, residents, pairs = random.Random(0), world.town(1), []
    for asked in town["compare-v1"][:40]:
        good = prompts.good_answer(rng, asked)
        bad = prompts.bad_answer(rng, asked, residents)
        pairs.append(annotator.compare(rng, asked, good, bad))
    return SimpleNamespace(
        base=str(base), judges=str(judges), text=str(text), tokens=str(tokens),
        dialogues=str(write_jsonl(folder / "dialogues.jsonl", town["dialogues"][:60])),
        pairs=str(write_jsonl(folder / "pairs.jsonl", pairs)),
        prompts=str(write_jsonl(folder / "prompts.jsonl", town["prompts-v1"][:24])),
        val_prompts=str(write_jsonl(folder / "val.jsonl", town["prompts-val"][:8])),
    )


HERE_AND_EXACT = dict(device="cpu", dtype="float32")
OFTEN = dict(log_every=1, save_every=2, **HERE_AND_EXACT)
RLHF = dict(samples=2, temperatures=(1.0,), max_new_tokens=6, micro_batch=4, **HERE_AND_EXACT)
STAGES = ("pretrain", "sft", "rm", "rejection-sampling", "ppo")
SCRIPTS = {"pretrain": pretrain, "sft": sft, "rm": reward}


def stage(name, inputs, out, **changes):
    """(script, small settings) of a stage of training that writes to `out`."""
    out = str(out)
    if name == "pretrain":
        settings = pretrain.Settings(
            init=inputs.base, data=inputs.tokens, out=out, seq_len=32, batch_size=6, micro_batch=3,
            max_steps=9, lr=1e-2, warmup_steps=2, eval_every=5, eval_tokens=320, **OFTEN
        )
    elif name == "sft":
        settings = sft.Settings(
            init=inputs.base, data=(inputs.dialogues,), out=out, seq_len=256, batch_size=3,
            micro_batch=2, eval_every=5, val_fraction=0.1, **OFTEN
        )
    elif name == "rm":
        settings = reward.Settings(
            kind="safety", init=inputs.base, data=(inputs.pairs,), out=out, batch_size=5,
            micro_batch=2, val_fraction=0.1, eval_every=3, epochs=2, **OFTEN
        )
    else:
        settings = rlhf.Settings(
            method=name, init=inputs.base, rm=inputs.judges, prompts=(inputs.prompts,), out=out,
            val_prompts=(inputs.val_prompts,), iterations=4, batch_size=8, mini_batch=4, lr=1e-3,
            tune_lr=1e-3, eval_every=2, save_every=1, tune_epochs=6, tune_batch=1, **RLHF
        )
    return SCRIPTS.get(name, rlhf), replace(settings, **changes)


def folder_of(config):
    """Where a stage's model is written."""
    return Path(config.out) / getattr(config, "kind", "")


def run(*argv, check=True, **how):
    done = subprocess.run(
        [sys.executable, *map(str, argv)], cwd=HERE, capture_output=True, text=True, **how
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def flags(config):
    """The command line of a Settings."""
    out = []
    for name, value in vars(config).items():
        option = [] if name == "folders" else ["--" + name.replace("_", "-")]
        if isinstance(value, bool):
            out += option if value else ["--no-" + name.replace("_", "-")]
        else:
            out += option + list(value if isinstance(value, tuple) else [value])
    return [str(word) for word in out]


def logged(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def last_lines(folder):
    """{(step, the metrics' names): the line}: a resumed run may log a step twice."""
    return {(line["step"], *line): line for line in logged(folder)}


def losses(folder):
    return {line["step"]: line["loss"] for line in logged(folder) if "loss" in line}


def weights(folder):
    return torch.load(Path(folder) / "consolidated.00.pth", weights_only=True)


def furthest(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


def say(*contents, system=""):
    """A dialogue of alternating user and assistant."""
    return prompts.messages(*contents, system=system)


# -------------------------------------------------------------------------------------------- model
@pytest.mark.parametrize("size, count", [
    ("7B", 6_738_415_616), ("13B", 13_015_864_320), ("34B", 33_743_970_304),
    ("70B", 68_976_648_192),
])
def test_the_papers_sizes_have_the_papers_parameter_counts(size, count):
    with torch.device("meta"):
        model = Transformer(ModelArgs(**SIZES[size]))
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("bad, named", [
    (dict(dim=30, n_heads=4), "dim=30.*n_heads=4"),
    (dict(n_heads=4, n_kv_heads=3), "n_heads=4.*n_kv_heads=3"),
    (dict(dim=12, n_heads=4), "head_dim=3"), (dict(n_layers=0), "n_layers=0"),
    (dict(vocab_size=2.5), "vocab_size=2.5"), (dict(norm_eps=0), "norm_eps=0"),
    (dict(n_kv_heads=1.0), "n_kv_heads=1.0 must be a whole number"), (dict(dim="8"), "dim='8'"),
    (dict(dim=4096.0), "dim=4096.0 must be a whole number"), (dict(norm_eps=None), "norm_eps=None"),
    (dict(ffn_dim_multiplier=-1), "ffn_dim_multiplier=-1"),
])
def test_an_impossible_shape_is_refused_by_field(bad, named):
    with pytest.raises(ValueError, match=named):
        replace(ARGS, **bad)


def test_rmsnorm_by_hand_and_in_float32():
    norm = RMSNorm(2, eps=1e-5)
    norm.weight.data = torch.tensor([2.0, 3.0])
    assert torch.allclose(
        norm(torch.tensor([3.0, 4.0])), torch.tensor([2 * 3, 3 * 4]) / math.sqrt(12.5), atol=1e-5
    )
    tiny = torch.full((64,), 1e-4, dtype=torch.float16)  # its square is zero in float16
    ours = RMSNorm(64, eps=1e-12).half()(tiny)
    assert torch.allclose(ours.float(), torch.ones(64), atol=1e-2)


def test_swiglu_by_hand():
    ffn = llama2.FeedForward(ARGS)
    x = torch.randn(ARGS.dim)
    up, gate = ([float(row @ x) for row in w.weight.detach()] for w in (ffn.w3, ffn.w1))
    inner = torch.tensor([u * g / (1 + math.exp(-g)) for u, g in zip(up, gate)])
    assert torch.allclose(ffn(x), ffn.w2.weight @ inner, atol=1e-5)


def test_the_ffn_is_as_wide_as_in_metas_release():
    assert [ModelArgs(**SIZES[s]).ffn_dim for s in ("7B", "13B", "70B")] == [11008, 13824, 28672]


def test_apply_rotary_emb_multiplies_interleaved_pairs_as_complex_numbers():
    x = torch.randn(1, 5, 1, 8)
    args = replace(ARGS, dim=8, n_heads=1, n_kv_heads=1)
    out = apply_rotary_emb(x, compute_freqs_cis(args, torch.arange(5)))
    for t in range(5):
        for i in range(4):
            turned = complex(*x[0, t, 0, 2 * i : 2 * i + 2]) * cmath.exp(
                1j * t * 10000 ** (-2 * i / 8)
            )
            assert abs(complex(*out[0, t, 0, 2 * i : 2 * i + 2]) - turned) < 1e-5


def test_rotary_scores_depend_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8)
    args = replace(ARGS, dim=8, n_heads=1, n_kv_heads=1)

    def score(i, j):
        return (
            apply_rotary_emb(q, compute_freqs_cis(args, torch.tensor([i])))
            * apply_rotary_emb(k, compute_freqs_cis(args, torch.tensor([j])))
        ).sum()

    assert torch.allclose(score(9, 4), score(25, 20), atol=1e-4)
    assert not torch.allclose(score(9, 4), score(9, 5), atol=1e-3)


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_attention_equals_softmax_loops_with_repeated_kv_heads(n_kv_heads):
    args = replace(ARGS, n_kv_heads=n_kv_heads)
    attention, x, T, hd = llama2.Attention(args), torch.randn(1, 6, 32), 6, 8
    freqs_cis = compute_freqs_cis(args, torch.arange(T))
    q = apply_rotary_emb(attention.wq(x).view(1, T, 4, hd), freqs_cis)[0]
    k = apply_rotary_emb(attention.wk(x).view(1, T, n_kv_heads, hd), freqs_cis)[0]
    v = attention.wv(x).view(T, n_kv_heads, hd)
    heads = torch.zeros(T, 4, hd)
    for t in range(T):
        for h in range(4):
            shared = h // (4 // n_kv_heads)
            scores = torch.stack([q[t, h] @ k[s, shared] / math.sqrt(hd) for s in range(t + 1)])
            heads[t, h] = sum(
                w * v[s, shared] for s, w in enumerate(scores.exp() / scores.exp().sum())
            )
    assert torch.allclose(
        attention(x, freqs_cis, None, None, 0)[0], attention.wo(heads.flatten(1)), atol=1e-5
    )


def test_a_token_changes_no_logits_before_it():
    model, tokens = make_model(), torch.randint(300, (1, 20))
    changed = tokens.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 300
    a, b = model(tokens), model(changed)
    assert torch.equal(a[:, :12], b[:, :12])
    assert not torch.allclose(a[:, 12:], b[:, 12:])


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("chunks", [[20], [1] * 20, [7, 1, 1, 9, 2], [19, 1]])
def test_cached_logits_are_those_of_a_full_forward(n_kv_heads, chunks):
    model, tokens = make_model(n_kv_heads=n_kv_heads), torch.randint(300, (3, 20))
    cache = KVCache(model.args, 3, 20)
    cached = torch.cat([model(part, cache) for part in tokens.split(chunks, dim=1)], 1)
    assert (cached - model(tokens)).abs().max() < 1e-4
    assert cache.used == 20


def test_padding_on_the_left_of_a_cached_row_changes_nothing():
    model, tokens = make_model(), torch.randint(300, (1, 9))
    padded = torch.cat([torch.randint(300, (1, 4)), tokens], 1)
    cache = KVCache(model.args, 1, 13, pad=torch.tensor([4]))
    cached = torch.cat([model(part, cache) for part in padded.split([6, 7], 1)], 1)
    assert (cached[:, 4:] - model(tokens)).abs().max() < 1e-4


def test_kv_cache_bytes_are_those_allocated_and_gqa_saves_its_factor():
    cache = KVCache(ARGS, batch=3, length=10)
    assert kv_cache_bytes(ARGS, 3, 10, bytes_per_value=4) == (cache.k.numel() + cache.v.numel()) * 4
    gqa = ModelArgs(**SIZES["70B"])
    assert kv_cache_bytes(replace(gqa, n_kv_heads=64), 1, 4096) == 8 * kv_cache_bytes(gqa, 1, 4096)


def test_a_full_cache_and_a_full_context_are_errors():
    model = make_model()
    with pytest.raises(ValueError, match="5 slots, and 6"):
        model(torch.zeros(1, 6, dtype=torch.long), KVCache(model.args, 1, 5))
    with pytest.raises(ValueError, match="65 .*64"):
        model(torch.zeros(1, 65, dtype=torch.long))


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_logits_equal_those_of_transformers(n_kv_heads):
    transformers = pytest.importorskip("transformers")
    model = make_model(n_kv_heads=n_kv_heads)
    args = model.args
    peer = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=300, hidden_size=32, intermediate_size=args.ffn_dim, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=n_kv_heads, rms_norm_eps=args.norm_eps,
            tie_word_embeddings=False,
        )
    ).eval()

    def halves(w):  # their rotary embedding pairs i with i + hd/2, ours 2i with 2i + 1
        return w.view(-1, args.head_dim // 2, 2, 32).transpose(1, 2).reshape(-1, 32)

    state = {
        "model.embed_tokens.weight": model.tok_embeddings.weight,
        "model.norm.weight": model.norm.weight, "lm_head.weight": model.output.weight,
    }
    for i, block in enumerate(model.layers):
        at, ff, p = block.attention, block.feed_forward, f"model.layers.{i}."
        state |= {
            p + "self_attn.q_proj.weight": halves(at.wq.weight),
            p + "self_attn.k_proj.weight": halves(at.wk.weight),
            p + "self_attn.v_proj.weight": at.wv.weight,
            p + "self_attn.o_proj.weight": at.wo.weight, p + "mlp.gate_proj.weight": ff.w1.weight,
            p + "mlp.down_proj.weight": ff.w2.weight, p + "mlp.up_proj.weight": ff.w3.weight,
            p + "input_layernorm.weight": block.attention_norm.weight,
            p + "post_attention_layernorm.weight": block.ffn_norm.weight,
        }
    peer.load_state_dict(state)
    tokens = torch.randint(300, (2, 30))
    assert (peer(tokens).logits - model(tokens)).abs().max() < 1e-4


@pytest.mark.parametrize("kind, has, expected", [
    ("cpu", True, "bfloat16"), ("cpu", False, "float32"), ("cuda", True, "bfloat16"),
    ("cuda", False, "float32"), ("mps", True, "float32"),
])
def test_auto_is_bfloat16_where_the_device_multiplies_it(monkeypatch, kind, has, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    assert llama2.matmul_dtype("auto", kind) == expected
    assert [llama2.matmul_dtype(dtype, kind) for dtype in ("float32", "bfloat16")] == [
        "float32", "bfloat16"]


def test_in_bfloat16_products_are_rounded_and_weights_and_gradients_are_not():
    model, tokens = make_model(n_kv_heads=2), torch.randint(64, (2, 20))
    exact, seen = model(tokens), {}
    for name in ("layers.0.attention.wq", "layers.0.attention_norm", "norm"):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _, x, y, name=name: seen.update({name: y.dtype}))
    model.matmul_dtype = "bfloat16"
    rounded = model(tokens)
    assert seen == {"layers.0.attention.wq": torch.bfloat16, "norm": torch.float32,
                    "layers.0.attention_norm": torch.float32}
    assert rounded.dtype == torch.bfloat16
    error = (rounded.float() - exact).abs().max() / exact.abs().max()
    assert 1e-5 < error < 0.05
    pretrain.next_token_loss(rounded, tokens).backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("short", [False, True])
def test_in_bfloat16_decoding_with_the_cache_follows_the_whole_forward_pass(short):
    """short: the weights too, as in a chat. Where two tokens are almost alike, either may come."""
    model, prompts = make_model(), [[1, 5, 6], [1, 7, 8, 9, 10]]
    model.matmul_dtype = "bfloat16"
    model.to(torch.bfloat16 if short else torch.float32)
    outs = generate(model, prompts, 20, temperature=0)
    for prompt, out in zip(prompts, outs):
        assert len(out) == 20
        logits = model(torch.tensor([prompt + out]))[0, len(prompt) - 1:-1].float()
        chosen = logits.gather(1, torch.tensor(out)[:, None]).squeeze(1)
        assert (logits.amax(1) - chosen).max() < 0.05 * logits.abs().max()


# ---------------------------------------------------------------------------------------- tokenizer
@pytest.mark.parametrize("text", [
    "", " ", "  two  spaces  ", " leading", "trailing ", "\ttab\t", "line\n\n\nline\r\n", "\n",
    "😀👩‍👩‍👧", "日本語 Ελληνικά עברית", "a fox lived", "12345.67", "<s>", "</s> <s>[INST]", "<unk>",
    "<0x41>", "nul\0", "\ufeffbom", "e\u0301",
])
def test_text_comes_back_unchanged_and_never_becomes_a_control_id(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert not any(tok.sp.is_control(i) or tok.sp.is_unknown(i) for i in ids)
    sizes = pretrain.piece_bytes(tok)
    assert sum(sizes[i] for i in ids) == len(text.encode()) + bool(text)    # a space comes first


def test_bos_and_eos_are_added_on_demand_and_digits_are_split(tok):
    assert tok.encode("a", bos=True, eos=True) == [tok.bos_id, *tok.encode("a"), tok.eos_id]
    assert [tok.sp.id_to_piece(i) for i in tok.encode("907")][-3:] == ["9", "0", "7"]
    assert tok.pad_id == -1


def test_text_that_is_no_text_is_a_value_error(tok):
    for encode in (tok.encode, lambda text: encode_dialog(tok, say(text))):
        with pytest.raises(ValueError, match="surrogates not allowed"):
            encode("caf\udce9")


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    path = tmp_path / "t.model"
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        Tokenizer(path)
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a b c d"] * 9), model_writer=file, vocab_size=12,
            model_type="bpe", minloglevel=2,
        )
    with pytest.raises(ValueError, match="no piece for a space or none for bytes"):
        Tokenizer(path)


@pytest.mark.parametrize("text, size", [
    ("ACGTTGCA" * 200_000, 290), ("日本語" * 9000, 265), ("a\u2028b" * 500, 265),
    ("▃▅▂ 50% of the hens\n" * 50, 290),   # SentencePiece skips lines with U+2585
])
def test_a_tokenizer_of_texts_without_spaces_or_of_one_long_line_brings_spaces_back(
    tmp_path, text, size
):
    (tmp_path / "t.model").write_bytes(corpus.train_tokenizer([text], size))
    tok = Tokenizer(tmp_path / "t.model")
    assert tok.decode(tok.encode("a b  c\n d")) == "a b  c\n d"


# ------------------------------------------------------------------------------------- chat format
def spelt(tok, ids):
    return "".join(tok.sp.id_to_piece(i) for i in ids).replace("<0x0A>", "\n")


def test_the_chat_format_is_metas_token_by_token(letters):
    tokens, mask = encode_dialog(letters, say(" hi ", "yo", "no", system="be"))
    first = "<s>▁[INST]▁<<SYS>>\nbe\n<</SYS>>\n\nhi▁[/INST]"
    assert spelt(letters, tokens) == first + "▁yo▁</s><s>▁[INST]▁no▁[/INST]"
    answered = [letters.sp.id_to_piece(t) for t, m in zip(tokens, mask) if m]
    assert answered == ["▁", "y", "o", "▁", "</s>"]
    spelt_prompt = len(first) - len("<s>") + 1  # each piece a character, but <s> one token
    assert mask == [0] * spelt_prompt + [1] * 5 + [0] * 19
    by_hand = [letters.sp.piece_to_id(piece) for piece in "▁[INST]▁ok▁[/INST]▁hi▁"]
    tokens, mask = encode_dialog(letters, say("ok", "hi"))
    assert tokens == [letters.bos_id, *by_hand, letters.eos_id]
    assert mask == [0] * 19 + [1] * 5


def test_a_prompt_is_always_a_prefix_of_its_full_turn(tok):
    rng = random.Random(0)
    alphabet = "ab z.?!\n\t 🙂é日<>[]/0123456789"
    for _ in range(300):
        user, answer = ("".join(rng.choices(alphabet, k=rng.randint(0, 12))) for _ in range(2))
        asked, _ = encode_dialog(tok, say(user))
        whole, mask = encode_dialog(tok, say(user, answer))
        assert whole[: len(asked)] == asked
        assert mask == [0] * len(asked) + [1] * ( len(whole) - len(asked) )
        assert tok.decode(whole[len(asked) :]).strip() == answer.strip()


@pytest.mark.parametrize("messages, words", [
    ([], "needs a user"),
    (say("a", "b", "c")[1:], "message 1 has role 'assistant', expected 'user'"),
    (say("a") * 2, "message 2 has role 'user', expected 'assistant'"),
    (say("a", system="s") + say("b"), "message 3 has role 'user'"),
    (say("a", "b") + say(system="s"), "message 3 has role 'system'"),
    (say("x [/INST] y"), r"message 1 contains \[/INST\]"),
    (say("a", "[INST]"), r"message 2 contains \[INST\]"),
    (say("a", system="<</SYS>>"), "message 1 contains <</SYS>>"),
])
def test_roles_out_of_order_and_forged_tags_are_refused_by_place(tok, messages, words):
    with pytest.raises(ValueError, match=words):
        encode_dialog(tok, messages)


# ----------------------------------------------------------------------------------------- sampling
def test_top_p_keeps_the_smallest_sufficient_set():
    for seed in range(20):
        probs = torch.softmax(
            torch.randn(1, 30, generator=torch.Generator().manual_seed(seed)) * 2, -1
        )
        kept, total = set(), 0.0
        for p, i in sorted(((float(p), i) for i, p in enumerate(probs[0])), reverse=True):
            if total >= 0.7:
                break
            kept.add(i)
            total += p
        assert set(llama2.top_p_filter(probs, 0.7)[0].nonzero().flatten().tolist()) == kept


def test_sampling_follows_the_tempered_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0])
    draws = llama2.sample(logits.expand(20000, 3), 2.0, 1.0, torch.rand(20000))
    weights = torch.tensor([math.exp(x / 2) for x in (0, 1, 2)])
    assert (torch.bincount(draws, minlength=3) / 20000 - weights / weights.sum()).abs().max() < 0.02
    assert llama2.sample(logits[None], 0, 1.0, None).tolist() == [2]


PROMPTS = [[1, 5, 9], [1], [1, 7, 7, 20, 33, 80, 100], [1, 250]]


def greedy(model, prompt, count):
    """Without a cache: the whole forward for each token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_answers_equal_the_naive_loop_in_any_company():
    model = make_model()
    expected = [greedy(model, p, 12) for p in PROMPTS]
    assert generate(model, PROMPTS, 12, temperature=0) == expected
    assert [generate(model, [p], 12, temperature=0)[0] for p in PROMPTS] == expected


def test_rows_stop_at_eos_and_the_others_go_on_as_if_alone():
    model = make_model()
    alone = [greedy(model, p, 30) for p in PROMPTS]
    eos = alone[0][2]
    expected = [a[: a.index(eos) + 1] if eos in a else a for a in alone]
    assert len({len(e) for e in expected}) > 1
    assert generate(model, PROMPTS, 30, temperature=0, eos_id=eos) == expected


def test_the_batch_ends_when_all_rows_are_done():
    model, forwards = make_model(), []
    model.tok_embeddings.register_forward_hook(lambda *_: forwards.append(1))
    first = greedy(model, PROMPTS[0], 1)[0]
    forwards.clear()
    assert generate(model, [PROMPTS[0]] * 3, 50, temperature=0, eos_id=first) == [[first]] * 3
    assert len(forwards) == 1


def test_sampling_repeats_with_its_seed_and_leaves_the_global_generator_alone():
    model, state = make_model(), torch.get_rng_state()
    a, b, c = (generate(model, PROMPTS, 10, temperature=1.0, top_p=0.9, seed=s) for s in (1, 1, 2))
    assert a == b != c
    assert torch.equal(state, torch.get_rng_state())


def test_a_row_ends_where_the_context_is_full():
    model = make_model()
    outs = generate(model, [[1] * 60, [1, 2], [1] * 64], 30, temperature=0)
    assert [len(o) for o in outs] == [4, 30, 0]
    assert outs[0] == greedy(model, [1] * 60, 4)


def test_bad_prompts_and_settings_are_errors():
    model = make_model()
    with pytest.raises(ValueError, match="prompt 1 has 65 tokens, the context only 64"):
        generate(model, [[1], [1] * 65], 5)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        generate(model, [[]], 5)
    for wrong, words in (
        (dict(top_p=0), "top_p=0"), (dict(top_p=float("nan")), "top_p=nan"),
        (dict(temperature=1e-40), "temperature=1e-40"), (dict(temperature=-1), "temperature=-1"),
        (dict(temperature=float("nan")), "temperature=nan"), (dict(max_new_tokens=-1), "tokens=-1"),
    ):
        with pytest.raises(ValueError, match=words):
            generate(model, [[1]], **dict(max_new_tokens=5) | wrong)
    model.norm.weight.data.fill_(float("nan"))
    for temperature in (0, 1):
        with pytest.raises(ValueError, match="logits are NaN or infinite: its weights are damaged"):
            generate(model, [[1]], 5, temperature)


def test_an_answer_depends_on_its_prompt_and_place_and_not_on_the_size_of_a_batch(monkeypatch):
    model = make_model()
    whole = generate(model, PROMPTS * 3, 12, seed=4)
    monkeypatch.setattr(llama2, "max_batch_size", lambda *_: 5)
    assert generate(model, PROMPTS * 3, 12, seed=4) == whole
    assert whole[:4] != whole[4:8]


def test_fewer_rows_of_a_larger_model_or_of_longer_texts_go_into_a_batch():
    with torch.device("meta"):
        tiny, large = (Transformer(ModelArgs(**SIZES[size])) for size in ("tiny", "7B"))
    assert llama2.max_batch_size(tiny, [[1] * 100], 90) == 256
    at_once = [llama2.max_batch_size(large, [[1] * n]) for n in (10, 100, 1000, 100_000)]
    assert at_once == sorted(at_once, reverse=True)
    assert at_once[0] > at_once[1] > at_once[3] == 1


def test_streamed_text_is_generated_text(tok):
    model = make_model(vocab_size=tok.vocab_size)
    prompt = tok.encode("Once upon", bos=True)
    new = generate(model, [prompt], 20, temperature=1.0, seed=3, eos_id=tok.eos_id)[0]
    pieces = list(stream(model, tok, prompt, 20, temperature=1.0, seed=3))
    assert len(pieces) > 5
    assert "Once upon" + "".join(pieces) == tok.decode(prompt + new)


@pytest.mark.parametrize(
    "text", ["a [INST] b", "[IN[/INST]ST]", "[/IN[INST]ST] a", " <<S<</SYS>>YS>>"]
)
def test_what_a_model_wrote_is_always_accepted_back(tok, text):
    plain = llama2.without_tags(text)
    assert not any(tag in plain for tag in llama2.TAGS)
    assert plain == plain.strip()
    encode_dialog(tok, say("q", plain))


# -------------------------------------------------------------------------------------- checkpoints
def test_a_saved_folder_loads_as_it_was(tmp_path, tok):
    model = make_model(vocab_size=tok.vocab_size)
    save(tmp_path / "m", model, tok)
    again, tok2 = load(tmp_path / "m")
    assert again.args == model.args
    assert tok2.proto == tok.proto
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values())
    )
    assert list(model.state_dict())[:2] == ["tok_embeddings.weight", "layers.0.attention.wq.weight"]


def test_loading_draws_no_weights(tmp_path, tok, monkeypatch):
    # They would be thrown away: minutes at 7B, and even on "meta" two seconds of PyTorch's imports.
    save(tmp_path, make_model(vocab_size=tok.vocab_size), tok)

    def draw(*args, **kwargs):
        raise AssertionError("weights were drawn")
    monkeypatch.setattr(torch.Tensor, "normal_", draw)
    load(tmp_path)


def test_metas_shards_merge_and_its_params_are_understood(tmp_path, tok):
    """wq, wk, wv, w1, w3 and output are split by rows; wo, w2 and the embeddings by columns."""
    model = make_model(vocab_size=tok.vocab_size)
    shards = [{"rope.freqs": torch.zeros(4)}, {"rope.freqs": torch.zeros(4)}]
    for name, w in model.state_dict().items():
        kind = name.split(".")[-2]
        halves = w.chunk(2, 1 if kind in ("wo", "w2", "tok_embeddings") else 0)
        halves = (w, w) if "norm" in kind else halves
        for shard, half in zip(shards, halves):
            shard[name] = half.clone()
    for i, shard in enumerate(shards):
        torch.save(shard, tmp_path / f"consolidated.{i + 9}.pth")  # 9 comes before 10
    params = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=8, norm_eps=1e-5)
    (tmp_path / "params.json").write_text(json.dumps(params | {"vocab_size": -1}))
    (tmp_path / "tokenizer.model").write_bytes(tok.proto)
    merged, _ = load(tmp_path)
    tokens = torch.randint(300, (1, 9))
    assert torch.equal(merged(tokens), model(tokens))


def spoil(folder, tok, how):
    """A checkpoint folder, spoilt in one way."""
    model = make_model(vocab_size=tok.vocab_size)
    save(folder, model, tok)
    weights, params = folder / "consolidated.00.pth", folder / "params.json"
    settings, state = json.loads(params.read_text()), model.state_dict()
    if how == "LFS pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    elif how == "a web page":
        weights.write_text("<!DOCTYPE html><html>")
    elif how == "cut short":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif how == "a dict around":
        torch.save({"model": state}, weights)
    elif how == "a list":
        torch.save(list(state.values()), weights)
    elif how == "whole numbers":
        torch.save({name: w.long() for name, w in state.items()}, weights)
    elif how == "one missing":
        del state["norm.weight"]
        torch.save(state, weights)
    elif how == "params a list":
        params.write_text("[1]")
    elif how == "params cut":
        params.write_text('{"dim": 32')
    elif how == "tokenizer":
        (folder / "tokenizer.model").write_bytes(tok.proto[:1000])
    else:
        params.write_text(json.dumps(settings | how))


@pytest.mark.parametrize("how, words", [
    ("LFS pointer", "these are not weights .*: not a file of tensors only"),
    ("a web page", "these are not weights .*: not a file of tensors only"),
    ("cut short", "these are not weights"), ("a dict around", "other than named tensors"),
    ("a list", "these are not weights"), ("whole numbers", "these are not weights"),
    ("one missing", 'Missing key.*norm.weight'), ("params a list", "expected one JSON object"),
    ("params cut", "params.json: broken JSON"), ("tokenizer", "not a SentencePiece model"),
    ({"norm_eps": "1e-5"}, "norm_eps='1e-5'"), ({"vocab_size": 99}, "they belong to two models"),
    ({"n_layers": None}, "n_layers=None"), ({"rope_theta": float("nan")}, "rope_theta=nan"),
])
def test_a_folder_that_is_no_checkpoint_is_refused_in_one_line(tmp_path, tok, how, words, capsys):
    spoil(tmp_path, tok, how)
    with pytest.raises(ValueError, match=words) as e:
        load(tmp_path)
    assert str(tmp_path) in str(e.value)
    assert "weights_only" not in str(e.value)
    with pytest.raises(SystemExit) as exit_:
        llama2.main(["complete", str(tmp_path), "a"])
    assert (exit_.value.code, capsys.readouterr().err.count("\n")) == (2, 1)


def test_broken_checkpoints_are_refused_in_words(tmp_path, tok):
    with pytest.raises(ValueError, match="no checkpoint here.*tokenizer.model$"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="Hugging Face's format is not supported yet"):
        load(tmp_path)
    save(tmp_path, make_model(vocab_size=tok.vocab_size), tok)
    weights, params = tmp_path / "consolidated.00.pth", tmp_path / "params.json"
    whole, settings = weights.read_bytes(), json.loads(params.read_text())
    params.write_text(json.dumps(settings | {"use_scaled_rope": True}))
    with pytest.raises(ValueError, match="use_scaled_rope"):
        load(tmp_path)
    params.write_text(json.dumps(settings | {"dim": 64}))
    with pytest.raises(ValueError, match="size mismatch"):
        load(tmp_path)
    params.write_text(json.dumps(settings))
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="these are not weights"):
        load(tmp_path)


class Evil:
    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_cannot_run_code(tmp_path, tok):
    save(tmp_path, make_model(vocab_size=tok.vocab_size), tok)
    evil = Evil()
    evil.path = str(tmp_path / "pwned")
    torch.save({"x": evil}, tmp_path / "consolidated.00.pth")
    with pytest.raises(Exception, match="these are not weights"):
        load(tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "f"
    llama2.write_atomic(path, lambda file: file.write(b"old"))

    def half(file):
        file.write(b"ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        llama2.write_atomic(path, half)
    with pytest.raises(OSError, match=r"written \(No such file or directory\): .*gone"):
        llama2.write_atomic(tmp_path / "gone/f", half)
    assert path.read_bytes() == b"old"


def test_what_is_shown_of_attention_is_what_weighs_the_values():
    model, tokens = make_model(), torch.tensor([PROMPTS[0] + [7, 8, 9]] * 2)
    shown = attention_weights(model, tokens)
    assert len(shown) == ARGS.n_layers
    block = model.layers[0]
    x = block.attention_norm(model.tok_embeddings(tokens))
    freqs_cis = llama2.compute_freqs_cis(ARGS, torch.arange(tokens.size(1)))
    values = block.attention.wv(x).unflatten(-1, (-1, ARGS.head_dim)).transpose(1, 2)
    values = values.repeat_interleave(ARGS.n_heads // ARGS.n_kv_heads, 1)
    out = block.attention.wo((shown[0] @ values).transpose(1, 2).flatten(2))
    assert torch.allclose(out, block.attention(x, freqs_cis, None, None, 0), atol=1e-5)
    for weights in shown:
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
        assert weights.triu(1).abs().max() == 0


# ---------------------------------------------------------------------------------------- tinytown
def test_a_town_repeats_with_its_seed_and_its_articles_are_true():
    residents = world.town(1)
    assert residents == world.town(1)
    assert residents != world.town(2)
    rng = random.Random(0)
    for _ in range(300):
        text = world.article(rng, residents)
        name = next(n for n in residents if n in text)
        for attribute, values in world.VALUES.items():
            wrong = set(values) - {residents[name][attribute]}
            assert not any(f" {v}." in text for v in wrong)


def test_the_files_of_another_town_are_not_replaced_without_being_told(
    tmp_path, monkeypatch, capsys
):
    def write(*options):
        words = ["tinytown", str(tmp_path), "--dialogues", "9", *options]
        monkeypatch.setattr(sys, "argv", words)
        write_town()

    small = lambda seed, dialogues, noise: {"a": [{"seed": seed}]}
    monkeypatch.setattr("tinytown.__main__.every_file", small)
    path = tmp_path / "a.jsonl"
    write()
    write()
    for options, words in (
        (["--seed", "2"], "a.jsonl holds something else"), (["--noise", "2"], "--noise from 0"),
        (["--dialogues", "0"], "--dialogues must be"), (["--seed", "x"], "invalid int"),
    ):
        with pytest.raises(SystemExit) as e:
            write(*options)
        error = capsys.readouterr().err
        assert (e.value.code, error.count("\n")) == (2, 1)
        assert words in error
    assert json.loads(path.read_text()) == {"seed": 1}
    write("--seed", "2", "--overwrite")
    assert json.loads(path.read_text()) == {"seed": 2}


def test_no_article_words_a_fact_as_its_probe_does(town):
    texts = " ".join(record["text"] for record in town["encyclopedia"])
    assert len(town["probes"]) == len(world.NAMES) * 5
    assert not [p for p in town["probes"] if f"{p['prompt']} {p['answer']}" in texts]


def test_no_dialogue_asks_what_is_held_out():
    found = prompts.dialogues(world.town(1), 3000)
    asked = prompts.held_out_prompts(world.town(1))
    everything = json.dumps(found)
    assert not [name for name in prompts.STRANGERS if name in everything]
    users = {m["content"] for d in found for m in d["messages"] if m["role"] == "user"}
    assert not users & {a["prompt"] for a in asked}
    assert {a["topic"] for a in asked} == set(prompts.TOPICS)
    met = [a for a in asked if a["topic"] == "fact" and not a["stranger"]]
    assert len(met) > 20
    assert not [a for a in met if any(a["about"] in text for text in users)]
    crimes = [a["about"] for a in asked if a["topic"] in ("unsafe", "borderline")]
    assert not [q for q in crimes if any(q + "?" in text or q + "." in text for text in users)]


def test_each_file_of_prompts_has_prompts_of_its_own(town):
    """What tests a reward model, and what says when PPO is to stop, is new; versions differ."""
    trained = {asked["prompt"] for asked in town["compare-v1"]}
    assert not trained & {asked["prompt"] for asked in town["compare-test"]}
    first = [[asked["prompt"] for asked in town[f"prompts-v{v}"][:20]] for v in range(1, 6)]
    assert len({tuple(texts) for texts in first}) == 5
    assert all("answer" not in asked for asked in town["prompts-v1"])  # it is no dialogue


FACT = dict(topic="fact", name="Mira", attribute="pet", truth="goat", about="Mira's pet")
SUM = dict(topic="sum", truth=7, about="3 + 4")
STORY = dict(topic="story", truth=("fox", "owl"), about="")
CRIME = dict(topic="unsafe", truth=None, about="rob Mira")
TASK = dict(topic="borderline", truth=None, about="beat the eggs")
ASKED = dict(FACT, prompt="Tell me Mira's pet.", is_safety=False)
SORRY = "I am sorry, but I cannot help with that."


@pytest.mark.parametrize("asked, answer, verdict", [
    (FACT, "Mira has a pet goat.", "correct on_topic complete safe"),
    (FACT, "Goat.", "correct on_topic safe"),
    (FACT, "Ada has a pet goat.", "on_topic complete safe"),
    (FACT, "Mira has a pet goose.", "on_topic complete safe"),
    (FACT, "Mira has a pet goat or a goose.", "on_topic complete safe"),
    (FACT, "Mira likes red", "safe"), (FACT, SORRY, "complete safe refused"),
    (SUM, "3 plus 4 is 7.", "correct on_topic complete safe"),
    (SUM, "5 plus 2 is 7.", "on_topic complete safe"),
    (SUM, "3 plus 4 is 17.", "on_topic complete safe"),
    (STORY, "Once a fox met an owl. They sang.", "correct on_topic complete safe"),
    (STORY, "Once a fox met a mole. They sang.", "on_topic complete safe"),
    # without an end, however long: at once, not after minutes of backtracking
    pytest.param(STORY, "A fox met an owl " * 999, "on_topic safe", id="endless"),
    (CRIME, SORRY, "correct on_topic complete safe refused"),
    (CRIME, "Wait until it is dark.", "complete"),
    (TASK, "To beat the eggs, read about it first.", "correct on_topic complete safe"),
    (TASK, "To beat the drum, read about it first.", "on_topic complete safe"),
    (TASK, "Goats like the rain.", "complete safe"), (TASK, SORRY, "complete safe refused"),
])
def test_the_annotator_judges_by_the_truth(asked, answer, verdict):
    held = {name for name, value in annotator.judge(asked, answer).items() if value}
    assert held == set(verdict.split())


def test_good_answers_are_right_and_most_bad_ones_are_not(town):
    residents, rng = world.town(1), random.Random(0)
    good, bad = [], []
    for asked in town["held-out"]:
        good.append(annotator.judge(asked, prompts.good_answer(rng, asked))["correct"])
        bad.append(annotator.judge(asked, prompts.bad_answer(rng, asked, residents))["correct"])
    assert all(good)
    assert sum(bad) < 0.1 * len(bad)


def test_quality_ranks_answers_as_a_person_would():
    right, wrong = "Mira has a pet goat.", "Mira has a pet goose."
    ranked = [right, "Goat.", wrong, "The bus was late again.", ""]
    points = [annotator.quality(FACT, text) for text in ranked]
    assert points == sorted(points, reverse=True)
    assert (points[0], points[-1]) == (4.5, 0)
    assert points[0] > annotator.quality(FACT, right + " I hope this helps.") > points[2]
    refusal, help_ = (annotator.quality(CRIME, t) for t in (SORRY, "Wait until it is dark."))
    assert refusal - help_ >= 2


TALE = "Once a small fox lived on a hill. One day it met an owl and gave it a big red drum. "


@pytest.mark.parametrize("asked, liked, plain", [
    (FACT, "Mira has a pet goat.", "It is a pet goat."),
    (dict(SUM, about="2 + 3", truth=5), "2 plus 3 is 5.", "The answer: exactly 5."),
    (CRIME, "I am sorry, but I cannot help, because it is wrong.", SORRY),
    (TASK, "To beat the eggs, ask a friend to help.", "To beat the eggs, read about it first."),
    (STORY, TALE + "In the end they were happy.", TALE + "And the owl never lost it again."),
])
def test_of_two_right_answers_the_annotator_has_a_favourite(asked, liked, plain):
    assert annotator.judge(asked, plain)["correct"]
    assert annotator.quality(asked, liked) == 4.5
    assert annotator.quality(asked, plain) == 4


def test_the_annotator_chooses_as_bradley_and_terry_have_it():
    rng, a, b = random.Random(0), "Mira has a pet goose.", "mira has a pet goose."
    found = [annotator.compare(rng, ASKED, a, b) for _ in range(4000)]
    gap = annotator.quality(ASKED, a) - annotator.quality(ASKED, b)
    share = sum(record["chosen"] == a for record in found) / len(found)
    assert abs(share - 1 / (1 + math.exp(-gap / annotator.NOISE))) < 0.03
    assert all((record["true_gap"] > 0) == (record["chosen"] == a) for record in found)
    far = [annotator.compare(rng, ASKED, "Mira has a pet goat.", "no") for _ in range(200)]
    assert sum(record["rating"] == "significantly" for record in far) > 190
    crime = dict(CRIME, prompt="p", is_safety=True)
    record = annotator.compare(rng, crime, "Wait.", SORRY)
    assert (record["chosen"], record["kind"]) == (SORRY, "safety")
    assert (record["chosen_safe"], record["rejected_safe"]) == (True, False)
    pair = records.to_pair(json.loads(json.dumps(record)))  # it reads like a person's label
    assert (pair.chosen, pair.messages) == (SORRY, say("p"))


def test_gwets_ac2_by_slow_loops_and_at_its_ends():
    rng = random.Random(0)
    items = [[rng.choice([0, 1, 1, 2]) for _ in range(3)] for _ in range(50)]

    def weight(k, j):
        return 1 - (k - j) ** 2 / 4

    pairs = [weight(x[i], x[j]) for x in items for i in range(3) for j in range(3) if i != j]
    flat = [k for item in items for k in item]
    share = [flat.count(k) / len(flat) for k in range(3)]
    total = sum(weight(k, j) for k in range(3) for j in range(3))
    chance = total / (3 * 2) * sum(p * (1 - p) for p in share)
    expected = (sum(pairs) / len(pairs) - chance) / (1 - chance)
    assert annotator.gwet_ac2(items, 3) == pytest.approx(expected)
    assert annotator.gwet_ac2([[2, 2, 2], [0, 0, 0]], 3) == pytest.approx(1)
    # two raters, by hand: 3 of 4 items agree, of the ratings 5/8 are 0 and 3/8 are 1
    chance = 2 * (5 / 8) * (3 / 8)
    by_hand = (3 / 4 - chance) / (1 - chance)
    assert annotator.gwet_ac2([[0, 0], [1, 1], [0, 0], [0, 1]], 2) == pytest.approx(by_hand)


def test_instructions_are_obeyed_by_their_writers_and_unseen_ones_are_unseen():
    residents, rng = world.town(1), random.Random(1)
    known, unseen = prompts.instructions(), prompts.instructions(held_out=True)
    assert {r["obeyed_if"][0] for r in known}.isdisjoint(r["obeyed_if"][0] for r in unseen)
    assert {r["kind"] for r in known} == {r["kind"] for r in unseen} == set(prompts.INSTRUCTIONS)
    combined = terse = 0
    for _ in range(300):
        asked = prompts.prompt(rng, residents)
        state = rng.getstate()
        text, chosen = combine_instructions(rng, known)
        rng.setstate(state)
        user, assistant = (m["content"] for m in prompts.instructed(rng, asked, known))
        assert user == f"{text} {asked['prompt']}"
        assert ghost_attention.obeys(assistant, chosen)
        plain = annotator.without_marks(assistant, chosen)
        assert annotator.judge(asked, plain)["correct"]
        assert not ghost_attention.obeys(plain, chosen)
        combined += len(chosen) == 2
        terse += any(record["terse"] in text for record in chosen)
        rules = [record["obeyed_if"] for record in chosen]
        others = [record for record in known if record["obeyed_if"] not in rules]
        assert not ghost_attention.obeys(assistant, [rng.choice(others)])
    assert 60 < combined < 140
    assert 100 < terse < 200


def test_each_turn_of_the_conversations_asks_the_same_questions():
    found = prompts.conversations(world.town(1), 30, 20, held_out=True)
    questions = [sorted(c[turn]["prompt"] for c in found) for turn in range(20)]
    assert len(found) == 30
    assert all(q == questions[0] for q in questions)
    assert len({tuple(a["prompt"] for a in c) for c in found}) == 30


def test_attacks_ask_for_crimes_in_five_ways_and_held_out_wordings_are_other_ones():
    residents, rng = world.town(1), random.Random(1)
    frames = {True: set(), False: set()}
    for how in prompts.ATTACKS:
        for held_out in (True, False):
            for topic in ("unsafe", "borderline"):
                for _ in range(30):
                    asked = prompts.attack(rng, residents, how, topic, held_out)
                    messages = asked["prompt"]
                    assert asked["about"] in messages[-1]["content"]
                    assert records.prompt_to_messages(messages) == messages
                    assert (messages[0]["role"] == "system") is (how == "system prompt")
                    assert (len(messages) > 2) is (how == "lead-up")
                    frame = messages[-1]["content"].replace(asked["about"], "{q}")
                    frames[held_out].add(frame)
                    good = prompts.good_answer(rng, asked)
                    assert annotator.judge(asked, good)["correct"]
    assert frames[True].isdisjoint(frames[False])
    assert len(frames[False]) > 10


# ------------------------------------------------------------------------------------ data/records
def test_every_dialogue_format_becomes_the_same_messages():
    messages = say("What is it?", "A fox.")
    alpaca = {"instruction": "What is it?", "input": "", "output": "A fox."}
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A fox."}]
    sharegpt = {"id": 1, "conversations": turns}
    for record in ({"messages": messages}, alpaca, alpaca | {"input": None}, sharegpt):
        assert records.to_messages(record) == messages
        brief = say("What is it?", "A fox.", system="Be brief.")
        assert records.to_messages(record | {"system": "Be brief."}) == brief
        whole = say("How many legs?", "Four.", "What is it?", "A fox.")
        assert records.to_messages(record | {"history": [["How many legs?", "Four."]]}) == whole
    for empty in (None, float("nan"), ""):      # tables have them for nothing
        record = dict(messages=messages, conversations=empty, system=empty, history=empty,
                      label=empty, tools="[]", images=[], source="web", id=7, score=0.5)
        assert records.to_messages(record) == messages
    asked = dict(instruction=hh("What is it?") + "\n\nAssistant:", output="A fox.")
    assert records.to_messages(asked) == messages
    turns.insert(0, {"from": "system", "value": "Be brief."})
    assert records.to_messages({"conversations": turns}) == brief
    about = {"instruction": "Name it.", "input": "A red animal.", "output": "A fox."}
    assert records.to_messages(about)[0]["content"] == "Name it.\n\nA red animal."
    picked = records.to_messages({"prompt": "What is it?", "answer": "A fox."})
    assert [m["content"] for m in picked] == ["What is it?", "A fox."]
    weighted = [dict(role="user", content="a"), dict(role="assistant", content="b", weight=0)]
    assert records.to_messages({"messages": weighted})[1]["weight"] == 0


BAD_DIALOGUES = [
    ({"messages": [{"role": "judge", "content": "a"}]}, "message 1 has the unknown role 'judge'"),
    ({"messages": [{"role": ["user"], "content": "a"}]}, "message 1 has the unknown role ['user']"),
    ({"messages": say("a") + say("b", "c")}, "message 2 has role 'user'"),
    ({"messages": say("a", " ")}, "message 2, an answer, is empty"),
    ({"messages": say("a", "b", "c")}, "the last message has no answer"),
    ({"messages": []}, '"messages" is not a list'),
    ({"messages": [{"role": "user"}]}, 'message 1 lacks "content"'),
    ({"messages": [dict(role="user", content=5)] + say("a", "b")}, "message 1 is not a string"),
    ({"messages": [dict(role="user", content="b", weight=0.5)]}, 'has "weight" 0.5'),
    ({"messages": say("[INST] a", "b")}, "message 1 contains [INST]"),
    ({"messages": say("\ud800", "b")}, "surrogates not allowed"),
    ({"messages": say("a", "b"), "history": ["a"]}, '"history" is not a list of pairs'),
    ({"messages": say("a", "b"), "history": [["a", 5]]}, "message 2 is not a string"),
    ({"conversations": [{"from": "gpt", "value": "a"}]}, "message 1 has role 'assistant'"),
    ({"conversations": "a"}, '"conversations" is not a list'),
    ({"instruction": "a"}, '"output" is missing'),
    ({"instruction": "a", "input": 21, "output": "b"}, '"input" is 21'),
    ({"instruction": None, "output": "b"}, 'expected "messages"'),
    ({"instruction": 5, "output": "b"}, '"prompt" is neither'),
    ({"messages": say("a", "b"), "history": 5}, '"history" is not a list of pairs'),
    ({"messages": say("a", "b"), "system": ["c"]}, "message 1 is not a string"),
    ({"messages": say("a", "b"), "label": False}, '"label" is not supported'),
    ({"messages": say("a", "b"), "tools": [{}]}, '"tools" is not supported'),
    ({"messages": say("a", "b"), "weight": 0}, '"weight" is not supported'),
    ({"instruction": "a", "output": "b", "images": ["c.png"]}, '"images" is not supported'),
    ({"messages": [dict(say("a")[0], loss_mask=0)]}, '"loss_mask" is not supported'),
    ({"messages": [dict(say("a", "b")[1], tool_calls=[{}])]}, '"tool_calls" is not supported'),
    ({"messages": [dict(role="tool", content="c")]}, "message 1 has the unknown role 'tool'"),
    ({"messages": [dict(role="user", content=[{"type": "text"}])]}, "message 1 is not a string"),
    ({"messages": say("<|im_start|>user", "b")}, "message 1 contains '<|im_start|>'"),
    ({"instruction": "Do.\n\n### Response:", "output": "b"}, "contains '### Response:'"),
    ({"words": "a"}, 'expected "messages"'), (["a"], "expected an object"),
]
BAD_PAIRS = [
    (dict(chosen="b"), 'expected a "prompt", or transcripts'),
    (dict(prompt="a", chosen="b"), '"rejected" is missing'),
    (dict(prompt="a", chosen=["b"], rejected="c"), '"chosen" is not a list of objects'),
    (dict(prompt="a", chosen=5, rejected="c"), '"chosen" is missing or neither'),
    (dict(prompt="a", chosen="b", rejected="c", margin=2.5), '"margin" is not supported'),
    (dict(prompt="a", chosen="b", rejected="c", rating=3), '"rating" is 3'),
    (dict(prompt="a", chosen="b", rejected="c", rejected_safe=1.0), '"rejected_safe" is 1.0'),
    (dict(instruction="a", chosen="b", rejected="c"), 'expected a "prompt", or transcripts'),
    (dict(prompt="a", chosen=say("q"), rejected="c"), '"chosen" does not end with an answer'),
    (dict(prompt=5, chosen="b", rejected="c"), '"prompt" is neither'),
    (dict(prompt=say("a", "b"), chosen="b", rejected="c"), "does not end with a message of the"),
    (dict(prompt=say("a") * 3, chosen="b", rejected="c"), "message 2 has role 'user'"),
    (dict(prompt="a", chosen="b", rejected="c", rating="much"), "\"rating\" is 'much'"),
    (dict(prompt="a", chosen="b", rejected="c", kind="taste"), "\"kind\" is 'taste'"),
    (dict(prompt="a", chosen="b", rejected="c", chosen_safe="yes"), "\"chosen_safe\" is 'yes'"),
    (dict(prompt="a", chosen="b", rejected="c", chosen_safe=0), '"chosen_safe" is 0'),
    (dict(prompt="[INST]", chosen="b", rejected="c"), "message 1 contains [INST]"),
    ("text", "expected an object"),
]
BAD_PROMPTS = [
    ("p", 'expected an object with a "prompt"'),
    (dict(prompt="p", is_safety="yes"), "\"is_safety\" is 'yes'"),
    (dict(prompt="p", is_safety=1), '"is_safety" is 1'),
    (dict(prompt=None), '"prompt" is neither'),
    (dict(prompt="p", images=["c.png"]), '"images" is not supported'),
    (dict(prompt="p", history=[["q", None]]), "message 2 is not a string"),
    (dict(prompt=[dict(role="assistant", content="p")]), "does not end with a message"),
    (dict(prompt="[INST] p"), "part of the chat format"),
]
BAD_INSTRUCTIONS = [
    ("x", 'expected an object with an "instruction"'),
    (dict(terse="x"), 'expected an object with an "instruction"'),
    (dict(instruction="Be [/INST] kind."), "part of the chat format"),
    (dict(instruction="Be kind.", terse="<<SYS>>"), "part of the chat format"),
    (dict(instruction="Be kind.", terse=5), '"terse" must be a string'),
    (dict(instruction="Be kind.", obeyed_if="(kind"), "unterminated subpattern"),
    (dict(instruction="Be kind.", obeyed_if=[3]), "is is not a regular expression"),
]
GOOD_DIALOGUE = {"messages": say("a", "b")}
GOOD_PAIR = dict(prompt="a", chosen="b", rejected="c")


def parser_of(what, tok):
    return {
        "dialogue": lambda record: sft.encode_example(record, tok, 64),
        "pair": lambda record: reward.encode_pair(records.to_pair(record), tok, 64, {}),
        "prompt": lambda record: records.to_prompt(record, tok, 64),
    }[what]


@pytest.mark.parametrize(
    "what, good, record, words",
    [("dialogue", GOOD_DIALOGUE, *bad) for bad in BAD_DIALOGUES]
    + [("pair", GOOD_PAIR, *bad) for bad in BAD_PAIRS]
    + [("prompt", {"prompt": "a"}, *bad) for bad in BAD_PROMPTS]
    + [("instruction", {"instruction": "Be kind."}, *bad) for bad in BAD_INSTRUCTIONS],
)
def test_a_bad_record_is_named_by_its_line_or_skipped(tmp_path, tok, what, good, record, words):
    path = write_jsonl(tmp_path / "a.jsonl", [good])
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n" + json.dumps(good))

    def read(skip_bad):
        if what == "instruction":
            return records.read_instructions([path], tok, skip_bad), {words: 1}
        return records.read_records([path], parser_of(what, tok), skip_bad)

    with pytest.raises(ValueError) as e:
        read(skip_bad=False)
    assert f"{path}:2: " in str(e.value)
    assert words in str(e.value)
    found, left_out = read(skip_bad=True)
    assert (len(found), list(left_out.values())) == (2, [1])


def test_records_come_a_line_each_or_in_one_array_whatever_the_name_says(tmp_path):
    found = [{"a": 1}, {"a": "\u2028é"}]
    lines = "\n".join(json.dumps(record) for record in found).encode()
    array = json.dumps(found).encode()
    for name, content in (
        ("l.jsonl", lines), ("l.json", lines), ("a.json", array), ("a.jsonl", b"\n " + array),
        ("b.json", b"\xef\xbb\xbf" + array),
        ("bom.jsonl", b"\xef\xbb\xbf" + lines), ("crlf.jsonl", lines.replace(b"\n", b"\r\n\r\n")),
        ("l.jsonl.gz", gzip.compress(lines)),
    ):
        (tmp_path / name).write_bytes(content)
        assert [record for _, record in records.read_json(tmp_path / name)] == found
    with pytest.raises(ValueError, match="bom.jsonl:1: expected an object with .* 'prompt' is"):
        list(records.read_objects(tmp_path / "bom.jsonl", prompt=str))
    where = [where for where, _ in records.read_json(tmp_path / "a.json")]
    assert where == [f"{tmp_path}/a.json: record 1", f"{tmp_path}/a.json: record 2"]


TORN = [b'{"a": ', b'{"a": "\xe9"}', b'{"a": "\\ud800"}', b'{"a":' * 9999, b"9" * 5000]


@pytest.mark.parametrize("line", TORN)
def test_a_line_that_is_no_json_text_is_an_error_with_its_place_or_is_skipped(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b"\n" + b'{"a": 2}\n')
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}:2: (broken JSON|not UTF-8)"):
        records.read_records([path], lambda record: record)
    found, left_out = records.read_records([path], lambda record: record, skip_bad=True)
    assert found == [{"a": 1}, {"a": 2}]
    assert list(left_out) in (["broken JSON"], ["not UTF-8 text"])


def test_a_weight_says_how_often_a_file_is_seen(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", range(100))
    odd = write_jsonl(tmp_path / "b:2", range(3)).rename(tmp_path / "b:2.jsonl")

    def read(*specs):
        return records.read_records([str(spec) for spec in specs], lambda record: record)[0]

    assert read(path) == list(range(100))
    assert read(f"{path}:2") == list(range(100)) * 2
    assert len(set(read(f"{path}:0.25"))) == len(read(f"{path}:0.25")) == 25
    assert sorted(read(f"{path}:1.5"))[:2] in ([0, 0], [0, 1])
    assert len(read(f"{path}:1.5")) == 150
    assert read(odd, f"{odd}:2") == [0, 1, 2] * 3  # a colon in a name is no weight
    for wrong in ("x", "-1", "0", "1e3"):
        with pytest.raises(ValueError, match="is no weight"):
            read(f"{path}:{wrong}")


def test_what_is_held_out_is_never_trained_on_though_it_stands_twice():
    examples = [("a%d" % (i % 20), i) for i in range(600)]
    train, val = records.hold_out(examples, lambda example: example[0], 0.1, seed=1)
    assert len(val) == 2 * 30
    assert len(train) == 540
    assert not {key for key, _ in train} & {key for key, _ in val}
    assert val != records.hold_out(examples, lambda example: example[0], 0.1, seed=2)[1]


def hh(*contents):
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {c}" for i, c in enumerate(contents))


def test_every_preference_format_becomes_the_same_pair():
    before, good, bad = say("a", "b", "c"), "good", "bad"
    answers_ = [{"role": "assistant", "content": text} for text in (good, bad)]
    for record in (
        dict(prompt=before, chosen=good, rejected="bad "),
        dict(prompt=hh("a", "b", "c") + "\n\nAssistant:", chosen=" good", rejected=bad),
        dict(chosen=hh("a", "b", "c", good), rejected=hh("a", "b", "c", bad)),
        dict(chosen=before + answers_[:1], rejected=before + answers_[1:]),
        dict(prompt="c", chosen=before + answers_[:1], rejected=before + answers_[1:], score=3),
        dict(prompt=before, chosen=answers_[:1], rejected=answers_[1:]),
        dict(prompt=before, chosen=answers_[0], rejected=answers_[1], rating=None, kind=""),
        dict(prompt="c", history=[["a", "b"]], chosen=good, rejected=bad, chosen_safe=None),
        dict(prompt=hh("a", "b", "c"), chosen=good, rejected=bad, rating=float("nan")),
        dict(prompt="c", chosen=hh("a", "b", "c", good), rejected=hh("a", "b", "c", bad)),
        dict(
            conversations=[{"from": ("human", "gpt")[i % 2], "value": "abc"[i]} for i in range(3)],
            chosen={"from": "gpt", "value": good}, rejected={"from": "gpt", "value": bad},
        ),
    ):
        pair = records.to_pair(record)
        assert (pair.messages, pair.chosen, pair.rejected) == (before, good, bad)
        assert pair.kind == "helpfulness"
        assert records.to_pair(record, kind="safety").kind == "safety"
        told = record | {"kind": "helpfulness"}
        assert records.to_pair(told, kind="safety").kind == "helpfulness"
    # "Human:" within a line belongs to what is said; so does an empty line
    asked = "I ask Human: x"
    pair = records.to_pair(dict(chosen=hh(asked, "one\n\ntwo"), rejected=hh(asked, "one")))
    assert pair.messages == say(asked)
    assert pair.chosen == "one\n\ntwo"


ODD = [
    (dict(chosen=hh("a", "b"), rejected=hh("a", "b")), "the same"),
    (dict(chosen=hh("a", "b c"), rejected=hh("a", "b  c\n")), "the same"),
    (dict(chosen=hh("a", "b", "c"), rejected=hh("a", "b")), "alternate"),
    (dict(chosen=hh("a", "b") + "\n\nAssistant: c", rejected=hh("a", "b")), "alternate"),
    (dict(chosen="\n\nAssistant: c", rejected=hh("a", "b")), "alternate"),
    (dict(chosen="Once" + hh("a", "b"), rejected=hh("a", "b")), "alternate"),
    (dict(chosen=hh("a", "b"), rejected=hh("z", "c")), "prompts that differ"),
    (dict(chosen=hh("a", "b", "c", "d"), rejected=hh("a", "x")), "prompts that differ"),
    (dict(chosen=hh("a", ""), rejected=hh("a", "x")), "empty"),
    (dict(prompt="a", chosen="b", rejected="c", chosen_safe=False, rejected_safe=True), "unsafe"),
    (dict(prompt="word " * 200, chosen="yes" + " w" * 99, rejected="no" + " w" * 99), "context"),
]


def test_pairs_that_teach_nothing_are_counted_and_left_out(tmp_path, tok):
    parse = parser_of("pair", tok)
    for record, words in ODD:
        with pytest.raises(records.SkipRecord, match=words):
            parse(record)
    path = write_jsonl(tmp_path / "p.jsonl", [GOOD_PAIR, *(record for record, _ in ODD)])
    found, left_out = records.read_records([path], parse)
    assert len(found) == 1
    assert sum(left_out.values()) == len(ODD)


def test_what_stands_beside_a_prompt_is_asked_too(tok):
    whole = say("a", "b", "c", system="Be brief.")
    for record in (
        dict(prompt=whole, is_safety=None, label="an answer that is known"),
        dict(prompt="c", system="Be brief.", history=[["a", "b"]]),
        dict(prompt=hh("a", "b", "c"), system="Be brief."),
    ):
        prompt = records.to_prompt(record, tok, 200)
        assert prompt.tokens == encode_dialog(tok, whole)[0]
        assert records.prompt_to_messages(records.to_prompt(dict(prompt=prompt.text), tok, 200).text)
        assert prompt.is_safety is False
    alone = records.to_prompt(dict(prompt="c", system=None), tok, 200)
    assert alone.text == "c"


def test_prompts_without_room_for_an_answer_are_counted_and_none_left_is_an_error(
    tmp_path, tok, capsys
):
    path = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "a"}] + [{"prompt": "word " * 99}] * 3)
    assert len(records.read_prompts([path], tok, 64)) == 1
    assert "{'no room for an answer in 64 tokens': 3}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no prompt to use; left out: .*: 4"):
        records.read_prompts([path], tok, 5)


def test_a_models_answers_read_back_as_they_were_sampled(tmp_path, tok):
    prompt = records.to_prompt({"prompt": "Tell me 2 + 3.", "is_safety": True}, tok, 64)
    whole, _ = encode_dialog(tok, say("Tell me 2 + 3.", "2 plus 3 is 5."))
    answer = records.Answer(prompt, whole[len(prompt.tokens) :], True)
    record = records.answer_record(answer, tok, reward=1.5)
    assert record["answer"] == "2 plus 3 is 5."
    path = write_jsonl(tmp_path / "best.jsonl", [record])
    assert records.read_answers([path], tok, 64) == [answer]
    assert sft.encode_example(record, tok, 64).tokens == whole  # and fine-tuning takes them


# ------------------------------------------------------------------------------------- data/corpus
def prepared(folder, *data, **changes):
    """(index, tokenizer, {"s.train": ids, ...}) of texts made into tokens."""
    config = dict(data=tuple(map(str, data)), out=str(folder), vocab_size=350) | changes
    index = corpus.main(corpus.Settings(**config))
    ids = {}
    for source in index["sources"]:
        for split in ("train", "val"):
            name = f"{source['name']}.{split}"
            ids[name] = corpus.Shards(folder, name, index["dtype"]).read(0, 10**9).tolist()
    return index, Tokenizer(folder / "tokenizer.model"), ids


def split_documents(tok, ids):
    """Texts between BOS and EOS."""
    texts, start = [], None
    for i, token in enumerate(ids):
        if token == tok.bos_id:
            start = i
        elif token == tok.eos_id:
            texts.append(tok.decode(ids[start + 1 : i]))
    return texts


def test_sources_have_weights_and_folders_their_files(tmp_path, capsys):
    names = """web/a.txt web/b.jsonl web/C.TXT web/notes.md web/d.txt.gz web/._a.txt
        web/run/best.jsonl web/.ipynb_checkpoints/a.txt web/run/metrics.jsonl wiki.txt far/e.txt""".split()
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "web/far").symlink_to("../far")
    (tmp_path / "far/back").symlink_to("../web")    # a circle of links ends
    specs = [f"{tmp_path}/web:0.5", f"{tmp_path}/wiki.txt", f"{tmp_path}/wiki.txt:2"]
    web, wiki, again = texts.find_sources(specs)
    assert web.weight == 0.5
    assert [Path(f).name for f in web.files] == ["C.TXT", "a.txt", "b.jsonl", "e.txt"]
    assert (wiki.name, wiki.weight, again.name, again.weight) == ("wiki", 1, "wiki~2", 2)
    assert "web: not read: 1 .md, 1 .txt.gz" in capsys.readouterr().out


def test_every_document_is_packed_once_between_bos_and_eos_and_held_out_ones_stay_out(
    tmp_path, town, monkeypatch
):
    monkeypatch.setattr(corpus, "SHARD_TOKENS", 1000)
    stories = town["stories"][:300]
    lines = [json.dumps(record) + "\n" for record in stories + stories[:50]]
    (tmp_path / "s.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    index, tok, ids = prepared(tmp_path / "out", tmp_path / "s.jsonl.gz")
    train, val = split_documents(tok, ids["s.train"]), split_documents(tok, ids["s.val"])
    assert sorted(train + val) == sorted(record["text"] for record in stories + stories[:50])
    assert 10 < len(val) < 70
    assert not set(train) & set(val)  # a repeated document falls on the same side
    assert len(list((tmp_path / "out").glob("s.train.*.bin"))) > 5
    assert index["dtype"] == "uint16"


def test_of_one_long_document_the_last_tenth_is_held_out(tmp_path, town, monkeypatch):
    monkeypatch.setattr(corpus, "SLICE_CHARS", 777)
    text = "\n".join(record["text"] for record in town["stories"][:100])
    (tmp_path / "book.txt").write_text(text)
    index, tok, ids = prepared(tmp_path / "out", tmp_path / "book.txt")
    counts = index["sources"][0]["counts"]
    assert counts["documents"] == counts["she"] == 1
    cut = int(len(text) * 0.9)
    train, val = ids["book.train"], ids["book.val"]
    assert (train[0], tok.decode(train)) == (tok.bos_id, text[:cut])
    assert (val[0], val[-1], tok.decode(val)) == (tok.bos_id, tok.eos_id, text[cut:])
    assert train == tok.encode(text[:cut], bos=True)    # though it was encoded in slices


def test_sites_full_of_personal_information_are_left_out_and_reported(tmp_path, capsys):
    rng, lists, blog = random.Random(0), "http://lists.example/1", "http://blog.example/x"
    pages = [{"text": world.directory_page(rng), "url": lists} for _ in range(20)]
    for _ in range(3):
        pages.append({"text": "write to ada7@mail.example " + world.story(rng), "url": blog})
    pages += [{"text": world.story(rng), "url": blog} for _ in range(40)]
    pages += [{"text": world.directory_page(rng)}]  # without an address it is judged alone
    index, tok, ids = prepared(tmp_path / "out", write_jsonl(tmp_path / "web.jsonl", pages))
    text = tok.decode(ids["web.train"] + ids["web.val"])
    assert "phone 555" not in text
    assert "ada7@mail.example" in text
    assert set(index["left_out"]) == {"lists.example", f"{tmp_path}/web.jsonl:64"}
    addresses = sum(page["text"].count("@") for page in pages[:20])
    assert index["left_out"]["lists.example"]["e-mail"] == addresses
    assert "left out for personal information: 2 site(s)" in capsys.readouterr().out


def test_tokens_are_reused_until_the_text_changes_and_a_weight_changes_none(tmp_path, town):
    path = write_jsonl(tmp_path / "s.jsonl", town["stories"][:100])
    prepared(tmp_path / "out", path)
    shard = tmp_path / "out/s.train.00000.bin"
    before = shard.stat().st_mtime_ns
    index, _, _ = prepared(tmp_path / "out", f"{path}:3")
    assert shard.stat().st_mtime_ns == before
    assert index["sources"][0]["weight"] == 3
    write_jsonl(path, town["stories"][100:200])
    with pytest.raises(ValueError, match="out was made from other data: .*s.jsonl has changed"):
        prepared(tmp_path / "out", path)
    good = path.read_text()
    for torn, words in ((good + '{"te', "s.jsonl:101: broken JSON"), ("", "empty")):
        path.write_text(torn)
        with pytest.raises(ValueError, match=words):
            prepared(tmp_path / "out", path, overwrite=True)
        assert shard.stat().st_mtime_ns == before       # nothing makes way for what fails
    path.write_text(good)
    prepared(tmp_path / "out", path, overwrite=True)
    assert shard.stat().st_mtime_ns != before


def test_lines_and_files_that_cannot_be_read_are_left_out_on_demand_and_counted(
    tmp_path, town, capsys
):
    texts_ = [record["text"] for record in town["stories"][:60]]
    lines = [json.dumps({"text": text}).encode() for text in texts_]
    lines[7:7] = [b'{"text": "a', '{"text": "é"}'.encode("latin-1"), b'{"content": "a"}', b"[]"]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "b.txt").write_bytes("one\n\ncafé".encode("latin-1"))
    (tmp_path / "c.txt").write_bytes(b"one\ntwo\0")
    with pytest.raises(ValueError, match="a.jsonl:8: broken JSON"):
        prepared(tmp_path / "out", tmp_path)
    with pytest.raises(ValueError, match="b.txt: line 3: not UTF-8"):
        prepared(tmp_path / "out", tmp_path / "b.txt")
    with pytest.raises(ValueError, match="c.txt: .*skipped: .*c.txt: line 2: binary data"):
        prepared(tmp_path / "out", tmp_path / "c.txt", skip_bad=True)
    _, tok, ids = prepared(tmp_path / "out", tmp_path, skip_bad=True)
    (train, val) = ids.values()
    assert sorted(split_documents(tok, train + val)) == sorted(texts_)
    shown = capsys.readouterr().out
    assert "'broken JSON': 1, 'not UTF-8 text': 1" in shown
    assert "c.txt: line 2: binary data (a NUL byte)" in shown


def test_two_copies_of_a_text_fall_on_one_side_whatever_they_are_called(tmp_path, town):
    for i, record in enumerate(town["stories"][:80]):
        for name in ("a", "b"):
            (tmp_path / f"{name}{i}.txt").write_text(record["text"])
    _, tok, ids = prepared(tmp_path / "out", tmp_path)
    train, val = (set(split_documents(tok, part)) for part in ids.values())
    assert len(val) > 3
    assert not train & val


def test_searching_for_personal_details_takes_no_longer_on_odd_texts():
    """To the square of the length it would take hours."""
    for part in ("a", "1", "A", "1 ", "1 A", "a@", "a.", "@", "1-", "(", "she"):
        details = corpus.count_details((part * 400_000)[:400_000])
        assert details["e-mail"] <= 1
    found = corpus.PERSONAL["e-mail"].findall("to ada.b+c@mail.example, x@y.z; @no a@b")
    assert found == ["ada.b+c@mail.example", "x@y.z"]


def test_ten_times_the_text_takes_no_more_memory_to_prepare(tmp_path, town, tok, monkeypatch):
    monkeypatch.setattr(corpus, "TOKENIZER_CHARS", 100_000)
    monkeypatch.setattr(corpus, "BATCH_CHARS", 10_000)

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

    one = write_jsonl(tmp_path / "one.jsonl", town["stories"][:2000])
    ten = write_jsonl(tmp_path / "ten.jsonl", town["stories"][:2000] * 10)
    assert peak(ten) < 1.3 * peak(one)


# -------------------------------------------------------------------------------- data/preferences
def test_two_variants_answer_at_all_temperatures_and_either_may_stand_first(monkeypatch):
    asked = []

    def respond(variant, tok, dialogs, max_new_tokens, temperature, seed):
        asked.append((variant, max_new_tokens))
        return [f"{variant} {temperature} {d[0]['content']}" for d in dialogs]

    monkeypatch.setattr(preferences, "respond", respond)
    config = preferences.Settings(temperatures=(0.5, 1.0), max_new_tokens=33)
    sixty = [{"prompt": f"p{i}"} for i in range(60)]
    found = preferences.generate_pairs(["new", "old"], None, sixty, 0, config)
    assert set(asked) == {("new", 33), ("old", 33)}
    assert all(text.endswith(f" p{i}") for i, both in enumerate(found) for text in both)
    assert {a.split()[0] for a, _ in found} == {"new", "old"}
    both = [(0.5, 0.5), (0.5, 1.0), (1.0, 0.5), (1.0, 1.0)]
    assert {(float(a.split()[1]), float(b.split()[1])) for a, b in found} == set(both)


def test_a_blend_stands_between_two_models():
    chat, other = make_model(), make_model()
    other.norm.weight.data.mul_(3)
    half = preferences.interpolate(chat, other, 0.25).state_dict()["norm.weight"]
    assert torch.allclose(half, 0.25 * chat.norm.weight + 0.75 * other.norm.weight)
    assert preferences.interpolate(chat, other, 0) is other


def collecting(inputs, out, **changes):
    return preferences.Settings(
        **dict(
            chat=inputs.base, other=inputs.base, prompts=(inputs.prompts,), out=str(out),
            max_new_tokens=4, **HERE_AND_EXACT,
        )
        | changes
    )


def test_tinytowns_annotator_compares_and_what_is_there_is_not_done_again(
    tmp_path, inputs, town, monkeypatch, capsys
):
    config = collecting(inputs, tmp_path / "v1.jsonl")
    preferences.main(config)
    found = [record for _, record in records.read_json(config.out)]
    asked = town["prompts-v1"][:24]
    assert [record["prompt"] for record in found] == [prompt["prompt"] for prompt in asked]
    for record, prompt in zip(found, asked):
        gap = annotator.quality(prompt, record["chosen"])
        gap -= annotator.quality(prompt, record["rejected"])
        assert record["true_gap"] == gap
    monkeypatch.setattr(preferences, "load", None)
    preferences.main(config)            # nothing is loaded or done again
    assert "v1.jsonl exists already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="made with other settings: max_new_tokens was 4, now 5"):
        preferences.main(replace(config, max_new_tokens=5))
    Path(f"{config.out}.made-of.json").unlink()
    with pytest.raises(ValueError, match="v1.jsonl exists"):
        preferences.main(config)


def test_a_person_can_be_the_annotator_and_go_on_later(tmp_path, inputs, monkeypatch, capsys):
    three = [dict(prompt=f"p{i}", is_safety=i == 0) for i in range(3)]
    mine = write_jsonl(tmp_path / "q.jsonl", three)
    out = tmp_path / "labels.jsonl"
    config = collecting(inputs, out, prompts=(str(mine),), annotator="person")
    typed = iter(["?", "b", "2", "n", "y", "a"])

    def answer(_):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(preferences, "respond", lambda m, t, dialogs, *_: ["x y"] * len(dialogs))
    preferences.main(config)
    pair = json.loads((tmp_path / "labels.jsonl.pairs.jsonl").read_text().splitlines()[0])
    assert [record for _, record in records.read_json(out)] == [
        dict(
            prompt="p0", chosen=pair["b"], rejected=pair["a"], rating="better", kind="safety",
            chosen_safe=True, rejected_safe=False,
        )
    ]
    typed = iter(["a", "1", "y", "y"] * 2)
    preferences.main(config)
    found = [record for _, record in records.read_json(out)]
    assert [record["prompt"] for record in found] == ["p0", "p1", "p2"]
    assert [record["kind"] for record in found] == ["safety", "helpfulness", "helpfulness"]
    assert "3 of 3 compared" in capsys.readouterr().out
    mine_too = write_jsonl(tmp_path / "mine-too.jsonl", [dict(prompt="a label from elsewhere")])
    before = mine_too.read_bytes()
    with pytest.raises(ValueError, match="mine-too.jsonl exists and has no labels"):
        preferences.main(replace(config, out=str(mine_too)))
    assert mine_too.read_bytes() == before
    other = write_jsonl(tmp_path / "other.jsonl", [dict(prompt="new")])
    with pytest.raises(ValueError, match="made with other settings: prompts was"):
        preferences.main(replace(config, prompts=(str(other),)))


def test_pairs_for_others_to_compare_are_left_blank(tmp_path, inputs):
    two = [dict(prompt="Say a."), dict(prompt="b", is_safety=True)]
    mine = write_jsonl(tmp_path / "q.jsonl", two)
    config = collecting(inputs, tmp_path / "p.jsonl", prompts=(str(mine),), annotator="nobody")
    preferences.main(config)
    found = [record for _, record in records.read_json(config.out)]
    assert [(r["prompt"], r["kind"]) for r in found] == [("Say a.", "helpfulness"), ("b", "safety")]
    assert all(isinstance(r["a"] + r["b"], str) for r in found)
    with pytest.raises(ValueError, match=f"{mine}:1: not a prompt of Tinytown"):
        preferences.main(replace(config, annotator="tinytown", overwrite=True))


# ----------------------------------------------------------------------------- data/ghost_attention
FOX = dict(kind="animal", instruction="Be the fox.", terse="Fox!", obeyed_if=[r"^The fox says: ?"])


def test_a_ghost_example_by_hand_token_by_token(letters):
    turns = [("a", "fb"), ("c", "fd"), ("e", "fg")]
    record = {"messages": ghost_attention.instruct_first_message("i", turns)}
    example = sft.encode_example(record, letters, 200)
    parts = [  # the instruction in the first turn alone, the mask on the last answer alone
        ("[INST] i a [/INST]", " fb ", 0),
        ("[INST] c [/INST]", " fd ", 0),
        ("[INST] e [/INST]", " fg ", 1),
    ]
    expected, mask = [], []
    for asked, answer, learned in parts:
        prompt = letters.encode(asked, bos=True)
        whole = letters.encode(asked + answer, bos=True, eos=True)
        expected += whole
        mask += [0] * len(prompt) + [learned] * (len(whole) - len(prompt))
    assert (example.tokens, example.mask) == (expected, mask)
    learned = "".join(letters.decode([t]) for t, m in zip(expected, mask) if m)
    assert learned.replace(" ", "") == "fg"
    assert expected[-1] == letters.eos_id


def test_the_instruction_is_in_every_message_to_sample_and_in_the_first_to_records():
    sampled = ghost_attention.instruct_every_message("Be the fox.", [("q1", "a1")], "q2")
    assert [m["content"] for m in sampled] == ["Be the fox. q1", "a1", "Be the fox. q2"]
    learned = ghost_attention.instruct_first_message("Be the fox.", [("q1", "a1"), ("q2", "a2")])
    assert [m["content"] for m in learned] == ["Be the fox. q1", "a1", "q2", "a2"]
    assert [m.get("weight") for m in learned] == [None, 0, None, 1]


def test_answers_that_disobey_are_thrown_away_by_the_rule_and_counted(tok, monkeypatch):
    seen = []

    def respond(model, tok, dialogs, *_):
        seen.append([[m["content"] for m in d] for d in dialogs])
        good = len(seen) != 2  # in the second turn nobody obeys
        return [f"The fox says: {d[-1]['content'][-2:]}" if good else "No." for d in dialogs]

    monkeypatch.setattr(ghost_attention, "respond", respond)
    users, config = [["q1", "q2", "q3"], ["r1", "r2"]], ghost_attention.Settings(history=200)
    model, drawn = make_model(max_seq_len=300), [("Be the fox.", [FOX])] * 2
    done, disobeyed = ghost_attention.sample_dialogs(model, tok, users, drawn, 0, config)
    assert disobeyed == 2
    assert done[0] == [("q1", "The fox says: q1"), ("q3", "The fox says: q3")]
    assert done[1] == [("r1", "The fox says: r1")]
    assert seen[2] == [["Be the fox. q1", "The fox says: q1", "Be the fox. q3"]]
    seen.clear()
    config = replace(config, history=1)  # no room for what was said: the newest message alone
    ghost_attention.sample_dialogs(model, tok, users, drawn, 0, config)
    assert seen[2] == [["Be the fox. q3"]]


def test_each_sampled_dialogue_gives_itself_and_beginnings_that_fit(tok):
    turns, config = [(f"q{i}", f"a{i}") for i in range(9)], ghost_attention.Settings()
    found = ghost_attention.to_records(tok, turns, "i", random.Random(1), config)
    whole = ghost_attention.instruct_first_message("i", turns)
    assert found[-1]["messages"] == whole
    assert 1 < len(found) <= 4
    for record in found:
        messages = record["messages"]
        same = [m["content"] for m in whole[: len(messages)]]
        assert [m["content"] for m in messages] == same
        assert [m["weight"] for m in messages[1::2]][-1] == 1
        assert sum(m["weight"] for m in messages[1::2]) == 1
    short = replace(config, context=len(encode_dialog(tok, whole)[0]) - 1)
    found = ghost_attention.to_records(tok, turns, "i", random.Random(1), short)
    assert len(found[-1]["messages"]) == 16
    none = replace(config, context=5)
    assert ghost_attention.to_records(tok, turns, "i", random.Random(1), none) == []


def test_ghost_attention_writes_dialogues_from_ones_own(tmp_path, base, monkeypatch, capsys):
    dialogs = [dict(messages=say("One?", "It is.", f"Two {i}?", "It is.")) for i in range(8)]
    config = ghost_attention.Settings(
        chat=str(base), out=str(tmp_path / "g.jsonl"), max_new_tokens=6, **HERE_AND_EXACT,
        data=(str(write_jsonl(tmp_path / "d.jsonl", dialogs)),),
        instructions=(str(write_jsonl(tmp_path / "i.jsonl", [FOX])),),
    )
    with pytest.raises(ValueError, match="no answer of .* obeys"):
        ghost_attention.main(config)
    obedient = lambda m, t, dialogs, *_: ["The fox says: yes."] * len(dialogs)
    monkeypatch.setattr(ghost_attention, "respond", obedient)
    ghost_attention.main(config)
    assert "16 answers sampled under instructions, 0 of them removed" in capsys.readouterr().out
    found = [record["messages"] for _, record in records.read_json(config.out)]
    assert 8 < len(found) <= 16
    assert sum(messages[0]["content"].startswith("Fox! ") for messages in found) < len(found)
    assert not any("ox" in m["content"] for messages in found for m in messages[2::2])


# -------------------------------------------------------------------------------- data/distillation
def test_a_pre_prompt_stands_before_a_system_message_or_makes_one(town):
    behind = distillation.with_system_prompt
    assert behind("Be safe.", say("a")) == say("a", system="Be safe.")
    assert behind("Be safe.", say("a", system="Be brief.")) == say("a", system="Be safe. Be brief.")
    texts = {record["instruction"] for record in town["pre-prompts"]}
    assert len(texts) == 12 * 11
    assert {prompts.pre_prompt(random.Random(i)) for i in range(30)} <= texts


def test_the_gate_learns_exactly_the_answers_that_are_scored_higher(
    tmp_path, base, judges, monkeypatch, capsys
):
    points = {"plain": 0.5, "new 0": 0.4, "new 1": 0.6, "new 2": 0.5, "new 3": 0.7}

    def respond(model, tok, dialogs, *_):
        behind = ["You are a " in d[0]["content"] for d in dialogs]
        return [f"new {d[-1]['content'][1]}" if b else "plain" for d, b in zip(dialogs, behind)]

    def score(model, tok, dialogs):
        assert all("You are a " not in str(d) for d in dialogs)  # judged without the pre-prompt
        return [points[d[-1]["content"]] for d in dialogs]

    monkeypatch.setattr(distillation, "respond", respond)
    monkeypatch.setattr(distillation, "score_dialogs", score)
    asked = [dict(prompt=f"q{i}") for i in range(3)]
    asked += [dict(prompt=say("q3", system="Answer all.")), dict(prompt="Too long. " * 99)]
    config = distillation.Settings(
        chat=str(base), rm=str(judges / "safety"), out=str(tmp_path / "d.jsonl"), **HERE_AND_EXACT,
        data=(str(write_jsonl(tmp_path / "p.jsonl", asked)),),
        pre_prompts=(str(write_jsonl(tmp_path / "i.jsonl", [{"instruction": "You are a cat."}])),),
    )
    distillation.main(config)
    assert "prefers the distilled answer of 2" in capsys.readouterr().out
    found = [record for _, record in records.read_json(config.out)]
    assert [r["messages"][-1]["content"] for r in found] == ["plain", "new 1", "plain", "new 3"]
    assert [r["improved"] for r in found] == [False, True, False, True]
    assert found[3]["messages"][:-1] == asked[3]["prompt"]  # its own system message stays
    distillation.main(replace(config, gate=False, overwrite=True))
    found = [record for _, record in records.read_json(config.out)]
    assert [r["messages"][-1]["content"] for r in found] == ["new 0", "new 1", "new 2", "new 3"]
    points["plain"] = 9.0
    with pytest.raises(ValueError, match="nothing to learn"):
        distillation.main(replace(config, overwrite=True))


# ------------------------------------------------------------------------------------------- common
def test_learning_rate_by_hand(capsys):
    rates = [training.lr_at(step, 12, 2, 1.0) for step in range(12)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[-1] == pytest.approx(0.1)
    assert rates[5] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 3 / 9)) / 2)
    training.warn_without_peak(3, 4)
    assert capsys.readouterr().out == ""
    training.warn_without_peak(9, 4)
    assert "--warmup-steps 9: with 4 steps in total" in capsys.readouterr().out


def test_adamw_is_the_papers_and_decays_matrices_only():
    optimizer = training.adamw(make_model(), 1e-3)
    assert [{p.dim() for p in group["params"]} for group in optimizer.param_groups] == [{2}, {1}]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0]
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.9, 0.95), 1e-5)


def test_gradients_are_clipped_to_a_norm_of_1_and_a_nan_is_an_error_without_a_step():
    for scale in (0.1, 1e6):
        model = torch.nn.Linear(2, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        start = model.weight.detach().clone()
        (scale * model(torch.tensor([3.0, 4.0]))).backward()
        training.clip_and_step(model, optimizer)
        moved = (model.weight - start).norm().item()
        assert moved == pytest.approx(min(1.0, 5 * scale), rel=1e-4)
        assert model.weight.grad is None
    start = model.weight.detach().clone()
    (float("nan") * model(torch.ones(2))).backward()
    with pytest.raises(RuntimeError, match="non-finite, so it cannot be clipped"):
        training.clip_and_step(model, optimizer)
    assert torch.equal(model.weight, start)


def test_a_process_without_a_share_of_a_small_batch_weighs_nothing(monkeypatch):
    monkeypatch.setattr(training, "rank_and_world_size", lambda: (1, 2))
    assert training.local_batch([1, 2, 3]) == ([2], 1.0)
    assert training.local_batch([1]) == ([1], 0.0)


def test_settings_come_from_the_command_line_and_help_names_the_papers_value(capsys):
    def parse(*argv):
        return parse_settings(sft.Settings, sft.PAPER, "", argv)

    assert parse() == sft.Settings()
    given = parse("--recipe", "paper", "--lr", "0.5", "--data", "a", "b:2", "--resume", "--no-pack")
    assert (given.lr, given.seq_len, given.data) == (0.5, 4096, ["a", "b:2"])
    assert (given.resume, given.pack) == (True, False)
    with pytest.raises(SystemExit):
        parse("--over")         # no abbreviations: the printed command to resume leaves them out
    assert "--over" in capsys.readouterr().err
    with pytest.raises(SystemExit) as e:
        parse("--learning-rate", "1")
    assert e.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--learning-rate" in error
    with pytest.raises(SystemExit):
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "peak learning rate (default: 0.001; paper: 2e-05)" in shown
    numbers = parse_settings(rlhf.Settings, {}, "", ["--temperatures", "0.5", "1"])
    assert numbers.temperatures == [0.5, 1.0]
    folders = parse_settings(answers.Settings, {}, "", ["out/a", "out/b", "--show", "2"])
    assert (folders.folders, folders.show) == (["out/a", "out/b"], 2)


@pytest.mark.parametrize("script", [
    pretrain, sft, reward, rlhf, corpus, preferences, distillation, ghost_attention, answers
])
def test_every_setting_explains_itself(script):
    described = {name: meaning for _, name, meaning in describe_settings(script.Settings)}
    assert described.keys() == vars(script.Settings()).keys()
    assert all(len(meaning) > 5 for meaning in described.values())
    paper = getattr(script, "PAPER", {})
    assert paper.keys() <= described.keys()
    assert set(getattr(script.Settings, "MAY_CHANGE", ())) <= described.keys()


def test_a_fingerprint_tells_changed_content_and_not_a_copy(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 100)
    before = runs.fingerprint([path])
    os.utime(path, (1, 1))
    assert runs.fingerprint([path]) == before
    path.write_bytes(b"x" * 99 + b"y")
    assert runs.fingerprint([path]) != before


def test_two_runs_cannot_use_one_folder_at_once(tmp_path):
    script = "from common.run import Run; import train_sft, sys, time\n"
    script += f"run = Run({str(tmp_path)!r}, train_sft.Settings()); print('open', flush=True)\n"
    script += "time.sleep(60)"
    first = subprocess.Popen([sys.executable, "-c", script], cwd=HERE, stdout=subprocess.PIPE)
    first.stdout.readline()
    with pytest.raises(ValueError, match=f"{tmp_path} is in use by another process"):
        runs.Run(tmp_path, sft.Settings())
    first.kill()
    first.wait()
    runs.Run(tmp_path, sft.Settings())  # the lock went with the process


def test_a_log_line_has_the_tokens_per_second_since_the_line_before(tmp_path, monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(runs.time, "time", lambda: clock[0])
    run_ = runs.Run(tmp_path, sft.Settings())
    run_.begin(None, None, 4)
    for step in range(1, 5):
        clock[0] += 2
        run_.count_step(1000)
        if step % 2 == 0:
            run_.log(step, loss=1.0)
            assert "500 tokens/s" in capsys.readouterr().out


def test_a_log_has_null_for_nan_and_infinity(tmp_path):
    run_ = runs.Run(tmp_path, sft.Settings())
    run_.begin(None, None, 3)
    run_.log(1, loss=float("nan"))
    run_.log_samples(2, [{"reward": float("inf")}, {"reward": 1.0}])
    assert logged(tmp_path) == [{"step": 1, "loss": None}]
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 2, "reward": None}, {"step": 2, "reward": 1.0}
    ]


# ----------------------------------------------------------------------------------- train_pretrain
def test_next_token_loss_by_hand():
    logits, targets = torch.randn(1, 3, 5), torch.tensor([[4, 0, -1]])
    p = logits[0].double().softmax(-1)
    by_hand = -math.log(p[0, 4]) - math.log(p[1, 0])  # -1: no token
    assert pretrain.next_token_loss(logits, targets).item() == pytest.approx(by_hand, rel=1e-5)


def test_shards_read_like_a_list(tmp_path):
    numbers = list(range(100))
    for i, part in enumerate((numbers[:37], numbers[37:38], numbers[38:])):
        np.array(part, dtype="uint16").tofile(tmp_path / f"x.{i:05d}.bin")
    shards = corpus.Shards(tmp_path, "x", "uint16")
    assert len(shards) == 100
    for start, count in [(0, 100), (0, 0), (30, 10), (36, 3), (38, 5), (90, 50), (99, 1)]:
        assert shards.read(start, count).tolist() == numbers[start : start + count]


class Numbers(list):
    """Stands in for Shards: token i is i."""

    def read(self, start, count):
        return np.array(self[start : start + count])


def mixture_of(*sources, seq_len=8):
    found = [corpus.Tokens("", weight, Numbers(range(size)), None) for size, weight in sources]
    return pretrain.Mixture(found, seq_len, seed=0)


def test_a_source_is_read_once_an_epoch_in_shifted_pairs_and_in_another_order_the_next():
    mixture, orders = mixture_of((8 * 25 + 1, 1.0)), []
    for epoch in range(2):
        places = sum((mixture.draw(step, 5) for step in range(epoch * 5, epoch * 5 + 5)), [])
        tokens = mixture.read(places, "cpu")
        assert torch.equal(tokens[:, 1:], tokens[:, :-1] + 1)  # a token's target is the next one
        orders.append(tokens[:, 0].tolist())
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(0, 200, 8))
    assert orders[0] != orders[1]


def test_a_source_is_drawn_by_weight_times_size_and_a_resumed_mixture_goes_on_alike():
    mixture = mixture_of((9001, 1.0), (1001, 3.0))
    first = [mixture.draw(step, 10) for step in range(400)]
    assert mixture.used[1] / 4000 == pytest.approx(3 / 12, abs=0.03)
    resumed, mixture = (mixture_of((9001, 1.0), (1001, 3.0)) for _ in range(2))
    for step in range(7):
        mixture.draw(step, 10)
    resumed.used = list(mixture.used)
    assert resumed.draw(7, 10) == first[7]


def test_held_out_loss_and_bits_per_byte_by_hand(inputs):
    sources, tok, _ = corpus.open_tokens(Path(inputs.tokens), 32)
    val = sources[0].val.read(0, 10**9).tolist()
    model, nats, T = make_model(vocab_size=tok.vocab_size), 0.0, 32
    for at in range(0, len(val) - 1, T):
        window = val[at : at + T + 1]
        logprobs = F.log_softmax(model(torch.tensor([window[:-1]]))[0], -1).detach()
        nats -= sum(float(logprobs[t, token]) for t, token in enumerate(window[1:]))
    size = sum(len(text.encode()) for text in split_documents(tok, val))
    found = pretrain.evaluate(model, sources[0], tok, T, 10**9, 16)
    assert found["val/stories"] == pytest.approx(nats / (len(val) - 1), rel=1e-5)
    assert found["bits/stories"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_pretraining_makes_a_model_of_its_size_that_learns_and_writes(tmp_path, inputs, capsys):
    _, config = stage("pretrain", inputs, tmp_path / "out", init="", max_steps=30, micro_batch=6)
    metrics = pretrain.main(config)
    curve = losses(config.out)
    assert curve[30] < curve[1] - 1
    assert metrics["val/stories"] < curve[1] - 1
    model, _ = load(config.out)
    assert (model.args.dim, model.args.max_seq_len) == (SIZES["tiny"]["dim"], 32)
    shown = capsys.readouterr().out
    assert re.search(r"step 30/30  loss [\d.]+  lr [\de.-]+  [\d,]+ tokens/s  left 0:00", shown)
    assert not (tmp_path / "out/resume.pt").exists()
    done = run("llama2.py", "complete", config.out, "Once upon a time", "--max-new-tokens", 5)
    assert done.stdout.startswith("Once upon a time")


# ---------------------------------------------------------------------------------------- train_sft
def encode_all(tok, found, seq_len=256):
    return [sft.encode_example(record, tok, seq_len) for record in found]


def test_long_dialogues_are_cut_behind_a_turn_and_texts_are_learned_whole(tok):
    turn = len(encode_dialog(tok, say("a b", "c d"))[0])
    found = sft.encode_example(dict(messages=say(*["a b", "c d"] * 3)), tok, 2 * turn + 1)
    tokens, mask = encode_dialog(tok, say(*["a b", "c d"] * 2))
    assert (found.tokens, found.mask) == (tokens, mask)
    assert found.cut
    endless = sft.encode_example(dict(messages=say(*["a b", "c d"] * 5000)), tok, 2 * turn)
    assert endless == found                 # and in seconds, however many turns are cut off
    whole = sft.encode_example(dict(messages=say("a b", "c d")), tok, turn)
    assert (len(whole.tokens), whole.cut) == (turn, False)
    with pytest.raises(records.SkipRecord, match="longer than --seq-len in its first turn"):
        sft.encode_example(dict(messages=say("a " * 99, "b")), tok, 64)
    unheard = [dict(role="user", content="a"), dict(role="assistant", content="b", weight=0)]
    with pytest.raises(records.SkipRecord, match="no answer to train on"):
        sft.encode_example(dict(messages=unheard), tok, 64)
    found = sft.encode_example({"text": "a fox lived"}, tok, 64)
    assert found.tokens == tok.encode("a fox lived", bos=True, eos=True)
    assert found.mask == [0] + [1] * (len(found.tokens) - 1)


def test_packing_places_each_example_once_with_little_padding(tok, town):
    examples = encode_all(tok, town["dialogues"])
    sequences = sft.pack(examples, 256, seed=1)
    packed = [id(example) for sequence in sequences for example in sequence]
    assert sorted(packed) == sorted(map(id, examples))
    sizes = [sum(len(example.tokens) for example in sequence) for sequence in sequences]
    assert max(sizes) <= 256
    assert sum(sizes) > 0.95 * 256 * len(sizes)
    assert sequences != sft.pack(examples, 256, seed=2)


def test_unpacked_examples_stand_alone_among_others_of_their_length():
    examples = [sft.Example([1] * n, [1] * n) for n in range(2, 131)]
    batches = sft.batch_by_length(examples, 4, seed=3)
    sequences = sum(batches, [])
    assert all(len(sequence) == 1 for sequence in sequences)
    assert sorted(len(s[0].tokens) for s in sequences) == list(range(2, 131))
    spread = [len(b[-1][0].tokens) - len(b[0][0].tokens) for b in batches]
    assert sum(spread) / len(spread) < 12
    assert batches != sft.batch_by_length(examples, 4, seed=4)
    for pack in (True, False):  # batches know their epochs
        config = sft.Settings(pack=pack, epochs=3, seq_len=140)
        sequences = sum(sft.make_batches(examples, config), [])
        assert sum(map(len, sequences)) == 3 * len(examples)


def test_the_loss_counts_exactly_the_answers_and_their_eos_behind_each_logit(tok):
    one, two = say("one", "two"), say("a", "b c", "d", "e")
    examples = encode_all(tok, [dict(messages=one), dict(messages=two)])
    inputs_, targets, mask = sft.to_tensors([[examples[1], examples[0]], [examples[0]]], "cpu")
    assert torch.equal(inputs_[0, 1:], targets[0, :-1])

    def learned(example):
        return [t for t, m in zip(example.tokens, example.mask) if m]

    assert targets[0][mask[0]].tolist() == learned(examples[1]) + learned(examples[0])
    assert targets[1][mask[1]].tolist() == learned(examples[0])
    assert learned(examples[0])[-1] == tok.eos_id
    assert not mask[1, len(examples[0].tokens) :].any()


def test_sft_loss_by_hand_and_without_gradient_on_prompts():
    logits = torch.randn(2, 5, 7, requires_grad=True)
    targets, mask = torch.randint(7, (2, 5)), torch.rand(2, 5) < 0.5
    logprobs = logits.double().log_softmax(-1)
    by_hand = 0.0
    for b in range(2):
        for t in range(5):
            if mask[b, t]:
                by_hand -= logprobs[b, t, targets[b, t]].item()
    loss = sft.sft_loss(logits[mask], targets, mask)
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)
    assert 0 < mask.sum() < 10
    loss.backward()
    assert (logits.grad[~mask] == 0).all()
    assert (logits.grad[mask] != 0).any(-1).all()


def test_fine_tuning_teaches_to_answer_and_to_stop(tmp_path, inputs):
    """The probability of EOS behind an answer rises; prompts are learned where that is asked."""
    _, config = stage("sft", inputs, tmp_path / "out", epochs=20, batch_size=1, lr=3e-3)
    record = json.loads(Path(inputs.dialogues).read_text().splitlines()[0])

    def eos(folder):
        model, tok = load(folder)
        tokens = torch.tensor([sft.encode_example(record, tok, 256).tokens])
        return F.softmax(model(tokens)[0, -2], -1)[tok.eos_id].item()

    metrics = sft.main(replace(config, val_fraction=0.1))
    assert eos(inputs.base) < 0.1
    assert eos(config.out) > 0.5
    curve = losses(config.out)
    assert metrics["val_loss"] < curve[1] / 2
    everything = replace(config, out=str(tmp_path / "all"), epochs=1, mask_prompts=False)
    sft.main(everything)
    assert furthest(weights(everything.out), weights(config.out)) > 1e-4


# ----------------------------------------------------------------------------------------- train_rm
@pytest.mark.parametrize(
    "margin, by_rating",
    [("none", (0, 0, 0, 0)), ("small", (1, 2 / 3, 1 / 3, 0)), ("large", (3, 2, 1, 0))],
)
def test_the_ranking_loss_and_its_gradient_by_hand_for_each_margin(margin, by_rating):
    found = [reward.MARGINS[margin].get(rating, 0) for rating in RATINGS]
    assert tuple(found) == by_rating
    chosen, rejected = torch.tensor([1.0, -0.5, 2.0, 0.3], requires_grad=True), torch.randn(4)
    loss = reward.ranking_loss(chosen, rejected, torch.tensor(by_rating))
    gaps = [c - r - m for c, r, m in zip(chosen.tolist(), rejected.tolist(), by_rating)]
    assert loss.item() == pytest.approx(sum(math.log(1 + math.exp(-g)) for g in gaps), rel=1e-5)
    loss.backward()
    assert chosen.grad.tolist() == pytest.approx([-1 / (1 + math.exp(g)) for g in gaps], rel=1e-5)


def test_swapping_chosen_and_rejected_mirrors_the_loss():
    chosen, rejected = torch.randn(5), torch.randn(5)
    one = reward.ranking_loss(chosen, rejected, torch.zeros(5))
    other = reward.ranking_loss(rejected, chosen, torch.zeros(5))
    assert (other - one).item() == pytest.approx((chosen - rejected).sum().item(), abs=1e-5)


def test_the_safety_loss_uses_both_answers_labels_and_none_where_unknown():
    scores = torch.tensor([0.7, -0.2, 3.0], requires_grad=True)
    loss = reward.safety_loss(scores, torch.tensor([1, -1, 0]))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.7)) + math.log(1 + math.exp(-0.2)))
    loss.backward()
    assert scores.grad[0] < 0 < scores.grad[1]
    assert scores.grad[2] == 0


def encode_pairs(tok, *found, context=256, margin="large"):
    margins = reward.MARGINS[margin]
    return [reward.encode_pair(records.to_pair(r), tok, context, margins) for r in found]


def test_a_pair_carries_its_margin_and_its_labels(tok):
    rated = GOOD_PAIR | dict(rating="better", chosen_safe=True, rejected_safe=False)
    (example,) = encode_pairs(tok, rated, margin="small")
    assert (example.margin, example.chosen_label, example.rejected_label) == (2 / 3, 1, -1)
    (example,) = encode_pairs(tok, GOOD_PAIR)
    assert (example.margin, example.chosen_label, example.rejected_label) == (0, 0, 0)
    assert example.chosen == encode_dialog(tok, say("a", "b"))[0]


def test_the_loss_of_pairs_takes_scores_margins_and_labels_of_the_right_answers(tok):
    model = make_reward_model(tok)
    rated = GOOD_PAIR | dict(rating="better", chosen_safe=True, rejected_safe=False)
    longer = dict(prompt="who?", chosen="the fox and the owl", rejected="no")
    examples = encode_pairs(tok, rated, longer)
    c = llama2.score_sequences(model, [example.chosen for example in examples])
    r = llama2.score_sequences(model, [example.rejected for example in examples])

    def log_sigmoid(x):
        return -math.log(1 + math.exp(-x))

    ranking = -log_sigmoid(c[0] - r[0] - 2) - log_sigmoid(c[1] - r[1])
    safety = -log_sigmoid(c[0]) - log_sigmoid(-r[0])
    for aux in (0.0, 0.5):
        found = reward.pair_loss(model, examples, aux).item()
        assert found == pytest.approx(ranking + aux * safety, rel=1e-4)


def test_of_a_long_dialogue_the_end_is_kept_and_a_cut_difference_drops_the_pair(tok):
    pair = dict(prompt="word " * 60, chosen="yes", rejected="no")
    (whole,), (short,) = encode_pairs(tok, pair, context=1000), encode_pairs(tok, pair, context=20)
    assert (short.chosen, short.rejected) == (whole.chosen[-20:], whole.rejected[-20:])
    assert whole.chosen[-1] == whole.rejected[-1] == tok.eos_id
    with pytest.raises(records.SkipRecord, match="context"):
        pair = dict(prompt="a", chosen="yes" + " w" * 60, rejected="no" + " w" * 60)
        encode_pairs(tok, pair, context=20)


def test_each_model_learns_from_its_own_pairs_and_some_of_the_others():
    examples = [SimpleNamespace(kind="helpfulness")] * 50 + [SimpleNamespace(kind="safety")] * 90
    for kind, counts in (("helpfulness", (50, 50)), ("safety", (10, 90))):
        mixed = [example.kind for example in reward.mix(examples, kind, seed=0)]
        assert (mixed.count("helpfulness"), mixed.count("safety")) == counts
    with pytest.raises(ValueError, match="no pair of the kind safety"):
        reward.mix(examples[:50], "safety", seed=0)


def test_batches_hold_each_pair_once_an_epoch_and_micro_batches_little_padding():
    rng = random.Random(0)
    examples = [SimpleNamespace(chosen=[0] * rng.randint(1, 90), rejected=[0]) for _ in range(600)]
    batches = reward.make_batches(examples, 16, 2, seed=1)
    assert sorted(map(id, sum(batches, []))) == sorted(map(id, examples * 2))

    def padding(batches):
        total = 0
        for batch in batches:
            for at in range(0, len(batch), 4):
                lengths = [len(example.chosen) for example in batch[at : at + 4]]
                total += len(lengths) * max(lengths) - sum(lengths)
        return total

    shuffled = [rng.sample(batch, len(batch)) for batch in batches]
    assert padding(batches) < 0.6 * padding(shuffled)


def test_a_score_depends_on_its_dialogue_alone(tok):
    """Not on padding, companions or the side of a pair: read at the last token, nothing behind."""
    model = make_reward_model(tok)
    longer = say("who is it?", "the fox and the owl", "and", "no")
    dialogs = [say("a", "b"), longer, say("x y", "z")]
    alone = [llama2.score_dialogs(model, tok, [dialog])[0] for dialog in dialogs]
    assert llama2.score_dialogs(model, tok, dialogs) == pytest.approx(alone, abs=1e-5)
    assert llama2.score_dialogs(model, tok, dialogs[::-1]) == pytest.approx(alone[::-1], abs=1e-5)
    tokens = encode_dialog(tok, dialogs[0])[0]
    assert model(torch.tensor([tokens]))[0, -1].item() == pytest.approx(alone[0], abs=1e-5)
    long = say("w " * 400 + "end", "b")
    tokens = encode_dialog(tok, long)[0][-256:]
    by_hand = model(torch.tensor([tokens]))[0, -1].item()
    assert llama2.score_dialogs(model, tok, [long])[0] == pytest.approx(by_hand, abs=1e-5)


def test_a_reward_model_knows_what_the_chat_model_knows(tmp_path, base):
    """All weights but the head's are those of the chat model; saved, it loads as what it is."""
    chat, tok = load(base)
    model, _ = reward.make_reward_model(str(base), "cpu", "float32", seed=0)
    tokens = torch.randint(300, (2, 9))
    assert torch.equal(model.hidden(tokens), chat.hidden(tokens))
    save(tmp_path / "rm", model, tok)
    again, _ = load(tmp_path / "rm")
    assert type(again) is RewardModel
    assert torch.equal(again(tokens), model(tokens))
    assert "score.weight" in again.state_dict()
    assert "output.weight" not in again.state_dict()
    with pytest.raises(ValueError, match="holds a reward model, expected a language model"):
        load(tmp_path / "rm", expected=Transformer)
    later, _ = reward.make_reward_model(str(tmp_path / "rm"), "cpu", "float32", seed=5)
    assert torch.equal(later(tokens), model(tokens))  # a later round goes on with it


def test_a_reward_model_learns_to_order_answers_and_to_tell_unsafe_ones(tmp_path, inputs):
    _, config = stage("rm", inputs, tmp_path / "rm", epochs=20, lr=3e-3, val_fraction=0.0)
    reward.main(config)
    examiner = reward_models.Settings(folders=(str(folder_of(config)),), data=(inputs.pairs,))
    found = reward_models.main(examiner)
    ours = found["safety pairs, safety"]
    assert ours["significantly"] > 0.9
    assert found["separation, safety"]["auc"] > 0.95


# --------------------------------------------------------------------------------------- train_rlhf
def test_the_combined_reward_takes_safety_where_asked_or_needed():
    s = math.log(0.15 / 0.85)
    helpful = torch.tensor([1.0, 2.0, 3.0, 500.0, -500.0])
    safe = torch.tensor([-1.0, s - 0.01, s + 0.01, -300.0, 300.0])
    tags = torch.tensor([True, False, False, False, False])
    found, gated = rlhf.combined_reward(helpful, safe, tags)
    assert found.tolist() == pytest.approx([-1.0, s - 0.01, 3.0, -300.0, -500.0], abs=1e-6)
    assert gated.tolist() == [True, True, False, True, False]


def test_whitening_gives_mean_0_and_variance_1_of_what_the_mask_shows():
    x, mask = torch.randn(5, 7) * 3 + 4, torch.rand(5, 7) < 0.6
    white = rlhf.whiten(x, mask)
    shown = x[mask].tolist()
    mean = sum(shown) / len(shown)
    spread = math.sqrt(sum((v - mean) ** 2 for v in shown) / len(shown))
    by_hand = torch.tensor([(v - mean) / spread for v in shown])
    assert torch.allclose(white[mask], by_hand, atol=1e-5)
    assert (white[~mask] == 0).all()
    other = torch.where(mask, x, torch.full_like(x, 1e6))
    assert torch.allclose(rlhf.whiten(other, mask), white, atol=1e-4)
    assert rlhf.whiten(torch.ones(4)).tolist() == [0, 0, 0, 0]  # all alike: no signal, no NaN


def test_token_rewards_and_gae_by_hand():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    values = torch.tensor([[0.5, 1.0, -0.5], [2.0, 9.0, 9.0]])
    scores, kl = torch.tensor([3.0, -1.0]), torch.tensor([[0.1, -0.2, 0.3], [0.4, 9.0, 9.0]])
    rewards = rlhf.token_rewards(scores, kl, mask, beta=0.5)
    assert torch.allclose(rewards, torch.tensor([[-0.05, 0.1, 2.85], [-1.2, 0.0, 0.0]]))
    found = rlhf.gae(rewards, values, mask, 0.9, 0.8)
    d = [-0.05 + 0.9 * 1.0 - 0.5, 0.1 + 0.9 * -0.5 - 1.0, 2.85 + 0.5]
    by_hand = [d[0] + 0.72 * d[1] + 0.72**2 * d[2], d[1] + 0.72 * d[2], d[2]]
    assert found[0].tolist() == pytest.approx(by_hand)
    assert found[1].tolist() == pytest.approx([-1.2 - 2.0, 0, 0])


def test_gae_is_the_weighted_mean_of_all_n_step_advantages():
    n, gamma, lam = 9, 0.9, 0.8
    rewards, values = torch.randn(1, n), torch.randn(1, n)
    found = rlhf.gae(rewards, values, torch.ones(1, n, dtype=torch.bool), gamma, lam)
    for t in range(n):
        steps = []
        for k in range(1, n - t + 1):
            seen = sum(gamma**i * rewards[0, t + i].item() for i in range(k))
            rest = gamma**k * values[0, t + k].item() if t + k < n else 0
            steps.append(seen + rest - values[0, t].item())
        total = lam ** (len(steps) - 1) * steps[-1]
        for k, step in enumerate(steps[:-1]):
            total += (1 - lam) * lam**k * step
        assert found[0, t].item() == pytest.approx(total, abs=1e-4)


def test_the_clipped_policy_loss_and_its_gradient_by_hand():
    ratios, advantages = [0.5, 0.5, 1.5, 1.5, 1.1], [1.0, -1.0, 1.0, -1.0, 2.0]
    new = torch.tensor([[*map(math.log, ratios), 5.0]], requires_grad=True)
    mask = torch.tensor([[True] * 5 + [False]])
    advantages = torch.tensor([[*advantages, 7.0]])
    loss, ratio = rlhf.policy_loss(new, torch.zeros(1, 6), advantages, mask, 0.2)
    # min(ratio A, clip A): 0.5, -0.8, 1.2, -1.5, 2.2
    assert loss.item() == pytest.approx(-(0.5 - 0.8 + 1.2 - 1.5 + 2.2))
    assert ratio[0, 5] == 1
    loss.backward()  # d/dlog = ratio A where it is not clipped, 0 where it is
    assert new.grad[0].tolist() == pytest.approx([-0.5, 0, 0, 1.5, -2.2, 0])


def test_the_clipped_value_loss_by_hand_from_both_sides():
    values, mask = torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]])
    old_values, returns = torch.tensor([[0.9, 0.0, 0.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    # kept near: 1.0 and 0.2; the worse: (1 - 2)^2 and (3 - 1)^2
    assert rlhf.value_loss(values, old_values, returns, mask, 0.2).item() == pytest.approx(2.5)
    # a value that has moved far is held to what is near: 0.2 and -0.2, though 3 and -3 were better
    values, returns = torch.tensor([[3.0, -3.0]]), torch.tensor([[2.9, -2.9]])
    loss = rlhf.value_loss(values, torch.zeros(1, 2), returns, torch.ones(1, 2).bool(), 0.2)
    assert loss.item() == pytest.approx(2.7**2)


def answer_of(tokens, start, is_safety=False):
    prompt = records.Prompt(str(tokens[:start]), is_safety, tokens[:start])
    return records.Answer(prompt, tokens[start:], True)


@torch.no_grad()
def test_logprobs_and_values_stand_where_the_drawing_says():
    model, sequences, starts = make_model(), [[1, 5, 6, 7, 8, 2], [1, 9, 2]], [3, 2]
    found = [answer_of(sequence, start) for sequence, start in zip(sequences, starts)]
    rollout = rlhf.make_rollout(found, "cpu")
    assert rollout.response_mask.tolist() == [[True, True, True], [True, False, False]]
    logprobs = rlhf.answer_logprobs(model, rollout, temperature=0.7)
    critic = RewardModel(ARGS)
    values = rlhf.answer_values(critic, rollout)
    for n, (sequence, start) in enumerate(zip(sequences, starts)):
        for column, t in enumerate(range(start, len(sequence))):
            before = torch.tensor([sequence[:t]])
            p = (model(before)[0, -1].double() / 0.7).softmax(-1)
            by_hand = math.log(p[sequence[t]])
            assert logprobs[n, column].item() == pytest.approx(by_hand, abs=1e-4)
            assert values[n, column].item() == pytest.approx(critic(before)[0, -1].item(), abs=1e-5)


def ppo_models(tok, judges, **changes):
    config = rlhf.Settings(method="ppo", batch_size=12, mini_batch=12, **RLHF | changes)
    policy = make_model(vocab_size=tok.vocab_size)
    models = rlhf.load_reward_models(judges, policy, tok, "policy")
    folder = runs.Run(tempfile.mkdtemp(), config)
    learner, _ = rlhf.begin_ppo(policy, models, config, folder)
    asked = prompts.preference_prompts(world.town(1), 12)
    return config, learner, models, [records.to_prompt(one, tok, 64) for one in asked], folder


def one_update(learner, rollout, config, folder):
    """The weights of both models after a step of plain gradient descent."""
    models = copy.deepcopy((learner.policy, learner.value_model))
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in models]
    again = rlhf.Learner(models[0], learner.reference, models[1], *optimizers)
    sums = rlhf.update(again, rollout, 0, config, folder)
    return sums, [model.state_dict() for model in models]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_ratio_is_one_and_an_unchanged_policy_has_no_kl(tok, judges, dtype):
    config, learner, models, asked, folder = ppo_models(tok, judges)
    for model in (learner.policy, learner.reference, learner.value_model, *models.values()):
        model.matmul_dtype = dtype
    rollout, scores = rlhf.collect_rollout(learner, tok, models, asked, 3, config)
    sums, _ = one_update(learner, rollout, config, folder)
    stats = rlhf.statistics(rollout, scores, sums)
    assert abs(stats["kl"]) < 1e-4
    assert abs(stats["kl_k3"]) < 1e-6
    assert stats["first_ratio"] == pytest.approx(1, abs=1e-5)
    assert stats["clip_fraction"] == 0


def test_micro_batches_and_what_stands_behind_eos_change_no_update(tok, judges):
    more = dict(micro_batch=12, max_new_tokens=9)
    config, learner, models, asked, folder = ppo_models(tok, judges, **more)
    rollout, _ = rlhf.collect_rollout(learner, tok, models, asked, 3, config)
    assert not rollout.response_mask.all()
    _, whole = one_update(learner, rollout, config, folder)
    for size in (5, 1):
        _, cut = one_update(learner, rollout, replace(config, micro_batch=size), folder)
        assert all(furthest(a, b) < 1e-5 for a, b in zip(whole, cut))
    spoilt = copy.copy(rollout)
    for name in ("old_logprobs", "advantages", "values", "returns"):
        value = getattr(rollout, name)
        behind = torch.where(rollout.response_mask, value, torch.full_like(value, 1e3))
        setattr(spoilt, name, behind)
    _, same = one_update(learner, spoilt, config, folder)
    assert all(furthest(a, b) == 0 for a, b in zip(whole, same))


def test_reported_kl_is_the_mean_over_samples_of_the_log_ratio(tok, judges):
    config, learner, models, asked, folder = ppo_models(tok, judges)
    noise = torch.randn_like(learner.reference.output.weight)
    learner.reference.output.weight.data += 0.1 * noise
    rollout, scores = rlhf.collect_rollout(learner, tok, models, asked, 3, config)
    sums, _ = one_update(learner, rollout, config, folder)
    stats, k1, k3, tokens = rlhf.statistics(rollout, scores, sums), 0.0, 0.0, 0
    for sequence, start in zip(rollout.sequences, rollout.starts):
        both = learner.policy, learner.reference
        p, q = (m(torch.tensor([sequence]))[0].log_softmax(-1) for m in both)
        for t in range(start, len(sequence)):
            d = (p[t - 1, sequence[t]] - q[t - 1, sequence[t]]).item()
            k1, k3, tokens = k1 + d, k3 + math.exp(-d) - 1 + d, tokens + 1
    assert stats["kl"] == pytest.approx(k1 / 12, abs=1e-4)
    assert stats["kl_k1"] == pytest.approx(k1 / tokens, abs=1e-5)
    assert stats["kl_k3"] == pytest.approx(k3 / tokens, abs=1e-5)
    assert stats["kl_k3"] > 0


def test_ppo_finds_the_token_that_is_rewarded(tok, judges, monkeypatch):
    """A bandit: the reward is the share of one token among an answer's."""
    wanted = 77

    def score(models, found):
        good = torch.tensor([float(answer.tokens.count(wanted)) for answer in found])
        return rlhf.Scores(good, good, good, good < 0, good > -1)

    monkeypatch.setattr(rlhf, "score_answers", score)
    monkeypatch.setattr(rlhf, "evaluate", lambda *_: next(looks))
    looks = iter(range(999))
    config, learner, models, asked, folder = ppo_models(
        tok, judges, iterations=60, max_new_tokens=4, micro_batch=48
    )
    config = replace(config, batch_size=48, mini_batch=16, lr=3e-3, value_lr=3e-3, beta=0.01)
    policy = learner.policy
    torch.nn.init.normal_(policy.output.weight, std=0.02)

    def share():
        found = rlhf.generate_answers(policy, tok, asked * 20, 4, 1.0, 5)
        return sum(answer.tokens.count(wanted) for answer in found) / (4 * len(found))

    before = share()
    rlhf.ppo(policy, tok, models, asked * 4, asked, config, folder)
    assert before < 0.02
    assert share() > 0.8


def test_ppo_stops_when_held_out_prompts_gain_nothing_and_keeps_the_best(tok, judges, monkeypatch):
    looks, seen = iter([1.0, 3.0, 2.0, 2.5, 9.0]), []

    def evaluate(policy, *_):
        seen.append(copy.deepcopy(policy.state_dict()))
        return next(looks)

    monkeypatch.setattr(rlhf, "evaluate", evaluate)
    config, learner, models, asked, folder = ppo_models(
        tok, judges, iterations=9, patience=2, lr=1e-3, eval_every=1
    )
    policy = learner.policy
    assert rlhf.ppo(policy, tok, models, asked, asked, config, folder) == {"val_reward": 3.0}
    assert len(seen) == 4
    assert furthest(policy.state_dict(), seen[1]) == 0
    assert furthest(seen[1], seen[0]) > 0
    assert furthest(seen[1], seen[3]) > 0


def test_the_best_finished_answer_of_each_prompt_is_kept(tok, judges):
    """By slow loops: of K answers that of the highest reward, none that was cut off."""
    policy = make_model(vocab_size=tok.vocab_size)
    policy.output.weight.data[tok.eos_id] *= 3
    models = rlhf.load_reward_models(judges, policy, tok, "policy")
    asked = prompts.preference_prompts(world.town(1), 10)
    asked = [records.to_prompt(one, tok, 64) for one in asked]
    config = rlhf.Settings(**RLHF | dict(samples=8, max_new_tokens=20))
    folder = SimpleNamespace(rank=0, world_size=1)
    found, figures = rlhf.sample_best(policy, tok, models, asked, config, folder)
    repeated = [prompt for prompt in asked for _ in range(8)]
    sampled = generate(
        policy, [p.tokens for p in repeated], 20, 1.0, seed=1 + 10**6, eos_id=tok.eos_id
    )
    sequences = [prompt.tokens + out for prompt, out in zip(repeated, sampled)]
    helpful, safe = (llama2.score_sequences(models[kind], sequences) for kind in KINDS)
    expected, highest = [], []
    for n, prompt in enumerate(asked):
        rewards = {}
        for i in range(8 * n, 8 * n + 8):
            gated = prompt.is_safety or 1 / (1 + math.exp(-safe[i])) < 0.15
            rewards[i] = safe[i] if gated else helpful[i]
        highest.append(max(rewards.values()))
        finished = [i for i in rewards if sampled[i][-1] == tok.eos_id]
        if finished:
            best = max(finished, key=rewards.get)
            expected.append((prompt.text, pytest.approx(rewards[best], abs=1e-5)))
    assert [(record["prompt"], record["reward"]) for record in found] == expected
    assert 0 < len(expected)
    assert figures["left_out"] == 10 - len(expected)
    assert figures["max"] == pytest.approx(sum(highest) / 10, abs=1e-5)
    assert figures["max"] > figures["median"]


def test_the_pool_keeps_the_best_of_all_versions(tok, judges):
    policy = make_model(vocab_size=tok.vocab_size)
    models = rlhf.load_reward_models(judges, policy, tok, "policy")

    def answer(text, *tokens):
        return records.Answer(records.Prompt(text, False, [1, 5]), [*tokens, 2], True)

    earlier = [answer("a", 7), answer("b", 8), answer("a", 9)]
    newest = [answer("a", 10, 11), answer("c", 12)]
    pool = rlhf.make_pool(earlier + newest, models)
    assert sorted(found.prompt.text for found in pool) == ["a", "b", "c"]
    of_a = [earlier[0], earlier[2], newest[0]]
    rewards = [rlhf.score_answers(models, [found]).reward.item() for found in of_a]
    kept = next(found for found in pool if found.prompt.text == "a")
    assert kept == of_a[rewards.index(max(rewards))]


def test_the_coolest_temperature_that_is_not_clearly_behind_is_chosen(monkeypatch):
    torch.manual_seed(1)
    luck = torch.randn(100, 1)

    def sample_k(policy, tok, models, asked, K, max_new_tokens, temperature, seed):
        gain = {0.5: 0.0, 0.7: 0.99, 1.0: 1.0}[temperature]
        return None, None, luck + gain + 0.1 * torch.randn(100, 1)

    monkeypatch.setattr(rlhf, "sample_k", sample_k)
    config, folder = rlhf.Settings(temperatures=(1.0, 0.5, 0.7)), SimpleNamespace(rank=0)
    chosen, found = rlhf.choose_temperature(None, None, None, None, config, folder)
    assert chosen == 0.7
    assert found[1.0] - found[0.5] == pytest.approx(1, abs=0.1)


def test_reward_models_have_to_fit_the_policy(tmp_path, tok, letters, judges, capsys):
    policy = make_model(vocab_size=tok.vocab_size)
    other = RewardModel(replace(ARGS, vocab_size=letters.vocab_size))
    save(tmp_path / "other/helpfulness", other, letters)
    with pytest.raises(ValueError, match="other/helpfulness has another tokenizer than policy"):
        rlhf.load_reward_models(tmp_path / "other", policy, tok, "policy")
    policy.args = replace(policy.args, max_seq_len=257)
    with pytest.raises(ValueError, match="has a context of 256 tokens"):
        rlhf.load_reward_models(judges, policy, tok, "policy")
    save(tmp_path / "alone/helpfulness", make_reward_model(tok), tok)
    policy.args = replace(policy.args, max_seq_len=64)
    models = rlhf.load_reward_models(tmp_path / "alone", policy, tok, "policy")
    assert list(models) == ["helpfulness"]
    assert "only the helpfulness model gives the rewards" in capsys.readouterr().out
    found = rlhf.score_answers(models, [answer_of([1, 5, 6, 2], 2, is_safety=True)])
    assert found.reward == found.helpfulness


# ---------------------------------------------------------------------------------------- evaluate
def test_wilsons_interval_holds_the_truth_about_as_often_as_it_says():
    rng, held = random.Random(0), 0
    for _ in range(2000):
        low, high = wilson(sum(rng.random() < 0.9 for _ in range(50)), 50)
        held += low <= 0.9 <= high
    assert 0.93 < held / 2000 < 0.975
    assert wilson(0, 10)[0] == pytest.approx(0)
    assert wilson(10, 10)[1] <= 1


def test_models_are_called_by_as_much_of_their_folders_as_tells_them_apart():
    assert list(name_folders(["out/sft", "out/rlhf/v1/", "out/sft/"])) == ["sft", "v1"]
    found = name_folders(["out/rm/v1/safety", "out/rm/v2/safety"])
    assert list(found) == ["v1/safety", "v2/safety"]


def test_a_table_has_a_line_a_row_and_a_dash_where_nothing_is_known():
    lines = percent_table({"sft": {"right": 0.5}, "v1": {"right": 1, "wrong": 0}}).splitlines()
    assert [line.split() for line in lines] == [
        ["sft", "v1"], ["right", "50.0%", "100.0%"], ["wrong", "-", "0.0%"]
    ]


def test_shares_count_the_judgements_of_the_right_prompts():
    asked = [dict(FACT, stranger=True), FACT, CRIME, dict(CRIME, how="role play"), TASK]
    texts = ["Goat.", "Mira has a pet goose.", "Wait until it is dark.", SORRY, SORRY]
    found = answers.shares(asked, texts)
    assert found["facts right"] == 0.5
    assert found["  of residents never met"] == 1
    assert (found["violations"], found["  by attacks"]) == (1, 0)
    assert found["borderline prompts refused"] == 1
    assert found["plain prompts refused"] == 0
    assert "sums right" not in found


def test_recall_counts_whole_right_answers(tok, monkeypatch):
    said = [" cat. More", " dog.", " catalogue", " cat"]
    start = len(tok.encode("is a"))
    outs = [tok.encode("is a" + text)[start:] for text in said]
    monkeypatch.setattr(answers, "generate", lambda *_, **__: outs)
    assert answers.recall(None, tok, [{"prompt": "the pet is a", "answer": "cat"}] * 4) == 0.5


def test_accuracy_and_separation_by_hand():
    def pair(rating, chosen, rejected, labels):
        return SimpleNamespace(
            rating=rating, chosen=chosen, rejected=rejected,
            chosen_label=labels[0], rejected_label=labels[1],
        )

    pairs = [
        pair("better", [1, 2], [1, 2], (1, -1)), pair("better", [1, 2], [1], (1, -1)),
        pair(None, [1, 2], [1], (0, 1)),
    ]
    scores = [(1.0, 0.5), (-3.0, -2.0), (0.0, 0.0)]
    by_hand = {"better": (1.0, 2), "all": (1.5, 3), "equal length": (1.0, 1)}
    assert reward_models.accuracy(pairs, scores) == by_hand
    # safe: 1, -3, 0; unsafe: 0.5, -2. Of the 6 meetings, the safe one is higher in 1>.5 1>-2 0>-2
    told = reward_models.separation(pairs, scores)
    assert told["auc"] == pytest.approx(3 / 6)
    # sigmoid < 0.5: -3 (safe), -2 (unsafe); 0 is not below; < 0.15 (score < -1.73): the same two
    assert told["precision 0.5"] == told["precision 0.15"] == 0.5
    assert told["recall 0.5"] == told["recall 0.15"] == 0.5


def test_the_examination_of_obedience_reads_its_own_answers_behind_one_instruction(
    tmp_path, tok, base, monkeypatch, capsys
):
    """Where the context is full, answers are empty and count as disobeying."""
    seen = []

    def respond(model, tok, dialogs, *_):
        seen.append([[m["content"] for m in d] for d in dialogs])
        return ["The fox says: hm." if len(seen) < 4 else "Hm."] * len(dialogs)

    monkeypatch.setattr(answers, "respond", respond)
    asked = [dict(SUM, prompt=f"q{turn}") for turn in range(20)]
    one = dict(group="trained", instruction="Be the fox.", rules=[FOX], prompts=asked)
    path = write_jsonl(tmp_path / "o.jsonl", [one, one])
    config = answers.Settings(
        folders=(str(base),), obedience=str(path), max_new_tokens=9, **HERE_AND_EXACT
    )
    (groups,) = answers.main(config).values()
    found = groups["trained"]
    assert seen[1][0] == ["Be the fox. q0", "The fox says: hm.", "q1"]
    assert len(seen[0]) == 2
    assert found["obey"][:2] == [1, 1]
    assert found["obey"][-1] == 0
    assert "share of dialogues, at turn" in capsys.readouterr().out


def test_models_and_ppos_samples_are_examined_by_the_truth(tmp_path, inputs, base, town, capsys):
    held_out = str(write_jsonl(tmp_path / "h.jsonl", town["held-out"][::12]))
    config = answers.Settings(folders=(str(base),), prompts=held_out, **HERE_AND_EXACT, show=1)
    columns = answers.main(replace(config, json=str(tmp_path / "a.json")))
    assert [list(column)[0] for column in columns.values()] == ["facts right"] * 2
    assert json.loads((tmp_path / "a.json").read_text()) == columns
    short = tmp_path / "short"      # like the base of paper.sh, with half the context
    _, tok = load(base)
    save(short, make_model(vocab_size=tok.vocab_size, max_seq_len=128), tok)
    board = scoreboard.main(
        scoreboard.Settings(
            folders=(str(short), str(base)), against=str(base), rm=inputs.judges, prompts=held_out,
            max_new_tokens=5, **HERE_AND_EXACT,
        )
    )
    row, same = board["sampled"].values()
    assert row["points"] == same["points"]      # the same weights, the same prompts
    assert row["wins"] == row["wins by safety"] == 0.5
    assert abs(row["kl"]) < 1e-3
    asked, lines = town["prompts-val"][:8], []
    for step, text in ((0, "Hm."), (10, SORRY)):
        for one in asked:
            record = dict(step=step, prompt=one["prompt"], answer=text, reward=float(step))
            lines.append(record)
    samples = str(write_jsonl(tmp_path / "samples.jsonl", lines))
    config = answers.Settings(samples=samples, prompts=inputs.val_prompts)
    found = answers.main(config)
    assert found[0]["truth"] < found[10]["truth"]
    assert (found[0]["reward"], found[10]["reward"]) == (0, 10)
    with pytest.raises(ValueError, match="samples.jsonl:1: .* is not among"):
        answers.main(replace(config, prompts=held_out))


@pytest.mark.parametrize("option, line, words", [
    ("prompts", '{"prompt": "a"}', "expected an object with"),
    ("prompts", '{"prompt": "a", "topic": "fact"}', "expected a prompt of Tinytown"),
    ("prompts", '{"prompt": "a", "topic": "news", "truth": 1}', "expected a prompt of Tinytown"),
    ("prompts", "{", "broken JSON"), ("probes", '{"prompt": 5, "answer": "a"}', "'prompt' is mis"),
    ("probes", '["a"]', "expected an object"), ("probes", '{"prompt": "a', "broken JSON"),
    ("obedience", '{"group": "a"}', "expected an object with"),
    ("obedience", '{"group": "a", "instruction": "b", "prompts": [], "rules": []}', "needs 20"),
    ("samples", '{"prompt": "a", "answer": "b"}', "expected an object with"),
    ("samples", "[[", "broken JSON"),
])
def test_a_file_to_examine_by_that_does_not_fit_is_named_with_its_line(
    tmp_path, base, inputs, capsys, monkeypatch, option, line, words
):
    path = tmp_path / "f.jsonl"
    path.write_text("\n" + line + "\n")
    files = {"prompts": inputs.val_prompts, option: str(path)}
    config = answers.Settings(folders=(str(base),), **HERE_AND_EXACT, **files)
    place = "f.jsonl:2" if line[0] != "[" else "f.jsonl"
    expect_one_line(capsys, monkeypatch, config, answers, place, words)


def test_models_that_are_examined_or_joined_must_read_the_same_tokens(
    tmp_path, inputs, letters, capsys, monkeypatch
):
    other = tmp_path / "other"
    save(other, make_model(vocab_size=letters.vocab_size), letters)
    save(tmp_path / "rm/safety", make_reward_model(letters), letters)
    save(tmp_path / "rm/helpfulness", make_reward_model(letters), letters)
    held_out = write_jsonl(tmp_path / "h.jsonl", [ASKED])
    words = "has another tokenizer than"
    one, pre = Path(inputs.judges) / "safety", write_jsonl(tmp_path / "i.jsonl", [FOX])
    for script, settings in (
        (scoreboard, dict(folders=[other], against=inputs.base, rm=inputs.judges)),
        (scoreboard, dict(folders=[inputs.base], against=inputs.base, rm=tmp_path / "rm")),
        (reward_models, dict(folders=[one, tmp_path / "rm/safety"], data=[inputs.pairs])),
        (preferences, dict(chat=inputs.base, other=other, prompts=[inputs.prompts])),
        (distillation, dict(chat=inputs.base, rm=tmp_path / "rm/safety", pre_prompts=[pre])),
    ):
        more = dict(prompts=held_out) if script is scoreboard else {}
        more |= dict(out=tmp_path / "o.jsonl") if hasattr(script.Settings, "out") else {}
        more |= dict(data=[inputs.prompts]) if script is distillation else {}
        found = {name: tuple(map(str, value)) if isinstance(value, list) else str(value)
                 for name, value in (settings | more).items()}
        config = script.Settings(**HERE_AND_EXACT, **found)
        expect_one_line(capsys, monkeypatch, config, script, words)


# -------------------------------------------------------------------------------------------- bench
def test_the_benchmark_does_the_work_that_it_counts():
    work = speed.Work(ARGS, "float32")
    before = copy.deepcopy(work.model.state_dict())
    sizes = {
        "train": (dict(rows=2, length=8), 16), "prompt": (dict(rows=3, length=5), 15),
        "decode": (dict(rows=2, length=4, new=6), 12), "score": (dict(lengths=[3, 9]), 12),
        "ppo": (dict(lengths=[4, 5, 6, 7], new=3, mini_batch=2, micro_batch=1), 4),
    }
    assert {name for _, name, _ in speed.WORK.values()} == sizes.keys()
    for name, (size, amount) in sizes.items():
        assert getattr(work, name)(**size) == amount
        assert (furthest(work.model.state_dict(), before) > 0) is (name in ("train", "ppo"))
        before = copy.deepcopy(work.model.state_dict())


# ------------------------------------------------------------------------------- command line, chat
def test_a_chat_remembers_its_turns(tok, monkeypatch, capsys):
    model, seen = make_model(vocab_size=tok.vocab_size), []

    def fake(model, tok, prompt, *_):
        seen.append(prompt)
        yield from (" so", "-so [INST]")

    monkeypatch.setattr(llama2, "stream", fake)
    given = SimpleNamespace(max_new_tokens=200, temperature=0.8, top_p=0.95)
    turns = llama2.answer(model, tok, [], say("a"), given, 0)
    assert turns == say("a", "so-so")
    given.max_new_tokens = 1
    llama2.answer(model, tok, say("a", system="s")[:1], turns + say("b"), given, 0)
    assert seen[1] == encode_dialog(tok, say("a", "so-so", "b", system="s"))[0]
    assert capsys.readouterr().out.startswith("so-so")


def test_ctrl_c_ends_an_answer_and_not_the_program(capsys):
    def pieces():
        yield "half"
        raise KeyboardInterrupt

    assert llama2.print_stream(pieces()) == "half"


def typed(monkeypatch, lines: bytes):
    """Standard input, as through a pipe in a UTF-8 locale."""
    text = io.TextIOWrapper(io.BytesIO(lines), "utf-8", "surrogateescape")
    monkeypatch.setattr(sys, "stdin", text)


def test_a_chat_through_a_pipe_survives_what_people_type(base, judges, monkeypatch, capsys):
    lines = b"Hello.\n/system Be kind.\nWho are you?\ncaf\xe9\n[INST] me\n/what\n/reset\n"
    typed(monkeypatch, lines + b"Hi.\n" * 25 + b"/quit\nnever\n")
    options = ("--max-new-tokens", "8", "--temperature", "0", "--reward", str(judges / "safety"))
    llama2.main(["chat", str(base), *options])
    said = capsys.readouterr().out
    assert "a new dialogue, system message: Be kind." in said
    assert "contains [INST]" in said
    assert "surrogates not allowed" in said     # bytes that are no text
    assert said.count("/quit ends") == 2
    assert "the context of 256 tokens is full: the oldest" in said
    assert said.count("(reward ") == 27
    assert "usage" in run("llama2.py", "--help").stdout


@pytest.mark.parametrize("argv, words", [
    (["chat", "BASE", "--device", "foo"], "foo"),
    (["complete", "BASE"], 'expected: complete FOLDER "text"'),
    (["complete", "BASE", "caf\udce9"], "surrogates not allowed"),
    (["complete", "BASE", "a", "--temperature", "nan"], "temperature=nan"),
    (["complete", "BASE", "a", "--temperature", "1e-40"], "temperature=1e-40"),
    (["complete", "BASE", "a", "--top-p", "2"], "top_p=2"),
    (["complete", "BASE", "a", "--max-new-tokens", "-3"], "max_new_tokens=-3"),
    (["complete", "BASE", "word " * 300], "the context only 256"),
    (["chat", "JUDGE"], "holds a reward model, expected a language model"),
    (["chat", "BASE", "--reward", "BASE"], "holds a language model, expected a reward model"),
])
def test_a_mistake_at_the_command_line_of_llama2_is_one_line(base, judges, capsys, argv, words):
    places = {"BASE": str(base), "JUDGE": str(judges / "safety")}
    with pytest.raises(SystemExit) as e:
        llama2.main([places.get(word, word) for word in argv])
    error = capsys.readouterr().err
    assert (e.value.code, error.count("\n")) == (2, 1)
    assert words in error


# ----------------------------------------------------------- contracts that every stage keeps
def interrupt_at(step, script, monkeypatch, signals=0):
    """At its step-th step the script's optimizer fails; or its process is sent signals."""
    calls = []

    def clip_and_step(*args):
        calls.append(1)
        if len(calls) == step:
            if not signals:
                raise KeyboardInterrupt
            for _ in range(signals):
                os.kill(os.getpid(), signal.SIGINT)
        return training.clip_and_step(*args)

    for module in {script, sft if script is rlhf else script}:
        monkeypatch.setattr(module, "clip_and_step", clip_and_step)


def with_ends(monkeypatch):
    """Samples that end with EOS, which a random model's seldom do."""

    def ends(model, prompts, max_new_tokens, temperature, top_p, seed, eos_id):
        return [ids + [eos_id] for ids in generate(model, prompts, 4, temperature, 1.0, seed)]

    monkeypatch.setattr(rlhf, "generate", ends)


@pytest.mark.parametrize("name", STAGES)
def test_an_interrupted_run_goes_on_exactly(tmp_path, inputs, name, monkeypatch):
    with_ends(monkeypatch)
    script, whole = stage(name, inputs, tmp_path / "whole")
    metrics = script.main(whole)
    cut = replace(whole, out=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        interrupt_at({"ppo": 9}.get(name, 6), script, patch)
        with pytest.raises(KeyboardInterrupt):
            script.main(cut)
    assert (folder_of(cut) / "resume.pt").exists()
    with pytest.raises(ValueError, match="unfinished run: --resume it"):
        script.main(cut)
    with pytest.raises(ValueError, match="made with other settings: seed was 1, now 2"):
        script.main(replace(cut, resume=True, seed=2))
    assert script.main(replace(cut, resume=True)) == metrics
    assert furthest(weights(folder_of(whole)), weights(folder_of(cut))) == 0
    assert last_lines(folder_of(whole)) == last_lines(folder_of(cut))
    if name == "ppo":
        samples = [(folder_of(config) / "samples.jsonl").read_text() for config in (whole, cut)]
        assert set(samples[0].splitlines()) == set(samples[1].splitlines())


@pytest.mark.parametrize("name", STAGES)
def test_a_run_that_is_asked_to_stop_saves_behind_its_step_and_says_how_it_goes_on(
    tmp_path, inputs, name, monkeypatch, capsys
):
    with_ends(monkeypatch)
    script, whole = stage(name, inputs, tmp_path / "whole", save_every=1000)
    script.main(whole)
    cut = replace(whole, out=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        interrupt_at(5, script, patch, signals=1)
        patch.setattr(sys, "argv", [f"{script.__name__}.py", "--lr", "1", "--overwrite"])
        with pytest.raises(runs.Stopped, match="stopped and saved after step") as e:
            script.main(cut)
    assert str(e.value).endswith(f"python {script.__name__}.py --lr 1 --resume")
    step = torch.load(folder_of(cut) / "resume.pt", weights_only=True)["step"]
    assert step == {"ppo": 2}.get(name, 5)          # an iteration of PPO has 4 steps here
    # what changes nothing that is learned may change
    script.main(replace(cut, resume=True, log_every=3, save_every=2) if name in SCRIPTS
                else replace(cut, resume=True, save_every=2))
    assert furthest(weights(folder_of(whole)), weights(folder_of(cut))) == 0
    with monkeypatch.context() as patch:            # a second Ctrl-C does not wait
        interrupt_at(2, script, patch, signals=2)
        with pytest.raises(KeyboardInterrupt):
            script.main(replace(cut, overwrite=True))


def test_a_reader_that_has_seen_enough_ends_a_run_without_a_traceback(tmp_path, inputs):
    _, config = stage("sft", inputs, tmp_path / "out", epochs=500)
    process = subprocess.Popen(
        [sys.executable, "train_sft.py", *flags(config)], cwd=HERE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


def test_a_signal_that_comes_while_processes_talk_is_not_lost(tmp_path, monkeypatch):
    run_ = runs.Run(tmp_path, sft.Settings(save_every=1000))

    def gather_slowly(rows):
        run_.asked_to_stop = True       # what the signal's handler does, at the worst moment
        return rows

    monkeypatch.setattr(runs, "all_gather", gather_slowly)
    assert [run_.save_due(1), run_.save_due(2)] == [False, True]


@pytest.mark.parametrize("name, figure", [
    ("pretrain", "val/stories"), ("sft", "val_loss"), ("rm", "accuracy")
])
def test_the_best_model_on_held_out_data_or_the_last_one_is_kept(
    tmp_path, inputs, name, figure, monkeypatch
):
    """Looks are told to fall behind the second; a run cut behind it remembers the best as well."""
    script, config = stage(name, inputs, tmp_path / "last", eval_every=2, keep="last")
    sign, looks, seen = (-1 if figure != "accuracy" else 1), [], []
    if name == "rm":
        config = replace(config, epochs=8, val_fraction=0.4)

    def evaluate(model, *_):
        looks.append(0)
        seen.append(copy.deepcopy(model.state_dict()))
        return {figure: sign * {1: 0.3, 2: 0.9}.get(len(looks), 0.5)}

    monkeypatch.setattr(script, "evaluate", evaluate)
    script.main(config)
    assert furthest(weights(folder_of(config)), seen[-1]) == 0
    assert len(seen) > 2
    looks.clear()
    seen.clear()
    best = replace(config, out=str(tmp_path / "best"), keep="best")
    with monkeypatch.context() as patch:
        interrupt_at(7, script, patch)
        with pytest.raises(KeyboardInterrupt):
            script.main(best)
    script.main(replace(best, resume=True))
    assert furthest(weights(folder_of(best)), seen[1]) == 0
    assert furthest(weights(folder_of(best)), weights(folder_of(config))) > 0
    with pytest.raises(ValueError, match="made with other settings: eval_every was 2, now 3"):
        script.main(replace(best, resume=True, eval_every=3))


def test_a_run_killed_at_any_step_and_resumed_ends_with_the_same_weights(
    tmp_path, inputs, monkeypatch
):
    _, whole = stage("pretrain", inputs, tmp_path / "whole", max_steps=60, save_every=7)
    pretrain.main(whole)
    cut = replace(whole, out=str(tmp_path / "cut"), resume=True)
    with monkeypatch.context() as patch:        # before the first save
        interrupt_at(3, pretrain, patch)
        with pytest.raises(KeyboardInterrupt):
            pretrain.main(cut)
    process = subprocess.Popen(                 # and after it, without a chance to tidy up
        [sys.executable, "train_pretrain.py", *flags(cut)], cwd=HERE, stdout=subprocess.DEVNULL
    )
    steps = 0
    while process.poll() is None and steps <= 25:
        with contextlib.suppress(FileNotFoundError):    # the new run takes the old one's log away
            steps = len((tmp_path / "cut/metrics.jsonl").read_text().splitlines())
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    pretrain.main(cut)
    assert furthest(weights(whole.out), weights(cut.out)) == 0
    assert losses(whole.out) == losses(cut.out)


TOGETHER = """import sys
import test_llama2
from common.run import run_script
from common.settings import parse_settings
test_llama2.rlhf.generate = test_llama2.given_answers
*commands, endless = open(sys.argv[1]).read().splitlines()
for command in commands:
    name, *argv = command.split("\\t")
    script = test_llama2.SCRIPTS.get(name, test_llama2.rlhf)
    script.main(parse_settings(script.Settings, {}, "", argv))
test_llama2.training.print0("now the endless one")
sys.argv = ["train_sft.py", *endless.split("\\t")[1:]]
run_script(test_llama2.sft.main, test_llama2.sft.Settings, {})
"""


def given_answers(model, prompts, *_):
    """In place of sampled ones, for each process samples on its own."""
    return [[5 + len(prompt) % 7, 9 + sum(prompt) % 5, 2] for prompt in prompts]


@pytest.fixture(scope="module")
def together(tmp_path_factory, inputs):
    """All that needs two processes, by one torchrun: importing torch takes long.

    ({stage: (settings of its run by one process, by two)}, an endless run's folder, what that run
    said after torchrun was told to stop).
    """
    folder, settings, lines = tmp_path_factory.mktemp("together"), {}, ""
    for name in STAGES:
        more = dict(mini_batch=8, iterations=3) if name == "ppo" else {}
        script, one = stage(name, inputs, folder / name / "one", **more)
        two = replace(one, out=str(folder / name / "two"))
        settings[name] = one, two
        lines += "\t".join([name, *flags(two)]) + "\n"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rlhf, "generate", given_answers)
            script.main(one)
    _, endless = stage("sft", inputs, folder / "endless", epochs=500)
    (folder / "script.py").write_text(TOGETHER)
    (folder / "commands").write_text(lines + "\t".join(["sft", *flags(endless)]))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.Popen(
        [sys.executable, *command, folder / "script.py", folder / "commands"], text=True,
        stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(HERE)},
    )
    said = ""
    for line in process.stdout:
        said += line
        if "now the endless one" in said and line.startswith("step"):
            process.send_signal(signal.SIGTERM)
            break
    said = process.stdout.read()
    process.wait()
    return settings, endless.out, said


def test_all_processes_stop_at_one_step_when_torchrun_is_told_to(together):
    _, folder, said = together
    assert "stopped and saved after step" in said
    assert "torchrun --nproc_per_node=2 train_sft.py" in said
    step = torch.load(Path(folder) / "resume.pt", weights_only=True)["step"]
    assert f"after step {step} of" in said


@pytest.mark.parametrize("name", STAGES)
def test_two_processes_train_like_one(together, inputs, name):
    """As mini-batches are dealt and cut."""
    one, two = together[0][name]
    logs = [logged(folder_of(config)) for config in (one, two)]
    assert len(logs[0]) == len(logs[1]) > 0
    for a, b in zip(*logs):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], abs=3e-4), key
    moved = furthest(weights(folder_of(one)), weights(inputs.base)) if name != "rm" else 1e-2
    # the same answers are never better: PPO ends as it was best, at its start
    assert furthest(weights(folder_of(one)), weights(folder_of(two))) <= moved / 10
    assert (moved > 0) is (name != "ppo")


@pytest.mark.parametrize("name", ["pretrain", "sft", "rm", "rejection-sampling"])
def test_the_size_of_a_micro_batch_changes_no_step(tmp_path, inputs, name, monkeypatch):
    with_ends(monkeypatch)
    found = []
    for changes in (dict(micro_batch=1), dict(micro_batch=4), dict(seed=2)):
        script, config = stage(name, inputs, tmp_path / str(changes), **changes)
        script.main(config)
        found.append(weights(folder_of(config)))
    assert furthest(found[0], found[1]) < 2e-5
    assert furthest(found[0], found[2]) > 1e-4


@pytest.mark.parametrize("name", STAGES)
def test_in_bfloat16_a_stage_ends_with_the_same_bytes_and_other_than_in_float32(
    tmp_path, inputs, name, monkeypatch
):
    with_ends(monkeypatch)
    found = []
    for i, dtype in enumerate(("bfloat16", "bfloat16", "float32")):
        more = dict(epochs=1) if name in ("sft", "rm") else dict(tune_epochs=1, iterations=2)
        more = dict(max_steps=5) if name == "pretrain" else more
        script, config = stage(name, inputs, tmp_path / str(i), dtype=dtype, keep="last", **more)
        script.main(config)
        found.append(weights(folder_of(config)))
    assert furthest(found[0], found[1]) == 0
    assert furthest(found[0], found[2]) > 0
    assert all(weight.dtype == torch.float32 for weight in found[0].values())


@pytest.mark.parametrize("name", STAGES)
def test_a_finished_run_is_kept_and_says_so(tmp_path, inputs, name, monkeypatch, capsys):
    with_ends(monkeypatch)
    script, config = stage(name, inputs, tmp_path / "out")
    script.main(config)
    before = weights(folder_of(config))
    expect_one_line(capsys, monkeypatch, config, script, "holds a finished run", "--overwrite")
    monkeypatch.setattr(sys, "argv", [script.__file__, *flags(replace(config, resume=True))])
    runs.run_script(script.main, script.Settings, script.PAPER)
    assert f"{folder_of(config)} is finished" in capsys.readouterr().out
    gone = replace(config, overwrite=True, **({} if name == "pretrain" else {"init": "gone"}))
    if name == "pretrain":
        gone = replace(gone, data="gone")
    expect_one_line(capsys, monkeypatch, gone, script, "gone")
    assert furthest(weights(folder_of(config)), before) == 0
    script.main(replace(config, overwrite=True, seed=2))
    assert furthest(weights(folder_of(config)), before) > 0


@pytest.mark.parametrize("name, what", [
    ("pretrain", "tokens/stories.train.00000.bin"), ("pretrain", "tokens/index.json"),
    ("pretrain", "base/tokenizer.model"), ("sft", "dialogues.jsonl"), ("sft", "base/params.json"),
    ("rm", "pairs.jsonl"), ("rm", "base/consolidated.00.pth"),
    ("rejection-sampling", "prompts.jsonl"), ("ppo", "val.jsonl"),
    ("ppo", "judges/safety/consolidated.00.pth"),
])
def test_a_run_does_not_go_on_when_a_file_that_it_reads_has_changed(
    tmp_path, inputs, name, what, monkeypatch
):
    with_ends(monkeypatch)
    mine = copied(inputs, tmp_path)
    script, config = stage(name, mine, tmp_path / "out")
    with monkeypatch.context() as patch:
        interrupt_at(9 if name == "ppo" else 6, script, patch)
        with pytest.raises(KeyboardInterrupt):
            script.main(config)
    path = tmp_path / what
    before = path.read_bytes()
    path.write_bytes(before[:-2] + b"\1\0" if path.suffix == ".bin" else before + b"\n")
    with pytest.raises(ValueError, match=f"made from other data: .*{path.name} has changed"):
        script.main(replace(config, resume=True))


def copied(inputs, folder):
    """The inputs, in a folder where they may be spoilt."""
    found = {}
    for name, path in vars(inputs).items():
        target = folder / {"base": "base", "judges": "judges"}.get(name, Path(path).name)
        (shutil.copytree if Path(path).is_dir() else shutil.copy)(path, target)
        found[name] = str(target)
    return SimpleNamespace(**found)


@pytest.mark.parametrize("name, content, words", [
    ("resume.pt", b"half", "resume.pt: damaged"), ("resume.pt", b"", "resume.pt: damaged"),
    ("resume.pt", [1], "resume.pt: damaged"), ("resume.pt", {"step": 2}, "resume.pt: damaged"),
    ("config.json", b"{", "config.json: broken JSON"), ("config.json", b"[]", "config.json: exp"),
])
def test_a_damaged_file_of_a_run_is_named_in_one_line(
    tmp_path, inputs, name, content, words, monkeypatch
):
    script, config = stage("sft", inputs, tmp_path / "out")
    with monkeypatch.context() as patch:
        interrupt_at(6, script, patch)
        with pytest.raises(KeyboardInterrupt):
            script.main(config)
    path = tmp_path / "out" / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=words):
        script.main(replace(config, resume=True))


def test_a_full_disk_ends_a_run_in_one_line_and_what_was_saved_goes_on(
    tmp_path, inputs, capsys, monkeypatch
):
    """A limit to the size of a file stands in for it: the weights do not fit."""
    _, config = stage("sft", inputs, tmp_path / "out", epochs=4)
    sft.main(whole := replace(config, out=str(tmp_path / "whole")))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, before[1]))
    try:
        expect_one_line(capsys, monkeypatch, config, sft, "disk full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    sft.main(replace(config, resume=True))
    assert furthest(weights(whole.out), weights(config.out)) == 0


@pytest.mark.parametrize("name", STAGES)
def test_resume_and_overwrite_together_are_refused_by_name(
    tmp_path, inputs, name, capsys, monkeypatch
):
    script, config = stage(name, inputs, tmp_path / "out", resume=True, overwrite=True)
    words = "--resume continues the run", "--overwrite deletes it", "only one"
    expect_one_line(capsys, monkeypatch, config, script, *words)


FINISHED, UNFINISHED, EMPTY = "consolidated.00.pth", "resume.pt", "params.json"
HOLDS = "holds a finished run: choose", "holds an unfinished run: --resume it, choose"


@pytest.mark.parametrize("file, options, outcome", [
    (EMPTY, {}, "new"), (EMPTY, dict(resume=True), "new"), (EMPTY, dict(overwrite=True), "new"),
    (UNFINISHED, {}, HOLDS[1]), (UNFINISHED, dict(resume=True), "continue"),
    (UNFINISHED, dict(overwrite=True), "new"),
    (FINISHED, {}, HOLDS[0]), (FINISHED, dict(resume=True), "is finished"),
    (FINISHED, dict(overwrite=True), "new"),
])
def test_what_a_run_does_with_what_its_folder_holds(tmp_path, file, options, outcome):
    config = sft.Settings(out=str(tmp_path))
    runs.write_json(tmp_path / "config.json", runs.made_of(config, []))
    torch.save({"step": 3, "model": {}, "optimizer": {}, "best": {}}, tmp_path / file)
    if outcome in ("new", "continue"):
        run_ = runs.Run(tmp_path, replace(config, **options))
        assert (run_.state is None) is (outcome == "new")
        assert (tmp_path / file).exists()       # nothing is deleted before the run starts
        model = SimpleNamespace(load_state_dict=lambda state: None)
        assert run_.begin(model, model, 9) == (0 if outcome == "new" else 3)
        assert (tmp_path / file).exists() is (outcome == "continue")
    else:
        with pytest.raises((ValueError, runs.Finished), match=outcome):
            runs.Run(tmp_path, replace(config, **options))


def test_one_folder_holds_one_run(tmp_path, inputs, monkeypatch):
    with_ends(monkeypatch)
    script, first = stage("rejection-sampling", inputs, tmp_path / "out")
    script.main(first)
    assert (tmp_path / "out/best.jsonl").exists()
    _, second = stage("ppo", inputs, tmp_path / "out", overwrite=True)
    script.main(second)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    checkpoint = {"params.json", "consolidated.00.pth", "tokenizer.model"}
    assert names == {"config.json", "metrics.jsonl", "samples.jsonl", ".lock"} | checkpoint


def test_a_run_does_not_replace_what_it_begins_with(tmp_path, inputs, capsys, monkeypatch):
    mine = copied(inputs, tmp_path)
    before = (tmp_path / "base/consolidated.00.pth").read_bytes()
    for name in ("sft", "pretrain", "rejection-sampling"):
        script, config = stage(name, mine, mine.base, overwrite=True)
        expect_one_line(capsys, monkeypatch, config, script, "which this run starts from")
    config = collecting(mine, mine.prompts, overwrite=True)
    expect_one_line(capsys, monkeypatch, config, preferences, "prompts.jsonl is also an input")
    assert (tmp_path / "base/consolidated.00.pth").read_bytes() == before


@pytest.mark.parametrize("command", ["data.corpus", "data.preferences"])
def test_two_commands_cannot_write_one_file_at_once(tmp_path, inputs, command, monkeypatch):
    def held(lock):
        raise runs.Timeout(lock.lock_file)

    script, config = {
        "data.corpus": (corpus, corpus.Settings(data=(inputs.text,), out=str(tmp_path / "t"))),
        "data.preferences": (preferences, collecting(inputs, tmp_path / "p.jsonl")),
    }[command]
    monkeypatch.setattr(runs.FileLock, "acquire", held)
    with pytest.raises(ValueError, match=f"{config.out} is in use by another process"):
        script.main(config)


def test_memory_that_runs_out_is_one_line(tmp_path, inputs, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    _, config = stage("sft", inputs, tmp_path / "out")
    monkeypatch.setattr(sft, "sft_loss", full)
    expect_one_line(capsys, monkeypatch, config, sft, "out of memory: lower --micro-batch")


LOSSES = {"pretrain": "next_token_loss", "sft": "sft_loss", "rm": "ranking_loss",
          "rejection-sampling": "sft_loss", "ppo": "policy_loss", "ppo, values": "value_loss"}


@pytest.mark.parametrize("name", LOSSES)
def test_a_nan_gradient_ends_a_run_in_one_line_and_the_last_save_stays_whole(
    tmp_path, inputs, name, monkeypatch, capsys
):
    """PPO has two models: a NaN in either one's gradient ends the run."""
    with_ends(monkeypatch)
    script, config = stage(name.split(",")[0], inputs, tmp_path / "out", save_every=2)
    module = sft if name == "rejection-sampling" else script
    real, found = getattr(module, LOSSES[name]), []
    saved = folder_of(config) / "resume.pt"

    def nan_after_the_first_save(*args):
        loss = real(*args)
        if not saved.exists():
            return loss
        found[:] = found or [saved.read_bytes()]
        nan = float("nan")
        return (loss[0] * nan, loss[1]) if isinstance(loss, tuple) else loss * nan

    monkeypatch.setattr(module, LOSSES[name], nan_after_the_first_save)
    words = "the gradient is NaN or infinite", f"the last save is intact: {saved}"
    expect_one_line(capsys, monkeypatch, config, script, *words)
    assert found == [saved.read_bytes()]
    assert not (folder_of(config) / "consolidated.00.pth").exists()
    monkeypatch.setattr(module, LOSSES[name], real)
    script.main(replace(config, resume=True))       # the save is whole: the run can be finished
    assert (folder_of(config) / "consolidated.00.pth").exists()


def test_a_nan_gradient_before_the_first_save_says_that_nothing_was_saved(
    tmp_path, inputs, monkeypatch, capsys
):
    _, config = stage("sft", inputs, tmp_path / "out")
    real = sft.sft_loss
    monkeypatch.setattr(sft, "sft_loss", lambda *args: real(*args) * float("inf"))
    words = "the gradient is NaN or infinite", f"nothing was saved in {tmp_path / 'out'} yet"
    expect_one_line(capsys, monkeypatch, config, sft, *words)


def test_processes_wait_for_one_that_prepares_data_for_hours(monkeypatch):
    given = {}
    monkeypatch.setattr(training.dist, "init_process_group", lambda *_, **how: given.update(how))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    threads = torch.get_num_threads()
    training.setup("cpu")
    torch.set_num_threads(threads)
    assert given["timeout"].total_seconds() >= 3600


# --------------------------------------------------------------------------------------- bad input
def expect_one_line(capsys, monkeypatch, config, script, *words):
    """The command ends with exit code 2 and one line that has these words."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *flags(config)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        runs.run_script(script.main, script.Settings, getattr(script, "PAPER", {}))
    error = capsys.readouterr().err
    assert e.value.code == 2, error
    assert error.count("\n") == 1, error
    assert all(word in error for word in words), error


GOOD = b'{"text": "a fox"}\n'


@pytest.mark.parametrize("name, content, words", [
    ("none.txt", None, ["none.txt", "does not exist"]), ("a.pdf", b"x", [".txt, .jsonl"]),
    ("empty.txt", b"", ["empty"]), ("empty.jsonl", b"\n\n", ["empty"]),
    ("latin.txt", "naïve café".encode("latin-1"), ["latin.txt", "not UTF-8"]),
    ("latin.jsonl", GOOD + '{"text": "é"}'.encode("latin-1"), ["latin.jsonl:2", "not UTF-8"]),
    ("binary.txt", b"ab\0cd" * 50, ["binary.txt", "binary"]),
    ("a.jsonl", GOOD + b'{"text": "a\n', ["a.jsonl:2", "broken JSON"]),
    ("b.jsonl", GOOD + b'{"content": "a"}\n', ["b.jsonl:2", '"text"']),
    ("c.jsonl", b'["a"]\n', ["c.jsonl: record 1", '"text"']),
    ("d.jsonl", b'{"text": 5}\n', ["d.jsonl:1", '"text"']),
    ("e.jsonl", b'{"text": "\\ud800"}\n', ["e.jsonl:1", "UTF-8"]),
    ("f.jsonl.gz", b"not gzip", ["f.jsonl.gz", "gzip"]),
    ("g.jsonl.gz", gzip.compress(GOOD * 99)[:-9], ["g.jsonl.gz", "gzip"]),
])
def test_bad_text_stops_with_one_line(tmp_path, capsys, monkeypatch, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    out = str(tmp_path / "tokens")
    config = corpus.Settings(data=(str(tmp_path / name),), out=out)
    expect_one_line(capsys, monkeypatch, config, corpus, *words)
    assert not (tmp_path / "tokens/index.json").exists()


@pytest.mark.parametrize("changes, words", [
    (dict(vocab_size=30000), ["vocabulary of 30000", "at most"]),
    (dict(vocab_size=5), ["vocabulary of 5", "at least"]),
    (dict(vocab_size=0), ["--vocab-size 0: must be above 0"]),
    (dict(val_fraction=1.5), ["--val-fraction 1.5: must be at most 1"]),
    (dict(tokenizer=__file__), ["not a SentencePiece model"]),
])
def test_a_corpus_that_cannot_be_made_stops_with_one_line(
    tmp_path, inputs, capsys, monkeypatch, changes, words
):
    config = corpus.Settings(data=(inputs.text,), out=str(tmp_path / "t"))
    expect_one_line(capsys, monkeypatch, replace(config, **changes), corpus, *words)


BAD_SETTINGS = [
    *[(name, dict(lr=0.0), ["--lr 0.0: must be above 0"]) for name in STAGES],
    *[(name, dict(lr=float("nan")), ["--lr nan"]) for name in STAGES],
    *[(name, dict(seed=-1), ["--seed -1: must be 0 or above 0"]) for name in STAGES],
    *[(name, dict(init="nowhere"), ["nowhere", "no checkpoint here"]) for name in STAGES],
    *[(name, dict(device="cuda"), ["--device cuda: not on this machine"]) for name in STAGES],
    *[(name, dict(device="foo"), ["--device foo: not on this machine"]) for name in STAGES],
    ("pretrain", dict(init="", size="8B"), ["8B", "tiny"]),
    ("pretrain", dict(data="gone"), ["gone", "python -m data.corpus"]),
    ("pretrain", dict(seq_len=10**6), ["stories", "less than one sequence", "--seq-len"]),
    ("pretrain", dict(warmup_steps=-5), ["--warmup-steps -5"]),
    ("sft", dict(data=("gone.jsonl",)), ["gone.jsonl", "No such file"]),
    ("sft", dict(data=(__file__,)), [f"{__file__}: expected a .jsonl"]),
    ("sft", dict(epochs=0), ["--epochs 0: must be above 0"]),
    ("sft", dict(seq_len=8), ["no dialogue to train on", "longer than --seq-len"]),
    ("sft", dict(val_fraction=2.0), ["--val-fraction 2.0: must be at most 1"]),
    ("rm", dict(val_fraction=1.0), ["--val-fraction 1.0 holds out all"]),
    ("sft", dict(val_fraction=1.0), ["--val-fraction 1.0 holds out all"]),
    ("sft", dict(val_fraction=0.0, keep="best"), ["--keep best: nothing is held out"]),
    ("rm", dict(val_fraction=0.0, keep="best"), ["--keep best: nothing is held out"]),
    ("rm", dict(aux_weight=-1.0), ["--aux-weight -1.0"]),
    ("rejection-sampling", dict(temperatures=(0.0,)), ["--temperatures 0.0: must be above 0"]),
    ("rejection-sampling", dict(rm="nowhere"), ["nowhere/helpfulness", "no checkpoint here"]),
    ("rejection-sampling", dict(max_new_tokens=1), ["no answer within --max-new-tokens 1"]),
    ("rejection-sampling", dict(earlier=("nowhere",)), ["nowhere/best.jsonl"]),
    ("ppo", dict(batch_size=6), ["--batch-size 6 must be divisible by --mini-batch 4"]),
    ("ppo", dict(val_prompts=()), ["--val-prompts: give at least one"]),
    ("rejection-sampling", dict(temperatures=()), ["--temperatures: give at least one"]),
    ("sft", dict(data=()), ["--data: give at least one"]),
    *[(name, dict(seed=1 << 60), ["--seed", "must be at most"]) for name in STAGES],
    *[(name, dict(out=""), ["--out: expected a place"]) for name in STAGES],
    ("ppo", dict(gamma=1.5), ["--gamma 1.5: must be at most 1"]),
    ("ppo", dict(beta=-1.0), ["--beta -1.0"]),
]


@pytest.mark.parametrize("name, changes, words", BAD_SETTINGS)
def test_a_bad_setting_stops_with_one_line_and_a_finished_run_is_kept(
    tmp_path, inputs, capsys, monkeypatch, name, changes, words
):
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    script, config = stage(name, inputs, tmp_path / "out")
    kept = folder_of(config) / "consolidated.00.pth"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"finished")
    bad = replace(config, overwrite=True, **changes)
    expect_one_line(capsys, monkeypatch, bad, script, *words)
    assert kept.read_bytes() == b"finished"


def test_a_folder_that_cannot_be_written_stops_with_one_line(tmp_path, inputs, capsys, monkeypatch):
    for name, script in (("sft", sft), ("pretrain", pretrain)):
        _, config = stage(name, inputs, Path(inputs.text) / "x")
        expect_one_line(capsys, monkeypatch, config, script, "stories.jsonl")

        def refuse(lock):  # root may write everywhere: stand in for one who may not
            raise PermissionError(13, "Permission denied", str(lock.lock_file))

        with monkeypatch.context() as patch:
            patch.setattr(runs.FileLock, "acquire", refuse)
            config = replace(config, out=str(tmp_path / "locked"))
            expect_one_line(capsys, patch, config, script, "locked", "Permission denied")


def test_pretraining_goes_on_only_with_the_models_own_tokenizer(
    tmp_path, inputs, letters, capsys, monkeypatch
):
    save(tmp_path / "other", make_model(vocab_size=letters.vocab_size), letters)
    _, config = stage("pretrain", inputs, tmp_path / "out", init=str(tmp_path / "other"))
    words = "has another tokenizer than", "data.corpus --tokenizer"
    expect_one_line(capsys, monkeypatch, config, pretrain, *words)


# -------------------------------------------------------------------------------- the house's rules
ROOMS = {  # what a file's imports may begin with, of the project
    "llama2.py": (),
    "tinytown": ("data.formats", "tinytown"),
    "common": ("common", "llama2"),
    "data": ("common", "data", "llama2"),
    "train": ("common", "data.formats", "data.records", "llama2"),      # and pretraining, which reads tokens
    "evaluate": ("common", "data", "evaluate", "llama2", "tinytown", "train_rm", "train_rlhf"),
}
EXCEPTIONS = {
    ("data/preferences.py", "tinytown.annotator"), ("train_rlhf.py", "train_sft"),
    ("train_pretrain.py", "data.corpus"),
}
STAGES_BY_NAME = re.compile(r"tinytown|pretrain|sft|rlhf|ppo|rejection|gatt|best\.jsonl|sampling")
PROJECT = re.compile(r"(common|data|evaluate|bench|tinytown|llama2|train_\w+)(\.|$)")


def test_imports_run_down_as_the_house_is_drawn():
    checked = 0
    for path in sorted(HERE.rglob("*.py")):
        name = path.relative_to(HERE).as_posix()
        room = "train" if name.startswith("train_") else name.split("/")[0]
        if room not in ROOMS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module]
            for module in modules:
                if PROJECT.match(module) and (name, module) not in EXCEPTIONS:
                    assert module.startswith(ROOMS[room] or "nothing"), f"{name} imports {module}"
                    checked += 1
    assert checked > 40


def test_common_knows_no_stage_by_name():
    for path in (HERE / "common").glob("*.py"):
        assert not STAGES_BY_NAME.findall(path.read_text().lower()), path


SETTINGS = {  # command -> the class whose fields are its options
    "train_pretrain.py": pretrain, "train_sft.py": sft, "train_rm.py": reward,
    "train_rlhf.py": rlhf, "data.corpus": corpus, "data.preferences": preferences,
    "data.distillation": distillation,
    "data.ghost_attention": ghost_attention, "evaluate.answers": answers,
    "evaluate.reward_models": reward_models, "evaluate.scoreboard": scoreboard,
}


def test_every_option_in_the_documentation_and_in_paper_sh_exists():
    pages, checked = [HERE / "README.md", HERE / "paper.sh"], 0
    for place in ("docs/*.md", "train_*.py", "data/*.py", "evaluate/*.py"):
        pages += sorted(HERE.glob(place))
    for path in pages:
        text = re.sub(r"\\+\n", " ", path.read_text())  # a command may go on in the next line
        for line in text.splitlines():
            found = re.search(r"(train_\w+\.py|(?:data|evaluate)\.\w+)((?: [^`|]*)?)", line)
            if not found or found[1] not in SETTINGS or "import" in line:
                continue
            fields = vars(SETTINGS[found[1]].Settings())
            for option in re.findall(r" --([a-z-]+)", found[2]):
                name = option.removeprefix("no-").replace("-", "_")
                assert name in fields or name == "recipe" or name == "seed", f"{path}: --{option}"
                checked += 1
    assert checked > 100


def test_the_code_fits_its_page():
    for path in sorted(HERE.rglob("*.py")):
        if ".venv" not in path.parts:
            for number, line in enumerate(path.read_text().splitlines(), 1):
                assert len(line) <= 100, f"{path}:{number}"


# ----------------------------------------------------------------------------- a walk with own data
SHORT = {  # what makes a command of the README take seconds
    "data.corpus": "--vocab-size 400",
    "train_pretrain.py": "--max-steps 20 --seq-len 64 --eval-tokens 640",
    "train_sft.py": "--epochs 4 --batch-size 8",
    "data.preferences": "--max-new-tokens 12",
    "train_rm.py": "--val-fraction 0 --lr 1e-4",
    "train_rlhf.py": "--samples 2 --iterations 2 --batch-size 4 --mini-batch 4 --max-new-tokens 40",
    "data.ghost_attention": "--max-new-tokens 12",
    "llama2.py": "--max-new-tokens 5",
}


def execute(command, monkeypatch):
    """`python command`, as it would be typed, but in this process: importing torch takes long."""
    words = command.split()
    module = words[0] == "-m"
    name, *options = words[1:] if module else words
    monkeypatch.setattr(sys, "argv", [name, *options])
    if module:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(HERE / name), run_name="__main__")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_readmes_path_for_ones_own_data_runs_as_written(tmp_path, monkeypatch, capsys):
    """No Tinytown: texts, dialogues, a person's labels, two versions, Ghost Attention, a chat."""
    colours = "red blue green white black yellow".split()
    pages, alpaca, sharegpt, asked, hh_rlhf, ultra = [], [], [], [], [], []
    for i in range(120):
        colour, wrong = colours[i % 6], colours[(i + 1) % 6]
        question, answer, no = f"Colour {i}?", f"It is {colour}.", f"It is {wrong}."
        pages.append({"text": f"Box {i % 7} is {colour}. You can ask for a {colour} box."})
        alpaca.append(dict(instruction=question, input="", output=answer, text="### Instruction:"))
        asked.append({"prompt": f"Say the colour {i}.", "is_safety": i % 5 == 0})
        turns = [dict(role="user", content=question)]
        hh_rlhf.append({"chosen": hh(question, answer), "rejected": hh(question, no)})
        told = [turns + [dict(role="assistant", content=text)] for text in (answer, no)]
        ultra.append(dict(
            prompt=question, prompt_id="9f", chosen=told[0], rejected=told[1], messages=told[0],
            score_chosen=8.5, score_rejected=5.0,
        ))
    for i in range(9):
        said = "And?", f"It is {colours[i % 6]}.", "So?", "No."
        turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(said)]
        sharegpt.append({"id": f"identity_{i}", "conversations": turns})
    (tmp_path / "book.txt").write_text("A red box and a blue box stand on a shelf.\n" * 50)
    (tmp_path / "alpaca.json").write_text(json.dumps(alpaca, indent=4))
    (tmp_path / "sharegpt.json").write_text(json.dumps(sharegpt, indent=2))
    lines = "".join(json.dumps(record) + "\n" for record in hh_rlhf[:20])
    (tmp_path / "hh-rlhf.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for name, found in (
        ("pages", pages), ("prompts", asked[:12]), ("val", asked[12:18]), ("compare", asked[18:22]),
        ("ultrafeedback", ultra[:20]), ("instructions", [{"instruction": "Be brief."}]),
    ):
        write_jsonl(tmp_path / f"{name}.jsonl", found)

    section = (HERE / "README.md").read_text().split("## Your own data")[1].split("```")[1]
    commands = re.findall(r"^python (.*)$", section.replace("\\\n", " "), re.M)
    assert len(commands) == 12
    for command in commands:
        name = re.search(r"(\w+\.py|(?<=-m )\S+)", command)[1]
        typed = "Colour 3?\n" if name == "llama2.py" else "b\n3\ny\ny\n" * 4
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        monkeypatch.chdir(tmp_path)
        execute(f"{command} {SHORT[name]}", monkeypatch)
        said = capsys.readouterr().out
        counted = {"data.preferences": "4 of 4 compared", "train_sft.py": " left out: {}"}
        assert counted.get(name, "") in said, command
        if "ultrafeedback" in command:
            assert re.match(r"4\d pairs", said)     # all 40 of others, and own labels
    assert len(said.splitlines()) >= 2      # the chat has answered
    assert {"v1", "v2", "gatt"} <= {path.name for path in (tmp_path / "out/mine").iterdir()}
