"""--tensorboard: the numbers of metrics.jsonl, each once. Skipped without the package tensorboard.

.ci/run installs it for this file.
"""

import json
from dataclasses import replace

import pytest
from test_training import crash, generate_with_eos

import train_rlhf
from conftest import STAGES, model_folder, stage

tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def read_points(folder):
    """{(name, step): [(value, time), ...]} of the files for TensorBoard in a folder."""
    events = tensorboard.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    points = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            points.setdefault((name, event.step), []).append((event.value, event.wall_time))
    return points


@pytest.mark.parametrize("name", STAGES)
def test_a_resumed_run_has_the_numbers_of_its_log_once_each(tmp_path, inputs, name, monkeypatch):
    monkeypatch.setattr(train_rlhf, "generate", generate_with_eos)
    script, config = stage(name, inputs, tmp_path, tensorboard=True, save_every=2)
    crash(script, config, monkeypatch, step=13 if name == "ppo" else 6)
    script.main(replace(config, resume=True))
    logged, repeated = {}, 0
    for text in (model_folder(config) / "metrics.jsonl").open():
        line = json.loads(text)
        step, time = line.pop("step"), line.pop("time")
        if "tokens_per_second" not in line:  # an evaluation: the tokens are in another line
            del line["tokens"]
        for key, value in line.items():
            repeated += (key, step) in logged
            logged[key, step] = pytest.approx(value, rel=1e-6), pytest.approx(time, rel=0, abs=2e-3)
    # The steps after the last save were logged twice, except where few lines are logged.
    assert (repeated > 0) is (name != "rejection-sampling")
    assert read_points(model_folder(config)) == {key: [point] for key, point in logged.items()}


def test_a_new_run_deletes_the_points_of_an_old_one(tmp_path, inputs):
    script, config = stage("sft", inputs, tmp_path, tensorboard=True, epochs=1)
    script.main(config)
    first = read_points(tmp_path)
    script.main(replace(config, overwrite=True))
    again = read_points(tmp_path)
    assert first.keys() == again.keys()
    assert all(len(found) == 1 for found in again.values())
    script.main(replace(config, overwrite=True, tensorboard=False))
    assert not list(tmp_path.glob("events.*"))
