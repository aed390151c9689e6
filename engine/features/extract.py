"""The pass over the data: rows that the store lacks go through the encoder, packed, and are written shard by shard."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from regraft.engine.config import RunConfig
from regraft.engine.data.fast_tokenizer import FastTokenizer
from regraft.engine.data.tokens import TokenStore, encode
from regraft.engine.errors import StoreError
from regraft.engine.features.root import store_root
from regraft.engine.features.rows import FeatureRows
from regraft.engine.features.shard import write_shard
from regraft.engine.features.sources import Source, Sources, keys_of
from regraft.engine.features.spec import FeatureSpec, feature_spec, model_folder
from regraft.engine.features.store import FeatureStore, not_written
from regraft.engine.heap import FreedMemory
from regraft.engine.progress import ProgressBar

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 64 << 20
SHARD_SECONDS = 10.0  # a kill costs at most about this much work
FIRST_WINDOW = 256  # rows; later ones are as large as the rate and the limits above allow
CPU_TOKENS, GPU_TOKENS = 8192, 65_536  # of one forward pass
Say = Callable[[str], None]


@dataclass(frozen=True)
class Processes:
    """Who shares the work: `wait` returns when every process has reached it."""

    rank: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None


def processes() -> Processes:
    """The processes that torchrun or accelerate started; this one alone without them."""
    import os

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    import torch
    from accelerate import PartialState

    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    state = PartialState(cpu=wants_cpu or not torch.cuda.is_available())
    return Processes(state.process_index, state.num_processes, state.wait_for_everyone)


def features_of(
    config: RunConfig,
    splits: Mapping[str, Source],
    say: Say,
    *,
    shown: bool = True,
    made: tuple[FeatureSpec, FastTokenizer] | None = None,
) -> dict[str, FeatureRows]:
    """Features of every split: what the store has is read, what it lacks is computed first, each text or sequence once.

    `made`: what `feature_spec` gave, where it was asked before. Raises StoreError; every shard finished before it is kept.
    """
    spec, tokenizer = made or feature_spec(config)
    store = FeatureStore(store_root(config.features.store), spec)
    keys = {name: keys_of(source) for name, source in splits.items()}
    everyone = processes()
    whole = np.concatenate(list(keys.values()))
    lacking = len(store.missing(whole))
    if lacking or everyone.count > 1:
        with ExitStack() as held:
            if everyone.rank == 0:
                held.enter_context(store.locked(say))
            everyone.wait()
            store.refresh()
            missing = store.missing(whole)
            everyone.wait()  # every process has seen the same rows missing before the first one writes
            sources = Sources(list(splits.values()))
            mine = _share(missing, sources, everyone)
            _compute(config, spec, tokenizer, store, sources, whole, mine, everyone, say, shown)
            FreedMemory().give_back()  # the encoder's: a head needs a fraction of it
            everyone.wait()
        store.refresh()
    found = {name: FeatureRows(store, store.find(k)) for name, k in keys.items()}
    for name, rows in found.items():
        if (rows.where[:, 0] < 0).any():
            raise StoreError(
                f"{store.folder}: rows of {name} were deleted while they were read, as by a disk limit below what one "
                "data set needs; raise features.limit_gb and start again"
            )
    used = sorted({n for rows in found.values() for n in rows.shards})
    if everyone.rank == 0:
        store.used(used)
        say(
            f"features: {len(whole) - lacking:,} of {len(whole):,} rows were there, {lacking:,} distinct texts computed; "
            f"layers {', '.join(map(str, spec.layers))}, {spec.pooling}, {spec.precision}: {store.folder}"
        )
        if config.features.limit_gb is not None:
            from regraft.engine.features.keep import prune

            kept = {store.shards[n].path for n in used}
            prune(store_root(config.features.store), int(config.features.limit_gb * 1e9), keep=kept)
    return found


def _share(rows: np.ndarray, sources: Sources, everyone: Processes) -> np.ndarray:
    """This process's rows: a piece in order that holds about as much text as the others', so that they finish together."""
    if everyone.count == 1 or not len(rows):
        return rows
    ends = np.cumsum(sources.sizes()[rows] + 1)
    bounds = np.searchsorted(ends, ends[-1] * np.arange(1, everyone.count) / everyone.count)
    return np.split(rows, bounds)[everyone.rank]


def _compute(
    config: RunConfig,
    spec: FeatureSpec,
    tokenizer: FastTokenizer,
    store: FeatureStore,
    sources: Sources,
    keys: np.ndarray,
    mine: np.ndarray,
    everyone: Processes,
    say: Say,
    shown: bool,
) -> None:
    if not len(mine):
        return
    encoder = Encoder(config, spec, tokenizer)
    if everyone.rank == 0 and not encoder.running.packed:
        say(f"padded: {encoder.running.reason}")
    rate = Rate()
    with ProgressBar("features", len(mine), shown=shown and everyone.rank == 0) as bar:
        for rows in _windows(mine, spec, rate):
            began = time.perf_counter()
            lengths, features = encoder.of(sources.tokens(rows, tokenizer, spec.max_length))
            try:
                pooled = spec.pooling != "none"
                write_shard(store.folder, keys[rows], lengths, features, precision=spec.precision, pooled=pooled)
            except OSError as error:
                raise not_written(store.folder, error) from error
            rate.add(len(rows), int(lengths.sum()), time.perf_counter() - began)
            bar.advance(len(rows), rows_per_second=f"{rate.rows:,.0f}", tokens_per_second=f"{rate.tokens:,.0f}")


class Rate:
    """Rows and tokens a second so far, and rows and tokens of the last window."""

    def __init__(self) -> None:
        self.done_rows = self.done_tokens = self.last_rows = self.last_tokens = 0
        self.seconds = self.last_seconds = 0.0

    def add(self, rows: int, tokens: int, seconds: float) -> None:
        self.done_rows, self.done_tokens = self.done_rows + rows, self.done_tokens + tokens
        self.last_rows, self.last_tokens, self.last_seconds = rows, tokens, seconds
        self.seconds += seconds

    @property
    def rows(self) -> float:
        return self.done_rows / max(self.seconds, 1e-9)

    @property
    def tokens(self) -> float:
        return self.done_tokens / max(self.seconds, 1e-9)


def _windows(rows: np.ndarray, spec: FeatureSpec, rate: Rate) -> Iterator[np.ndarray]:
    """Rows of one shard after another: as many as take SHARD_SECONDS and SHARD_BYTES."""
    start = 0
    while start < len(rows):
        count = FIRST_WINDOW
        if rate.last_rows:
            a_row = 1 if spec.pooling != "none" else rate.done_tokens / rate.done_rows
            by_bytes = SHARD_BYTES / (spec.bytes_a_row * a_row)
            by_time = rate.last_rows * SHARD_SECONDS / max(rate.last_seconds, 1e-6)
            count = int(max(16, min(by_bytes, by_time)))
        yield rows[start : start + count]
        start += count


class Encoder:
    """The encoder of a run, ready to give features. Raises ModelError."""

    def __init__(self, config: RunConfig, spec: FeatureSpec, tokenizer: FastTokenizer) -> None:
        import torch

        from regraft.engine.features.encoder import GraftedEncoder, load_backbone
        from regraft.engine.half_weights import bind_half_weights
        from regraft.engine.models import ready_to_answer
        from regraft.engine.training.setup import set_threads

        set_threads(config)
        self.spec, self.tokenizer = spec, tokenizer
        grafted = GraftedEncoder(
            load_backbone(model_folder(config)), spec.layers, spec.pooling, normalise=spec.normalise
        )
        self.running = ready_to_answer(
            grafted, tokenizer.pad_token_id, packing=config.model.packing, kernels=config.model.kernels
        )
        self._context: Any = nullcontext
        if spec.compute == "bf16" and next(self.running.parameters()).device.type == "cpu":
            # products alone, over weights that are cast once
            bind_half_weights(self.running)
            self._context = partial(torch.autocast, "cpu", torch.bfloat16)
        elif spec.compute != "fp32":
            self.running.to({"bf16": torch.bfloat16, "fp16": torch.float16}[spec.compute])

    def __call__(self, texts: list[str], pairs: list[str] | None = None) -> tuple[np.ndarray, torch.Tensor]:
        """Token counts [N] and features: [N, J, H], or [T, J, H] of all tokens in the order of the texts."""
        return self.of(encode(texts, pairs, self.tokenizer, self.spec.max_length))

    def of(self, tokens: TokenStore) -> tuple[np.ndarray, torch.Tensor]:
        """The same of sequences of tokens."""
        import torch

        from regraft.engine.batches import by_length, collate

        pooled = self.spec.pooling != "none"
        device: Any = next(self.running.parameters()).device
        rows = len(tokens) if pooled else len(tokens.ids)
        features = torch.empty(rows, len(self.spec.layers), self.spec.hidden)
        with torch.inference_mode(), self._context():
            for batch in by_length(tokens.lengths, GPU_TOKENS if device.type == "cuda" else CPU_TOKENS):
                found = self.running(collate(tokens, batch).to(device)).cpu().unflatten(1, features.shape[1:])
                if pooled:
                    features[torch.from_numpy(batch)] = found
                    continue
                at = np.concatenate([np.arange(tokens.offsets[r], tokens.offsets[r + 1]) for r in batch])
                features[torch.from_numpy(at)] = found
        return tokens.lengths, features
