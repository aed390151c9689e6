"""The measurements themselves: what they count, how they compare, what they leave behind. Nothing here takes a figure."""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import compare as comparison
import features
import harness
import layers
import machine
import methods
import onnx_cpu
import plot
import products_cpu
import quality
import score
import sources
import startup
import task_rows
import tasks
import tasks_speed
import train_cpu
from benching import SPEED, options_of, runs_of

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"

MEASUREMENTS = {"train_cpu": train_cpu, "quality": quality, "onnx_cpu": onnx_cpu, "startup": startup}
MEASUREMENTS |= {"features": features, "compare": comparison, "methods": methods, "layers": layers}
MEASUREMENTS |= {"tasks": tasks, "tasks_speed": tasks_speed, "products_cpu": products_cpu}
DATA = Path(os.environ.get("REGRAFT_DATA", ROOT.parent / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data sets are not in {DATA} (REGRAFT_DATA)")


# ---- comparing ----------------------------------------------------------------------------------------------------


def test_the_ratio_is_taken_within_a_round_so_that_a_slow_minute_favours_nobody() -> None:
    # The machine was ten times slower in the last two rounds; Regraft was twice as fast in every one.
    found = harness.summarise(runs_of(regraft=[200, 20, 22], peer=[100, 10, 11]), SPEED)["case"]
    assert found["ratios"] == {"peer": 2.0}
    assert found["medians"] == {"regraft": 22, "peer": 11}
    assert [run["value"] for run in found["runs"]] == [200, 20, 22, 100, 10, 11]


def test_less_seconds_count_as_better() -> None:
    claim = harness.Claim("start", "Seconds", "s", higher_is_better=False)
    assert harness.summarise(runs_of(regraft=[2.0], peer=[6.0]), claim)["case"]["ratios"] == {"peer": 3.0}


def test_points_are_compared_by_difference() -> None:
    claim = harness.Claim("quality", "Accuracy", "points", compare="difference")
    found = harness.summarise(runs_of(regraft=[90.5, 91.0], peer=[91.0, 90.5]), claim)["case"]
    assert found["differences"] == {"peer": 0.0}


def test_contestants_take_turns(capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []
    contestants = {name: (lambda n, name=name: (order.append(f"{name}{n}") or 1.0, {})) for name in "ab"}
    found = harness.take_turns("case", contestants, 2)
    assert order == ["a0", "b0", "a1", "b1"]
    assert [(run.who, run.round) for run in found] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]


@pytest.mark.parametrize(
    ("target", "reached"),
    [
        (harness.Target("x", 1.2, at_least=1.2), True),
        (harness.Target("x", 1.19, at_least=1.2), False),
        (harness.Target("x", 0.5, at_most=0.5), True),
        (harness.Target("x", 0.51, at_most=0.5), False),
    ],
)
def test_a_target_is_reached_at_its_bound_and_not_before(target: harness.Target, reached: bool) -> None:
    assert target.reached is reached


# ---- results ------------------------------------------------------------------------------------------------------


def publish(options: argparse.Namespace) -> dict[str, Any]:
    found = runs_of(regraft=[10, 12], peer=[5, 6])
    wanted = lambda cases: [harness.Target("twice", cases["case"]["ratios"]["peer"], at_least=2.0)]  # noqa: E731
    return harness.publish(SPEED, found, options, versions={"peer": {"torch": "2.13.0"}}, targets=wanted)


def test_the_last_line_is_the_json_that_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(options_of(quick=False, out=tmp_path / "new" / "speed.json"))
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads((tmp_path / "new" / "speed.json").read_text(encoding="utf-8"))
    assert printed["targets"] == [{"what": "twice", "measured": 2.0, "at_least": 2.0, "at_most": None, "reached": True}]
    assert printed["machine"]["cores"] >= 1 and printed["machine"]["memory_gb"] > 0
    assert len(printed["cases"]["case"]["runs"]) == 4
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["speed.json"]


def test_a_quick_run_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    publish(options_of())
    assert list(tmp_path.iterdir()) == []
    publish(options_of(quick=False))
    assert [path.name for path in tmp_path.iterdir()] == ["speed.json"]


def test_every_result_can_be_drawn_at_the_width_of_a_readme(tmp_path: Path) -> None:
    claims = {module.CLAIM.compare: module.CLAIM for module in MEASUREMENTS.values()}
    assert set(claims) == {"ratio", "difference"}
    for compare, claim in claims.items():
        path = tmp_path / f"{compare}.json"
        found = [*runs_of(regraft=[50, 60], peer=[40, 41]), harness.Run("alone", "regraft", 0, 0.4)]
        harness.publish(claim, found, options_of(out=path), versions={})
        plot.draw(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".png"))
        width = int.from_bytes(path.with_suffix(".png").read_bytes()[16:20], "big")  # of the PNG's header
        assert width == 1600


def test_kernels_are_drawn_beside_their_rivals(tmp_path: Path) -> None:
    row = {"name": "CRF", "shape": "3 x 4", "direction": "forward", "milliseconds": 0.2, "share": 0.5}
    rows = [{**row, "who": "regraft"}, {**row, "who": "liger, no dropout", "milliseconds": 0.5}]
    about = {"machine": {"cpu": "a CPU"}, "command": "python bench/kernels_gpu.py", "date": "2026-01-01"}
    for name, found in (("measured", rows), ("nothing", rows[:1])):
        plot.draw({**about, "rows": found}, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_a_variant_of_regraft_is_not_told_as_a_peer() -> None:
    assert plot.gained("regraft-int8", 0.5).strip() == "2.00x regraft"
    assert plot.gained("padded", 2.0).strip() == "regraft 2.00x"
    assert plot.gained("regraft", None) == ""


# ---- the machine --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_cores_are_the_container_s_share(tmp_path: Path, files: dict[str, str], expected: float | None) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert machine.cgroup_quota(tmp_path) == expected


# ---- peers --------------------------------------------------------------------------------------------------------


def test_peer_scripts_know_nothing_of_this_repository() -> None:
    own = {"regraft", *(path.stem for path in BENCH.glob("*.py"))}
    for path in sorted((BENCH / "peers").glob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not {name.split(".")[0] for name in names} & own, path.name


def test_peers_are_pinned_and_torch_is_the_same_for_all() -> None:
    for path in sorted((BENCH / "peers").glob("*.txt")):
        pins = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
        assert pins and all(re.fullmatch(r"[\w.-]+(\[\w+\])?==[\w.]+", pin) for pin in pins), path.name
        assert all(pin == "torch==2.13.0" for pin in pins if pin.startswith("torch==")), path.name


# ---- what is counted ----------------------------------------------------------------------------------------------

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(40))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of one narrow layer with a word-level vocabulary."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, **size)).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_both_sides_count_the_same_real_tokens(tiny: Path, tmp_path: Path) -> None:
    # One batch is all rows, whatever their order, so that every step has as many tokens as the file. The longest is
    # far longer than the others: counting pad tokens would give several times as many. Row 0 is cut at 12 tokens.
    lengths = [30, 1, 2, 3, 2, 1, 4, 2]
    rows = [
        {"text": " ".join(f"w{(i + k) % 40}" for k in range(n)), "label": "ab"[i % 2]} for i, n in enumerate(lengths)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    expected = sum(min(n + 2, 12) for n in lengths)  # with [CLS] and [SEP]
    case = train_cpu.Case(8, 8, 12, 1, 2, 1, 0, 0)
    spec = {"warmup_steps": case.warmup_steps, "window_steps": case.window_steps}
    peer = {
        **spec,
        "model": tiny,
        "train": file,
        "max_length": case.max_length,
        "seed": 0,
        "threads": 1,
        "folder": tmp_path / "trainer",
        "arguments": {"per_device_train_batch_size": 8, "max_steps": 3, "use_cpu": True, "save_strategy": "no"},
    }
    theirs = harness.turn(sys.executable, "peers/trainer_run.py", peer, threads=1)
    config = {
        "run": str(tmp_path / "run"),
        "model": {"name": str(tiny), "max_length": case.max_length},
        "data": {"train": str(file), "dev": str(file)},
        "training": {"batch_size": 8, "max_steps": 3, "epochs": 3, "precision": "fp32", "threads": 1},
    }
    mine = {**spec, "config": config, "folder": tmp_path / "regraft"}
    ours = harness.turn(sys.executable, "regraft_train.py", mine, threads=1)
    assert theirs["tokens"] == ours["tokens"] == 2 * expected
    assert theirs["steps"] == ours["steps"] == 2
    assert min(theirs["seconds"], ours["seconds"]) > 0
    start = startup.start_seconds(tmp_path / "run" / "metrics.jsonl")
    assert ours["seconds"] < start < 300  # the process, with its imports, is older than two of its steps


def test_a_run_that_did_not_say_when_it_started_is_no_measurement(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 10}\n', encoding="utf-8")
    with pytest.raises(harness.TurnFailed, match="no record of kind 'start'"):
        startup.start_seconds(tmp_path / "metrics.jsonl")


# ---- quality ------------------------------------------------------------------------------------------------------


def test_scores_of_classes() -> None:
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [0.0, 1.0]])
    found = score.figures(logits, ["no", "yes", "yes", "yes"], ["no", "yes"], "single_label_classification")
    # 3 of 4 right; F1 of "no" 2/3, of "yes" 4/5; one false "no": (2*1 - 0*1) / sqrt(2*3*1*2).
    assert found == {"accuracy": 75.0, "macro_f1": 73.333, "matthews": pytest.approx(57.735, abs=1e-3)}


def test_scores_of_several_labels_use_the_model_s_own_thresholds() -> None:
    logits = np.array([[1.0, -1.0], [-1.0, -1.0]])
    labels = [["a", "b"], ["b"]]
    at_half = score.figures(logits, labels, ["a", "b"], "multi_label_classification")
    tuned = score.figures(logits, labels, ["a", "b"], "multi_label_classification", [0.5, 0.2])
    assert at_half == {"macro_f1": 50.0, "micro_f1": 50.0}
    assert tuned == {"macro_f1": 100.0, "micro_f1": 100.0}


def test_scores_of_numbers_are_correlations() -> None:
    found = score.figures(np.array([[1.0], [2.0], [4.0]]), [0.0, 2.5, 5.0], ["value"], "regression")
    assert found == {"pearson": pytest.approx(98.198, abs=1e-3), "spearman": 100.0}


@needs_data
@pytest.mark.parametrize("name", sorted(sources.SOURCES))
def test_two_readers_read_the_same_rows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from regraft.engine.config import DataConfig
    from regraft.engine.data.read import read_rows
    from regraft.engine.tasks.labels import name_of

    monkeypatch.setattr(sources, "WORK", tmp_path)
    source = sources.SOURCES[name]
    config = DataConfig.model_validate({"train": "", **sources.data_section(name)})
    for split in source.files:
        ours, theirs = read_rows(config, split, task_type=source.task), sources.read(name, split)
        assert len(ours) == len(theirs)
        assert [text.strip() for text in ours.texts] == [row["text"].strip() for row in theirs]
        if source.text_pair is not None:
            assert [text.strip() for text in ours.pairs or []] == [row["text_pair"].strip() for row in theirs]
        assert ours.labels is not None
        if source.task == "classification":
            assert [name_of(label) for label in ours.labels] == [row["label"] for row in theirs]
        elif source.task == "regression":
            assert [float(label) for label in ours.labels] == [row["label"] for row in theirs]
        else:
            names = source.labels() or []
            assert [[names[int(k)] for k in label] for label in ours.labels] == [row["label"] for row in theirs]


@needs_data
def test_the_long_documents_are_half_of_each_class() -> None:
    rows = sources.imdb(40)
    assert sorted(row["label"] for row in rows) == ["neg"] * 20 + ["pos"] * 20
    assert rows == sources.imdb(40) and min(len(row["text"]) for row in rows) > 100


# ---- encoder tasks ------------------------------------------------------------------------------------------------


def test_every_case_has_figures_that_are_learned_and_targets_that_are_figures() -> None:
    options = options_of(quick=False)
    for name, case in tasks.CASES.items():
        assert next(iter(case.figures)) == harness.OURS, name
        assert case.beats.keys() <= case.figures.keys() and (case.beats or case.at_least), name
        for figure in case.figures.values():
            assert figure.of in tasks.LEARNINGS, name
            encoder = getattr(tasks.LEARNINGS[figure.of], "encoder", tasks.MINILM)
            assert encoder in {tasks.MINILM, tasks.CHINESE, *tasks.LEARNINGS}, name
        run = harness.Run(
            name, harness.OURS, 0, 0.0, {"settings": tasks.work_name(case.figures[harness.OURS].of, 0, options)}
        )
        assert json.loads(json.dumps(tasks.described(run, options)))["precision"] == "fp32", name


def test_less_perplexity_is_a_gain() -> None:
    cases = {"imdb-perplexity": {"medians": {"regraft": 12.0, "regraft-head": 20.0}}}
    (target,) = tasks.targets(cases)
    assert (target.measured, target.reached) == (8.0, True)


@needs_data
def test_both_sides_cut_contexts_into_the_same_number_of_tokens(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    from regraft.engine.config import DataConfig, TaskConfig
    from regraft.engine.data.fast_tokenizer import load_fast_tokenizer
    from regraft.engine.tasks import Answering

    monkeypatch.setattr(sources, "WORK", tmp_path)
    sys.path.insert(0, str(BENCH / "peers"))
    try:
        import tasks_run
    finally:
        sys.path.remove(str(BENCH / "peers"))
    files = task_rows.questions(True)
    spec = {"train": files["train"], "max_length": 384, "doc_stride": 128}
    theirs, _, _ = tasks_run.answering(spec, AutoTokenizer.from_pretrained(tiny))
    rows = Answering.read(files["train"], DataConfig(train=files["train"]), split="train")
    task = Answering.from_rows(TaskConfig(type="answering", stride=128), rows, "label")
    ours = task.examples(rows, load_fast_tokenizer(tiny), 384)
    assert len(theirs) >= len(rows) and abs(len(ours.store) - len(theirs)) <= 2
    tokens = sum(len(example["input_ids"]) for example in theirs)
    assert abs(int(ours.store.lengths.sum()) - tokens) < 0.02 * tokens


# ---- commands -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MEASUREMENTS, "plot"])
def test_every_command_explains_itself_without_any_heavy_import(name: str) -> None:
    code = (
        f"import runpy, sys; sys.argv = [{name!r}, '--help']; sys.path.insert(0, {str(BENCH)!r})\n"
        f"try: runpy.run_path({str(BENCH / name)!r} + '.py', run_name='__main__')\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60).stdout
    assert out.startswith("usage:") and out.splitlines()[-1] == "[]"


def test_the_readme_lists_every_claim_with_its_command() -> None:
    text = (BENCH / "README.md").read_text(encoding="utf-8")
    for name, module in MEASUREMENTS.items():
        assert f"`python bench/{name}.py`" in text and module.CLAIM.name == name
