"""RLHF (§3.2.3, §3.4): prompts and reward models -> V1 .. V4 by rejection sampling, V5 by PPO.

    Rc = Rs if the prompt is about safety or Rs < 0.15, else Rh;    R~c = whiten(logit(Rc))
    R  = R~c - beta KL(policy || reference)                                     (Eq. 3 and 4)

Rs and Rh are sigmoids of the two models' scores. Rejection sampling draws K answers a prompt, and
fine-tunes on the best of this and all earlier versions. PPO starts from the last such version, its
frozen reference. Before each version but the first, the newest models answer fresh prompts, the
annotator compares, and the reward models learn from it, so that they stay on distribution.

    python train_rlhf.py                                  all of that on Tinytown, and a scoreboard
    python train_rlhf.py --method scoreboard              the scoreboard alone
    python train_rlhf.py --method rejection-sampling --prompts FILE --init .. --rm .. --out ..
    python train_rlhf.py --method ppo                --prompts FILE --init .. --rm .. --out ..
    python train_rlhf.py --distill-from out/rlhf/v4 --init SMALLER --out ..   on its best samples

Prompts: {"prompt": text or messages, "is_safety": true or false}. With --prompts no annotator is
at hand: --labels gives a file of preferences a version; without, the reward models do not change.
Differs from the paper: each version is tuned from the one before; the value model is a copy of the
helpfulness model (the paper does not say); beta and the learning rate are a small model's.
"""
import contextlib
import copy
import json
import math
import random
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

import train_rm as rm
import train_sft as sft
from tinytown import world as tinytown
from llama2 import (Log, RewardModel, Transformer, adamw, all_sum, as_messages, autocast,
                    begin_run, by_length, check_same_settings, encode_dialog, end_run, everyones,
                    generate_batches, load, open_run, processes, read_json, require, run_script,
                    save, save_resume, score_rows, setup, text_after, wilson, write_json,
                    write_summary)


@dataclass
class Settings:
    init: str = "out/sft"       # chat model to start from
    rm: str = "out/rm"          # folder of the reward models, helpfulness and safety
    base: str = "out/pretrain"  # for the scoreboard alone; none: leave it out
    prompts: str = ""           # .jsonl of {"prompt", "is_safety"}; none: Tinytown's
    labels: tuple = ()          # with --prompts: a file of preferences a version, V2 first
    out: str = "out/rlhf"       # folder of the run: v1, v2, ... stand in it
    scoreboard: str = "out/scoreboard.json"     # where the scoreboard is written
    method: str = "all"         # all, rejection-sampling, ppo or scoreboard
    distill_from: str = ""      # a version's folder: fine-tune --init on its best samples, and stop
    resume: bool = False        # go on where it stopped; finished versions are kept
    overwrite: bool = False     # replace what --out holds
    versions: int = 4           # by rejection sampling, before PPO (paper: 4)
    prompts_a_version: int = 320        # rejection sampling: prompts
    samples: int = 8            # K, answers to each (paper: 10 to 100)
    temperatures: tuple = (0.5, 0.7)  # tried on an eighth of the prompts (Fig. 8)
    pool: str = "all"           # fine-tune on the best of all versions, or of the last alone
    tune_lr: float = 1e-4       # rejection sampling: peak learning rate of the fine-tuning
    tune_epochs: float = 1.0    # passes over the pool
    tune_batch: int = 2         # packed sequences a step
    pairs: int = 1000           # fresh comparisons before each version but the first; 0: none
    replay: float = 2.0         # earlier comparisons to one fresh one, learned from with them
    rm_lr: float = 3e-4         # peak learning rate of the reward models' refreshment
    rm_batch: int = 16          # pairs a step of it
    iterations: int = 60        # PPO: at most (paper: 200 to 400); 0: no PPO
    batch_size: int = 128       # prompts an iteration, over all processes
    mini_batch: int = 32        # answers a gradient step
    micro_batch: int = 16       # answers a forward pass of one process, at most
    temperature: float = 1.0    # of PPO's answers and log-probabilities, and of the scoreboard
    max_new_tokens: int = 90    # of an answer
    beta: float = 0.5           # weight of the KL penalty (paper: 0.005 for 34B and 70B)
    clip_eps: float = 0.2       # PPO's clip of the ratio, and of the values
    gamma: float = 1.0          # discount
    lam: float = 0.95           # of GAE
    unfinished_penalty: float = 1.0     # off the whitened reward of an answer without EOS
    lr: float = 5e-5            # of the policy, constant
    value_lr: float = 2e-4      # of the value model, constant
    weight_decay: float = 0.1   # on matrices
    beta1: float = 0.9          # AdamW
    beta2: float = 0.95         # AdamW
    eps: float = 1e-5           # AdamW
    grad_clip: float = 1.0      # largest norm of the gradient
    eval_every: int = 10        # iterations between looks at held-out prompts
    patience: int = 3           # such looks without a gain before PPO stops
    save_every: int = 10        # iterations between saves to resume from
    seed: int = 1               # of the town, the prompts, the sampling and the order
    device: str = "auto"        # cuda, mps or cpu


PAPER = dict(samples=100, temperatures=(1.0, 1.1, 1.2, 1.3), tune_lr=2e-5, tune_epochs=2.0,
             tune_batch=64, rm_lr=1e-5, rm_batch=512, iterations=400, batch_size=512,
             mini_batch=64, micro_batch=1, max_new_tokens=1024, beta=0.01, clip_eps=0.2, lr=1e-6,
             value_lr=1e-6, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-5, grad_clip=1.0)
METHODS = ("all", "rejection-sampling", "ppo", "scoreboard")
GATE = math.log(0.15 / 0.85)    # the score whose sigmoid is 0.15
VALIDATION = 256                # prompts held out for early stopping, at most a tenth of a file's
HELD_OUT_OF_A_KIND = 120        # Tinytown: prompts of the scoreboard, where there are as many


# ---------------------------------------------------------------------------------------- rewards
def combined_reward(helpfulness, safety, is_safety):
    """(logit(Rc), where it is Rs) of raw scores and tags, all (N,). §3.2.3.

    logit(sigmoid(score)) is the score: no probability is formed, so none rounds to 0 or 1.
    """
    gated = is_safety | (safety < GATE)
    return torch.where(gated, safety, helpfulness), gated


def masked_mean(x, mask):
    """The mean of x where mask is True, over all processes."""
    total, count = all_sum(torch.stack([(x * mask).sum(), mask.sum().to(x)]))
    return total / count.clamp(min=1)


def whiten(x, mask=None):
    """x, with mean 0 and variance 1 where mask is True, over all processes; 0 elsewhere."""
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean).square(), mask)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def judge_rows(judges, rows, is_safety):
    """(logit(Rc), Rh's score, Rs's score, where Rc is Rs), each (N,), of whole token lists."""
    scores = [torch.tensor(score_rows(model, rows)) for model in judges]
    helpfulness, safety = scores[0], scores[-1]     # no safety model: helpfulness alone
    reward, gated = combined_reward(helpfulness, safety, torch.tensor(is_safety, dtype=torch.bool))
    return reward, helpfulness, safety, gated


def load_judges(folder, device):
    """[helpfulness, safety], or [helpfulness] where there is no safety model."""
    kinds = [kind for kind in rm.KINDS if kind == "helpfulness" or (Path(folder) / kind).exists()]
    return [load(Path(folder) / kind, device, kind=RewardModel)[0] for kind in kinds]


# ---------------------------------------------------------------------------------------- prompts
def read_prompts(records, tok, context: int) -> list[dict]:
    """(where, record) pairs -> [{"messages", "tokens", "is_safety", ...}, ...]; ValueError."""
    prompts = []
    for where, record in records:
        try:
            if not isinstance(record, dict) or "prompt" not in record:
                raise ValueError('expected an object with a "prompt"')
            if not isinstance(record.get("is_safety", False), bool):
                raise ValueError('"is_safety" is neither true nor false')
            messages = as_messages(record["prompt"])
            tokens = encode_dialog(tok, messages)[0]
        except ValueError as e:
            raise ValueError(f"{where}: {e}; mend it") from None
        if len(tokens) < context:       # else no answer fits
            prompts.append(dict(record, messages=messages, tokens=tokens,
                                is_safety=record.get("is_safety", False)))
    if not prompts:
        raise ValueError(f"no prompt is shorter than the context of {context} tokens")
    return prompts


def read_given(config, tok, context: int):
    """The prompts of --prompts, None without; all of --labels is checked before any training."""
    for file in config.labels:
        if not rm.read_pairs(read_json(file), tok, context)[0]:
            raise ValueError(f"{file}: no pair to learn from")
    return read_prompts(read_json(config.prompts), tok, context) if config.prompts else None


def draw_prompts(config, version: int, count: int, tok, context: int, given=None) -> list[dict]:
    """`count` prompts for a version (0: held out for early stopping): other ones each time."""
    if given is None:
        asked = tinytown.preference_prompts(tinytown.town(config.seed), count,
                                            1000 * config.seed + 10 + version)
        return read_prompts((("Tinytown", record) for record in asked), tok, context)
    prompts = given[:]
    random.Random(config.seed).shuffle(prompts)
    held_out = min(VALIDATION, math.ceil(len(prompts) / 10)) if len(prompts) > 1 else 0
    rest = prompts[held_out:]
    return prompts[:held_out] if version == 0 else random.Random(
        f"{config.seed} {version}").sample(rest, min(count, len(rest)))


def sample_answers(model, prompts, temperature, config, seed, eos_id, count=1) -> list[list[int]]:
    """The ids of `count` answers to each prompt, one behind the other."""
    repeated = [p["tokens"] for p in prompts for _ in range(count)]
    return generate_batches(model, repeated, config.max_new_tokens, temperature, seed, eos_id)


# ----------------------------------------------------------------------------- rejection sampling
def best_of(answers, rewards, eos_id) -> int:
    """Which of a prompt's answers to keep: the highest reward, of the finished if there are any."""
    return max(range(len(answers)), key=lambda i: (answers[i][-1:] == [eos_id], rewards[i]))


def sample_best(policy, tok, judges, prompts, temperature, config, seed):
    """([best sample of each prompt, None if all are cut off], rewards (N, K))."""
    K = config.samples
    answers = sample_answers(policy, prompts, temperature, config, seed, tok.eos_id, K)
    repeated = [p for p in prompts for _ in range(K)]
    rewards = judge_rows(judges, [p["tokens"] + ids for p, ids in zip(repeated, answers)],
                         [p["is_safety"] for p in repeated])[0].view(-1, K)     # (N, K)
    answers = [answers[at:at + K] for at in range(0, len(answers), K)]
    best = []
    for prompt, several, row in zip(prompts, answers, rewards.tolist()):
        ids = several[best_of(several, row, tok.eos_id)]
        best.append(dict(prompt=prompt["prompt"], is_safety=prompt["is_safety"], ids=ids,
                         answer=text_after(tok, prompt["tokens"], ids), tokens=prompt["tokens"])
                    if ids[-1] == tok.eos_id else None)
    return best, rewards


def choose_temperature(policy, tok, judges, prompts, config, seed) -> tuple[float, dict]:
    """(a temperature, {temperature: mean reward of the best of K}) by a sweep (Fig. 8).

    Ours: of those whose best of K is within a standard error of the highest, the coolest. At equal
    reward, fewer of its samples are good by a reward model's mistake alone.
    """
    maxima = {}
    for temperature in sorted(map(float, config.temperatures)):
        rewards = sample_best(policy, tok, judges, prompts, temperature, config, seed)[1]
        maxima[temperature] = torch.tensor(everyones(rewards.amax(1).tolist()))      # (N,)
    best = max(maxima.values(), key=lambda some: some.mean().item())
    for temperature, some in maxima.items():
        behind = best - some
        if behind.mean() <= behind.std(correction=0) / len(behind) ** 0.5:
            return temperature, {t: some.mean().item() for t, some in maxima.items()}


def pool_of(best, earlier, judges) -> list[dict]:
    """The best sample of each prompt, of this and all earlier versions, by today's judges."""
    records = [record for some in earlier for record in some] + best
    rewards = judge_rows(judges, [r["tokens"] + r["ids"] for r in records],
                         [r["is_safety"] for r in records])[0].tolist()
    pool = {}
    for record, reward in zip(records, rewards):
        key = json.dumps(record["prompt"])
        if key not in pool or reward > pool[key]["reward"]:
            pool[key] = dict(record, reward=reward)
    return list(pool.values())


def tune(model, records, config, seed, log=None):
    """SFT's own step on samples, their ids as they were sampled."""
    examples = [(r["tokens"] + r["ids"], [0] * len(r["tokens"]) + [1] * len(r["ids"]))
                for r in records]
    settings = sft.Settings(seq_len=model.args.max_seq_len, batch_size=config.tune_batch,
                            micro_batch=min(config.tune_batch, 4), epochs=config.tune_epochs,
                            lr=config.tune_lr, seed=seed)
    steps = len(sft.plan(examples, settings))
    return sft.finetune(model, examples, replace(settings, log_every=max(1, steps // 2)),
                        log(steps) if log else None)


def rejection_sampling(policy, tok, judges, prompts, config, seed, earlier=(), log=None) -> dict:
    """One version, in place; returns its best samples, its pool and figures."""
    rank, world = processes()
    mine = prompts[rank::world]
    few = mine[:max(1, len(mine) // 8)]
    temperature, sweep = choose_temperature(policy, tok, judges, few, config, seed + rank)
    best, rewards = sample_best(policy, tok, judges, mine, temperature, config,
                                seed + 10 ** 6 * (1 + rank))
    best, rewards = everyones(best), torch.tensor(everyones(rewards.tolist()))
    best = [record for record in best if record]
    if not best:
        raise ValueError(f"no answer of {config.init} ended within --max-new-tokens "
                         f"{config.max_new_tokens}: give it more, or fine-tune it first")
    pool = pool_of(best, earlier if config.pool == "all" else (), judges)
    loss = tune(policy, pool, config, seed, log)
    return dict(best=best, pool=pool, figures=dict(
        temperature=temperature, sweep=sweep, max=rewards.amax(1).mean().item(),
        median=rewards.median(1).values.mean().item(), prompts=len(prompts), pool=len(pool),
        unfinished=len(prompts) - len(best), loss=loss))


# ---------------------------------------------------------------------------- fresh preferences
def fresh_pairs(config, version, newest, tok, context):
    """Records of preferences for a version: the annotator's, of the newest models, or a file's."""
    if config.prompts:
        return [record for _, record in read_json(config.labels[version - 2])]
    rank, world = processes()
    asked = tinytown.preference_prompts(tinytown.town(config.seed), config.pairs,
                                        1000 * config.seed + 100 + version)
    answers = everyones(rm.collect(newest, tok, [a["prompt"] for a in asked][rank::world],
                                      (0.7, 1.0, 1.2), 1000 * config.seed + 100 * version + rank))
    rng = random.Random(f"annotator {config.seed} {version}")
    return [tinytown.compare(rng, a, *two) for a, two in zip(asked, answers)]


def refresh(judges, tok, records, earlier, config, seed) -> dict:
    """Go on training the reward models, in place, on fresh pairs and some earlier ones.

    Returns their accuracy on the fresh pairs before that: they have not seen one of them.
    """
    context = judges[0].args.max_seq_len
    fresh = rm.read_pairs((("fresh pairs", r) for r in records), tok, context)[0]
    count = min(len(earlier), round(config.replay * len(records)))
    earlier = random.Random(seed).sample(earlier, count)
    pairs = fresh + rm.read_pairs((("earlier pairs", r) for r in earlier), tok, context)[0]
    settings = rm.Settings(lr=config.rm_lr, batch_size=config.rm_batch,
                           micro_batch=min(config.rm_batch, 8), seed=seed)
    figures = {}
    for kind, judge in zip(rm.KINDS, judges):
        own = [p for p in fresh if p["kind"] == kind]
        if own:
            right = rm.accuracy(own, rm.scores_of(judge, own))
            figures[kind] = {group: share / n for group, (share, n) in right.items()}
            rm.train_reward_model(judge, rm.mix(pairs, kind, seed), kind, settings)
    return figures


# -------------------------------------------------------------------------------------------- PPO
# What stands where, for a prompt of 3 tokens and an answer of 3, the last of them EOS:
#
#     position        0     1     2     3     4     5
#     token          BOS    p     p     r1    r2   EOS
#     predicts        p     p     r1    r2   EOS               logit t is of token t + 1
#     value                       v1    v2    v3               before its token: V(s), s without it
#     reward                     -kl   -kl   -kl + R           R on the answer's last token
#
# Below, all is cut to the answers: (B, R), column 0 an answer's first token, right of it padding,
# where the response_mask is False. Nothing there counts anywhere.
def answer_positions(rows, starts, R, device):
    """tokens (B, T), where the R predictions of an answer are read (B, R), answer ids (B, R)."""
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    starts = torch.tensor(starts)[:, None]                                      # (B, 1)
    at = (starts - 1 + torch.arange(R)).clamp(max=tokens.size(1) - 2)           # (B, R)
    return tokens.to(device), at.to(device), tokens.gather(1, at + 1).to(device)


def policy_terms(model, rows, starts, R, temperature):
    """(logprobs, entropy), one tensor (2, B, R), of the answers in rows, which begin at starts."""
    device = next(model.parameters()).device
    tokens, at, ids = answer_positions(rows, starts, R, device)
    with autocast(device):
        logits = model(tokens[:, :-1])                                          # (B, T - 1, V)
    logits = logits.gather(1, at[..., None].expand(-1, -1, logits.size(-1)))    # (B, R, V)
    logprobs = (logits.float() / temperature).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)                              # (B, R)
    return torch.stack([logprobs.gather(-1, ids[..., None]).squeeze(-1), entropy])


def values_of(model, rows, starts, R):
    """values (B, R): V of what stands before each token of the answers."""
    device = next(model.parameters()).device
    tokens, at, _ = answer_positions(rows, starts, R, device)
    with autocast(device):
        values = model(tokens[:, :-1])                                          # (B, T - 1)
    return values.float().gather(1, at)                                         # (B, R)


def token_rewards(scores, kl, mask, beta):
    """rewards (B, R): -beta kl a token, and scores (B,) on each answer's last. Eq. 4."""
    rewards = -beta * kl * mask
    last = mask.sum(1, keepdim=True) - 1                                        # (B, 1)
    return rewards.scatter_add(1, last, scores[:, None])


def gae(rewards, values, mask, gamma: float, lam: float):
    """advantages (B, R): lam-discounted sums of the value model's errors; V behind the end is 0."""
    advantages = torch.zeros_like(rewards)
    behind = next_value = torch.zeros_like(rewards[:, 0])                       # (B,)
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        behind = (delta + gamma * lam * behind) * mask[:, t]
        advantages[:, t] = behind
        next_value = values[:, t] * mask[:, t]
    return advantages


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps: float):
    """(sum of -min(ratio A, clip(ratio) A) over the answers' tokens, the ratios); all (B, R)."""
    ratio = ((logprobs - old_logprobs) * mask).exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return -(torch.minimum(ratio * advantages, clipped * advantages) * mask).sum(), ratio


def value_loss(values, old_values, returns, mask, clip_eps: float):
    """Half the sum of squared errors: of the values, or of them kept near the old, if worse."""
    near = old_values + (values - old_values).clamp(-clip_eps, clip_eps)
    worse = torch.maximum((values - returns).square(), (near - returns).square())
    return 0.5 * (worse * mask).sum()


@torch.no_grad()
def roll_out(policy, reference, value_model, judges, tok, prompts, config, seed):
    """Answers to prompts and all that an update takes: (batch of tensors, statistics, texts)."""
    device, clock = next(policy.parameters()).device, [time.time()]
    answers = sample_answers(policy, prompts, config.temperature, config, seed, tok.eos_id)
    clock.append(time.time())
    rows, starts = [p["tokens"] + a for p, a in zip(prompts, answers)], [len(p["tokens"])
                                                                       for p in prompts]
    reward, helpful, safe, gated = (x.to(device) for x in judge_rows(
        judges, rows, [p["is_safety"] for p in prompts]))                       # (B,) each
    clock.append(time.time())
    lengths = torch.tensor([len(a) for a in answers], device=device)            # (B,)
    R = int(lengths.max())
    mask = torch.arange(R, device=device) < lengths[:, None]                    # (B, R)

    old, entropy, past, values = torch.zeros(4, len(rows), R, device=device)     # (B, R) each
    for part in by_length(range(len(rows)), rows, 4 * config.micro_batch):
        r = int(lengths[part].max())
        some = [rows[i] for i in part], [starts[i] for i in part], r
        old[part, :r], entropy[part, :r] = policy_terms(policy, *some, config.temperature)
        past[part, :r] = policy_terms(reference, *some, config.temperature)[0]
        values[part, :r] = values_of(value_model, *some)
    kl = (old - past) * mask                                                    # (B, R)
    values *= mask
    finished = torch.tensor([a[-1] == tok.eos_id for a in answers], device=device)
    scores = whiten(reward) - config.unfinished_penalty * ~finished
    rewards = token_rewards(scores, kl, mask, config.beta)                      # (B, R)
    advantages = gae(rewards, values, mask, config.gamma, config.lam)
    returns = advantages + values
    clock.append(time.time())
    everyone = torch.ones_like(reward, dtype=torch.bool)
    residual = masked_mean((returns - values).square(), mask).item()
    spread = (masked_mean(returns.square(), mask) - masked_mean(returns, mask) ** 2).item()
    means = dict(reward=(reward, everyone), helpfulness=(helpful, everyone),
                 safety=(safe, everyone), gated=(gated.float(), everyone),
                 kl=(kl.sum(1), everyone), kl_k1=(kl, mask), kl_k3=(torch.expm1(-kl) + kl, mask),
                 entropy=(entropy, mask), length=(lengths.float(), everyone),
                 eos=(finished.float(), everyone))
    stats = dict(
        **{name: masked_mean(*of).item() for name, of in means.items()},
        explained_variance=1 - residual / max(spread, 1e-8),
        **{f"s_{name}": round(b - a, 2) for name, a, b in
           zip(("generate", "score", "forward"), clock, clock[1:])})
    batch = dict(rows=rows, starts=starts, lengths=lengths.tolist(), mask=mask, old=old,
                 advantages=whiten(advantages, mask), values=values, returns=returns)
    return batch, stats, [text_after(tok, p["tokens"], a) for p, a in zip(prompts, answers)]


def update(engines, optimizers, batch, config, seed) -> dict:
    """One gradient step a mini-batch on policy and value model; returns statistics."""
    world = processes()[1]
    rows, starts, lengths, mask = (batch[key] for key in ("rows", "starts", "lengths", "mask"))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    size = config.mini_batch // world
    sums = torch.zeros(4, device=mask.device)       # policy loss, value loss, clipped, tokens
    first_ratio, skipped = None, 0
    for at in range(0, len(order), size):
        chosen = order[at:at + size]
        count = all_sum(mask[chosen].sum().float())
        parts = by_length(chosen, rows, config.micro_batch)
        for i, part in enumerate(parts):
            R = max(lengths[j] for j in part)
            some, begins = [rows[j] for j in part], [starts[j] for j in part]
            m, old, adv, values, returns = (batch[key][part, :R] for key in (
                "mask", "old", "advantages", "values", "returns"))              # (b, R) each
            with contextlib.ExitStack() as stack:
                for engine in engines if world > 1 and i < len(parts) - 1 else ():
                    stack.enter_context(engine.no_sync())   # once a step is enough
                logprobs, _ = policy_terms(engines[0], some, begins, R, config.temperature)
                loss, ratio = policy_loss(logprobs, old, adv, m, config.clip_eps)
                error = value_loss(values_of(engines[1], some, begins, R), values, returns, m,
                                   config.clip_eps)
                ((loss + error) / count * world).backward()     # two models share no gradient
            outside = ((ratio - 1).abs() > config.clip_eps) & m
            sums += torch.stack([loss.detach(), error.detach(), outside.sum(), m.sum()])
            if first_ratio is None:
                first_ratio = masked_mean(ratio.detach(), m).item()
        for engine, optimizer in zip(engines, optimizers):
            norm = nn.utils.clip_grad_norm_(engine.parameters(), config.grad_clip)
            skipped += not norm.isfinite()
            if norm.isfinite():
                optimizer.step()
            optimizer.zero_grad()
    policy, value, clipped, tokens = all_sum(sums).tolist()
    return dict(loss=policy / tokens, value_loss=value / tokens, clip_fraction=clipped / tokens,
                first_ratio=first_ratio, skipped=int(skipped))


def look(policy, judges, tok, prompts, config) -> dict:
    """{"held_out": mean logit(Rc), "truth": the annotator's points, if known} on prompts."""
    rank, world = processes()
    mine = prompts[rank::world]
    answers = sample_answers(policy, mine, config.temperature, config, 7 + rank, tok.eos_id)
    rewards = judge_rows(judges, [p["tokens"] + a for p, a in zip(mine, answers)],
                         [p["is_safety"] for p in mine])[0].tolist()
    texts = everyones([text_after(tok, p["tokens"], a) for p, a in zip(mine, answers)])
    rewards = everyones(rewards)
    found = dict(held_out=sum(rewards) / len(rewards))
    if not config.prompts:
        found["truth"] = sum(map(tinytown.quality, prompts, texts)) / len(prompts)
    return found


def ppo(policy, tok, judges, prompts, held_out, config, log=None, state=None, keep=None):
    """PPO (Eq. 3 and 4), in place, from the policy as it is; ends as it was best on held_out.

    judges: [helpfulness, ...]; state is what keep(**state) was given: with it, training goes on as
    if it had never stopped, for what an iteration samples depends on the seed and its number alone.
    """
    rank, world = processes()
    reference, value_model = copy.deepcopy(policy), copy.deepcopy(judges[0])
    models = [policy, value_model]
    optimizers = [adamw(model, lr, config.weight_decay, config.beta1, config.beta2, config.eps)
                  for model, lr in zip(models, (config.lr, config.value_lr))]
    first, best, best_weights, since = 0, None, None, 0
    if state:
        reference.load_state_dict(state["reference"])
        for thing, was in zip(models + optimizers, state["things"]):
            thing.load_state_dict(was)
        first, best, best_weights, since = (state[k] for k in ("step", "best", "weights", "since"))
    elif held_out:
        best = look(policy, judges, tok, held_out, config)
        best_weights = copy.deepcopy(policy.state_dict())
        if log:
            log.write(0, **best)
    engines = [DistributedDataParallel(m) if world > 1 else m for m in models]
    n, order = len(prompts), []
    for epoch in range(math.ceil(config.iterations * config.batch_size / n)):
        order += random.Random(f"{config.seed} {epoch}").sample(range(n), n)
    for step in range(first, config.iterations):
        some = [prompts[i] for i in order[step * config.batch_size:][:config.batch_size]]
        seed = 1000 * config.seed + 10 ** 5 * step
        batch, stats, texts = roll_out(policy, reference, value_model, judges, tok,
                                       some[rank::world], config, seed + rank)
        began = time.time()
        stats |= update(engines, optimizers, batch, config, seed)
        stats["s_train"], done = round(time.time() - began, 2), step + 1
        if held_out and (done % config.eval_every == 0 or done == config.iterations):
            found = look(policy, judges, tok, held_out, config)
            stats |= found
            since += 1
            if best is None or found["held_out"] > best["held_out"]:
                best, best_weights, since = found, copy.deepcopy(policy.state_dict()), 0
            if log and not log.quiet:
                print("".join(f"    {p['messages'][-1]['content']}\n        {text}\n"
                              for p, text in list(zip(some[rank::world], texts))[:2]), end="")
        if log:
            log.progress(done, stats.pop("loss"), config.lr, sum(map(len, batch["rows"])) * world,
                         ("reward", "kl", "length", "held_out", "truth"), **stats)
        stop = since >= config.patience
        if keep and not stop and done % config.save_every == 0:
            keep(step=done, best=best, weights=best_weights, since=since,
                 reference=reference.state_dict(),
                 things=[thing.state_dict() for thing in models + optimizers])
        if stop:
            break
    if best_weights:
        policy.load_state_dict(best_weights)
    policy.eval()
    return best or {}


# ------------------------------------------------------------------------------------- scoreboard
def compared(asked, answers, others, seed) -> dict:
    """Three annotators' majority: {"win rate" (ties half), "interval", "ac2"} against others."""
    rngs, wins, items = [random.Random(f"judge {seed} {i}") for i in range(3)], 0.0, []
    for prompt, a, b in zip(asked, answers, others):
        votes = [tinytown.on_scale(tinytown.compare(rng, prompt, a, b), a) - 3 for rng in rngs]
        lead = sum((v > 0) - (v < 0) for v in votes)    # negligibly better is a tie
        wins += 0.5 if a == b or not lead else lead > 0
        items.append([v + 3 for v in votes])
    return {"win rate": wins / len(asked), "interval": wilson(wins, len(asked)),
            "ac2": tinytown.gwet_ac2(items, 7)}


def judged(model, tok, judges, asked, ids, sft_model, config) -> dict:
    """One row of the scoreboard but for what compares it with SFT."""
    texts = [text_after(tok, p["tokens"], a) for p, a in zip(asked, ids)]
    verdicts = [(p["kind"], tinytown.judge(p, text)) for p, text in zip(asked, texts)]

    def share(kinds, key, value=True):
        found = [v[key] is value for kind, v in verdicts if kind in kinds]
        return sum(found) / len(found)
    rows, starts = [p["tokens"] + a for p, a in zip(asked, ids)], [len(p["tokens"]) for p in asked]
    kl = 0.0
    with torch.no_grad():
        for part in by_length(range(len(rows)), rows, 64):
            some = ([rows[i] for i in part], [starts[i] for i in part],
                    max(len(ids[i]) for i in part))
            new, old = (policy_terms(m, *some, config.temperature)[0] for m in (model, sft_model))
            mask = torch.arange(some[2]) < torch.tensor([len(ids[i]) for i in part])[:, None]
            kl += ((new - old) * mask.to(new.device)).sum().item()
    return dict(texts=texts, scores=[score_rows(judge, rows) for judge in judges],
                helpfulness=sum(map(tinytown.quality, asked, texts)) / len(asked),
                correct=share(("fact", "sum", "story", "borderline"), "correct"),
                violations=share(("unsafe",), "safe", False),
                false_refusals=share(("borderline",), "refused"),
                length=sum(map(len, ids)) / len(ids), distinct=len(set(texts)) / len(texts),
                kl=kl / len(ids), by_kind={kind: share((kind,), "correct") for kind in
                                           tinytown.KINDS})


def scoreboard(config, folders: dict, judges, device) -> tuple[list[str], dict]:
    """(lines, figures) of models on held-out prompts, greedy and sampled: {name: folder}."""
    models = {name: load(folder, device, kind=Transformer) for name, folder in folders.items()}
    sft_model, tok = models["SFT"]
    asked = read_prompts((("Tinytown", p) for p in tinytown.held_out_prompts(
        tinytown.town(config.seed), HELD_OUT_OF_A_KIND)), tok, sft_model.args.max_seq_len)
    lines, figures = [f"{len(asked)} held-out prompts, judged by the truth"], {}
    for mode, temperature in (("greedy", 0.0), (f"sampled at T={config.temperature}",
                                                config.temperature)):
        rows = {}
        for name, (model, _) in models.items():
            ids = sample_answers(model, asked, temperature, config, 1, tok.eos_id)
            rows[name] = judged(model, tok, judges, asked, ids, sft_model, config)
        sft_row = rows["SFT"]
        for name, row in rows.items():
            row |= compared(asked, row["texts"], sft_row["texts"], config.seed)
            for kind, mine, other in zip(rm.KINDS, row["scores"], sft_row["scores"]):
                row[f"{kind} model"] = sum((a > b) + (a == b) / 2
                                           for a, b in zip(mine, other)) / len(mine)
        lines += ["", f"{mode:<17}" + "".join(f"{name:>{width}}" for name, _, width in COLUMNS)]
        for name, row in rows.items():
            cells = [form(row[key]) if key in row else "-" for _, (key, form), _ in COLUMNS]
            lines.append(f"{name:<17}" + "".join(
                f"{cell:>{width}}" for cell, (_, _, width) in zip(cells, COLUMNS)))
            del row["texts"], row["scores"]
        figures[mode.split()[0]] = rows
    return lines, figures


PERCENT, POINTS = "{:.1%}".format, "{:.2f}".format
COLUMNS = [     # heading, (what of a row, how it is written), width
    ("of 4.5 pts", ("helpfulness", POINTS), 11), ("win/SFT", ("win rate", PERCENT), 9),
    ("95% interval", ("interval", lambda i: f"{i[0]:.0%} to {i[1]:.0%}"), 14),
    ("AC2", ("ac2", POINTS), 6), ("by Rh", ("helpfulness model", PERCENT), 8),
    ("by Rs", ("safety model", PERCENT), 8), ("correct", ("correct", PERCENT), 9),
    ("violations", ("violations", PERCENT), 12), ("false ref.", ("false_refusals", PERCENT), 12),
    ("length", ("length", "{:.1f}".format), 8), ("distinct", ("distinct", PERCENT), 10),
    ("KL/SFT", ("kl", POINTS), 8)]


# ------------------------------------------------------------------------------------------- main
def check(config, world):
    require(config, ("prompts_a_version", "samples", "tune_lr", "tune_epochs", "tune_batch",
                     "rm_lr", "rm_batch", "batch_size", "mini_batch", "micro_batch",
                     "temperature", "max_new_tokens", "clip_eps", "lr", "value_lr", "grad_clip",
                     "eval_every", "patience", "save_every"),
            gamma=(0, 1.001), lam=(0, 1.001), **{name: (0, math.inf) for name in (
                "versions", "iterations", "pairs", "replay", "beta", "unfinished_penalty")})
    if config.method not in METHODS:
        raise ValueError(f"--method {config.method}: expected one of {', '.join(METHODS)}")
    if config.pool not in ("all", "last"):
        raise ValueError(f"--pool {config.pool}: expected all or last")
    if config.batch_size % config.mini_batch or config.mini_batch % world:
        raise ValueError(f"--batch-size {config.batch_size} must be divisible by --mini-batch "
                         f"{config.mini_batch}, and that by the number of processes, {world}")
    if config.labels and not config.prompts:
        raise ValueError("--labels needs --prompts: on Tinytown the annotator gives the labels")


def one_version(config, method, folder, version, policy, tok, judges, earlier, given) -> dict:
    """Train a version in place by one method into its folder, unsaved; returns its figures."""
    rank, context = processes()[0], policy.args.max_seq_len
    folder, state = open_run(replace(config, out=str(folder)))
    if rank == 0 and not state:
        begin_run(folder, config)
    if method == "rejection-sampling":
        prompts = draw_prompts(config, version, config.prompts_a_version, tok, context, given)
        done = rejection_sampling(policy, tok, judges, prompts, config,
                                  10 ** 7 * config.seed + 10 ** 4 * version, earlier,
                                  lambda steps: Log(folder, steps, quiet=rank > 0))
        if rank == 0:
            tinytown.write_records(folder / "best.jsonl", done["best"])
            tinytown.write_records(folder / "pool.jsonl", done["pool"])
        return done["figures"]
    prompts = draw_prompts(config, version, config.batch_size * config.iterations, tok, context,
                           given)
    held_out = draw_prompts(config, 0, VALIDATION, tok, context, given)
    log = Log(folder, config.iterations, state["step"] if state else 0, quiet=rank > 0)
    return ppo(policy, tok, judges, prompts, held_out, config, log, state,
               keep=lambda **s: save_resume(folder, **s) if rank == 0 else None)


def run_versions(config, out, device, rank, world, say):
    """V1, V2, ..., each in its folder; those that are finished are not run again."""
    policy, tok = load(config.init, device, kind=Transformer)
    judges, older, earlier = load_judges(config.rm, device), policy, []
    given = read_given(config, tok, policy.args.max_seq_len)
    open_versions(config, out, rank, world)         # all that is given can be read: now make way
    seen = Path(config.rm) / "preferences.jsonl"
    seen = [record for _, record in read_json(seen)] if seen.exists() else []
    for version in range(1, config.versions + 1 + (config.iterations > 0)):
        folder, began, figures = out / f"v{version}", time.time(), {}
        method = "ppo" if version > config.versions else "rejection-sampling"
        finished = (folder / "consolidated.00.pth").exists()
        older, policy = policy, (load(folder, device)[0] if finished else copy.deepcopy(policy))
        files = {name: folder / f"{name}.jsonl" for name in ("preferences", "best")}
        if finished:
            say(f"V{version} is finished")
            judges = load_judges(folder / "rm", device) if (folder / "rm").exists() else judges
        else:
            say(f"\nV{version}, by {method}: {policy.args.max_seq_len} tokens, {device}")
            labelled = len(config.labels) > version - 2 if config.prompts else config.pairs
            if version > 1 and labelled:
                records = fresh_pairs(config, version, (older, policy), tok,
                                      policy.args.max_seq_len)
                figures["reward models"] = refresh(judges, tok, records, seen, config, version)
                say("reward models, on the fresh pairs that they learn from next: " + ", ".join(
                    f"{kind} {row['all']:.1%}" for kind, row in figures["reward models"].items()))
                if rank == 0:
                    folder.mkdir(parents=True, exist_ok=True)
                    tinytown.write_records(files["preferences"], records)
                    for kind, judge in zip(rm.KINDS, judges):
                        save(folder / "rm" / kind, judge, tok)
            figures |= one_version(config, method, folder, version, policy, tok, judges, earlier,
                                   given)
            figures["seconds"] = time.time() - began
            say(f"V{version}: " + ", ".join(f"{name} {value:.3g}" for name, value in figures.items()
                                            if isinstance(value, float | int)))
            if rank == 0:
                write_json(folder / "figures.json", figures)
                save(folder, policy, tok)
                (folder / "resume.pt").unlink(missing_ok=True)
            if world > 1:
                dist.barrier()
        if files["preferences"].exists():
            seen += [record for _, record in read_json(files["preferences"])]
        if files["best"].exists():
            earlier.append([record for _, record in read_json(files["best"])])


def open_versions(config, out, rank, world):
    """Make way for a run of all versions, or refuse to: nothing is lost unasked."""
    if (out / "config.json").exists() and not config.overwrite:
        if not config.resume:
            raise ValueError(f"{out} holds a run: --resume it, choose another --out, or "
                             "--overwrite it")
        return check_same_settings(out, config)
    if world > 1:
        dist.barrier()      # all have looked before one of them writes
    if rank == 0:
        for folder in [*out.glob("v[0-9]*"), out / "summary.txt"]:
            shutil.rmtree(folder) if folder.is_dir() else folder.unlink(missing_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "config.json", asdict(config))


def score_versions(config, out, device) -> tuple[list[str], dict]:
    """Put base, SFT and the versions in `out` on the scoreboard, by the newest reward models."""
    versions = sorted(folder for folder in out.glob("v[0-9]*")
                      if (folder / "consolidated.00.pth").exists())
    newest = next((f / "rm" for f in reversed(versions) if (f / "rm").exists()), config.rm)
    folders = {} if config.base == "none" else {"base": config.base}
    folders |= {"SFT": config.init} | {f.name.upper(): f for f in versions}
    lines, figures = scoreboard(config, folders, load_judges(newest, device), device)
    Path(config.scoreboard).parent.mkdir(parents=True, exist_ok=True)
    write_json(config.scoreboard, figures)
    return lines, figures


def distill(config, device, rank) -> dict:
    """Fine-tune --init on the best samples of a larger model's version (§3.2.3)."""
    file = Path(config.distill_from) / "pool.jsonl"
    if not file.exists():
        raise ValueError(f"{file}: not there; name the folder of a version made by "
                         "rejection sampling")
    out, _ = open_run(config)
    model, tok = load(config.init, device, kind=Transformer)
    records = []
    for _, record in read_json(file):       # as text: the smaller model's tokenizer may be another
        messages = as_messages(record["prompt"])
        asked = encode_dialog(tok, messages)[0]
        whole = encode_dialog(tok, [*messages, {"role": "assistant", "content": record["answer"]}])
        if len(whole[0]) <= model.args.max_seq_len:
            records.append(dict(tokens=asked, ids=whole[0][len(asked):]))
    if rank == 0:
        begin_run(out, config)
    loss = tune(model, records, config, config.seed,
                lambda steps: Log(out, steps, quiet=rank > 0))
    if rank == 0:
        end_run(out, [f"{config.init} -> {out}: {len(records)} samples of {config.distill_from}, "
                      f"last loss {loss:.3f}"], model, tok)
    return dict(loss=loss)


def main(config: Settings) -> dict:
    """Run what --method says; returns the metrics of the summary."""
    began = time.time()
    device, rank, world = setup(config.device)
    check(config, world)
    out, say = Path(config.out), print if rank == 0 else lambda *_, **__: None
    if config.method == "scoreboard":
        lines, metrics = score_versions(config, out, device)
        print("\n".join(lines))
        return metrics
    if config.distill_from:
        return distill(config, device, rank)
    if config.prompts and not config.labels:
        say("no annotator and no --labels: the reward models stay as they are")
    if config.method != "all":
        policy, tok = load(config.init, device, kind=Transformer)
        figures = one_version(config, config.method, out, 1, policy, tok,
                              load_judges(config.rm, device), (),
                              read_given(config, tok, policy.args.max_seq_len))
        if rank == 0:
            end_run(out, [f"{name}: {value}" for name, value in figures.items()]
                    + [f"{time.time() - began:.0f} s in all"], policy, tok)
        return figures
    if not config.prompts and config.base != "none":
        load(config.base, kind=Transformer)     # the scoreboard needs it: find out now if it cannot
    run_versions(config, out, device, rank, world, say)
    metrics, lines = {}, []
    if rank == 0:
        for folder in sorted(out.glob("v[0-9]*")):
            metrics[folder.name] = json.loads((folder / "figures.json").read_text())
        if not config.prompts:
            lines, metrics["scoreboard"] = score_versions(config, out, device)
        lines += ["", f"{time.time() - began:.0f} s in all"]
        write_summary(out, lines)
    return metrics


if __name__ == "__main__":
    run_script(main, Settings, PAPER)
