"""An adapter worked into its backbone, as a plain Hugging Face folder, with its drift on real rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from regraft.engine.errors import ModelError
from regraft.engine.files import new_folder
from regraft.engine.methods.merge_command import MAX_DRIFT
from regraft.engine.trained import Trained, find_trained, load_trained, write_facts


def merge(model: str | Path, to: str | Path, *, data_file: str | None = None, max_drift: float = MAX_DRIFT) -> str:
    """Write the merged model and return the drift report, as lines of text.

    Raises ModelError, writing nothing, where `to` exists, the method cannot be merged, or the answers differ by more
    than `max_drift`.
    """
    to = Path(to)
    if to.exists():
        raise ModelError(f"{to}: already there; choose another folder")
    folder = find_trained(model)
    before = load_trained(folder, merge=False)
    if not before.adaptation.is_adapter:
        raise ModelError(f"{folder}: method {before.adaptation.method} leaves a whole model; there is nothing to merge")
    if not before.adaptation.mergeable:
        before.adaptation.merge()  # says why it cannot be
    source, expected = _outputs(before, data_file)
    # Loaded again: the running model's forwards are bound to its unmerged layers.
    after = load_trained(folder, merge=True)
    found = _outputs(after, data_file)[1]
    report = _report(to, source, expected, found)
    share = _drift(expected, found)
    if not share <= max_drift:  # NaN neither
        raise ModelError(
            f"merging changes the answers too much (allowed {max_drift:.0e}); nothing was written. {report}"
        )
    with new_folder(to) as beside:
        after.adaptation.model.save_pretrained(beside)
        _copy_rest(folder, beside, after)
    return report


def _outputs(trained: Trained, data_file: str | None) -> tuple[str, np.ndarray]:
    """The model's logits for held-out rows, one after the other: [n, C]."""
    from regraft.engine.evaluation import run_all
    from regraft.engine.heldout import encoded, heldout_rows

    made = encoded(trained, heldout_rows(trained, data_file, split=None if data_file else "dev"))
    made, _ = trained.task.draw(made, np.arange(len(made.store)), (0, 0))
    outputs = run_all(trained.running, made)
    return f"{len(made.rows):,} rows of {made.rows.told}", np.concatenate([np.atleast_2d(x) for x in outputs])


def _drift(expected: np.ndarray, found: np.ndarray) -> float:
    return float(np.abs(found - expected).max()) / max(1.0, float(np.abs(expected).max()))


def _report(to: Path, source: str, expected: np.ndarray, found: np.ndarray) -> str:
    lines = [
        f"{to}: on {source} the merged model's logits differ by at most {np.abs(found - expected).max():.1e}, "
        f"{_drift(expected, found):.1e} of the largest"
    ]
    if expected.shape[-1] > 1:
        changed = int((expected.argmax(-1) != found.argmax(-1)).sum())
        lines.append(f"{changed:,} of {len(expected):,} most probable labels changed")
    return "\n".join(lines)


def _copy_rest(folder: Path, beside: Path, trained: Trained) -> None:
    import shutil

    for file in folder.iterdir():
        skipped = file.name.startswith(("adapter_", "regraft.json"))
        if file.is_file() and not skipped and not (beside / file.name).exists():
            shutil.copy2(file, beside / file.name)
    gone = ("model", "backbone", "quantise")
    facts = {k: v for k, v in trained.facts.items() if k not in gone}
    write_facts(beside, facts | {"method": "full", "merged": trained.facts["method"]})
