"""Checkpoints: saving, loading, Meta's weights, and broken files."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, fields, replace

import pytest
import sentencepiece
import torch

import llama2
from conftest import ARGS, ROOT, make_model
from llama2 import Transformer, load, save

WEIGHTS, PARAMS, LFS = "consolidated.00.pth", "params.json", b"version https://git-lfs.github.com/"
NO_WEIGHTS = "these are not weights"
NOT_TENSORS = f"{NO_WEIGHTS} .*: consolidated.00.pth is not a file of tensors only"


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
        ("n_kv_heads", 3, "n_heads=4.*n_kv_heads=3"),
    ],
)
def test_impossible_model_args_are_refused_by_name(field, value, error):
    with pytest.raises(ValueError, match=error):
        replace(ARGS, **{field: value})


@pytest.mark.parametrize("supported", [True, False])
def test_auto_dtype_is_bfloat16_where_the_device_supports_it(monkeypatch, supported):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    dtype = "bfloat16" if supported else "float32"
    for device, expected in (("cpu", dtype), ("cuda", dtype), ("mps", "float32")):
        assert llama2.matmul_dtype("auto", device) == expected
        assert llama2.matmul_dtype("float32", device) == "float32"
        assert llama2.matmul_dtype("bfloat16", device) == "bfloat16"


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


@dataclass
class MetaArgs:
    """ModelArgs of Meta's released code, llama/model.py."""

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    vocab_size: int = -1
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    max_batch_size: int = 32
    max_seq_len: int = 2048


@pytest.mark.parametrize("multiplier", [None, 1.3])
def test_metas_code_reads_our_params_and_the_context_survives(tmp_path, tok, multiplier):
    """Meta's code gives max_seq_len itself; transformers' converter fails at a null."""
    shape = dict(n_kv_heads=1, ffn_dim_multiplier=multiplier, norm_eps=1e-6)
    model = make_model(vocab_size=tok.vocab_size, max_seq_len=99, rope_theta=5e5, **shape)
    save(tmp_path, model, tok)
    params = json.loads((tmp_path / PARAMS).read_text())
    assert None not in params.values()
    theirs = MetaArgs(max_seq_len=128, max_batch_size=4, **params)
    for field in fields(MetaArgs)[:-2]:
        assert getattr(theirs, field.name) == getattr(model.args, field.name)
    assert load(tmp_path)[0].args == model.args


def test_a_checkpoint_with_the_context_in_its_params_loads(saved, tok):
    (saved / "context.json").unlink()
    path = saved / PARAMS
    of_context = dict(max_seq_len=99, rope_theta=5e5, ffn_dim_multiplier=None)
    path.write_text(json.dumps(json.loads(path.read_text()) | of_context))
    assert load(saved)[0].args == replace(ARGS, vocab_size=tok.vocab_size, **of_context)


@pytest.mark.parametrize("above", ["target", "link"])
def test_the_tokenizer_may_be_one_folder_above_a_model_or_above_a_link_to_it(
    saved, tmp_path, monkeypatch, above
):
    link = tmp_path / "links/m"
    link.parent.mkdir()
    link.symlink_to(saved)
    (saved / "tokenizer.model").rename(
        (saved if above == "target" else link).parent / "tokenizer.model"
    )
    load(link)
    monkeypatch.chdir(link.parent)
    load("m")
    if above == "target":
        monkeypatch.chdir(saved)
        load(".")


def test_a_folder_that_is_no_checkpoint_names_those_below_it(saved, tmp_path):
    (tmp_path / "rlhf").mkdir()
    saved.rename(tmp_path / "rlhf/v1")
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/consolidated.00.pth").touch()
    (tmp_path / "tokenizer.model").touch()
    names = f"{tmp_path}/rlhf/v1, {tmp_path}/sft"
    with pytest.raises(
        ValueError, match=f"no checkpoint here: name one of those below it: {names}$"
    ):
        load(tmp_path)


def write_shards(folder, model, tok, count, dtype=torch.float32):
    """A model as Meta releases it, in `count` files.

    wq, wk, wv, w1, w3 and output are split by rows; wo, w2 and the embeddings by columns.
    """
    shards = [{"rope.freqs": torch.zeros(4)} for _ in range(count)]
    for name, weight in model.state_dict().items():
        layer = name.split(".")[-2]
        parts = weight.chunk(count, 1 if layer in ("wo", "w2", "tok_embeddings") else 0)
        parts = [weight] * count if "norm" in layer else parts
        for shard, part in zip(shards, parts):
            shard[name] = part.to(dtype, copy=True)
    for i, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{i + 9}.pth")  # 9 comes before 10
    params = {name: getattr(model.args, name) for name in ("dim", "n_layers", "n_heads")}
    params |= dict(n_kv_heads=2, multiple_of=8, norm_eps=1e-5, vocab_size=-1)
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "tokenizer.model").write_bytes(tok.proto)


def test_shards_and_params_of_the_released_models_load(tmp_path, tok):
    model = make_model(vocab_size=tok.vocab_size)
    write_shards(tmp_path, model, tok, 2)
    merged, _ = load(tmp_path)
    tokens = torch.randint(300, (1, 9))
    assert torch.equal(merged(tokens), model(tokens))


@pytest.mark.parametrize("shards", [1, 2])
def test_weights_are_loaded_in_the_precision_that_is_asked_for(tmp_path, tok, shards):
    model = make_model(vocab_size=tok.vocab_size)
    write_shards(tmp_path, model, tok, shards, torch.bfloat16)
    for asked, dtype in ((torch.float32,) * 2, (torch.float16,) * 2, (None, torch.bfloat16)):
        loaded = load(tmp_path, weights_dtype=asked)[0].state_dict()
        for name, weight in model.state_dict().items():
            assert loaded[name].dtype == dtype
            assert torch.equal(loaded[name], weight.bfloat16().to(dtype))


def test_shards_of_two_models_are_refused(tmp_path, tok):
    """What the second file lacks would be uninitialized memory."""
    write_shards(tmp_path, make_model(vocab_size=tok.vocab_size), tok, 2)
    last = tmp_path / "consolidated.10.pth"
    torch.save(without_norm(torch.load(last)), last)
    with pytest.raises(ValueError, match=f"{NO_WEIGHTS}.*10.pth has other weights than .*9.pth"):
        load(tmp_path)


LOAD_AND_MEASURE = """
import sys, torch, llama2
def status(name):
    return int(open("/proc/self/status").read().split(name + ":")[1].split()[0]) << 10
for folder, dtype in zip(sys.argv[1:], (torch.bfloat16, torch.float32)):
    before = status("VmRSS")
    llama2.load(folder, weights_dtype=dtype)
    print(status("VmHWM") - before)     # the peak, mapped files included
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc/self/status")
def test_loading_takes_the_memory_of_the_model_and_one_shard(tmp_path, tok):
    """And none at all for the weights of a single file that already have the precision."""
    sizes = dict(dim=1024, n_layers=2, n_kv_heads=2, n_heads=8, vocab_size=tok.vocab_size)
    with torch.device("meta"):
        model = Transformer(replace(ARGS, **sizes))
    model.to_empty(device="cpu")
    folders = tmp_path / "1", tmp_path / "8"
    for shards, dtype, folder in zip((1, 8), (torch.bfloat16, torch.float32), folders):
        folder.mkdir()
        write_shards(folder, model, tok, shards, dtype)
    code = [sys.executable, "-c", LOAD_AND_MEASURE, *folders]
    run = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, check=True)
    in_its_file, in_float32 = map(int, run.stdout.split())
    weights = 4 * sum(p.numel() for p in model.parameters())
    shard, margin = weights / 8, 8 << 20
    assert weights > 10 * margin
    assert in_its_file < margin
    assert in_float32 < weights + shard + margin


class Code:
    """A pickle that creates a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("created",)


def without_norm(state):
    return {name: weight for name, weight in state.items() if name != "norm.weight"}


@pytest.mark.parametrize(
    "file, change, error",
    [
        (WEIGHTS, LFS, NOT_TENSORS),
        (
            WEIGHTS,
            b"<!DOCTYPE html><html>",
            NOT_TENSORS,
        ),
        (WEIGHTS, "half", NO_WEIGHTS),
        (WEIGHTS, lambda state: {"x": Code()}, NO_WEIGHTS),
        (WEIGHTS, lambda state: {"model": state}, NO_WEIGHTS),
        (WEIGHTS, lambda state: list(state.values()), NO_WEIGHTS),
        (
            WEIGHTS,
            lambda state: {name: w.long() for name, w in state.items()},
            "not floating point",
        ),
        (WEIGHTS, without_norm, "Missing key.*norm.weight"),
        (PARAMS, b"[1]", "expected one JSON object"),
        (PARAMS, b'{"dim": 32', "params.json: broken JSON"),
        (PARAMS, {"vocab_size": 99}, "they belong to two models"),
        (PARAMS, {"n_layers": None}, NO_WEIGHTS),
        (PARAMS, {"dim": "8"}, NO_WEIGHTS),
        (PARAMS, {"use_scaled_rope": True}, "use_scaled_rope"),
        (PARAMS, {"dim": 64}, "size mismatch"),
        ("tokenizer.model", "half", "not a SentencePiece model"),
        ("tokenizer.model", None, "no checkpoint here: no tokenizer.model$"),
        (PARAMS, None, "no checkpoint here: no params.json$"),
        (WEIGHTS, None, r"no checkpoint here: no consolidated.\*.pth$"),
        ("context.json", b"{", "context.json: broken JSON"),
        ("pytorch_model.bin", b"", "python -m common.huggingface import .*/m NEW_FOLDER$"),
        ("model.safetensors", b"", "python -m common.huggingface import .*/m NEW_FOLDER$"),
    ],
)
def test_a_broken_checkpoint_is_one_line_and_runs_no_code(
    saved, file, change, error, capsys, monkeypatch
):
    monkeypatch.chdir(saved)
    path = saved / file
    if file in ("model.safetensors", "pytorch_model.bin"):
        (saved / WEIGHTS).unlink()
    if change is None:
        path.unlink()
    elif change == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif isinstance(change, bytes):
        path.write_bytes(change)
    elif isinstance(change, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    else:
        torch.save(change(torch.load(path, weights_only=True)), path)
    with pytest.raises(ValueError, match=error) as e:
        load(saved)
    assert str(saved) in str(e.value)
    assert "weights_only" not in str(e.value)
    with pytest.raises(SystemExit) as exit_:
        llama2.main(["complete", str(saved), "a"])
    assert (exit_.value.code, capsys.readouterr().err.count("\n")) == (2, 1)
    assert not (saved / "created").exists()


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


def test_a_write_keeps_links_modes_devices_and_neighbours(tmp_path):
    real, link, neighbour, pipe = (tmp_path / name for name in ("real", "link", "real.tmp", "pipe"))
    real.write_bytes(b"old")
    real.chmod(0o640)
    neighbour.write_bytes(b"mine")
    link.symlink_to("real")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for path in (link, pipe):
        llama2.write_atomic(path, lambda file: file.write(b"new"))
    assert (os.read(reader, 9), pipe.is_fifo()) == (b"new", True)
    os.close(reader)
    assert (link.is_symlink(), real.read_bytes(), neighbour.read_bytes()) == (True, b"new", b"mine")
    assert real.stat().st_mode & 0o777 == 0o640
    llama2.write_atomic("/dev/null", lambda file: file.write(b"new"))
    assert os.path.exists("/dev/null") and not os.path.isfile("/dev/null")
    assert len(list(tmp_path.iterdir())) == 4  # no temporary file is left


def test_a_model_takes_the_place_of_one_with_more_shards(saved, tok):
    (saved / "consolidated.01.pth").write_bytes((saved / WEIGHTS).read_bytes())
    save(saved, make_model(vocab_size=tok.vocab_size), tok)
    load(saved)


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nfkc_cf", "soft hyphen", "identity"])
def test_a_tokenizer_that_changes_texts_is_refused(tmp_path, rule):
    """It would read wide letters, or those around a soft hyphen, as tags of the chat format."""
    named = {"normalization_rule_name": rule}
    if rule == "soft hyphen":  # left out: [I-NST] becomes [INST]
        (tmp_path / "rule.tsv").write_text("AD\t\n")
        named = {"normalization_rule_tsv": str(tmp_path / "rule.tsv")}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["[INST] the hen [/INST] sat by the mill"] * 20),
        model_prefix=str(tmp_path / "t"),
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        **named,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    if rule == "identity":
        llama2.Tokenizer(tmp_path / "t.model")
        return
    with pytest.raises(ValueError, match="changes texts.*normalization_rule_name=identity"):
        llama2.Tokenizer(tmp_path / "t.model")
