"""report.html: says everything, loads nothing, and takes texts of strangers as text."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regraft.engine.report import Best, ReportData, read_history, write_report
from regraft.engine.report.lines import Line, line_chart
from regraft.engine.report.scale import smooth, thin, ticks
from regraft.engine.report.style import SCRIPT
from regraft.engine.tasks import Classification, MultiLabel, Regression

HOSTILE = '<script>alert("x")</script><img src=http://evil.example/x onerror=alert(1)>&"\'\x00\ud800'
VOID = {"meta", "br", "col", "wbr"}


class Page(HTMLParser):
    """The page as a tree flattened: (tag, attributes) in order, and all text outside style and script."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute of <{tag}> is given twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def all(self, tag: str, class_: str | None = None) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and (class_ is None or class_ in (a.get("class") or "").split())]


def training(steps: int, *, skip: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for s in range(1, steps + 1):
        if s in skip:
            records.append({"kind": "skipped", "step": s})
        else:
            speed = {"grad_norm": 1.0, "tokens_per_second": 5000.0, "seconds": 0.1 * s}
            records.append(
                {
                    "kind": "train",
                    "step": s,
                    "epoch": s / 100,
                    "loss": 2 / s,
                    "learning_rate": 5e-5 * s / steps,
                    **speed,
                }
            )
    return records


def evaluation(step: int, split: str = "dev", **metrics: float) -> dict[str, Any]:
    return {"kind": "eval", "split": split, "step": step, "epoch": step / 100, "metrics": metrics, "seconds": 1.5}


def config(task: str = "classification") -> dict[str, Any]:
    return {
        "run": "runs/support",
        "method": "full",
        "model": {"name": "sentence-transformers/all-MiniLM-L6-v2"},
        "task": {"type": task},
        "training": {"learning_rate": 5e-5, "betas": (0.9, 0.999)},
    }


def measured(classes: int, rows: int = 600) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Details as the task itself gives them, on random logits that are right more often than not."""
    rng = np.random.default_rng(0)
    labels = tuple(f"class_{i:02d}" for i in range(classes))
    targets = rng.integers(0, classes, rows)
    logits = rng.normal(0, 1, (rows, classes))
    logits[np.arange(rows), targets] += 2.5
    metrics = Classification(labels).metrics()
    metrics.update(logits.astype(np.float32), targets)
    return labels, metrics.details()


@pytest.fixture
def data() -> ReportData:
    labels, details = measured(8)
    return ReportData(
        name="support",
        config=config(),
        versions={"torch": "2.13.0", "transformers": "5.23.0"},
        machine="2 cores, 24 GiB",
        history=[
            *training(100, skip=(7, 42)),
            evaluation(50, accuracy=0.88, macro_f1=0.85, micro_f1=0.88, loss=0.5),
            evaluation(100, accuracy=0.9127, macro_f1=0.901, micro_f1=0.9127, loss=0.41),
        ],
        best=Best(100, "accuracy", 0.9127),
        details=details,
        worst=[
            {
                "where": "dev.jsonl:17",
                "text": "long " * 100,
                "pair": "and its pair",
                "expected": labels[0],
                "predicted": labels[1],
                "loss": 6.25,
            }
        ],
        data_notes={
            "splits": {
                "train": {"path": "train.jsonl", "rows": 5400, "dropped": {"missing": 3}, "tokens": 97200,
                          "truncated_rows": 54, "truncated_tokens": 2160},
                "dev": {"path": "dev.jsonl", "rows": 600, "dropped": {}, "tokens": 10800, "truncated_rows": 0,
                        "truncated_tokens": 0},
            },
            "labels": {"train": {name: 100 + i for i, name in enumerate(labels)}},
        },
        totals={"seconds": 752.4, "tokens": 3_912_000, "steps": 98, "skipped": 2},
    )  # fmt: skip


def page_of(data: ReportData, folder: Path) -> Page:
    return Page(write_report(folder, data).read_text(encoding="utf-8"))


def test_the_page_says_what_was_reached_how_and_from_what(data: ReportData, tmp_path: Path) -> None:
    page = page_of(data, tmp_path)
    for said in (
        "all-MiniLM-L6-v2 fine-tuned for classification on 5,400 rows in 12 min 32 s.",
        "Best accuracy on dev: 91.3% (step 100, epoch 1).",
        "2 steps were skipped because the loss or the gradient was not finite (step 7, 42",
        "3 missing",
        "54 (1.0%)",
        "dev.jsonl:17",
        "and its pair",
        "6.250",
        "torch 2.13.0, transformers 5.23.0",
        "2 cores, 24 GiB",
        "learning_rate: 5.0e-05",
        "Expected calibration error",
    ):
        assert said in page.text, said
    headings = list(re.findall(r"<h2>(.*?)</h2>", (tmp_path / "report.html").read_text()))
    assert headings == [
        "Training",
        "Evaluations",
        "Confusion",
        "Calibration",
        "Classes",
        "Worst errors",
        "Data",
        "Settings",
    ]


def test_nothing_is_loaded_from_elsewhere_and_no_other_script_may_run(data: ReportData, tmp_path: Path) -> None:
    page = page_of(data, tmp_path)
    source = (tmp_path / "report.html").read_text()
    for tag, attributes in page.tags:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "form", "use", "image"}
        assert not {"src", "href", "xlink:href", "srcset", "action"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert "url(" not in source and "@import" not in source and "http" not in source.replace("http-equiv", "")
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and "default-src 'none'" in policy and "script-src 'sha256-" in policy
    assert len(page.all("script")) == 1 and SCRIPT in source


def test_hostile_text_is_shown_as_text_wherever_it_comes_from(data: ReportData, tmp_path: Path) -> None:
    labels = [HOSTILE, "other"]
    hostile = replace(
        data,
        name=HOSTILE,
        machine=HOSTILE,
        versions={HOSTILE: HOSTILE},
        config={**config(), "method": HOSTILE, "note": HOSTILE},
        history=[*data.history, evaluation(100, split=HOSTILE, **{HOSTILE: 0.5})],
        details={
            "confusion": {"labels": labels, "matrix": [[3, 1], [2, 4]]},
            "per_class": [{"label": x, "precision": 0.5, "recall": 0.5, "f1": 0.5, "rows": 4} for x in labels],
        },
        worst=[dict.fromkeys(("where", "text", "pair", "expected", "predicted"), HOSTILE * 20) | {"loss": 1.0}],
        data_notes={
            "splits": {HOSTILE: {"path": HOSTILE, "rows": 1, "dropped": {HOSTILE: 1}}},
            "labels": {HOSTILE: {HOSTILE: 1}},
        },
    )
    page = page_of(hostile, tmp_path)
    assert len(page.all("script")) == 1 and not page.all("img")
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert '<script>alert("x")</script>' in page.text
    assert "\x00" not in (tmp_path / "report.html").read_text()


def test_a_long_text_is_clipped_and_whole_in_its_title(data: ReportData, tmp_path: Path) -> None:
    spans = [a for a in page_of(data, tmp_path).all("span") if a.get("title")]
    assert "long " * 100 in [a["title"] for a in spans]


def test_small_confusion_matrix_names_and_counts_every_class(data: ReportData, tmp_path: Path) -> None:
    page = page_of(data, tmp_path)
    matrix = np.array(data.details["confusion"]["matrix"])
    assert len(page.all("rect", "right")) == np.count_nonzero(np.diag(matrix))
    assert len(page.all("rect", "wrong")) == np.count_nonzero(matrix) - np.count_nonzero(np.diag(matrix))
    for i, label in enumerate(data.details["confusion"]["labels"]):
        assert f"{label}, right: {matrix[i, i]} rows" in page.text


def test_77_classes_show_the_most_confused_pairs_and_keep_the_page_small(data: ReportData, tmp_path: Path) -> None:
    labels, details = measured(77, rows=3080)
    matrix = np.array(details["confusion"]["matrix"])
    page = page_of(replace(data, details=details), tmp_path)
    off = matrix - np.diag(np.diag(matrix))
    true, predicted = np.unravel_index(off.argmax(), off.shape)
    row = f"{labels[true]}{labels[predicted]}{off.max()}{100 * off.max() / matrix[true].sum():.1f}%"
    assert row in page.text.replace(" ", "").replace("\u200b", "")
    assert len(page.all("rect", "right")) == np.count_nonzero(np.diag(matrix))
    assert all(label in page.text for label in labels)
    assert (tmp_path / "report.html").stat().st_size < 500_000


def test_expected_calibration_error_is_the_weighted_gap(data: ReportData) -> None:
    bins = [{"rows": 30, "confidence": 0.9, "accuracy": 0.8}, {"rows": 10, "confidence": 0.5, "accuracy": 0.7}]
    assert replace(data, details={"calibration": bins}).calibration_error == pytest.approx((30 * 0.1 + 10 * 0.2) / 40)
    assert replace(data, details={}).calibration_error is None


def test_weakest_classes_come_first_and_unmeasured_ones_last(data: ReportData, tmp_path: Path) -> None:
    figures = {"good": (0.9, 10), "absent": (0.0, 0), "bad": (0.2, 10)}
    rows = [{"label": k, "precision": f, "recall": f, "f1": f, "rows": n} for k, (f, n) in figures.items()]
    text = page_of(replace(data, details={"per_class": rows}), tmp_path).text
    assert text.index("bad") < text.index("good") < text.index("absent")
    assert "1 of 3 classes had no row" in text


def test_multilabel_shows_a_threshold_for_each_label(data: ReportData, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    metrics = MultiLabel(("joy", "anger"), thresholds=np.array([0.25, 0.61])).metrics()
    metrics.update(rng.normal(0, 1, (50, 2)).astype(np.float32), (rng.random((50, 2)) < 0.3).astype(np.float32))
    text = page_of(replace(data, config=config("multilabel"), details=metrics.details()), tmp_path).text
    assert "Threshold" in text and "0.250" in text and "0.610" in text


def test_regression_shows_true_against_predicted_and_its_dev_error_beside_the_loss(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    true = rng.uniform(0, 5, 200).astype(np.float32)
    metrics = Regression().metrics()
    metrics.update((true + rng.normal(0, 0.4, 200).astype(np.float32))[:, None], true)
    history = [*training(30), evaluation(30, pearson=0.87, spearman=0.86, mse=0.5, mae=0.4)]
    best = (30, "pearson", 0.87)
    data = ReportData("stsb", config("regression"), {}, "", history, best, metrics.details())
    page = page_of(data, tmp_path)
    assert "Best Pearson on dev: 0.870" in page.text
    assert len(page.all("circle", "point")) == 200
    assert page.all("circle", "c3"), "the dev error is in the loss chart"
    assert "Confusion" not in page.text and "Calibration" not in page.text


def test_the_best_evaluation_is_ringed_and_in_bold(data: ReportData, tmp_path: Path) -> None:
    page = page_of(data, tmp_path)
    assert len(page.all("circle", "best")) == 1
    assert len(page.all("tr", "kept")) == 1


def test_a_figure_equal_to_another_is_drawn_once(data: ReportData, tmp_path: Path) -> None:
    # Micro F1 of a single-label task is its accuracy.
    names = [str(a["class"]) for a in page_of(data, tmp_path).all("path")]
    assert [name for name in names if name.endswith(("c2", "c3"))] == ["line c3", "line c2"], (
        "dev loss, macro F1; no line for micro F1"
    )


def test_a_run_that_recorded_nothing_still_has_a_page(tmp_path: Path) -> None:
    page = page_of(ReportData("empty", {}, {}, ""), tmp_path)
    assert "It was not evaluated." in page.text and "No training step was recorded." in page.text
    assert not page.all("svg")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_one_point_one_class_and_figures_that_are_no_numbers(value: float | None, tmp_path: Path) -> None:
    record = {"kind": "train", "step": 1, "loss": 2.0, "learning_rate": 1e-5, "grad_norm": value}
    details = {
        "confusion": {"labels": ["only"], "matrix": [[4]]},
        "calibration": [{"rows": 4, "confidence": 1.0, "accuracy": 1.0}],
        "per_class": [{"label": "only", "precision": 1, "recall": 1, "f1": 1, "rows": 4}],
    }
    history = [record, evaluation(1, accuracy=1.0, loss=value)]  # type: ignore[arg-type]
    page = page_of(ReportData("one", config(), {}, "", history, (1, "accuracy", 1.0), details), tmp_path)
    drawn = " ".join(str(v) for tag, a in page.tags if tag in {"path", "circle", "rect", "line"} for v in a.values())
    assert "nan" not in drawn and "inf" not in drawn and "None" not in drawn
    assert "Gradient norm" not in page.text
    assert "No row was taken for another class." in page.text


def test_a_known_curve_lands_on_known_coordinates() -> None:
    # y from 0 to 1.05 times the highest value over 10..214, x from 0 to 10 over 35..428: one digit of axis labels more
    # would move the left edge by 7.
    points = [(0.0, 0.0), (5.0, 2.0), (10.0, 1.0)]
    page = Page(line_chart([Line("loss", points)], title="Loss") or "")
    levels = list(page.all("line", "grid"))
    left = float(levels[0]["x1"] or 0)
    assert left == 14 + 7 * len("0.5") and {a["x2"] for a in levels} == {"428"}
    expected = [(left + x / 10 * (428 - left), 214 - y / 2.1 * (214 - 10)) for x, y in points]
    (d,) = [a["d"] for a in page.all("path")]
    assert d is not None
    drawn = [tuple(map(float, pair.split(","))) for pair in re.sub("[ML]", "", d).split()]
    assert drawn == pytest.approx([pytest.approx(p, abs=0.051) for p in expected])
    assert d.startswith(f"M{left:g},214 L")


def test_a_hundred_thousand_steps_stay_a_small_page_and_keep_their_spike(tmp_path: Path) -> None:
    points = [(float(i), 1.0) for i in range(100_000)]
    points[54_321] = (54_321.0, 2.5)
    assert (54_321.0, 2.5) in thin(points) and len(thin(points)) <= 400
    history = [{"kind": "train", "step": i, "loss": 1.0 + (i == 543)} for i in range(1, 20_001)]
    page = write_report(tmp_path, ReportData("long", config(), {}, "", history))
    assert page.stat().st_size < 60_000


def test_a_few_spikes_do_not_flatten_the_rest() -> None:
    points = [(float(i), 1.0) for i in range(1000)]
    points[500] = (500.0, 1e6)
    page = Page(line_chart([Line("norm", points)], title="") or "")
    heights = [float(y) for y in re.findall(r",([\d.]+)", page.all("path")[0]["d"] or "")]
    assert max(heights) - min(heights) > 50 and max(heights) < 120, "the usual value is in the upper half, not at 0"


def test_smoothing_keeps_a_straight_line_straight_and_ends_where_it_ends() -> None:
    line = [(float(i), 2.0 * i) for i in range(50)]
    inner = smooth(line, 9)[4:-4]
    assert [y for _, y in inner] == pytest.approx([2 * x for x, _ in inner])
    assert [x for x, _ in smooth(line, 9)] == [x for x, _ in line]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 5e-5), (0.83, 0.91), (-3, 7), (0, 123_456)])
def test_axis_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 8 and low <= found[0] and found[-1] <= high * (1 + 1e-9)
    steps = np.diff(found)
    assert steps == pytest.approx(steps[0])
    assert f"{steps[0]:e}"[:3] in {"1.0", "2.0", "2.5", "5.0"}


def test_a_report_is_replaced_whole_or_not_at_all(data: ReportData, tmp_path: Path) -> None:
    before = write_report(tmp_path, data).read_bytes()
    with pytest.raises(KeyError):
        write_report(tmp_path, replace(data, details={"confusion": {"labels": ["a"]}}))
    assert (tmp_path / "report.html").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_history_survives_a_torn_line_and_a_step_written_twice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    first = [{"kind": "train", "step": s, "loss": 1.0 / s} for s in (1, 2, 3)]
    again = [{"kind": "train", "step": 3, "loss": 0.5}, {"kind": "eval", "split": "dev", "step": 3, "metrics": {}}]
    whole = "".join(json.dumps(r) + "\n" for r in [*first, *again])
    path.write_text(whole + '{"kind": "train", "step": 4, "lo')
    assert read_history(path) == [first[0], first[1], *again]
    assert f"{path}:6" in caplog.text
    path.write_text('{"kind": "tra\n' + whole)
    assert read_history(path) == [first[0], first[1], *again]
    assert read_history(tmp_path / "none.jsonl") == []
