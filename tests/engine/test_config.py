"""Every complaint about a configuration names key, line and the nearest valid name, before anything is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from regraft.engine.config import config_hash, load_config
from regraft.engine.errors import ConfigError

GOOD = "model:\n  name: m\ndata:\n  train: t.csv\n"


def complaint(tmp_path: Path, text: str, *overrides: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path, list(overrides))
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (GOOD + "training:\n  learningrate: 1\n", [":6", "training.learningrate", "unknown key", "'learning_rate'"]),
        (GOOD + "trainin:\n  epochs: 1\n", [":5", "trainin", "'training'"]),
        (GOOD + "training:\n  epochs: many\n", [":6", "training.epochs", "'many'"]),
        (GOOD + "training:\n  batch_size: 0\n", [":6", "training.batch_size", "greater than or equal to 1", "0"]),
        (GOOD + "training:\n  schedule: lineal\n", [":6", "training.schedule", "'linear'", "'lineal'"]),
        (GOOD + "task:\n  type: regression\n  labels: [a, b]\n", [":7", "task.labels", "no classes"]),
        (GOOD + "task:\n  label_smoothing: 0.1\n  type: multilabel\n", [":6", "label_smoothing"]),
        (GOOD + "task:\n  labels: [a, b, a]\n", [":6", "'a' is listed twice"]),
        (GOOD + "task:\n  labels: [refund, order]\n  class_weights: {refnd: 2}\n", [":7", "'refund'"]),
        (GOOD + "task:\n  labels: [yes, no]\n", [":6", "in quotes"]),
        (GOOD + "method: frozen\ntraining:\n  layer_decay: 0.9\n", [":7", "training.layer_decay", "frozen"]),
        (GOOD + "  columns:\n    text: a\n    label: a\n", ["data.columns", "'a' is named twice"]),
        (GOOD + "  header: false\n", ["data.columns", "0-based"]),
        (GOOD + "training:\n  token_budget: 3\n", [":6", "token_budget", "at least 16"]),
        (GOOD + "unfreeze:\n  every: 0\n", ["unfreeze", "every: must be at least 1"]),
        (GOOD + "unfreeze:\n  every: -1\n", ["unfreeze", "every: must be at least 1"]),
        (GOOD + "method: lora\nlora:\n  targets: []\n", ["lora.targets", "at least 1"]),
        (GOOD + "model:\n  name: again\n", [":5", "model", "already set in line 1"]),
        ("data:\n  train: t.csv\n", ["model", "missing"]),
        ("- a\n- b\n", ["expected keys", "list"]),
        ("model: [\n", ["not valid YAML"]),
    ],
)
def test_a_bad_configuration_is_refused_by_key_and_line(tmp_path, text, parts):
    message = complaint(tmp_path, text)
    for part in parts:
        assert part in message, message


def test_several_mistakes_are_told_at_once(tmp_path):
    message = complaint(tmp_path, GOOD + "training:\n  epoch: 1\n  seed: -1\n")
    assert len(message.splitlines()) == 2


def test_overrides_apply_and_are_named_when_wrong(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    config = load_config(path, ["training.learning_rate=3e-5", "task.labels=[x, y]", "trackers=[tensorboard]"])
    assert (config.training.learning_rate, config.task.labels) == (3e-5, ["x", "y"])
    assert "--set" in complaint(tmp_path, GOOD, "training.epoch=3")
    assert "KEY=VALUE" in complaint(tmp_path, GOOD, "training.epochs")


def test_every_key_has_a_default_but_the_model_and_the_data(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    config = load_config(path)
    assert config.run == "runs/mine"
    assert config.training.batch_size == 32


def test_the_hash_covers_what_decides_the_result_and_nothing_else(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    base = config_hash(load_config(path))
    for same in ("run=elsewhere", "training.threads=1", "training.checkpoint_every=5", "trackers=[tensorboard]"):
        assert config_hash(load_config(path, [same])) == base
    for other in ("training.seed=1", "model.max_length=9", "data.train=u.csv", "task.metric=macro_f1"):
        assert config_hash(load_config(path, [other])) != base


def test_a_wrong_key_is_refused_before_torch_is_imported(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(GOOD + "training:\n  epoch: 1\n")
    code = (
        "import sys; from regraft.engine.cli import main; code = main(['train', sys.argv[1]]); "
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "epochs" in done.stderr


@pytest.mark.parametrize(
    ("method", "rate"),
    [("full", 5e-5), ("lora", 1e-3), ("qlora", 1e-3), ("adapter", 1e-3), ("ia3", 1e-2), ("prefix", 3e-2)],
)
def test_a_method_learns_at_its_own_rate_where_none_is_said(tmp_path, method, rate):
    path = tmp_path / "run.yaml"
    path.write_text(GOOD + f"method: {method}\ntraining:\n  epochs: 2\n")
    assert load_config(path).training.learning_rate == rate
    assert load_config(path, ["training.learning_rate=2e-4"]).training.learning_rate == 2e-4


def test_a_head_of_ours_under_lora_leaves_its_rate_to_lora(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(GOOD + "method: lora\nhead:\n  type: mlp\n")
    training = load_config(path).training
    assert (training.learning_rate, training.head_learning_rate) == (1e-3, 1e-3)
