"""The matrix rate of this machine: FLOPs a second of large products, the ceiling beside which training is measured.

As a script: the argument is one JSON object (key threads), the last line printed is one: the rate by precision.
"""

from __future__ import annotations

import json
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
    print(json.dumps({name: matrix_rate(getattr(torch, dtype)) for name, dtype in PRECISIONS.items()}))


def matrix_rate(dtype: Any) -> float:
    """FLOPs a second of the fastest of several products of two square matrices, of the largest that take their time."""
    import torch

    fastest = 0.0
    for side in SIDES:
        if fastest and 2 * side**3 / fastest > SECONDS / 2:
            break  # a CPU without products in this precision
        a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
        until = time.perf_counter() + SECONDS / len(SIDES)
        while True:
            began = time.perf_counter()
            a @ b
            fastest = max(fastest, 2 * side**3 / (time.perf_counter() - began))
            if time.perf_counter() > until:
                break
    return fastest


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
