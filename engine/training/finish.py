"""The end of a run: the best model's figures on every labelled split, tuned thresholds, report and model card."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from regraft.engine.evaluation import Evaluation, evaluate, in_short
from regraft.engine.examples import Examples
from regraft.engine.figures import figure
from regraft.engine.files import write_text
from regraft.engine.machine import describe
from regraft.engine.tasks import Task
from regraft.engine.trained import read_facts, write_facts
from regraft.engine.training.folder import versions_of

if TYPE_CHECKING:
    from regraft.engine.training.run import _Run

WORST_SHOWN = 20


def finish_run(run: _Run) -> dict[str, dict[str, float]]:
    """Evaluate `best/` on dev and test, write evaluation.json, report.html and the model card; metrics by split."""
    run.forget_moments()
    run.load_best()
    task = run.data.task
    found: dict[str, Evaluation] = {}
    for name in ("dev", "test"):
        if name not in run.data.splits:
            continue
        split = run.data.splits[name]
        found[name] = _evaluate(run, split, task)
        if name == "dev" and task.tune(found["dev"].accumulated):
            found["dev"] = _evaluate(run, split, task)
    metrics = {name: e.metrics for name, e in found.items()}
    if not run.accelerator.is_main_process:
        return metrics
    if "test" in found and run.history:
        record = {"kind": "eval", "split": "test", "step": run.state.best_step, "metrics": metrics["test"]}
        run.history.add(record | {"seconds": round(found["test"].seconds, 3)})
    best = run.folder / "best"
    write_facts(best, read_facts(best) | {"task": task.spec(), "metrics": metrics})
    details = {name: e.accumulated.details() for name, e in found.items()}
    write_text(
        run.folder / "evaluation.json",
        json.dumps(
            {"metrics": metrics, "details": details, "data": run.data.notes} | run.findings(), indent=2, default=float
        )
        + "\n",
    )
    for name, values in metrics.items():
        figures = "  ".join(f"{k} {figure(v)}" for k, v in in_short(values, task).items())
        run.say(f"best (step {run.state.best_step})  {name} {figures}")
    write_pages(run, found)
    return metrics


def load_best(run: _Run) -> None:
    """Put the best checkpoint's weights into the model in memory."""
    from regraft.engine.heads.live import saved_weights

    if run.shards is not None:
        from safetensors.torch import load_file

        from regraft.engine.methods.adapt import WEIGHTS
        from regraft.engine.training.sharding import saved_tensors

        best = run.folder / "best"
        weights = load_file(best / WEIGHTS) if run.adaptation.is_adapter else saved_weights(run.running.model, best)
        run.shards.put(run.vocabulary.cut(weights) if run.vocabulary else weights, saved_tensors(run.adaptation))
    elif run.adaptation.is_adapter:
        run.adaptation.load(run.folder / "best")
    else:
        weights = saved_weights(run.running.model, run.folder / "best")
        run.running.model.load_state_dict(run.vocabulary.cut(weights) if run.vocabulary else weights, strict=False)
    run.running.output_scale = None  # it is in the saved weights


def _evaluate(run: _Run, split: Examples, task: Task) -> Evaluation:
    return evaluate(run.running, split, task, accelerator=run.accelerator, keep_worst=WORST_SHOWN)


def worst_rows(evaluation: Evaluation, split: Examples) -> list[dict[str, Any]]:
    """The worst errors as the report shows them."""
    shown = []
    for loss, row, (expected, predicted) in evaluation.worst:
        if predicted == expected:
            continue
        shown.append(
            {
                "where": split.rows.where(row),
                "text": split.rows.texts[row],
                "pair": pair if isinstance(pair := _pair(split, row), str) else None,
                "expected": expected,
                "predicted": predicted,
                "loss": loss,
            }
        )
    return shown


def _pair(split: Examples, row: int) -> Any:
    return None if split.rows.pairs is None else split.rows.pairs[row]


def write_pages(run: _Run, found: dict[str, Evaluation]) -> None:
    from regraft.engine.model_card import write_model_card
    from regraft.engine.report import ReportData, read_history, write_report

    task, state = run.data.task, run.state
    notes = run.data.notes
    data = ReportData(
        name=run.folder.name,
        config=run.config.model_dump(mode="json"),
        versions=versions_of(run.config),
        machine=describe(),
        history=read_history(run.folder / "metrics.jsonl"),
        best=(state.best_step, task.metric, float(state.best_value or 0.0)),
        details=found["dev"].accumulated.details() | run.findings(),
        worst=worst_rows(found["dev"], run.data.splits["dev"]),
        data_notes={"splits": notes, "labels": {name: note["labels"] for name, note in notes.items()}},
        totals={"seconds": state.seconds, "tokens": state.tokens, "steps": state.step, "skipped": state.skipped},
    )
    write_report(run.folder, data)
    write_model_card(run.folder / "best", data)
