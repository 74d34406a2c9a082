"""Ghost Attention (§3.3): Table 30 over several seeds, and Fig. 9.

python -m bench.ghost seeds [--seeds 1 2 3]      obedience by turn, 100 conversations per group
python -m bench.ghost attention --seeds 1        attention from each answer to the instruction

`attention` also writes out/bench/attention.json.
"""

import math

import torch

from bench import OUT, append_rows, evaluate, parse_args, print_table, run_paper
from data.files import read_json
from data.ghost_attention import instruct_first_message
from evaluate.answers import TURNS, Settings, hold_conversations
from llama2 import apply_rotary_emb, encode_dialog, load, write_json


def obedience(seeds):
    """Table 30: the fraction of conversations in which an answer obeys, and is right, by turn."""
    columns = {}
    for seed in seeds:
        start = run_paper(seed)
        options = ["--count", 100, "--max-new-tokens", 48]
        options += ["--obedience", start / "tinytown/obedience.jsonl"]
        results = evaluate("evaluate.answers", start / "instructed", start / "gatt", *options)
        for when, groups in zip(("before", "after"), results.values()):
            for group, measures in groups.items():
                for measure in ("obey", "right"):
                    row = {f"turn {turn}": x for turn, x in zip(TURNS, measures[measure])}
                    append_rows(columns, {f"{measure}, {group}, {when}": row})
    print_table(f"fraction of conversations, %, seeds {seeds}", columns)


def attention_weights(model, tokens):
    """The attention weights of each layer, [(B, H, T, T), ...], for tokens (B, T).

    The model uses a fused kernel that does not return them, so they are computed again from the
    input of each attention layer.
    """
    weights = []

    def compute_weights(attention, inputs):
        x, freqs_cis = inputs[:2]
        q = apply_rotary_emb(attention.wq(x).unflatten(-1, (-1, attention.head_dim)), freqs_cis)
        k = apply_rotary_emb(attention.wk(x).unflatten(-1, (-1, attention.head_dim)), freqs_cis)
        q, k = q.transpose(1, 2), k.transpose(1, 2)  # (B, H, T, hd), (B, K, T, hd)
        k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)  # (B, H, T, hd)
        scores = q @ k.transpose(2, 3) * attention.head_dim**-0.5  # (B, H, T, T)
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        weights.append(scores.masked_fill(future, -math.inf).softmax(-1))

    hooks = [layer.attention.register_forward_pre_hook(compute_weights) for layer in model.layers]
    model.hidden(tokens)
    for hook in hooks:
        hook.remove()
    return weights


def attention_to_instruction(model, tok, instruction: str, turns) -> list[float]:
    """For each turn, the largest attention weight from its answer to the instruction (Fig. 9).

    The maximum is over layers, heads, tokens of the answer and tokens of the instruction. turns:
    [(question, answer), ...]; the instruction is in the first message.
    """
    messages = instruct_first_message(instruction, turns)
    first = len(tok.encode("[INST]", bos=True))
    last = len(tok.encode(f"[INST] {instruction}", bos=True))
    with torch.inference_mode():
        weights = attention_weights(model, torch.tensor([encode_dialog(tok, messages)[0]]))
    largest = torch.stack(weights).amax((0, 1, 2))  # (T, T)
    by_turn = []
    for turn in range(len(turns)):
        start = len(encode_dialog(tok, messages[: 2 * turn + 1])[0])
        end = len(encode_dialog(tok, messages[: 2 * turn + 2])[0])
        # Minus 1: each token of the answer is predicted at the position before its own.
        by_turn.append(largest[start - 1 : end - 1, first:last].max().item())
    return by_turn


def attention(seeds):
    """Fig. 9: attention to the instruction by turn, with and without Ghost Attention.

    Writes {column: [[weight at each turn] of each conversation, of all seeds]}.
    """
    columns, weights = {}, {}
    for seed in seeds:
        start = run_paper(seed)
        records = [record for _, record in read_json(start / "tinytown/obedience.jsonl")][:40]
        model, tok = load(start / "gatt")
        answers = hold_conversations(model, tok, records, Settings(max_new_tokens=48))
        for name, folder in (("with", "gatt"), ("without", "instructed")):
            model, tok = load(start / folder)  # both models read the same conversations
            by_turn = []
            for record, texts in zip(records, answers):
                questions = [prompt["prompt"] for prompt in record["prompts"]]
                turns = list(zip(questions, texts))
                if texts[-1]:  # an empty answer: the context was full before the last turn
                    by_turn.append(
                        attention_to_instruction(model, tok, record["instruction"], turns)
                    )
            means = torch.tensor(by_turn).mean(0).tolist()
            row = {f"turn {turn}": means[turn - 1] for turn in TURNS}
            append_rows(columns, {f"{name} Ghost Attention": row})
            weights.setdefault(f"{name} Ghost Attention", []).extend(by_turn)
    print_table("largest attention to the instruction", columns, "{:.2f}", scale=1)
    write_json(OUT / "attention.json", weights)


def main():
    parts = {"seeds": obedience, "attention": attention}
    part, seeds = parse_args(__doc__, parts)
    parts[part](seeds)


if __name__ == "__main__":
    main()
