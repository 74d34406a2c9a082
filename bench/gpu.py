"""What bench/gpu.sh measures on a GPU. Each command prints a row of its table.

    python -m bench.gpu machine DEVICE              how fast it multiplies and copies
    python -m bench.gpu stage SCRIPT OPTIONS        run a training script: peak of memory, and plan
    python -m bench.gpu stop STEP SCRIPT OPTIONS    stop it with Ctrl-C in a step, to resume it
    python -m bench.gpu compare WHAT A B EXPECTED   losses and weights of two runs
    python -m bench.gpu train DEVICE SIZE           speed of pretraining; the second and the last
    python -m bench.gpu decode DEVICE SIZE          speed of decoding, batch 1

`stage` and `train` also run under torchrun; `train` has --shard.
"""

import importlib
import json
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import llama2
from bench.speed import bandwidth, matmul_rate
from common import memory
from common.memory import GB
from common.run import Stopped
from common.settings import parse_settings, stop as exit_with
from common.training import adamw, all_gather, barrier, clip_and_step, ddp, print0, setup, to_device
from llama2 import SIZES, ModelArgs, Transformer, generate, matmul_dtype
from train_pretrain import next_token_loss

STAGES = {"train_pretrain.py": "pretrain", "train_sft.py": "sft", "train_rm.py": "rm"}
SECONDS = 10  # of each measurement of training


def row(what: str, measured: str, expected: str = ""):
    """Print a row of the table."""
    print0(f"| {what} | {measured} | {expected or '-'} |")


def peak(device) -> str:
    """The most bytes that were allocated on a GPU at once."""
    if torch.device(device).type != "cuda":
        return "peak not measured"
    return f"peak {torch.cuda.max_memory_allocated() / GB:.2f} GB"


def teraflops(device) -> float:
    """10^12 operations per second of a product of two large matrices."""
    size = 8192 if torch.device(device).type == "cuda" else 512
    dtype = getattr(torch, matmul_dtype("auto", device))
    return matmul_rate(dtype, device, size) / 1e3


def bytes_per_second(device) -> float:
    """Bytes that a copy reads and writes per second."""
    return 1e9 * bandwidth(device, 1 << (28 if torch.device(device).type == "cuda" else 24))


def machine(device: str):
    device = setup(device)[0]
    name, versions = "CPU", f"torch {torch.__version__}"
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name()}, {memory.memory_of(device) / GB:.0f} GB"
        versions += f", CUDA {torch.version.cuda}"
    speed = f"products of matrices: {teraflops(device):.3g} TFLOP/s in "
    speed += f"{matmul_dtype('auto', device)}; copies: {bytes_per_second(device) / GB:.0f} GB/s"
    row(f"{name}, {versions}", speed)


# ---------------------------------------------------------------------------------------- stages
def read(words):
    """(script, settings) of a command line."""
    script = importlib.import_module(words[0].removesuffix(".py"))
    return script, parse_settings(script.Settings, script.PAPER, "", words[1:])


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def stage(*words):
    script, config = read(words)
    begun = time.perf_counter()
    script.main(config)
    barrier()  # until rank 0 has written the model
    seconds = time.perf_counter() - begun
    device, _, world_size = setup(config.device)
    folder = Path(config.out) / getattr(config, "kind", "")
    args, name = memory.args_of(folder), STAGES.get(words[0]) or config.method
    planned = memory.peak(memory.settings_of(config, device, name, args), args) / GB
    what = f"{name}, {memory.count(args)[0] / 1e6:.1f}M parameters"
    if world_size > 1:
        what += f", {world_size} processes{' --shard' * config.shard}"
    row(what, f"{peak(device)}; {seconds:.0f} s", f"at most the plan's {planned:.2f} GB")
    if name == "ppo":
        lines = [line for line in log_of(folder) if "first_ratio" in line]
        ratio = max((line["first_ratio"] for line in lines), key=lambda ratio: abs(ratio - 1))
        measured = f"first importance ratio {ratio:.6f}; first KL {lines[0]['kl']:.6f}"
        row(what, measured, "1, in bfloat16 within 0.01; 0")


def stop(step: str, *words):
    script, config = read(words)
    steps = 0

    def interrupted(*args):
        nonlocal steps
        steps += 1
        if steps == int(step):
            signal.raise_signal(signal.SIGINT)
        return clip_and_step(*args)

    script.clip_and_step = interrupted
    try:
        script.main(config)
    except Stopped as e:
        print0(e)
    else:
        raise ValueError(f"{config.out} ended before step {step}")


def difference(a: str, b: str) -> str:
    """The largest differences between two runs."""
    logs = [{line["step"]: line["loss"] for line in log_of(f) if "loss" in line} for f in (a, b)]
    losses = max(abs(loss - logs[1][step]) for step, loss in logs[0].items())
    first, second = (llama2.load(folder)[0].state_dict() for folder in (a, b))
    weights = max((first[name] - second[name]).abs().max().item() for name in first)
    return f"losses differ by {losses:.2g}, weights by {weights:.2g}"


def compare(what: str, a: str, b: str, expected: str):
    row(what, difference(a, b), expected)


# ----------------------------------------------------------------------------------------- speed
def train(device: str, size: str, *options: str):
    """Utilization as in PaLM (Chowdhery et al. 2022): without what is computed again."""
    device, _, world_size = setup(device)
    on_gpu, sharded = device.type == "cuda", "--shard" in options
    T = 2048 if on_gpu else 64
    args = ModelArgs(**SIZES[size], vocab_size=32000 if on_gpu else 1024, max_seq_len=T)
    what = f"pretraining, {size}, {world_size} process{'es' * (world_size > 1)}"
    what += " --shard" * sharded
    for B in (16, 8, 4, 2, 1):
        settings = memory.Settings("pretrain", gpus=world_size, shard=sharded, seq_len=T)
        settings.micro_batch, settings.dtype = B, matmul_dtype("auto", device)
        planned = memory.peak(settings, args)
        if planned < 0.9 * memory.memory_of(device):
            break
    else:
        return row(what, "does not fit", f"the plan: {planned / GB:.1f} GB")

    torch.manual_seed(1)
    with torch.device("cpu") if sharded else device:
        model = to_device(Transformer(args), device, sharded)
    model.matmul_dtype = settings.dtype
    optimizer, ddp_model = adamw(model, 1e-4), ddp(model)

    def step() -> float:
        """Two micro-batches and a step; returns the seconds of the slowest process."""
        begun = time.perf_counter()
        for i in range(2):
            ddp_model.require_backward_grad_sync = i == 1
            tokens = torch.randint(3, args.vocab_size, (B, T + 1), device=device)  # (B, T + 1)
            loss = next_token_loss(ddp_model(tokens[:, :-1]), tokens[:, 1:]) / (2 * B * T)
            loss.backward()
        clip_and_step(model, optimizer)
        if on_gpu:
            torch.cuda.synchronize()
        return max(all_gather([time.perf_counter() - begun]))

    step()
    count = max(1, min(20, round(SECONDS / step()))) if on_gpu else 1
    seconds = sorted(step() for _ in range(count))[count // 2]
    tokens = 2 * B * T * world_size / seconds
    memory_used = peak(device)
    flops = 6 * memory.count(args)[1] + 12 * args.n_layers * args.dim * T  # per token
    done, possible = tokens * flops / world_size / 1e12, teraflops(device)
    row(
        f"{what}, micro-batch {B} x {T}",
        f"{tokens:,.0f} tokens/s, {done:.3g} TFLOP/s each, {done / possible:.0%} of a product; "
        f"{memory_used}",
        f"39% of 312 TFLOP/s in the paper; the plan: {planned / GB:.2f} GB",
    )


def decode(device: str, size: str):
    """As llama2.py chat does it, with random weights."""
    device, new = setup(device)[0], 64
    dtype = matmul_dtype("auto", device) if device.type == "cuda" else "float32"
    args = ModelArgs(**SIZES[size], vocab_size=32000, max_seq_len=256)
    total, products, _ = memory.count(args)
    width = torch.finfo(getattr(torch, dtype)).bits // 8
    if 1.1 * total * width > memory.memory_of(device):
        return row(f"decoding, {size}", "does not fit", f"{total * width / GB:.1f} GB")
    limit = bytes_per_second(device) / (products * width)
    torch.set_default_dtype(getattr(torch, dtype))
    with device:
        model = Transformer(args).eval()
    torch.set_default_dtype(torch.float32)
    model.matmul_dtype = dtype
    prompt = [list(range(3, 35))]
    generate(model, prompt, 4, temperature=0)
    begun = time.perf_counter()
    generate(model, prompt, new, temperature=0)
    rate = new / (time.perf_counter() - begun)
    row(
        f"decoding, {size}, batch 1, {dtype}",
        f"{rate:.1f} tokens/s; {peak(device)}",
        f"at most {limit:.1f}: {products * width / GB:.2f} GB of weights are read per token",
    )


COMMANDS = dict(
    machine=machine, stage=stage, stop=stop, compare=compare, train=train, decode=decode
)


def main():
    command, *words = sys.argv[1:] or [""]
    if command not in COMMANDS:
        exit_with(f"expected one of {', '.join(COMMANDS)}")
    try:
        COMMANDS[command](*words)
    except ValueError as e:
        exit_with(e)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
