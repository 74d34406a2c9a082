"""What a stage of training needs: memory of each GPU, GPU-hours, energy and CO2, by arithmetic.

    python -m common.memory --size 7B --gpus 8 --stage sft
    python -m common.memory --size 7B --gpus 8 --stage ppo --shard --checkpoint-activations

Not included: fragments between tensors, and about 1 GB for CUDA itself. The time is that of 6
operations per parameter and token, at the utilization that the paper's GPU-hours imply (Table 2).
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from common.run import run_script
from common.settings import check_settings
from common.training import rank_and_world_size
from llama2 import SIZES, ModelArgs, kv_cache_bytes, load_params, matmul_dtype

GB = 1e9
SAMPLING = ("rejection-sampling", "ppo")  # the stages that sample answers


@dataclass
class Settings:
    # the run
    stage: Literal["pretrain", "sft", "rm", "rejection-sampling", "ppo"] = "sft"  # what is trained
    size: str = "7B"  # tiny, 15M, 110M, 1B, 7B, 13B, 34B, 70B
    gpus: int = 8  # number of processes, one per GPU
    gpu_memory: float = 80.0  # of each GPU, in GB
    shard: bool = False  # as in the training scripts
    checkpoint_activations: bool = False  # as in the training scripts
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of matrix products
    seq_len: int = 4096  # tokens per sequence; of PPO: of a prompt with its answer
    micro_batch: int = 1  # sequences per forward pass; of rm: pairs
    max_new_tokens: int = 1024  # longest answer
    answers: int = 64  # sampled at a time; fewer if their KV caches do not fit
    keep: Literal["last", "best"] = "last"  # best: a copy of the best weights so far
    # the budget
    tokens: float = 2e12  # tokens to train on (paper: 2T)
    tflops: float = 312.0  # peak of a GPU, in 10^12 operations per second (A100: 312)
    utilization: float = 0.39  # fraction of the peak that training reaches
    watts: float = 400.0  # power of a GPU (paper: 350 for 34B)
    co2: float = 0.4235  # kg per kWh (Table 2: tons per energy)


def count(args: ModelArgs) -> tuple[int, int, int]:
    """Parameters: (of a language model, of its matrix products only, of one block)."""
    D, F, L = args.dim, args.ffn_dim, args.n_layers
    matrices = 2 * D * D + 2 * D * args.head_dim * args.n_kv_heads + 3 * D * F
    block, head = matrices + 2 * D, args.vocab_size * D  # the head: embeddings, or the output
    return 2 * head + L * block + D, L * matrices + head, block


def held_parts(config: Settings, args: ModelArgs) -> dict[str, float]:
    """{part: bytes} of what is held all the time."""
    total, products, _ = count(args)
    head = args.vocab_size * args.dim  # the output, which reward and value models lack
    short = 2 if config.dtype == "bfloat16" else 4
    parts = config.gpus if config.shard else 1
    trained = {"rm": total - head, "ppo": 2 * total - head}.get(config.stage, total)
    frozen = 0
    if config.stage in SAMPLING:  # two reward models
        frozen = 2 * (short * (products - head) + 4 * (total - products))
    if config.stage == "ppo":  # the reference
        frozen += short * products + 4 * (total - products)
    best = config.keep == "best" and config.stage != "rejection-sampling"
    return {
        "weights": (4 * trained + frozen) / parts,
        "moments of AdamW": 8 * trained / parts,
        "best weights": 4 * total / parts * best,
        "DDP's buckets": 4 * trained * (config.gpus > 1 and not config.shard),
    }


def training_parts(config: Settings, args: ModelArgs) -> dict[str, float]:
    """{part: bytes} of what one step adds, with several micro-batches."""
    D, F, V, L = args.dim, args.ffn_dim, args.vocab_size, args.n_layers
    total, products, block = count(args)
    bfloat16 = config.dtype == "bfloat16"
    short = 2 if bfloat16 else 4
    sequences = config.micro_batch * (2 if config.stage == "rm" else 1)
    tokens = sequences * config.seq_len
    models = 2 if config.stage == "ppo" else 1  # the policy and its value model
    # Autograd keeps of each block, in bytes per token: the inputs of both norms and of the matrix
    # products, q, k, v, and what attention and SwiGLU return.
    kv = args.n_kv_heads / args.n_heads
    kept = (22 + 4 * kv) * D + 8 * F if bfloat16 else (24 + 8 * kv) * D + 16 * F
    copies = {"rm": products - V * D, "ppo": 2 * products - V * D}.get(config.stage, products)
    with_logits = {"rm": 0, "ppo": sequences * config.max_new_tokens}.get(config.stage, tokens)
    logits = with_logits * V
    # The backward pass is largest at its start, with the logits' gradient, or in the last block.
    at_start = (12 + short) * logits + (8 + short) * D * tokens * models
    in_block = short * logits + (short * F + 4 * D) * tokens
    activations = kept * L
    if config.checkpoint_activations:  # only the inputs of blocks; and all of one block
        activations, copies = 4 * D * L, 0
        in_block += kept * tokens + 2 * block * bfloat16
    parts = {
        "gradients": 4 * held_parts(config, args)["moments of AdamW"] / 8,
        "bfloat16 copies of weights": 2 * copies * bfloat16,
        "activations": activations * tokens * models,
        "logits, or a block's backward pass": max(at_start, in_block),
    }
    if config.shard and config.gpus > 1:
        # Two blocks and a gradient. Embeddings and output: both at once, and their gradients.
        parts["gathered weights"] = 4 * (3 * block + 2 * (total - L * block))
    return parts


def plan(config: Settings, args: ModelArgs) -> dict[str, dict[str, float]]:
    """{phase: {part: bytes}} of each GPU; a phase is training, evaluation or sampling."""
    D, F = args.dim, args.ffn_dim
    total, products, _ = count(args)
    short = 2 if config.dtype == "bfloat16" else 4
    held = held_parts(config, args)
    phases = {"training": held | training_parts(config, args)}
    # The other phases keep no activations, and gradients are freed before them.
    other = dict(held)
    if config.shard and config.gpus > 1:
        other["whole model"] = short * products + 4 * (total - products)
    else:
        other["bfloat16 copies of weights"] = 2 * products * (short == 2)
    if config.stage not in SAMPLING:
        logits = config.micro_batch * config.seq_len * args.vocab_size * (config.stage != "rm")
        return phases | {"evaluation": other | {"logits": (8 + short) * logits}}
    # As many answers at a time as in llama2.max_batch_size. Their prompts are read in one pass.
    free = config.gpu_memory * GB - sum(other.values())
    row = kv_cache_bytes(args, 1, config.seq_len, 4) + 16 * config.seq_len * (D + F)
    answers = min(config.answers, max(1, free // 2 // row))
    prompts = answers * max(1, config.seq_len - config.max_new_tokens)
    other["KV cache"] = kv_cache_bytes(args, 1, config.seq_len, short) * answers
    other["a block's forward pass"] = prompts * (3 * short * F + 12 * D)
    return phases | {"sampling": other}


def peak(config: Settings, args: ModelArgs) -> float:
    """Bytes that each GPU needs."""
    return max(sum(parts.values()) for parts in plan(config, args).values())


def advice(config: Settings, args: ModelArgs) -> str:
    """Options with which a stage fits in the GPUs' memory, and what it then needs."""
    checkpointed = dict(checkpoint_activations=True)
    for changes in (
        dict(micro_batch=1),
        checkpointed,
        dict(micro_batch=1) | checkpointed,
        dict(shard=True),
        dict(shard=True) | checkpointed,
        dict(shard=True, micro_batch=1) | checkpointed,
    ):
        if changes.get("shard") and config.gpus == 1:
            continue
        better = replace(config, **changes)
        if peak(better, args) < config.gpu_memory * GB:
            options = ""
            for name in changes:
                if getattr(config, name) != getattr(better, name):
                    value = "" if changes[name] is True else f" {changes[name]}"
                    options += f" --{name.replace('_', '-')}{value}"
            return f"give{options}: {peak(better, args) / GB:.1f} GB"
    best = replace(config, shard=True, micro_batch=1, checkpoint_activations=True)
    for gpus in (2**n for n in range(1, 12)):
        if gpus > config.gpus and peak(replace(best, gpus=gpus), args) < config.gpu_memory * GB:
            return f"it takes {gpus} GPUs with --shard --checkpoint-activations --micro-batch 1"
    return "no number of such GPUs is enough, because each gathers a whole model"


def budget(config: Settings, args: ModelArgs) -> dict[str, float]:
    """{"GPU-hours", "MWh", "tons of CO2"} of training on config.tokens tokens."""
    operations = 6 * count(args)[0] * config.tokens
    hours = operations / (config.tflops * 1e12 * config.utilization) / 3600
    energy = hours * config.watts / 1e6
    return {"GPU-hours": hours, "MWh": energy, "tons of CO2": energy * config.co2}


# ------------------------------------------------------------------------- for the training scripts
def memory_of(device) -> float:
    """Bytes of a device's memory; infinity if it is not a CUDA device."""
    if device.type != "cuda":
        return math.inf
    return torch.cuda.get_device_properties(device).total_memory


def args_of(folder) -> ModelArgs | None:
    """The shape of the model in a folder; None if it is not one, which `llama2.load` explains."""
    folder = Path(folder)
    if not (folder / "params.json").is_file():
        return None
    return ModelArgs(**load_params(folder, vocab_size=32000))


def settings_of(config, device, stage: str, args: ModelArgs) -> Settings:
    """The planner's settings for a stage with a training script's settings on this machine."""
    # Texts may be shorter than the context, so without --seq-len, plan for 1,024 tokens at most.
    values = {"seq_len": min(args.max_seq_len, 1024)} | vars(config)
    names = ("shard", "checkpoint_activations", "micro_batch", "seq_len", "max_new_tokens", "keep")
    return Settings(
        stage=stage,
        gpus=rank_and_world_size()[1],
        gpu_memory=memory_of(device) / GB,
        dtype=matmul_dtype(config.dtype, device),
        **{name: values[name] for name in names if name in values},
    )


def check_memory(config, device, stage: str, args: ModelArgs | None = None):
    """ValueError with the options that help if a stage does not fit in the GPU's memory.

    config: settings of a training script. args: of a new model; else those of config.init. The
    plan may be 10% too high, so only what is further above the memory is refused.
    """
    available = memory_of(device)
    if available == math.inf:
        return
    args = args or args_of(config.init)
    if not args:
        return
    settings = settings_of(config, device, stage, args)
    needed = peak(settings, args)
    if needed > 1.1 * available:
        raise ValueError(
            f"each GPU would need {needed / GB:.1f} GB and has {available / GB:.1f}: "
            f"{advice(settings, args)}; python -m common.memory shows the parts"
        )


def main(config: Settings) -> dict[str, dict[str, float]]:
    """Print what a stage needs; returns the plan."""
    check_settings(config)
    if config.size not in SIZES:
        raise ValueError(f"--size {config.size}: expected one of {', '.join(SIZES)}")
    args = ModelArgs(**SIZES[config.size])
    phases = plan(config, args)
    print(f"GB on each GPU{'':26}" + "".join(f"{phase:>12}" for phase in phases))
    names = dict.fromkeys(name for parts in phases.values() for name in parts)
    for name in names:
        values = [parts.get(name, 0) for parts in phases.values()]
        if any(values):
            print(f"{name:<40}" + "".join(f"{value / GB:12.1f}" for value in values))
    print(
        f"{'in all':<40}"
        + "".join(f"{sum(parts.values()) / GB:12.1f}" for parts in phases.values())
    )
    fits = peak(config, args) <= config.gpu_memory * GB
    print(f"{config.gpu_memory:g} GB: " + ("it fits" if fits else advice(config, args)))
    amounts = ", ".join(f"{value:,.0f} {name}" for name, value in budget(config, args).items())
    print(f"{config.tokens:.3g} tokens: {amounts}")
    return phases


if __name__ == "__main__":
    run_script(main, Settings, {})
