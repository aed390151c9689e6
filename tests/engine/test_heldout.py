"""Which rows a trained model is judged on: those it has not learned from, read as it learned to read, or as the user says."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from conftest import sentences
from regraft.engine.cli import main
from regraft.engine.config import load_config
from regraft.engine.training.run import train

QUICK = {"max_steps": 1, "batch_size": 4, "learning_rate": 1e-3, "precision": "fp32", "threads": 1}


@pytest.fixture
def carved_run(make_config, tmp_path) -> Path:
    """A run whose dev rows are a share of its training file, train.csv."""
    return train(load_config(make_config(data={"dev": None, "dev_fraction": 0.25}, training=QUICK)), quiet=True).folder


@pytest.fixture
def said(capsys):
    """Exit code, output and complaint of a command."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        found = capsys.readouterr()
        return code, found.out, found.err

    return run


def test_rows_that_training_held_out_are_called_so_and_cannot_be_carved_otherwise(carved_run, tmp_path, said):
    code, out, err = said("evaluate", carved_run)
    assert code == 0 and out.startswith(f"{tmp_path / 'train.csv'} (dev rows carved from it): 16 rows"), err
    code, out, _ = said("export", carved_run, "--to", tmp_path / "b")
    assert code == 0 and f"on 16 rows of {tmp_path / 'train.csv'} (dev rows carved from it): model" in out
    for override in ("dev_fraction=0.9", f"train={tmp_path / 'train.csv'}", "limit=20", "columns.label=text"):
        code, out, err = said("evaluate", carved_run, "--set", f"data.{override}")
        assert (code, out) == (2, "") and f"--set data.{override}: the rows are those that training held out" in err
    code, _, err = said("export", carved_run, "--to", tmp_path / "c", "--set", "data.dev_fraction=0.9")
    assert code == 2 and "held out of" in err and not (tmp_path / "c").exists()
    code, out, err = said("evaluate", carved_run, tmp_path / "train.csv", "--set", "data.limit=20")
    assert code == 0 and out.startswith(f"{tmp_path / 'train.csv'}: 64 rows"), err


def test_rows_are_not_carved_from_a_file_that_is_another_one_now(carved_run, tmp_path, said):
    with (tmp_path / "train.csv").open("a") as file:
        file.write("good film,pos\n")
    for command in (["evaluate", carved_run], ["export", carved_run, "--to", tmp_path / "b"]):
        code, _, err = said(*command)
        assert code == 2 and "train.csv: changed since the run in" in err and "name a file of rows" in err


def test_the_file_of_rows_may_stand_behind_the_options(carved_run, tmp_path, said):
    rows = tmp_path / "rows.csv"
    rows.write_text("body,label\ngood film,pos\nbad plot,neg\n")
    code, out, err = said("evaluate", carved_run, "--format", "json", "--set", "data.columns.text=body", rows)
    assert code == 0 and json.loads(out)["rows"] == 2, err
    with pytest.raises(SystemExit):
        main(["evaluate", str(carved_run), "--format", "json", str(rows), str(rows)])


def test_rows_to_export_on_may_be_read_otherwise(carved_run, tmp_path, said):
    rows = tmp_path / "rows.csv"
    rows.write_text("body,label\ngood film,pos\nbad plot,neg\nslow,other\n")
    options = ["--set", "data.columns.text=body"]
    code, _, err = said("export", carved_run, "--to", tmp_path / "b", "--data", rows, *options)
    assert code == 2 and "Set data.unknown_label: drop" in err
    options += ["--set", "data.unknown_label=drop"]
    code, out, err = said("export", carved_run, "--to", tmp_path / "b", "--data", rows, *options)
    assert code == 0 and f"2 rows of {rows}" in out, err
    code, _, err = said("export", carved_run, "--adapters", "--to", tmp_path / "c", *options)
    assert code == 2 and "each adapter is compared on its own run's rows" in err


def test_rows_of_one_class_give_figures_without_a_librarys_warning(carved_run, tmp_path, said):
    rows = tmp_path / "rows.csv"
    best = json.loads(said("predict", carved_run, "good film", "--format", "jsonl")[1])["label"]
    rows.write_text(f"text,label\ngood film,{best}\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        code, out, err = said("evaluate", carved_run, rows, "--format", "json")
    assert code == 0, err
    assert json.loads(out)["metrics"] | {"loss": 0.0} == {
        "accuracy": 1.0,
        "macro_f1": 1.0,
        "micro_f1": 1.0,
        "matthews": 0.0,
        "loss": 0.0,
    }


def test_a_table_has_one_line_a_text(carved_run, said):
    code, out, err = said("predict", carved_run, "good\r\nfilm\n\nplot", "bad", "--format", "table")
    assert code == 0 and [line.split("  ")[0] for line in out.splitlines()] == ["good film plot", "bad"], err


def test_a_run_folder_that_is_to_be_served_is_called_a_run(carved_run):
    from regraft.engine.bundle import read_info
    from regraft.engine.errors import BundleError

    for folder in (carved_run, carved_run / "best"):
        with pytest.raises(BundleError, match=rf"a trained model, not a bundle: `regraft export {folder} --to BUNDLE`"):
            read_info(folder)


@pytest.mark.parametrize(("learned", "names"), [("csv", ["False", "True"]), ("jsonl", ["false", "true"])])
def test_true_and_false_are_the_same_labels_in_every_format(make_config, tmp_path, said, learned, names):
    rows = [(text, label == "pos") for text, label in sentences(24, 3)]
    files = {"csv": tmp_path / "rows.csv", "jsonl": tmp_path / "rows.jsonl"}
    files["csv"].write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    files["jsonl"].write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    run = train(
        load_config(make_config(data={"train": str(files[learned]), "dev": str(files["csv"])}, training=QUICK)),
        quiet=True,
    ).folder
    found = [said("evaluate", run, file, "--format", "json") for file in files.values()]
    assert [code for code, _, _ in found] == [0, 0], found
    first, second = (json.loads(out) for _, out, _ in found)
    assert first["metrics"] == second["metrics"]
    assert [r["label"] for r in first["details"]["per_class"]] == names


def test_labels_and_weights_may_be_written_as_numbers(make_config, tmp_path, said):
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"{text},{len(text) % 2 + 1}\n" for text, _ in sentences(24, 3)))
    task = {"labels": [2, 1.0], "class_weights": {1: 2.0, 2: 1.0}}
    config = load_config(make_config(data={"train": str(rows), "dev": str(rows)}, task=task, training=QUICK))
    assert (config.task.labels, config.task.class_weights) == (["2", "1"], {"1": 2.0, "2": 1.0})
    code, out, err = said("evaluate", train(config, quiet=True).folder, "--format", "json")
    assert code == 0 and [r["label"] for r in json.loads(out)["details"]["per_class"]] == ["2", "1"], err
