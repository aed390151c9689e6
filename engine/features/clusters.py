"""A look at unlabelled texts: k-means over their embeddings, with the rows nearest each centre."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from regraft.engine.data.rows import Rows
from regraft.engine.errors import DataError
from regraft.engine.features.rows import FeatureRows

SHOWN = 5  # rows of each group
WIDE = 110  # characters of a text


@dataclass(frozen=True)
class Cluster:
    """`rows`: row numbers, nearest to the centre first; `closeness`: mean cosine with the centre."""

    rows: np.ndarray
    closeness: float


def clusters(features: FeatureRows, count: int, seed: int) -> list[Cluster]:
    """Group the rows by the direction of their embeddings, the largest group first. Raises DataError for more groups
    than rows, or features that are kept by token."""
    from sklearn.cluster import MiniBatchKMeans

    if not features.pooled:
        raise DataError("clusters: these features are kept by token; set features.pooling: mean")
    if not 2 <= count <= len(features):
        raise DataError(f"clusters: {count} groups of {len(features)} rows; expected 2 to {len(features)}")
    x = features.whole().flatten(1).numpy()
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    owner = MiniBatchKMeans(count, random_state=seed, n_init=3, batch_size=4096).fit_predict(x)
    found = []
    for number in np.unique(owner):
        mine = np.flatnonzero(owner == number)
        centre = x[mine].mean(axis=0)
        cosines = x[mine] @ centre / max(float(np.linalg.norm(centre)), 1e-12)
        found.append(Cluster(mine[np.argsort(-cosines, kind="stable")], float(cosines.mean())))
    return sorted(found, key=lambda c: -len(c.rows))


def show_clusters(features: FeatureRows, rows: Rows, count: int, seed: int) -> None:
    """Print every group: how many rows, how close they are, their commonest labels, the rows nearest its centre."""
    for number, cluster in enumerate(clusters(features, count, seed), 1):
        said = f"\ngroup {number}: {len(cluster.rows):,} rows, mean cosine with the centre {cluster.closeness:.2f}"
        if rows.labels is not None:
            common = Counter(str(rows.labels[r]) for r in cluster.rows).most_common(3)
            said += "; labels " + ", ".join(f"{label} {n:,}" for label, n in common)
        print(said)
        # Equal texts differ in the last bits by what they were packed with: each is shown once, where it comes first.
        first: dict[str, int] = {}  # nearest text first
        for row in cluster.rows:
            text = " ".join(rows.texts[row].split())
            first[text] = min(row, first.get(text, row))
        for text in list(first)[:SHOWN]:
            print(f"  {rows.where(first[text])}: {text if len(text) <= WIDE else text[: WIDE - 1] + '…'}")
