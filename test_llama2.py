"""The paper's formulas against slow and simple references, in the order of the pipeline.

    model · chat format · sampling · optimizer · pretraining · fine-tuning · reward models ·
    rejection sampling and PPO · Ghost Attention · safety distillation

Read a test beside the function that it calls. A test's name says what must hold. The files in
tests/ check the rest: data formats, saved runs, several processes, command lines.
"""

import cmath
import copy
import json
import math
import random
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import llama2
import train_pretrain
import train_rlhf
import train_rm
import train_sft
from common import run as runs, training
from conftest import (
    ARGS,
    EXACT,
    decode_documents,
    dialog,
    losses,
    make_model,
    make_reward_model,
    max_difference,
    model_folder,
    stage,
    weights,
    write_jsonl,
)
from data import corpus, distillation, files, ghost_attention, records
from data.formats import KINDS, RATINGS
from evaluate import reward_models
from llama2 import (
    SIZES,
    KVCache,
    ModelArgs,
    RewardModel,
    RMSNorm,
    Transformer,
    apply_rotary_emb,
    compute_freqs_cis,
    encode_dialog,
    generate,
    kv_cache_bytes,
    load,
    save,
    stream,
)
from tinytown import conversations, prompts, world

SMALL = dict(samples=2, temperatures=(1.0,), max_new_tokens=6, micro_batch=4, **EXACT)
PROMPTS = [[1, 5, 9], [1], [1, 7, 7, 20, 33, 80, 100], [1, 250]]


# ------------------------------------------------------------------------------------- model (§2.2)
@pytest.mark.parametrize(
    "size, count",
    [
        ("7B", 6_738_415_616),
        ("13B", 13_015_864_320),
        ("34B", 33_743_970_304),
        ("70B", 68_976_648_192),
    ],
)
def test_model_sizes_have_the_parameter_counts_of_the_paper(size, count):
    with torch.device("meta"):
        model = Transformer(ModelArgs(**SIZES[size]))
    assert sum(p.numel() for p in model.parameters()) == count


def test_rmsnorm_by_hand_and_computed_in_float32():
    norm = RMSNorm(2, eps=1e-5)
    norm.weight.data = torch.tensor([2.0, 3.0])
    by_hand = torch.tensor([2 * 3, 3 * 4]) / math.sqrt(12.5)
    assert torch.allclose(norm(torch.tensor([3.0, 4.0])), by_hand, atol=1e-5)
    small = torch.full((64,), 1e-4, dtype=torch.float16)  # in float16 its square is 0
    output = RMSNorm(64, eps=1e-12).half()(small)
    assert torch.allclose(output.float(), torch.ones(64), atol=1e-2)


def test_swiglu_by_hand():
    ffn = llama2.FeedForward(ARGS)
    x = torch.randn(ARGS.dim)
    up, gate = ([float(row @ x) for row in w.weight.detach()] for w in (ffn.w3, ffn.w1))
    hidden = torch.tensor([u * g / (1 + math.exp(-g)) for u, g in zip(up, gate)])
    assert torch.allclose(ffn(x), ffn.w2.weight @ hidden, atol=1e-5)


def test_rotary_embedding_multiplies_neighbouring_pairs_as_complex_numbers():
    x = torch.randn(1, 5, 1, 8)
    args = replace(ARGS, dim=8, n_heads=1, n_kv_heads=1)
    output = apply_rotary_emb(x, compute_freqs_cis(args, torch.arange(5)))
    for t in range(5):
        for i in range(4):
            pair = slice(2 * i, 2 * i + 2)
            rotation = cmath.exp(1j * t * 10000 ** (-2 * i / 8))
            rotated = complex(*x[0, t, 0, pair]) * rotation
            assert abs(complex(*output[0, t, 0, pair]) - rotated) < 1e-5


def test_rotary_scores_depend_only_on_the_distance():
    q, k = torch.randn(2, 1, 1, 1, 8)
    args = replace(ARGS, dim=8, n_heads=1, n_kv_heads=1)

    def score(i, j):
        rotated_q = apply_rotary_emb(q, compute_freqs_cis(args, torch.tensor([i])))
        rotated_k = apply_rotary_emb(k, compute_freqs_cis(args, torch.tensor([j])))
        return (rotated_q * rotated_k).sum()

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
            probs = scores.exp() / scores.exp().sum()
            heads[t, h] = sum(p * v[s, shared] for s, p in enumerate(probs))
    output = attention(x, freqs_cis, None, None, 0)[0]
    assert torch.allclose(output, attention.wo(heads.flatten(1)), atol=1e-5)


def test_logits_do_not_depend_on_later_tokens():
    model, tokens = make_model(), torch.randint(300, (1, 20))
    changed = tokens.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 300
    a, b = model(tokens), model(changed)
    assert torch.equal(a[:, :12], b[:, :12])
    assert not torch.allclose(a[:, 12:], b[:, 12:])


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("chunks", [[20], [1] * 20, [7, 1, 1, 9, 2], [19, 1]])
def test_logits_with_kv_cache_equal_those_of_a_full_forward_pass(n_kv_heads, chunks):
    model, tokens = make_model(n_kv_heads=n_kv_heads), torch.randint(300, (3, 20))
    cache = KVCache(model.args, 3, 20)
    cached = torch.cat([model(chunk, cache) for chunk in tokens.split(chunks, dim=1)], 1)
    assert (cached - model(tokens)).abs().max() < 1e-4
    assert cache.used == 20


def test_left_padding_does_not_change_logits():
    model, tokens = make_model(), torch.randint(300, (1, 9))
    padded = torch.cat([torch.randint(300, (1, 4)), tokens], 1)
    cache = KVCache(model.args, 1, 13, pad=torch.tensor([4]))
    cached = torch.cat([model(chunk, cache) for chunk in padded.split([6, 7], 1)], 1)
    assert (cached[:, 4:] - model(tokens)).abs().max() < 1e-4


def test_cache_positions_and_mask_with_left_padding_by_hand():
    """Logits alone cannot show a wrong start: rotary scores depend on distances only."""
    cache = KVCache(ARGS, 2, 5, pad=torch.tensor([2, 0]))
    cache.used = 2
    positions, mask = cache.positions_and_mask(2)
    assert positions.tolist() == [[0, 1], [2, 3]]
    assert mask[0, 0].int().tolist() == [[0, 0, 1, 0], [0, 0, 1, 1]]
    assert mask[1, 0].int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_gqa_saves_kv_cache_memory_by_the_ratio_of_heads():
    cache = KVCache(ARGS, batch=3, length=10)
    assert kv_cache_bytes(ARGS, 3, 10, bytes_per_value=4) == (cache.k.numel() + cache.v.numel()) * 4
    gqa = ModelArgs(**SIZES["70B"])
    assert kv_cache_bytes(replace(gqa, n_kv_heads=64), 1, 4096) == 8 * kv_cache_bytes(gqa, 1, 4096)


def test_too_many_tokens_for_cache_or_context_are_an_error():
    model = make_model()
    with pytest.raises(ValueError, match="5 slots, and 6"):
        model(torch.zeros(1, 6, dtype=torch.long), KVCache(model.args, 1, 5))
    with pytest.raises(ValueError, match="65 .*64"):
        model(torch.zeros(1, 65, dtype=torch.long))


def test_a_loaded_model_draws_no_weights_and_a_new_reward_model_a_small_head(
    base, rm_folder, monkeypatch
):
    """The first scores are close to 0."""
    model = RewardModel(ARGS)
    assert not hasattr(model, "output")
    assert 0 < model(torch.randint(300, (4, 20))).abs().max() < 0.5
    monkeypatch.setattr(torch.nn.init, "normal_", None)
    state = torch.get_rng_state()
    for folder in (base, rm_folder / "safety"):
        load(folder)
        assert torch.equal(torch.get_rng_state(), state)


def test_bfloat16_rounds_matrix_products_but_not_weights_and_gradients():
    model, tokens = make_model(n_kv_heads=2), torch.randint(64, (2, 20))
    exact, dtypes = model(tokens), {}
    for name in ("layers.0.attention.wq", "layers.0.attention_norm", "norm"):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _, x, y, name=name: dtypes.update({name: y.dtype}))
    model.matmul_dtype = "bfloat16"
    rounded = model(tokens)
    assert dtypes.pop("layers.0.attention.wq") == torch.bfloat16
    assert dtypes == {"layers.0.attention_norm": torch.float32, "norm": torch.float32}
    assert rounded.dtype == torch.bfloat16
    error = (rounded.float() - exact).abs().max() / exact.abs().max()
    assert 1e-5 < error < 0.05
    train_pretrain.next_token_loss(rounded, tokens).backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_decoding_with_kv_cache_follows_the_full_forward_pass(weights_dtype):
    """Rounding may change the order of two nearly equal logits, so compare logits, not tokens."""
    model, two_prompts = make_model(), [[1, 5, 6], [1, 7, 8, 9, 10]]
    model.matmul_dtype = "bfloat16"
    model.to(weights_dtype)
    answers = generate(model, two_prompts, 20, temperature=0)
    for prompt, answer in zip(two_prompts, answers):
        assert len(answer) == 20
        logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, torch.tensor(answer)[:, None]).squeeze(1)
        assert (logits.amax(1) - chosen).max() < 0.05 * logits.abs().max()


def test_on_a_cpu_decoding_is_exact_also_with_bfloat16():
    """Products of a few tokens would gain nothing from it: the same answers, the same logits."""
    model, tokens = make_model(), torch.tensor([PROMPTS[2]])
    exact = generate(model, PROMPTS, 20, temperature=1.0, seed=3)
    logits = model(tokens, KVCache(ARGS, 1, 20))
    model.matmul_dtype = "bfloat16"
    assert generate(model, PROMPTS, 20, temperature=1.0, seed=3) == exact
    assert torch.equal(model(tokens, KVCache(ARGS, 1, 20)), logits)
    assert model(tokens).dtype == torch.bfloat16


# -------------------------------------------------------------------------------------- chat format
def pieces(tok, ids):
    return "".join(tok.sp.id_to_piece(i) for i in ids).replace("<0x0A>", "\n")


def test_chat_format_and_answer_mask_token_by_token(char_tok):
    tokens, mask = encode_dialog(char_tok, dialog(" hi ", "yo", "no", system="be"))
    first = "<s>▁[INST]▁<<SYS>>\nbe\n<</SYS>>\n\nhi▁[/INST]"
    assert pieces(char_tok, tokens) == first + "▁yo▁</s><s>▁[INST]▁no▁[/INST]"
    answer = [char_tok.sp.id_to_piece(t) for t, m in zip(tokens, mask) if m]
    assert answer == ["▁", "y", "o", "▁", "</s>"]
    prompt_length = len(first) - len("<s>") + 1  # one token per character, and one for <s>
    assert mask == [0] * prompt_length + [1] * 5 + [0] * 19
    by_hand = [char_tok.sp.piece_to_id(piece) for piece in "▁[INST]▁ok▁[/INST]▁hi▁"]
    tokens, mask = encode_dialog(char_tok, dialog("ok", "hi"))
    assert tokens == [char_tok.bos_id, *by_hand, char_tok.eos_id]
    assert mask == [0] * 19 + [1] * 5


def test_encoded_prompt_is_a_prefix_of_the_encoded_dialog(tok):
    rng = random.Random(0)
    alphabet = "ab z.?!\n\t 🙂é日<>[]/0123456789"
    for _ in range(300):
        user, answer = ("".join(rng.choices(alphabet, k=rng.randint(0, 12))) for _ in range(2))
        prompt, _ = encode_dialog(tok, dialog(user))
        whole, mask = encode_dialog(tok, dialog(user, answer))
        assert whole[: len(prompt)] == prompt
        assert mask == [0] * len(prompt) + [1] * (len(whole) - len(prompt))
        assert tok.decode(whole[len(prompt) :]).strip() == answer.strip()


@pytest.mark.parametrize(
    "messages, error",
    [
        ([], "needs a user"),
        (dialog("a", "b", "c")[1:], "message 1 has role 'assistant', expected 'user'"),
        (dialog("a") * 2, "message 2 has role 'user', expected 'assistant'"),
        (dialog("a", system="s") + dialog("b"), "message 3 has role 'user'"),
        (dialog("a", "b") + dialog(system="s"), "message 3 has role 'system'"),
        (dialog("x [/INST] y"), r"message 1 contains \[/INST\]"),
        (dialog("a", "[INST]"), r"message 2 contains \[INST\]"),
        (dialog("a", system="<</SYS>>"), "message 1 contains <</SYS>>"),
    ],
)
def test_wrong_roles_and_forged_tags_are_refused(tok, messages, error):
    with pytest.raises(ValueError, match=error):
        encode_dialog(tok, messages)


@pytest.mark.parametrize(
    "text", ["a [INST] b", "[IN[/INST]ST]", "[/IN[INST]ST] a", " <<S<</SYS>>YS>>"]
)
def test_sampled_text_without_tags_can_be_encoded_again(tok, text):
    plain = llama2.without_tags(text)
    assert not any(tag in plain for tag in llama2.TAGS)
    assert plain == plain.strip()
    encode_dialog(tok, dialog("q", plain))


# ----------------------------------------------------------------------------------------- sampling
def test_top_p_keeps_the_smallest_set_with_enough_probability():
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        probs = torch.softmax(torch.randn(1, 30, generator=generator) * 2, -1)
        kept, total = set(), 0.0
        for p, i in sorted(((float(p), i) for i, p in enumerate(probs[0])), reverse=True):
            if total >= 0.7:
                break
            kept.add(i)
            total += p
        assert set(llama2.top_p_filter(probs, 0.7)[0].nonzero().flatten().tolist()) == kept


def test_samples_follow_the_softmax_with_temperature():
    logits = torch.tensor([0.0, 1.0, 2.0])
    draws = llama2.sample(logits.expand(20000, 3), 2.0, 1.0, torch.rand(20000))
    expected = torch.tensor([math.exp(x / 2) for x in (0, 1, 2)])
    expected /= expected.sum()
    assert (torch.bincount(draws, minlength=3) / 20000 - expected).abs().max() < 0.02
    assert llama2.sample(logits[None], 0, 1.0, None).tolist() == [2]


def greedy(model, prompt, count):
    """Greedy decoding without a cache: a full forward pass for each token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_decoding_equals_a_loop_without_cache_alone_and_in_a_batch():
    model = make_model()
    expected = [greedy(model, prompt, 12) for prompt in PROMPTS]
    assert generate(model, PROMPTS, 12, temperature=0) == expected
    assert [generate(model, [prompt], 12, temperature=0)[0] for prompt in PROMPTS] == expected


def test_answers_stop_at_eos_and_the_rest_of_the_batch_is_unchanged():
    model = make_model()
    alone = [greedy(model, prompt, 30) for prompt in PROMPTS]
    eos = alone[0][2]
    expected = [a[: a.index(eos) + 1] if eos in a else a for a in alone]
    assert len({len(answer) for answer in expected}) > 1
    assert generate(model, PROMPTS, 30, temperature=0, eos_id=eos) == expected


def test_generation_ends_when_all_answers_have_ended():
    model, forwards = make_model(), []
    model.tok_embeddings.register_forward_hook(lambda *_: forwards.append(1))
    first = greedy(model, PROMPTS[0], 1)[0]
    forwards.clear()
    assert generate(model, [PROMPTS[0]] * 3, 50, temperature=0, eos_id=first) == [[first]] * 3
    assert len(forwards) == 1


def test_sampling_repeats_with_its_seed_and_does_not_use_the_global_generator():
    model, state = make_model(), torch.get_rng_state()
    a, b, c = (generate(model, PROMPTS, 10, temperature=1.0, top_p=0.9, seed=s) for s in (1, 1, 2))
    assert a == b != c
    assert torch.equal(state, torch.get_rng_state())


def test_a_sample_does_not_depend_on_the_batch_size(monkeypatch):
    model = make_model()
    whole = generate(model, PROMPTS * 3, 12, seed=4)
    monkeypatch.setattr(llama2, "max_batch_size", lambda *_: 5)
    assert generate(model, PROMPTS * 3, 12, seed=4) == whole
    assert whole[:4] != whole[4:8]  # the same prompt at another index gets other random numbers


def test_answers_end_where_the_context_is_full():
    model = make_model()
    answers = generate(model, [[1] * 60, [1, 2], [1] * 64], 30, temperature=0)
    assert [len(answer) for answer in answers] == [4, 30, 0]
    assert answers[0] == greedy(model, [1] * 60, 4)


def test_bad_prompts_settings_and_weights_are_errors():
    model = make_model()
    with pytest.raises(ValueError, match="prompt 1 has 65 tokens, the context only 64"):
        generate(model, [[1], [1] * 65], 5)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        generate(model, [[]], 5)
    nan = float("nan")
    for name, value, error in (
        ("top_p", 0, "top_p=0"),
        ("top_p", 2, "top_p=2"),
        ("top_p", nan, "top_p=nan"),
        ("temperature", 1e-40, "temperature=1e-40"),
        ("temperature", -1, "temperature=-1"),
        ("temperature", nan, "temperature=nan"),
        ("max_new_tokens", -1, "tokens=-1"),
    ):
        with pytest.raises(ValueError, match=error):
            generate(model, [[1]], **{"max_new_tokens": 5, name: value})
    model.norm.weight.data.fill_(nan)
    for temperature in (0, 1):
        with pytest.raises(ValueError, match="logits are NaN or infinite: its weights are damaged"):
            generate(model, [[1]], 5, temperature)


def test_larger_models_and_longer_texts_have_smaller_batches():
    with torch.device("meta"):
        tiny, large = (Transformer(ModelArgs(**SIZES[size])) for size in ("tiny", "7B"))
    assert llama2.max_batch_size(tiny, [[1] * 100], 90) == 256
    sizes = [llama2.max_batch_size(large, [[1] * n]) for n in (10, 100, 1000, 100_000)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[1] > sizes[3] == 1


def test_streamed_text_equals_generated_text(tok):
    model = make_model(vocab_size=tok.vocab_size)
    prompt = tok.encode("Once upon", bos=True)
    answer = generate(model, [prompt], 20, temperature=1.0, seed=3, eos_id=tok.eos_id)[0]
    texts = list(stream(model, tok, prompt, 20, temperature=1.0, seed=3))
    assert len(texts) > 5
    assert "Once upon" + "".join(texts) == tok.decode(prompt + answer)


# ---------------------------------------------------------------------------------------- optimizer
def test_learning_rate_warms_up_and_decays_to_a_tenth_by_hand(capsys):
    rates = [training.lr_at(step, 12, 2, 1.0) for step in range(12)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[-1] == pytest.approx(0.1)
    assert rates[5] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 3 / 9)) / 2)
    training.warn_without_peak(3, 4)
    assert capsys.readouterr().out == ""
    training.warn_without_peak(9, 4)
    assert "never reaches its peak: 9 steps of warm-up, 4 in total" in capsys.readouterr().out


def test_adamw_has_the_settings_of_the_paper_and_decays_matrices_only():
    optimizer = training.adamw(make_model(), 1e-3)
    assert [{p.dim() for p in group["params"]} for group in optimizer.param_groups] == [{2}, {1}]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0]
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.9, 0.95), 1e-5)


def test_gradient_norm_is_clipped_to_1_and_a_nan_makes_no_step():
    for scale in (0.1, 1e6):
        model = torch.nn.Linear(2, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        start = model.weight.detach().clone()
        (scale * model(torch.tensor([3.0, 4.0]))).backward()
        norm = training.clip_and_step(model, optimizer)
        assert norm.item() == pytest.approx(5 * scale, rel=1e-4)  # before clipping
        step_length = (model.weight - start).norm().item()
        assert step_length == pytest.approx(min(1.0, 5 * scale), rel=1e-4)
        assert model.weight.grad is None
    start = model.weight.detach().clone()
    (float("nan") * model(torch.ones(2))).backward()
    with pytest.raises(RuntimeError, match="non-finite, so it cannot be clipped"):
        training.clip_and_step(model, optimizer)
    assert torch.equal(model.weight, start)


def test_a_process_without_an_example_has_loss_weight_0(monkeypatch):
    monkeypatch.setattr(training, "rank_and_world_size", lambda: (1, 2))
    assert training.micro_batches([1, 2, 3], 1) == [([2], 1.0), ([1], 0.0)]
    assert training.micro_batches([1, 2, 3], 2) == [([2], 1.0)]
    assert training.micro_batches([1], 4) == [([1], 0.0)]


# --------------------------------------------------------------------------------- pretraining (§2)
def test_next_token_loss_by_hand():
    logits, targets = torch.randn(1, 3, 5), torch.tensor([[4, 0, -1]])
    p = logits[0].double().softmax(-1)
    by_hand = -math.log(p[0, 4]) - math.log(p[1, 0])  # -1: no token
    loss = train_pretrain.next_token_loss(logits, targets).item()
    assert loss == pytest.approx(by_hand, rel=1e-5)


class Range(list):
    """In place of Shards: token i is i."""

    def read(self, start, count):
        return np.array(self[start : start + count])


def mixture_of(*sources, seq_len=8):
    """A Mixture of sources (size, weight)."""
    tokens = [corpus.Tokens("", weight, Range(range(size)), None) for size, weight in sources]
    return train_pretrain.Mixture(tokens, seq_len, seed=0)


def test_an_epoch_reads_each_sequence_once_in_a_new_order():
    mixture, orders = mixture_of((8 * 25 + 1, 1.0)), []
    for epoch in range(2):
        places = sum((mixture.draw(step, 5) for step in range(epoch * 5, epoch * 5 + 5)), [])
        tokens = mixture.read(places, "cpu")
        # Token i is i here, so each target is its input plus 1.
        assert torch.equal(tokens[:, 1:], tokens[:, :-1] + 1)
        orders.append(tokens[:, 0].tolist())
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(0, 200, 8))
    assert orders[0] != orders[1]
    # No stride: the steps from one sequence to the next are of many sizes.
    assert all(len({b - a for a, b in zip(order, order[1:])}) > 10 for order in orders)


def test_sources_are_drawn_by_weight_times_size_also_after_resuming():
    mixture = mixture_of((9001, 1.0), (1001, 3.0))
    draws = [mixture.draw(step, 10) for step in range(400)]
    assert mixture.used[1] / 4000 == pytest.approx(3 / 12, abs=0.03)
    for steps in (7, 99):  # the small source of 125 sequences is then in its second epoch
        resumed, mixture = (mixture_of((9001, 1.0), (1001, 3.0)) for _ in range(2))
        for step in range(steps):
            mixture.draw(step, 10)
        resumed.used = list(mixture.used)
        assert [resumed.draw(step, 10) for step in range(steps, 400)] == draws[steps:]
    assert 125 < mixture.used[1] < 300


def test_held_out_loss_and_bits_per_byte_by_hand(inputs):
    sources, tok, _ = corpus.open_tokens(Path(inputs.tokens), 32)
    ids = sources[0].val.read(0, 10**9).tolist()
    model, nats, T = make_model(vocab_size=tok.vocab_size), 0.0, 32
    for start in range(0, len(ids) - 1, T):
        window = ids[start : start + T + 1]
        logprobs = F.log_softmax(model(torch.tensor([window[:-1]]))[0], -1).detach()
        nats -= sum(float(logprobs[t, token]) for t, token in enumerate(window[1:]))
    n_bytes = sum(len(text.encode()) for text in decode_documents(tok, ids))
    metrics = train_pretrain.evaluate(model, sources[0], tok, T, eval_tokens=10**9, micro_batch=16)
    assert metrics["val/stories"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    assert metrics["bits/stories"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


# -------------------------------------------------------------------- supervised fine-tuning (§3.1)
def encode_examples(tok, *dialogs, seq_len=256):
    return [train_sft.encode_example({"messages": messages}, tok, seq_len) for messages in dialogs]


def test_long_dialogs_are_cut_after_a_whole_answer(tok):
    turn = len(encode_dialog(tok, dialog("a b", "c d"))[0])
    (example,) = encode_examples(tok, dialog(*["a b", "c d"] * 3), seq_len=2 * turn + 1)
    tokens, mask = encode_dialog(tok, dialog(*["a b", "c d"] * 2))
    assert (example.tokens, example.mask, example.cut) == (tokens, mask, True)
    (long,) = encode_examples(tok, dialog(*["a b", "c d"] * 5000), seq_len=2 * turn)
    assert long == example  # and its time does not grow with the square of the number of turns
    (whole,) = encode_examples(tok, dialog("a b", "c d"), seq_len=turn)
    assert (len(whole.tokens), whole.cut) == (turn, False)
    with pytest.raises(files.SkipRecord, match="longer than --seq-len in its first turn"):
        encode_examples(tok, dialog("a " * 99, "b"), seq_len=64)


def test_loss_mask_follows_weight_0_and_covers_plain_texts(tok):
    messages = dialog("a", "b")
    messages[1]["weight"] = 0
    with pytest.raises(files.SkipRecord, match="no answer to train on"):
        encode_examples(tok, messages)
    example = train_sft.encode_example({"text": "a fox lived"}, tok, 64)
    assert example.tokens == tok.encode("a fox lived", bos=True, eos=True)
    assert example.mask == [0] + [1] * (len(example.tokens) - 1)


def test_packing_uses_each_example_once_with_little_padding(tok, town):
    examples = [train_sft.encode_example(record, tok, 256) for record in town["dialogues"]]
    sequences = train_sft.pack(examples, 256, seed=1)
    packed = [id(example) for sequence in sequences for example in sequence]
    assert sorted(packed) == sorted(map(id, examples))
    sizes = [sum(len(example.tokens) for example in sequence) for sequence in sequences]
    assert max(sizes) <= 256
    assert sum(sizes) > 0.95 * 256 * len(sizes)
    assert sequences != train_sft.pack(examples, 256, seed=2)


def test_without_packing_batches_have_examples_of_similar_length():
    examples = [train_sft.Example([1] * n, [1] * n) for n in range(2, 131)]
    batches = train_sft.batch_by_length(examples, 4, seed=3)
    sequences = sum(batches, [])
    assert all(len(sequence) == 1 for sequence in sequences)
    assert sorted(len(s[0].tokens) for s in sequences) == list(range(2, 131))
    ranges = [len(batch[-1][0].tokens) - len(batch[0][0].tokens) for batch in batches]
    assert sum(ranges) / len(ranges) < 12
    assert batches != train_sft.batch_by_length(examples, 4, seed=4)


@pytest.mark.parametrize("pack", [True, False])
def test_sft_batches_use_each_example_once_per_epoch(pack):
    examples = [train_sft.Example([1] * n, [1] * n) for n in range(2, 131)]
    config = train_sft.Settings(pack=pack, epochs=3, seq_len=140)
    sequences = sum(train_sft.make_batches(examples, config), [])
    assert sum(map(len, sequences)) == 3 * len(examples)


def test_sft_mask_selects_exactly_the_answers_and_their_eos(tok):
    """inputs and targets are shifted by one, and the mask belongs to the targets."""
    short, long = encode_examples(tok, dialog("one", "two"), dialog("a", "b c", "d", "e"))
    inputs, targets, mask = train_sft.to_tensors([[long, short], [short]], "cpu")
    assert torch.equal(inputs[0, 1:], targets[0, :-1])

    def answer_tokens(example):
        return [t for t, m in zip(example.tokens, example.mask) if m]

    assert targets[0][mask[0]].tolist() == answer_tokens(long) + answer_tokens(short)
    assert targets[1][mask[1]].tolist() == answer_tokens(short)
    assert answer_tokens(short)[-1] == tok.eos_id
    assert not mask[1, len(short.tokens) :].any()


def test_sft_loss_by_hand_and_without_gradient_on_prompts():
    logits = torch.randn(2, 5, 7, requires_grad=True)
    targets, mask = torch.randint(7, (2, 5)), torch.rand(2, 5) < 0.5
    logprobs = logits.double().log_softmax(-1)
    by_hand = 0.0
    for b in range(2):
        for t in range(5):
            if mask[b, t]:
                by_hand -= logprobs[b, t, targets[b, t]].item()
    loss = train_sft.sft_loss(logits[mask], targets, mask)
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)
    assert 0 < mask.sum() < 10
    loss.backward()
    assert (logits.grad[~mask] == 0).all()
    assert (logits.grad[mask] != 0).any(-1).all()


def test_fine_tuning_learns_answers_and_eos(tmp_path, inputs):
    _, config = stage("sft", inputs, tmp_path / "out", epochs=20, batch_size=1, lr=3e-3)
    config = replace(config, eval_every=100, save_every=1000)
    dialogues = [json.loads(line) for line in Path(inputs.dialogues).read_text().splitlines()]

    def eos_probability(folder):
        """The mean probability of EOS after the last answer."""
        (model, tok), values = load(folder), []
        for record in dialogues[:20]:
            tokens = torch.tensor([train_sft.encode_example(record, tok, 256).tokens])
            values.append(F.softmax(model(tokens)[0, -2], -1)[tok.eos_id].item())
        return sum(values) / len(values)

    metrics = train_sft.main(config)
    assert eos_probability(inputs.base) < 0.01
    assert eos_probability(config.out) > 0.3
    assert metrics["val_loss"] < 0.6 * losses(config.out)[1]


def test_mask_prompts_decides_whether_prompts_are_in_the_loss(tmp_path, inputs):
    configs = []
    for mask in (True, False):
        _, config = stage("sft", inputs, tmp_path / str(mask), mask_prompts=mask)
        train_sft.main(config)
        configs.append(config)
    assert max_difference(*(weights(config.out) for config in configs)) > 1e-4


# --------------------------------------------------------------------------- reward models (§3.2.2)
@pytest.mark.parametrize(
    "margin, by_rating",
    [("none", (0, 0, 0, 0)), ("small", (1, 2 / 3, 1 / 3, 0)), ("large", (3, 2, 1, 0))],
)
def test_ranking_loss_and_its_gradient_by_hand_for_each_margin(margin, by_rating):
    margins = [train_rm.MARGINS[margin].get(rating, 0) for rating in RATINGS]
    assert tuple(margins) == by_rating
    chosen, rejected = torch.tensor([1.0, -0.5, 2.0, 0.3], requires_grad=True), torch.randn(4)
    loss = train_rm.ranking_loss(chosen, rejected, torch.tensor(by_rating))
    gaps = [c - r - m for c, r, m in zip(chosen.tolist(), rejected.tolist(), by_rating)]
    assert loss.item() == pytest.approx(sum(math.log(1 + math.exp(-g)) for g in gaps), rel=1e-5)
    loss.backward()
    assert chosen.grad.tolist() == pytest.approx([-1 / (1 + math.exp(g)) for g in gaps], rel=1e-5)


def test_safety_loss_by_hand_and_without_gradient_where_the_label_is_unknown():
    scores = torch.tensor([0.7, -0.2, 3.0], requires_grad=True)
    loss = train_rm.safety_loss(scores, torch.tensor([1, -1, 0]))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.7)) + math.log(1 + math.exp(-0.2)))
    loss.backward()
    assert scores.grad[0] < 0 < scores.grad[1]
    assert scores.grad[2] == 0


PAIR = dict(prompt="a", chosen="b", rejected="c")
RATED_PAIR = PAIR | dict(rating="better", chosen_safe=True, rejected_safe=False)


def encode_pairs(tok, *pairs, context=256, margin="large"):
    margins = train_rm.MARGINS[margin]
    return [train_rm.encode_pair(records.to_pair(pair), tok, context, margins) for pair in pairs]


def test_encoded_pair_has_its_margin_and_safety_labels(tok):
    (example,) = encode_pairs(tok, RATED_PAIR, margin="small")
    assert (example.margin, example.chosen_label, example.rejected_label) == (2 / 3, 1, -1)
    (example,) = encode_pairs(tok, PAIR)
    assert (example.margin, example.chosen_label, example.rejected_label) == (0, 0, 0)
    assert example.chosen == encode_dialog(tok, dialog("a", "b"))[0]


def test_pair_loss_uses_the_scores_margins_and_labels_of_the_right_answers(tok):
    model = make_reward_model(tok)
    longer = dict(prompt="who?", chosen="the fox and the owl", rejected="no")
    examples = encode_pairs(tok, RATED_PAIR, longer)
    c = llama2.score_sequences(model, [example.chosen for example in examples])
    r = llama2.score_sequences(model, [example.rejected for example in examples])

    def log_sigmoid(x):
        return -math.log(1 + math.exp(-x))

    ranking = -log_sigmoid(c[0] - r[0] - 2) - log_sigmoid(c[1] - r[1])
    safety = -log_sigmoid(c[0]) - log_sigmoid(-r[0])
    for aux_weight in (0.0, 0.5):
        loss = train_rm.pair_loss(model, examples, aux_weight).item()
        assert loss == pytest.approx(ranking + aux_weight * safety, rel=1e-4)


def test_long_pairs_keep_their_end_and_are_dropped_without_a_difference(tok):
    pair = dict(prompt="word " * 60, chosen="yes", rejected="no")
    (whole,), (short,) = encode_pairs(tok, pair, context=1000), encode_pairs(tok, pair, context=20)
    assert (short.chosen, short.rejected) == (whole.chosen[-20:], whole.rejected[-20:])
    assert whole.chosen[-1] == whole.rejected[-1] == tok.eos_id
    pair = dict(prompt="a", chosen="yes" + " w" * 60, rejected="no" + " w" * 60)
    with pytest.raises(files.SkipRecord, match="context"):
        encode_pairs(tok, pair, context=20)


def test_each_reward_model_is_trained_on_its_share_of_both_kinds():
    examples = [SimpleNamespace(kind="helpfulness")] * 50 + [SimpleNamespace(kind="safety")] * 90
    for kind, counts in (("helpfulness", (50, 50)), ("safety", (10, 90))):
        mixed = [example.kind for example in train_rm.mix(examples, kind, seed=0)]
        assert (mixed.count("helpfulness"), mixed.count("safety")) == counts
    with pytest.raises(ValueError, match="no pair of the kind safety"):
        train_rm.mix(examples[:50], "safety", seed=0)


def test_pairs_are_used_once_per_epoch_and_sorted_by_length_in_a_batch():
    rng = random.Random(0)
    lengths = [rng.randint(1, 90) for _ in range(600)]
    examples = [SimpleNamespace(chosen=[0] * n, rejected=[0]) for n in lengths]
    batches = train_rm.make_batches(examples, 16, 2, seed=1)
    assert sorted(map(id, sum(batches, []))) == sorted(map(id, examples * 2))

    def padding(batches):
        total = 0
        for batch in batches:
            for start in range(0, len(batch), 4):
                lengths = [len(example.chosen) for example in batch[start : start + 4]]
                total += len(lengths) * max(lengths) - sum(lengths)
        return total

    shuffled = [rng.sample(batch, len(batch)) for batch in batches]
    assert padding(batches) < 0.6 * padding(shuffled)


def test_a_score_is_read_at_the_last_token_and_does_not_depend_on_the_batch(tok):
    model = make_reward_model(tok)
    longer = dialog("who is it?", "the fox and the owl", "and", "no")
    dialogs = [dialog("a", "b"), longer, dialog("x y", "z")]
    alone = [llama2.score_dialogs(model, tok, [messages])[0] for messages in dialogs]
    assert llama2.score_dialogs(model, tok, dialogs) == pytest.approx(alone, abs=1e-5)
    assert llama2.score_dialogs(model, tok, dialogs[::-1]) == pytest.approx(alone[::-1], abs=1e-5)
    tokens = encode_dialog(tok, dialogs[0])[0]
    assert model(torch.tensor([tokens]))[0, -1].item() == pytest.approx(alone[0], abs=1e-5)
    too_long = dialog("w " * 400 + "end", "b")
    tokens = encode_dialog(tok, too_long)[0][-256:]
    by_hand = model(torch.tensor([tokens]))[0, -1].item()
    assert llama2.score_dialogs(model, tok, [too_long])[0] == pytest.approx(by_hand, abs=1e-5)


def test_scores_are_exact_numbers_also_with_bfloat16(tok):
    """Rewards differ by less than the steps of bfloat16, so the last product is in float32."""
    model, sequences = make_reward_model(tok), [[1, 5, i, 2] for i in range(3, 40)]
    model.matmul_dtype = "bfloat16"
    scores = torch.tensor(llama2.score_sequences(model, sequences))
    assert model(torch.tensor(sequences)).dtype == torch.float32
    assert (scores != scores.bfloat16().float()).float().mean() > 0.9
    tokens = torch.tensor(sequences)
    with model.precision():
        x = model.hidden(tokens)[:, -1].float()
    assert torch.allclose(scores, x @ model.score.weight[0], atol=1e-5)


def test_no_sequences_have_no_scores(tok):
    """A process may have no held-out pair at all."""
    assert llama2.score_sequences(make_reward_model(tok), []) == []


def test_reward_model_starts_from_the_weights_of_the_chat_model(tmp_path, base):
    """All weights but those of the head; a later version starts from the whole reward model."""
    chat, tok = load(base)
    model, _ = train_rm.make_reward_model(str(base), "cpu", "float32", seed=0)
    tokens = torch.randint(300, (2, 9))
    assert torch.equal(model.hidden(tokens), chat.hidden(tokens))
    save(tmp_path / "rm", model, tok)
    loaded, _ = load(tmp_path / "rm")
    assert type(loaded) is RewardModel
    assert torch.equal(loaded(tokens), model(tokens))
    assert "score.weight" in loaded.state_dict()
    assert "output.weight" not in loaded.state_dict()
    with pytest.raises(ValueError, match="holds a reward model, expected a language model"):
        load(tmp_path / "rm", expected=Transformer)
    later, _ = train_rm.make_reward_model(str(tmp_path / "rm"), "cpu", "float32", seed=5)
    assert torch.equal(later(tokens), model(tokens))


def test_reward_model_learns_to_rank_answers_and_to_find_unsafe_ones(tmp_path, inputs):
    _, config = stage("rm", inputs, tmp_path / "rm", epochs=20, lr=3e-3, val_fraction=0.0)
    train_rm.main(config)
    folders = (str(model_folder(config)),)
    results = reward_models.main(reward_models.Settings(folders=folders, data=(inputs.pairs,)))
    assert results["safety pairs, safety"]["significantly"] > 0.9
    assert results["separation, safety"]["auc"] > 0.95


# ----------------------------------------------------------------- rejection sampling, PPO (§3.2.3)
def test_combined_reward_is_safety_for_safety_prompts_and_unsafe_answers():
    s = math.log(0.15 / 0.85)
    helpfulness = torch.tensor([1.0, 2.0, 3.0, 500.0, -500.0])
    safety = torch.tensor([-1.0, s - 0.01, s + 0.01, -300.0, 300.0])
    is_safety = torch.tensor([True, False, False, False, False])
    rewards, gated = train_rlhf.combined_reward(helpfulness, safety, is_safety)
    assert rewards.tolist() == pytest.approx([-1.0, s - 0.01, 3.0, -300.0, -500.0], abs=1e-6)
    assert gated.tolist() == [True, True, False, True, False]


def test_whitening_gives_mean_0_and_variance_1_inside_the_mask():
    x, mask = torch.randn(5, 7) * 3 + 4, torch.rand(5, 7) < 0.6
    white = train_rlhf.whiten(x, mask)
    inside = x[mask].tolist()
    mean = sum(inside) / len(inside)
    std = math.sqrt(sum((v - mean) ** 2 for v in inside) / len(inside))
    by_hand = torch.tensor([(v - mean) / std for v in inside])
    assert torch.allclose(white[mask], by_hand, atol=1e-5)
    assert (white[~mask] == 0).all()
    other = torch.where(mask, x, torch.full_like(x, 1e6))
    assert torch.allclose(train_rlhf.whiten(other, mask), white, atol=1e-4)
    assert train_rlhf.whiten(torch.ones(4)).tolist() == [0, 0, 0, 0]  # variance 0 gives no NaN


def test_token_rewards_and_gae_by_hand():
    """The second answer has one token: its reward is in column 0, and padding stays 0."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    values = torch.tensor([[0.5, 1.0, -0.5], [2.0, 9.0, 9.0]])
    scores, kl = torch.tensor([3.0, -1.0]), torch.tensor([[0.1, -0.2, 0.3], [0.4, 9.0, 9.0]])
    rewards = train_rlhf.token_rewards(scores, kl, mask, beta=0.5)
    assert torch.allclose(rewards, torch.tensor([[-0.05, 0.1, 2.85], [-1.2, 0.0, 0.0]]))
    advantages = train_rlhf.gae(rewards, values, mask, 0.9, 0.8)
    d = [-0.05 + 0.9 * 1.0 - 0.5, 0.1 + 0.9 * -0.5 - 1.0, 2.85 + 0.5]  # TD errors
    by_hand = [d[0] + 0.72 * d[1] + 0.72**2 * d[2], d[1] + 0.72 * d[2], d[2]]
    assert advantages[0].tolist() == pytest.approx(by_hand)
    assert advantages[1].tolist() == pytest.approx([-1.2 - 2.0, 0, 0])


def test_gae_is_the_weighted_mean_of_all_n_step_advantages():
    n, gamma, lam = 9, 0.9, 0.8
    rewards, values = torch.randn(1, n), torch.randn(1, n)
    mask = torch.ones(1, n, dtype=torch.bool)
    advantages = train_rlhf.gae(rewards, values, mask, gamma, lam)
    for t in range(n):
        n_step = []
        for k in range(1, n - t + 1):
            discounted = sum(gamma**i * rewards[0, t + i].item() for i in range(k))
            bootstrap = gamma**k * values[0, t + k].item() if t + k < n else 0
            n_step.append(discounted + bootstrap - values[0, t].item())
        by_hand = lam ** (len(n_step) - 1) * n_step[-1]
        for k, advantage in enumerate(n_step[:-1]):
            by_hand += (1 - lam) * lam**k * advantage
        assert advantages[0, t].item() == pytest.approx(by_hand, abs=1e-4)


def test_clipped_policy_loss_and_its_gradient_by_hand():
    ratios, advantages = [0.5, 0.5, 1.5, 1.5, 1.1], [1.0, -1.0, 1.0, -1.0, 2.0]
    logprobs = torch.tensor([[*map(math.log, ratios), 5.0]], requires_grad=True)
    mask = torch.tensor([[True] * 5 + [False]])
    advantages = torch.tensor([[*advantages, 7.0]])
    loss, ratio = train_rlhf.policy_loss(logprobs, torch.zeros(1, 6), advantages, mask, 0.2)
    # min(ratio A, clip A): 0.5, -0.8, 1.2, -1.5, 2.2
    assert loss.item() == pytest.approx(-(0.5 - 0.8 + 1.2 - 1.5 + 2.2))
    assert ratio[0, 5] == 1
    loss.backward()  # d/dlogprob = -ratio A where the objective is not clipped, else 0
    assert logprobs.grad[0].tolist() == pytest.approx([-0.5, 0, 0, 1.5, -2.2, 0])


def test_clipped_value_loss_by_hand():
    values, mask = torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]])
    old_values, returns = torch.tensor([[0.9, 0.0, 0.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    # Clipped values: 1.0 and 0.2. The larger errors: (1 - 2)^2 and (3 - 1)^2.
    loss = train_rlhf.value_loss(values, old_values, returns, mask, 0.2)
    assert loss.item() == pytest.approx(2.5)
    # Far from the old values, the clipped values 0.2 and -0.2 count, on both sides.
    values, returns = torch.tensor([[3.0, -3.0]]), torch.tensor([[2.9, -2.9]])
    loss = train_rlhf.value_loss(values, torch.zeros(1, 2), returns, torch.ones(1, 2).bool(), 0.2)
    assert loss.item() == pytest.approx(2.7**2)


def make_answer(tokens, start, is_safety=False):
    """An Answer of token ids; the prompt ends at `start`."""
    prompt = records.Prompt(str(tokens[:start]), is_safety, tokens[:start])
    return records.Answer(prompt, tokens[start:], True)


@torch.no_grad()
def test_logprobs_and_values_are_at_the_positions_of_the_drawing():
    """Column 0 is the answer's first token, predicted at the last position of the prompt."""
    model, sequences, starts = make_model(), [[1, 5, 6, 7, 8, 2], [1, 9, 2]], [3, 2]
    answers = [make_answer(sequence, start) for sequence, start in zip(sequences, starts)]
    rollout = train_rlhf.make_rollout(answers, "cpu")
    assert rollout.response_mask.tolist() == [[True, True, True], [True, False, False]]
    logprobs = train_rlhf.answer_logprobs(model, rollout, temperature=0.7)
    value_model = RewardModel(ARGS)
    values = train_rlhf.answer_values(value_model, rollout)
    for n, (sequence, start) in enumerate(zip(sequences, starts)):
        for column, t in enumerate(range(start, len(sequence))):
            before = torch.tensor([sequence[:t]])
            p = (model(before)[0, -1].double() / 0.7).softmax(-1)[sequence[t]]
            value = value_model(before)[0, -1].item()
            assert logprobs[n, column].item() == pytest.approx(math.log(p), abs=1e-4)
            assert values[n, column].item() == pytest.approx(value, abs=1e-5)


def make_prompts(tok, count):
    """Prompts of several topics, some of them about safety."""
    rng, residents, wanted = random.Random(0), world.town(1), []
    for i in range(count):
        topic = ("fact", "sum", "unsafe", "borderline")[i % 4]
        wanted.append(prompts.make_prompt(rng, residents, "annotators", topic))
    return [records.to_prompt(record, tok, 64) for record in wanted]


@pytest.fixture
def ppo_setup(tmp_path, tok, rm_folder):
    """A function: (settings, Learner, reward models, prompts, Run) for PPO on random models."""

    def make(**changes):
        settings = SMALL | dict(method="ppo", batch_size=12, mini_batch=12) | changes
        config = train_rlhf.Settings(**settings)
        policy = make_model(vocab_size=tok.vocab_size)
        models = train_rlhf.load_reward_models(rm_folder, policy, tok, "policy")
        run = runs.Run(tmp_path / "run", config)
        learner, _ = train_rlhf.begin_ppo(policy, models, config, run)
        return config, learner, models, make_prompts(tok, 12), run

    return make


def sgd_update(learner, rollout, config, run):
    """(sums, weights of policy and value model) after one update with plain SGD."""
    models = copy.deepcopy((learner.policy, learner.value_model))
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in models]
    copied = train_rlhf.Learner(models[0], learner.reference, models[1], *optimizers)
    sums = train_rlhf.update(copied, rollout, 0, config, run)
    return sums, [model.state_dict() for model in models]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_before_the_first_step_the_ratio_is_1_and_the_kl_is_0(tok, ppo_setup, dtype):
    config, learner, models, batch, run = ppo_setup()
    for model in (learner.policy, learner.reference, learner.value_model, *models.values()):
        model.matmul_dtype = dtype
    rollout, scores = train_rlhf.collect_rollout(learner, tok, models, batch, 3, config)
    sums, _ = sgd_update(learner, rollout, config, run)
    stats = train_rlhf.statistics(rollout, scores, sums)
    assert abs(stats["kl"]) < 1e-4
    assert abs(stats["kl_k3"]) < 1e-6
    assert stats["first_ratio"] == pytest.approx(1, abs=1e-5)
    assert stats["clip_fraction"] == 0


def test_values_are_0_before_the_first_update_and_explain_nothing(tok, ppo_setup):
    """The value model has the layers of the helpfulness model, which keeps its own head."""
    # All answers are cut off here, and the penalty for that would shift all returns.
    config, learner, models, batch, run = ppo_setup(missing_eos_penalty=0.0)
    assert models["helpfulness"].score.weight.abs().max() > 0
    tokens = torch.tensor(PROMPTS[2:3])
    hidden = learner.value_model.hidden(tokens)
    assert torch.equal(hidden, models["helpfulness"].hidden(tokens))
    rollout, scores = train_rlhf.collect_rollout(learner, tok, models, batch, 3, config)
    assert (rollout.values == 0).all()
    sums = train_rlhf.update(learner, rollout, 0, config, run)
    stats = train_rlhf.statistics(rollout, scores, sums)
    assert abs(stats["explained_variance"]) < 1e-3
    rollout, _ = train_rlhf.collect_rollout(learner, tok, models, batch, 3, config)
    assert rollout.values.abs().max() > 0


def test_micro_batches_and_padding_do_not_change_the_ppo_update(tok, ppo_setup):
    config, learner, models, batch, run = ppo_setup(micro_batch=12, max_new_tokens=20)
    learner.policy.output.weight.data[tok.eos_id] *= 3  # so that some answers end early
    rollout, _ = train_rlhf.collect_rollout(learner, tok, models, batch, 3, config)
    assert not rollout.response_mask.all()
    _, whole = sgd_update(learner, rollout, config, run)
    for size in (5, 1):
        _, split = sgd_update(learner, rollout, replace(config, micro_batch=size), run)
        assert all(max_difference(a, b) < 1e-5 for a, b in zip(whole, split))
    padded = copy.copy(rollout)
    for name in ("old_logprobs", "advantages", "values", "returns"):
        value = getattr(rollout, name)
        large = torch.where(rollout.response_mask, value, torch.full_like(value, 1e3))
        setattr(padded, name, large)
    _, same = sgd_update(learner, padded, config, run)
    assert all(max_difference(a, b) == 0 for a, b in zip(whole, same))


def test_reported_kl_by_hand_from_policy_and_reference(tok, ppo_setup):
    """kl: the mean over answers of the summed log-ratio; kl_k1 and kl_k3: means over tokens."""
    config, learner, models, batch, run = ppo_setup()
    noise = torch.randn_like(learner.reference.output.weight)
    learner.reference.output.weight.data += 0.1 * noise
    rollout, scores = train_rlhf.collect_rollout(learner, tok, models, batch, 3, config)
    sums, _ = sgd_update(learner, rollout, config, run)
    stats, k1, k3, n_tokens = train_rlhf.statistics(rollout, scores, sums), 0.0, 0.0, 0
    for sequence, start in zip(rollout.sequences, rollout.starts):
        tokens = torch.tensor([sequence])
        p, q = (m(tokens)[0].log_softmax(-1) for m in (learner.policy, learner.reference))
        for t in range(start, len(sequence)):
            d = (p[t - 1, sequence[t]] - q[t - 1, sequence[t]]).item()
            k1, k3, n_tokens = k1 + d, k3 + math.exp(-d) - 1 + d, n_tokens + 1
    assert stats["kl"] == pytest.approx(k1 / 12, abs=1e-4)
    assert stats["kl_k1"] == pytest.approx(k1 / n_tokens, abs=1e-5)
    assert stats["kl_k3"] == pytest.approx(k3 / n_tokens, abs=1e-5)
    assert stats["kl_k3"] > 0


def test_ppo_learns_a_bandit(tok, ppo_setup, monkeypatch):
    """The reward is how often one token occurs in an answer."""
    rewarded = 77

    def score(models, answers):
        count = torch.tensor([float(answer.tokens.count(rewarded)) for answer in answers])
        return train_rlhf.Scores(count, count, count, count < 0, count > -1, count < 0)

    evaluations = iter(range(999))  # each better than the last: no early stopping
    monkeypatch.setattr(train_rlhf, "score_answers", score)
    monkeypatch.setattr(train_rlhf, "evaluate", lambda *_: next(evaluations))
    config, learner, models, batch, run = ppo_setup(iterations=60, max_new_tokens=4, micro_batch=48)
    config = replace(config, batch_size=48, mini_batch=16, lr=3e-3, value_lr=3e-3, beta=0.01)
    policy = learner.policy
    torch.nn.init.normal_(policy.output.weight, std=0.02)

    def frequency():
        answers = train_rlhf.generate_answers(policy, tok, batch * 20, 4, 1.0, 5)
        return sum(answer.tokens.count(rewarded) for answer in answers) / (4 * len(answers))

    before = frequency()
    train_rlhf.ppo(policy, tok, models, batch * 4, batch, config, run)
    assert before < 0.02
    assert frequency() > 0.8


def test_ppo_stops_early_and_keeps_the_best_policy(tok, ppo_setup, monkeypatch):
    """The second evaluation is the best; after two that are worse, patience is over."""
    rewards, states = iter([1.0, 3.0, 2.0, 2.5, 9.0]), []

    def evaluate(policy, *_):
        states.append(copy.deepcopy(policy.state_dict()))
        return next(rewards)

    monkeypatch.setattr(train_rlhf, "evaluate", evaluate)
    config, learner, models, batch, run = ppo_setup(iterations=9, patience=2, lr=1e-3, eval_every=1)
    policy = learner.policy
    metrics = train_rlhf.ppo(policy, tok, models, batch, batch, config, run)
    assert metrics == {"val_reward": 3.0}
    assert len(states) == 4
    assert max_difference(policy.state_dict(), states[1]) == 0
    assert max_difference(states[1], states[0]) > 0
    assert max_difference(states[1], states[3]) > 0


def test_rejection_sampling_keeps_the_best_safe_finished_answer_by_slow_loops(tok, rm_folder):
    policy = make_model(vocab_size=tok.vocab_size)
    policy.output.weight.data[tok.eos_id] *= 3
    models = train_rlhf.load_reward_models(rm_folder, policy, tok, "policy")
    batch = make_prompts(tok, 10)
    config = train_rlhf.Settings(**SMALL | dict(samples=8, max_new_tokens=20))
    run = SimpleNamespace(rank=0, world_size=1)
    best_answers, stats = train_rlhf.sample_best(policy, tok, models, batch, config, run)
    tokens = [prompt.tokens for prompt in batch for _ in range(8)]
    seed = training.derive_seed(1, "best of K", 0)
    answers = generate(policy, tokens, 20, 1.0, seed=seed, eos_id=tok.eos_id)
    sequences = [prompt + answer for prompt, answer in zip(tokens, answers)]
    helpfulness, safety = (llama2.score_sequences(models[kind], sequences) for kind in KINDS)
    expected, highest, medians = [], [], []
    for n, prompt in enumerate(batch):
        rewards = {}
        for i in range(8 * n, 8 * n + 8):
            gated = prompt.is_safety or 1 / (1 + math.exp(-safety[i])) < 0.15
            rewards[i] = safety[i] if gated else helpfulness[i]
        highest.append(max(rewards.values()))
        medians.append(statistics.median(rewards.values()))
        usable = [
            i
            for i in rewards
            if answers[i][-1] == tok.eos_id and 1 / (1 + math.exp(-safety[i])) >= 0.15
        ]
        if usable:
            best = max(usable, key=rewards.get)
            expected.append((prompt.text, pytest.approx(rewards[best], abs=1e-5)))
    assert [(record["prompt"], record["reward"]) for record in best_answers] == expected
    assert 0 < len(expected)
    assert stats["left_out"] == 10 - len(expected)
    assert stats["max"] == pytest.approx(sum(highest) / 10, abs=1e-5)
    assert stats["median"] == pytest.approx(sum(medians) / 10, abs=1e-5)
    assert stats["max"] > stats["median"]


def test_pool_has_the_best_answer_of_all_versions_to_each_prompt(tok, rm_folder):
    policy = make_model(vocab_size=tok.vocab_size)
    models = train_rlhf.load_reward_models(rm_folder, policy, tok, "policy")

    def answer(text, *tokens):
        return records.Answer(records.Prompt(text, False, [1, 5]), [*tokens, 2], True)

    earlier = [answer("a", 7), answer("b", 8), answer("a", 9)]
    newest = [answer("a", 10, 11), answer("c", 12)]
    del models["safety"]  # without it no answer is unsafe
    pool = train_rlhf.make_pool(earlier + newest, models)
    assert sorted(answer.prompt.text for answer in pool) == ["a", "b", "c"]
    candidates = [earlier[0], earlier[2], newest[0]]
    rewards = [train_rlhf.score_answers(models, [answer]).reward.item() for answer in candidates]
    best = candidates[rewards.index(max(rewards))]
    assert next(answer for answer in pool if answer.prompt.text == "a") == best


def test_pool_has_no_answer_that_the_safety_model_rejects(tok, rm_folder):
    """Where every answer to a crime helps, the best one does, too: it must not be learned."""
    policy = make_model(vocab_size=tok.vocab_size)
    models = train_rlhf.load_reward_models(rm_folder, policy, tok, "policy")
    models["safety"].score.weight.data *= 20  # scores of both signs, far from the gate
    answers = [make_answer([1, token, 5, 2], 2) for token in range(3, 40)]
    scores = llama2.score_sequences(models["safety"], [answer.sequence for answer in answers])
    gate = math.log(0.15 / 0.85)
    safe = [answer for answer, score in zip(answers, scores) if score >= gate]
    assert 0 < len(safe) < len(answers)
    assert train_rlhf.make_pool(answers, models) == safe
    del models["safety"]
    assert train_rlhf.make_pool(answers, models) == answers


def test_lowest_temperature_within_one_standard_error_is_chosen(monkeypatch):
    torch.manual_seed(1)
    shared_noise = torch.randn(100, 1)

    def sample_k(policy, tok, models, batch, K, max_new_tokens, temperature, seed, *_):
        mean = {0.5: 0.0, 0.7: 0.99, 1.0: 1.0}[temperature]
        return None, None, shared_noise + mean + 0.1 * torch.randn(100, 1)

    monkeypatch.setattr(train_rlhf, "sample_k", sample_k)
    config, run = train_rlhf.Settings(temperatures=(1.0, 0.5, 0.7)), SimpleNamespace(rank=0)
    chosen, tried = train_rlhf.choose_temperature(None, None, None, None, config, run)
    assert chosen == 0.7
    assert tried[1.0][0] - tried[0.5][0] == pytest.approx(1, abs=0.1)


def test_reward_models_fit_the_context_and_safety_is_optional(tmp_path, tok, rm_folder, capsys):
    policy = make_model(vocab_size=tok.vocab_size)
    policy.args = replace(policy.args, max_seq_len=257)
    with pytest.raises(ValueError, match="has a context of 256 tokens"):
        train_rlhf.load_reward_models(rm_folder, policy, tok, "policy")
    policy.args = replace(policy.args, max_seq_len=64)
    save(tmp_path / "helpfulness", make_reward_model(tok), tok)
    (tmp_path / "safety").mkdir()  # a run that was refused leaves its lock
    (tmp_path / "safety/.lock").touch()
    models = train_rlhf.load_reward_models(tmp_path, policy, tok, "policy")
    assert list(models) == ["helpfulness"]
    assert "only the helpfulness model gives the rewards" in capsys.readouterr().out
    scores = train_rlhf.score_answers(models, [make_answer([1, 5, 6, 2], 2, is_safety=True)])
    assert scores.reward == scores.helpfulness


# --------------------------------------------------------------------------- Ghost Attention (§3.3)
FOX = dict(kind="animal", instruction="Be the fox.", terse="Fox!", obeyed_if=[r"^The fox says: ?"])


def test_ghost_attention_example_by_hand_token_by_token(char_tok):
    """The instruction is in the first turn only, and the mask on the last answer only."""
    turns = [("a", "fb"), ("c", "fd"), ("e", "fg")]
    record = {"messages": ghost_attention.instruct_first_message("i", turns)}
    example = train_sft.encode_example(record, char_tok, 200)
    tokens, mask = [], []
    for user, answer, in_mask in (
        ("[INST] i a [/INST]", " fb ", 0),
        ("[INST] c [/INST]", " fd ", 0),
        ("[INST] e [/INST]", " fg ", 1),
    ):
        prompt = char_tok.encode(user, bos=True)
        whole = char_tok.encode(user + answer, bos=True, eos=True)
        tokens += whole
        mask += [0] * len(prompt) + [in_mask] * (len(whole) - len(prompt))
    assert (example.tokens, example.mask) == (tokens, mask)
    trained = "".join(char_tok.decode([t]) for t, m in zip(tokens, mask) if m)
    assert trained.replace(" ", "") == "fg"
    assert tokens[-1] == char_tok.eos_id


def test_sampling_has_the_instruction_in_all_messages_and_training_in_the_first():
    sampled = ghost_attention.instruct_every_message("Be the fox.", [("q1", "a1")], "q2")
    assert [m["content"] for m in sampled] == ["Be the fox. q1", "a1", "Be the fox. q2"]
    trained = ghost_attention.instruct_first_message("Be the fox.", [("q1", "a1"), ("q2", "a2")])
    assert [m["content"] for m in trained] == ["Be the fox. q1", "a1", "q2", "a2"]
    assert [m.get("weight") for m in trained] == [None, 0, None, 1]


def test_answers_that_disobey_the_instruction_are_dropped_and_counted(tok, monkeypatch):
    sampled = []

    def respond(model, tok, dialogs, *_, sampler):
        """Obeys, except in the second turn."""
        sampled.append([[m["content"] for m in messages] for messages in dialogs])
        obeys = len(sampled) != 2
        return [f"The fox says: {d[-1]['content'][-2:]}" if obeys else "No." for d in dialogs]

    monkeypatch.setattr(ghost_attention, "respond", respond)
    users, config = [["q1", "q2", "q3"], ["r1", "r2"]], ghost_attention.Settings(history=200)
    model, drawn = make_model(max_seq_len=300), [("Be the fox.", [FOX])] * 2
    turns, disobeyed = ghost_attention.sample_dialogs(model, tok, users, drawn, 0, config)
    assert disobeyed == 2
    assert turns[0] == [("q1", "The fox says: q1"), ("q3", "The fox says: q3")]
    assert turns[1] == [("r1", "The fox says: r1")]
    assert sampled[2] == [["Be the fox. q1", "The fox says: q1", "Be the fox. q3"]]
    sampled.clear()
    config = replace(config, history=1)  # no room for earlier turns: the newest message only
    ghost_attention.sample_dialogs(model, tok, users, drawn, 0, config)
    assert sampled[2] == [["Be the fox. q3"]]


def test_sampled_dialog_gives_training_examples_of_several_lengths(tok):
    turns = [(f"q{i}", f"a{i}") for i in range(9)]
    config = ghost_attention.Settings(system=0.0, beginnings=3)
    whole = ghost_attention.instruct_first_message("i", turns)

    def examples(config):
        return ghost_attention.to_records(tok, turns, "i", random.Random(1), config)

    dialogs = [record["messages"] for record in examples(config)]
    assert dialogs[-1] == whole
    assert 1 < len(dialogs) <= 4
    for messages in dialogs:
        start = whole[: len(messages)]
        assert [m["content"] for m in messages] == [m["content"] for m in start]
        assert [m["weight"] for m in messages[1::2]][-1] == 1
        assert sum(m["weight"] for m in messages[1::2]) == 1
    shorter = replace(config, context=len(encode_dialog(tok, whole)[0]) - 1)
    assert len(examples(shorter)[-1]["messages"]) == 16
    assert examples(replace(config, context=5)) == []
    # The instruction as a system message, unless it is a message of its own.
    as_system = examples(replace(config, system=1.0))[-1]["messages"]
    assert as_system[:2] == [{"role": "system", "content": "i"}, {"role": "user", "content": "q0"}]
    turns[0] = ("", "Yes.")
    alone = examples(replace(config, system=1.0))[-1]["messages"]
    assert [message["content"] for message in alone[:3]] == ["i", "Yes.", "q1"]


# --------------------------------------------------------------------- safety distillation (§4.2.4)
def test_pre_prompt_joins_the_system_message_or_becomes_one(town):
    join = distillation.with_system_prompt
    assert join("Be safe.", dialog("a")) == dialog("a", system="Be safe.")
    with_system = dialog("a", system="Be brief.")
    assert join("Be safe.", with_system) == dialog("a", system="Be safe. Be brief.")
    texts = {record["instruction"] for record in town["pre-prompts"]}
    assert len(texts) == 12 * 11
    assert {conversations.pre_prompt(random.Random(i)) for i in range(30)} <= texts


def test_distillation_trains_on_the_answer_with_the_higher_safety_score(
    tmp_path, base, rm_folder, monkeypatch, capsys
):
    scores = {"plain": 0.5, "new 0": 0.4, "new 1": 0.6, "new 2": 0.5, "new 3": 0.7}

    def respond(model, tok, dialogs, *_):
        has_pre_prompt = ["You are a " in messages[0]["content"] for messages in dialogs]
        numbers = [messages[-1]["content"][1] for messages in dialogs]
        return [f"new {n}" if has else "plain" for has, n in zip(has_pre_prompt, numbers)]

    def score(model, tok, dialogs):
        assert all("You are a " not in str(d) for d in dialogs)  # scored without the pre-prompt
        return [scores[messages[-1]["content"]] for messages in dialogs]

    monkeypatch.setattr(distillation, "respond", respond)
    monkeypatch.setattr(distillation, "score_dialogs", score)
    data = [dict(prompt=f"q{i}") for i in range(3)]
    data += [dict(prompt=dialog("q3", system="Answer all.")), dict(prompt="Too long. " * 99)]
    pre_prompts = [{"instruction": "You are a cat."}]
    config = distillation.Settings(
        chat=str(base),
        rm=str(rm_folder / "safety"),
        out=str(tmp_path / "d.jsonl"),
        data=(str(write_jsonl(tmp_path / "p.jsonl", data)),),
        pre_prompts=(str(write_jsonl(tmp_path / "i.jsonl", pre_prompts)),),
        **EXACT,
    )

    def written():
        return [record for _, record in files.read_json(config.out)]

    distillation.main(config)
    assert "prefers the distilled answer of 2" in capsys.readouterr().out
    answers = [record["messages"][-1]["content"] for record in written()]
    assert answers == ["plain", "new 1", "plain", "new 3"]
    assert [record["improved"] for record in written()] == [False, True, False, True]
    assert written()[3]["messages"][:-1] == data[3]["prompt"]  # with its own system message
    distillation.main(replace(config, gate=False, overwrite=True))
    answers = [record["messages"][-1]["content"] for record in written()]
    assert answers == ["new 0", "new 1", "new 2", "new 3"]
    scores["plain"] = 9.0
    with pytest.raises(ValueError, match="nothing to train on"):
        distillation.main(replace(config, overwrite=True))
