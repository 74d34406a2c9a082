"""--shard and --checkpoint-activations: the results of one process, and one format of saves."""

import copy
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_training import fixed_answers, fixed_texts

import train_rlhf
from common import run as runs, training
from conftest import (
    ROOT,
    STAGES,
    make_model,
    make_reward_model,
    max_difference,
    model_folder,
    options,
    read_log,
    stage,
    weights,
)
from data import records

STOP = {"pretrain": 4, "sft": 3, "rm": 3, "rejection-sampling": 2, "ppo": 1}  # steps
SHORT = {  # both processes must draw the same mini-batches of PPO, so one is the whole batch
    "pretrain": dict(max_steps=7, log_every=3),
    "sft": dict(epochs=1, log_every=2),
    "rm": dict(epochs=1, log_every=2),
    "rejection-sampling": dict(tune_epochs=4),
    "ppo": dict(mini_batch=8, iterations=3),
}
SHARDED = dict(shard=True, checkpoint_activations=True)
TWO_PROCESSES = """import sys
from common import training
from conftest import SCRIPTS
from test_sharding import answer_in_a_fixed_way, main_until
sharded, shard = [], training.shard

def count(model, device):
    sharded.append(shard(model, device))
    for p in sharded[-1].parameters():  # no whole weight is kept for the sake of its rows
        rows = (len(p) + 1) // 2
        assert p.to_local().untyped_storage().nbytes() == 4 * rows * p.numel() // len(p)
    return sharded[-1]

training.shard = count
answer_in_a_fixed_way()
for command in open(sys.argv[1]).read().splitlines():
    name, stop, *argv = command.split("\\t")
    sharded.clear()
    main_until(int(stop), name, argv)
    assert sharded and all(map(training.is_sharded, sharded)), name
training.barrier()
training.dist.destroy_process_group()
"""


def answer_in_a_fixed_way(patch=setattr):
    """In place of samples, because each process draws its own random numbers."""
    patch(train_rlhf, "generate", fixed_answers)
    patch(records, "respond", fixed_texts)


def main_until(step, name, argv):
    """Run a stage; save and stop it after this step, if it is not 0."""
    from common.settings import parse_settings
    from conftest import SCRIPTS

    def save_due(self, done):
        self.stopping = done == step
        return self.stopping

    settings = parse_settings(SCRIPTS[name].Settings, {}, "", argv)
    with pytest.MonkeyPatch.context() as patch:
        if step:
            patch.setattr(runs.Run, "save_due", save_due)
            with pytest.raises(runs.Stopped):
                SCRIPTS[name].main(settings)
        else:
            SCRIPTS[name].main(settings)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, inputs):
    """{stage: settings of a run of one process, of one that went on as two, of the reverse}.

    One torchrun for all, because importing torch takes long.
    """
    folder, configs, commands = tmp_path_factory.mktemp("sharded"), {}, []
    with pytest.MonkeyPatch.context() as patch:
        answer_in_a_fixed_way(patch.setattr)
        for name in STAGES:
            script, one = stage(name, inputs, folder / name / "one", **SHORT[name])
            if name != "rejection-sampling":  # which has no such option
                one = replace(one, keep="last")
            one_two = replace(one, out=str(folder / name / "one-two"))
            two_one = replace(one, out=str(folder / name / "two-one"))
            configs[name] = one, one_two, two_one
            script.main(one)
            begun = replace(one, out=str(folder / name / "begun"))
            main_until(STOP[name], name, options(begun))
            # A copy, because this process holds the lock of the folder.
            shutil.copytree(begun.out, one_two.out)
            for config, stop in ((replace(one_two, resume=True), 0), (two_one, STOP[name])):
                argv = options(replace(config, **SHARDED))
                commands.append("\t".join([name, str(stop), *argv]))
        (folder / "script.py").write_text(TWO_PROCESSES)
        (folder / "commands").write_text("\n".join(commands))
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command = [sys.executable, *torchrun, folder / "script.py", folder / "commands"]
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})
        for name in STAGES:
            main_until(0, name, options(replace(configs[name][2], resume=True)))
    return configs


@pytest.mark.parametrize("order", ["one process, then two sharded", "two sharded, then one"])
@pytest.mark.parametrize("name", STAGES)
def test_sharded_runs_equal_one_process_and_go_on_with_or_without_shards(resumed, name, order):
    one, *others = resumed[name]
    other = others[order.startswith("two")]
    logs = []
    for config in (one, other):
        lines = read_log(model_folder(config))
        logs.append({(line["step"], *line): line for line in lines})  # the last one of each kind
    assert logs[0].keys() == logs[1].keys()
    for key, line in logs[0].items():
        for metric, value in line.items():
            assert value == pytest.approx(logs[1][key][metric], abs=1e-5), (key, metric)
    # AdamW divides by the gradient's size, so that rounding errors of small ones are enlarged.
    a, b = (weights(model_folder(config)) for config in (one, other))
    assert {weight.dtype for weight in b.values()} == {torch.float32}
    assert 0 <= max_difference(a, b) < 3e-5


# ---------------------------------------------------------------------------------- one process
def loss_and_gradients(model, tokens, recompute):
    """(loss, gradients, bytes that autograd kept) of a pass through the model."""
    model.recompute = recompute
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model(tokens).float().square().mean()
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return loss, gradients, sum(kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpointed_activations_take_less_memory_and_change_no_bit(tok, dtype):
    for model in (make_model(), make_reward_model(tok)):
        model.matmul_dtype = dtype
        tokens = torch.randint(0, 300, (4, 32))
        loss, gradients, kept = loss_and_gradients(model, tokens, recompute=False)
        again, same_gradients, less = loss_and_gradients(model, tokens, recompute=True)
        assert torch.equal(loss, again)
        assert all(map(torch.equal, gradients, same_gradients))
        assert less < kept / 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_models_have_short_matrices_and_the_same_results(tok, dtype):
    for model in (make_model(), make_reward_model(tok)):
        model.matmul_dtype = dtype
        before = copy.deepcopy(model.state_dict())
        frozen = training.copy_of(model, frozen=True)
        copied = training.copy_of(model)
        tokens = torch.randint(0, 300, (4, 32))
        with torch.no_grad():
            assert torch.equal(model(tokens), frozen(tokens))
            assert torch.equal(model(tokens), copied(tokens))
        assert not any(p.requires_grad for p in frozen.parameters())
        assert frozen.layers[0].attention.wq.weight.dtype == getattr(torch, dtype)
        for exact in (frozen.norm, frozen.tok_embeddings, getattr(frozen, "score", frozen.norm)):
            assert exact.weight.dtype == torch.float32
        # The copy can be trained apart from the model.
        assert all(p.requires_grad and p.dtype == torch.float32 for p in copied.parameters())
        for p in copied.parameters():
            p.data.add_(1)
        assert max_difference(model.state_dict(), before) == 0


def test_one_process_has_nothing_to_shard():
    model = make_model()
    assert training.shard(model, "cpu") is training.whole(model) is training.ddp(model) is model
    assert not training.is_sharded(model)
    state = {"model": model.state_dict(), "best": {"weights": None}, "step": 3}
    gathered = training.gather(state)
    assert gathered["best"] == {"weights": None}
    assert all(gathered["model"][name] is weight for name, weight in state["model"].items())


def test_the_command_to_resume_names_the_nodes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_sft.py", "--shard", "--overwrite"])
    for local, start in (("4", "--nnodes=2 --nproc_per_node=4"), ("8", "--nproc_per_node=8")):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        command = f"torchrun {start} train_sft.py --shard --resume"
        assert runs.command_to_resume(8) == command
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert runs.command_to_resume(1) == "python train_sft.py --shard --resume"


def test_any_number_of_processes_can_do_rejection_sampling(tmp_path, inputs, monkeypatch):
    """--batch-size and --mini-batch are PPO's: 16 answers cannot be divided by 3 processes."""
    monkeypatch.setattr(train_rlhf, "setup", lambda _: (torch.device("cpu"), 0, 3))
    for method, error in (("ppo", "number of processes, 3"), ("rejection-sampling", "missing")):
        config = train_rlhf.Settings(method, init="missing", rm=inputs.rm, out=str(tmp_path))
        config = replace(config, prompts=(inputs.prompts,), val_prompts=(inputs.val_prompts,))
        with pytest.raises(ValueError, match=error):
            train_rlhf.main(config)


def test_each_process_gathers_an_element_per_prompt(tok, monkeypatch):
    """Else answers of other processes would come into other places, or none."""
    prompt = records.Prompt("hi", False, tok.encode("hi", bos=True))
    answers = [records.Answer(prompt, [*tok.encode("yes"), tok.eos_id], True)] * 4
    zeros, finished = torch.zeros(4), torch.tensor([False, False, True, True])
    scores = train_rlhf.Scores(zeros, zeros, zeros, finished, finished, finished & False)
    gathered = []

    def all_gather(items):
        gathered.append(items)
        return items

    monkeypatch.setattr(train_rlhf, "all_gather", all_gather)
    sampled = answers, scores, zeros.view(2, 2)
    monkeypatch.setattr(train_rlhf, "sample_k", lambda *_: sampled)
    config, run = train_rlhf.Settings(samples=2, temperatures=(1.0,)), SimpleNamespace(rank=0)
    best, stats = train_rlhf.sample_best(None, tok, {}, [prompt] * 2, config, run)
    assert [record["answer"] for record in best] == ["yes"]
    assert stats["left_out"] == 1
    assert [None, best[0]] in gathered
