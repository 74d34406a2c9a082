"""python -m common.memory: plans against measured peaks, the paper's Table 2, refusals."""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import llama2
import train_rlhf
import train_rm
from common import memory
from common.training import adamw, clip_and_step, copy_of, matmul_only
from conftest import STAGES, model_folder, stage
from data.records import Answer, Prompt
from llama2 import SIZES, ModelArgs, RewardModel, Transformer, generate

ARGS = ModelArgs(
    dim=128, n_layers=4, n_heads=4, n_kv_heads=2, vocab_size=600, multiple_of=32, max_seq_len=64
)


# -------------------------------------------------------------------------------- measured peaks
class FusedNorm(torch.autograd.Function):
    """RMSNorm as on GPUs: it keeps its input and a number per token."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, scale, weight)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, gradient):
        x, scale, weight = ctx.saved_tensors
        normed, inner = x * scale, gradient * weight
        outer = normed * (inner * normed).mean(-1, keepdim=True)
        return (inner - outer).mul_(scale), (gradient * normed).flatten(0, -2).sum(0), None


def attend(q, k, v, mask):
    """Attention as on GPUs: in the precision of q."""
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return out.to(q.dtype)


@pytest.fixture
def like_a_gpu(monkeypatch):
    def forward(self, x):
        return FusedNorm.apply(x, self.weight, self.eps)

    monkeypatch.setattr(llama2.RMSNorm, "forward", forward)
    monkeypatch.setattr(llama2, "attend", attend)


def allocated(work) -> int:
    """The most bytes that were allocated at once during work()."""
    work()  # what is allocated only once, such as the moments of AdamW
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profiler:
        work()
    now = highest = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
    return highest


def size(model) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def make_step(name, settings):
    """(a function that accumulates the gradients of two micro-batches and steps, bytes held)."""
    classes = {"pretrain": [Transformer], "rm": [RewardModel], "ppo": [Transformer, RewardModel]}
    models = [make(ARGS) for make in classes[name]]
    for model in models:
        model.matmul_dtype, model.recompute = settings.dtype, settings.checkpoint_activations
    optimizers = [adamw(model, 1e-4) for model in models]
    held, B, T = 3 * sum(map(size, models)), settings.micro_batch, settings.seq_len
    if name == "ppo":
        frozen = [copy_of(models[0], frozen=True)]
        frozen += [copy_of(models[1], frozen=True) for _ in range(2)]
        held += sum(map(size, frozen))
        learner, answers = train_rlhf.Learner(models[0], frozen[0], models[1], *optimizers), []
        for ids in torch.randint(3, ARGS.vocab_size, (2 * B, T)).tolist():
            new = settings.max_new_tokens
            answers.append(Answer(Prompt("", False, ids[:-new]), ids[-new:], True))
        rollout = train_rlhf.make_rollout(answers, "cpu")

    def step():
        if name == "ppo":
            train_rlhf.accumulate_gradients(learner, rollout, list(range(2 * B)), B, 1.0, 0.2, 1)
        for _ in range(2 * (name != "ppo")):
            if name == "rm":
                tokens = torch.randint(3, ARGS.vocab_size, (2 * B, T)).tolist()
                scores = llama2.last_scores(models[0], tokens)
                loss = train_rm.ranking_loss(scores[0::2], scores[1::2], 0)
            else:
                tokens = torch.randint(3, ARGS.vocab_size, (B, T + 1))
                logits = models[0](tokens[:, :-1])
                loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
        for model, optimizer in zip(models, optimizers):
            clip_and_step(model, optimizer)

    return step, held


@pytest.mark.parametrize(
    "name, dtype, checkpointed",
    [
        ("pretrain", "float32", False),
        ("pretrain", "bfloat16", True),
        ("rm", "bfloat16", False),
        ("ppo", "bfloat16", False),
        ("ppo", "float32", True),
    ],
)
def test_the_plan_of_training_is_within_10_percent_of_the_peak(
    like_a_gpu, name, dtype, checkpointed
):
    settings = memory.Settings(name, gpus=1, dtype=dtype, checkpoint_activations=checkpointed)
    settings = replace(settings, seq_len=64, micro_batch=4, max_new_tokens=32)
    step, held = make_step(name, settings)
    planned = sum(memory.plan(settings, ARGS)["training"].values())
    assert planned == pytest.approx(held + allocated(step), rel=0.1)


def test_the_plan_of_sampling_is_within_10_percent_of_the_peak(like_a_gpu):
    prompts = torch.randint(3, ARGS.vocab_size, (16, 48)).tolist()
    measured = allocated(lambda: generate(Transformer(ARGS), prompts, 16)) - 4 * parameters(ARGS)
    settings = memory.Settings("ppo", gpus=1, dtype="float32", seq_len=64, max_new_tokens=16)
    plan = memory.plan(replace(settings, answers=16), ARGS)["sampling"]
    assert plan["KV cache"] + plan["a block's forward pass"] == pytest.approx(measured, rel=0.1)
    # A fourth of the GPU's memory has room for fewer answers, so their caches are smaller.
    other = sum(plan.values()) - plan["KV cache"] - plan["a block's forward pass"]
    small = replace(settings, answers=16, gpu_memory=(other + plan["KV cache"]) / memory.GB)
    assert memory.plan(small, ARGS)["sampling"]["KV cache"] < plan["KV cache"]


def parameters(args) -> int:
    return memory.count(args)[0]


def test_parameters_are_counted_as_the_model_has_them():
    model = Transformer(ARGS)
    products = sum(p.numel() for n, p in model.named_parameters() if matmul_only(n, p))
    block = sum(p.numel() for p in model.layers[0].parameters())
    assert memory.count(ARGS) == (size(model) / 4, products, block)


def test_weights_gradients_and_moments_by_hand():
    n, gpus = parameters(ARGS), 8
    settings = memory.Settings("pretrain", gpus=gpus, dtype="float32", seq_len=1)
    plan = memory.plan(settings, ARGS)["training"]
    fixed = ("weights", "gradients", "moments of AdamW", "DDP's buckets")
    assert sum(plan[name] for name in fixed) == (4 + 4 + 8 + 4) * n
    sharded = memory.plan(replace(settings, shard=True), ARGS)
    assert sum(sharded["training"][name] for name in fixed) == (4 + 4 + 8) * n / gpus
    assert sharded["evaluation"]["whole model"] == 4 * n


# ---------------------------------------------------------------------------------- the budget
TABLE_2 = {  # GPU-hours, watts, tons of CO2 for 2T tokens
    "7B": (184_320, 400, 31.22),
    "13B": (368_640, 400, 62.44),
    "34B": (1_038_336, 350, 153.90),
    "70B": (1_720_320, 400, 291.42),
}


@pytest.mark.parametrize("name", TABLE_2)
def test_hours_energy_and_co2_are_those_of_table_2(name):
    hours, watts, co2 = TABLE_2[name]
    args, settings = ModelArgs(**SIZES[name]), memory.Settings(size=name, watts=watts)
    planned = memory.budget(settings, args)
    assert planned["GPU-hours"] == pytest.approx(hours, rel=0.12)
    # With the utilization that these hours mean, the rest is the same, too.
    utilization = settings.utilization * planned["GPU-hours"] / hours
    planned = memory.budget(replace(settings, utilization=utilization), args)
    assert planned["GPU-hours"] == pytest.approx(hours)
    assert planned["tons of CO2"] == pytest.approx(co2, rel=1e-3)


def test_the_command_prints_the_parts_what_helps_and_the_budget(capsys):
    memory.main(memory.Settings())
    text = capsys.readouterr().out
    assert re.search(r"weights +27\.0 +27\.0\n", text)
    assert re.search(r"in all +17\d\.\d", text)
    assert re.search(r"80 GB: give --shard: 5\d\.\d GB", text)
    assert "2e+12 tokens: 184,594 GPU-hours, 74 MWh, 31 tons of CO2" in text
    memory.main(memory.Settings(shard=True))
    assert "80 GB: it fits" in capsys.readouterr().out
    memory.main(memory.Settings("ppo", gpus=1))
    assert "it takes 4 GPUs with --shard --checkpoint-activations" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--size 8B: expected one of tiny"):
        memory.main(memory.Settings(size="8B"))


# ------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize("name", STAGES)
def test_a_model_that_does_not_fit_the_gpu_is_refused_with_the_option_that_helps(
    tmp_path, inputs, name, monkeypatch, expect_error
):
    changes = dict(keep="last") if name != "rejection-sampling" else {}
    script, config = stage(name, inputs, tmp_path / "out", micro_batch=64, **changes)
    monkeypatch.setattr(memory, "memory_of", lambda device: 2e7)
    expect_error(script, config, "each GPU would need", "and has 0.0: give --micro-batch 1: ")
    assert not model_folder(config).exists() or name == "pretrain"
    monkeypatch.setattr(memory, "memory_of", lambda device: 1e5)
    expect_error(script, config, "no number of such GPUs is enough, because each gathers")
    monkeypatch.setattr(memory, "memory_of", lambda device: 1e9)
    memory.check_memory(config, torch.device("cpu"), name)
