"""The matrix rate of this machine: FLOPs a second of large products, the ceiling beside which training is measured.

As a script: the argument is one JSON object (key threads), the last line printed is one: by precision the fastest product's rate,
and the median's, which is what the machine gave meanwhile to whoever computes for longer than one product.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}
SIDES = (256, 1024, 2048)
SECONDS = 3.0  # of each precision


def main() -> None:
    import torch

    torch.set_num_threads(json.loads(sys.argv[1])["threads"])
    found = {name: matrix_rates(getattr(torch, dtype)) for name, dtype in PRECISIONS.items()}
    print(json.dumps({which: {name: rates[which] for name, rates in found.items()} for which in ("fastest", "median")}))


def matrix_rates(dtype: Any) -> dict[str, float]:
    """FLOPs a second of products of two square matrices: the fastest of several, and the median of the largest side that
    takes its time."""
    import torch

    fastest, median = 0.0, 0.0
    for side in SIDES:
        if fastest and 2 * side**3 / fastest > SECONDS / 2:
            break  # a CPU without products in this precision
        a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
        until, rates = time.perf_counter() + SECONDS / len(SIDES), []
        while not rates or time.perf_counter() < until:
            began = time.perf_counter()
            a @ b
            rates.append(2 * side**3 / (time.perf_counter() - began))
        fastest, median = max(fastest, *rates), statistics.median(rates)
    return {"fastest": fastest, "median": median}


def training_flops(weights: int, tokens: int) -> float:
    """Of forward and backward over `tokens` through matrices of `weights` numbers: 6 N D (Kaplan et al., 2020).

    Attention's own products are left out; a layer of which only some rows are computed is counted in full.
    """
    return 6.0 * weights * tokens


def matrix_weights(config: Mapping[str, Any]) -> int:
    """Numbers in the matrices of a BERT's layers: four projections and the two of the feed-forward part."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    return config["num_hidden_layers"] * (4 * width * width + 2 * width * inner)


if __name__ == "__main__":
    main()
