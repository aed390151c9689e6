"""Whatever is wrong: one clear message, a non-zero exit, an intact run folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import regraft


def refused(path: Path, *overrides: str) -> str:
    """The one message of a training run that ends with exit code 2."""
    sets = [part for o in overrides for part in ("--set", o)]
    done = regraft("train", path, "--quiet", *sets)
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    messages = [line for line in done.stderr.splitlines() if line.startswith("regraft: ")]
    assert len(messages) == 1
    return done.stderr


def test_a_missing_file_is_named_with_its_neighbour(make_config, tmp_path):
    message = refused(make_config(), f"data.train={tmp_path / 'trian.csv'}")
    assert "trian.csv" in message
    assert "train.csv" in message


def test_an_unreadable_row_is_named_by_file_and_line(make_config, tmp_path):
    (tmp_path / "bad.csv").write_text("text,label\ngood,pos\nfine,neg,extra\n")
    assert "bad.csv:3" in refused(make_config(), f"data.train={tmp_path / 'bad.csv'}")


def test_bytes_that_are_not_text_are_named_by_line(make_config, tmp_path):
    (tmp_path / "bad.csv").write_bytes(b"text,label\ngood,pos\ncaf\xe9,neg\n")
    message = refused(make_config(), f"data.train={tmp_path / 'bad.csv'}")
    assert "bad.csv:3" in message
    assert "latin-1" in message or "cp1252" in message


def test_a_dev_label_that_training_never_had_is_named_by_row(make_config, tmp_path):
    (tmp_path / "dev.csv").write_text("text,label\ngood,pos\nfine,poss\n")
    path = make_config()
    (tmp_path / "dev.csv").write_text("text,label\ngood,pos\nfine,poss\n")
    message = refused(path)
    assert "dev.csv:3" in message
    assert "'poss'" in message
    assert "did you mean 'pos'" in message


def test_rows_of_one_class_are_refused(make_config, tmp_path):
    (tmp_path / "one.csv").write_text("text,label\ngood,pos\nfine,pos\nwarm,pos\n")
    assert "at least two classes" in refused(make_config(), f"data.train={tmp_path / 'one.csv'}")


@pytest.mark.parametrize("content", ["", "text,label\n"])
def test_an_empty_data_set_is_refused(make_config, tmp_path, content):
    (tmp_path / "none.csv").write_text(content)
    assert "none.csv" in refused(make_config(), f"data.train={tmp_path / 'none.csv'}")


def test_a_length_beyond_the_model_is_refused_and_long_texts_are_counted(make_config, tmp_path):
    path = make_config()
    assert "takes at most 64 tokens" in refused(path, "model.max_length=100")
    (tmp_path / "long.csv").write_text(
        "text,label\n" + "".join(f"{'good ' * 90},{'pos' if i % 2 else 'neg'}\n" for i in range(8))
    )
    done = regraft("train", path, "--set", f"data.train={tmp_path / 'long.csv'}", "--set", "training.epochs=1")
    assert done.returncode == 0, done.stderr
    assert "8 cut to 64 tokens (224 tokens lost)" in done.stderr


def test_the_position_table_bounds_the_length_where_the_tokenizer_does_not(make_config, tmp_path, tiny_model):
    copy = tmp_path / "silent"
    shutil.copytree(tiny_model, copy)
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    del settings["model_max_length"]
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "takes at most 64 tokens" in refused(make_config(), f"model.name={copy}", "model.max_length=65")


def test_a_model_folder_without_tokenizer_is_refused(make_config, tmp_path, tiny_model):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_model / name, bare / name)
    message = refused(make_config(), f"model.name={bare}")
    assert "no tokenizer" in message
    assert "tokenizer.json" in message


def test_a_model_folder_that_is_none_is_refused(make_config, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in refused(make_config(), f"model.name={tmp_path / 'empty'}")
    assert "no such folder" in refused(make_config(), f"model.name={tmp_path / 'nowhere'}")
    assert "no installed package 'nothing_here'" in refused(make_config(), "model.name=package:nothing_here/model")


def test_a_hub_name_without_a_network_is_refused_in_one_line(make_config):
    message = refused(make_config(), "model.name=somebody/some-model")
    assert "somebody/some-model" in message


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_rows(make_config, tmp_path):
    message = refused(
        make_config(),
        "training.learning_rate=1e30",
        "training.max_grad_norm=null",
        "training.max_bad_steps=3",
        "training.warmup=0",
    )
    assert "3 times in a row" in message
    assert "train.csv:" in message
    folder = tmp_path / "run"
    assert json.loads((folder / "run.json").read_text())["finished"] is False
    assert [json.loads(x)["kind"] for x in (folder / "metrics.jsonl").read_text().splitlines()].count("skipped") == 3


def test_fp16_without_a_gpu_is_refused(make_config):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, where fp16 runs")
    assert "fp16 needs a GPU" in refused(make_config(), "training.precision=fp16")


def test_a_full_disk_ends_the_run_and_space_lets_it_go_on(make_config, full_disk):
    path, folder = make_config(), full_disk.path / "run"
    message = refused(path, f"run={folder}")
    assert "the disk is full" in message
    assert not list(folder.rglob("*.tmp"))
    full_disk.make_room()
    done = regraft("train", path, "--quiet", "--set", f"run={folder}")
    assert done.returncode == 0, done.stderr


def test_predict_and_evaluate_refuse_what_is_no_model(tmp_path):
    for command in (
        ["predict", tmp_path / "no", "text"],
        ["evaluate", tmp_path],
        ["export", tmp_path, "--to", tmp_path / "b"],
    ):
        done = regraft(*command)
        assert done.returncode == 2
        assert done.stderr.startswith("regraft: ")
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "b").exists()


def test_help_answers_without_importing_anything_heavy():
    code = (
        "import sys; sys.argv = ['regraft', '--help']\n"
        "from regraft.engine.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'onnxruntime', 'pydantic', 'numpy', 'fastapi'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("init", "train", "evaluate", "predict", "export", "serve"):
        assert command in done.stdout


def as_is(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_a_model_that_went_astray_is_never_kept(make_config, tmp_path, kind):
    """An evaluation comes before so many steps in a row were skipped that the run would end."""
    if kind == "regression":
        rows = "".join(f"{'good ' * (i % 7 + 1)},{i % 5}\n" for i in range(40))
        (tmp_path / "numbers.csv").write_text("text,label\n" + rows)
    data = {"train": str(tmp_path / "numbers.csv"), "dev": None} if kind == "regression" else {}
    path = make_config(task={"type": kind}, data=data)
    astray = ["training.learning_rate=1e30", "training.max_grad_norm=null", "training.warmup=0"]
    message = refused(path, *astray, "training.epochs=1", "training.max_bad_steps=1000")
    assert "outputs for this row are NaN or infinite" in message
    assert ".csv:" in message and "none was saved" in message
    assert not (tmp_path / "run" / "best").exists()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["finished"] is False


def test_the_last_good_weights_are_where_the_message_says(make_config, tmp_path):
    from safetensors.torch import load_file

    astray = ["training.learning_rate=1e30", "training.max_grad_norm=null", "training.warmup=0"]
    message = refused(make_config(), *astray, "training.max_bad_steps=2")
    assert f"weights of the last good step are in {tmp_path / 'run' / 'checkpoints'}" in message
    [checkpoint] = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert len(load_file(checkpoint / "model.safetensors")) > 10


@pytest.mark.parametrize("value", [".inf", ".nan"])
def test_a_setting_that_is_no_number_is_refused(make_config, value):
    message = refused(make_config(), f"training.learning_rate={value}")
    assert "training.learning_rate" in message and "finite" in message


def test_a_restart_that_cannot_begin_leaves_the_trained_model_alone(make_config, tmp_path):
    path = make_config(training={"epochs": 1})
    assert regraft("train", path, "--quiet").returncode == 0
    before = as_is(tmp_path / "run")
    done = regraft("train", path, "--restart", "--set", f"data.train={tmp_path / 'gone.csv'}")
    assert done.returncode == 2 and "gone.csv: no such file" in done.stderr
    assert as_is(tmp_path / "run") == before
    done = regraft("train", path, "--restart", "--quiet")
    assert done.returncode == 0, done.stderr
    assert "finished before" not in done.stdout


def test_a_finished_run_says_so_and_changed_rows_are_not_taken_for_the_same(make_config, tmp_path):
    path = make_config(training={"epochs": 1})
    assert "finished before" not in regraft("train", path, "--quiet").stdout
    assert "finished before, with the same configuration and rows" in regraft("train", path, "--quiet").stdout
    before = as_is(tmp_path / "run")
    with (tmp_path / "train.csv").open("a") as file:
        file.write("good film,pos\n")
    message = refused(path)
    assert "train.csv: changed since the run" in message and "--restart" in message
    assert as_is(tmp_path / "run") == before


def test_a_file_in_the_place_of_the_run_folder_is_named(make_config, tmp_path):
    path = make_config()
    for place in ("train.csv", "train.csv/run"):
        message = refused(path, f"run={tmp_path / place}")
        assert f"{tmp_path / 'train.csv'} is a file; expected a folder" in message


def test_what_the_system_refuses_is_one_line(make_config, tmp_path):
    path = make_config(training={"epochs": 1})
    assert regraft("train", path, "--quiet").returncode == 0
    done = regraft("export", tmp_path / "run", "--to", tmp_path / "train.csv" / "bundle")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert str(tmp_path / "train.csv") in done.stderr
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "regraft.engine", "predict", str(tmp_path / "run"), "good film"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "regraft: standard output: No space left on device"


def test_an_anchor_within_itself_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("model: &again\n  name: *again\n")
    done = regraft("train", tmp_path / "run.yaml")
    assert done.returncode == 2 and "run.yaml:" in done.stderr and "anchor within itself" in done.stderr
