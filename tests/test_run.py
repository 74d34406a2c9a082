"""A run's folder: fingerprints, the lock, the log, what an old run allows, damaged files."""

import datetime
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_rlhf
import train_sft
from common import run as runs, training
from conftest import ROOT, make_model, open_terminal, options, read_log, stage
from llama2 import generate, text_after

FINISHED, UNFINISHED, NOTHING = "consolidated.00.pth", "resume.pt", "params.json"


def write_run(folder, file):
    """Make a folder look as if a run had written `file` last; returns its settings."""
    config = train_sft.Settings(out=str(folder))
    runs.write_json(folder / "config.json", runs.made_of(config, []))
    torch.save({"step": 3, "model": {}, "optimizer": {}, "best": {}}, folder / file)
    return config


def stub_model(**more):
    return SimpleNamespace(parameters=lambda: [], matmul_dtype="float32", **more)


def start_run(folder):
    run = runs.Run(folder, train_sft.Settings(save_every=1000))
    run.begin(stub_model(), None, 4)
    return run


@pytest.mark.parametrize(
    "file, option, outcome",
    [
        (NOTHING, None, "new"),
        (NOTHING, "resume", "new"),
        (NOTHING, "overwrite", "new"),
        (UNFINISHED, None, "holds an unfinished run: --resume it, choose"),
        (UNFINISHED, "resume", "continue"),
        (UNFINISHED, "overwrite", "new"),
        (FINISHED, None, "holds a finished run: choose"),
        (FINISHED, "resume", "is finished"),
        (FINISHED, "overwrite", "new"),
    ],
)
def test_an_old_run_is_continued_replaced_or_refused(tmp_path, file, option, outcome):
    config = write_run(tmp_path, file)
    config = replace(config, **{option: True}) if option else config
    if outcome not in ("new", "continue"):
        with pytest.raises((ValueError, runs.Finished), match=outcome):
            runs.Run(tmp_path, config)
        return
    run = runs.Run(tmp_path, config)
    assert (run.state is None) is (outcome == "new")
    assert (tmp_path / file).exists()  # nothing is deleted before the run begins
    model = stub_model(load_state_dict=lambda state: None)
    assert run.begin(model, model, 9) == (0 if outcome == "new" else 3)
    assert (tmp_path / file).exists() is (outcome == "continue")


@pytest.mark.parametrize(
    "name, content, error",
    [
        ("resume.pt", b"half", "resume.pt: damaged"),
        ("resume.pt", b"", "resume.pt: damaged"),
        ("resume.pt", [1], "resume.pt: damaged"),
        ("resume.pt", {"step": 2}, "resume.pt: damaged"),
        ("config.json", b"{", "config.json: broken JSON"),
        ("config.json", b"[]", "config.json: expected"),
    ],
)
def test_a_damaged_file_of_a_run_is_an_error_with_its_name(tmp_path, name, content, error):
    config = write_run(tmp_path, UNFINISHED)
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=error):
        runs.Run(tmp_path, replace(config, resume=True))


def test_the_last_save_is_deleted_only_after_the_model_is_written(tmp_path, monkeypatch):
    run = start_run(tmp_path)
    (tmp_path / UNFINISHED).write_bytes(b"save")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(runs, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        run.finish(None, None)
    assert (tmp_path / UNFINISHED).read_bytes() == b"save"


def test_a_fingerprint_depends_on_the_content_and_not_on_the_date(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 100)
    before = runs.fingerprint([path])
    os.utime(path, (1, 1))
    assert runs.fingerprint([path]) == before
    path.write_bytes(b"x" * 99 + b"y")
    assert runs.fingerprint([path]) != before


def test_two_processes_cannot_write_to_one_folder(tmp_path):
    script = "from common.run import Run; import train_sft, sys, time\n"
    script += f"run = Run({str(tmp_path)!r}, train_sft.Settings()); print('open', flush=True)\n"
    script += "time.sleep(60)"
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()
    with pytest.raises(ValueError, match=f"{tmp_path} is in use by another process"):
        runs.Run(tmp_path, train_sft.Settings())
    process.kill()
    process.wait()
    runs.Run(tmp_path, train_sft.Settings())  # the system has released the lock


def test_code_that_changed_after_a_run_was_finished_is_named_in_one_line(tmp_path, tok, capsys):
    config = train_sft.Settings(resume=True)
    run = start_run(tmp_path)
    run.finish(make_model(), tok)

    def lines_of_resuming():
        capsys.readouterr()
        with pytest.raises(runs.Finished):
            runs.Run(tmp_path, config)
        return capsys.readouterr().out.splitlines()

    assert lines_of_resuming() == []
    sources = tmp_path / "sources.json"
    prints = json.loads(sources.read_text())
    runs.write_json(sources, prints | {"llama2.py": "1 bytes"})
    (line,) = lines_of_resuming()
    assert "llama2.py changed after" in line
    assert "--overwrite" in line
    sources.unlink()  # finished by code that did not write this file
    assert lines_of_resuming() == []


def test_the_code_of_a_run_is_its_script_those_it_imports_the_model_and_the_optimizer():
    both = {"llama2.py", "training.py"}
    names = {path.name for path in runs.source_files(train_sft.Settings())}
    assert names == both | {"train_sft.py"}
    names = {path.name for path in runs.source_files(train_rlhf.Settings())}
    assert names == both | {"train_sft.py", "train_rlhf.py"}


def test_the_time_of_a_run_counts_what_comes_before_its_first_step(
    tmp_path, tok, monkeypatch, capsys
):
    clock = [0.0]
    monkeypatch.setattr(runs.time, "time", lambda: clock[0])
    run = runs.Run(tmp_path, train_sft.Settings())
    clock[0] = 30.0
    model = make_model()
    model.matmul_dtype = "bfloat16"
    run.begin(model, None, 4)
    clock[0] = 32.0
    run.log(0, score=1.5)
    run.log(2, score=2.5)
    run.finish(model, tok)
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"[\d,]+ parameters, 4 steps, matrix products in bfloat16", lines[0])
    # Nothing is known of the time left before the first step.
    assert lines[1:3] == ["step 0/4  score 1.5", "step 2/4  score 2.5  left 0:02"]
    assert lines[3].endswith(", 32 s")


def test_samples_are_greedy_printed_in_one_line_each_and_written_whole(tmp_path, tok, capsys):
    run, model = start_run(tmp_path), make_model(vocab_size=tok.vocab_size, max_seq_len=128)
    prompts = [tok.encode("a fox", bos=True), tok.encode("a fox and a hen " * 9, bos=True)]
    capsys.readouterr()
    run.show_samples(2, model, tok, prompts)
    printed = capsys.readouterr().out.splitlines()
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["prompt"] for record in records] == [tok.decode(prompt) for prompt in prompts]
    for prompt, record in zip(prompts, records):
        (ids,) = generate(model, [prompt], 32, temperature=0, eos_id=tok.eos_id)
        assert record["answer"] == text_after(tok, prompt, ids)
        assert record["step"] == 2
    assert len(printed) == 2
    assert printed[0].startswith("  a fox -> ")
    assert " hen -> " in printed[1]
    assert all(len(line) <= 100 for line in printed)


def test_the_log_has_the_tokens_per_second_since_the_last_line(tmp_path, monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(runs.time, "time", lambda: clock[0])
    run = start_run(tmp_path)
    for step in range(1, 5):
        clock[0] += 2
        run.count_step(1000)
        if step % 2 == 0:
            run.log(step, **run.take_means())
            assert "500 tokens/s" in capsys.readouterr().out
            clock[0] += 60
            run.log(step, accuracy=0.5)  # an evaluation, whose time is not that of training
            assert "tokens/s" not in capsys.readouterr().out
    first, evaluation, *_ = map(json.loads, (tmp_path / "metrics.jsonl").open())
    means = {"tokens": 2000, "tokens_per_second": 500}
    assert first == {"step": 2, "time": 4.0, **means}
    assert evaluation == {"step": 2, "time": 64.0, "tokens": 2000, "accuracy": 0.5}


def test_without_tensorboard_one_line_names_the_package_before_training(
    tmp_path, inputs, monkeypatch, expect_error
):
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it is then an error
    script, config = stage("sft", inputs, tmp_path / "out", tensorboard=True)
    expect_error(script, config, "--tensorboard needs the package tensorboard: pip install")
    assert not list(tmp_path.glob("out/*"))


def test_the_log_has_null_for_nan_and_infinity(tmp_path):
    run = start_run(tmp_path)
    run.log(1, loss=float("nan"))
    run.log_samples(2, [{"reward": float("inf")}, {"reward": 1.0}])
    assert read_log(tmp_path) == [{"step": 1, "tokens": 0, "loss": None}]
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    samples = [{"step": 2, "reward": None}, {"step": 2, "reward": 1.0}]
    assert [json.loads(line) for line in lines] == samples


def test_a_signal_during_communication_is_not_lost(tmp_path, monkeypatch):
    run = start_run(tmp_path)

    def gather_slowly(items):
        run.stop_requested = True  # what the signal's handler does, at the worst moment
        return items

    monkeypatch.setattr(runs, "all_gather", gather_slowly)
    assert [run.save_due(1), run.save_due(2)] == [False, True]


def test_processes_meet_within_minutes_and_wait_for_hours_while_one_prepares_data(
    monkeypatch, capsys
):
    """WORLD_SIZE may be left in the environment: then no second process ever comes."""
    settings = {}
    monkeypatch.setattr(training.dist, "init_process_group", lambda *_, **kw: settings.update(kw))
    with socket.socket() as free:  # a port that nobody uses
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": ""}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    threads = torch.get_num_threads()
    assert training.MEETING_TIMEOUT.total_seconds() <= 600
    monkeypatch.setattr(training, "MEETING_TIMEOUT", datetime.timedelta(seconds=1))
    with pytest.raises(ValueError, match=f"WORLD_SIZE is 2, but .* met at 127.0.0.1:{port}"):
        training.setup("cpu")
    assert f"process 0 of 2 waits for the others at 127.0.0.1:{port}" in capsys.readouterr().out
    store = torch.distributed.HashStore()
    monkeypatch.setattr(training.dist, "rendezvous", lambda *_, **kw: iter([(store, 0, 2)]))
    training.setup("cpu")
    torch.set_num_threads(threads)
    assert settings["timeout"].total_seconds() >= 3600
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ValueError, match="RANK is 2, but the number of processes 2: unset RANK"):
        training.setup("cpu")
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="WORLD_SIZE=two: expected a number"):
        training.setup("cpu")


def test_a_folder_on_a_file_system_without_locks_is_used_with_a_warning(
    tmp_path, monkeypatch, capsys
):
    def no_locks(_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(runs.FileLock, "acquire", no_locks)
    runs.lock(tmp_path)
    assert f"{tmp_path} is on a file system without locks" in capsys.readouterr().out


def test_half_written_files_of_killed_processes_are_removed(tmp_path):
    for name in (".resume.pt.123.tmp", ".x.jsonl.123.tmp", "notes.tmp"):
        (tmp_path / name).write_bytes(b"half")
    runs.lock(tmp_path, "x.jsonl")  # others may still write the other files of this folder
    names = {path.name for path in tmp_path.glob("*")}
    assert {".resume.pt.123.tmp", "notes.tmp"} == {name for name in names if "tmp" in name}
    runs.lock(tmp_path)
    assert [path.name for path in tmp_path.glob("*tmp")] == ["notes.tmp"]


def test_the_spelling_of_a_path_does_not_matter_when_a_run_is_resumed(tmp_path, monkeypatch):
    """./x, x and the absolute path are the same file. Another file is refused."""
    monkeypatch.chdir(tmp_path)
    data = Path("d.jsonl")
    data.write_bytes(b"one")
    Path("copy.jsonl").write_bytes(b"one")

    def made_of(name):
        config = train_sft.Settings(init="base", data=(f"{name}:2",))
        return runs.made_of(config, [name])

    before = made_of("d.jsonl")
    Path("link").symlink_to(".")
    for name in ("link/d.jsonl", "./d.jsonl", str(data.resolve()), f"../{tmp_path.name}/d.jsonl"):
        runs.check_same("out", before, made_of(name))
    with pytest.raises(ValueError, match="data was"):
        runs.check_same("out", before, made_of("copy.jsonl"))
    data.write_bytes(b"two")
    with pytest.raises(ValueError, match="d.jsonl has changed"):
        runs.check_same("out", before, made_of("./d.jsonl"))


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGHUP"])
def test_a_warning_of_the_cluster_or_a_closed_terminal_saves_and_goes_on(
    tmp_path, monkeypatch, name
):
    number = getattr(signal, name, None) or pytest.skip(f"no {name} here")
    before = {n: signal.getsignal(n) for n in (*runs.ENDING, *runs.SAVING)}
    try:
        run = start_run(tmp_path)
        assert not run.save_due(1)
        os.kill(os.getpid(), number)
        assert run.save_due(2) and not run.stopping
        assert not run.save_due(3)
        signal.signal(number, signal.SIG_IGN)  # as nohup does
        run.handle_signals()
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def test_a_run_goes_on_when_its_terminal_is_closed(tmp_path, inputs):
    script, config = stage("sft", inputs, tmp_path / "out", save_every=10**6, epochs=3)
    pid, terminal, read_until = open_terminal(script.__file__, *options(config))
    read_until(b"step  2")
    os.kill(pid, signal.SIGUSR1)
    read_until(b"a signal asks for a save")
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (tmp_path / "out" / "consolidated.00.pth").exists()


def test_printing_to_a_closed_terminal_is_no_error(monkeypatch):
    """The error may come before the signal: so a run must not end by it."""

    def closed(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("builtins.print", closed)
    training.print0("step 1")
    monkeypatch.setattr(training, "is_main", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        training.print0("step 1")


def test_a_new_run_deletes_all_shards_of_an_old_model(tmp_path):
    config = write_run(tmp_path, FINISHED)
    (tmp_path / "consolidated.01.pth").write_bytes(b"old")
    runs.Run(tmp_path, replace(config, overwrite=True)).begin(stub_model(), None, 4)
    assert not list(tmp_path.glob("*.pth"))
    (tmp_path / "config.json").unlink()
    (tmp_path / "consolidated.01.pth").write_bytes(b"of another program")
    with pytest.raises(ValueError, match=r"holds consolidated.01.pth, but no run wrote it"):
        runs.Run(tmp_path, config)


def test_memory_settings_are_left_out_where_the_c_library_has_no_name(monkeypatch):
    def library(name):  # as on Windows
        if name is None:
            raise TypeError("argument of type 'NoneType' is not iterable")

    monkeypatch.setattr(training.ctypes, "CDLL", library)
    training.keep_freed_memory()
