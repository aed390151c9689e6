"""What a kernel does not take is refused before any launch, by the argument's name: every wrapper, every tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from regraft.kernels import attention, crf, varlen
from regraft.kernels.cross_entropy import masked_cross_entropy
from regraft.kernels.embedding import RowGradient, row_embedding
from regraft.kernels.embedding_norm import embedding_layer_norm
from regraft.kernels.gelu import bias_geglu, bias_gelu
from regraft.kernels.lora import lora_linear
from regraft.kernels.lstm import lstm
from regraft.kernels.mix import scalar_mix
from regraft.kernels.nf4 import NF4Weight, nf4_linear
from regraft.kernels.norm import dropout_add_layer_norm
from regraft.kernels.pooling import l2_normalise, segment_pool
from regraft.kernels.rotary import rotate_merged
from regraft.kernels.time_major import time_major

CU = torch.tensor([0, 3, 5], dtype=torch.int32)
ORDER = time_major(np.array([0, 3, 5]), 5)


@dataclass(frozen=True)
class Wrapper:
    """`good`: arguments that are taken; `any_rank`: tensors that may have more dimensions in front; `dense`: tensors
    whose strides must be those of a contiguous one."""

    call: Callable[..., Any]
    good: Mapping[str, Any]
    any_rank: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    lists: tuple[str, ...] = field(default=())


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


def whole(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.int64)


PARTS = {"a": [zeros(2, 6), zeros(2, 6)], "b": [zeros(4, 2), zeros(4, 2)]}
TABLES = {"word": zeros(9, 6), "position": zeros(7, 6), "type_table": zeros(2, 6)}
CRF = {"emissions": zeros(5, 4), "cu_seqlens": CU, "transitions": zeros(4, 4), "start": zeros(4), "end": zeros(4)}
LAYOUT = attention.plan_layout([3, 2], CU)
NF4 = NF4Weight(torch.zeros(32, dtype=torch.uint8), zeros(1), (8, 8))

WRAPPERS = {
    "varlen_attention": Wrapper(
        varlen.varlen_attention,
        {"qkv": zeros(5, 3, 2, 32), "cu_seqlens": CU, "cos": zeros(5, 16), "sin": zeros(5, 16), "max_seqlen": 3},
        dense=("qkv", "cos", "sin"),
    ),
    "first_rows_attention": Wrapper(
        varlen.first_rows_attention,
        {"q": zeros(2, 2, 32), "k": zeros(5, 2, 32), "v": zeros(5, 2, 32), "cu_seqlens": CU, "max_seqlen": 3},
    ),
    "packed_attention": Wrapper(attention.packed_attention, {"qkv": zeros(5, 3, 2, 8), "layout": LAYOUT, "scale": 1.0}),
    "first_row_attention": Wrapper(
        attention.first_row_attention,
        {"q": zeros(2, 2, 8), "k": zeros(5, 2, 8), "v": zeros(5, 2, 8), "layout": LAYOUT, "scale": 1.0},
    ),
    "rotate_merged": Wrapper(rotate_merged, {"qkv": zeros(5, 3, 2, 8), "cos": zeros(5, 4), "sin": zeros(5, 4)}),
    "dropout_add_layer_norm": Wrapper(
        dropout_add_layer_norm,
        {"x": zeros(5, 6), "residual": zeros(5, 6), "weight": zeros(6), "bias": zeros(6)},
        any_rank=("x",),
    ),
    "bias_gelu": Wrapper(bias_gelu, {"x": zeros(5, 6), "bias": zeros(6)}, any_rank=("x",)),
    "bias_geglu": Wrapper(bias_geglu, {"x": zeros(5, 6), "bias": zeros(6)}, any_rank=("x",)),
    "embedding_layer_norm": Wrapper(
        embedding_layer_norm,
        {"ids": whole(5), "positions": whole(5), "types": whole(5), **TABLES, "weight": zeros(6), "bias": zeros(6)},
        dense=("word", "position", "type_table"),
    ),
    "row_embedding": Wrapper(row_embedding, {"ids": whole(5), "gradient": RowGradient(zeros(9, 6))}, any_rank=("ids",)),
    "masked_cross_entropy": Wrapper(
        masked_cross_entropy,
        {"hidden": zeros(5, 6), "weight": zeros(9, 6), "bias": zeros(9), "targets": whole(2), "rows": whole(2)},
        dense=("weight",),
    ),
    "segment_pool": Wrapper(segment_pool, {"x": zeros(5, 6), "cu_seqlens": CU}),
    "l2_normalise": Wrapper(l2_normalise, {"x": zeros(5, 6)}),
    "scalar_mix": Wrapper(
        scalar_mix, {"layers": [zeros(5, 6), zeros(5, 6)], "weights": zeros(2), "gamma": zeros(1)}, lists=("layers",)
    ),
    "crf.log_likelihood": Wrapper(crf.log_likelihood, {**CRF, "tags": whole(5)}, dense=("transitions",)),
    "crf.log_partition": Wrapper(crf.log_partition, CRF, dense=("transitions",)),
    "crf.marginals": Wrapper(crf.marginals, CRF, dense=("transitions",)),
    "crf.viterbi": Wrapper(crf.viterbi, CRF, dense=("transitions",)),
    "nf4_linear": Wrapper(nf4_linear, {"x": zeros(5, 8), "weight": NF4, "bias": zeros(8)}, any_rank=("x",)),
    "lora_linear": Wrapper(
        lora_linear,
        {"x": zeros(5, 6), "weight": zeros(8, 6), "bias": zeros(8), **PARTS, "scale": 1.0},
        any_rank=("x",),
        dense=(),
        lists=("a", "b"),
    ),
    "lstm": Wrapper(
        lstm,
        {"x": zeros(5, 3), "weight": zeros(8, 3), "recurrence": zeros(8, 2), "bias": zeros(8), "order": ORDER},
    ),
}


def tensors() -> list[tuple[str, str]]:
    found = []
    for name, wrapper in WRAPPERS.items():
        for key, value in wrapper.good.items():
            if isinstance(value, torch.Tensor) or key in wrapper.lists:
                found.append((name, key))
    return found


def changed(wrapper: Wrapper, key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    value = wrapper.good[key]
    new = [value[0], change(value[1])] if key in wrapper.lists else change(value)
    return {**wrapper.good, key: new}


def named(wrapper: Wrapper, key: str) -> str:
    return f"^{re.escape(key)}" + (r"\[1\]: " if key in wrapper.lists else ": ")


@pytest.mark.parametrize("name", WRAPPERS)
def test_what_is_taken_is_taken(name):
    WRAPPERS[name].call(**WRAPPERS[name].good)


@pytest.mark.parametrize("name, key", tensors())
def test_a_tensor_of_another_dtype_is_refused(name, key):
    wrapper = WRAPPERS[name]
    with pytest.raises(TypeError, match=named(wrapper, key) + "dtype is complex64"):
        wrapper.call(**changed(wrapper, key, lambda x: x.to(torch.complex64)))


@pytest.mark.parametrize("name, key", [(n, k) for n, k in tensors() if k not in WRAPPERS[n].any_rank])
def test_a_tensor_of_another_shape_is_refused(name, key):
    wrapper = WRAPPERS[name]
    with pytest.raises(ValueError, match=named(wrapper, key)):
        wrapper.call(**changed(wrapper, key, lambda x: x[None]))


def has_several_devices(name: str) -> bool:
    on_device = torch.Tensor | list | NF4Weight | RowGradient | attention.Layout
    return sum(isinstance(value, on_device) for value in WRAPPERS[name].good.values()) > 1


@pytest.mark.parametrize("name, key", [(n, k) for n, k in tensors() if has_several_devices(n)])
def test_a_tensor_on_another_device_is_refused(name, key):
    # Of two devices either may be called the wrong one: an error that names an argument is what counts.
    wrapper = WRAPPERS[name]
    with pytest.raises(ValueError, match=r"^[a-z_]+(\[\d\])?: is on (meta, expected cpu|cpu, expected meta)"):
        wrapper.call(**changed(wrapper, key, lambda x: x.to("meta")))


@pytest.mark.parametrize("name, key", [(n, k) for n, k in tensors() if k in WRAPPERS[n].dense])
def test_strides_that_a_kernel_would_misread_are_refused(name, key):
    wrapper = WRAPPERS[name]
    with pytest.raises(ValueError, match=named(wrapper, key) + "strides are"):
        wrapper.call(**changed(wrapper, key, lambda x: x.transpose(0, -1).contiguous().transpose(0, -1)))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"max_seqlen": 0}, "max_seqlen: is 0, expected at least 1"),
        ({"p": 1.0}, "p: is 1.0"),
        ({"p": 0.999995}, "p: is 0.999995, expected in .0, 0.999992"),
        ({"v": zeros(5, 2, 16)}, r"v: shape is \[5, 2, 16\], expected \[5, 2, 32\]"),
    ],
)
def test_attention_of_first_rows_refuses_by_name(change, said):
    good = WRAPPERS["first_rows_attention"].good
    with pytest.raises(ValueError, match=said):
        varlen.first_rows_attention(**{**good, **change})


@pytest.mark.parametrize(
    "bounds, longest, said",
    [
        ([0, 3], 5, "cu_seqlens: is 0 to 3, expected 0 to 5"),
        ([1, 5], 5, "cu_seqlens: is 1 to 5, expected 0 to 5"),
        ([0, 3, 9], 9, "cu_seqlens: is 0 to 9, expected 0 to 5"),
        ([0, 4, 3, 5], 5, "cu_seqlens: falls after sequence 1"),
        ([0, 4, 5], 3, "max_seqlen: is 3, and sequence 0 of cu_seqlens has 4"),
    ],
)
def test_bounds_that_are_not_those_of_the_rows_are_refused(bounds, longest, said):
    cu = torch.tensor(bounds, dtype=torch.int32)
    with pytest.raises(ValueError, match=said):
        varlen.varlen_attention(zeros(5, 3, 1, 32), cu, longest)
    if not said.startswith("max_seqlen"):
        with pytest.raises(ValueError, match=said):
            segment_pool(zeros(5, 6), cu)


def test_first_rows_in_another_dtype_are_refused():
    good = WRAPPERS["first_rows_attention"].good
    with pytest.raises(TypeError, match="q: dtype is bfloat16, expected float32"):
        varlen.first_rows_attention(**{**good, "q": good["q"].bfloat16()})


def test_a_layout_that_fits_no_batch_is_refused():
    with pytest.raises(ValueError, match="lengths: holds -1"):
        attention.plan_layout([3, -1], torch.zeros(3, dtype=torch.int32))
    with pytest.raises(TypeError, match="cu_seqlens: dtype is int64, expected int32"):
        attention.plan_layout([3, 2], torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"cu_seqlens: shape is \[2\], expected \[3\]"):
        attention.plan_layout([3, 2], torch.zeros(2, dtype=torch.int32))


def test_rotary_positions_need_an_even_head_size():
    with pytest.raises(ValueError, match="qkv: head size is 5, expected an even number"):
        varlen.varlen_attention(zeros(4, 3, 1, 5), torch.tensor([0, 4], dtype=torch.int32), 4, cos=zeros(4, 2), sin=zeros(4, 2))  # fmt: skip
