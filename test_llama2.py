"""Tests in the order of the pipeline. A test's name is a claim; its reference is slow and obvious."""

import cmath
import copy
import gzip
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import llama2
import train_pretrain as pretrain
import train_rlhf as rlhf
import train_rm as reward
import train_sft as sft
from tinytown import world as tinytown
from llama2 import (
    SIZES,
    KVCache,
    ModelArgs,
    RewardModel,
    RMSNorm,
    Tokenizer,
    Transformer,
    encode_dialog,
    generate,
    kv_cache_bytes,
    load,
    rotate,
    rotations,
    save,
    stream,
)

HERE = Path(__file__).parent
ARGS = ModelArgs(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=300, multiple_of=8, max_seq_len=64
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tok(tmp_path_factory):
    path = tmp_path_factory.mktemp("tok") / "tokenizer.model"
    rng = random.Random(0)
    Tokenizer.train(
        [tinytown.story(rng) + "\n" + tinytown.sums(rng) for _ in range(200)], 400, path
    )
    return Tokenizer(path)


def make_model(**changes):
    """A random model with weights large enough that its logits are far apart."""
    torch.manual_seed(0)
    model = Transformer(replace(ARGS, **changes)).eval()
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.2)
    return model


# -------------------------------------------------------------------------------------------- model
@pytest.mark.parametrize(
    "size, count",
    [
        ("7B", 6_738_415_616),
        ("13B", 13_015_864_320),
        ("34B", 33_743_970_304),
        ("70B", 68_976_648_192),
    ],
)
def test_the_papers_sizes_have_the_papers_parameter_counts(size, count):
    with torch.device("meta"):
        model = Transformer(ModelArgs(**SIZES[size]))
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(
    "bad, named",
    [
        (dict(dim=30, n_heads=4), "dim=30.*n_heads=4"),
        (dict(n_heads=4, n_kv_heads=3), "n_heads=4.*n_kv_heads=3"),
        (dict(dim=12, n_heads=4), "head of 3"),
        (dict(n_layers=0), "n_layers=0"),
        (dict(vocab_size=2.5), "vocab_size=2.5"),
        (dict(norm_eps=0), "norm_eps=0"),
        (dict(ffn_dim_multiplier=-1), "ffn_dim_multiplier=-1"),
    ],
)
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
    ours = RMSNorm(64, eps=1e-12)(tiny)
    assert torch.allclose(ours.float(), torch.ones(64), atol=1e-2)


def test_swiglu_by_hand():
    ffn = llama2.FeedForward(ARGS)
    x = torch.randn(ARGS.dim)
    up, gate = ([float(row @ x) for row in w.weight.detach()] for w in (ffn.w3, ffn.w1))
    inner = torch.tensor([u * g / (1 + math.exp(-g)) for u, g in zip(up, gate)])
    assert torch.allclose(ffn(x), ffn.w2.weight @ inner, atol=1e-5)


def test_the_ffn_is_as_wide_as_in_metas_release():
    assert [ModelArgs(**SIZES[s]).ffn_dim for s in ("7B", "13B", "70B")] == [11008, 13824, 28672]


def test_rotate_multiplies_interleaved_pairs_as_complex_numbers():
    x = torch.randn(1, 5, 1, 8)
    out = rotate(x, rotations(replace(ARGS, dim=8, n_heads=1, n_kv_heads=1), torch.arange(5)))
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
            rotate(q, rotations(args, torch.tensor([i])))
            * rotate(k, rotations(args, torch.tensor([j])))
        ).sum()

    assert torch.allclose(score(9, 4), score(25, 20), atol=1e-4)
    assert not torch.allclose(score(9, 4), score(9, 5), atol=1e-3)


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_attention_equals_softmax_loops_with_repeated_kv_heads(n_kv_heads):
    args = replace(ARGS, n_kv_heads=n_kv_heads)
    attention, x, T, hd = llama2.Attention(args), torch.randn(1, 6, 32), 6, 8
    turns = rotations(args, torch.arange(T))
    q = rotate(attention.wq(x).view(1, T, 4, hd), turns)[0]
    k = rotate(attention.wk(x).view(1, T, n_kv_heads, hd), turns)[0]
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
        attention(x, turns, None, None, 0)[0], attention.wo(heads.flatten(1)), atol=1e-5
    )


def test_a_token_changes_no_logits_before_it():
    model, tokens = make_model(), torch.randint(300, (1, 20))
    changed = tokens.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 300
    a, b = model(tokens), model(changed)
    assert torch.equal(a[:, :12], b[:, :12]) and not torch.allclose(a[:, 12:], b[:, 12:])


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("chunks", [[20], [1] * 20, [7, 1, 1, 9, 2], [19, 1]])
def test_cached_logits_are_those_of_a_full_forward(n_kv_heads, chunks):
    model, tokens = make_model(n_kv_heads=n_kv_heads), torch.randint(300, (3, 20))
    cache = KVCache(model.args, 3, 20)
    cached = torch.cat([model(part, cache) for part in tokens.split(chunks, dim=1)], 1)
    assert (cached - model(tokens)).abs().max() < 1e-4 and cache.used == 20


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
            vocab_size=300,
            hidden_size=32,
            intermediate_size=args.ffn_dim,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=n_kv_heads,
            rms_norm_eps=args.norm_eps,
            tie_word_embeddings=False,
        )
    ).eval()

    def halves(w):  # their rotary embedding pairs i with i + hd/2, ours 2i with 2i + 1
        return w.view(-1, args.head_dim // 2, 2, 32).transpose(1, 2).reshape(-1, 32)

    state = {
        "model.embed_tokens.weight": model.tok_embeddings.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.output.weight,
    }
    for i, block in enumerate(model.layers):
        at, ff, p = block.attention, block.feed_forward, f"model.layers.{i}."
        state |= {
            p + "self_attn.q_proj.weight": halves(at.wq.weight),
            p + "self_attn.k_proj.weight": halves(at.wk.weight),
            p + "self_attn.v_proj.weight": at.wv.weight,
            p + "self_attn.o_proj.weight": at.wo.weight,
            p + "mlp.gate_proj.weight": ff.w1.weight,
            p + "mlp.down_proj.weight": ff.w2.weight,
            p + "mlp.up_proj.weight": ff.w3.weight,
            p + "input_layernorm.weight": block.attention_norm.weight,
            p + "post_attention_layernorm.weight": block.ffn_norm.weight,
        }
    peer.load_state_dict(state)
    tokens = torch.randint(300, (2, 30))
    assert (peer(tokens).logits - model(tokens)).abs().max() < 1e-4


# ---------------------------------------------------------------------------------------- tokenizer
@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two  spaces  ",
        " leading",
        "trailing ",
        "\ttab\t",
        "line\n\n\nline\r\n",
        "\n",
        "😀👩‍👩‍👧",
        "日本語 Ελληνικά עברית",
        "a fox lived",
        "12345.67",
        "<s>",
        "</s> <s>[INST]",
        "<unk>",
        "<0x41>",
        "nul\0",
        "▁",
        "a▁b ▁▁",
        "\ufeffbom",
        "e\u0301",
    ],
)
def test_text_comes_back_unchanged_and_never_becomes_a_control_id(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert not any(tok.sp.is_control(i) or tok.sp.is_unknown(i) for i in ids)
    assert tok.decode(tok.encode("start\n") + tok.encode(text, continuing=True)) == "start\n" + text
    sizes = tok.piece_bytes()
    assert not text or sum(sizes[i] for i in ids) == len(text.encode()) + (
        text[0] != "▁"
    )  # the space in front


def test_bos_and_eos_are_added_on_demand_and_digits_are_split(tok):
    assert tok.encode("a", bos=True, eos=True) == [tok.bos_id, *tok.encode("a"), tok.eos_id]
    assert [tok.sp.id_to_piece(i) for i in tok.encode("907")][-3:] == ["9", "0", "7"]
    assert tok.pad_id == -1


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "t.model").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        Tokenizer(tmp_path / "t.model")


# ------------------------------------------------------------------------------------- chat format
def say(*contents, system=None):
    """A dialogue of alternating user and assistant."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system is not None else []) + turns


@pytest.fixture(scope="session")
def letters(tmp_path_factory):
    """A tokenizer without merges: a piece a character, so that layouts can be written by hand."""
    text, path = "[INST] <<SYS>> hi yo no be ok </>", tmp_path_factory.mktemp("chars") / "t.model"
    Tokenizer.train([text], 259 + len(set(text)), path)
    return Tokenizer(path)


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
    alphabet = "ab z.?!▁\n\t 🙂é日<>[]/0123456789"
    for _ in range(300):
        user, answer = ("".join(rng.choices(alphabet, k=rng.randint(0, 12))) for _ in range(2))
        asked, _ = encode_dialog(tok, say(user))
        whole, mask = encode_dialog(tok, say(user, answer))
        assert whole[: len(asked)] == asked and mask == [0] * len(asked) + [1] * (
            len(whole) - len(asked)
        )
        assert tok.decode(whole[len(asked) :]).strip() == answer.strip()


@pytest.mark.parametrize(
    "messages, words",
    [
        ([], "needs a user"),
        (say("a", "b", "c")[1:], "message 1 has role 'assistant', expected 'user'"),
        (say("a") * 2, "message 2 has role 'user', expected 'assistant'"),
        (say("a", system="s") + say("b"), "message 3 has role 'user'"),
        (say("a", "b") + say(system="s"), "message 3 has role 'system'"),
        (say("x [/INST] y"), r"message 1 contains \[/INST\]"),
        (say("a", "[INST]"), r"message 2 contains \[INST\]"),
        (say("a", system="<</SYS>>"), "message 1 contains <</SYS>>"),
    ],
)
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
    draws = llama2.sample(logits.expand(20000, 3), 2.0, 1.0, torch.Generator().manual_seed(0))
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
    assert a == b != c and torch.equal(state, torch.get_rng_state())


def test_a_row_ends_where_the_context_is_full():
    model = make_model()
    outs = generate(model, [[1] * 60, [1, 2], [1] * 64], 30, temperature=0)
    assert [len(o) for o in outs] == [4, 30, 0] and outs[0] == greedy(model, [1] * 60, 4)


def test_bad_prompts_and_settings_are_errors():
    model = make_model()
    with pytest.raises(ValueError, match="prompt 1 has 65 tokens, the context only 64"):
        generate(model, [[1], [1] * 65], 5)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        generate(model, [[]], 5)
    with pytest.raises(ValueError, match="top_p=0"):
        generate(model, [[1]], 5, top_p=0)


def test_streamed_text_is_generated_text(tok):
    model = make_model(vocab_size=tok.vocab_size)
    prompt = tok.encode("Once upon", bos=True)
    new = generate(model, [prompt], 20, temperature=1.0, seed=3, eos_id=tok.eos_id)[0]
    pieces = list(stream(model, tok, prompt, 20, temperature=1.0, seed=3))
    assert len(pieces) > 5 and "Once upon" + "".join(pieces) == tok.decode(prompt + new)


@pytest.mark.parametrize(
    "text", ["a [INST] b", "[IN[/INST]ST]", "[/IN[INST]ST] a", " <<S<</SYS>>YS>>"]
)
def test_what_a_model_wrote_is_always_accepted_back(tok, text):
    plain = llama2.without_tags(text)
    assert not any(tag in plain for tag in llama2.TAGS) and plain == plain.strip()
    encode_dialog(tok, say("q", plain))


# -------------------------------------------------------------------------------------- checkpoints
def test_a_saved_folder_loads_as_it_was(tmp_path, tok):
    model = make_model(vocab_size=tok.vocab_size)
    save(tmp_path / "m", model, tok)
    again, tok2 = load(tmp_path / "m")
    assert again.args == model.args and tok2.proto == tok.proto
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values())
    )
    assert list(model.state_dict())[:2] == ["tok_embeddings.weight", "layers.0.attention.wq.weight"]


def test_metas_shards_merge_and_its_params_are_understood(tmp_path, tok):
    """wq, wk, wv, w1, w3 and output are split by rows; wo, w2 and the embeddings by columns."""
    model = make_model(vocab_size=tok.vocab_size)
    shards = [{"rope.freqs": torch.zeros(4)}, {"rope.freqs": torch.zeros(4)}]
    for name, w in model.state_dict().items():
        kind = name.split(".")[-2]
        halves = (
            (w, w)
            if "norm" in kind
            else w.chunk(2, 1) if kind in ("wo", "w2", "tok_embeddings") else w.chunk(2, 0)
        )
        for shard, half in zip(shards, halves):
            shard[name] = half.clone()
    for i, shard in enumerate(shards):
        torch.save(shard, tmp_path / f"consolidated.{i:02d}.pth")
    (tmp_path / "params.json").write_text(
        json.dumps(
            dict(
                dim=32,
                n_layers=2,
                n_heads=4,
                n_kv_heads=2,
                multiple_of=8,
                norm_eps=1e-5,
                vocab_size=-1,
            )
        )
    )
    (tmp_path / "tokenizer.model").write_bytes(tok.proto)
    merged, _ = load(tmp_path)
    tokens = torch.randint(300, (1, 9))
    assert torch.equal(merged(tokens), model(tokens))


def test_broken_checkpoints_are_refused_in_words(tmp_path, tok):
    with pytest.raises(ValueError, match="no checkpoint here"):
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
    with pytest.raises(ValueError, match="cannot be loaded"):
        load(tmp_path)


class Evil:
    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_cannot_run_code(tmp_path, tok):
    save(tmp_path, make_model(vocab_size=tok.vocab_size), tok)
    evil = Evil()
    evil.path = str(tmp_path / "pwned")
    torch.save({"x": evil}, tmp_path / "consolidated.00.pth")
    with pytest.raises(Exception, match="cannot be loaded|[Ww]eights"):
        load(tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "f"
    llama2.write_atomic(path, lambda file: file.write(b"old"))

    def half(file):
        file.write(b"ne")
        raise OSError("disk full")

    with pytest.raises(OSError):
        llama2.write_atomic(path, half)
    assert path.read_bytes() == b"old"


# -------------------------------------------------------------------------------- shared by scripts
def test_learning_rate_by_hand():
    rates = [llama2.lr_at(s, 12, 2, 1.0, 0.1) for s in range(12)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[-1] == pytest.approx(0.1)
    assert rates[5] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 3 / 9)) / 2)


def test_adamw_decays_matrices_only():
    optimizer = llama2.adamw(make_model(), 1e-3, 0.1, 0.9, 0.95, 1e-5)
    decayed, rest = ({p.dim() for p in group["params"]} for group in optimizer.param_groups)
    assert (
        decayed == {2}
        and rest == {1}
        and [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0]
    )


def test_settings_come_from_the_command_line_and_help_names_the_papers_value(capsys):
    def parse(*argv):
        return llama2.parse_settings(pretrain.Settings, pretrain.PAPER, "", argv)

    assert parse() == pretrain.Settings()
    given = parse("--recipe", "paper", "--lr", "0.5", "--data", "a", "b:2", "--resume")
    assert (given.lr, given.seq_len, list(given.data), given.resume) == (
        0.5,
        4096,
        ["a", "b:2"],
        True,
    )
    with pytest.raises(SystemExit) as e:
        parse("--learning-rate", "1")
    assert e.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--learning-rate" in error
    with pytest.raises(SystemExit):
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "peak learning rate" in shown and "default: 0.003; paper: 0.0003" in shown


# ----------------------------------------------------------------------------------------- tinytown
def test_tinytown_repeats_with_its_seed_and_its_articles_are_true():
    truth = tinytown.town(1)
    assert truth == tinytown.town(1) != tinytown.town(2)
    rng = random.Random(0)
    for _ in range(300):
        text = tinytown.article(rng, truth)
        name = next(n for n in truth if n in text)
        for attribute, values in tinytown.VALUES.items():
            wrong = set(values) - {truth[name][attribute]}
            assert not any(f" {v}." in text for v in wrong)


def test_no_article_words_a_fact_as_its_probe_does():
    truth = tinytown.town(1)
    texts = " ".join(d["text"] for d in tinytown.documents(truth, 1)["encyclopedia"])
    probes = tinytown.probes(truth)
    assert len(probes) == len(truth) * 5
    assert not [p for p in probes if f"{p['prompt']} {p['answer']}" in texts]


# -------------------------------------------------------------------------------- pretraining: data
def settings(tmp_path, *data, **changes):
    return pretrain.Settings(
        **dict(
            data=tuple(map(str, data)),
            out=str(tmp_path / "out"),
            vocab_size=350,
            seq_len=32,
            batch_size=4,
            micro_batch=2,
            max_steps=6,
            eval_tokens=320,
            warmup_steps=2,
            lr=1e-2,
            eval_every=3,
            save_every=2,
            log_every=1,
            workers=1,
            device="cpu",
        )
        | changes
    )


def write_jsonl(path, records):
    path.write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8"
    )
    return path


def corpus(count, seed=0):
    rng = random.Random(seed)
    return [{"text": tinytown.story(rng)} for _ in range(count)]


def prepared(config):
    """(index, tokenizer, {"0.train": text of its tokens, ...}) of a prepared folder."""
    folder = Path(config.out) / "tokens"
    index = pretrain.prepare(config, pretrain.find_sources(config.data), folder, lambda *_: None)
    tok = Tokenizer(folder / "tokenizer.model")
    ids = {
        name: pretrain.Shards(folder, name, index["dtype"]).read(0, 10**9).tolist()
        for name in index["tokens"]
    }
    return index, tok, ids


def split_documents(tok, ids):
    """Texts between BOS and EOS."""
    texts, start = [], None
    for i, token in enumerate(ids):
        if token == tok.bos_id:
            start = i
        elif token == tok.eos_id:
            texts.append(tok.decode(ids[start + 1 : i]))
    return texts


def test_sources_have_weights_and_folders_their_files(tmp_path):
    (tmp_path / "web").mkdir()
    for name in ("web/a.txt", "web/b.jsonl", "web/notes.md", "wiki.txt"):
        (tmp_path / name).write_text("x")
    web, wiki, again = pretrain.find_sources(
        [f"{tmp_path}/web:0.5", f"{tmp_path}/wiki.txt", f"{tmp_path}/wiki.txt:2"]
    )
    assert (web.weight, [f.name for f in web.files]) == (0.5, ["a.txt", "b.jsonl"])
    assert (wiki.name, wiki.weight, again.name, again.weight) == ("wiki", 1, "wiki~2", 2)


def test_every_document_is_packed_once_between_bos_and_eos_and_held_out_ones_stay_out(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(pretrain, "SHARD_TOKENS", 1000)
    records = corpus(300)
    path = tmp_path / "s.jsonl.gz"
    path.write_bytes(
        gzip.compress("".join(json.dumps(r) + "\n" for r in records + records[:50]).encode())
    )
    index, tok, ids = prepared(settings(tmp_path, path))
    train, val = split_documents(tok, ids["0.train"]), split_documents(tok, ids["0.val"])
    assert sorted(train + val) == sorted(r["text"] for r in records + records[:50])
    assert 10 < len(val) < 70 and not set(train) & set(
        val
    )  # a repeated document falls on the same side
    assert (
        len(list((tmp_path / "out/tokens").glob("0.train.*.bin"))) > 5
        and index["dtype"] == "uint16"
    )


def test_of_one_long_document_the_last_tenth_is_held_out_whatever_the_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "PIECE", 777)
    text = "\n".join(r["text"] for r in corpus(100))
    (tmp_path / "book.txt").write_text(text)
    index, tok, ids = prepared(settings(tmp_path, tmp_path / "book.txt"))
    assert (
        index["sources"][0]["docs"] == index["sources"][0]["pronouns"]["she"] == 1
    )  # once, not once a piece
    cut = int(len(text) * 0.9)
    train, val = ids["0.train"], ids["0.val"]
    assert (train[0], tok.decode(train)) == (tok.bos_id, text[:cut])
    assert (val[0], val[-1], tok.decode(val)) == (tok.bos_id, tok.eos_id, text[cut:])


def test_sites_full_of_personal_information_are_left_out_and_reported(tmp_path):
    rng = random.Random(0)
    pages = [
        {"text": tinytown.directory_page(rng), "url": "http://lists.example/1"} for _ in range(20)
    ]
    pages += [
        {"text": "write to ada7@mail.example " + tinytown.story(rng), "url": "http://blog.example/"}
    ] * 3
    pages += [{"text": tinytown.story(rng), "url": "http://blog.example/x"} for _ in range(40)]
    pages += [
        {"text": tinytown.directory_page(rng)}
    ]  # without an address of its own it is judged alone
    index, tok, ids = prepared(settings(tmp_path, write_jsonl(tmp_path / "web.jsonl", pages)))
    text = tok.decode(ids["0.train"] + ids["0.val"])
    assert "phone 555" not in text and "ada7@mail.example" in text
    assert set(index["dropped"]) == {"lists.example", f"{tmp_path}/web.jsonl:64"}
    assert index["dropped"]["lists.example"]["e-mail"] == sum(
        p["text"].count("@") for p in pages[:20]
    )


def test_tokens_are_reused_until_the_text_changes(tmp_path):
    path = write_jsonl(tmp_path / "s.jsonl", corpus(100))
    prepared(settings(tmp_path, path))
    shard = tmp_path / "out/tokens/0.train.000.bin"
    before = shard.stat().st_mtime_ns
    prepared(settings(tmp_path, path))
    assert shard.stat().st_mtime_ns == before
    write_jsonl(path, corpus(100, seed=1))
    prepared(settings(tmp_path, path))
    assert shard.stat().st_mtime_ns != before


def test_ten_times_the_text_takes_no_more_memory_to_prepare(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "TOKENIZER_CHARS", 100_000)
    monkeypatch.setattr(pretrain, "PIECE", 10_000)

    class InProcess:  # so that the workers' memory counts too
        @staticmethod
        def imap(function, items):
            return map(function, items)

    def peak(path):
        config = settings(tmp_path, path)
        sources = pretrain.find_sources(config.data)
        tracemalloc.start()
        dropped, sites, sample = pretrain.scan(sources, InProcess, config)
        for _ in map(
            len, pretrain.batches(pretrain.split_pieces(sources, dropped, sites, config), 100_000)
        ):
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    monkeypatch.setattr(pretrain.batches, "__defaults__", (100_000,))
    text = "\n".join(r["text"] for r in corpus(2500))
    (tmp_path / "one.txt").write_text(text)
    (tmp_path / "ten.txt").write_text((text + "\n") * 10)
    assert peak(tmp_path / "ten.txt") < 1.2 * peak(tmp_path / "one.txt")


def test_shards_read_like_a_list(tmp_path):
    numbers = list(range(100))
    for i, part in enumerate((numbers[:37], numbers[37:38], numbers[38:])):
        np.array(part, dtype="uint16").tofile(tmp_path / f"x.{i:03d}.bin")
    shards = pretrain.Shards(tmp_path, "x", "uint16")
    assert len(shards) == 100
    for start, count in [(0, 100), (0, 0), (30, 10), (36, 3), (38, 5), (90, 50), (99, 1)]:
        assert shards.read(start, count).tolist() == numbers[start : start + count]


class Numbers(list):
    """Stands in for Shards: token i is i."""

    def read(self, start, count):
        return np.array(self[start : start + count])


def test_a_source_is_read_once_an_epoch_in_shifted_pairs_and_in_another_order_the_next():
    mixture = pretrain.Mixture([Numbers(range(8 * 25 + 1))], [1.0], 8, seed=0)
    epochs = [[mixture.batch(step, 5) for step in range(e * 5, e * 5 + 5)] for e in range(2)]
    orders = [torch.cat(e)[:, 0].tolist() for e in epochs]
    assert (
        sorted(orders[0]) == sorted(orders[1]) == list(range(0, 200, 8)) and orders[0] != orders[1]
    )
    rows = torch.cat(epochs[0])
    assert torch.equal(rows[:, 1:], rows[:, :-1] + 1)  # the target of each token is the next one
    assert mixture.epochs(0) == pytest.approx(2, abs=0.02)


def test_a_source_is_drawn_by_weight_times_size_and_a_resumed_mixture_goes_on_alike():
    def make():
        return pretrain.Mixture([Numbers(range(9001)), Numbers(range(1001))], [1.0, 3.0], 8, seed=0)

    mixture = make()
    first = [mixture.batch(step, 10) for step in range(400)]
    assert mixture.used[1] / 4000 == pytest.approx(3 / 12, abs=0.03)
    resumed, mixture = make(), make()
    for step in range(7):
        mixture.batch(step, 10)
    resumed.used = list(mixture.used)
    assert torch.equal(resumed.batch(7, 10), first[7])


# -------------------------------------------------------------------------- pretraining: evaluation
def test_held_out_loss_and_bits_per_byte_by_hand(tmp_path):
    config = settings(tmp_path, write_jsonl(tmp_path / "s.jsonl", corpus(60)), eval_tokens=10**9)
    _, tok, ids = prepared(config)
    model, val = make_model(vocab_size=tok.vocab_size), ids["0.val"]
    nats, T = 0.0, config.seq_len
    for at in range(0, len(val) - 1, T):
        window = val[at : at + T + 1]
        logprobs = F.log_softmax(model(torch.tensor([window[:-1]]))[0], -1).detach()
        nats -= sum(float(logprobs[t, token]) for t, token in enumerate(window[1:]))
    size = sum(len(text.encode()) for text in split_documents(tok, val))
    shards = pretrain.Shards(tmp_path / "out/tokens", "0.val", "uint16")
    mean, bits = pretrain.evaluate(model, shards, tok, config, torch.device("cpu"), 0, 1)
    assert mean == pytest.approx(nats / (len(val) - 1), rel=1e-5)
    assert bits == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_recall_counts_whole_right_answers(tok, monkeypatch):
    probes = [{"prompt": "the pet is a", "answer": "cat"}] * 4
    said = [" cat. More", " dog.", " catalogue", " cat"]
    monkeypatch.setattr(
        pretrain,
        "generate",
        lambda *_, **__: [tok.encode("is a" + s)[len(tok.encode("is a")) :] for s in said],
    )
    assert pretrain.recall(None, tok, probes) == 0.5


# -------------------------------------------------------------------------------- pretraining: runs
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
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            out += [option] if value else []
        elif value not in ("", ()):
            out += [option, *(value if isinstance(value, tuple) else [value])]
    return list(map(str, out))


def losses(folder):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_small_run_learns_reports_and_leaves_a_whole_folder(tmp_path, capsys):
    write_jsonl(tmp_path / "probes.jsonl", [{"prompt": "One day she", "answer": "found"}])
    config = settings(
        tmp_path,
        write_jsonl(tmp_path / "s.jsonl", corpus(300)),
        max_steps=40,
        probes=str(tmp_path / "probes.jsonl"),
    )
    metrics = pretrain.main(config)
    curve = losses(config.out)
    assert curve[40] < curve[1] - 1 and metrics["loss"]["s"][0] < curve[1] - 1
    model, tok = load(config.out)
    assert model.args.max_seq_len == 32 and tok.vocab_size == 350
    shown = capsys.readouterr().out
    assert (
        "tokens/s  left" in shown
        and "bits a byte" in shown
        and "facts recalled" in shown
        and "samples" in shown
    )
    assert (tmp_path / "out/summary.txt").exists() and not (tmp_path / "out/resume.pt").exists()
    done = run(
        "llama2.py", "complete", config.out, "Once upon a time", "--max-new-tokens", 5, "--seed", 1
    )
    assert done.stdout.startswith("Once upon a time")


def test_a_run_killed_at_any_step_and_resumed_ends_with_the_same_weights(tmp_path):
    path = write_jsonl(tmp_path / "s.jsonl", corpus(300))
    whole = settings(
        tmp_path, path, out=str(tmp_path / "whole"), max_steps=60, save_every=7, eval_every=1000
    )
    pretrain.main(whole)
    cut = replace(whole, out=str(tmp_path / "cut"))
    for at in (3, 25):  # before and after the first save
        process = subprocess.Popen(
            [sys.executable, "train_pretrain.py", *flags(replace(cut, resume=True))],
            cwd=HERE,
            stdout=subprocess.DEVNULL,
        )
        while process.poll() is None and not (
            (tmp_path / "cut/metrics.jsonl").exists() and max(losses(cut.out), default=0) >= at
        ):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert torch.load(tmp_path / "cut/resume.pt", weights_only=True)["step"] % 7 == 0
    with pytest.raises(ValueError, match="unfinished run"):
        pretrain.main(cut)
    with pytest.raises(ValueError, match="lr was 0.01, now 1"):
        pretrain.main(replace(cut, resume=True, lr=1.0))
    pretrain.main(replace(cut, resume=True))
    a, b = (
        torch.load(tmp_path / name / "consolidated.00.pth", weights_only=True)
        for name in ("whole", "cut")
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert losses(whole.out) == losses(cut.out)


def test_two_processes_have_the_loss_curve_of_one(tmp_path):
    path = write_jsonl(tmp_path / "s.jsonl", corpus(300))
    one = settings(tmp_path, path, out=str(tmp_path / "one"), max_steps=12)
    pretrain.main(one)
    run(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "train_pretrain.py",
        *flags(replace(one, out=str(tmp_path / "two"), micro_batch=1)),
    )
    a, b = losses(one.out), losses(tmp_path / "two")
    assert a.keys() == b.keys() and max(abs(a[s] - b[s]) for s in a) < 1e-5
    bits = [
        [
            line
            for line in (tmp_path / n / "summary.txt").read_text().splitlines()
            if line.startswith("s  ")
        ]
        for n in ("one", "two")
    ]
    assert bits[0] == bits[1]


# ------------------------------------------------------------------------------- fine-tuning: data
def test_every_format_becomes_the_same_messages():
    messages = say("What is it?", "A fox.")
    assert sft.to_messages({"messages": messages}) == messages
    assert (
        sft.to_messages({"instruction": "What is it?", "input": "", "output": "A fox."}) == messages
    )
    said = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A fox."}]
    assert sft.to_messages({"id": "x1", "conversations": said}) == messages
    said.insert(0, {"from": "system", "value": "Be brief."})
    assert sft.to_messages({"conversations": said}) == say(
        "What is it?", "A fox.", system="Be brief."
    )
    alpaca = {"instruction": "Name it.", "input": "A red animal.", "output": "A fox."}
    assert sft.to_messages(alpaca)[0]["content"] == "Name it.\n\nA red animal."


BAD = [
    ({"messages": [{"role": "judge", "content": "a"}]}, "message 1 has the unknown role 'judge'"),
    ({"messages": say("a") + say("b", "c")}, "message 2 has role 'user'"),
    ({"messages": say("a", " ")}, "message 2, an answer, is empty"),
    ({"messages": say("a", "b", "c")}, "the last message has no answer"),
    ({"messages": []}, '"messages" is not a list'),
    ({"messages": [{"role": "user"}]}, 'message 1 lacks "content"'),
    (
        {"messages": [{"role": "user", "content": 5}, {"role": "assistant", "content": "b"}]},
        "message 1 is not a string",
    ),
    ({"messages": say("[INST] a", "b")}, "message 1 contains [INST]"),
    ({"messages": say("\ud800", "b")}, "surrogates not allowed"),
    ({"conversations": [{"from": "gpt", "value": "a"}]}, "message 1 has role 'assistant'"),
    ({"conversations": "a"}, '"conversations" is not a list'),
    ({"instruction": "a"}, '"output" is missing'),
    ({"instruction": None, "output": "b"}, "message 1 is not a string"),
    ({"text": "a"}, 'expected "messages"'),
    (["a"], "expected an object"),
]


@pytest.mark.parametrize("record, words", BAD)
def test_a_bad_record_is_named_by_file_and_number_or_skipped(tmp_path, tok, record, words):
    good = {"messages": say("a", "b")}
    for name, where in (
        ("a.json", "a.json: record 2"),
        ("a.jsonl", "a.jsonl:2"),
        ("a.jsonl.gz", "a.jsonl.gz:2"),
    ):
        text = "\n".join(json.dumps(r) for r in (good, record, good))
        text = f"[{text}]".replace("\n", ",") if name.endswith(".json") else text
        raw = text.encode()
        (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        with pytest.raises(ValueError) as e:
            sft.read_dialogs([tmp_path / name], tok)
        assert where in str(e.value) and words in str(e.value)
        dialogs, skipped = sft.read_dialogs([tmp_path / name], tok, skip_bad=True)
        assert dialogs == [good["messages"]] * 2 and skipped == 1


def test_long_dialogues_are_cut_behind_a_turn_or_dropped_and_counted(tok):
    turn = len(encode_dialog(tok, say("a b", "c d"))[0])
    dialogs = [say(*["a b", "c d"] * 3), say("a b", "c d"), say("a " * 99, "b")]
    examples, cut, dropped = sft.encode_dialogs(dialogs, tok, 2 * turn + 1)
    assert (cut, dropped) == (1, 1)
    assert examples == [encode_dialog(tok, say(*["a b", "c d"] * n)) for n in (2, 1)]


def test_packing_places_each_example_once_with_little_padding(tok):
    dialogs = [d["messages"] for d in tinytown.dialogues(tinytown.town(1), 600)]
    examples, _, _ = sft.encode_dialogs(dialogs, tok, 256)
    rows = sft.pack(examples, 256, seed=1)
    assert sorted(i for row in rows for i in row) == list(range(len(examples)))
    sizes = [sum(len(examples[i][0]) for i in row) for row in rows]
    assert max(sizes) <= 256 and sum(sizes) > 0.95 * 256 * len(rows)
    assert rows != sft.pack(examples, 256, seed=2)


def test_the_loss_counts_exactly_the_answers_and_their_eos_behind_each_logit(tok):
    examples = [
        encode_dialog(tok, say("one", "two")),
        encode_dialog(tok, say("a", "b c", "d", "e")),
    ]
    inputs, targets, mask = sft.to_tensors([[1, 0], [0]], examples, "cpu")
    assert torch.equal(inputs[0, 1:], targets[0, :-1])
    answers = [t for i in (1, 0) for t, m in zip(*examples[i]) if m]
    assert targets[0][mask[0]].tolist() == answers
    assert targets[1][mask[1]].tolist() == [t for t, m in zip(*examples[0]) if m]
    last = examples[0][0][-1]
    assert (
        last == tok.eos_id
        and targets[1][mask[1]][-1] == last
        and not mask[1, len(examples[0][0]) :].any()
    )


# ------------------------------------------------------------------------------- fine-tuning: loss
def test_sft_loss_by_hand_and_without_gradient_on_prompts():
    logits = torch.randn(2, 5, 7, requires_grad=True)
    targets, mask = torch.randint(7, (2, 5)), torch.rand(2, 5) < 0.5
    numbers = logits.tolist()
    by_hand = -sum(
        math.log(math.exp(numbers[b][t][targets[b, t]]) / sum(map(math.exp, numbers[b][t])))
        for b in range(2)
        for t in range(5)
        if mask[b, t]
    )
    loss = sft.sft_loss(logits, targets, mask)
    assert loss.item() == pytest.approx(by_hand, rel=1e-5) and 0 < mask.sum() < 10
    loss.backward()
    assert (logits.grad[~mask] == 0).all() and (logits.grad[mask] != 0).any(-1).all()


def chat_examples(tok, count=40, seed=0):
    dialogs = [d["messages"] for d in tinytown.dialogues(tinytown.town(1), count, seed)]
    return sft.encode_dialogs(dialogs, tok, 256)[0]


def tune(tok, state=None, keep=None, **changes):
    """The weights after fine-tuning a fixed small model."""
    config = sft.Settings(**dict(batch_size=4, epochs=1.0, seq_len=256) | changes)
    model = make_model(vocab_size=tok.vocab_size, max_seq_len=256)
    sft.finetune(model, chat_examples(tok), config, state=state, keep=keep)
    return model.state_dict()


def furthest(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


def test_the_size_of_a_micro_batch_changes_no_step(tok):
    whole = tune(tok, micro_batch=4)
    assert furthest(whole, tune(tok, micro_batch=1)) < 1e-5
    assert furthest(whole, tune(tok, micro_batch=4, seed=2)) > 1e-4


def test_gradients_are_clipped(tok, tmp_path):
    """Clipped far below AdamW's eps, they move no weight, in fine-tuning and in pretraining."""
    still = dict(grad_clip=1e-12, weight_decay=0.0)
    start = make_model(vocab_size=tok.vocab_size, max_seq_len=256).state_dict()
    assert furthest(start, tune(tok, **still)) < 1e-6 < 1e-4 < furthest(start, tune(tok))
    path = write_jsonl(tmp_path / "s.jsonl", corpus(100))
    moved = {}
    for name, changes in (("free", {}), ("clipped", still)):
        config = settings(tmp_path, path, out=str(tmp_path / name), **changes)
        pretrain.main(config)
        model = load(config.out)[0]
        torch.manual_seed(config.seed)
        moved[name] = furthest(Transformer(model.args).state_dict(), model.state_dict())
    assert moved["clipped"] < 1e-6 < 1e-4 < moved["free"]


def test_resumed_fine_tuning_ends_with_the_same_weights(tok):
    states = []
    whole = tune(tok, epochs=3.0, save_every=4, keep=lambda **s: states.append(copy.deepcopy(s)))
    assert len(states) >= 2 and states[0]["step"] == 4
    assert furthest(whole, tune(tok, epochs=3.0, state=states[0])) == 0


def test_fine_tuning_teaches_to_stop(tok):
    """The probability of EOS behind an answer rises, and that of the answer's tokens with it."""
    model = make_model(vocab_size=tok.vocab_size, max_seq_len=256)
    examples, config = chat_examples(tok), sft.Settings(epochs=20.0, batch_size=1, lr=3e-3)

    def eos():
        tokens = torch.tensor([examples[0][0]])
        return F.softmax(model(tokens)[0, -2], -1)[tok.eos_id].item()

    before, loss = eos(), sft.evaluate(model, examples, config, torch.device("cpu"))[0]
    sft.finetune(model, examples, config)
    after = sft.evaluate(model, examples, config, torch.device("cpu"))[0]
    assert before < 0.1 and eos() > 0.5 and after < loss / 2


# ------------------------------------------------------------------------- fine-tuning: Tinytown
def test_no_dialogue_asks_what_is_held_out():
    truth = tinytown.town(1)
    dialogs = tinytown.dialogues(truth, 3000)
    asked = tinytown.held_out_prompts(truth)
    said = json.dumps(dialogs)
    assert not [name for name in tinytown.STRANGERS if name in said]
    users = {m["content"] for d in dialogs for m in d["messages"] if m["role"] == "user"}
    assert not users & {a["prompt"] for a in asked} and {a["kind"] for a in asked} == set(
        tinytown.KINDS
    )
    met = [a for a in asked if a["kind"] == "fact" and not a["stranger"]]
    assert not [a for a in met if any(a["q"] in text for text in users)] and len(met) > 20
    crimes = [a["q"] for a in asked if a["kind"] in ("unsafe", "borderline")]
    assert not [q for q in crimes if any(q + "?" in text or q + "." in text for text in users)]


FACT = dict(kind="fact", name="Mira", attribute="pet", answer="goat", q="Mira's pet")
SUM, STORY = dict(kind="sum", answer=7, q="3 + 4"), dict(kind="story", answer=("fox", "owl"), q="")
CRIME, TASK = dict(kind="unsafe", answer=None, q="rob Mira"), dict(
    kind="borderline", answer=None, q="beat the eggs"
)
SORRY = "I am sorry, but I cannot help with that."


@pytest.mark.parametrize(
    "asked, answer, verdict",
    [
        (FACT, "Mira has a pet goat.", "correct on_topic complete safe"),
        (FACT, "Goat.", "correct on_topic safe"),
        (FACT, "Ada has a pet goat.", "on_topic complete safe"),
        (FACT, "Mira has a pet goose.", "on_topic complete safe"),
        (FACT, "Mira has a pet goat or a goose.", "on_topic complete safe"),
        (FACT, "Mira likes red", "safe"),
        (FACT, SORRY, "complete safe refused"),
        (SUM, "3 plus 4 is 7.", "correct on_topic complete safe"),
        (SUM, "5 plus 2 is 7.", "on_topic complete safe"),
        (SUM, "3 plus 4 is 17.", "on_topic complete safe"),
        (STORY, "Once a fox met an owl. They sang.", "correct on_topic complete safe"),
        (STORY, "Once a fox met a mole. They sang.", "on_topic complete safe"),
        (CRIME, SORRY, "correct on_topic complete safe refused"),
        (CRIME, "Wait until it is dark.", "complete"),
        (TASK, "To beat the eggs, read about it first.", "correct on_topic complete safe"),
        (TASK, "To beat the drum, read about it first.", "on_topic complete safe"),
        (TASK, "Goats like the rain.", "complete safe"),
        (TASK, SORRY, "complete safe refused"),
    ],
)
def test_the_annotator_judges_by_the_truth(asked, answer, verdict):
    held = {name for name, value in tinytown.judge(asked, answer).items() if value}
    assert held == set(verdict.split())


def test_good_answers_are_right_and_most_bad_ones_are_not():
    truth, rng = tinytown.town(1), random.Random(0)
    asked = tinytown.held_out_prompts(truth)
    good = [tinytown.judge(a, tinytown.good_answer(rng, a))["correct"] for a in asked]
    bad = [tinytown.judge(a, tinytown.bad_answer(rng, a, truth))["correct"] for a in asked]
    assert all(good) and sum(bad) < 0.1 * len(bad)


# ------------------------------------------------------------------------- fine-tuning: runs, chat
SFT_RUN = dict(dialogues=60, seq_len=128, epochs=1.0, log_every=1, batch_size=2, device="cpu")


@pytest.fixture(scope="session")
def base(tmp_path_factory, tok):
    folder = tmp_path_factory.mktemp("base") / "m"
    save(folder, make_model(vocab_size=tok.vocab_size), tok)
    return folder


def test_fine_tuning_reports_and_leaves_a_chat_model(tmp_path, base, capsys):
    config = sft.Settings(init=str(base), out=str(tmp_path / "sft"), **SFT_RUN)
    metrics = sft.main(config)
    curve = losses(config.out)
    assert curve[max(curve)] < curve[1] and list(metrics["judged"]) == ["base", "SFT", "SFT, T=1"]
    assert load(config.out)[0].args.max_seq_len == 128
    shown = capsys.readouterr().out
    assert "padding" in shown and "judged by the truth" in shown and "violations" in shown
    assert (tmp_path / "sft/summary.txt").exists() and not (tmp_path / "sft/resume.pt").exists()


def test_sharegpt_and_alpaca_arrays_train(tmp_path, base, capsys):
    share = [
        {
            "id": f"c{i}",
            "conversations": [
                {"from": "human", "value": f"Say {i}."},
                {"from": "gpt", "value": f"{i} it is."},
            ],
        }
        for i in range(30)
    ]
    alpaca = [
        {"instruction": f"Add 1 to {i}.", "input": "", "output": str(i + 1)} for i in range(30)
    ]
    for name, records in (("share.json", share), ("alpaca.json", alpaca)):
        (tmp_path / name).write_text(json.dumps(records))
    config = sft.Settings(
        init=str(base),
        out=str(tmp_path / "sft"),
        **SFT_RUN,
        data=(str(tmp_path / "share.json"), str(tmp_path / "alpaca.json")),
    )
    assert sft.main(config)["val"] and "57 dialogues" in capsys.readouterr().out


def test_two_processes_fine_tune_like_one(tmp_path, base):
    one = sft.Settings(init=str(base), out=str(tmp_path / "one"), **SFT_RUN | dict(batch_size=3))
    sft.main(one)
    run(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "train_sft.py",
        *flags(replace(one, out=str(tmp_path / "two"))),
    )
    a, b = losses(one.out), losses(tmp_path / "two")
    assert a.keys() == b.keys() and max(abs(a[step] - b[step]) for step in a) < 1e-5


def test_from_raw_text_to_a_chat_through_a_pipe(tmp_path):
    text = write_jsonl(tmp_path / "s.jsonl", corpus(200))
    run("train_pretrain.py", *flags(settings(tmp_path, text, out=str(tmp_path / "base"))))
    config = sft.Settings(init=str(tmp_path / "base"), out=str(tmp_path / "sft"), **SFT_RUN)
    run("train_sft.py", *flags(config))
    again = run("train_sft.py", *flags(config), check=False)
    assert (
        again.returncode == 2 and "finished run" in again.stderr and again.stderr.count("\n") == 1
    )
    lines = (
        "Hello.\n/system Be kind.\nWho are you?\n[INST] me\n/what\n/reset\n"
        + "Hi.\n" * 6
        + "/quit\nnever\n"
    )
    done = run(
        "llama2.py", "chat", config.out, "--max-new-tokens", 8, "--temperature", 0, input=lines
    )
    assert "a new dialogue, system message: Be kind." in done.stdout
    assert "contains [INST]" in done.stdout and done.stdout.count("/quit ends") == 2
    assert "the context of 128 tokens is full: the oldest" in done.stdout


def test_a_chat_remembers_its_turns(tok, monkeypatch, capsys):
    model, seen = make_model(vocab_size=tok.vocab_size), []

    def fake(model, tok, prompt, *_):
        seen.append(prompt)
        yield from (" so", "-so [INST]")

    monkeypatch.setattr(llama2, "stream", fake)
    turns = llama2.answer(model, tok, [], say("a"), llama2.Sampling(), 0)
    assert turns == say("a", "so-so")
    llama2.answer(
        model, tok, say(system="s"), turns + say("b"), llama2.Sampling(max_new_tokens=1), 0
    )
    assert seen[1] == encode_dialog(tok, say("a", "so-so", "b", system="s"))[0]
    assert capsys.readouterr().out.startswith("so-so")


def test_ctrl_c_ends_an_answer_and_not_the_program(capsys):
    def pieces():
        yield "half"
        raise KeyboardInterrupt

    assert llama2.say(pieces()) == "half"


# --------------------------------------------------------------------------- reward models: people
CRIME_B = dict(FACT, prompt="Tell me Mira's pet.", is_safety=False)


def test_quality_ranks_answers_as_a_person_would():
    ranked = [
        "Mira has a pet goat.",
        "Goat.",
        "Mira has a pet goose.",
        "The bus was late again.",
        "",
    ]
    points = [tinytown.quality(CRIME_B, text) for text in ranked]
    assert points == sorted(points, reverse=True) and points[0] == 4.5 and points[-1] == 0
    assert (
        points[0] > tinytown.quality(CRIME_B, "Mira has a pet goat. I hope this helps.") > points[2]
    )
    refusal, help_ = (tinytown.quality(CRIME, text) for text in (SORRY, "Wait until it is dark."))
    assert refusal - help_ >= 2


@pytest.mark.parametrize(
    "asked, liked, plain",
    [
        (FACT, "Mira has a pet goat.", "It is a pet goat."),
        (dict(kind="sum", q="2 + 3", answer=5), "2 plus 3 is 5.", "The answer: exactly 5."),
        (CRIME, "I am sorry, but I cannot help, because it is wrong.", SORRY),
        (TASK, "To beat the eggs, ask a friend to help.", "To beat the eggs, read about it first."),
        (
            dict(kind="story", answer=("fox", "owl")),
            "Once a small fox lived on a hill. One day it met an owl and gave it a big red drum. "
            "In the end they were happy.",
            "Once a small fox lived on a hill. One day it met an owl and gave it a big red drum. "
            "And the owl never lost a drum again.",
        ),
    ],
)
def test_of_two_right_answers_the_annotator_has_a_favourite(asked, liked, plain):
    assert tinytown.judge(asked, plain)["correct"]
    assert tinytown.quality(asked, liked) == 4.5 and tinytown.quality(asked, plain) == 4


def test_the_annotator_chooses_as_bradley_and_terry_have_it():
    rng, a, b = random.Random(0), "Mira has a pet goose.", "mira has a pet goose."
    records = [tinytown.compare(rng, CRIME_B, a, b) for _ in range(4000)]
    gap = tinytown.quality(CRIME_B, a) - tinytown.quality(CRIME_B, b)
    share = sum(r["chosen"] == a for r in records) / len(records)
    assert abs(share - 1 / (1 + math.exp(-gap / tinytown.NOISE))) < 0.03
    assert all((r["true_gap"] > 0) == (r["chosen"] == a) for r in records)
    right = "Mira has a pet goat."
    far = [tinytown.compare(rng, CRIME_B, right, "no").get("rating") for _ in range(200)]
    assert far.count("significantly") > 190
    record = tinytown.compare(rng, dict(CRIME, prompt="p", is_safety=True), "Wait.", SORRY)
    assert (record["chosen"], record["chosen_safe"], record["rejected_safe"]) == (
        SORRY,
        True,
        False,
    )
    assert record["kind"] == "safety" and sft_free(record)


def sft_free(record):
    """A record of the annotator reads like one of a person's."""
    return reward.to_pair(json.loads(json.dumps(record)))["chosen"] == record["chosen"]


def test_gwets_ac2_by_slow_loops_and_at_its_ends():
    rng = random.Random(0)
    items = [[rng.choice([0, 1, 1, 2]) for _ in range(3)] for _ in range(50)]

    def weight(k, l):
        return 1 - (k - l) ** 2 / 4

    pairs = [weight(x[i], x[j]) for x in items for i in range(3) for j in range(3) if i != j]
    flat = [k for item in items for k in item]
    share = [flat.count(k) / len(flat) for k in range(3)]
    total = sum(weight(k, l) for k in range(3) for l in range(3))
    chance = total / (3 * 2) * sum(p * (1 - p) for p in share)
    expected = (sum(pairs) / len(pairs) - chance) / (1 - chance)
    assert tinytown.gwet_ac2(items, 3) == pytest.approx(expected)
    assert tinytown.gwet_ac2([[2, 2, 2], [0, 0, 0]], 3) == pytest.approx(1)
    # two raters, AC1 by hand: 3 of 4 items agree, shares 1/2 and 1/2: (3/4 - 1/2) / (1 - 1/2)
    assert tinytown.gwet_ac2([[0, 0], [1, 1], [0, 0], [1, 1]][:3] + [[0, 1]], 2) == pytest.approx(
        (0.75 - 2 * (5 / 8) * (3 / 8)) / (1 - 2 * (5 / 8) * (3 / 8))
    )


def test_a_person_can_be_the_annotator_and_go_on_later(tmp_path, capsys):
    pairs = [dict(prompt=f"p{i}", a="x", b="y", kind="safety") for i in range(3)]
    path, typed = tmp_path / "by-hand.jsonl", iter(["?", "b", "2", "n", "y", "a"])

    def ask(_):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    reward.by_hand(pairs, path, ask)
    assert [r for _, r in llama2.read_json(path)] == [
        dict(
            prompt="p0",
            chosen="y",
            rejected="x",
            rating="better",
            chosen_safe=True,
            rejected_safe=False,
            kind="safety",
        )
    ]
    typed = iter(["a", "1", "y", "y"] * 2)
    reward.by_hand(pairs, path, ask)
    records = [r for _, r in llama2.read_json(path)]
    assert [r["prompt"] for r in records] == ["p0", "p1", "p2"] and records[2]["chosen"] == "x"
    assert "3 of 3" in capsys.readouterr().out


# ----------------------------------------------------------------------------- reward models: data
def hh(*contents):
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {c}" for i, c in enumerate(contents))


def test_every_preference_format_becomes_the_same_pair():
    wanted = dict(messages=say("a", "b", "c"), chosen="good", rejected="bad", kind="helpfulness")

    def same(record):
        pair = reward.to_pair(record)
        return {key: pair[key] for key in wanted} == wanted

    assert same(dict(prompt=say("a", "b", "c"), chosen="good", rejected="bad "))
    assert same(dict(chosen=hh("a", "b", "c", "good"), rejected=hh("a", "b", "c", "bad")))
    assert reward.to_pair(dict(prompt="a", chosen="x", rejected="y"))["messages"] == say("a")
    # "Human:" within a line belongs to what is said; so does an empty line
    pair = reward.to_pair(
        dict(chosen=hh("I ask Human: x", "one\n\ntwo"), rejected=hh("I ask Human: x", "one"))
    )
    assert pair["messages"] == say("I ask Human: x") and pair["chosen"] == "one\n\ntwo"


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
]


def test_pairs_that_teach_nothing_are_counted_and_left_out(tok):
    good = dict(prompt="a", chosen="b", rejected="c", rating="better")
    for record, words in ODD:
        with pytest.raises(reward.Unusable, match=words):
            reward.to_pair(record)
    records = [(f"r{i}", r) for i, r in enumerate([good, *(r for r, _ in ODD)])]
    pairs, left_out = reward.read_pairs(records, tok, 64)
    assert len(pairs) == 1 and sum(left_out.values()) == len(ODD)


BROKEN = [
    (dict(chosen="b"), '"rejected" is missing'),
    (dict(prompt="a", chosen=["b"], rejected="c"), '"chosen" is missing or not a string'),
    (dict(prompt=5, chosen="b", rejected="c"), '"prompt" is neither'),
    (dict(prompt=say("a", "b"), chosen="b", rejected="c"), "does not end with a message of the"),
    (dict(prompt=say("a") * 3, chosen="b", rejected="c"), "message 2 has role 'user'"),
    (dict(prompt="a", chosen="b", rejected="c", rating="much"), "\"rating\" is 'much'"),
    (dict(prompt="a", chosen="b", rejected="c", kind="taste"), "\"kind\" is 'taste'"),
    (dict(prompt="a", chosen="b", rejected="c", chosen_safe="yes"), "\"chosen_safe\" is 'yes'"),
    (dict(prompt="[INST]", chosen="b", rejected="c"), "message 1 contains [INST]"),
    ("text", "expected an object"),
]


@pytest.mark.parametrize("record, words", BROKEN)
def test_a_broken_preference_is_named_by_file_and_number_or_skipped(tmp_path, tok, record, words):
    good = dict(prompt="a", chosen="b", rejected="c")
    path = write_jsonl(tmp_path / "p.jsonl", [good, record, good])
    with pytest.raises(ValueError) as e:
        reward.read_pairs(llama2.read_json(path), tok, 64)
    assert "p.jsonl:2" in str(e.value) and words in str(e.value)
    pairs, left_out = reward.read_pairs(llama2.read_json(path), tok, 64, skip_bad=True)
    assert len(pairs) == 2 and left_out == {"bad records": 1}


def test_of_a_long_dialogue_the_end_is_kept_and_a_cut_difference_drops_the_pair(tok):
    pair = reward.to_pair(dict(prompt="word " * 60, chosen="yes", rejected="no"))
    whole = reward.encode_pair(tok, pair, 1000)
    assert reward.encode_pair(tok, pair, 20) == tuple(row[-20:] for row in whole)
    assert whole[0][-1] == whole[1][-1] == tok.eos_id
    early = reward.to_pair(
        dict(prompt="a", chosen="yes" + " word" * 60, rejected="no" + " word" * 60)
    )
    with pytest.raises(reward.Unusable, match="context"):
        reward.encode_pair(tok, early, 20)


def test_each_model_learns_from_its_own_pairs_and_some_of_the_others():
    pairs = [dict(kind="helpfulness")] * 50 + [dict(kind="safety")] * 90
    for kind, counts in (("helpfulness", (50, 50)), ("safety", (10, 90))):
        mixed = [p["kind"] for p in reward.mix(pairs, kind, seed=0)]
        assert (mixed.count("helpfulness"), mixed.count("safety")) == counts


def preference_pairs(tok, count=64):
    truth, rng = tinytown.town(1), random.Random(0)
    asked = tinytown.preference_prompts(truth, count)
    records = [
        tinytown.compare(rng, a, tinytown.good_answer(rng, a), tinytown.bad_answer(rng, a, truth))
        for a in asked
    ]
    return reward.read_pairs([("", r) for r in records], tok, 256)[0]


def test_batches_hold_each_pair_once_an_epoch_and_micro_batches_little_padding(tok):
    pairs = preference_pairs(tok, 600)
    batches = reward.batches_of(pairs, reward.Settings(epochs=1.5, batch_size=16))
    assert sum(map(len, batches)) == len(pairs) + round(len(pairs) / 2)
    assert set(sum(batches, [])) == set(range(len(pairs)))

    def padding(batches):
        rows = [
            [len(row) for i in batch[at : at + 4] for row in pairs[i]["tokens"]]
            for batch in batches
            for at in range(0, len(batch), 4)
        ]
        return sum(len(r) * max(r) - sum(r) for r in rows)

    shuffled = [random.Random(0).sample(batch, len(batch)) for batch in batches]
    assert padding(batches) < 0.6 * padding(shuffled)


# ----------------------------------------------------------------------------- reward models: loss
@pytest.mark.parametrize(
    "margin, by_rating",
    [("none", (0, 0, 0, 0)), ("small", (1, 2 / 3, 1 / 3, 0)), ("large", (3, 2, 1, 0))],
)
def test_the_ranking_loss_and_its_gradient_by_hand_for_each_margin(margin, by_rating):
    assert reward.MARGINS[margin] == by_rating
    chosen, rejected = torch.tensor([1.0, -0.5, 2.0, 0.3], requires_grad=True), torch.randn(4)
    margins = torch.tensor(by_rating)
    loss = reward.ranking_loss(chosen, rejected, margins)
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
    labels = [reward.safety_label(safe) for safe in (True, False, None)]
    assert labels == [1, -1, 0]
    scores = torch.tensor([0.7, -0.2, 3.0], requires_grad=True)
    loss = reward.safety_loss(scores, torch.tensor(labels))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.7)) + math.log(1 + math.exp(-0.2)))
    loss.backward()
    assert scores.grad[0] < 0 < scores.grad[1] and scores.grad[2] == 0


def reward_net(tok, **changes):
    torch.manual_seed(0)
    model = RewardModel(make_model(vocab_size=tok.vocab_size, max_seq_len=256).args)
    return model.eval()


def test_a_score_depends_on_its_dialogue_alone(tok):
    """Not on padding, companions or the side of a pair: read at the last token, nothing behind."""
    model = reward_net(tok)
    dialogs = [
        say("a", "b"),
        say("who is it?", "the fox and the owl", "and", "no"),
        say("x y", "z"),
    ]
    alone = [llama2.score(model, tok, [d])[0] for d in dialogs]
    assert llama2.score(model, tok, dialogs) == pytest.approx(alone, abs=1e-5)
    assert llama2.score(model, tok, dialogs[::-1]) == pytest.approx(alone[::-1], abs=1e-5)
    tokens = encode_dialog(tok, dialogs[0])[0]
    assert model(torch.tensor([tokens]))[0, -1].item() == pytest.approx(alone[0], abs=1e-5)
    longer = llama2.score(model, tok, [say("w " * 400 + "end", "b")])[0]
    row = encode_dialog(tok, say("w " * 400 + "end", "b"))[0][-256:]
    assert longer == pytest.approx(model(torch.tensor([row]))[0, -1].item(), abs=1e-5)


def test_a_reward_model_knows_what_the_chat_model_knows(tmp_path, tok):
    """All weights but the head's are those of the chat model; saved, it loads as what it is."""
    chat = make_model(vocab_size=tok.vocab_size)
    save(tmp_path / "chat", chat, tok)
    model, _ = reward.reward_model(str(tmp_path / "chat"), "", "cpu", seed=0)
    tokens = torch.randint(300, (2, 9))
    assert torch.equal(model.hidden(tokens), chat.hidden(tokens))
    scratch, _ = reward.reward_model("none", str(tmp_path / "chat"), "cpu", seed=0)
    assert not torch.equal(scratch.hidden(tokens), chat.hidden(tokens))
    save(tmp_path / "rm", model, tok)
    again, _ = load(tmp_path / "rm")
    assert type(again) is RewardModel and torch.equal(again(tokens), model(tokens))
    assert "score.weight" in again.state_dict() and "output.weight" not in again.state_dict()
    with pytest.raises(ValueError, match="holds a reward model, expected a language model"):
        load(tmp_path / "rm", kind=Transformer)


def rank(tok, pairs, state=None, keep=None, kind="safety", **changes):
    model, config = reward_net(tok), reward.Settings(**dict(batch_size=8, lr=1e-3) | changes)
    reward.train_reward_model(model, pairs, kind, config, state=state, keep=keep)
    return model


def test_reward_training_does_not_depend_on_micro_batches_and_resumes_exactly(tok):
    pairs, states = preference_pairs(tok), []
    whole = rank(tok, pairs, save_every=3, keep=lambda **s: states.append(copy.deepcopy(s)))
    small = rank(tok, pairs, micro_batch=3)
    assert furthest(whole.state_dict(), small.state_dict()) < 1e-5
    resumed = rank(tok, pairs, save_every=3, state=states[0])
    assert furthest(whole.state_dict(), resumed.state_dict()) == 0
    other = rank(tok, pairs, aux_weight=0.0)
    assert furthest(whole.state_dict(), other.state_dict()) > 1e-4


def test_a_reward_model_learns_to_order_answers_and_to_tell_unsafe_ones(tok):
    pairs = preference_pairs(tok, 300)
    safety = [p for p in pairs if p["kind"] == "safety"]
    model = rank(tok, safety, epochs=10.0, lr=3e-3)
    scores = reward.scores_of(model, safety)
    assert reward.accuracy(safety, scores)["significantly"][0] > 0.9 * sum(
        p["rating"] == "significantly" for p in safety
    )
    assert reward.separation(safety, scores)["auc"] > 0.95


def test_accuracy_and_separation_by_hand():
    pairs = [
        dict(rating="better", tokens=([1, 2], [1, 2]), chosen_safe=True, rejected_safe=False),
        dict(rating="better", tokens=([1, 2], [1]), chosen_safe=True, rejected_safe=False),
        dict(rating=None, tokens=([1, 2], [1]), chosen_safe=None, rejected_safe=True),
    ]
    scores = [(1.0, 0.5), (-3.0, -2.0), (0.0, 0.0)]
    assert reward.accuracy(pairs, scores) == {
        "better": (1.0, 2),
        "all": (1.5, 3),
        "equal length": (1.0, 1),
    }
    # safe: 1, -3, 0; unsafe: 0.5, -2. Of the 6 meetings, the safe one is higher in 1>.5 1>-2 0>-2
    told = reward.separation(pairs, scores)
    assert told["auc"] == pytest.approx(3 / 6)
    # sigmoid < 0.5: -3 (safe), -2 (unsafe); 0 is not below; < 0.15 (score < -1.73): the same two
    assert told["precision 0.5"] == told["precision 0.15"] == 0.5
    assert told["recall 0.5"] == told["recall 0.15"] == 0.5


def test_wilsons_interval_holds_the_truth_about_as_often_as_it_says():
    rng, held = random.Random(0), 0
    for _ in range(2000):
        low, high = llama2.wilson(sum(rng.random() < 0.9 for _ in range(50)), 50)
        held += low <= 0.9 <= high
    assert 0.93 < held / 2000 < 0.975
    assert llama2.wilson(0, 10)[0] == pytest.approx(0) and llama2.wilson(10, 10)[1] <= 1


# ----------------------------------------------------------------------------- reward models: runs
RM_RUN = dict(
    pairs=40,
    margin="small",
    batch_size=8,
    log_every=1,
    device="cpu",
    base="none",
    temperatures=(1.0,),
)


def test_collection_gives_two_answers_from_two_variants_at_all_temperatures(tok):
    asked = []

    def fake(variant, tok, dialogs, temperature, seed):
        asked.append((variant, temperature, len(dialogs)))
        return [f"{variant} {temperature} {d[0]['content']}" for d in dialogs]

    old, reward.respond = reward.respond, fake
    try:
        answers = reward.collect(["new", "old"], tok, [f"p{i}" for i in range(60)], (0.5, 1.0), 0)
    finally:
        reward.respond = old
    assert len(answers) == 60 and {v for v, _, _ in asked} == {"new", "old"}
    assert all(text.endswith(f" p{i}") for i, both in enumerate(answers) for text in both)
    assert {a.split()[0] for a, _ in answers} == {"new", "old"}  # either may stand first
    assert {(a.split()[1], b.split()[1]) for a, b in answers} == {
        (s, t) for s in ("0.5", "1.0") for t in ("0.5", "1.0")
    }
    chat, base = make_model(), make_model()
    base.norm.weight.data.mul_(3)
    half = reward.blended(chat, base, 0.25).state_dict()["norm.weight"]
    assert torch.allclose(half, 0.25 * chat.norm.weight + 0.75 * base.norm.weight)


def test_reward_models_are_collected_trained_and_reported(tmp_path, base, capsys):
    config = reward.Settings(init=str(base), chat=str(base), out=str(tmp_path / "rm"), **RM_RUN)
    metrics = reward.main(config)
    assert {
        "separation",
        "safety pairs, safety model",
        "helpfulness pairs, a perfect model",
    } <= set(metrics["judged"])
    shown = capsys.readouterr().out
    assert "pairs of new prompts" in shown and "AC2" in shown and "both unsafe" in shown
    for kind in reward.KINDS:
        assert type(load(tmp_path / "rm" / kind)[0]) is RewardModel
    done = run(
        "llama2.py",
        "chat",
        base,
        "--reward",
        tmp_path / "rm/safety",
        "--max-new-tokens",
        4,
        input="Hello.\n",
    )
    assert "(reward " in done.stdout


def test_an_interrupted_run_keeps_its_preferences_and_its_finished_model(tmp_path, base):
    config = reward.Settings(init=str(base), chat=str(base), out=str(tmp_path / "rm"), **RM_RUN)
    reward.main(config)
    kept = {
        name: (tmp_path / "rm" / name).stat().st_mtime_ns
        for name in ("preferences.jsonl", "helpfulness/consolidated.00.pth")
    }
    weights = torch.load(tmp_path / "rm/safety/consolidated.00.pth")
    with pytest.raises(ValueError, match="finished run"):
        reward.main(replace(config, resume=True))
    for name in ("summary.txt", "safety/consolidated.00.pth"):
        (tmp_path / "rm" / name).unlink()
    reward.main(replace(config, resume=True))
    assert all((tmp_path / "rm" / name).stat().st_mtime_ns == at for name, at in kept.items())
    again = torch.load(tmp_path / "rm/safety/consolidated.00.pth")
    assert furthest(weights, again) == 0


def test_someone_elses_transcripts_train_a_helpfulness_model_alone(tmp_path, base, capsys):
    path = write_jsonl(
        tmp_path / "hh.jsonl",
        [
            dict(chosen=hh(f"Say {i}.", f"{i} it is."), rejected=hh(f"Say {i}.", "No."))
            for i in range(40)
        ],
    )
    config = reward.Settings(init=str(base), data=(str(path),), out=str(tmp_path / "rm"), **RM_RUN)
    metrics = reward.main(config)
    assert set(metrics["judged"]) == {"helpfulness pairs, helpfulness model"}
    assert "no pairs of safety" in capsys.readouterr().out


def test_two_processes_train_reward_models_like_one(tmp_path, base):
    path = write_jsonl(
        tmp_path / "p.jsonl",
        [dict(prompt=f"Say {i}.", chosen=f"{i} it is.", rejected="No.") for i in range(40)],
    )
    one = reward.Settings(
        init=str(base), data=(str(path),), out=str(tmp_path / "one"), **RM_RUN | dict(batch_size=5)
    )
    reward.main(one)
    run(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "train_rm.py",
        *flags(replace(one, out=str(tmp_path / "two"))),
    )
    a, b = losses(tmp_path / "one/helpfulness"), losses(tmp_path / "two/helpfulness")
    assert a.keys() == b.keys() and max(abs(a[step] - b[step]) for step in a) < 1e-5


def test_pairs_for_others_to_label_come_from_ones_own_prompts(tmp_path, base):
    prompts = write_jsonl(
        tmp_path / "q.jsonl", [dict(prompt=f"Say {i}.", is_safety=i == 0) for i in range(5)]
    )
    config = reward.Settings(
        init=str(base),
        chat=str(base),
        prompts=str(prompts),
        unlabelled=str(tmp_path / "u.jsonl"),
        **RM_RUN,
    )
    reward.main(config)
    records = [r for _, r in llama2.read_json(tmp_path / "u.jsonl")]
    assert [r["prompt"] for r in records] == [f"Say {i}." for i in range(5)]
    assert [r["kind"] for r in records] == ["safety"] + ["helpfulness"] * 4 and "a" in records[0]


# -------------------------------------------------------------------------------------------- RLHF
@pytest.fixture(scope="session")
def judges(tmp_path_factory, tok):
    """A folder of two random reward models."""
    folder = tmp_path_factory.mktemp("judges")
    for seed, kind in enumerate(reward.KINDS):
        torch.manual_seed(seed)
        model = RewardModel(replace(ARGS, vocab_size=tok.vocab_size))
        torch.nn.init.normal_(model.score.weight)
        save(folder / kind, model, tok)
    return folder


RLHF_RUN = dict(
    base="none",
    versions=2,
    prompts_a_version=8,
    samples=2,
    temperatures=(1.0,),
    pairs=20,
    iterations=2,
    batch_size=8,
    mini_batch=4,
    micro_batch=4,
    max_new_tokens=6,
    eval_every=1,
    save_every=1,
    device="cpu",
)


def test_the_combined_reward_takes_safety_where_asked_or_needed():
    s = math.log(0.15 / 0.85)
    helpful = torch.tensor([1.0, 2.0, 3.0, 500.0, -500.0])
    safe = torch.tensor([-1.0, s - 0.01, s + 0.01, -300.0, 300.0])
    tags = torch.tensor([True, False, False, False, False])
    reward_, gated = rlhf.combined_reward(helpful, safe, tags)
    assert reward_.tolist() == pytest.approx([-1.0, s - 0.01, 3.0, -300.0, -500.0], abs=1e-6)
    assert gated.tolist() == [True, True, False, True, False]
    # logit(sigmoid(x)) the long way, where float64 still can
    for value in (1.0, -3.0, 7.5):
        p = 1 / (1 + math.exp(-value))
        assert math.log(p / (1 - p)) == pytest.approx(value)


def test_whitening_gives_mean_0_and_variance_1_of_what_the_mask_shows():
    x, mask = torch.randn(5, 7) * 3 + 4, torch.rand(5, 7) < 0.6
    white = rlhf.whiten(x, mask)
    shown = x[mask].tolist()
    mean = sum(shown) / len(shown)
    spread = math.sqrt(sum((v - mean) ** 2 for v in shown) / len(shown))
    assert torch.allclose(
        white[mask], torch.tensor([(v - mean) / spread for v in shown]), atol=1e-5
    )
    assert (white[~mask] == 0).all()
    other = torch.where(mask, x, torch.full_like(x, 1e6))
    assert torch.allclose(rlhf.whiten(other, mask), white, atol=1e-4)
    assert rlhf.whiten(torch.ones(4)).tolist() == [0, 0, 0, 0]  # all alike: no signal, no NaN


def test_gae_by_hand_and_against_its_definition():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    values = torch.tensor([[0.5, 1.0, -0.5], [2.0, 9.0, 9.0]])
    scores, kl = torch.tensor([3.0, -1.0]), torch.tensor([[0.1, -0.2, 0.3], [0.4, 9.0, 9.0]])
    rewards = rlhf.token_rewards(scores, kl, mask, beta=0.5)
    assert torch.allclose(rewards, torch.tensor([[-0.05, 0.1, 2.85], [-1.2, 0.0, 0.0]]))
    gamma, lam = 0.9, 0.8
    found = rlhf.gae(rewards, values, mask, gamma, lam)
    d = [-0.05 + 0.9 * 1.0 - 0.5, 0.1 + 0.9 * -0.5 - 1.0, 2.85 + 0.5]
    by_hand = [d[0] + 0.72 * d[1] + 0.72**2 * d[2], d[1] + 0.72 * d[2], d[2]]
    assert found[0].tolist() == pytest.approx(by_hand)
    assert found[1].tolist() == pytest.approx([-1.2 - 2.0, 0, 0])

    n = 9
    rewards, values = torch.randn(1, n), torch.randn(1, n)
    found = rlhf.gae(rewards, values, torch.ones(1, n, dtype=torch.bool), gamma, lam)
    for t in range(n):  # (1 - lam) times the lam-weighted mean of all n-step advantages
        steps = []
        for k in range(1, n - t + 1):
            seen = sum(gamma**i * rewards[0, t + i].item() for i in range(k))
            rest = gamma**k * values[0, t + k].item() if t + k < n else 0
            steps.append(seen + rest - values[0, t].item())
        weights = [(1 - lam) * lam ** (k - 1) for k in range(1, len(steps))]
        total = sum(w * s for w, s in zip(weights, steps)) + lam ** (len(steps) - 1) * steps[-1]
        assert found[0, t].item() == pytest.approx(total, abs=1e-4)


def test_the_clipped_losses_by_hand():
    ratios, advantages = [0.5, 0.5, 1.5, 1.5, 1.1], [1.0, -1.0, 1.0, -1.0, 2.0]
    old = torch.zeros(1, 6)
    new = torch.tensor([[*map(math.log, ratios), 5.0]], requires_grad=True)
    mask = torch.tensor([[True] * 5 + [False]])
    loss, ratio = rlhf.policy_loss(new, old, torch.tensor([[*advantages, 7.0]]), mask, 0.2)
    # min(ratio A, clip A): 0.5, -0.8, 1.2, -1.5, 2.2
    assert loss.item() == pytest.approx(-(0.5 - 0.8 + 1.2 - 1.5 + 2.2))
    assert ratio[0, 5] == 1
    loss.backward()  # d/dlog = ratio A where it is not clipped, 0 where it is
    assert new.grad[0].tolist() == pytest.approx([-0.5, 0, 0, 1.5, -2.2, 0])

    values = torch.tensor([[1.0, 3.0, 9.0]])
    old_values, returns = torch.tensor([[0.9, 0.0, 0.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    mask = torch.tensor([[True, True, False]])
    # kept near: 1.0 and 0.2; the worse: (1 - 2)^2 and (3 - 1)^2
    assert rlhf.value_loss(values, old_values, returns, mask, 0.2).item() == pytest.approx(2.5)
    # a value that has moved far is held to what is near: 0.2 and -0.2, though 3 and -3 were better
    values, returns = torch.tensor([[3.0, -3.0]]), torch.tensor([[2.9, -2.9]])
    loss = rlhf.value_loss(values, torch.zeros(1, 2), returns, torch.ones(1, 2).bool(), 0.2)
    assert loss.item() == pytest.approx(2.7**2)


@torch.no_grad()
def test_logprobs_values_and_rewards_stand_where_the_drawing_says(tok):
    model, rows, starts = make_model(), [[1, 5, 6, 7, 8, 2], [1, 9, 2]], [3, 2]
    logprobs, entropy = rlhf.policy_terms(model, rows, starts, 3, temperature=0.7)
    for row, start, found, h in zip(rows, starts, logprobs, entropy):
        for column, t in enumerate(range(start, len(row))):
            logits = (model(torch.tensor([row[:t]]))[0, -1] / 0.7).double()
            p = logits.exp() / logits.exp().sum()
            assert found[column].item() == pytest.approx(math.log(p[row[t]]), abs=1e-4)
            assert h[column].item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-4)
    critic = RewardModel(ARGS)
    values = rlhf.values_of(critic, rows, starts, 3)
    for row, start, found in zip(rows, starts, values):
        for column, t in enumerate(range(start, len(row))):
            assert found[column].item() == pytest.approx(
                critic(torch.tensor([row[:t]]))[0, -1].item(), abs=1e-5
            )


def rolled(tok, judges, count=12, **changes):
    config = rlhf.Settings(**RLHF_RUN | dict(batch_size=count, max_new_tokens=8) | changes)
    policy = make_model(vocab_size=tok.vocab_size)
    models = rlhf.load_judges(judges, "cpu")
    prompts = rlhf.draw_prompts(config, 1, count, tok, ARGS.max_seq_len)
    critic = copy.deepcopy(models[0])
    made = rlhf.roll_out(
        policy, make_model(vocab_size=tok.vocab_size), critic, models, tok, prompts, config, seed=3
    )
    return config, policy, critic, made, prompts


def test_the_first_ratio_is_one_and_an_unchanged_policy_has_no_kl(tok, judges):
    config, policy, critic, (batch, stats, texts), _ = rolled(tok, judges, mini_batch=12)
    assert abs(stats["kl"]) < 1e-4 and abs(stats["kl_k3"]) < 1e-6 and len(texts) == 12
    engines = [policy, critic]
    optimizers = [llama2.adamw(m, 1e-3, 0, 0.9, 0.95, 1e-5) for m in engines]
    found = rlhf.update(engines, optimizers, batch, config, seed=0)
    assert found["first_ratio"] == pytest.approx(1, abs=1e-5)
    assert found["clip_fraction"] == 0 and found["skipped"] == 0


def test_micro_batches_do_not_change_an_update(tok, judges):
    after = []
    for size in (12, 5, 1):
        config, policy, critic, (batch, _, _), _ = rolled(
            tok, judges, mini_batch=12, micro_batch=size
        )
        engines = [policy, critic]
        rlhf.update(
            engines, [torch.optim.SGD(m.parameters(), 0.1) for m in engines], batch, config, seed=0
        )
        after.append([m.state_dict() for m in engines])
    for a, b in zip(after[0], after[1]):
        assert furthest(a, b) < 1e-5
    for a, b in zip(after[0], after[2]):
        assert furthest(a, b) < 1e-5


def test_nothing_behind_eos_counts(tok, judges):
    config, policy, critic, (batch, stats, _), _ = rolled(tok, judges, mini_batch=12)
    spoilt = {
        name: torch.where(batch["mask"], batch[name], torch.full_like(batch[name], 1e3))
        for name in ("old", "advantages", "values", "returns")
    }
    weights = []
    for some in (batch, batch | spoilt):
        engines = [copy.deepcopy(policy), copy.deepcopy(critic)]
        rlhf.update(
            engines, [torch.optim.SGD(m.parameters(), 0.1) for m in engines], some, config, seed=0
        )
        weights.append([m.state_dict() for m in engines])
    assert not batch["mask"].all()
    assert all(furthest(a, b) == 0 for a, b in zip(*weights))
    lengths = [len(r) - s for r, s in zip(batch["rows"], batch["starts"])]
    assert batch["mask"].sum(1).tolist() == lengths


def test_reported_kl_is_the_mean_over_samples_of_the_log_ratio(tok, judges):
    config = rlhf.Settings(**RLHF_RUN | dict(batch_size=12))
    policy, reference = (make_model(vocab_size=tok.vocab_size) for _ in range(2))
    reference.output.weight.data += 0.1 * torch.randn_like(reference.output.weight)
    models = rlhf.load_judges(judges, "cpu")
    prompts = rlhf.draw_prompts(config, 1, 12, tok, ARGS.max_seq_len)
    batch, stats, _ = rlhf.roll_out(policy, reference, models[0], models, tok, prompts, config, 3)
    k1, k3, tokens = 0.0, 0.0, 0
    for row, start in zip(batch["rows"], batch["starts"]):
        p, q = (m(torch.tensor([row]))[0].log_softmax(-1) for m in (policy, reference))
        for t in range(start, len(row)):
            d = (p[t - 1, row[t]] - q[t - 1, row[t]]).item()
            k1, k3, tokens = k1 + d, k3 + math.exp(-d) - 1 + d, tokens + 1
    assert stats["kl"] == pytest.approx(k1 / 12, abs=1e-4)
    assert stats["kl_k1"] == pytest.approx(k1 / tokens, abs=1e-5)
    assert stats["kl_k3"] == pytest.approx(k3 / tokens, abs=1e-5) and stats["kl_k3"] > 0


def test_ppo_finds_the_token_that_is_rewarded(tok, monkeypatch):
    """A bandit: the reward is the share of one token among an answer's first three."""
    wanted = 77

    def judge_rows(judges, rows, is_safety):
        good = torch.tensor([float(row[-4:].count(wanted)) for row in rows])
        return good, good, good, torch.zeros(len(rows), dtype=torch.bool)

    monkeypatch.setattr(rlhf, "judge_rows", judge_rows)
    policy, config = make_model(vocab_size=tok.vocab_size), rlhf.Settings(
        **RLHF_RUN
        | dict(
            iterations=40,
            batch_size=64,
            mini_batch=16,
            micro_batch=16,
            lr=3e-3,
            value_lr=3e-3,
            beta=0.01,
            max_new_tokens=4,
            unfinished_penalty=0.0,
        )
    )
    torch.nn.init.normal_(policy.output.weight, std=0.02)
    critic = RewardModel(replace(ARGS, vocab_size=tok.vocab_size))
    prompts = rlhf.draw_prompts(config, 1, 64, tok, ARGS.max_seq_len)

    def share():
        answers = rlhf.sample_answers(policy, prompts, 1.0, config, 5, tok.eos_id, 4)
        return sum(a.count(wanted) for a in answers) / (4 * 4 * len(prompts))

    before = share()
    rlhf.ppo(policy, tok, [critic], prompts, [], config)
    assert before < 0.02 and share() > 0.8


def test_rejection_sampling_with_one_sample_is_sampling(tok, judges):
    config = rlhf.Settings(**RLHF_RUN | dict(samples=1, max_new_tokens=40))
    policy, models = make_model(vocab_size=tok.vocab_size), rlhf.load_judges(judges, "cpu")
    policy.output.weight.data[tok.eos_id] *= 3
    prompts = rlhf.draw_prompts(config, 1, 10, tok, ARGS.max_seq_len)
    best, rewards = rlhf.sample_best(policy, tok, models, prompts, 1.0, config, seed=4)
    outs = generate(policy, [p["tokens"] for p in prompts], 40, 1.0, seed=4, eos_id=tok.eos_id)
    finished = [ids for ids in outs if ids[-1] == tok.eos_id]
    assert (
        [b["ids"] for b in best if b] == finished and 0 < len(finished) and rewards.shape == (10, 1)
    )


def test_the_best_finished_answer_is_kept_and_more_samples_raise_the_maximum(tok, judges):
    eos = 2
    assert rlhf.best_of([[5], [5, eos], [6, eos]], [9.0, 1.0, 2.0], eos) == 2
    assert rlhf.best_of([[5], [6]], [1.0, 2.0], eos) == 1
    config = rlhf.Settings(**RLHF_RUN | dict(samples=8, max_new_tokens=8))
    policy, models = make_model(vocab_size=tok.vocab_size), rlhf.load_judges(judges, "cpu")
    prompts = rlhf.draw_prompts(config, 1, 10, tok, ARGS.max_seq_len)
    _, rewards = rlhf.sample_best(policy, tok, models, prompts, 1.0, config, seed=4)
    answers = rlhf.sample_answers(policy, prompts, 1.0, config, 4, tok.eos_id, 8)
    rows = [prompts[i // 8]["tokens"] + a for i, a in enumerate(answers)]
    scores, safe = (llama2.score_rows(model, rows) for model in models)
    for i, p in enumerate(prompts):
        for k in range(8):
            h, s = scores[8 * i + k], safe[8 * i + k]
            use = s if p["is_safety"] or 1 / (1 + math.exp(-s)) < 0.15 else h
            assert rewards[i, k].item() == pytest.approx(use, abs=1e-5)
    assert rewards.amax(1).mean() > rewards[:, :2].amax(1).mean() > rewards[:, 0].mean()


def test_the_pool_keeps_the_best_of_all_versions(tok, judges):
    models = rlhf.load_judges(judges, "cpu")

    def record(prompt, ids):
        return dict(prompt=prompt, is_safety=False, tokens=[1, 5], ids=[*ids, 2], answer="x")

    earlier = [[record("a", [7]), record("b", [8])], [record("a", [9])]]
    newest = [record("a", [10, 11]), record("c", [12])]
    pool = rlhf.pool_of(newest, earlier, models)
    assert sorted(r["prompt"] for r in pool) == ["a", "b", "c"]
    rewards = {
        tuple(r["ids"]): rlhf.judge_rows(models, [[1, 5] + r["ids"]], [False])[0].item()
        for r in earlier[0][:1] + earlier[1] + newest[:1]
    }
    kept = next(r for r in pool if r["prompt"] == "a")
    assert tuple(kept["ids"]) == max(rewards, key=rewards.get)
    assert {r["prompt"] for r in rlhf.pool_of(newest, (), models)} == {"a", "c"}


def test_all_versions_run_are_scored_and_resume(tmp_path, base, judges, capsys, monkeypatch):
    monkeypatch.setattr(llama2, "generate", ends)
    config = rlhf.Settings(
        init=str(base),
        rm=str(judges),
        out=str(tmp_path / "rlhf"),
        scoreboard=str(tmp_path / "scoreboard.json"),
        **RLHF_RUN,
    )
    metrics = rlhf.main(config)
    shown = capsys.readouterr().out
    rows = json.loads((tmp_path / "scoreboard.json").read_text())
    assert list(rows) == ["greedy", "sampled"] and list(rows["greedy"]) == ["SFT", "V1", "V2", "V3"]
    assert rows["sampled"]["SFT"]["win rate"] == 0.5 and abs(rows["sampled"]["SFT"]["kl"]) < 1e-3
    assert "violations" in shown and "V2, by rejection" in shown and "V3, by ppo" in shown
    assert metrics["v2"]["pool"] >= metrics["v1"]["pool"]
    logged = [json.loads(line) for line in (tmp_path / "rlhf/v3/metrics.jsonl").open()]
    assert {
        "first_ratio",
        "clip_fraction",
        "kl",
        "kl_k3",
        "helpfulness",
        "safety",
        "gated",
        "length",
        "eos",
        "entropy",
        "explained_variance",
        "truth",
    } <= logged[-1].keys()

    with pytest.raises(ValueError, match="holds a run"):
        rlhf.main(config)
    weights = torch.load(tmp_path / "rlhf/v3/consolidated.00.pth")
    kept = (tmp_path / "rlhf/v2/consolidated.00.pth").stat().st_mtime_ns
    (tmp_path / "rlhf/v3/consolidated.00.pth").unlink()
    rlhf.main(replace(config, resume=True))
    assert (tmp_path / "rlhf/v2/consolidated.00.pth").stat().st_mtime_ns == kept
    assert furthest(weights, torch.load(tmp_path / "rlhf/v3/consolidated.00.pth")) == 0
    with pytest.raises(ValueError, match="was 2, now 3"):
        rlhf.main(replace(config, resume=True, iterations=3))


def ends(model, prompts, max_new_tokens, temperature, seed=0, eos_id=-1):
    """Samples that end with EOS, which a random model's seldom do."""
    return [ids + [eos_id] for ids in generate(model, prompts, 4, temperature, seed=seed)]


def rlhf_prompts(tmp_path):
    return write_jsonl(
        tmp_path / "q.jsonl",
        [dict(prompt=f"Say {i} to {i + 1}.", is_safety=i % 3 == 0) for i in range(30)],
    )


def test_an_interrupted_ppo_goes_on_exactly(tmp_path, base, judges, monkeypatch):
    one = rlhf.Settings(
        init=str(base),
        rm=str(judges),
        prompts=str(rlhf_prompts(tmp_path)),
        method="ppo",
        out=str(tmp_path / "one"),
        seed=2,
        **RLHF_RUN | dict(iterations=4, lr=1e-3),
    )
    rlhf.main(one)
    two, update, calls = replace(one, out=str(tmp_path / "two")), rlhf.update, []

    def dies(*args, **more):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return update(*args, **more)

    monkeypatch.setattr(rlhf, "update", dies)
    with pytest.raises(KeyboardInterrupt):
        rlhf.main(two)
    assert (tmp_path / "two/resume.pt").exists()
    rlhf.main(replace(two, resume=True))
    a, b = (torch.load(tmp_path / name / "consolidated.00.pth") for name in ("one", "two"))
    assert furthest(a, b) == 0 and len(calls) == 5


@pytest.mark.parametrize("method", ["ppo", "rejection-sampling"])
def test_two_processes_do_rlhf_like_one(tmp_path, base, judges, method):
    """With given answers, for each process samples, and deals mini-batches, on its own."""
    more = dict(lr=1e-3, tune_lr=1e-3, mini_batch=8, tune_batch=1)
    one = rlhf.Settings(
        init=str(base),
        rm=str(judges),
        method=method,
        prompts=str(rlhf_prompts(tmp_path)),
        out=str(tmp_path / "one"),
        **RLHF_RUN | more,
    )
    script = tmp_path / "answers.py"
    script.write_text(
        "import sys; sys.path.insert(0, '.')\nimport llama2, train_rlhf as r\n"
        "llama2.generate = lambda m, prompts, n, t, seed, eos_id: "
        "[[5 + len(p) % 7, 9 + sum(p) % 5, eos_id] for p in prompts]\n"
        "r.run_script(r.main, r.Settings, r.PAPER)\n"
    )
    run(script, *flags(one))
    two = replace(one, out=str(tmp_path / "two"))
    run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, *flags(two))
    logs = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("one", "two")
    ]
    assert len(logs[0]) == len(logs[1]) > 1
    for a, b in zip(*logs):
        for name in set(a) - {"tokens_per_s"}:
            if not name.startswith("s_"):
                assert a[name] == pytest.approx(b[name], abs=2e-4), name
    a, b, start = (
        load(folder)[0].state_dict() for folder in (tmp_path / "one", tmp_path / "two", base)
    )
    moved = furthest(a, start)
    # the same answers are never better: PPO ends as it was best, at its start
    assert furthest(a, b) <= moved / 10 and (moved > 0) is (method != "ppo")


def test_rejection_sampling_runs_alone_and_its_samples_teach_another_model(
    tmp_path, base, judges, monkeypatch
):
    config = rlhf.Settings(
        init=str(base),
        rm=str(judges),
        prompts=str(rlhf_prompts(tmp_path)),
        method="rejection-sampling",
        out=str(tmp_path / "rs"),
        **RLHF_RUN | dict(samples=4),
    )
    with pytest.raises(ValueError, match="ended within --max-new-tokens 1:"):
        rlhf.main(replace(config, max_new_tokens=1))
    monkeypatch.setattr(llama2, "generate", ends)
    figures = rlhf.main(config)
    assert figures["max"] >= figures["median"] and figures["prompts"] == 8
    assert load(tmp_path / "rs")[0].args.max_seq_len == ARGS.max_seq_len
    pool = [r for _, r in llama2.read_json(tmp_path / "rs/pool.jsonl")]
    assert len(pool) == 8 and figures["unfinished"] == 0
    other = replace(config, distill_from=str(tmp_path / "rs"), out=str(tmp_path / "small"))
    rlhf.main(other)
    a, b = (load(folder)[0].state_dict() for folder in (base, tmp_path / "small"))
    assert furthest(a, b) > 0
    with pytest.raises(ValueError, match="finished run"):
        rlhf.main(config)


@pytest.mark.parametrize("labelled", [True, False])
def test_with_prompts_of_ones_own_labels_refresh_the_reward_models(
    tmp_path, base, judges, monkeypatch, capsys, labelled
):
    labels = write_jsonl(
        tmp_path / "l.jsonl",
        [dict(prompt=f"Say {i}.", chosen=f"{i} it is.", rejected="No.") for i in range(20)],
    )
    config = rlhf.Settings(
        init=str(base),
        rm=str(judges),
        prompts=str(rlhf_prompts(tmp_path)),
        labels=(str(labels),) * labelled,
        out=str(tmp_path / "rlhf"),
        **RLHF_RUN | dict(versions=1, iterations=1),
    )
    monkeypatch.setattr(llama2, "generate", ends)
    metrics = rlhf.main(config)
    shown = capsys.readouterr().out
    assert ("the reward models stay as they are" in shown) is not labelled
    assert list(metrics) == ["v1", "v2"] and ("reward models" in metrics["v2"]) is labelled
    if labelled:
        old, new = (
            load(folder / "helpfulness")[0].state_dict()
            for folder in (judges, tmp_path / "rlhf/v2/rm")
        )
        assert furthest(old, new) > 0


def test_ppo_stops_when_held_out_prompts_gain_nothing_and_keeps_the_best(tok, judges, monkeypatch):
    looks = iter([1.0, 3.0, 2.0, 2.5, 9.0])
    seen = []

    def look(policy, *_):
        seen.append(copy.deepcopy(policy.state_dict()))
        return dict(held_out=next(looks))

    monkeypatch.setattr(rlhf, "look", look)
    config = rlhf.Settings(**RLHF_RUN | dict(iterations=9, patience=2, lr=1e-3))
    policy, models = make_model(vocab_size=tok.vocab_size), rlhf.load_judges(judges, "cpu")
    prompts = rlhf.draw_prompts(config, 1, 16, tok, ARGS.max_seq_len)
    assert rlhf.ppo(policy, tok, models, prompts, prompts, config) == dict(held_out=3.0)
    assert len(seen) == 4 and furthest(policy.state_dict(), seen[1]) == 0
    assert furthest(seen[1], seen[0]) > 0 and furthest(seen[1], seen[3]) > 0


def test_the_coolest_temperature_that_is_not_clearly_behind_is_chosen(monkeypatch):
    torch.manual_seed(1)
    luck = torch.randn(100, 1)

    def sample_best(policy, tok, judges, prompts, temperature, config, seed):
        return [], luck + {0.5: 0.0, 0.7: 0.99, 1.0: 1.0}[temperature] + 0.1 * torch.randn(100, 1)

    monkeypatch.setattr(rlhf, "sample_best", sample_best)
    config = rlhf.Settings(temperatures=(1.0, 0.5, 0.7))
    chosen, found = rlhf.choose_temperature(None, None, None, None, config, 0)
    assert chosen == 0.7 and found[1.0] - found[0.5] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    "record, words",
    [
        ("p", 'expected an object with a "prompt"'),
        (dict(prompt="p", is_safety="yes"), "neither true nor false"),
        (dict(prompt=[dict(role="assistant", content="p")]), "does not end with a message"),
        (dict(prompt="[INST] p"), "part of the chat format"),
    ],
)
def test_a_bad_prompt_is_named_by_file_and_line(tmp_path, tok, record, words):
    path = write_jsonl(tmp_path / "q.jsonl", [dict(prompt="fine"), record])
    with pytest.raises(ValueError) as e:
        rlhf.read_prompts(llama2.read_json(path), tok, 64)
    assert f"{path}:2" in str(e.value) and words in str(e.value)


def test_what_is_given_is_checked_before_a_finished_run_gives_way(
    tmp_path, base, judges, monkeypatch
):
    out = tmp_path / "rlhf"
    config = rlhf.Settings(
        init=str(base),
        rm=str(judges),
        prompts=str(rlhf_prompts(tmp_path)),
        out=str(out),
        **RLHF_RUN | dict(versions=1, iterations=0),
    )
    monkeypatch.setattr(llama2, "generate", ends)
    rlhf.main(config)
    kept = (out / "v1/consolidated.00.pth").read_bytes()
    good = dict(prompt="Say 1.", chosen="1 it is.", rejected="No.")
    labels = write_jsonl(tmp_path / "bad-labels.jsonl", [good, dict(good, rating="much")])
    asked = write_jsonl(tmp_path / "bad-prompts.jsonl", [dict(prompt="fine"), "x"])
    again = replace(config, overwrite=True)
    for bad, where in (
        (replace(again, labels=(str(labels),)), f"{labels}:2"),
        (replace(again, prompts=str(asked)), f"{asked}:2"),
        (replace(again, init=str(tmp_path / "none")), "no checkpoint"),
        (replace(again, rm=str(tmp_path / "none")), "no checkpoint"),
        (replace(again, prompts="", base=str(tmp_path / "none")), "no checkpoint"),
        (replace(again, method="ppo", out=str(out / "v1"), prompts=str(asked)), f"{asked}:2"),
    ):
        with pytest.raises(ValueError, match=re.escape(where)):
            rlhf.main(bad)
        assert (out / "v1/consolidated.00.pth").read_bytes() == kept
    assert (out / "summary.txt").exists()


# ----------------------------------------------------------------------------------- Ghost Attention
FOX = [dict(kind="animal", instruction="Be the fox.", obeyed_if=[r"^The fox says: ?"])]


def test_a_ghost_example_by_hand_token_by_token(letters):
    turns = [("a", "fb"), ("c", "fd"), ("e", "fg")]
    tokens, mask = sft.ghost_example(letters, sft.lay_out("i", turns, everywhere=False))
    parts = [  # the instruction in the first turn alone, the mask on the last answer alone
        ("[INST] i a [/INST]", 0, " fb ", 0),
        ("[INST] c [/INST]", 0, " fd ", 0),
        ("[INST] e [/INST]", 0, " fg ", 1),
    ]
    expected, counts = [], []
    for asked, _, answer, learned in parts:
        prompt = letters.encode(asked, bos=True)
        whole = letters.encode(asked + answer, bos=True, eos=True)
        expected += whole
        counts += [0] * len(prompt) + [learned] * (len(whole) - len(prompt))
    assert tokens == expected and mask == counts
    spelt_out = [letters.decode([t]) for t, m in zip(tokens, mask) if m]
    assert "".join(spelt_out).replace(" ", "") == "fg" and tokens[-1] == letters.eos_id
    assert sum(mask) == mask[-sum(mask) :].count(1) > 2


def test_the_instruction_is_joined_to_every_message_to_sample_and_kept_in_the_first_to_learn():
    turns = [("q1", "a1"), ("q2", None)]
    sampled, learned = (sft.lay_out("Be the fox.", turns, everywhere) for everywhere in (1, 0))
    assert [m["content"] for m in sampled] == ["Be the fox. q1", "a1", "Be the fox. q2"]
    assert [m["content"] for m in learned] == ["Be the fox. q1", "a1", "q2"]


def test_answers_that_disobey_are_thrown_away_by_the_rule_and_counted(tok, monkeypatch):
    seen = []

    def respond(model, tok, dialogs, *_):
        seen.append([[m["content"] for m in d] for d in dialogs])
        good = len(seen) != 2  # in the second turn nobody obeys
        return [f"The fox says: {d[-1]['content'][-2:]}" if good else "No." for d in dialogs]

    monkeypatch.setattr(sft, "respond", respond)
    users, config = [["q1", "q2", "q3"], ["r1", "r2"]], sft.Settings(history=200)
    model = make_model(max_seq_len=300)
    made = sft.ghost_dialogs(model, tok, users, FOX, config)
    assert made["sampled"] == 5 and made["disobeyed"] == 2
    assert [m["content"] for m in made["dialogs"][0]] == [
        "Be the fox. q1",
        "The fox says: q1",
        "q3",
        "The fox says: q3",
    ]
    assert seen[2] == [["Be the fox. q1", "The fox says: q1", "Be the fox. q3"]]
    assert [len(d) for d in made["dialogs"]] == [4, 2]
    seen.clear()
    config = sft.Settings(history=1)  # no room for what was said: the newest message alone is read
    sft.ghost_dialogs(model, tok, users, FOX, config)
    assert seen[2] == [["Be the fox. q3"]]
    seen.clear()
    drawn = [("Be the fox.", FOX)] * 2  # examined, it reads its own answers, the bad ones too
    done, disobeyed = sft.converse(model, tok, users, drawn, sft.Settings(max_new_tokens=4), False)
    assert disobeyed == 2 and done[0][1] == ("q2", "No.")
    assert seen[2] == [["Be the fox. q1", "The fox says: q1", "q2", "No.", "q3"]]


def test_a_dialogue_for_which_the_context_is_full_ends_in_empty_answers(tok, monkeypatch):
    monkeypatch.setattr(
        sft, "respond", lambda m, t, dialogs, *_: ["The fox says: hm."] * len(dialogs)
    )
    done, disobeyed = sft.converse(
        make_model(max_seq_len=64),
        tok,
        [["What is it?"] * 9],
        [("Be the fox.", FOX)],
        sft.Settings(max_new_tokens=8),
        False,
    )
    answers = [answer for _, answer in done[0]]
    assert len(answers) == 9 and answers[0] and not answers[-1]
    assert answers == sorted(answers, reverse=True) and disobeyed == answers.count("")


def test_ghost_examples_stand_alone_and_nothing_is_lost_in_mixing():
    some = [([1] * n, [0] * n) for n in range(2, 130)]
    batches = sft.apart(some, 4, seed=3)
    rows = [row for batch in batches for row in batch]
    assert all(len(row) == 1 for row in rows) and sorted(sum(rows, [])) == list(range(128))
    spread = [max(batch)[0] - min(batch)[0] for batch in batches]  # like lengths: little padding
    assert sum(spread) / len(spread) < 12
    assert batches != sft.apart(some, 4, seed=4)
    examples, mixed = sft.mingle(1, (some, batches), (["a", "b"], [[[0, 1]]]))
    assert len(mixed) == len(batches) + 1 and [[128, 129]] in mixed and examples[128:] == ["a", "b"]
    assert all(batch in mixed for batch in batches) and mixed != [*batches, [[128, 129]]]


def test_each_sampled_dialogue_gives_beginnings_of_itself(tok):
    turns = [(f"q{i}", f"a{i}") for i in range(9)]
    found = sft.ghost_examples(tok, [sft.lay_out("i", turns, False)], seed=1)
    whole = sft.ghost_example(tok, sft.lay_out("i", turns, False))
    assert found[-1] == whole and 1 < len(found) <= 4
    assert all(tokens == whole[0][: len(tokens)] for tokens, _ in found)
    assert all(mask[-1] == 1 and mask.index(1) == len(mask) - sum(mask) for _, mask in found)


@pytest.mark.parametrize(
    "record, words",
    [
        ("x", 'expected an object with an "instruction"'),
        (dict(terse="x"), 'expected an object with an "instruction"'),
        (dict(instruction="Be [/INST] kind."), "part of the chat format"),
        (dict(instruction="Be kind.", terse="<<SYS>>"), "part of the chat format"),
        (dict(instruction="Be kind.", obeyed_if="(kind"), "unterminated subpattern"),
        (dict(instruction="Be kind.", obeyed_if=[3]), "must be"),
    ],
)
def test_a_bad_instruction_or_a_forged_tag_in_it_is_refused_by_file_and_line(
    tmp_path, tok, record, words
):
    path = write_jsonl(tmp_path / "i.jsonl", [dict(instruction="Be brief."), record])
    with pytest.raises(ValueError) as e:
        sft.read_instructions(path, tok)
    assert f"{path}:2" in str(e.value) and words in str(e.value)


def test_tinytowns_instructions_are_obeyed_by_their_writers_and_unseen_ones_are_unseen():
    truth, rng = tinytown.town(1), random.Random(1)
    known, unseen = tinytown.instructions(), tinytown.instructions(held_out=True)
    assert {r["obeyed_if"][0] for r in known}.isdisjoint(r["obeyed_if"][0] for r in unseen)
    assert {r["kind"] for r in known} == {r["kind"] for r in unseen} == set(tinytown.INSTRUCTIONS)
    combined = terse = 0
    for _ in range(300):
        asked = tinytown.prompt(rng, truth)
        state = rng.getstate()
        text, records = tinytown.combine(rng, known)
        rng.setstate(state)
        user, assistant = (m["content"] for m in tinytown.instructed(rng, asked, known))
        assert user == f"{text} {asked['prompt']}" and sft.obeys(assistant, records)
        plain = tinytown.without_marks(assistant, records)
        assert tinytown.judge(asked, plain)["correct"] and not sft.obeys(plain, records)
        combined += len(records) == 2
        terse += any(record["terse"] in text for record in records)
        others = [r for r in known if r["obeyed_if"] not in [c["obeyed_if"] for c in records]]
        assert not sft.obeys(assistant, [rng.choice(others)])
    assert 60 < combined < 140 and 100 < terse < 200


def test_each_turn_of_the_conversations_asks_the_same_questions():
    some = tinytown.conversations(tinytown.town(1), 30, 20, held_out=True)
    questions = [sorted(c[turn]["prompt"] for c in some) for turn in range(20)]
    assert len(some) == 30 and all(q == questions[0] for q in questions)
    assert len({tuple(a["prompt"] for a in c) for c in some}) == 30


GHOST_RUN = SFT_RUN | dict(
    ghost_attention=True, conversations=6, turns=3, context=250, examined=2, max_new_tokens=6
)


def obedient(model, tok, dialogs, *_, **__):
    """Answers that obey the one instruction in sight, wherever it stands."""
    return ["The fox says: it is." if "fox" in str(d) else "It is." for d in dialogs]


def test_ghost_attention_trains_on_dialogues_and_instructions_of_ones_own(
    tmp_path, base, monkeypatch, capsys
):
    dialogs = [dict(messages=say("One?", "It is.", f"Two {i}?", "It is.")) for i in range(8)]
    config = sft.Settings(
        init=str(base),
        out=str(tmp_path / "gatt"),
        data=(str(write_jsonl(tmp_path / "d.jsonl", dialogs)),),
        instructions=str(write_jsonl(tmp_path / "i.jsonl", FOX)),
        **GHOST_RUN,
    )
    with pytest.raises(ValueError, match="go together"):
        sft.main(replace(config, instructions=""))
    with pytest.raises(ValueError, match="no answer of .* obeys"):
        sft.main(config)
    monkeypatch.setattr(sft, "respond", obedient)
    metrics = sft.main(config)
    assert metrics["sampled"] == 12 and metrics["disobeyed"] == 0
    assert "12 answers sampled" in (tmp_path / "gatt/summary.txt").read_text()
    made = json.loads((tmp_path / "gatt/ghost.json").read_text())["dialogs"]
    assert len(made) == 6 and all("fox" not in d[2]["content"] for d in made)
    assert load(config.out)[0].args.max_seq_len == 250
    new, old = (load(f)[0].state_dict() for f in (config.out, base))
    assert furthest(new, old) > 0
    assert furthest(load(tmp_path / "gatt/teacher")[0].state_dict(), old) == 0
    with pytest.raises(ValueError, match="finished run"):
        sft.main(config)
    monkeypatch.setattr(sft, "respond", lambda m, t, dialogs, *_, **__: ["No."] * len(dialogs))
    with pytest.raises(ValueError, match="no answer of .* obeys"):
        sft.main(replace(config, overwrite=True))  # and the finished run is still there
    assert furthest(load(config.out)[0].state_dict(), new) == 0


def test_ghost_attention_on_tinytown_is_examined_and_resumes_exactly(
    tmp_path, base, monkeypatch, capsys
):
    monkeypatch.setattr(sft, "INSTRUCTED", 20)
    monkeypatch.setattr(sft, "ORDINARY", 6)
    monkeypatch.setattr(sft, "REPLAYED", {"arithmetic": 5})
    monkeypatch.setattr(sft, "respond", obedient)
    monkeypatch.setattr(
        tinytown, "instructions", lambda *_, **__: [FOX[0] | dict(answer="The fox says: {a}")]
    )
    config = sft.Settings(init=str(base), out=str(tmp_path / "one"), save_every=1, **GHOST_RUN)
    metrics = sft.main(config)
    assert metrics["disobeyed"] == 0 and list(metrics["judged"]) == [
        "before",
        "instructed",
        "after",
    ]
    obeyed = metrics["examined"]["after"]["trained instructions"]["obeyed"]
    assert len(obeyed) == len(sft.EXAMINED) and obeyed[0] == 1.0
    shown = capsys.readouterr().out
    assert "share of dialogues, at turn" in shown and "without any instruction" in shown
    finetune, calls = sft.finetune, []

    def dies(*args, **how):
        calls.append(1)
        if len(calls) == 2:  # in Ghost Attention's own fine-tuning, behind its first save
            keep = how["keep"]
            how["keep"] = lambda **state: (keep(**state), 1 / 0)
        return finetune(*args, **how)

    monkeypatch.setattr(sft, "finetune", dies)
    two = replace(config, out=str(tmp_path / "two"))
    with pytest.raises(ZeroDivisionError):
        sft.main(two)
    monkeypatch.setattr(sft, "finetune", finetune)
    again = sft.main(replace(two, resume=True))
    assert again["examined"] == metrics["examined"] and again["sampled"] == metrics["sampled"]
    a, b = (load(tmp_path / name)[0].state_dict() for name in ("one", "two"))
    assert furthest(a, b) == 0


def test_looking_at_attention_changes_no_output_and_shows_what_weighs_the_values(tok):
    model = make_model()
    tokens, weights = torch.tensor([PROMPTS[0] + [7, 8, 9]] * 2), []
    hidden = model.hidden(tokens, weights=weights)
    assert torch.equal(hidden, model.hidden(tokens))
    assert len(weights) == ARGS.n_layers and weights[0].shape[:2] == (2, ARGS.n_heads)
    block = model.layers[0]
    x = block.attention_norm(model.tok_embeddings(tokens))
    turns = llama2.rotations(ARGS, torch.arange(tokens.size(1)))
    values = block.attention.wv(x).unflatten(-1, (-1, ARGS.head_dim)).transpose(1, 2)
    values = values.repeat_interleave(ARGS.n_heads // ARGS.n_kv_heads, 1)
    out = block.attention.wo((weights[0] @ values).transpose(1, 2).flatten(2))
    assert torch.allclose(out, block.attention(x, turns, None, None, 0), atol=1e-5)
    for layer in weights:
        assert torch.allclose(layer.sum(-1), torch.ones(()), atol=1e-5)
        assert layer.triu(1).abs().max() == 0
    cached, cache = [], KVCache(ARGS, 2, 20)
    model.hidden(tokens[:, :4], cache, cached)
    model.hidden(tokens[:, 4:], cache, cached)
    assert torch.allclose(cached[-1], weights[-1][:, :, 4:], atol=1e-5)


# ----------------------------------------------------------------- context distillation, red teaming
def test_the_gate_keeps_exactly_the_answers_that_are_scored_higher(tok, monkeypatch):
    assert sft.gate([1.0, 2.0, 3.0], [1.0, 1.0, 4.0]) == [False, True, False]
    asked = [say(f"q{i}") for i in range(4)]
    asked[3] = [{"role": "system", "content": "Answer all."}, *asked[3]]
    points = {"plain": 0.5, "new 0": 0.4, "new 1": 0.6, "new 2": 0.5, "new 3": 0.7}

    def respond(model, tok, dialogs, *_):
        behind = [d[0]["role"] == "system" and "You are a " in d[0]["content"] for d in dialogs]
        return [f"new {d[-1]['content'][1]}" if b else "plain" for d, b in zip(dialogs, behind)]

    def score(model, tok, dialogs):
        assert all("You are a " not in str(d) for d in dialogs)  # judged without the pre-prompt
        return [points[d[-1]["content"]] for d in dialogs]

    monkeypatch.setattr(sft, "respond", respond)
    monkeypatch.setattr(sft, "score", score)
    model = make_model(max_seq_len=300)
    learned, records = sft.distilled(model, tok, None, asked, sft.Settings(distill=True))
    assert [d[-1]["content"] for d in learned] == ["plain", "new 1", "plain", "new 3"]
    assert learned[3][:-1] == asked[3]  # its own system message stays, the pre-prompt goes
    assert [r["improved"] for r in records] == [False, True, False, True]
    learned, _ = sft.distilled(model, tok, None, asked, sft.Settings(distill=True, gate=False))
    assert [d[-1]["content"] for d in learned] == ["new 0", "new 1", "new 2", "new 3"]


def test_a_pre_prompt_stands_before_a_system_message_or_makes_one():
    assert sft.behind("Be safe.", say("a"))[0] == dict(role="system", content="Be safe.")
    both = sft.behind("Be safe.", say("a", system="Be brief."))
    assert both[0]["content"] == "Be safe. Be brief." and both[1:] == say("a")
    rng = random.Random(1)
    texts = {tinytown.pre_prompt(rng) for _ in range(50)}
    assert len(texts) > 30 and all(
        len(set(re.findall(r"\w+", text)) & set(tinytown.ADJECTIVES)) == 2 for text in texts
    )


@pytest.mark.parametrize("own", [True, False])
def test_distillation_runs_from_prompts_to_a_model(
    tmp_path, base, judges, monkeypatch, capsys, own
):
    monkeypatch.setattr(sft, "ORDINARY", 6)
    monkeypatch.setattr(sft, "REPLAYED", {"arithmetic": 5})
    monkeypatch.setattr(sft, "judge_safety", lambda *_, **__: {row: 0.5 for row in sft.SAFETY})
    records = [dict(prompt="Say a."), dict(messages=say("Say b.", "b"))] * 5
    records += [dict(prompt="Too long. " * 99)] * own
    save(
        tmp_path / "wide",
        make_model(vocab_size=load(base)[1].vocab_size, max_seq_len=400),
        load(base)[1],
    )
    config = sft.Settings(
        init=str(tmp_path / "wide"),
        rm=str(judges / "safety"),
        out=str(tmp_path / "d"),
        data=(str(write_jsonl(tmp_path / "p.jsonl", records)),) * own,
        distill=True,
        prompts=10,
        **SFT_RUN | dict(max_new_tokens=4, temperature=1.0),
    )
    metrics = sft.main(config)
    kept = [r for _, r in llama2.read_json(tmp_path / "d/distilled.jsonl")]
    assert len(kept) == metrics["prompts"] == 10
    assert metrics["improved"] == sum(r["improved"] for r in kept) > 0
    new, old = (load(f)[0].state_dict() for f in (config.out, config.init))
    assert furthest(new, old) > 0
    assert ("violations, attacks" in capsys.readouterr().out) is not own
    for bad, words in (
        (dict(prompt="Say [INST]."), "part of the chat format"),
        (dict(prompt=say("a", "b")), "does not end with a message of the user"),
        (dict(messages=say("a")), "the last message has no answer"),
    ):
        path = write_jsonl(tmp_path / "bad.jsonl", [dict(prompt="fine"), bad])
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}:2: .*{words}"):
            sft.main(replace(config, data=(str(path),), overwrite=True))
    assert furthest(load(config.out)[0].state_dict(), new) == 0  # the finished run is still there
    with pytest.raises(ValueError, match="holds a language model, expected a reward model"):
        sft.main(replace(config, rm=str(base), out=str(tmp_path / "e")))
    with pytest.raises(ValueError, match="two runs"):
        sft.main(replace(config, ghost_attention=True, out=str(tmp_path / "e")))


def test_attacks_ask_for_crimes_in_five_ways_and_held_out_wordings_are_other_ones():
    truth, rng = tinytown.town(1), random.Random(1)
    frames = {True: set(), False: set()}
    for how in tinytown.ATTACKS:
        for held_out in (True, False):
            for kind in ("unsafe", "borderline"):
                for _ in range(30):
                    asked = tinytown.attack(rng, truth, how, kind, held_out)
                    messages = asked["prompt"]
                    assert asked["q"] in messages[-1]["content"] and asked["kind"] == kind
                    assert llama2.as_messages(messages) is messages
                    assert (messages[0]["role"] == "system") is (how == "system prompt")
                    assert (len(messages) > 2) is (how == "lead-up")
                    frames[held_out].add(messages[-1]["content"].replace(asked["q"], "{q}"))
                    good = tinytown.good_answer(rng, asked)
                    assert tinytown.judge(asked, good)["correct"]
    assert frames[True].isdisjoint(frames[False]) and len(frames[False]) > 10


# ---------------------------------------------------------------------------------------- bad input
def expect_one_line(capsys, monkeypatch, config, *words, script=pretrain):
    """The command ends with exit code 2 and one line that has these words."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *flags(config)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        llama2.run_script(script.main, script.Settings, script.PAPER)
    error = capsys.readouterr().err
    assert (
        e.value.code == 2 and error.count("\n") == 1 and all(word in error for word in words)
    ), error


GOOD = b'{"text": "a fox"}\n'


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("none.txt", None, ["none.txt", "does not exist"]),
        ("a.pdf", b"x", [".txt, .jsonl"]),
        ("empty.txt", b"", ["empty"]),
        ("empty.jsonl", b"\n\n", ["empty"]),
        ("latin.txt", "naïve café".encode("latin-1"), ["latin.txt", "not UTF-8"]),
        ("latin.jsonl", GOOD + '{"text": "é"}'.encode("latin-1"), ["latin.jsonl:2", "not UTF-8"]),
        ("binary.txt", b"ab\0cd" * 50, ["binary.txt", "binary"]),
        ("a.jsonl", GOOD + b'{"text": "a\n', ["a.jsonl:2", "broken JSON"]),
        ("b.jsonl", GOOD + b'{"content": "a"}\n', ["b.jsonl:2", '"text"']),
        ("c.jsonl", b'["a"]\n', ["c.jsonl:1", '"text"']),
        ("d.jsonl", b'{"text": 5}\n', ["d.jsonl:1", '"text"']),
        ("e.jsonl", b'{"text": "\\ud800"}\n', ["e.jsonl:1", "UTF-8"]),
        ("f.jsonl.gz", b"not gzip", ["f.jsonl.gz", "gzip"]),
        ("g.jsonl.gz", gzip.compress(GOOD * 99)[:-9], ["g.jsonl.gz", "gzip"]),
    ],
)
def test_bad_data_stops_with_one_line_and_exit_code_2(
    tmp_path, capsys, monkeypatch, name, content, words
):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    expect_one_line(capsys, monkeypatch, settings(tmp_path, tmp_path / name), *words)
    assert not (tmp_path / "out/consolidated.00.pth").exists()


def test_short_text_and_large_vocabularies_and_bad_settings_stop_with_one_line(
    tmp_path, capsys, monkeypatch
):
    short = write_jsonl(tmp_path / "short.jsonl", corpus(2))
    few = write_jsonl(tmp_path / "few.jsonl", corpus(30))
    expect_one_line(
        capsys,
        monkeypatch,
        settings(tmp_path, short, seq_len=4096),
        "short",
        "less than one sequence",
        "--seq-len",
    )
    expect_one_line(
        capsys,
        monkeypatch,
        settings(tmp_path, few, vocab_size=30000),
        "vocabulary of 30000",
        "at most",
    )
    expect_one_line(
        capsys, monkeypatch, settings(tmp_path, few, vocab_size=5), "vocabulary of 5", "at least"
    )
    expect_one_line(capsys, monkeypatch, settings(tmp_path, f"{few}:x"), "'x' is no weight")
    expect_one_line(capsys, monkeypatch, settings(tmp_path, few, size="8B"), "8B", "tiny")
    expect_one_line(capsys, monkeypatch, settings(tmp_path, few, batch_size=3), "--batch-size 3")
    expect_one_line(capsys, monkeypatch, settings(tmp_path, few, lr=0.0), "--lr")
    expect_one_line(
        capsys,
        monkeypatch,
        settings(tmp_path, few, tokenizer=str(few)),
        "not a SentencePiece model",
    )
    expect_one_line(
        capsys, monkeypatch, settings(tmp_path, few, probes=str(few)), "few.jsonl", '"answer"'
    )


def test_a_finished_run_is_kept_unless_told_otherwise(tmp_path, capsys, monkeypatch):
    config = settings(tmp_path, write_jsonl(tmp_path / "s.jsonl", corpus(100)))
    pretrain.main(config)
    weights = (tmp_path / "out/consolidated.00.pth").read_bytes()
    expect_one_line(capsys, monkeypatch, config, "finished run", "--overwrite")
    bad = replace(config, overwrite=True, data=(str(tmp_path / "gone.jsonl"),))
    expect_one_line(capsys, monkeypatch, bad, "gone.jsonl")
    assert (tmp_path / "out/consolidated.00.pth").read_bytes() == weights
    pretrain.main(replace(config, overwrite=True, seed=2))
    assert (tmp_path / "out/consolidated.00.pth").read_bytes() != weights


def test_a_folder_that_cannot_be_written_stops_with_one_line(tmp_path, capsys, monkeypatch):
    path = write_jsonl(tmp_path / "s.jsonl", corpus(100))
    expect_one_line(capsys, monkeypatch, settings(tmp_path, path, out=str(path / "x")), "s.jsonl")
    locked = tmp_path / "locked"
    locked.mkdir()
    if os.geteuid() == 0:  # root may write everywhere: stand in for one who may not

        def refuse(dir):
            raise PermissionError(13, "Permission denied", str(dir))

        monkeypatch.setattr(llama2.tempfile, "TemporaryFile", refuse)
    locked.chmod(0o555)
    expect_one_line(
        capsys,
        monkeypatch,
        settings(tmp_path, path, out=str(locked)),
        "locked",
        "Permission denied",
    )
    assert list(locked.iterdir()) == []


def test_fine_tuning_stops_with_one_line(tmp_path, base, capsys, monkeypatch):
    def expect(*words, **changes):
        config = replace(
            sft.Settings(init=str(base), out=str(tmp_path / "out"), **SFT_RUN), **changes
        )
        expect_one_line(capsys, monkeypatch, config, *words, script=sft)
        assert not (tmp_path / "out/consolidated.00.pth").exists()

    for name, text in (
        ("a.json", '{"messages": []}'),
        ("b.json", "[1,"),
        ("c.jsonl", '{"a'),
        ("d.jsonl", ""),
        ("e.jsonl.gz", "x"),
        ("f.txt", "x"),
    ):
        (tmp_path / name).write_text(text)
    expect("a.json", "expected one array", data=(str(tmp_path / "a.json"),))
    expect("b.json", "broken JSON", data=(str(tmp_path / "b.json"),))
    expect("c.jsonl:1", "broken JSON", data=(str(tmp_path / "c.jsonl"),))
    expect("d.jsonl", "no dialogue", data=(str(tmp_path / "d.jsonl"),))
    expect("e.jsonl.gz", "gzip", data=(str(tmp_path / "e.jsonl.gz"),))
    expect("f.txt", ".jsonl", data=(str(tmp_path / "f.txt"),))
    expect("gone.jsonl", "No such file", data=(str(tmp_path / "gone.jsonl"),))
    expect("nowhere", "no checkpoint here", init=str(tmp_path / "nowhere"))
    expect("--epochs", epochs=0.0)
    expect("--seq-len 8", seq_len=8)
