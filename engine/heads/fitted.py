"""Heads that are solved at once: logistic regression, linear SVM, nearest centroid, labels' own descriptions.

All end as one linear layer, so they are saved, exported and served like a trained one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from regraft.engine.errors import DataError
from regraft.engine.heads.head import Head
from regraft.engine.heads.settings import HeadConfig
from regraft.engine.tasks import Task

COSINE_SCALE = 20.0  # logits = 20 * cosine: a soft-max over cosines alone would call everything undecided


def fit(head: Head, features: Tensor, targets: np.ndarray, weights: np.ndarray, task: Task, config: HeadConfig) -> None:
    """Solve `head` on rows [N, J, H]. Raises DataError where a class has no rows."""
    x = head.combined(features).detach().numpy()
    if config.type == "centroid":
        head.set_linear(*_centroids(x, targets, task))
        return
    # Rows of length about 1, as sentence embeddings are: `c` then means the same for every width.
    scale = 1 / np.sqrt(x.shape[1])
    weight, bias = solve_rows(x * np.float32(scale), targets, weights, task, config)
    head.set_linear(weight * scale, bias)


def solve_rows(
    x: Any, targets: np.ndarray, weights: np.ndarray, task: Task, config: HeadConfig
) -> tuple[Tensor, Tensor]:
    """Weight [C, H] and bias [C] of a linear layer over rows [N, H], an array or a sparse matrix."""
    if task.type != "multilabel":
        return _classes(x, targets, weights, task, config)
    parts = [_binary(x, targets[:, c], weights, config) for c in range(task.outputs)]
    return torch.stack([w for w, _ in parts]), torch.stack([b for _, b in parts])


def _classes(x: Any, targets: np.ndarray, weights: np.ndarray, task: Task, config: HeadConfig) -> tuple[Tensor, Tensor]:
    present = np.unique(targets)
    if len(present) == 2:
        w, b = _binary(x, targets == present[1], weights, config)
        rows, bias = torch.stack([-w / 2, w / 2]), torch.stack([-b / 2, b / 2])
    else:
        solved = _solver(config).fit(x, targets, sample_weight=weights)
        rows, bias = (torch.from_numpy(np.asarray(a, dtype=np.float32)) for a in (solved.coef_, solved.intercept_))
    weight = torch.zeros(task.outputs, x.shape[1])
    whole = torch.full((task.outputs,), -100.0)  # a label without rows is never the answer
    weight[torch.from_numpy(present)], whole[torch.from_numpy(present)] = rows, bias
    return weight, whole


def _binary(x: Any, positive: np.ndarray, weights: np.ndarray, config: HeadConfig) -> tuple[Tensor, Tensor]:
    positive = positive.astype(bool)
    if positive.all() or not positive.any():
        return torch.zeros(x.shape[1]), torch.tensor(100.0 if positive.all() else -100.0)
    solved = _solver(config).fit(x, positive, sample_weight=weights)
    return torch.from_numpy(solved.coef_[0].astype(np.float32)), torch.tensor(float(solved.intercept_[0]))


def _solver(config: HeadConfig) -> Any:
    if config.type == "svm":
        from sklearn.svm import LinearSVC

        return LinearSVC(C=config.c, max_iter=5000)
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=config.c, max_iter=1000)


def import_solver(config: HeadConfig) -> None:
    """Import what `fit` needs ahead of time: it takes longer than a small problem does, and is no training."""
    if config.type in ("logistic", "svm"):
        _solver(config)


def _centroids(x: np.ndarray, targets: np.ndarray, task: Task) -> tuple[Tensor, Tensor]:
    counts = np.bincount(targets, minlength=task.outputs)
    if (counts == 0).any():
        raise DataError(f"label {task.labels[int(counts.argmin())]!r} has no training row, so it has no centre")
    sums = np.zeros((task.outputs, x.shape[1]), dtype=np.float64)
    np.add.at(sums, targets, x)
    return _directions(torch.from_numpy(sums / counts[:, None]).float())


def _directions(centres: Tensor) -> tuple[Tensor, Tensor]:
    return COSINE_SCALE * torch.nn.functional.normalize(centres, dim=-1), torch.zeros(len(centres))


def describe(head: Head, descriptions: Tensor) -> None:
    """Make each label's logit the cosine with its description's features [C, J, H]."""
    head.set_linear(*_directions(head.combined(descriptions).detach()))
