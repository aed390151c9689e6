"""Matrix products of a training step on CPU, ours in C and torch's, in turns: GFLOP/s of the layers of MiniLM and BERT-base.

A step makes three of every linear layer: forward (with bias, and GELU after the first half of a feed-forward), the gradient
of its inputs, and the gradients of its weight and bias. Rows are the tokens of a packed batch: 430 as of 32 SST-2
sentences, 8,192 as of 32 reviews. Each rate is the median of what fits into a second.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import machine
from environments import our_versions
from harness import OURS, Claim, Run, arguments, publish, take_turns

CLAIM = Claim("products_cpu", "Products of linear layers on a CPU, of whole training steps", "GFLOP/s")
LAYERS = {  # inputs, outputs, GELU after it
    "MiniLM, projections": (384, 1152, False),
    "MiniLM, feed-forward": (384, 1536, True),
    "BERT-base, feed-forward": (768, 3072, True),
}
ROWS = (430, 8192)
TYPES = {"fp32": "float32", "bf16": "bfloat16"}
SECONDS = 1.0  # of each product and turn
Product = Callable[[], Any]


def main() -> None:
    options = arguments(__doc__, rounds=5).parse_args()
    before = machine.facts()
    import torch

    from regraft.engine.heap import keep_freed_memory
    from regraft.kernels import linear_native

    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as training does
    runs: list[Run] = []
    for precision, name in TYPES.items():
        dtype = getattr(torch, name)
        if not linear_native.runs_here(torch.zeros(32, 32, dtype=dtype)):
            print(f"{precision}: products are left to torch on this processor", file=sys.stderr)
            continue
        for rows in (32,) if options.quick else ROWS:
            for layer, shape in LAYERS.items():
                for product, sides in products(rows, *shape, dtype).items():
                    flops, seconds = 2 * rows * shape[0] * shape[1], 0.01 if options.quick else SECONDS
                    contestants = {who: turn(side, flops, seconds) for who, side in sides.items()}
                    case = f"{precision}, {layer}, {rows:,} rows, {product}"
                    runs += take_turns(case, contestants, 1 if options.quick else options.rounds)
    if not runs:
        sys.exit("products in fp32 and in bf16 are torch's on this processor: there is nothing to compare")
    publish(CLAIM, runs, options, versions={"regraft": our_versions()}, before=before)


def products(rows: int, inputs: int, outputs: int, gelu: bool, dtype: Any) -> dict[str, dict[str, Product]]:
    """The three products of one layer by both sides."""
    import torch
    from torch.nn.functional import gelu as torchs_gelu
    from torch.nn.functional import linear

    from regraft.kernels import linear_native as ours

    x, dy, bias = (torch.randn(*shape).to(dtype) for shape in ((rows, inputs), (rows, outputs), (outputs,)))
    w = (torch.randn(outputs, inputs) / inputs**0.5).to(dtype)
    forward = {OURS: lambda: ours.linear(x, w, bias), "torch": lambda: linear(x, w, bias)}
    if gelu:
        forward = {OURS: lambda: ours.linear_gelu(x, w, bias), "torch": lambda: torchs_gelu(linear(x, w, bias))}
    return {
        "forward and GELU" if gelu else "forward": forward,
        "inputs' gradient": {OURS: lambda: ours.input_gradient(dy, w), "torch": lambda: dy @ w},
        "weight's and bias's": {
            OURS: lambda: ours.weight_gradients(dy, x, bias=True),
            "torch": lambda: (dy.t() @ x, dy.sum(0)),
        },
    }


def turn(product: Product, flops: int, seconds: float) -> Callable[[int], tuple[float, dict]]:
    """One turn: the rate of a product, in GFLOP/s."""
    return lambda number: (flops / median_seconds(product, seconds) / 1e9, {})


def median_seconds(product: Product, seconds: float) -> float:
    import torch

    found: list[float] = []
    with torch.inference_mode():
        product()
        until = time.perf_counter() + seconds
        while not found or time.perf_counter() < until:
            began = time.perf_counter()
            product()
            found.append(time.perf_counter() - began)
    return statistics.median(found)


if __name__ == "__main__":
    main()
