"""What was measured before: it counts where all that decides it is the same, says where it is from, and is not measured again."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import compare as comparison
import harness
import methods
import multi
import quality
import tasks
from benching import SPEED, options_of, runs_of


def test_a_model_that_was_scored_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "WORK", tmp_path)
    options = options_of(precision="fp32", restart=False, out=tmp_path / "published.json")
    kept = quality.work_folder("rte", "regraft", 0, options).with_suffix(".json")
    kept.parent.mkdir()
    kept.write_text(json.dumps({"score": {"accuracy": 61.5}, "seconds": 9.0}), encoding="utf-8")
    assert quality.measured("rte", "regraft", 0, options).value == 61.5
    kept.unlink()
    run = harness.Run("rte", "regraft", 0, 61.5, {"settings": kept.stem})
    options.out.write_text(json.dumps({"cases": {"rte": {"runs": [asdict(run)]}}}), encoding="utf-8")
    assert quality.everything_measured([0], options) == [run], (
        "a published figure counts on a machine without its files"
    )
    others = {"precision": options_of(precision="bf16"), "rows": options_of(precision="fp32", quick=False)}
    for what, changed in others.items():
        assert quality.work_folder("rte", "regraft", 0, changed).with_suffix(".json") != kept, what


def test_a_few_shot_split_that_was_published_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "WORK", tmp_path)
    (tmp_path / "fewshot").mkdir()
    asked: list[int] = []

    def go(files: Any, number: int, options: Any) -> dict[str, Any]:
        asked.append(number)
        return {"accuracy": 0.5, "seconds": 9.0}

    options = options_of(
        quick=False, shots=8, test_rows=1000, at_once=2, restart=False, out=tmp_path / "published.json"
    )
    found = comparison.kept("setfit", go, {}, 3, options)
    assert (found["accuracy"], found["alone"], asked) == (0.5, False, [3])
    run = harness.Run(comparison.ACCURACY, "setfit", 3, 50.0, found)
    (tmp_path / "fewshot" / f"{found['settings']}.json").unlink()
    options.out.write_text(json.dumps({"cases": {run.case: {"runs": [asdict(run)]}}}), encoding="utf-8")
    assert comparison.kept("setfit", go, {}, 3, options) == found
    assert asked == [3]
    for change in ({"shots": 16}, {"test_rows": 500}, {"restart": True}):
        comparison.kept("setfit", go, {}, 3, argparse.Namespace(**{**vars(options), **change}))
    comparison.kept("regraft", go, {}, 3, options)
    comparison.kept("setfit", go, {}, 4, options)
    assert asked == [3, 3, 3, 3, 3, 4]


def piece_options(**changes: Any) -> argparse.Namespace:
    usual = {"methods": None, "models": ",".join(methods.MODELS), "seeds": "0,1", "rows": None, "precision": "fp32"}
    return options_of(**{"quick": False, "no_compile": False, "restart": False, **usual, **changes})


def test_pieces_of_methods_are_told_apart_by_all_that_decides_them() -> None:
    keys = [piece.key for piece in methods.pieces(piece_options())]
    assert len(set(keys)) == len(keys)
    assert keys == [piece.key for piece in methods.pieces(piece_options())]
    for other in ({"precision": "bf16"}, {"threads": 7}, {"quick": True}):
        changed = {
            p.key for p in methods.pieces(piece_options(**other)) if p.who != methods.PEER and p.part != "quality"
        }
        assert not changed & set(keys)


def test_a_piece_that_is_published_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "WORK", tmp_path)
    piece = next(p for p in methods.pieces(piece_options()) if p.who == "lora" and p.part == "quality")
    out = tmp_path / "methods.json"
    options = piece_options(out=out)
    assert methods.earlier(piece, options) is None
    run = harness.Run(piece.case, piece.who, piece.round, 90.0, {"settings": piece.key})
    full = harness.Run(piece.case, "full", piece.round, 90.25, {"settings": "another"})
    harness.publish(methods.CLAIM, [run, full], options, versions={}, targets=methods.targets)
    assert methods.earlier(piece, options) == run
    [target] = json.loads(out.read_text())["targets"]
    assert target["measured"] == -0.25 and target["at_least"] == -0.5 and target["reached"]


def test_a_figure_of_a_task_counts_wherever_it_was_measured_with_the_same_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "WORK", tmp_path)
    options = options_of(restart=False, out=tmp_path / "published.json")
    work = tasks.work_name("wnut17", 0, options)
    found = {"metrics": {"test": {"f1": 0.41234}}, "settings": work}
    kept = tmp_path / "tasks" / f"{work}.json"
    kept.parent.mkdir()
    kept.write_text(json.dumps(found), encoding="utf-8")
    (run,) = tasks.everything_measured([0], options)
    assert (run.case, run.who, run.value) == ("wnut17", "regraft-linear", 41.234)
    kept.unlink()
    assert tasks.everything_measured([0], options) == []
    options.out.write_text(json.dumps({"cases": {"wnut17": {"runs": [asdict(run)]}}}), encoding="utf-8")
    assert tasks.everything_measured([0], options) == [run]
    in_bf16 = options_of(restart=False, out=options.out, precision="bf16")
    assert tasks.earlier("wnut17", 0, in_bf16) is None, "measured anew on a machine that is fast at bf16"
    assert tasks.everything_measured([0], in_bf16) == [run], "and until then it stands"
    assert tasks.work_name("wnut17", 0, options_of(quick=False)) != work
    learning = tasks.LEARNINGS["wnut17"]
    monkeypatch.setitem(tasks.LEARNINGS, "wnut17", replace(learning, training={**learning.training, "epochs": 7}))
    assert tasks.everything_measured([0], options) == [], "other settings, another figure"


@pytest.mark.parametrize(
    ("in_bf16", "counted"), [({}, "fp32"), ({"regraft": [4, 5]}, "fp32"), ({"regraft": [4, 5], "peer": [6]}, "bf16")]
)
def test_figures_stand_until_as_many_are_measured_in_another_precision(in_bf16, counted) -> None:
    every = {"fp32": runs_of(regraft=[1, 2], peer=[3]), "bf16": runs_of(**in_bf16)}

    def known(options: argparse.Namespace) -> list[harness.Run]:
        assert options.restart is False, "what was not trained again still stands"
        return every[options.precision]

    assert harness.in_one_precision(known, options_of(precision="bf16", restart=True)) == every[counted]


def test_a_figure_of_another_precision_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (quality, multi):
        monkeypatch.setattr(module, "WORK", tmp_path)  # not what this checkout has measured
    options = options_of(quick=False, restart=False, out=tmp_path / "published.json", precision="bf16")
    fp32 = argparse.Namespace(**vars(options) | {"precision": "fp32"})
    run = harness.Run("rte", "regraft", 0, 61.5, {"settings": quality.work_folder("rte", "regraft", 0, fp32).name})
    options.out.write_text(json.dumps({"cases": {"rte": {"runs": [asdict(run)]}}}), encoding="utf-8")
    assert quality.everything_measured([0], options) == [run]
    assert quality.precision_of(run, options) == "fp32"
    together = [harness.Run(name, "regraft", 0, 50.0, {"settings": multi._mark(0, fp32)}) for name in multi.settings()]
    cases = {one.case: {"runs": [asdict(one)]} for one in together}
    options.out.write_text(json.dumps({"cases": cases}), encoding="utf-8")
    assert {one.case for one in multi.everything_measured([0], options, options.out)} == set(multi.settings())


def test_what_is_published_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (quality, multi):
        monkeypatch.setattr(module, "WORK", tmp_path)
        monkeypatch.setattr(module, "turn", lambda *_, **__: pytest.fail("a run was started"))
    options = options_of(quick=False, restart=False, out=tmp_path / "published.json", precision="bf16")
    together = tmp_path / "tasks" / multi._mark(0, options) / "found.json"
    together.parent.mkdir(parents=True)
    together.write_text(json.dumps({"metrics": {}, "run_seconds": 1.0}), encoding="utf-8")
    assert multi.everything_measured([0], options, options.out) == []


def test_a_case_that_is_kept_says_where_it_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    harness.publish(SPEED, runs_of(regraft=[1]), options_of(quick=False, out=path), versions={})
    first = json.loads(path.read_text())
    path.write_text(json.dumps(first | {"machine": {"cpu": "an old one"}, "command": "before"}), encoding="utf-8")
    kept = harness.published_cases(path, without=["other"])
    other = [replace(run, case="other") for run in runs_of(regraft=[2])]
    harness.publish(SPEED, other, options_of(quick=False, out=path), versions={}, kept=kept)
    cases = json.loads(path.read_text())["cases"]
    assert (cases["case"]["measured"]["machine"]["cpu"], cases["case"]["measured"]["command"]) == (
        "an old one",
        "before",
    )
    assert "measured" not in cases["other"]
    again = harness.published_cases(path, without=[])
    assert again["case"]["measured"]["command"] == "before", "and goes on saying so"
    assert harness.published_cases(path, without=["case"]).keys() == {"other"}


def test_a_run_that_goes_on_from_another_depends_on_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    options, name = options_of(), "imdb-1000-adapted"
    before = tasks.work_name(name, 0, options), tasks.work_name("imdb-1000", 0, options)
    start = tasks.LEARNINGS["imdb-adapted"]
    monkeypatch.setitem(tasks.LEARNINGS, "imdb-adapted", replace(start, model={"max_length": 64}))
    assert tasks.work_name(name, 0, options) != before[0]
    assert tasks.work_name("imdb-1000", 0, options) == before[1]
