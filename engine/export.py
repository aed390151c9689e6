"""`regraft export`: a graph, shown to answer like the model, with all that serving needs; or a refusal with figures.

Nothing is left half-written: the bundle appears whole, after every check has passed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regraft.engine.batches import by_length
from regraft.engine.bundle import BundleInfo, write_info
from regraft.engine.errors import DataError, ExportError
from regraft.engine.examples import Examples
from regraft.engine.figures import figure
from regraft.engine.files import new_folder
from regraft.engine.graph_inputs import graph_inputs, graph_outputs
from regraft.engine.heldout import read_otherwise
from regraft.engine.machine import versions
from regraft.engine.methods.settings import libraries
from regraft.engine.methods.virtual import Prompt
from regraft.engine.tasks.base import MARKED
from regraft.engine.tasks.several import Several
from regraft.engine.threads import available_threads
from regraft.engine.trained import Trained, load_trained, takes_pairs

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

PARITY_TOLERANCE = 1e-4
CHECK_ROWS = 4096
INT8_NOTE = (
    "int8: the activations of a batch share a scale, so a text's scores depend a little on what else is in its batch, and a "
    "text near a threshold can change its label. The metric was therefore measured in batches and one row at a time "
    "(`alone` above), and both were within what was allowed. Where answers must not vary, export without --int8."
)
ALONE_ROWS = 1024  # that int8 is measured on one at a time too
# Token ids, token types and marked places of each sequence -> what the head gives for each
Run = Callable[
    [list[np.ndarray], list[np.ndarray] | None, list[np.ndarray] | None],
    Sequence[np.ndarray],
]


@dataclass(frozen=True)
class Comparison:
    """Held-out rows that model and graph are compared on, with the model's own outputs, one a sequence."""

    examples: Examples
    model_metrics: dict[str, float]
    model_outputs: Sequence[np.ndarray]


def export_bundle(
    model: str | Path | Sequence[str | Path],
    to: str | Path,
    *,
    layout: str = "packed",
    int8: bool = False,
    max_loss: float = 0.5,
    data_file: str | None = None,
    overrides: Sequence[str] = (),
    force: bool = False,
) -> str:
    """Write a bundle and return what was measured, as lines of text.

    `max_loss`: points (hundredths) of the task's metric that int8 may cost; `overrides`: of what the run's `data` says,
    for the rows compared on. Raises ExportError when the graph differs
    from the model, int8 costs more than that, or `to` exists and `force` is off.
    """
    import torch

    from regraft.engine.graphs import write_graph

    to = Path(to)
    may_write(to, force)
    torch.set_num_threads(available_threads())
    trained = read_otherwise(load_models(model), overrides, data_file, split="dev")
    running = trained.running
    if "bag" in trained.facts:
        raise ExportError(f"{model}: {running.reason}")
    if layout == "packed" and not running.packed:
        raise ExportError(f"{model}: cannot be exported packed: {running.reason}. Use --layout padded")
    if layout == "padded" and running.places_before:
        raise ExportError(f"{model}: method: prefix is exported packed only; leave --layout padded out")
    _refuse_one_file_for_several(trained, data_file)
    comparison = compare_rows(trained, data_file)
    if int8:
        _check_gate(trained, comparison)
    expected = grid_logits(trained)
    info = BundleInfo(
        layout=layout,
        precision="fp32",
        task=trained.task.spec(),
        max_length=trained.max_length,
        pad_token_id=trained.tokenizer.pad_token_id,
        position_offset=running.position_offset,
        token_types=running.uses_token_types,
        reads=trained.task.reads,
        prompt=[running.virtual.first, running.virtual.count] if isinstance(running.virtual, Prompt) else [],
        pairs=takes_pairs(trained),
        source={"folder": str(trained.folder), "base_model": trained.facts["base_model"]},
        versions=versions(*libraries(trained.facts.get("method", "full"), "adamw")),
    )
    with new_folder(to) as folder:
        graph = folder / "model.onnx"
        write_graph(running, info, graph)
        parity = check_parity(graph_runner(open_graph(graph), info), expected)
        if int8:
            assert comparison is not None
            info = quantise_within(graph, info, trained, comparison, max_loss, [batch for batch, _ in expected])
        else:
            info = replace(info, quality=same_answers(trained, comparison, graph_runner(open_graph(graph), info)))
        info = replace(info, parity=parity)
        trained.tokenizer.save(folder)
        (folder / "README.md").write_text(_readme(info), encoding="utf-8")
        write_info(folder, info)
    return _report(to, info)


def may_write(to: Path, force: bool) -> None:
    """Raise ExportError where `to` is there and is not to be replaced."""
    if to.exists() and not force:
        raise ExportError(f"{to}: already there; choose another folder, or replace it with --force")
    if to.exists() and not (to / "bundle.json").is_file():
        raise ExportError(f"{to}: not a bundle, so --force does not replace it")


def load_models(model: str | Path | Sequence[str | Path]) -> Trained:
    """One trained model, or several heads over one encoder as one."""
    if isinstance(model, str | Path):
        return load_trained(model)
    if len(model) == 1:
        return load_trained(model[0])
    from regraft.engine.heads.several import load_several

    return load_several(model)


def open_graph(path: Path) -> InferenceSession:
    """An ONNX Runtime session on the CPU with this process's share of threads."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = available_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def graph_runner(session: InferenceSession, info: BundleInfo) -> Run:
    def run(
        ids: list[np.ndarray], types: list[np.ndarray] | None, marks: list[np.ndarray] | None
    ) -> Sequence[np.ndarray]:
        return graph_outputs(info, session.run(["logits"], graph_inputs(info, ids, types, marks))[0], ids, marks)

    return run


def grid(vocabulary: int, longest: int) -> list[list[np.ndarray]]:
    """Batches over the shapes that go wrong: one sequence of one token, the longest, equal and mixed lengths."""
    generator = np.random.Generator(np.random.Philox(5))
    shapes = [[1], [7], [longest], [5, 5, 5], [1, longest, 13], [2, 31, 8, 8, 90, 3]]
    low = min(10, vocabulary - 1)
    return [[generator.integers(low, vocabulary, min(n, longest)) for n in shape] for shape in shapes]


def grid_logits(trained: Trained) -> list[tuple[list[np.ndarray], np.ndarray]]:
    """The torch model's logits for every batch of the grid, as rows of one array a batch."""
    import torch

    from regraft.engine.packing import pack

    running = trained.running
    running.eval()
    device = next(running.parameters()).device
    found = []
    with torch.no_grad():
        for batch in grid(running.model.config.vocab_size, trained.max_length):
            starts = np.cumsum([0, *map(len, batch)])[:-1]
            marks = np.concatenate([start + m for start, m in zip(starts, _grid_marks(batch), strict=True)])
            packed = pack(batch, marks=marks if running.reads == MARKED else None)
            logits = running(packed.to(device))
            logits = logits[0] if isinstance(logits, tuple) else logits
            found.append((batch, logits.float().cpu().numpy()))
    return found


def _grid_marks(batch: list[np.ndarray]) -> list[np.ndarray]:
    return [np.arange(0, len(x), 5) for x in batch]


def check_parity(run: Run, expected: list[tuple[list[np.ndarray], np.ndarray]]) -> dict[str, Any]:
    """Largest logit error over the grid. Raises ExportError beyond PARITY_TOLERANCE of the largest logit."""
    worst, where = 0.0, ""
    for batch, logits in expected:
        found = np.concatenate([np.atleast_2d(x) for x in run(batch, None, _grid_marks(batch))])
        scale = max(1.0, float(np.abs(logits).max()))
        error = float(np.abs(found - logits).max()) / scale if np.isfinite(found).all() else float("inf")
        if error >= worst:
            worst, where = error, f"{len(batch)} sequences of {[len(x) for x in batch]} tokens"
    if worst > PARITY_TOLERANCE:
        raise ExportError(
            f"the graph's logits differ from the model's by {worst:.1e} (allowed {PARITY_TOLERANCE:.0e}), worst for {where}; nothing was written"
        )
    return {"largest_error": worst, "tolerance": PARITY_TOLERANCE, "batches": len(expected)}


def _refuse_one_file_for_several(trained: Trained, data_file: str | None) -> None:
    if data_file is not None and isinstance(trained.task, Several):
        raise ExportError(
            f"--data {data_file}: its rows are of one task and this model has {', '.join(trained.task.tasks)}; leave it out: each "
            "is compared on the rows that its own run held out"
        )


def _check_gate(trained: Trained, comparison: Comparison | None) -> None:
    """Raise ExportError where there is no figure that int8 could be gated on."""
    if isinstance(trained.task, Several):
        smaller = [f"{name}'s {t.metric}" for name, t in trained.task.tasks.items() if not t.greater_is_better]
        if smaller:
            raise ExportError(
                f"int8 is gated on the mean of the tasks' metrics, and {', '.join(smaller)} is better when smaller; leave --int8 "
                "out, or export it alone"
            )
    if comparison is None:
        raise ExportError(
            "int8 is gated on the task's metric and there are no held-out rows"
            + ("" if isinstance(trained.task, Several) else ": name some with --data FILE")
        )


def finite_on_grid(run: Run, batches: list[list[np.ndarray]]) -> bool:
    """Whether the graph gives numbers for every shape of the grid."""
    return all(np.isfinite(_first(x)).all() for batch in batches for x in run(batch, None, _grid_marks(batch)))


def compare_rows(trained: Trained, data_file: str | None) -> Comparison | None:
    """Held-out rows with the model's own answers; None where the run's files are gone and none was named."""
    from regraft.engine.data.source import HUB
    from regraft.engine.evaluation import run_all
    from regraft.engine.heldout import data_sections, heldout_examples

    places = [] if data_file is not None else [str(data.dev or data.train) for data in data_sections(trained)]
    if any(not place.startswith(HUB) and not Path(place).exists() for place in places):
        return None
    try:
        made = heldout_examples(trained, data_file, split=None if data_file else "dev")
    except DataError:
        if not any(place.startswith(HUB) for place in places):  # rows that are there and cannot be used are told
            raise
        return None
    made, _ = trained.task.draw(made.ungrouped, np.arange(len(made.store)), (0, 0))
    outputs = run_all(trained.running, made)
    return Comparison(made, _metrics(trained, made, outputs), outputs)


def _metrics(
    trained: Trained,
    examples: Examples,
    outputs: Sequence[np.ndarray] | Mapping[int, np.ndarray],
    rows: np.ndarray | None = None,
) -> dict[str, float]:
    """Figures of the `rows`, all for None, by their sequences' outputs."""
    metrics = trained.task.metrics()
    rows = np.arange(len(examples.rows)) if rows is None else rows
    for start in range(0, len(rows), 1024):
        sequences = examples.sequences_of_rows(rows[start : start + 1024])
        trained.task.score(metrics, examples, sequences, [outputs[s] for s in sequences])
    return metrics.compute()


def _graph_outputs(run: Run, examples: Examples, sequences: np.ndarray, token_budget: int = 4096) -> list[np.ndarray]:
    found: list[Any] = [None] * len(sequences)
    offsets, store = examples.store.offsets, examples.store
    for batch in by_length(store.lengths[sequences], token_budget):
        spans = [slice(offsets[s], offsets[s + 1]) for s in sequences[batch]]
        types = None if store.types is None else [store.types[span] for span in spans]
        marks = None if examples.marks is None else [np.flatnonzero(examples.marks[span]) for span in spans]
        for number, output in zip(batch, run([store.ids[span] for span in spans], types, marks), strict=True):
            found[number] = output
    return found


def quality_of(trained: Trained, comparison: Comparison | None, run: Run) -> dict[str, Any]:
    """The task's metric on the compared rows, by the model and by the graph; empty where there are no rows."""
    if comparison is None:
        return {}
    examples = comparison.examples
    every = np.arange(len(examples.store))
    return _quality(trained, comparison, _graph_outputs(run, examples, every))


def quality_alone(trained: Trained, comparison: Comparison, run: Run) -> dict[str, Any]:
    """The metric again, each sequence in a batch of its own, on at most ALONE_ROWS rows spread over all, by the model and
    by the graph.

    Int8 activations share one scale in a batch, so a text's answer depends a little on what else is in it.
    """
    examples, name = comparison.examples, trained.task.metric
    rows = np.unique(np.linspace(0, len(examples.rows) - 1, min(ALONE_ROWS, len(examples.rows))).astype(np.int64))
    sequences = examples.sequences_of_rows(rows)
    outputs = dict(zip(sequences.tolist(), _graph_outputs(run, examples, sequences, token_budget=1), strict=True))
    model = _metrics(trained, examples, comparison.model_outputs, rows)[name]
    graph = _metrics(trained, examples, outputs, rows)[name]
    loss = 100 * _worse_by(trained, model, graph)
    return {"rows": len(rows), "model": model, "graph": graph, "loss_points": loss}


def same_answers(trained: Trained, comparison: Comparison | None, run: Run) -> dict[str, Any]:
    """`quality_of` a graph that is to answer like the model: on real rows too, with their token types and lengths.

    Raises ExportError beyond PARITY_TOLERANCE of the largest output.
    """
    if comparison is None:
        return {}
    examples = comparison.examples
    outputs = _graph_outputs(run, examples, np.arange(len(examples.store)))
    expected = [_first(x) for x in comparison.model_outputs]
    scale = max(1.0, *(float(np.abs(x[np.isfinite(x)]).max(initial=0.0)) for x in expected))
    errors = np.array([_largest_error(_first(a), b) for a, b in zip(outputs, expected, strict=True)]) / scale
    worst = int(errors.argmax())
    quality = _quality(trained, comparison, outputs)
    if not errors[worst] <= PARITY_TOLERANCE:
        row = worst if examples.row_of is None else int(examples.row_of[worst])
        raise ExportError(
            f"the graph's outputs differ from the model's by {errors[worst]:.1e} (allowed {PARITY_TOLERANCE:.0e}), worst for "
            f"{examples.rows.where(row)}; {quality['metric']} {figure(quality['model'])} of the model, {figure(quality['graph'])} of "
            "the graph; nothing was written"
        )
    return quality


def _first(output: Any) -> np.ndarray:
    return output[0] if isinstance(output, tuple) else output


def _largest_error(found: np.ndarray, expected: np.ndarray) -> float:
    with np.errstate(invalid="ignore"):
        apart = np.where(found == expected, 0.0, np.abs(found - expected))  # minus infinity equals itself
    return float(apart.max(initial=0.0))


def _quality(trained: Trained, comparison: Comparison, outputs: Sequence[np.ndarray]) -> dict[str, Any]:
    examples = comparison.examples
    found = _metrics(trained, examples, outputs)
    name = trained.task.metric
    return {
        "data": examples.rows.told,
        "rows": len(examples.rows),
        "metric": name,
        "model": comparison.model_metrics[name],
        "graph": found[name],
        "loss_points": 100 * _worse_by(trained, comparison.model_metrics[name], found[name]),
    }


def _worse_by(trained: Trained, model: float, graph: float) -> float:
    return model - graph if trained.task.greater_is_better else graph - model


def quantise_within(
    graph: Path,
    info: BundleInfo,
    trained: Trained,
    comparison: Comparison,
    max_loss: float,
    batches: list[list[np.ndarray]],
) -> BundleInfo:
    """Replace `graph` by the fastest int8 candidate that costs at most `max_loss` points, in batches and one row at a time,
    and answers `batches` of every shape in numbers. Raises ExportError."""
    from regraft.engine.quantise import candidates, matrix_products, quantise

    trial = graph.with_name("int8.onnx")
    few = np.arange(min(128, len(comparison.examples.store)))

    def error_of(kept: tuple[str, ...]) -> float:
        quantise(graph, trial, kept)
        outputs = _graph_outputs(graph_runner(open_graph(trial), info), comparison.examples, few)
        expected = [_first(x) for x in comparison.model_outputs[: len(few)]]
        errors = [np.abs(_first(a) - b).ravel() for a, b in zip(outputs, expected, strict=True)]
        return float(np.concatenate(errors).mean())

    tried = []
    for candidate in candidates(matrix_products(graph), error_of):
        quantise(graph, trial, candidate.kept)
        run = graph_runner(open_graph(trial), info)
        quality = quality_of(trained, comparison, run)
        told = (
            f"{candidate.name}: {quality['metric']} {figure(quality['graph'])} ({-quality['loss_points']:+.2f} points)"
        )
        if good := quality["loss_points"] <= max_loss:
            alone = quality_alone(trained, comparison, run)
            quality |= {"alone": alone}
            told += f", one row at a time {figure(alone['graph'])} ({-alone['loss_points']:+.2f} points)"
            good = alone["loss_points"] <= max_loss
        tried.append(told)
        if good and finite_on_grid(run, batches):
            shutil.move(trial, graph)
            return replace(info, precision="int8", quality=quality | {"quantised": candidate.name})
    trial.unlink(missing_ok=True)
    raise ExportError(
        f"int8 costs more than {max_loss} points of {trained.task.metric} (fp32 "
        f"{figure(comparison.model_metrics[trained.task.metric])}); nothing was written. Tried " + "; ".join(tried)
    )


def _report(to: Path, info: BundleInfo) -> str:
    size = sum(p.stat().st_size for p in to.iterdir()) / 1e6
    lines = [f"{to}: {info.layout} {info.precision} graph, {size:.1f} MB"]
    lines.append(
        f"logits differ by at most {info.parity['largest_error']:.1e} from the model's (fp32 graph, {info.parity['batches']} batch shapes)"
    )
    several = info.task["type"] == "several"
    if several:
        figures = "" if info.quality else "; each one's figures are in its run"
        lines.append(f"heads: {', '.join(info.task['tasks'])}; the encoder runs once{figures}")
    if info.quality:
        lines.append(quality_line(info.quality))
    elif not several:
        lines.append("the run's held-out rows are gone, so the metric was not compared; name some with --data FILE")
    if "quantised" in info.quality:
        alone = info.quality["alone"]
        lines.append(
            f"int8: {info.quality['quantised']}; one row at a time, {alone['rows']:,} rows: model "
            f"{figure(alone['model'])}, graph {figure(alone['graph'])}"
        )
    return "\n".join(lines)


def quality_line(q: Mapping[str, Any]) -> str:
    """What `quality_of` found, as a line."""
    return f"{q['metric']} on {q['rows']:,} rows of {q['data']}: model {figure(q['model'])}, graph {figure(q['graph'])}"


def _readme(info: BundleInfo) -> str:
    labels = ", ".join(info.task.get("labels", ()))
    note = f"\n{INT8_NOTE}\n" if info.precision == "int8" else ""
    return (
        f"# Regraft bundle\n\nServe it: `regraft serve THIS_FOLDER`.\n\n- task: {info.task['type']} ({labels})\n"
        f"- graph: {info.layout}, {info.precision}; at most {info.max_length} tokens a text\n"
        f"- from: {info.source['base_model']}\n"
        f"- parity with the model: {info.parity or 'see bundle.json'}\n- quality: {info.quality or 'not measured'}\n{note}"
    )
