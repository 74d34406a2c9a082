"""Convert checkpoints from and to Hugging Face's format, for language and reward models.

    python -m common.huggingface import HF_FOLDER FOLDER    theirs -> ours, which is Meta's
    python -m common.huggingface export FOLDER HF_FOLDER    ours -> theirs

A converted model gives the same logits, token ids and scores in `transformers` and in the programs
that read its folders. No package is needed besides those of this project.

The weights have other names, and the rows of wq and wk another order. RoPE rotates pairs of numbers
of a head: Meta's are neighbours, (x[2i], x[2i+1]); Hugging Face's are half a head apart,
(x[i], x[i + hd/2]). Attention scores are sums over all pairs, so their order does not matter.

A model that has more than Llama 2's architecture, or another kind of tokenizer, is refused.
"""

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from llama2 import (
    SIZES,
    TAGS,
    UNREADABLE,
    ModelArgs,
    RewardModel,
    Tokenizer,
    Transformer,
    load,
    load_json,
    load_tensors,
    out_of_memory,
    save,
    write_atomic,
    write_json,
)

NAMES = {  # ours -> theirs
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "score.weight": "score.weight",
}
LAYER_NAMES = {  # after "layers.0." -> after "model.layers.0."
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
SETTINGS = {  # a field of ModelArgs -> a key of config.json
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "max_seq_len": "max_position_embeddings",
}
FIXED = {  # keys of config.json for which Llama 2 has only one value
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "quantization_config": None,
}
ARCHITECTURES = {
    "LlamaForCausalLM": Transformer,
    "LlamaForSequenceClassification": RewardModel,
}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_FILE = 5 * 10**9  # bytes of weights in a file; a larger model is split, as is usual there

# The text of encode_dialog as a Jinja template. TAGS: see tokenizer_config.
CHAT_TEMPLATE = """
{%- set has_system = messages[0]['role'] == 'system' -%}
{%- set turns = messages[1:] if has_system else messages -%}
{%- if not turns -%}
    {{- raise_exception("a dialogue needs a user's message") -}}
{%- endif -%}
{%- for message in messages -%}
    {%- for tag in TAGS -%}
        {%- if tag in message['content'] -%}
            {{- raise_exception('a message contains ' + tag + ', part of the chat format') -}}
        {%- endif -%}
    {%- endfor -%}
{%- endfor -%}
{%- for message in turns -%}
    {%- if message['role'] != ['user', 'assistant'][loop.index0 % 2] -%}
        {{- raise_exception('roles are (system,) user, assistant, user, ...') -}}
    {%- endif -%}
    {%- if message['role'] == 'assistant' -%}
        {{- ' ' + message['content'] | trim + ' ' + eos_token -}}
    {%- else -%}
        {{- bos_token + '[INST] ' -}}
        {%- if loop.first and has_system -%}
            {{- '<<SYS>>\\n' + messages[0]['content'] | trim + '\\n<</SYS>>\\n\\n' -}}
        {%- endif -%}
        {{- message['content'] | trim + ' [/INST]' -}}
    {%- endif -%}
{%- endfor -%}
"""


# ------------------------------------------------------------------------------------------ weights
def their_names(n_layers: int, model_class) -> dict[str, str]:
    """{our name: theirs} of all weights of a Transformer or a RewardModel."""
    names = dict(NAMES)
    del names["score.weight" if model_class is Transformer else "output.weight"]
    for layer in range(n_layers):
        for ours, theirs in LAYER_NAMES.items():
            names[f"layers.{layer}.{ours}"] = f"model.layers.{layer}.{theirs}"
    return names


def split_pairs(weight, head_dim: int):
    """Rows of wq or wk, ours -> theirs: in each head the first numbers of all pairs come first."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def join_pairs(weight, head_dim: int):
    """Rows of wq or wk, theirs -> ours: the two numbers of a pair are neighbours."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def reorder(weights: dict, order, head_dim: int) -> dict:
    """Weights by our names, with `order` (split_pairs or join_pairs) applied to each wq and wk."""
    return {
        name: order(w, head_dim) if name.endswith(("wq.weight", "wk.weight")) else w
        for name, w in weights.items()
    }


# -------------------------------------------------------------------------------------------- files
def read_safetensors(path) -> dict:
    """{name: tensor} of a file: 8 bytes with the length of the JSON header, header, numbers."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, os.path.getsize(path))))
    header.pop("__metadata__", None)
    # Mapped: only what is used is read. "c", copy on write: the file never changes.
    data, weights = np.memmap(path, np.uint8, "c", 8 + length), {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name} is in {entry['dtype']}, expected {', '.join(DTYPES)}")
        start, end = entry["data_offsets"]
        # A slice by numpy, not by torch: torch.save would write the whole file for each tensor.
        numbers = torch.from_numpy(data[start:end]).view(DTYPES[entry["dtype"]])
        weights[name] = numbers.view(entry["shape"])
    return weights


def write_safetensors(path, weights: dict):
    """Write {name: tensor} in this format."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, w in weights.items():
        start, end = end, end + w.nbytes
        shape = list(w.shape)
        header[name] = {"dtype": codes[w.dtype], "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)  # the numbers must be aligned in memory

    def write(file):
        file.write(len(header).to_bytes(8, "little") + header)
        for w in weights.values():
            file.write(w.contiguous().view(torch.uint8).numpy())

    write_atomic(path, write)


READERS = {"model.safetensors": read_safetensors, "pytorch_model.bin": load_tensors}


def read_weights(folder: Path) -> dict:
    """All weights of their folder, by their names: of one file, or of those that an index names."""
    for name, read in READERS.items():
        index, files = folder / f"{name}.index.json", [name]
        if index.exists():
            files = sorted(set(load_json(index)["weight_map"].values()))
        elif not (folder / name).exists():
            continue
        weights = {}
        for file in files:
            weights |= read(folder / file)
        return weights
    raise ValueError(f"there is no {' and no '.join(READERS)}, and no index of several")


# ------------------------------------------------------------------------------------------- import
def read_config(folder: Path):
    """(ModelArgs, Transformer or RewardModel) of their config.json.

    Raises ValueError for what Llama 2 does not have.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no config.json here: expected a folder of Hugging Face's")
    config = load_json(path)
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise ValueError(f"{path}: {name} is {config[name]!r}, in Llama 2 it is {value!r}")
    architecture = (config.get("architectures") or ["not given"])[0]
    if architecture not in ARCHITECTURES:
        known = " or ".join(ARCHITECTURES)
        raise ValueError(f"{path}: the architecture is {architecture}, expected {known}")
    # transformers 5 keeps rope_theta in an object of its own, earlier versions at the top.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.keys() - {"rope_type", "type", "rope_theta"}:
        raise ValueError(f"{path}: RoPE is scaled ({kind}), in Llama 2 it is not")

    if config.get("num_key_value_heads") is None:  # as in older files
        config["num_key_value_heads"] = config.get("num_attention_heads")
    for name in ("intermediate_size", *SETTINGS.values()):
        if not isinstance(config.get(name), int | float):
            raise ValueError(f"{path}: {name} is {config.get(name)!r}, expected a number")
    settings = {ours: config[theirs] for ours, theirs in SETTINGS.items()}
    settings["rope_theta"] = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    args = with_ffn_dim(ModelArgs(**settings), config)
    if config.get("head_dim") not in (None, args.head_dim):
        raise ValueError(
            f"{path}: head_dim is {config['head_dim']}, in Llama 2 it is hidden_size / "
            f"num_attention_heads, {args.head_dim}"
        )
    return args, ARCHITECTURES[architecture]


def with_ffn_dim(args: ModelArgs, config: dict) -> ModelArgs:
    """args with the FFN's width of config.json. Meta's settings say how to compute the width."""
    width = config["intermediate_size"]
    for settings in (config, *SIZES.values()):  # `export` writes Meta's settings to config.json
        multiple_of = settings.get("multiple_of", 256)
        multiplier = settings.get("ffn_dim_multiplier")
        usual = replace(args, multiple_of=multiple_of, ffn_dim_multiplier=multiplier)
        if usual.ffn_dim == width:
            return usual
    # ModelArgs rounds a product down: with one half more, it cannot become width - 1.
    multiplier = (width + 0.5) / int(8 * args.dim / 3)
    return replace(args, multiple_of=1, ffn_dim_multiplier=multiplier)


def import_folder(source: Path, target: Path, dtype):
    """Write the model in their folder `source` as a checkpoint; dtype None: as it is."""
    args, model_class = read_config(source)
    if not (source / "tokenizer.model").is_file():
        raise ValueError(f"{source}: no tokenizer.model here, which Llama 2's tokenizer needs")
    tok = Tokenizer(source / "tokenizer.model")
    if tok.vocab_size != args.vocab_size:
        raise ValueError(
            f"{source}: config.json has a vocabulary of {args.vocab_size}, but tokenizer.model of "
            f"{tok.vocab_size}: added tokens and padding are refused"
        )
    names = their_names(args.n_layers, model_class)
    try:
        theirs = read_weights(source)
        # Older files also have RoPE's frequencies, which we compute.
        found = {name for name in theirs if not name.endswith("rotary_emb.inv_freq")}
        for name in sorted(found ^ set(names.values())):
            raise ValueError(f"{name} is {'not of this model' if name in found else 'missing'}")
        weights = {ours: theirs[name].to(dtype=dtype) for ours, name in names.items()}
        with torch.device("meta"):
            model = model_class(args)
        model.load_state_dict(reorder(weights, join_pairs, args.head_dim), assign=True)
    except UNREADABLE as e:
        if out_of_memory(e):
            raise
        why = " ".join(str(e).split())[:200]
        raise ValueError(
            f"{source}: these are not weights of the model in config.json: {why}; download or "
            "export them again"
        ) from None
    save(target, model, tok)
    templates = [source / "chat_template.jinja", source / "tokenizer_config.json"]
    text = "".join(file.read_text(encoding="utf-8") for file in templates if file.is_file())
    if "message" in text and "[INST]" not in text:
        print(
            "note: its chat template is not Llama 2's, which this project uses: fine-tune it first"
        )


# ------------------------------------------------------------------------------------------- export
def config_json(args: ModelArgs, model_class, dtype, ids: dict) -> dict:
    """The content of config.json. ids: of the special tokens."""
    config = {theirs: getattr(args, ours) for ours, theirs in SETTINGS.items()}
    config |= {name: value for name, value in FIXED.items() if value is not None}
    config |= ids | {
        "architectures": [name for name, known in ARCHITECTURES.items() if known is model_class],
        "intermediate_size": args.ffn_dim,
        "rope_theta": args.rope_theta,
        "torch_dtype": str(dtype).removeprefix("torch."),
        # for `import`: what Meta's settings were
        "multiple_of": args.multiple_of,
        "ffn_dim_multiplier": args.ffn_dim_multiplier,
    }
    if model_class is RewardModel:  # a classifier with one label, whose logit is the score
        config |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    return config


def protobuf_fields(message: bytes):
    """Yield (number, value) of the fields of a Protocol Buffers message; value: int or bytes."""
    at = 0

    def read_int() -> int:  # 7 bits per byte, the lowest first; the 8th bit: more bytes follow
        nonlocal at
        value = shift = 0
        while True:
            value |= (message[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if message[at - 1] < 0x80:
                return value

    while at < len(message):
        number, wire_type = divmod(read_int(), 8)
        if wire_type == 0:
            yield number, read_int()
        else:
            size = {1: 8, 5: 4}.get(wire_type) or read_int()
            yield number, message[at : at + size]
            at += size


# sentencepiece_model.proto: ModelProto has the pieces in field 1, the trainer's settings in field 2
NORMAL, UNKNOWN, CONTROL, BYTE, BPE = 1, 2, 3, 6, 2


def check_tokenizer(tok: Tokenizer):
    """ValueError if tokenizer_json cannot write this tokenizer."""
    for number, message in protobuf_fields(tok.proto):
        fields = dict(protobuf_fields(message)) if number in (1, 2) else {}
        if number == 1 and fields.get(3, NORMAL) not in (NORMAL, UNKNOWN, CONTROL, BYTE):
            raise ValueError(f"the tokenizer has a user-defined piece, {fields[1].decode()!r}")
        if number == 2 and fields.get(3) != BPE:
            raise ValueError("the tokenizer is not BPE, as Llama 2's is")


def special_pieces(tok: Tokenizer) -> dict[str, int]:
    """{piece: id} of the pieces that no text is encoded to: <unk>, <s>, </s>."""
    ids = range(tok.vocab_size)
    return {tok.sp.id_to_piece(i): i for i in ids if tok.sp.is_control(i) or tok.sp.is_unknown(i)}


def find_merges(tok: Tokenizer) -> list[str]:
    """The merges of BPE, "left right", the first to be applied first.

    SentencePiece stores scores of pieces: it merges the two neighbours whose piece has the highest.
    """
    scores = {}
    for i in range(tok.vocab_size):
        # Byte pieces stand for characters without a piece. They are not merged.
        if not (tok.sp.is_control(i) or tok.sp.is_unknown(i) or tok.sp.is_byte(i)):
            scores[tok.sp.id_to_piece(i)] = tok.sp.get_score(i)
    merges = []
    for piece in sorted(scores, key=scores.get, reverse=True):
        for i in range(1, len(piece)):
            left, right = piece[:i], piece[i:]
            if left in scores and right in scores:
                merges.append(f"{left} {right}")
    return merges


def tokenizer_json(tok: Tokenizer) -> dict:
    """tokenizer.model in the format of the `tokenizers` library.

    We write it because the conversion of transformers, which does it otherwise, needs more packages
    and gives other ids after a tag or a newline.
    """
    added = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    bos = tok.sp.id_to_piece(tok.bos_id)
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    text, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    normalizers = [{"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]
    decoders = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if tok.adds_space:
        normalizers.insert(0, {"type": "Prepend", "prepend": "\u2581"})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": piece, **added} for piece, i in special_pieces(tok).items()
        ],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "post_processor": {  # each text begins with BOS
            "type": "TemplateProcessing",
            "single": [first, text],
            "pair": [first, text, first, second],
            "special_tokens": {bos: {"id": bos, "ids": [tok.bos_id], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "unk_token": tok.sp.id_to_piece(tok.sp.unk_id()),
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {tok.sp.id_to_piece(i): i for i in range(tok.vocab_size)},
            "merges": find_merges(tok),
        },
    }


def tokenizer_config(tok: Tokenizer, args: ModelArgs) -> dict:
    """The names of the special tokens, and the chat template."""
    # "</s>" in a message is four letters to us, but EOS to them: it could end an answer or begin a
    # turn. A template cannot spell it in letters, so ours refuses it like the tags.
    refused = str([*TAGS, *special_pieces(tok)])
    unk = tok.sp.id_to_piece(tok.sp.unk_id())
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # only tokenizer.json decides
        "bos_token": tok.sp.id_to_piece(tok.bos_id),
        "eos_token": tok.sp.id_to_piece(tok.eos_id),
        "unk_token": unk,
        # They read a reward at the last token that is not padding, which must be EOS.
        "pad_token": unk,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": args.max_seq_len,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE.strip().replace("TAGS", refused),
    }


def export_folder(source: Path, target: Path, dtype):
    """Write the checkpoint `source` in their format; dtype None: as it is."""
    model, tok = load(source, weights_dtype=dtype)
    check_tokenizer(tok)
    args, dtype, model_class = model.args, model.norm.weight.dtype, type(model)
    ids = {"bos_token_id": tok.bos_id, "eos_token_id": tok.eos_id, "pad_token_id": tok.sp.unk_id()}
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / "config.json", config_json(args, model_class, dtype, ids))
    write_json(target / "generation_config.json", ids)
    write_json(target / "tokenizer.json", tokenizer_json(tok))
    write_json(target / "tokenizer_config.json", tokenizer_config(tok, args))
    write_atomic(target / "tokenizer.model", lambda file: file.write(tok.proto))

    files = [{}]  # the weights of each file
    for name, w in model.state_dict().items():
        if files[-1] and sum(other.nbytes for other in files[-1].values()) + w.nbytes > MAX_FILE:
            files.append({})
        files[-1][name] = w
    names, index = their_names(args.n_layers, model_class), {}
    for i, weights in enumerate(files, 1):
        file = f"model-{i:05}-of-{len(files):05}.safetensors"
        file = "model.safetensors" if len(files) == 1 else file
        weights = reorder(weights, split_pairs, args.head_dim)
        write_safetensors(target / file, {names[name]: w for name, w in weights.items()})
        index |= {names[name]: file for name in weights}
    if len(files) > 1:
        size = sum(w.nbytes for w in model.state_dict().values())
        content = {"metadata": {"total_size": size}, "weight_map": index}
        write_json(target / "model.safetensors.index.json", content)


# ------------------------------------------------------------------------------------- command line
def main(argv):
    parser = argparse.ArgumentParser(
        prog="python -m common.huggingface",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # Report a user's mistake in one line, with exit code 2.
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    parser.add_argument("command", choices=("import", "export"))
    parser.add_argument("source", type=Path, help="the folder to read")
    parser.add_argument("target", type=Path, help="a new folder, to write")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the weights that are written (default: as they are)",
    )
    args = parser.parse_args(argv)
    try:
        if args.target.exists() and any(args.target.iterdir()):
            raise ValueError(f"{args.target} is not empty: choose another folder")
        convert = import_folder if args.command == "import" else export_folder
        convert(args.source, args.target, getattr(torch, args.dtype) if args.dtype else None)
    except (ValueError, OSError, RuntimeError) as e:  # RuntimeError: no memory
        parser.error(" ".join(str(e).split()))
    print(f"wrote {args.target}")


if __name__ == "__main__":
    main(sys.argv[1:])
