"""What all training stages share: resuming, micro-batches, processes, bfloat16, old results."""

import copy
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import llama2
import train_pretrain
import train_rlhf
import train_sft
from common import run as runs
from common.training import derive_seed
from conftest import (
    ROOT,
    SCRIPTS,
    STAGES,
    interrupt_at,
    losses,
    make_model,
    max_difference,
    model_folder,
    options,
    read_log,
    run_command,
    stage,
    weights,
)
from data import corpus, records
from llama2 import SIZES, generate, load


def generate_with_eos(model, prompts, max_new_tokens, temperature, top_p, seed, eos_id, **more):
    """Answers that end with EOS, which is rare in those of a random model."""
    return [ids + [eos_id] for ids in generate(model, prompts, 4, temperature, 1.0, seed, **more)]


@pytest.fixture(scope="module", autouse=True)
def answers_with_eos():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_rlhf, "generate", generate_with_eos)
        yield


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory, inputs, answers_with_eos):
    """{stage: (script, settings, metrics)} of a run of each stage, from start to end."""
    results = {}
    for name in STAGES:
        # A run may be saved between two lines of the log: here saves come every 2 steps.
        changes = dict(log_every=3) if hasattr(SCRIPTS[name].Settings, "log_every") else {}
        script, config = stage(name, inputs, tmp_path_factory.mktemp(name), **changes)
        results[name] = script, config, script.main(config)
    return results


def difference(a, b):
    """The largest difference between the weights of two runs."""
    return max_difference(weights(model_folder(a)), weights(model_folder(b)))


def crash(script, config, monkeypatch, step=6):
    """Run a script until its step-th gradient step."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(step, script, patch)
        script.main(config)


def test_pretraining_makes_a_model_of_its_size_that_learns_and_writes(tmp_path, inputs, capsys):
    changes = dict(init="", max_steps=30, micro_batch=6)
    _, config = stage("pretrain", inputs, tmp_path / "out", **changes)
    metrics = train_pretrain.main(config)
    curve = losses(config.out)
    assert curve[30] < curve[1] - 1
    assert metrics["val/stories"] < curve[1] - 1
    model, _ = load(config.out)
    assert (model.args.dim, model.args.max_seq_len) == (SIZES["tiny"]["dim"], 32)
    line = r"step 30/30  loss [\d.]+  grad_norm [\d.]+  lr [\de.-]+  [\d,]+ tokens/s  left 0:00"
    assert re.search(line, capsys.readouterr().out)
    assert not (tmp_path / "out/resume.pt").exists()
    llama2.main(["complete", config.out, "Once upon", "--max-new-tokens", "5"])
    assert capsys.readouterr().out.startswith("Once upon")


def test_a_part_of_a_run_has_its_own_seed():
    parts = [(1, "a", step, 0) for step in range(1000)]
    parts += [(2, "a", 3, 0), (1, "b", 3, 0), (1, "a", 3, 1), (1, "a"), (1, 13), (11, 3)]
    seeds = [derive_seed(*part) for part in parts]
    assert seeds == [derive_seed(*part) for part in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**32 for seed in seeds)


# ----------------------------------------------------------------------------------------- resuming
def last_lines(folder):
    """{(step, names): the last such line of the log}: a resumed run may log a step twice."""
    return {(line["step"], *line): line for line in read_log(folder)}


@pytest.mark.parametrize("name", STAGES)
def test_resumed_run_equals_uninterrupted_run(tmp_path, whole_runs, name, monkeypatch):
    script, whole, metrics = whole_runs[name]
    config = replace(whole, out=str(tmp_path), resume=True)
    crash(script, config, monkeypatch, step=1)  # before the first save
    crash(script, config, monkeypatch, step=9 if name == "ppo" else 6)
    assert (model_folder(config) / "resume.pt").exists()
    with pytest.raises(ValueError, match="unfinished run: --resume it"):
        script.main(replace(config, resume=False))
    with pytest.raises(ValueError, match="made with other settings: seed was 1, now 2"):
        script.main(replace(config, seed=2))
    assert script.main(config) == metrics
    assert difference(whole, config) == 0
    folders = model_folder(whole), model_folder(config)
    assert last_lines(folders[0]) == last_lines(folders[1])
    if name == "ppo":
        samples = [(folder / "samples.jsonl").read_text() for folder in folders]
        assert set(samples[0].splitlines()) == set(samples[1].splitlines())


@pytest.mark.parametrize("name", STAGES)
def test_ctrl_c_finishes_the_step_saves_and_prints_how_to_resume(
    tmp_path, whole_runs, name, monkeypatch
):
    """The resumed run may have other values of the settings in MAY_CHANGE."""
    script, whole, _ = whole_runs[name]
    config = replace(whole, out=str(tmp_path), save_every=1000)
    with monkeypatch.context() as patch:
        interrupt_at(5, script, patch, signals=1)
        patch.setattr(sys, "argv", [f"{script.__name__}.py", "--lr", "1", "--overwrite"])
        with pytest.raises(runs.Stopped, match="stopped and saved after step") as e:
            script.main(config)
    assert str(e.value).endswith(f"python {script.__name__}.py --lr 1 --resume")
    step = torch.load(model_folder(config) / "resume.pt", weights_only=True)["step"]
    assert step == {"ppo": 2}.get(name, 5)  # an iteration of PPO has 4 gradient steps here
    changes = dict(save_every=2) | (dict(log_every=2) if hasattr(config, "log_every") else {})
    script.main(replace(config, resume=True, **changes))
    assert difference(whole, config) == 0


def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path, inputs, monkeypatch):
    _, config = stage("sft", inputs, tmp_path)
    interrupt_at(2, train_sft, monkeypatch, signals=2)
    with pytest.raises(KeyboardInterrupt):
        train_sft.main(config)


@pytest.mark.parametrize(
    "name, metric", [("pretrain", "val/stories"), ("sft", "val_loss"), ("rm", "accuracy")]
)
def test_the_best_or_the_last_model_is_kept_also_after_resuming(
    tmp_path, inputs, name, metric, monkeypatch, capsys
):
    """The second evaluation is the best one; the first one is before training."""
    script, config = stage(name, inputs, tmp_path / "last", eval_every=2, keep="last")
    sign, states = (1 if metric == "accuracy" else -1), []
    if name == "rm":
        config = replace(config, epochs=8, val_fraction=0.4)

    def evaluate(model, *_):
        states.append(copy.deepcopy(model.state_dict()))
        return {metric: sign * {1: 0.3, 2: 0.9}.get(len(states), 0.5)}

    monkeypatch.setattr(script, "evaluate", evaluate)
    script.main(config)
    assert max_difference(weights(model_folder(config)), states[-1]) == 0
    assert len(states) > 2
    states.clear()
    best = replace(config, out=str(tmp_path / "best"), keep="best")
    crash(script, best, monkeypatch, step=7)
    script.main(replace(best, resume=True))
    assert "kept: the model of step 2, the best of this run" in capsys.readouterr().out
    assert max_difference(weights(model_folder(best)), states[1]) == 0
    assert difference(best, config) > 0
    with pytest.raises(ValueError, match="made with other settings: eval_every was 2, now 3"):
        script.main(replace(best, resume=True, eval_every=3))


def copy_inputs(inputs, folder):
    """A copy of the inputs that a test may change."""
    copies = {}
    for name, path in vars(inputs).items():
        target = folder / ({"base": "base", "rm": "rm"}.get(name) or Path(path).name)
        (shutil.copytree if Path(path).is_dir() else shutil.copy)(path, target)
        copies[name] = str(target)
    return SimpleNamespace(**copies)


POLICY = ["base/consolidated.00.pth", "base/params.json", "base/tokenizer.model"]
REWARD_MODELS = ["rm/helpfulness/consolidated.00.pth", "rm/safety/consolidated.00.pth"]
READ = {
    "pretrain": ["tokens/stories.train.00000.bin", "tokens/index.json", *POLICY],
    "sft": ["dialogues.jsonl", *POLICY],
    "rm": ["pairs.jsonl", *POLICY],
    "rejection-sampling": ["prompts.jsonl", *REWARD_MODELS, *POLICY],
    "ppo": ["prompts.jsonl", "val.jsonl", *REWARD_MODELS, *POLICY],
}


@pytest.mark.parametrize("name", STAGES)
def test_a_run_cannot_be_resumed_after_a_change_of_its_inputs(tmp_path, inputs, name, monkeypatch):
    script, config = stage(name, copy_inputs(inputs, tmp_path), tmp_path / "out")
    crash(script, config, monkeypatch, step=9 if name == "ppo" else 6)
    for file in READ[name]:
        path = tmp_path / file
        before = path.read_bytes()
        path.write_bytes(before[:-2] + b"\1\0" if path.suffix == ".bin" else before + b"\n")
        with pytest.raises(ValueError, match=f"made from other data: .*{file} has changed"):
            script.main(replace(config, resume=True))
        path.write_bytes(before)


def test_rejection_sampling_continues_after_ctrl_c_while_it_samples(
    tmp_path, whole_runs, monkeypatch, capsys
):
    """Interrupted when all is sampled and nothing of it scored: the answers must not be lost."""
    script, whole, metrics = whole_runs["rejection-sampling"]
    config = replace(whole, out=str(tmp_path))
    score_answers, calls = train_rlhf.score_answers, []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == 2:  # the first call is that of the choice of the temperature
            raise KeyboardInterrupt
        return score_answers(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train_rlhf, "score_answers", interrupt)
        run_command(config, script, monkeypatch)
    assert "keeps the answers sampled so far" in capsys.readouterr().err
    assert len(list(tmp_path.glob("sampled.*.jsonl"))) == 2
    assert script.main(replace(config, resume=True)) == metrics
    assert "48 of 48 answers are known" in capsys.readouterr().out
    for name in ("best.jsonl", "sampling.json", "consolidated.00.pth"):
        assert (tmp_path / name).read_bytes() == (Path(whole.out) / name).read_bytes()
    assert not list(tmp_path.glob("sampled.*"))


def test_rejection_sampling_does_not_continue_on_other_answers(
    tmp_path, inputs, monkeypatch, expect_error
):
    script, config = stage("rejection-sampling", inputs, tmp_path)
    crash(script, config, monkeypatch, step=4)
    best = tmp_path / "best.jsonl"
    best.write_text("".join(best.read_text().splitlines(keepends=True)[:-1]))
    expect_error(script, replace(config, resume=True), "best.jsonl has changed", "--overwrite")


# ----------------------------------------------------------------------------- looks while training
@pytest.mark.parametrize("name", ["pretrain", "sft", "rm"])
def test_the_log_has_the_mean_loss_and_gradient_norm_of_all_steps_since_its_last_line(
    tmp_path, whole_runs, name
):
    script, config, metrics = whole_runs[name]
    every_step = replace(config, out=str(tmp_path), log_every=1)
    script.main(every_step)
    steps = {line["step"]: line for line in read_log(model_folder(every_step)) if "loss" in line}
    lines = [line for line in read_log(model_folder(config)) if "loss" in line]
    assert [line["step"] for line in lines] == sorted({*range(3, len(steps), 3), len(steps)})
    before = 0
    for line in lines:
        since = range(before + 1, line["step"] + 1)
        for key in ("loss", "grad_norm"):
            mean = sum(steps[step][key] for step in since) / len(since)
            assert line[key] == pytest.approx(mean, rel=1e-9)
        assert line["tokens"] == steps[line["step"]]["tokens"] > 0
        before = line["step"]
    assert metrics["loss"] == lines[-1]["loss"]


@pytest.mark.parametrize("name", STAGES)
def test_every_line_of_the_log_has_the_time_and_the_tokens_so_far(whole_runs, name):
    _, config, _ = whole_runs[name]
    log = (model_folder(config) / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in log]
    for key in ("time", "tokens"):
        values = [line[key] for line in lines]
        assert values == sorted(values)
    means = {"tokens_per_second", "grad_norm", "value_grad_norm" if name == "ppo" else "loss"}
    assert means <= set().union(*lines)
    if name == "pretrain":
        assert lines[-1]["tokens"] == config.max_steps * config.batch_size * config.seq_len


@pytest.mark.parametrize(
    "name, metric", [("pretrain", "val/stories"), ("sft", "val_loss"), ("rm", "accuracy")]
)
def test_held_out_data_is_evaluated_before_training_and_at_every_tenth(
    tmp_path, inputs, name, metric
):
    changes = dict(max_steps=25) if name == "pretrain" else dict(epochs=3)
    script, config = stage(name, inputs, tmp_path, **changes)
    script.main(replace(config, eval_every=0, log_every=1000, save_every=1000))
    log = read_log(model_folder(config))
    steps = [line["step"] for line in log if metric in line]
    tenth = -(-steps[-1] // 10)
    assert steps == sorted({*range(0, steps[-1], tenth), steps[-1]})
    assert all("loss" not in line for line in log[:-2])  # it would be that of an earlier step
    assert steps[-1] > 11


@pytest.mark.parametrize("name", ["pretrain", "sft"])
def test_samples_at_the_same_prompts_at_the_start_the_middle_and_the_end(whole_runs, name):
    _, config, _ = whole_runs[name]
    lines = (model_folder(config) / "samples.jsonl").read_text().splitlines()
    samples, last = [json.loads(line) for line in lines], read_log(config.out)[-1]["step"]
    assert [sample["step"] for sample in samples] == [0] * 3 + [last // 2] * 3 + [last] * 3
    prompts = [sample["prompt"] for sample in samples]
    assert prompts == prompts[:3] * 3
    model, tok = load(config.out)
    if name == "sft":  # prompts of dialogues, with nothing of their answers
        assert all(prompt.endswith("[/INST]") for prompt in prompts)
    for sample in samples[-3:]:
        ids = tok.encode(sample["prompt"], bos=True)
        (answer,) = generate(model, [ids], 32, temperature=0, eos_id=tok.eos_id)
        assert llama2.text_after(tok, ids, answer) == sample["answer"]


def test_beginnings_are_of_as_many_sources_as_possible(tmp_path, tok):
    def source(name, *texts):
        ids = sum((tok.encode(text, bos=True, eos=True) for text in texts), [])
        if not ids:
            return SimpleNamespace(name=name, val=corpus.Shards(tmp_path, name, "uint16"))
        ids = np.array(ids, "uint16")
        ids.tofile(tmp_path / f"{name}.val.00000.bin")
        return SimpleNamespace(name=name, val=corpus.Shards(tmp_path, f"{name}.val", "uint16"))

    sources = [source("a", "one fox here", "two fox here"), source("b"), source("c", "hen")]
    found = train_pretrain.beginnings(sources, tok, 3)
    texts = ["one fox here", "hen", "two fox here"]
    assert found == [tok.encode(text, bos=True, eos=True)[:3] for text in texts]


def test_rejection_sampling_reports_rewards_by_the_number_of_samples(whole_runs):
    _, config, _ = whole_runs["rejection-sampling"]
    stats = llama2.load_json(Path(config.out) / "sampling.json")
    assert list(stats["by n"]) == ["1", "2"]
    first, both = stats["by n"]["1"], stats["by n"]["2"]
    assert first[0] == first[1]  # of one answer
    assert both == [stats["max"], stats["median"]]
    assert both[0] > first[0]
    assert stats["prompts"] == 24
    assert stats["samples"] == 2 * (24 + 3)  # with the choice of the temperature
    ((mean, standard_error),) = stats["tried"].values()
    assert standard_error > 0
    assert not (Path(config.out) / "samples.jsonl").exists()


def test_ppo_writes_what_it_computed_token_by_token(tmp_path, inputs, capsys):
    script, config = stage("ppo", inputs, tmp_path, iterations=2, lam=0.9)
    script.main(config)
    line = r"step 2/2 .* explained_variance -?[\d.e-]+  clip_fraction [\d.e-]+"
    assert re.search(line, capsys.readouterr().out)
    written = llama2.load_json(tmp_path / "rollout.json")
    assert written["step"] == 2
    assert len(written["answers"]) == 4
    for answer in written["answers"]:
        n, kl = len(answer["pieces"]) - answer["start"], answer["kl"]
        assert answer["pieces"][0] == "<s>"
        assert answer["pieces"][answer["start"] - 1] != answer["pieces"][-1] == "</s>"
        for name in ("logprobs", "kl", "values", "rewards", "advantages", "returns"):
            assert len(answer[name]) == n
        expected = [-config.beta * x for x in kl]
        expected[-1] += answer["whitened"]  # all answers are finished
        assert answer["rewards"] == pytest.approx(expected, abs=1e-3)
        advantage, next_value = 0.0, 0.0
        for t in reversed(range(n)):
            delta = answer["rewards"][t] + next_value - answer["values"][t]
            advantage, next_value = delta + 0.9 * advantage, answer["values"][t]
            assert answer["returns"][t] == pytest.approx(advantage + next_value, abs=5e-3)


def test_evaluations_of_ppo_report_the_kl_of_each_answer(whole_runs, tok):
    _, config, _ = whole_runs["ppo"]
    lines = (Path(config.out) / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert all(abs(sample["kl"]) < 1e-4 for sample in samples if sample["step"] == 0)
    assert any(abs(sample["kl"]) > 1e-3 for sample in samples if sample["step"] > 0)
    policy, reference = make_model(), make_model()
    policy.output.weight.data[7] *= 2
    answers, expected = [], []
    for prompt, ids in (([1, 5, 6], [7, 8, 2]), ([1, 9], [7])):
        answers.append(records.Answer(records.Prompt("", False, prompt), ids, True))
        tokens, sums = torch.tensor([prompt + ids]), []
        for model in (policy, reference):
            logprobs = model(tokens)[0].log_softmax(-1)
            sums.append(sum(logprobs[len(prompt) + t - 1, i].item() for t, i in enumerate(ids)))
        expected.append(sums[0] - sums[1])
    kl = train_rlhf.log_ratios(policy, reference, answers, 1.0, 4)
    assert kl == pytest.approx(expected, abs=1e-4)


# ----------------------------------------------------------------------------------------- old runs
@pytest.mark.parametrize("name", STAGES)
def test_a_finished_run_is_kept_until_overwrite_and_good_inputs(
    tmp_path, whole_runs, name, monkeypatch, capsys, expect_error
):
    script, whole, _ = whole_runs[name]
    config = replace(whole, out=str(tmp_path / "out"))
    shutil.copytree(whole.out, config.out)
    expect_error(script, config, "holds a finished run", "--overwrite")
    run_command(replace(config, resume=True), script, monkeypatch)
    assert f"{model_folder(config)} is finished" in capsys.readouterr().out
    missing = {"data" if name == "pretrain" else "init": "missing"}
    expect_error(script, replace(config, overwrite=True, **missing), "missing")
    assert difference(whole, config) == 0
    script.main(replace(config, overwrite=True, seed=2, keep="last"))
    assert difference(whole, config) > (0 if name == "ppo" else 1e-4)


def test_overwrite_deletes_the_files_of_another_kind_of_run(tmp_path, inputs, whole_runs):
    shutil.copytree(whole_runs["rejection-sampling"][1].out, tmp_path / "out")
    assert (tmp_path / "out/best.jsonl").exists()
    script, config = stage("ppo", inputs, tmp_path / "out", overwrite=True)
    script.main(config)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    checkpoint = {"params.json", "context.json", "consolidated.00.pth", "tokenizer.model"}
    logs = {"config.json", "metrics.jsonl", "samples.jsonl", "rollout.json", "sources.json"}
    assert names == logs | checkpoint | {".lock"}


def test_a_full_disk_is_one_line_and_the_run_can_be_resumed(tmp_path, inputs, expect_error):
    """A limit on the size of files, which the weights exceed, stands in for a full disk."""
    _, config = stage("sft", inputs, tmp_path / "out", epochs=4)
    train_sft.main(whole := replace(config, out=str(tmp_path / "whole")))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, before[1]))
    try:
        expect_error(train_sft, config, "disk full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    train_sft.main(replace(config, resume=True))
    assert difference(whole, config) == 0


LOSSES = {
    "pretrain": (train_pretrain, "next_token_loss"),
    "sft": (train_sft, "sft_loss"),
    "rm": (SCRIPTS["rm"], "ranking_loss"),
    "rejection-sampling": (train_sft, "sft_loss"),
    "ppo": (train_rlhf, "policy_loss"),
    "ppo, values": (train_rlhf, "value_loss"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_nan_gradient_ends_a_run_and_keeps_the_last_save(
    tmp_path, inputs, name, monkeypatch, expect_error
):
    script, config = stage(name.split(",")[0], inputs, tmp_path / "out", save_every=2)
    module, loss_name = LOSSES[name]
    original, content = getattr(module, loss_name), []
    saved = model_folder(config) / "resume.pt"

    def nan_after_the_first_save(*args):
        loss = original(*args)
        if not saved.exists():
            return loss
        content[:] = content or [saved.read_bytes()]
        nan = float("nan")
        return (loss[0] * nan, loss[1]) if isinstance(loss, tuple) else loss * nan

    monkeypatch.setattr(module, loss_name, nan_after_the_first_save)
    error = "the gradient is NaN or infinite", f"the last save is intact: {saved}"
    expect_error(script, config, *error)
    assert content == [saved.read_bytes()]
    assert not (model_folder(config) / "consolidated.00.pth").exists()
    monkeypatch.setattr(module, loss_name, original)
    script.main(replace(config, resume=True))
    assert (model_folder(config) / "consolidated.00.pth").exists()


# ------------------------------------------------------------------ micro-batches, dtype, processes
@pytest.mark.parametrize("name", ["pretrain", "sft", "rm", "rejection-sampling"])
def test_the_size_of_a_micro_batch_does_not_change_the_model(tmp_path, inputs, whole_runs, name):
    for size in (1, 4):
        script, config = stage(name, inputs, tmp_path / str(size), micro_batch=size)
        script.main(config)
        assert difference(whole_runs[name][1], config) < 2e-5


@pytest.mark.parametrize("name", STAGES)
def test_bfloat16_runs_repeat_exactly_and_differ_from_float32(tmp_path, inputs, name):
    changes = {"pretrain": dict(max_steps=5), "sft": dict(epochs=1), "rm": dict(epochs=1)}
    changes = changes.get(name, dict(tune_epochs=1, iterations=2))
    configs = []
    for i, dtype in enumerate(("bfloat16", "bfloat16", "float32")):
        script, config = stage(name, inputs, tmp_path / str(i), keep="last", **changes)
        configs.append(replace(config, dtype=dtype))
        script.main(configs[i])
    assert difference(configs[0], configs[1]) == 0
    assert difference(configs[0], configs[2]) > 0
    state = weights(model_folder(configs[0]))
    assert all(weight.dtype == torch.float32 for weight in state.values())


def fixed_answers(model, prompts, *_, **more):
    """In place of samples, because each process draws its own random numbers."""
    return [[5 + len(prompt) % 7, 9 + sum(prompt) % 5, 2] for prompt in prompts]


def fixed_texts(model, tok, dialogs, *_):
    """The same for the model's own earlier answers."""
    return [f"own {len(str(messages)) % 5}" for messages in dialogs]


TWO_PROCESSES = """import sys
import train_rlhf, train_sft
from common.run import run_script
from common.settings import parse_settings
from common.training import print0
from conftest import SCRIPTS
from data import records
from test_training import fixed_answers, fixed_texts
train_rlhf.generate, records.respond = fixed_answers, fixed_texts
*commands, endless = open(sys.argv[1]).read().splitlines()
for command in commands:
    name, *argv = command.split("\\t")
    SCRIPTS[name].main(parse_settings(SCRIPTS[name].Settings, {}, "", argv))
print0("now the endless run")
sys.argv = ["train_sft.py", *endless.split("\\t")]
run_script(train_sft.main, train_sft.Settings, {})
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, inputs, answers_with_eos):
    """All tests with two processes share one torchrun, because importing torch takes long.

    ({stage: (settings of a run of one process, of two processes)}, the folder of a run that ends
    when torchrun gets SIGTERM, the output after that).
    """
    folder, configs, commands = tmp_path_factory.mktemp("two"), {}, []
    for name in STAGES:
        changes = dict(mini_batch=8, iterations=3) if name == "ppo" else {}
        script, single = stage(name, inputs, folder / name / "one", **changes)
        double = replace(single, out=str(folder / name / "two"))
        configs[name] = single, double
        commands.append("\t".join([name, *options(double)]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_rlhf, "generate", fixed_answers)
            patch.setattr(records, "respond", fixed_texts)
            script.main(single)
    _, endless = stage("sft", inputs, folder / "endless", epochs=500)
    commands.append("\t".join(options(endless)))
    (folder / "script.py").write_text(TWO_PROCESSES)
    (folder / "commands").write_text("\n".join(commands))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, folder / "script.py", folder / "commands"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, env=environment)
    output = ""
    for line in process.stdout:
        output += line
        if "now the endless run" in output and line.startswith("step"):
            process.send_signal(signal.SIGTERM)
            break
    output = process.stdout.read()
    process.wait()
    return configs, endless.out, output


@pytest.mark.parametrize("name", STAGES)
def test_two_processes_train_like_one(two_processes, inputs, name):
    single, double = two_processes[0][name]
    logs = [read_log(model_folder(config)) for config in (single, double)]
    assert len(logs[0]) == len(logs[1]) > 0
    for a, b in zip(*logs):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], abs=3e-4), key
    # The change of the weights in training. A new reward model starts from a random head.
    change = 1e-2 if name == "rm" else max_difference(weights(single.out), weights(inputs.base))
    assert difference(single, double) <= change / 10
    # With fixed answers the reward never rises, so PPO keeps the policy from the start.
    assert (change > 0) is (name != "ppo")


def test_all_processes_stop_at_the_same_step_after_sigterm(two_processes):
    _, folder, output = two_processes
    assert "stopped and saved after step" in output
    assert "torchrun --nproc_per_node=2 train_sft.py" in output
    step = torch.load(Path(folder) / "resume.pt", weights_only=True)["step"]
    assert f"after step {step} of" in output
