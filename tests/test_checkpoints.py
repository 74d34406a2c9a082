"""Checkpoints: saving, loading, Meta's and Hugging Face's weights, and broken files."""

import json
import os
from dataclasses import replace

import pytest
import torch

import llama2
from conftest import ARGS, make_model
from llama2 import load, save


@pytest.fixture
def saved(tmp_path, tok):
    """A folder with a checkpoint that a test may damage."""
    save(tmp_path / "m", make_model(vocab_size=tok.vocab_size), tok)
    return tmp_path / "m"


@pytest.mark.parametrize(
    "field, value, error",
    [
        ("dim", 30, "dim=30.*n_heads=4"),
        ("dim", 12, "head_dim=3"),
        ("dim", "8", "dim='8'"),
        ("dim", 4096.0, "dim=4096.0 must be a whole number"),
        ("n_kv_heads", 3, "n_heads=4.*n_kv_heads=3"),
        ("n_kv_heads", 1.0, "n_kv_heads=1.0 must be a whole number"),
        ("n_layers", 0, "n_layers=0"),
        ("vocab_size", 2.5, "vocab_size=2.5"),
        ("norm_eps", 0, "norm_eps=0"),
        ("norm_eps", None, "norm_eps=None"),
        ("ffn_dim_multiplier", -1, "ffn_dim_multiplier=-1"),
    ],
)
def test_impossible_model_args_are_refused_by_name(field, value, error):
    with pytest.raises(ValueError, match=error):
        replace(ARGS, **{field: value})


@pytest.mark.parametrize(
    "device, has_bfloat16, expected",
    [
        ("cpu", True, "bfloat16"),
        ("cpu", False, "float32"),
        ("cuda", True, "bfloat16"),
        ("cuda", False, "float32"),
        ("mps", True, "float32"),
    ],
)
def test_auto_dtype_is_bfloat16_where_the_device_supports_it(
    monkeypatch, device, has_bfloat16, expected
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bfloat16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    assert llama2.matmul_dtype("auto", device) == expected
    for dtype in ("float32", "bfloat16"):
        assert llama2.matmul_dtype(dtype, device) == dtype


def test_loaded_checkpoint_equals_the_saved_model(saved, tok, monkeypatch):
    """Loading draws no random weights: at 7B they would take minutes."""
    model = make_model(vocab_size=tok.vocab_size)

    def draw(*args, **kwargs):
        raise AssertionError("weights were drawn")

    monkeypatch.setattr(torch.Tensor, "normal_", draw)
    loaded, loaded_tok = load(saved)
    assert loaded.args == model.args
    assert loaded_tok.proto == tok.proto
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)
    assert list(model.state_dict())[:2] == ["tok_embeddings.weight", "layers.0.attention.wq.weight"]


def test_shards_and_params_of_meta_s_release_load(tmp_path, tok):
    """wq, wk, wv, w1, w3 and output are split by rows; wo, w2 and the embeddings by columns."""
    model = make_model(vocab_size=tok.vocab_size)
    shards = [{"rope.freqs": torch.zeros(4)}, {"rope.freqs": torch.zeros(4)}]
    for name, weight in model.state_dict().items():
        layer = name.split(".")[-2]
        halves = weight.chunk(2, 1 if layer in ("wo", "w2", "tok_embeddings") else 0)
        halves = (weight, weight) if "norm" in layer else halves
        for shard, half in zip(shards, halves):
            shard[name] = half.clone()
    for i, shard in enumerate(shards):
        torch.save(shard, tmp_path / f"consolidated.{i + 9}.pth")  # 9 comes before 10
    params = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=8, norm_eps=1e-5)
    (tmp_path / "params.json").write_text(json.dumps(params | {"vocab_size": -1}))
    (tmp_path / "tokenizer.model").write_bytes(tok.proto)
    merged, _ = load(tmp_path)
    tokens = torch.randint(300, (1, 9))
    assert torch.equal(merged(tokens), model(tokens))


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_logits_equal_those_of_hugging_face_transformers(n_kv_heads):
    transformers = pytest.importorskip("transformers")
    model = make_model(n_kv_heads=n_kv_heads)
    args = model.args
    sizes = dict(vocab_size=300, hidden_size=32, intermediate_size=args.ffn_dim)
    heads = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=n_kv_heads)
    config = transformers.LlamaConfig(
        rms_norm_eps=args.norm_eps, tie_word_embeddings=False, **sizes, **heads
    )
    peer = transformers.LlamaForCausalLM(config).eval()

    def halves(weight):  # their rotary embedding pairs i with i + head_dim/2, ours 2i with 2i + 1
        return weight.view(-1, args.head_dim // 2, 2, 32).transpose(1, 2).reshape(-1, 32)

    state = {
        "model.embed_tokens.weight": model.tok_embeddings.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.output.weight,
    }
    for i, block in enumerate(model.layers):
        at, ff, layer = block.attention, block.feed_forward, f"model.layers.{i}."
        state |= {
            layer + "self_attn.q_proj.weight": halves(at.wq.weight),
            layer + "self_attn.k_proj.weight": halves(at.wk.weight),
            layer + "self_attn.v_proj.weight": at.wv.weight,
            layer + "self_attn.o_proj.weight": at.wo.weight,
            layer + "mlp.gate_proj.weight": ff.w1.weight,
            layer + "mlp.down_proj.weight": ff.w2.weight,
            layer + "mlp.up_proj.weight": ff.w3.weight,
            layer + "input_layernorm.weight": block.attention_norm.weight,
            layer + "post_attention_layernorm.weight": block.ffn_norm.weight,
        }
    peer.load_state_dict(state)
    tokens = torch.randint(300, (2, 30))
    assert (peer(tokens).logits - model(tokens)).abs().max() < 1e-4


def damage(folder, tok, how):
    """Damage a checkpoint in one way; a dict replaces values of params.json."""
    file, params = folder / "consolidated.00.pth", folder / "params.json"
    state = torch.load(file, weights_only=True)
    if isinstance(how, dict):
        params.write_text(json.dumps(json.loads(params.read_text()) | how))
    elif how == "LFS pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    elif how == "web page":
        file.write_text("<!DOCTYPE html><html>")
    elif how == "half":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif how == "nested dict":
        torch.save({"model": state}, file)
    elif how == "list":
        torch.save(list(state.values()), file)
    elif how == "integers":
        torch.save({name: weight.long() for name, weight in state.items()}, file)
    elif how == "missing weight":
        del state["norm.weight"]
        torch.save(state, file)
    elif how == "params a list":
        params.write_text("[1]")
    elif how == "half of params":
        params.write_text('{"dim": 32')
    elif how == "tokenizer":
        (folder / "tokenizer.model").write_bytes(tok.proto[:1000])
    else:
        for path in folder.iterdir():
            path.unlink()
        if how == "Hugging Face":
            (folder / "model.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    "how, error",
    [
        ("LFS pointer", "these are not weights .*: not a file of tensors only"),
        ("web page", "these are not weights .*: not a file of tensors only"),
        ("half", "these are not weights"),
        ("nested dict", "other than named tensors"),
        ("list", "these are not weights"),
        ("integers", "these are not weights"),
        ("missing weight", "Missing key.*norm.weight"),
        ("params a list", "expected one JSON object"),
        ("half of params", "params.json: broken JSON"),
        ("tokenizer", "not a SentencePiece model"),
        ("empty folder", "no checkpoint here.*tokenizer.model$"),
        ("Hugging Face", "Hugging Face's format is not supported yet"),
        ({"norm_eps": "1e-5"}, "norm_eps='1e-5'"),
        ({"vocab_size": 99}, "they belong to two models"),
        ({"n_layers": None}, "n_layers=None"),
        ({"rope_theta": float("nan")}, "rope_theta=nan"),
        ({"use_scaled_rope": True}, "use_scaled_rope"),
        ({"dim": 64}, "size mismatch"),
    ],
)
def test_a_broken_checkpoint_is_refused_in_one_line(saved, tok, how, error, capsys):
    damage(saved, tok, how)
    with pytest.raises(ValueError, match=error) as e:
        load(saved)
    assert str(saved) in str(e.value)
    assert "weights_only" not in str(e.value)
    with pytest.raises(SystemExit) as exit_:
        llama2.main(["complete", str(saved), "a"])
    assert (exit_.value.code, capsys.readouterr().err.count("\n")) == (2, 1)


class Code:
    """A pickle that creates a folder when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_loading_a_checkpoint_cannot_run_code(saved):
    created = saved / "created"
    torch.save({"x": Code(str(created))}, saved / "consolidated.00.pth")
    with pytest.raises(ValueError, match="these are not weights"):
        load(saved)
    assert not created.exists()


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "f"
    llama2.write_atomic(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        llama2.write_atomic(path, fail)
    with pytest.raises(OSError, match=r"written \(No such file or directory\): .*missing"):
        llama2.write_atomic(tmp_path / "missing/f", fail)
    assert path.read_bytes() == b"old"
