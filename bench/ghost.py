"""Ghost Attention (§3.3): Table 30 over seeds, and Fig. 9.

    python -m bench.ghost seeds [--seeds 1 2 3]      obedience by turn, 40 dialogues of each kind
    python -m bench.ghost attention --seeds 1        attention from late turns to the instruction
"""
import math

import torch

from bench import figures, paper, print_table, seeds_of
from data.ghost_attention import instruct_first_message
from data.records import read_json
from evaluate.answers import TURNS, Settings, hold_conversations
from llama2 import apply_rotary_emb, encode_dialog, load


def obedience(seeds):
    columns = {}
    for seed in seeds:
        start = paper(seed)
        found = figures("evaluate.answers", start / "instructed", start / "gatt", "--count", 40,
                        "--max-new-tokens", 48,
                        "--obedience", start / "tinytown/obedience.jsonl")
        for when, groups in zip(("before", "after"), found.values()):
            for group, measures in groups.items():
                for measure, shares in measures.items():
                    row = {f"turn {turn}": share for turn, share in zip(TURNS, shares)}
                    columns.setdefault(f"{measure}, {group}, {when}", []).append(row)
    print_table(f"share of dialogues, %, seeds {seeds}", columns)


def attention_weights(model, tokens):
    """What attention weighs the values with, in each layer: [(B, H, T, T), ...] of tokens (B, T).

    The model's own path never forms them: here they are computed anew, beside it.
    """
    found = []

    def look(attention, inputs):
        x, freqs_cis = inputs[:2]
        q = apply_rotary_emb(attention.wq(x).unflatten(-1, (-1, attention.head_dim)), freqs_cis)
        k = apply_rotary_emb(attention.wk(x).unflatten(-1, (-1, attention.head_dim)), freqs_cis)
        q, k = q.transpose(1, 2), k.transpose(1, 2)             # (B, H, T, hd), (B, K, T, hd)
        k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)                  # (B, H, T, hd)
        scores = q @ k.transpose(2, 3) * attention.head_dim ** -0.5             # (B, H, T, T)
        later = torch.ones_like(scores, dtype=torch.bool).triu(1)
        found.append(scores.masked_fill(later, -math.inf).softmax(-1))

    hooks = [block.attention.register_forward_pre_hook(look) for block in model.layers]
    model.hidden(tokens)
    for hook in hooks:
        hook.remove()
    return found


def looks_back(model, tok, instruction, turns):
    """The largest attention, over all layers and heads, that any token of an answer pays to any
    token of the instruction: a number a turn."""
    messages = instruct_first_message(instruction, turns)
    first = len(tok.encode("[INST]", bos=True))
    last = len(tok.encode(f"[INST] {instruction}", bos=True))
    found = []
    with torch.inference_mode():
        weights = attention_weights(model, torch.tensor([encode_dialog(tok, messages)[0]]))
    most = torch.stack(weights).amax((0, 1, 2))                                 # (T, T)
    for turn in range(len(turns)):
        start = len(encode_dialog(tok, messages[:2 * turn + 1])[0])
        end = len(encode_dialog(tok, messages[:2 * turn + 2])[0])
        found.append(most[start - 1:end - 1, first:last].max().item())      # where it is predicted
    return found


def attention(seeds):
    columns = {}
    for seed in seeds:
        start = paper(seed)
        dialogs = [record for _, record in read_json(start / "tinytown/obedience.jsonl")][:40]
        model, tok = load(start / "gatt")
        answers = hold_conversations(model, tok, dialogs, Settings(max_new_tokens=48))
        for name, folder in (("with", "gatt"), ("without", "instructed")):
            model, tok = load(start / folder)
            by_turn = []
            for dialog, texts in zip(dialogs, answers):     # both read the same dialogues
                asked = [prompt["prompt"] for prompt in dialog["prompts"]]
                if texts[-1]:       # else the context was full
                    by_turn.append(looks_back(model, tok, dialog["instruction"],
                                              list(zip(asked, texts))))
            means = torch.tensor(by_turn).mean(0).tolist()
            row = {f"turn {turn}": means[turn - 1] for turn in TURNS}
            columns.setdefault(f"{name} Ghost Attention", []).append(row)
    print_table("largest attention to the instruction", columns, "{:.2f}", scale=1)


def main():
    parts = {"seeds": obedience, "attention": attention}
    part, seeds = seeds_of(__doc__, parts)
    parts[part](seeds)


if __name__ == "__main__":
    main()
