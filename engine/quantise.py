"""Int8 weights with dynamically quantised activations, kept for the layers that bear it.

ONNX Runtime's dynamic quantisation (one scale a column of a weight, one a tensor of an activation). It can collapse a
model's accuracy, so every candidate is measured on the task's own metric before it is taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from regraft.engine.machine import cpu_flags


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
            nodes_to_exclude=list(kept),
        )
    finally:
        logging.getLogger().setLevel(level)


def candidates(products: list[str], error_of: Callable[[tuple[str, ...]], float]) -> Iterator[Candidate]:
    """Ways to quantise, the fastest first: everything; then, with the products that distort the logits most left in
    fp32, three quarters, half and a quarter of them.

    `error_of(kept)` gives the logits' error when all but `kept` are quantised; it is asked for each block of products
    only when quantising everything was not good enough.
    """
    yield Candidate("all layers", ())
    blocks = [tuple(products[i : i + 6]) for i in range(0, len(products), 6)]
    harm = {block: error_of(tuple(p for p in products if p not in block)) for block in blocks}
    worst_first = sorted(blocks, key=lambda b: -harm[b])
    for share in (0.25, 0.5, 0.75):
        count = max(1, round(share * len(blocks)))
        kept = tuple(p for block in worst_first[:count] for p in block)
        if len(kept) < len(products):
            yield Candidate(f"{len(products) - len(kept)} of {len(products)} products", kept)
