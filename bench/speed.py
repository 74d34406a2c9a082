"""Speed: compared with transformers and TRL, with the machine's limits, and by model size.

    python -m venv peers && peers/bin/pip install torch==2.13.0 transformers trl==1.12.0
    python -m bench.speed peers --peer peers/bin/python
    python -m bench.speed growth

Our code and theirs run alternately, each in its own process. The speed of a shared machine changes
from minute to minute, so only the ratio of two measurements made in turn is meaningful. trl 1.12.0
is the last version with a PPO trainer.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import train_rlhf
from bench import ROOT
from common.training import adamw, clip_and_step, setup
from data.records import Prompt
from llama2 import (
    SIZES,
    KVCache,
    ModelArgs,
    RewardModel,
    Transformer,
    generate,
    kv_cache_bytes,
    matmul_dtype,
    score_sequences,
)
from train_pretrain import next_token_loss

LENGTHS = [12 + 37 * i % 29 for i in range(128)]  # of prompts and dialogues, in tokens
WORK = {  # name -> (unit, method of Work, its arguments)
    "training, 16 x 128": ("tokens", "train", dict(rows=16, length=128)),
    "prompts, 64 x 128": ("tokens", "prefill", dict(rows=64, length=128)),
    "decoding, batch 1": ("tokens", "decode", dict(rows=1, length=32, new=64)),
    "decoding, batch 64": ("tokens", "decode", dict(rows=64, length=32, new=64)),
    "decoding, batch 256": ("tokens", "decode", dict(rows=256, length=32, new=64)),
    "scoring, 128 dialogues": ("tokens", "score_sequences", dict(lengths=[2 * n for n in LENGTHS])),
    "PPO, 128 answers": (
        "answers",
        "ppo",
        dict(lengths=LENGTHS, new=24, mini_batch=32, micro_batch=16),
    ),
}


class Work:
    """Each method does one kind of work once and returns the amount, in the unit of WORK.

    bench/peers.py has a class with the same methods for transformers and TRL.
    """

    def __init__(self, args: ModelArgs, dtype: str):
        torch.manual_seed(1)
        self.model, self.reward_model = Transformer(args), RewardModel(args)
        for model in (self.model, self.reward_model):
            model.matmul_dtype = matmul_dtype("auto" if dtype == "default" else dtype, "cpu")
        self.optimizer = adamw(self.model, 1e-4)

    def tokens(self, rows: int, length: int):
        """Random ids, (rows, length)."""
        return torch.randint(3, self.model.args.vocab_size, (rows, length))

    def train(self, rows: int, length: int) -> int:
        tokens = self.tokens(rows, length + 1)
        loss = next_token_loss(self.model(tokens[:, :-1]), tokens[:, 1:]) / (rows * length)
        loss.backward()
        clip_and_step(self.model, self.optimizer)
        return rows * length

    @torch.inference_mode()
    def prefill(self, rows: int, length: int) -> int:
        """One forward pass over prompts, which fills the KV cache."""
        cache = KVCache(self.model.args, rows, length)
        self.model(self.tokens(rows, length), cache, select=(slice(None), -1))
        return rows * length

    def decode(self, rows: int, length: int, new: int) -> int:
        prompts = self.tokens(rows, length).tolist()
        return sum(map(len, generate(self.model, prompts, new)))

    def score_sequences(self, lengths) -> int:
        sequences = [self.tokens(1, length)[0].tolist() for length in lengths]
        score_sequences(self.reward_model, sequences)
        return sum(lengths)

    def ppo(self, lengths, new: int, mini_batch: int, micro_batch: int) -> int:
        """One iteration of PPO, in a temporary folder."""
        config = train_rlhf.Settings(
            method="ppo",
            max_new_tokens=new,
            batch_size=len(lengths),
            mini_batch=mini_batch,
            micro_batch=micro_batch,
            out=tempfile.mkdtemp(),
        )
        prompts = [Prompt("", False, self.tokens(1, length)[0].tolist()) for length in lengths]
        reward_models, tok = {"helpfulness": self.reward_model}, argparse.Namespace(eos_id=2)
        run = train_rlhf.Run(config.out, config)
        learner, _ = train_rlhf.begin_ppo(self.model, reward_models, config, run)
        self.started = time.perf_counter()  # do not count the copying of the models
        rollout, scores = train_rlhf.collect_rollout(
            learner, tok, reward_models, prompts, 1, config
        )
        sums = train_rlhf.update(learner, rollout, 1, config, run)
        train_rlhf.statistics(rollout, scores, sums)
        shutil.rmtree(config.out)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Run replaced it
        return len(lengths)

    def rate(self, method: str, size) -> float:
        """Amount of work per second."""
        self.started = time.perf_counter()
        amount = getattr(self, method)(**size)
        return amount / (time.perf_counter() - self.started)


# ---------------------------------------------------------------- compared with transformers, TRL
def shape_of(args: ModelArgs) -> dict:
    """The shape of our model, for the configuration of theirs."""
    return vars(args) | {"ffn_dim": args.ffn_dim}


def peer_rate(process, **request) -> float:
    """Let bench/peers.py make one measurement: its amount of work per second."""
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        sys.exit("bench.speed: error: peers.py failed; does --peer have transformers and trl?")
    return float(line)


def fastest(work, device="cpu") -> float:
    """Seconds of work(), the best of ten."""
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        work()
        if torch.device(device).type == "cuda":  # which returns before the work is done
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def matmul_rate(dtype, device="cpu", size: int = 1024) -> float:
    """GFLOP/s of the product of two size x size matrices, the best of ten."""
    a, b = torch.randn(2, size, size, dtype=dtype, device=device)
    return 2 * size**3 / fastest(lambda: a @ b, device) / 1e9


def bandwidth(device="cpu", size: int = 1 << 26) -> float:
    """GB/s of memory, reading and writing, for a copy of `size` numbers; the best of ten."""
    a = torch.ones(size, device=device)
    b = torch.empty_like(a)
    return 2 * 4 * size / fastest(lambda: b.copy_(a), device) / 1e9


def peers(options):
    """Each kind of work in each precision, alternately; the median ratio and its range."""
    args = ModelArgs(**SIZES[options.size], vocab_size=1024, max_seq_len=256)
    process = subprocess.Popen(
        [options.peer, ROOT / "bench/peers.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"TMPDIR": tempfile.gettempdir()},
    )
    has_bfloat16 = matmul_dtype("auto", "cpu") == "bfloat16"
    print(
        f"matrix products: {matmul_rate(torch.float32):.0f} GFLOP/s in float32, "
        f"{matmul_rate(torch.bfloat16):.0f} in bfloat16; memory: {bandwidth():.1f} GB/s; "
        f"{torch.get_num_threads()} threads, {options.size}, torch {torch.__version__}"
    )
    print("\n| work | precision | ours / theirs | from, to | ours per second | theirs |")
    print("|---" * 6 + "|")
    for dtype in ("float32", "bfloat16", "default"):
        if dtype == "bfloat16" and not has_bfloat16:
            print("| all | bfloat16 | not measured: this CPU has no instructions for it | | | |")
            continue
        work = Work(args, dtype)
        for name, (unit, method, size) in WORK.items():
            ours, theirs = [], []
            for turn in range(options.turns + 1):
                rate = work.rate(method, size)
                request = dict(work=method, size=size, dtype=dtype, shape=shape_of(args))
                their_rate = peer_rate(process, **request)
                if turn > 0:  # the first turn is warm-up
                    ours.append(rate)
                    theirs.append(their_rate)
            ratios = [a / b for a, b in zip(ours, theirs)]
            print(
                f"| {name} | {dtype} | **{statistics.median(ratios):.2f}** | {min(ratios):.2f}, "
                f"{max(ratios):.2f} | {statistics.median(ours):,.0f} {unit} | "
                f"{statistics.median(theirs):,.0f} |",
                flush=True,
            )
    process.stdin.close()
    process.wait()


# ------------------------------------------------------------------------------------- by size
def peak_megabytes() -> float:
    """The largest memory use of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def growth(options):
    """Time and memory by context, batch and model size; a process each, to measure peak memory."""
    sizes = [("tiny", context, 1) for context in (128, 256, 512, 1024, 2048, 4096)]
    sizes += [("tiny", 128, batch) for batch in (4, 16, 64, 256)]
    sizes += [("15M", 128, 16), ("110M", 128, 16)]
    print(
        "| model | context | batch | training, µs per token | peak memory, MB | "
        "decoding, µs per token | KV cache read per token, KB |"
    )
    print("|---" * 7 + "|")
    for size, context, batch in sizes:
        command = [sys.executable, "-m", "bench.speed", "measure", "--size", size]
        command += ["--context", str(context), "--batch", str(batch)]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        print(process.stdout.strip(), flush=True)


def measure(options):
    """Print one row of the table of `growth`."""
    args = ModelArgs(**SIZES[options.size], vocab_size=1024, max_seq_len=options.context)
    rows, context = options.batch, options.context
    start, work = peak_megabytes(), Work(args, "default")
    # Decode the last 16 tokens of a full context, because there the cache is longest.
    prompt = work.tokens(rows, context - 16)
    cache = KVCache(args, rows, context)
    with torch.inference_mode():
        work.model(prompt, cache, select=(slice(None), -1))
        seconds = []
        for _ in range(16):
            started = time.perf_counter()
            work.model(work.tokens(rows, 1), cache, select=(slice(None), -1))
            seconds.append(time.perf_counter() - started)
    decoding = statistics.median(seconds) / rows
    del cache
    rates = [work.rate("train", dict(rows=rows, length=context)) for _ in range(4)]
    cache_kilobytes = kv_cache_bytes(args, 1, context, 4) / 1024
    print(
        f"| {options.size} | {context:,} | {rows} | {1e6 / max(rates):,.0f} | "
        f"{peak_megabytes() - start:,.0f} | {1e6 * decoding:,.0f} | {cache_kilobytes:,.0f} |"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=("peers", "growth", "measure"), default="peers")
    parser.add_argument(
        "--peer",
        type=Path,
        default=Path("peers/bin/python"),
        help="a Python that has transformers and trl (default: %(default)s)",
    )
    parser.add_argument("--size", choices=SIZES, default="tiny", help="of the model")
    parser.add_argument(
        "--turns", type=int, default=5, help="measurements of each kind of work (default: 5)"
    )
    parser.add_argument("--context", type=int, default=128, help="tokens, for measure")
    parser.add_argument("--batch", type=int, default=16, help="sequences, for measure")
    options = parser.parse_args()
    if options.part == "peers" and not options.peer.exists():
        parser.exit(2, f"bench.speed: error: --peer {options.peer}: no such file; see --help\n")
    setup("cpu")
    {"peers": peers, "growth": growth, "measure": measure}[options.part](options)


if __name__ == "__main__":
    main()
