"""A small real bundle, built in a second: an ONNX graph written out below, a tokenizer made with `tokenizers`.

The graph's answer for a text depends on every token, its position, its type and its neighbours' mean, so that a
mistake in packing or padding shows. `reference_logits` says the same in numpy, for one text at a time.
"""

from __future__ import annotations

import atexit
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper, parser
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from regraft.engine.bundle import BundleInfo, write_info
from regraft.serve.session import Session

WIDTH = 16
MAX_LENGTH = 24
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
# 'poison' has an embedding that is not a number, 'beyond' no embedding at all: the runtime refuses a batch with it.
WORDS = [
    "good",
    "bad",
    "film",
    "the",
    "a",
    "not",
    "very",
    "ready",
    *"abcdefghijklmnopqrstuvwxyz"[1:],
    "poison",
    "beyond",
]
VOCABULARY = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}

TASKS: dict[str, dict[str, Any]] = {
    "classification": {"type": "classification", "labels": ["negative", "neutral", "positive"], "metric": "accuracy"},
    "multilabel": {
        "type": "multilabel",
        "labels": ["billing", "delivery", "praise"],
        "thresholds": [0.5, 0.3, 0.7],
        "metric": "macro_f1",
    },
    "regression": {"type": "regression", "labels": ["value"], "metric": "pearson"},
}

# h [T, D] holds the tokens' vectors; every layout must arrive at mean [B, D] and first [B, D].
PACKED = """
<ir_version: 8, opset_import: ["" : 18]>
packed (int64[T] input_ids, int64[T] position_ids, int64[T] token_type_ids, int64[B, L] pad_index,
        int64[T] token_index, int64[B] lengths) => (float[B, C] logits)
{
  words = Gather (E, input_ids)
  places = Gather (P, position_ids)
  types = Gather (K, token_type_ids)
  h0 = Add (words, places)
  h = Add (h0, types)
  cells = Gather (h, pad_index)
  shape = Shape (pad_index)
  longest = Gather (shape, one)
  columns = Range (zero, longest, one)
  lengths_column = Unsqueeze (lengths, last)
  real = Less (columns, lengths_column)
  real_column = Unsqueeze (real, last)
  mask = Cast <to = 1> (real_column)
  kept = Where (real_column, cells, nothing)
  summed = ReduceSum <keepdims = 0> (kept, middle)
  count = ReduceSum <keepdims = 0> (mask, middle)
  mean = Div (summed, count)
  mean_rows = Unsqueeze (mean, middle)
  mixed_cells = Mul (kept, mean_rows)
  flat = Reshape (mixed_cells, rows)
  mixed = Gather (flat, token_index)
  residual = Add (h, mixed)
  ends = CumSum (lengths, zero)
  starts = Sub (ends, lengths)
  first = Gather (residual, starts)
  WORK
  logits = MatMul (worked, W)
}
"""
PADDED = """
<ir_version: 8, opset_import: ["" : 18]>
padded (int64[B, L] input_ids, int64[B, L] attention_mask, int64[B, L] token_type_ids) => (float[B, C] logits)
{
  words = Gather (E, input_ids)
  shape = Shape (input_ids)
  longest = Gather (shape, one)
  columns = Range (zero, longest, one)
  positions = Add (columns, offset)
  places = Gather (P, positions)
  types = Gather (K, token_type_ids)
  h0 = Add (words, places)
  h = Add (h0, types)
  mask_rows = Unsqueeze (attention_mask, last)
  mask = Cast <to = 1> (mask_rows)
  real = Cast <to = 9> (mask_rows)
  kept = Where (real, h, nothing)
  summed = ReduceSum <keepdims = 0> (kept, middle)
  count = ReduceSum <keepdims = 0> (mask, middle)
  mean = Div (summed, count)
  mean_rows = Unsqueeze (mean, middle)
  mixed = Mul (kept, mean_rows)
  residual = Add (h, mixed)
  first = Gather <axis = 1> (residual, zero)
  WORK
  logits = MatMul (worked, W)
}
"""
# Multiplies a large matrix `trips` times and adds the (zero) result: a model as slow as a test wants.
SLOW = """
  busy = Loop (trips, , block) <body = turn (int64 i, bool go, float[N, N] x) => (bool on, float[N, N] y)
    { on = Identity (go) y = MatMul (x, block) }>
  none = ReduceSum <keepdims = 0> (busy)
  worked = Add (first, none)
"""


def make_bundle(
    folder: Path,
    *,
    layout: str = "packed",
    task: str = "classification",
    position_offset: int = 2,
    max_length: int = MAX_LENGTH,
    work: int = 0,
) -> Path:
    """A bundle in `folder`. `work`: extra matrix products in every run of the graph."""
    folder.mkdir(parents=True)
    weights = graph_weights(TASKS[task], position_offset, max_length)
    source = (PACKED if layout == "packed" else PADDED).replace("WORK", SLOW if work else "worked = Identity (first)")
    model = parser.parse_model(source)
    constants = {
        "zero": np.array(0),
        "one": np.array(1),
        "last": np.array([-1]),
        "middle": np.array([1]),
        "rows": np.array([-1, WIDTH]),
        "offset": np.array(position_offset),
        "nothing": np.zeros(1, dtype=np.float32),
        "trips": np.array(work),
        "block": np.zeros((384, 384), dtype=np.float32),
        **weights,
    }
    used = {name for node in model.graph.node for name in node.input} | ({"block", "trips"} if work else set())
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items() if k in used)
    onnx.checker.check_model(model)
    onnx.save(model, folder / "model.onnx")
    make_tokenizer().save(str(folder / "tokenizer.json"))
    write_info(
        folder,
        BundleInfo(
            layout=layout,
            precision="fp32",
            task=TASKS[task],
            max_length=max_length,
            pad_token_id=VOCABULARY["[PAD]"],
            position_offset=position_offset,
            token_types=True,
            source={"model": "a graph made for tests"},
        ),
    )
    return folder


def graph_weights(task: dict[str, Any], position_offset: int, max_length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    embeddings = rng.normal(size=(VOCABULARY["beyond"], WIDTH)).astype(np.float32)
    embeddings[VOCABULARY["poison"]] = np.nan
    return {
        "E": embeddings,
        "P": rng.normal(size=(max_length + position_offset, WIDTH)).astype(np.float32),
        "K": rng.normal(size=(2, WIDTH)).astype(np.float32),
        "W": rng.normal(size=(WIDTH, len(task["labels"]))).astype(np.float32),
    }


def reference_logits(
    ids: np.ndarray, types: np.ndarray, task: str, *, position_offset: int = 2, max_length: int = MAX_LENGTH
) -> np.ndarray:
    """Logits [C] of one text, in double precision and without any batch."""
    w = {k: v.astype(np.float64) for k, v in graph_weights(TASKS[task], position_offset, max_length).items()}
    h = w["E"][ids] + w["P"][np.arange(len(ids)) + position_offset] + w["K"][types]
    return (h[0] + h[0] * h.mean(axis=0)) @ w["W"]


def make_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, VOCABULARY[name]) for name in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def bundle(layout: str = "packed", task: str = "classification", work: int = 0) -> Path:
    """The folder of such a bundle, made once in a test run and not to be written to."""
    folder = _home() / f"{layout}-{task}-{work}"
    return folder if folder.exists() else make_bundle(folder, layout=layout, task=task, work=work)


def session(layout: str = "packed", task: str = "classification", work: int = 0) -> Session:
    """A loaded bundle, once in a test run."""
    return _load(bundle(layout, task, work))


@cache
def _load(folder: Path) -> Session:
    return Session(folder, threads=1)


@cache
def _home() -> Path:
    home = tempfile.TemporaryDirectory(prefix="bundles-")
    atexit.register(home.cleanup)
    return Path(home.name)
