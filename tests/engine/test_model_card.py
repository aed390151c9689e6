"""README.md of a model folder: what the hub parses, what a person copies, and what it does not give away."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from regraft.engine.model_card import write_model_card
from regraft.engine.report import Best, ReportData

LABELS = ("billing", "delivery", "other")
SCORES = ((0.9, 40), (0.8, 30), (0.4, 10))


def config(task: str = "classification", pair: str | None = None) -> dict[str, Any]:
    return {
        "method": "full",
        "model": {"name": "sentence-transformers/all-MiniLM-L6-v2", "max_length": 16},
        "task": {"type": task, "label_smoothing": 0.0},
        "data": {"train": "/home/someone/secret/support/train.jsonl", "columns": {"text": "text", "text_pair": pair}},
        "training": {"learning_rate": 3e-5, "batch_size": 32, "seed": 7},
    }


@pytest.fixture
def data() -> ReportData:
    figures = {"accuracy": 0.9, "macro_f1": 0.85, "matthews": 0.8, "loss": 0.3}
    return ReportData(
        name="support",
        config=config(),
        versions={"torch": "2.13.0"},
        machine="2 cores",
        history=[{"kind": "eval", "split": "dev", "step": 60, "epoch": 3.0, "metrics": figures, "seconds": 1.0}],
        best=Best(60, "accuracy", 0.9),
        details={
            "per_class": [
                {"label": name, "precision": f, "recall": f, "f1": f, "rows": n}
                for name, (f, n) in zip(LABELS, SCORES, strict=True)
            ],
            "calibration": [{"rows": 80, "confidence": 0.93, "accuracy": 0.9}],
        },
        data_notes={
            "splits": {
                "train": {"path": "/home/someone/secret/support/train.jsonl", "rows": 700, "truncated_rows": 2},
                "dev": {"path": "/home/someone/secret/support/dev.jsonl", "rows": 80, "dropped": {"missing": 1}},
            },
            "labels": {"train": {"billing": 400, "delivery": 200, "other": 100}},
        },
        totals={"seconds": 61.0, "tokens": 12_000, "steps": 66},
    )


def card(folder: Path, data: ReportData) -> tuple[dict[str, Any], str]:
    """Front matter and text."""
    _, front, text = write_model_card(folder, data).read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_hub_reads_base_model_task_and_figures(data: ReportData, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    read = ModelCard.load(write_model_card(tmp_path, data)).data
    assert read.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert read.pipeline_tag == "text-classification" and read.library_name == "transformers"
    assert read.language is None
    assert read.metrics == ["accuracy", "f1", "matthews_correlation"]
    found = {r.metric_name: (r.metric_type, r.metric_value) for r in read.eval_results}
    assert found["Accuracy"] == ("accuracy", 0.9) and found["Macro F1"] == ("f1", 0.85)
    assert {r.dataset_name for r in read.eval_results} == {"support"}


def test_a_person_finds_data_figures_settings_and_limits(data: ReportData, tmp_path: Path) -> None:
    _, text = card(tmp_path, data)
    for said in (
        "| Accuracy | 90.0% |",
        "| train | train.jsonl | none | 700 | 2 |",
        "| dev | dev.jsonl | 1 missing | 80 |",
        "| Learning rate | 3e-05 |",
        "| 0 | billing | 400 | 90.0% | 90.0% | 90.0% |",
        "only the first 16 tokens are read",
        "80 rows of dev",
        "off by 3.0% on average",
        "Weak labels (F1 below 50%): other (40.0%)",
        "66 optimizer steps, 12,000 tokens, 1 min 01 s, 2 cores.",
    ):
        assert said in text, said


def test_folders_of_the_training_machine_stay_at_home(data: ReportData, tmp_path: Path) -> None:
    local = {**config(), "model": {"name": "/home/someone/secret/models/minilm", "max_length": 16}}
    front, text = card(tmp_path, replace(data, config=local))
    assert "someone" not in text and "someone" not in yaml.safe_dump(front)
    assert "base_model" not in front, "a folder is no name on the hub"
    assert "Pretrained encoder: minilm." in text


def test_without_an_evaluation_the_card_says_so_and_claims_nothing(tmp_path: Path) -> None:
    front, text = card(tmp_path, ReportData("bare", {"model": {"name": "bert-base-uncased"}}, {}, ""))
    assert "model-index" not in front and front["base_model"] == "bert-base-uncased"
    assert "It was not evaluated." in text and "## Figures" not in text


def test_labels_that_are_markup_do_not_break_the_card(data: ReportData, tmp_path: Path) -> None:
    hostile = "a|b\n---\n<script>`*x*`"
    per_class = [{"label": hostile, "precision": 1.0, "recall": 1.0, "f1": 0.1, "rows": 3}]
    front, text = card(tmp_path, replace(data, name=hostile, details={"per_class": per_class}))
    assert front["model-index"][0]["name"] == "a|b --- <script>`*x*`"
    assert "<script>" not in text and "\n---\n<" not in text
    row = next(line for line in text.splitlines() if line.startswith("| 0 |"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 7, "six cells: the label opened no other"


def test_many_labels_are_counted_not_listed(data: ReportData, tmp_path: Path) -> None:
    labels = [f"label {i}" for i in range(150)]
    rows = [{"label": x, "precision": 1.0, "recall": 1.0, "f1": 1.0, "rows": 3} for x in labels]
    _, text = card(tmp_path, replace(data, details={"per_class": rows}))
    assert "150 labels" in text and "label 149" not in text


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of three outputs with its tokenizer, as transformers saves them."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    folder = tmp_path_factory.mktemp("tiny")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "text", "first", "second"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    names = dict(enumerate(LABELS))
    BertForSequenceClassification(BertConfig(vocab_size=len(words), id2label=names, **sizes)).save_pretrained(folder)
    return folder


def copied(text: str, folder: Path) -> list[dict[str, Any]]:
    """Run each Python block of the card as a person would, with the folder filled in; their variables."""
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    spaces: list[dict[str, Any]] = []
    for block in blocks:
        space: dict[str, Any] = {}
        exec(block.replace("path/to/this/folder", str(folder)), space)
        spaces.append(space)
    return spaces


@pytest.mark.parametrize("pair", [None, "second"])
def test_the_code_on_the_card_runs_and_answers(
    pair: str | None, data: ReportData, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, text = card(tmp_path, replace(data, config=config(pair=pair)))
    _, numbers = copied(text, tiny)
    assert numbers["label"] in LABELS
    assert float(numbers["probabilities"].sum()) == pytest.approx(1, abs=1e-5)
    assert numbers["label"] in capsys.readouterr().out, "the pipeline says the same label"
    assert int(numbers["inputs"]["token_type_ids"].sum()) > 0 if pair else True


def test_the_multilabel_code_applies_each_label_s_own_threshold(data: ReportData, tiny: Path, tmp_path: Path) -> None:
    def labels_at(thresholds: tuple[float, ...]) -> list[str]:
        rows: list[Mapping[str, Any]] = [
            {"label": name, "precision": 1.0, "recall": 1.0, "f1": 1.0, "rows": 3, "threshold": t}
            for name, t in zip(LABELS, thresholds, strict=True)
        ]
        _, text = card(tmp_path, replace(data, config=config("multilabel"), details={"per_class": rows}))
        return copied(text, tiny)[1]["labels"]

    assert labels_at((0.0, 1.0, 0.0)) == ["billing", "other"]
    assert labels_at((0.0, 0.0, 0.0)) == list(LABELS)


def test_the_regression_code_gives_the_number_itself(data: ReportData, tmp_path: Path, tiny: Path) -> None:
    _, text = card(tmp_path, replace(data, config=config("regression"), details={}))
    assert 'function_to_apply="none"' in text and "## Labels" not in text
    (_, numbers) = copied(text, tiny)
    assert numbers["value"] == pytest.approx(float(numbers["logits"][0, 0]))
