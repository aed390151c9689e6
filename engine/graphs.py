"""ONNX graphs of a running model: packed, where linear layers never see padding, and padded, for other servers."""

from __future__ import annotations

import contextlib
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regraft.engine.bundle import BundleInfo
from regraft.engine.graph_inputs import graph_inputs
from regraft.engine.heads.recurrent import translations
from regraft.engine.models import RunningModel, logits_of
from regraft.kernels.rotary import rotate


@dataclass(frozen=True)
class GraphLayout:
    """A packed batch whose shape the graph does not know: attention goes through B x L cells by index.

    Shape: pad_index [B, L], token_index [T], lengths [B]; adapter [B]: which of several adapters is each sequence's.
    """

    pad_index: Tensor
    token_index: Tensor
    lengths: Tensor
    adapter: Tensor | None = None

    @property
    def starts(self) -> Tensor:
        return self.pad_index[:, 0]

    def _cells(self, x: Tensor) -> Tensor:
        # [T, H, D] -> [B, L, H, D] -> [B, H, L, D]; index_select is a Gather, plain indexing the slower GatherND
        flat = x.index_select(0, self.pad_index.flatten())
        return flat.view(*self.pad_index.shape, *x.shape[1:]).transpose(1, 2)

    def _bias(self) -> Tensor:
        cells = torch.arange(self.pad_index.shape[1], device=self.lengths.device)
        return torch.where(cells[None] < self.lengths[:, None], 0.0, -1e9)[:, None, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout_p: float, window: int | None) -> Tensor:
        scores = torch.matmul(self._cells(q * scale), self._cells(k).transpose(-1, -2)) + self._bias()
        if window is not None:
            cells = torch.arange(self.pad_index.shape[1], device=self.lengths.device)
            far = (cells[:, None] - cells[None, :]).abs() > window
            scores = scores + torch.where(far, -1e9, 0.0)
        out = torch.matmul(torch.softmax(scores, dim=-1), self._cells(v)).transpose(1, 2)
        return out.flatten(0, 1).index_select(0, self.token_index)

    def attend_merged(self, qkv: Tensor, *, scale: float, dropout_p: float) -> Tensor:
        q, k, v = qkv.unbind(1)
        return self.attend(q, k, v, scale=scale, dropout_p=dropout_p, window=None)

    def attend_rotary(
        self, qkv: Tensor, angles: tuple[Tensor, Tensor], *, scale: float, dropout_p: float, window: int | None
    ) -> Tensor:
        q, k, v = qkv.unbind(1)
        cos, sin = (x[0, :, : x.shape[-1] // 2] for x in angles)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return self.attend(q, k, v, scale=scale, dropout_p=dropout_p, window=window)

    def attend_first(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout_p: float) -> Tensor:
        scores = torch.matmul((q * scale)[:, :, None], self._cells(k).transpose(-1, -2)) + self._bias()
        return torch.matmul(torch.softmax(scores, dim=-1), self._cells(v))[:, :, 0]

    def attend_after(
        self,
        keys: Tensor,
        values: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        dropout_p: float,
        first: bool = False,
    ) -> Tensor:
        queries = (q * scale)[:, :, None] if first else self._cells(q * scale)
        bias = torch.nn.functional.pad(self._bias(), (keys.shape[0], 0))
        scores = torch.matmul(queries, self._cells_after(keys, k).transpose(-1, -2)) + bias
        out = torch.matmul(torch.softmax(scores, dim=-1), self._cells_after(values, v))
        return out[:, :, 0] if first else out.transpose(1, 2).flatten(0, 1).index_select(0, self.token_index)

    def _cells_after(self, prefix: Tensor, x: Tensor) -> Tensor:
        # [P, H, D], [T, H, D] -> [B, H, P + L, D]
        shared = prefix.transpose(0, 1)[None].expand(self.pad_index.shape[0], -1, -1, -1)
        return torch.cat((shared, self._cells(x)), dim=2)

    def means(self, hidden: Tensor) -> Tensor:
        numbers = torch.arange(self.pad_index.shape[1], device=self.lengths.device)
        inside = (numbers[None] < self.lengths[:, None]).to(hidden.dtype)[..., None]
        cells = hidden.index_select(0, self.pad_index.flatten()).view(*self.pad_index.shape, -1)
        return (cells * inside).sum(dim=1) / self.lengths[:, None].to(hidden.dtype)


class PackedGraph(nn.Module):
    """A packed model as the graph that is exported: flat inputs and gather indices, as `BundleInfo` documents them."""

    def __init__(self, running: RunningModel) -> None:
        super().__init__()
        self.running = running

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        pad_index: Tensor,
        token_index: Tensor,
        lengths: Tensor,
        token_type_ids: Tensor | None = None,
        marks: Tensor | None = None,
        adapter: Tensor | None = None,
    ) -> Tensor:
        layout = GraphLayout(pad_index, token_index, lengths, adapter)
        logits = self.running.run_layout(layout, input_ids, position_ids, token_type_ids, marks)
        return _tokens(logits).float()


def _tokens(logits: Any) -> Tensor:
    # Whether sentences follow each other is learned from, not asked.
    return logits[0] if isinstance(logits, tuple) else logits


PADDED_ATTENTION = "regraft_padded"


def _padded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    scores = torch.matmul(query * (scaling or query.shape[-1] ** -0.5), key.transpose(-1, -2))
    if attention_mask is not None:
        scores = scores + attention_mask
    if sliding_window is not None:
        cells = torch.arange(query.shape[2], device=query.device)
        scores = scores + torch.where((cells[:, None] - cells[None, :]).abs() >= sliding_window, -1e9, 0.0)
    return torch.matmul(torch.softmax(scores, dim=-1), value).transpose(1, 2), None


def _padded_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> Tensor | None:
    # transformers' own mask functions build it with vmap, which the exporter cannot fold.
    return None if attention_mask is None else torch.where(attention_mask > 0, 0.0, -1e9)[:, None, None]


def _use_padded_attention(model: Any) -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(PADDED_ATTENTION, _padded_attention)
    AttentionMaskInterface.register(PADDED_ATTENTION, _padded_mask)
    with contextlib.suppress(ValueError, NotImplementedError):  # DeBERTa and its like keep their own attention
        model.set_attn_implementation(PADDED_ATTENTION)


class _PaddedGraph(nn.Module):
    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        return _tokens(logits_of(self.model(**inputs))).float()


AXES: dict[str, dict[str, dict[int, str]]] = {
    "packed": {"input_ids": {0: "T"}, "position_ids": {0: "T"}, "pad_index": {0: "B", 1: "L"}}
    | {"token_index": {0: "T"}, "lengths": {0: "B"}, "token_type_ids": {0: "T"}}
    | {"marks": {0: "M"}, "adapter": {0: "B"}},
    "padded": {name: {0: "B", 1: "L"} for name in ("input_ids", "attention_mask", "token_type_ids")},
}


def write_graph(running: RunningModel, info: BundleInfo, path: Path) -> None:
    """Write the graph that `info.layout` names, in fp32."""
    import numpy as np

    generator = np.random.Generator(np.random.Philox(3))
    vocabulary = running.model.config.vocab_size
    example = [generator.integers(min(10, vocabulary - 1), vocabulary, n) for n in (7, 3, 11)]
    marks = [np.arange(0, len(x), 2) for x in example]
    arrays = graph_inputs(info, example, marks=marks, adapters=np.arange(3) % max(1, len(info.adapters)))
    if info.layout == "packed":
        graph: nn.Module = PackedGraph(running)
        order = ["input_ids", "position_ids", "pad_index", "token_index", "lengths"]
    else:
        running.run_padded("exported padded")
        _use_padded_attention(running.model)
        graph = _PaddedGraph(running.model)
        order = ["input_ids", "attention_mask"]
    order += [name for name in ("token_type_ids", "marks", "adapter") if name in arrays]
    _export(graph, {name: torch.from_numpy(arrays[name]) for name in order}, AXES[info.layout], path)


def _export(graph: nn.Module, inputs: dict[str, Tensor], axes: Any, path: Path) -> None:
    dims = dict.fromkeys(("T", "B", "L", "M"), torch.export.Dim.DYNAMIC)
    shapes = {name: {axis: dims[d] for axis, d in axes[name].items()} for name in inputs}
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                graph.eval(),
                (),
                path,
                kwargs=inputs,
                dynamic_shapes=shapes,
                output_names=["logits"],
                dynamo=True,
                external_data=False,
                verbose=False,
                opset_version=20,
                custom_translation_table=translations(),
            )
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    _forget_shapes(path)


def _forget_shapes(path: Path) -> None:
    # The exporter notes shapes of weights from before it transposed them, and quantisation trips over those notes.
    import onnx

    model = onnx.load(path)
    del model.graph.value_info[:]
    onnx.save(model, path)
