"""A linear-chain CRF over the tags of words: parameters in training, best path and marginals by numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from regraft.engine.tasks.schemes import forbidden

if TYPE_CHECKING:
    from torch import Tensor, nn

NEVER = -1e4  # the kernels treat it as never, exactly


class Crf:
    """Scores of going from tag to tag, with what the scheme forbids. `values`: transitions [C, C], starts, ends [C]."""

    def __init__(self, tags: Sequence[str], scheme: str, values: Sequence[Any] | None = None) -> None:
        self.never = forbidden(tags, scheme)
        shapes = [x.shape for x in self.never]
        self._values = (
            [np.asarray(v, dtype=np.float32) for v in values] if values else [np.zeros(s, np.float32) for s in shapes]
        )
        self._model: Any = None

    def attach(self, model: Any) -> None:
        """Make the scores parameters of `model`, as its module `crf`."""
        import torch
        from torch import nn

        module = nn.Module()
        for name, value in zip(("transitions", "starts", "ends"), self._values, strict=True):
            module.register_parameter(name, nn.Parameter(torch.from_numpy(value.copy())))
        model.crf = module
        self._model = model

    @property
    def _module(self) -> Any:
        # Under an adapter it is a copy that trains; once merged, that copy is the module itself.
        module: Any = None if self._model is None else self._model.crf
        copies: Any = getattr(module, "modules_to_save", None)
        return module if copies is None else copies[module.active_adapters[0]]

    def parameters(self) -> list[nn.Parameter]:
        return [self._module.transitions, self._module.starts, self._module.ends]

    def values(self) -> list[np.ndarray]:
        """The scores as they are now, what is forbidden at NEVER."""
        if self._module is not None:
            self._values = [p.detach().float().cpu().numpy().copy() for p in self.parameters()]
        return [np.where(never, np.float32(NEVER), v) for v, never in zip(self._values, self.never, strict=True)]

    def log_likelihood(
        self,
        emissions: Tensor,
        tags: Tensor,
        cu_seqlens: Tensor,
        begins: Tensor | None = None,
        ends: Tensor | None = None,
    ) -> Tensor:
        """log P(tags) of each sequence of words, [B]. Shape: emissions [N, C], tags [N], cu_seqlens [B + 1].

        `begins`, `ends` [B] bool: whether the sequence has the first, and the last, word of its text (None: all do).
        What the scheme says of a text's first and last tag holds for those alone.
        """
        import torch

        from regraft.kernels.crf import log_likelihood

        moves, starts, stops = (
            p.float().masked_fill(torch.from_numpy(never).to(p.device), NEVER)
            for p, never in zip(self.parameters(), self.never, strict=True)
        )
        some = cu_seqlens[1:] > cu_seqlens[:-1]
        begins, ends = (some if edge is None else edge & some for edge in (begins, ends))
        first, last = cu_seqlens[:-1][begins], cu_seqlens[1:][ends] - 1
        # Not every sequence has them, so they are added to the words they are about.
        emissions = emissions.float().index_add(0, first, starts.expand(len(first), -1))
        emissions = emissions.index_add(0, last, stops.expand(len(last), -1))
        free = torch.zeros_like(starts)
        return log_likelihood(emissions.contiguous(), tags, cu_seqlens, moves, free, free)

    def best(self, emissions: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The best tags of each sequence."""
        from regraft.kernels.viterbi import viterbi

        bounds = np.cumsum([0, *map(len, emissions)])
        if not bounds[-1]:
            return [np.zeros(0, dtype=np.int64) for _ in emissions]
        path, _ = viterbi(np.concatenate(emissions), bounds, *self.values())
        return np.split(path, bounds[1:-1])

    def marginals(self, emissions: Sequence[np.ndarray]) -> list[np.ndarray]:
        """P(tag of word t) of each sequence, [n, C] each; forward-backward in float64, all sequences at once."""
        lengths = np.array([len(e) for e in emissions])
        longest, states = int(lengths.max(initial=0)), self.never[0].shape[0]
        if not longest:
            return [np.zeros((0, states)) for _ in emissions]
        moves, starts, ends = (v.astype(np.float64) for v in self.values())
        e = np.zeros((longest, len(emissions), states))
        for i, rows in enumerate(emissions):
            e[: len(rows), i] = rows
        inside = np.arange(longest)[:, None] < lengths[None, :]
        forward, backward = np.empty_like(e), np.empty_like(e)
        forward[0] = starts + e[0]
        for t in range(1, longest):
            step = _log_sum(forward[t - 1][:, :, None] + moves[None], 1) + e[t]
            forward[t] = np.where(inside[t][:, None], step, forward[t - 1])
        backward[-1] = ends
        for t in range(longest - 2, -1, -1):
            step = _log_sum(moves[None] + (e[t + 1] + backward[t + 1])[:, None, :], 2)
            backward[t] = np.where(inside[t + 1][:, None], step, ends)
        both = forward + backward
        found = np.exp(both - _log_sum(both, 2)[:, :, None])
        return [found[:n, i] for i, n in enumerate(lengths)]


def _log_sum(x: np.ndarray, axis: int) -> np.ndarray:
    top = x.max(axis=axis, keepdims=True)
    return (top + np.log(np.exp(x - top).sum(axis=axis, keepdims=True))).squeeze(axis)
