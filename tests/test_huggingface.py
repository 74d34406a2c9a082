"""Hugging Face's format: round trips, equal results in transformers, and what is refused.

Without transformers, the tests that compare with it are skipped. .ci/run installs it for them.
"""

import io
import json
import os
import re
import sys
from dataclasses import replace

import pytest
import sentencepiece
import torch
from test_own_data import execute

from common import huggingface
from conftest import ARGS, ROOT, dialog, make_model, make_reward_model, write_jsonl
from llama2 import (
    SIZES,
    TAGS,
    ModelArgs,
    RewardModel,
    Tokenizer,
    Transformer,
    encode_dialog,
    generate,
    load,
    save,
    score_dialogs,
)

EVERY_FILE = ("consolidated.00.pth", "params.json", "context.json", "tokenizer.model")


def convert(*words):
    huggingface.main([str(word) for word in words])


def exported(tmp_path, tok, model, *options):
    """The folder tmp_path/theirs, exported from tmp_path/ours, with this model."""
    save(tmp_path / "ours", model, tok)
    convert("export", tmp_path / "ours", tmp_path / "theirs", *options)
    return tmp_path / "theirs"


# ----------------------------------------------------------------------------- without transformers
@pytest.mark.parametrize("max_file", [5 * 10**9, 5000])
@pytest.mark.parametrize("model_class", [Transformer, RewardModel])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exported_folder_is_imported_byte_for_byte(
    tmp_path, tok, monkeypatch, model_class, dtype, max_file
):
    monkeypatch.setattr(huggingface, "MAX_FILE", max_file)
    shape = dict(n_kv_heads=1, rope_theta=5e5, norm_eps=1e-6, ffn_dim_multiplier=1.3)
    model = model_class(replace(ARGS, vocab_size=tok.vocab_size, **shape)).to(dtype)
    theirs = exported(tmp_path, tok, model)
    assert (theirs / "model.safetensors.index.json").exists() == (max_file == 5000)
    assert len(list(theirs.glob("*.safetensors"))) == (1 if max_file > 5000 else len(split(model)))
    convert("import", theirs, tmp_path / "back")
    for name in EVERY_FILE:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "back" / name).read_bytes()


def split(model):
    """How many files of 5,000 bytes hold a model if a tensor is not split."""
    files = [0]
    for w in model.state_dict().values():
        if files[-1] and files[-1] + w.nbytes > 5000:
            files.append(0)
        files[-1] += w.nbytes
    return files


def test_weights_are_written_in_the_precision_that_is_asked_for(tmp_path, tok):
    model = make_model(vocab_size=tok.vocab_size)
    theirs = exported(tmp_path, tok, model, "--dtype", "bfloat16")
    assert json.loads((theirs / "config.json").read_text())["torch_dtype"] == "bfloat16"
    convert("import", theirs, tmp_path / "short")
    convert("import", "--dtype", "float32", theirs, tmp_path / "long")
    for name, dtype in (("short", torch.bfloat16), ("long", torch.float32)):
        state = torch.load(tmp_path / name / "consolidated.00.pth")
        for key, weight in model.state_dict().items():
            assert torch.equal(state[key], weight.bfloat16().to(dtype))
            assert state[key].dtype == dtype


def test_metas_settings_can_give_the_ffn_any_width():
    for dim in (32, 100, 288, 4096):
        args = ModelArgs(dim=dim, n_heads=2)
        for width in (1, 59, 87, 267, 768, 11007, 11008, 28672):
            config = {"intermediate_size": width}
            assert huggingface.with_ffn_dim(args, config).ffn_dim == width
    for size in SIZES.values():
        args = ModelArgs(**size)
        other = replace(args, multiple_of=1, ffn_dim_multiplier=None)
        config = {"intermediate_size": args.ffn_dim}
        assert huggingface.with_ffn_dim(other, config).ffn_dim == args.ffn_dim
    args = ModelArgs(**SIZES["70B"])  # Meta's own settings
    other, config = replace(args, multiple_of=1), {"intermediate_size": 28672}
    assert huggingface.with_ffn_dim(other, config) == args


class Code:
    """A pickle that creates a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("created",)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"
NO_WEIGHTS = "these are not weights of the model in config.json: .*"
HALF, WEIGHTS, BIN = "half", "model.safetensors", "pytorch_model.bin"


@pytest.mark.parametrize(
    "file, change, error",
    [
        ("config.json", {"rope_scaling": {"type": "linear", "factor": 2.0}}, r"scaled \(linear\)"),
        ("config.json", {"rope_parameters": {"rope_type": "llama3"}}, r"scaled \(llama3\)"),
        ("config.json", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "RoPE is scaled"),
        ("config.json", {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ("config.json", {"attention_bias": True}, "attention_bias is True"),
        ("config.json", {"model_type": "mistral"}, "model_type is 'mistral'"),
        ("config.json", {"quantization_config": {"bits": 4}}, "quantization_config is"),
        ("config.json", {"head_dim": 64}, "head_dim is 64, .* 8$"),
        ("config.json", {"architectures": ["LlamaModel"]}, "the architecture is LlamaModel"),
        ("config.json", {"vocab_size": 32001}, "a vocabulary of 32001, .*added tokens"),
        ("config.json", {"rms_norm_eps": None}, "rms_norm_eps is None, expected a number"),
        ("config.json", {"num_hidden_layers": 3}, rf"{NO_WEIGHTS}layers\.2\..* is missing"),
        ("config.json", {"num_hidden_layers": 1}, rf"{NO_WEIGHTS}layers\.1\..* is not of this"),
        ("config.json", {"intermediate_size": 8}, f"{NO_WEIGHTS}size mismatch"),
        ("config.json", {"num_key_value_heads": 3}, "n_kv_heads=3"),
        ("config.json", b"{", "config.json: broken JSON"),
        ("config.json", None, "no config.json here"),
        ("tokenizer.model", None, "no tokenizer.model here"),
        ("tokenizer.model", HALF, "not a SentencePiece model"),
        (WEIGHTS, None, f"{NO_WEIGHTS}there is no model.safetensors and no pytorch_model.bin"),
        (WEIGHTS, HALF, NO_WEIGHTS),
        (WEIGHTS, LFS, NO_WEIGHTS),
        (WEIGHTS, "I32", "is in I32, expected F32, F16, BF16"),
        (f"{WEIGHTS}.index.json", b'{"weight_map": {"x": "gone"}}', f"{NO_WEIGHTS}.*gone"),
        (BIN, {"x": Code()}, f"{NO_WEIGHTS}pytorch_model.bin is not a file of tensors"),
        (BIN, {"x": torch.ones(2).long()}, "pytorch_model.bin has tensors that are not floating"),
        (BIN, LFS, f"{NO_WEIGHTS}pytorch_model.bin is not a file of tensors"),
    ],
)
def test_what_is_not_llama_2_is_refused_by_name_and_runs_no_code(
    tmp_path, tok, capsys, monkeypatch, file, change, error
):
    theirs = exported(tmp_path, tok, make_model(vocab_size=tok.vocab_size))
    path = theirs / file
    monkeypatch.chdir(tmp_path)
    if file == BIN:
        (theirs / WEIGHTS).unlink()
    if change is None:
        path.unlink()
    elif change == HALF:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif change == "I32":
        path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))
    elif isinstance(change, bytes):
        path.write_bytes(change)
    elif file == BIN:
        torch.save(change, path)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        convert("import", theirs, tmp_path / "new")
    message = capsys.readouterr().err
    assert (e.value.code, message.count("\n")) == (2, 1)
    assert re.search(error, message) and "weights_only" not in message
    assert not (tmp_path / "new").exists() and not (tmp_path / "created").exists()


def train_tokenizer(path, **settings):
    model = io.BytesIO()
    settings = dict(model_type="bpe", remove_extra_whitespaces=False) | settings
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["one two three four"] * 9),
        model_writer=model,
        vocab_size=290,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        minloglevel=2,
        **settings,
    )
    path.write_bytes(model.getvalue())
    return Tokenizer(path)


@pytest.mark.parametrize(
    "settings, error",
    [
        (dict(model_type="unigram"), "the tokenizer is not BPE"),
        (dict(user_defined_symbols=["<sep>"]), "a user-defined piece, '<sep>'"),
        (dict(control_symbols=["<pad>"], add_dummy_prefix=False), None),
    ],
)
def test_a_tokenizer_of_another_kind_is_not_exported(tmp_path, capsys, settings, error):
    tok = train_tokenizer(tmp_path / "t.model", **settings)
    model = make_model(vocab_size=tok.vocab_size)
    if error is None:
        exported(tmp_path, tok, model)
        return
    with pytest.raises(SystemExit):
        exported(tmp_path, tok, model)
    assert error in capsys.readouterr().err
    assert not (tmp_path / "theirs").exists()


def test_folders_of_the_other_format_and_full_ones_are_errors(base, tmp_path, capsys):
    theirs = tmp_path / "theirs"
    convert("export", base, theirs)
    for words, error in (
        (("import", base, tmp_path / "new"), "no config.json here: expected a folder of Hugging"),
        (("export", theirs, tmp_path / "new"), "convert it: python -m common.huggingface import"),
        (("export", base, theirs), "theirs is not empty: choose another folder"),
    ):
        with pytest.raises(SystemExit):
            convert(*words)
        assert error in capsys.readouterr().err


def test_a_chat_format_that_is_not_llama_2s_is_noted(tmp_path, tok, capsys):
    theirs = exported(tmp_path, tok, make_model(vocab_size=tok.vocab_size))
    convert("import", theirs, tmp_path / "same")
    assert "note:" not in capsys.readouterr().out
    (theirs / "tokenizer_config.json").unlink()
    (theirs / "chat_template.jinja").write_text("{% for message in messages %}<|user|>")
    convert("import", theirs, tmp_path / "other")
    assert "note: its chat template is not Llama 2's" in capsys.readouterr().out


SHORT = {
    "common.huggingface": "",
    "train_sft.py": "--epochs 1 --seq-len 64 --batch-size 4 --dtype float32",
    "llama2.py": "--max-new-tokens 5",
}


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_readmes_path_through_hugging_faces_format_runs(tmp_path, tok, monkeypatch, capsys):
    save(tmp_path / "base", make_model(vocab_size=tok.vocab_size, max_seq_len=4096), tok)
    convert("export", tmp_path / "base", tmp_path / "Llama-2-7b-hf")
    write_jsonl(tmp_path / "mine.jsonl", [{"messages": dialog("Colour?", "Red.")}] * 20)
    section = (ROOT / "README.md").read_text().split("## Meta's weights")[1].split("```")[1]
    commands = re.findall(r"^(?:python|torchrun --\S+) (.*)$", section.replace("\\\n", " "), re.M)
    assert len(commands) == 4
    monkeypatch.chdir(tmp_path)
    for command in commands:
        monkeypatch.setattr(sys, "stdin", io.StringIO("Colour?\n"))
        capsys.readouterr()
        name = re.search(r"(\w+\.py|(?<=-m )\S+)", command)[1]
        execute(f"{command} {SHORT[name]}", monkeypatch)
        assert capsys.readouterr().out, command
    config = json.loads((tmp_path / "7b-hf/config.json").read_text())
    assert (config["torch_dtype"], config["architectures"]) == ("bfloat16", ["LlamaForCausalLM"])


# ------------------------------------------------------------------------------- with transformers
@pytest.fixture
def transformers():
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when it is imported
    return pytest.importorskip("transformers")


@pytest.mark.parametrize(
    "shape",
    [
        dict(n_kv_heads=4),
        dict(n_kv_heads=2, rope_theta=500.0),
        dict(n_kv_heads=1, norm_eps=1e-3),
        dict(multiple_of=1, ffn_dim_multiplier=0.7),  # a width of 59
    ],
)
def test_transformers_gives_our_logits_and_greedy_ids_and_its_folders_are_imported(
    transformers, tmp_path, tok, shape
):
    model = make_model(vocab_size=tok.vocab_size, **shape)
    peer = transformers.AutoModelForCausalLM.from_pretrained(exported(tmp_path, tok, model)).eval()
    tokens = torch.randint(3, tok.vocab_size, (2, 10))
    assert (peer(tokens).logits - model(tokens)).abs().max() < 1e-4
    ids = peer.generate(tokens[:1], max_new_tokens=50, do_sample=False)[0, 10:]
    assert ids.tolist() == generate(model, tokens[:1].tolist(), 50, 0, eos_id=tok.eos_id)[0]

    peer.save_pretrained(tmp_path / "safetensors", max_shard_size="20KB")
    assert len(list((tmp_path / "safetensors").glob("*.safetensors"))) > 1
    state = list(peer.state_dict().items())
    for kind, count in (("bin", 1), ("bins", 3)):
        (tmp_path / kind).mkdir()
        peer.config.save_pretrained(tmp_path / kind)
        index = {}
        for i in range(count):
            file = BIN if count == 1 else f"pytorch_model-{i + 1:05}-of-00003.bin"
            torch.save(dict(state[i::count]), tmp_path / kind / file)
            index |= {name: file for name, _ in state[i::count]}
        if count > 1:
            text = json.dumps({"metadata": {}, "weight_map": index})
            (tmp_path / kind / f"{BIN}.index.json").write_text(text)
    for kind in ("safetensors", "bin", "bins"):
        (tmp_path / kind / "tokenizer.model").write_bytes(tok.proto)
        convert("import", tmp_path / kind, tmp_path / f"from-{kind}")
        imported, _ = load(tmp_path / f"from-{kind}")
        assert imported.args.ffn_dim == model.args.ffn_dim
        for name, weight in model.state_dict().items():
            assert torch.equal(imported.state_dict()[name], weight)
        assert (imported(tokens) - peer(tokens).logits).abs().max() < 1e-4
        sizes = [(tmp_path / f / EVERY_FILE[0]).stat().st_size for f in ("ours", f"from-{kind}")]
        assert sizes[0] == sizes[1]  # each tensor is written once


def test_transformers_gives_our_rewards_with_padding_on_either_side(transformers, tmp_path, tok):
    model = make_reward_model(tok)
    torch.nn.init.normal_(model.score.weight, std=0.1)  # rewards of about 1
    theirs = exported(tmp_path, tok, model)
    peer = transformers.AutoModelForSequenceClassification.from_pretrained(theirs).eval()
    reader = transformers.AutoTokenizer.from_pretrained(theirs)
    dialogs = [dialog("a long question", "a long answer"), dialog("q", "a")]
    texts = reader.apply_chat_template(dialogs, tokenize=False)
    for side in ("left", "right"):
        reader.padding_side = side
        batch = reader(texts, padding=True, add_special_tokens=False, return_tensors="pt")
        rewards = peer(**batch).logits.squeeze(-1).tolist()
        assert rewards == pytest.approx(score_dialogs(model, tok, dialogs), abs=1e-6)


AWKWARD = [
    *("hi", " hi ", "two  spaces", "\n\nlines\n\nbreak\n", "\ttab\t", "", " ", "\r\n", "12 3.5"),
    *("\u00fcn\u00ef", "e\u0301", "\ufb01 \uff21", "\u65e5\u672c\u8a9e", "\U0001f98a!", "\u00a0x"),
    *(
        "\u200b",
        "\ufeffx",
        "x\x00y",
        "a" * 40,
        "   " * 9,
        "--==__",
        "[INST",
        "INST]",
        "<s",
        "< s >",
    ),
    *("<SYS>", "<0x0A>", "\\n", "{{ x }}{% y %}", "def f(x):\n    return x  # sum", "a \u2581 b"),
]


@pytest.mark.parametrize("adds_space", [True, False])
def test_their_chat_template_gives_our_token_ids_and_refuses_what_ours_refuses(
    transformers, tmp_path, tok, adds_space
):
    if not adds_space:
        tok = train_tokenizer(tmp_path / "t.model", add_dummy_prefix=False)
    theirs = exported(tmp_path, tok, make_model(vocab_size=tok.vocab_size))
    reader, checked = transformers.AutoTokenizer.from_pretrained(theirs), 0
    for i, text in enumerate(AWKWARD):
        other = AWKWARD[i - 7]
        more = dialog(text, other, "go on", system=other)
        for messages in (dialog(text), dialog(text, other), more):
            theirs = reader.apply_chat_template(messages, tokenize=False)
            ids = reader.encode(theirs, add_special_tokens=False)
            assert ids == encode_dialog(tok, messages)[0], messages
            checked += 1
        assert reader.encode(text) == tok.encode(text, bos=True)
        ids = tok.encode(text, bos=True)
        assert reader.decode(ids, skip_special_tokens=True) == tok.decode(ids)
    assert checked > 90
    # "</s>" in a message is four letters to us, but would be EOS to them.
    for text in (*TAGS, "<s>", "</s>", "<unk>"):
        with pytest.raises(Exception, match="part of the chat format"):
            reader.apply_chat_template(dialog(f"a {text}"))
    system = dialog("q", system="s")[:1]
    for messages in (dialog("q") * 2, system * 2, system + dialog("q", "a")[1:]):
        with pytest.raises(Exception, match="roles are"):
            reader.apply_chat_template(messages)
    with pytest.raises(Exception, match="needs a user's message"):
        reader.apply_chat_template(system)
