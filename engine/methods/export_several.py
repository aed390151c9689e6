"""`regraft export --adapters RUN RUN ...`: one graph for all of them, each sequence answered by the adapter it names.

Shown to answer like each adapter's own model, alone and in batches that mix them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from regraft.engine.bundle import BundleInfo, write_info
from regraft.engine.errors import ExportError
from regraft.engine.export import (
    PARITY_TOLERANCE,
    Run,
    compare_rows,
    grid_logits,
    may_write,
    open_graph,
    quality_line,
    quality_of,
)
from regraft.engine.files import new_folder
from regraft.engine.graph_inputs import graph_inputs
from regraft.engine.graphs import write_graph
from regraft.engine.machine import versions
from regraft.engine.methods.settings import libraries
from regraft.engine.methods.several import load_adapters
from regraft.engine.methods.stacked import stacked_model
from regraft.engine.models import RunningModel
from regraft.engine.tasks import Adapters, Task
from regraft.engine.tasks.base import FIRST
from regraft.engine.threads import available_threads
from regraft.engine.trained import Trained, takes_pairs

# Token ids, token types and the adapter of each of B sequences -> logits [B, the largest C]
RunMixed = Callable[[list[np.ndarray], list[np.ndarray] | None, np.ndarray], np.ndarray]


def export_adapters(runs: Sequence[str | Path], to: str | Path, *, force: bool = False) -> str:
    """Write a bundle of several adapters and return what was measured, as lines of text.

    Raises ExportError where they cannot share a graph, or it does not answer like each of them; `to` is then left alone.
    """
    import torch

    to = Path(to)
    may_write(to, force)
    if len(runs) < 2:
        raise ExportError("--adapters takes two runs or more; one alone is exported without it")
    torch.set_num_threads(available_threads())
    adapters = load_adapters(runs, device="cpu")
    check_alike(adapters)
    first = next(iter(adapters.values()))
    running = RunningModel(stacked_model(adapters), pad_token_id=first.tokenizer.pad_token_id)
    running.run_packed_as(first.running)
    info = BundleInfo(
        layout="packed",
        precision="fp32",
        task=Adapters({name: trained.task for name, trained in adapters.items()}).spec(),
        max_length=first.max_length,
        pad_token_id=first.tokenizer.pad_token_id,
        position_offset=running.position_offset,
        token_types=running.uses_token_types,
        adapters=list(adapters),
        pairs=takes_pairs(first),
        source={"base_model": first.facts["base_model"], "folders": [str(t.folder) for t in adapters.values()]},
        versions=versions(*libraries(first.facts["method"], "adamw")),
    )
    with new_folder(to) as folder:
        graph = folder / "model.onnx"
        write_graph(running, info, graph)
        run = _runner(graph, info)
        info = replace(info, parity=mixed_parity(run, adapters), quality=_qualities(run, adapters))
        first.tokenizer.save(folder)
        (folder / "README.md").write_text(_readme(info), encoding="utf-8")
        write_info(folder, info)
    return _report(to, info)


def check_alike(adapters: dict[str, Trained]) -> None:
    """Raise ExportError where two cannot be served by one tokenizer, one length limit and one kind of answer."""
    (name, first), *others = adapters.items()
    for own, trained in adapters.items():
        plain = type(trained.task).examples is Task.examples and type(trained.task).answers is Task.answers
        if trained.task.reads != FIRST or not plain:
            raise ExportError(
                f"{own}: task {trained.task.type}; adapters with one answer a text share a graph "
                "(classification, multilabel, regression)"
            )
        if not trained.running.packed:
            raise ExportError(f"{own}: cannot be exported packed: {trained.running.reason}")
    for own, trained in others:
        if takes_pairs(trained) != takes_pairs(first):
            raise ExportError(f"{own}: one of it and {name} learned from pairs of texts and the other did not")
        for what, a, b in (
            ("tokenizer", first.tokenizer.fingerprint, trained.tokenizer.fingerprint),
            ("max_length", first.max_length, trained.max_length),
        ):
            if a != b:
                shown = f" ({a} and {b})" if what == "max_length" else ""
                raise ExportError(f"{own}: not the same {what} as {name}{shown}; export it to a bundle of its own")


def _runner(graph: Path, info: BundleInfo) -> RunMixed:
    session = open_graph(graph)

    def run(ids: list[np.ndarray], types: list[np.ndarray] | None, adapter: np.ndarray) -> np.ndarray:
        return session.run(["logits"], graph_inputs(info, ids, types, adapters=adapter))[0]

    return run


def mixed_parity(run: RunMixed, adapters: dict[str, Trained]) -> dict[str, Any]:
    """Largest logit error of any adapter, over the grid for each alone and then with the adapters in turns.

    Raises ExportError beyond PARITY_TOLERANCE of the largest logit.
    """
    expected = [grid_logits(trained) for trained in adapters.values()]
    worst, batches = 0.0, 0
    for place in range(len(expected[0])):
        batch = expected[0][place][0]
        alone = [np.full(len(batch), number) for number in range(len(adapters))]
        for chosen in (*alone, (np.arange(len(batch)) + place) % len(adapters)):
            found = run(batch, None, chosen)
            for row, number in enumerate(chosen):
                logits = expected[number][place][1][row]
                error = float(np.abs(found[row, : len(logits)] - logits).max()) / max(1.0, float(np.abs(logits).max()))
                worst = max(worst, error if np.isfinite(found[row]).all() else float("inf"))
            batches += 1
    if worst > PARITY_TOLERANCE:
        raise ExportError(
            f"the graph's logits differ from the adapters' own by {worst:.1e} (allowed {PARITY_TOLERANCE:.0e}); nothing "
            "was written"
        )
    return {"largest_error": worst, "tolerance": PARITY_TOLERANCE, "batches": batches}


def _qualities(run: RunMixed, adapters: dict[str, Trained]) -> dict[str, Any]:
    """What each adapter scores on its own run's held-out rows, by its model and by the graph."""
    return {
        name: quality_of(trained, compare_rows(trained, None), _of_one(run, number, trained.task.outputs))
        for number, (name, trained) in enumerate(adapters.items())
    }


def _of_one(run: RunMixed, number: int, outputs: int) -> Run:
    def of_one(ids: list[np.ndarray], types: list[np.ndarray] | None, _: Any) -> Sequence[np.ndarray]:
        return list(run(ids, types, np.full(len(ids), number))[:, :outputs])

    return of_one


def _report(to: Path, info: BundleInfo) -> str:
    size = sum(p.stat().st_size for p in to.iterdir()) / 1e6
    parity = info.parity
    lines = [
        f"{to}: packed fp32 graph of {len(info.adapters)} adapters, {size:.1f} MB",
        f"logits differ by at most {parity['largest_error']:.1e} from each adapter's own, alone and mixed "
        f"({parity['batches']} batches)",
    ]
    for name, q in info.quality.items():
        if q:
            lines.append(f"  {name}: {quality_line(q)}")
        else:
            lines.append(f"  {name}: its held-out rows are gone, so the metric was not compared")
    return "\n".join(lines)


def _readme(info: BundleInfo) -> str:
    tasks = "\n".join(f"- {name}: {spec['type']}" for name, spec in info.task["tasks"].items())
    return (
        "# Regraft bundle\n\nServe it: `regraft serve THIS_FOLDER`; each request names its adapter: "
        f'`{{"inputs": "a text", "adapter": "{info.adapters[0]}"}}`.\n\n{tasks}\n\n'
        f"From {info.source['base_model']}; at most {info.max_length} tokens a text.\n"
    )


def refuse_options(layout: str, int8: bool, data_file: str | None, overrides: Sequence[str]) -> None:
    """Raise ExportError for options of `regraft export` that a graph of several adapters does not have."""
    if layout != "packed":
        raise ExportError(
            "--layout padded: a graph of several adapters is packed; export each merged for other servers"
        )
    if int8:
        raise ExportError(
            "--int8: several adapters share the rounded weights and none would be gated; export each merged"
        )
    if data_file:
        raise ExportError("--data: each adapter is compared on its own run's rows; leave it out")
    if overrides:
        raise ExportError(f"--set {overrides[0]}: each adapter is compared on its own run's rows; leave it out")
