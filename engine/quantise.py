"""Int8 weights with dynamically quantised activations, kept for the layers that bear it.

ONNX Runtime's dynamic quantisation (one scale a column of a weight, one a tensor of an activation). It can collapse a
model's accuracy, and a text's answer depends a little on what else is in its batch: every candidate is measured on the
task's own metric, in batches and one row at a time, before it is taken.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from regraft.engine.machine import cpu_flags

BLOCKS = 12  # of products that are kept or quantised together: each costs a graph that is made and tried


@dataclass(frozen=True)
class Candidate:
    """A way to quantise. `kept`: names of the matrix products that stay in fp32."""

    name: str
    kept: tuple[str, ...]


def matrix_products(graph: Path) -> list[str]:
    """Names of the graph's products with a constant weight, in the order they run."""
    import onnx

    model = onnx.load(graph, load_external_data=False).graph
    constants = {tensor.name for tensor in model.initializer}
    return [n.name for n in model.node if n.op_type in ("MatMul", "Gemm") and n.input[1] in constants]


def quantise(graph: Path, target: Path, kept: tuple[str, ...]) -> None:
    """Write `graph` with int8 weights to `target`, all but the products named in `kept`."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # Without VNNI, int8 products add pairs in 16 bits and overflow: seven bits a weight avoid that.
    narrow = not cpu_flags() & {"avx512_vnni", "avx_vnni", "asimddp"}
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        quantize_dynamic(
            graph,
            target,
            per_channel=True,
            reduce_range=narrow,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
            # A Gemm is first made into a MatMul of another name.
            nodes_to_exclude=[name for product in kept for name in (product, f"{product}_MatMul")],
        )
    finally:
        logging.getLogger().setLevel(level)


def candidates(products: list[str], error_of: Callable[[tuple[str, ...]], float]) -> Iterator[Candidate]:
    """Ways to quantise, the fastest first: everything; then with more and more of the products left in fp32 that distort
    the logits most.

    `error_of(kept)` gives the logits' error when all but `kept` are quantised; it is asked for each of at most BLOCKS
    blocks of products, only when quantising everything was not good enough.
    """
    yield Candidate("all layers", ())
    size = math.ceil(len(products) / BLOCKS)
    blocks = [tuple(products[i : i + size]) for i in range(0, len(products), size)]
    harm = {block: error_of(tuple(p for p in products if p not in block)) for block in blocks}
    worst_first = sorted(blocks, key=lambda b: -harm[b])
    count = 1
    while count < len(blocks):
        kept = tuple(p for block in worst_first[:count] for p in block)
        yield Candidate(f"{len(products) - len(kept)} of {len(products)} products", kept)
        count *= 2
