"""Forward and backward of a micro-batch as one CUDA graph a bucket: one launch instead of a thousand.

At 32 short sequences a step is bound by its launches. Here every micro-batch is filled up to a bucket by dummy
sequences (`engine.buckets`), its inputs are copied from pinned memory into fixed tensors, and the graph captured for
that bucket is replayed. Gradients are added up in fixed tensors; `CapturedOptimizer` clips and updates from there.
Dropout's seed is one of the fixed tensors, so every replay draws masks of its own, and the same ones after a resume.

The same code runs uncaptured on any device (`capture=False`): that is how it is tested without a GPU, and, through
`torch.compile`, what graphs are compared with before a run (`ways`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regraft.engine.buckets import Bucket, bucket_of, fill_up
from regraft.engine.models import RunningModel
from regraft.engine.packing import PackedBatch
from regraft.engine.training.graphed_losses import SequenceLoss, StepLoss, step_loss
from regraft.engine.varlen_layout import VarlenLayout
from regraft.kernels.capture import capture

if TYPE_CHECKING:
    from regraft.engine.tasks import Task

WARM_UP = 3  # runs before a capture: libraries set themselves up, Triton compiles
MOST_GRAPHS = 64
ALIGNED = 256  # bytes: where each input begins in the one block that all are copied in
_log = logging.getLogger("regraft.training")


def why_not_graphed(
    running: RunningModel,
    *,
    precision: str,
    kernels: str,
    capturable: bool = True,
    task: Task | None = None,
    unfreezing: bool = False,
) -> str | None:
    """Why this run's steps cannot be captured; None where they can."""
    device = next(running.parameters()).device
    if kernels == "off":
        return "kernels are off"
    if capturable and device.type != "cuda":
        return f"the model is on {device.type}"
    if not running.packed:
        return f"the model runs padded ({running.reason})"
    if running.layout_of != VarlenLayout.of:
        return "its attention does not run on cu_seqlens"
    if running.reads == "marked":
        return "its head reads marked tokens, of which each step has another number"
    if task is not None and isinstance(reason := step_loss(task), str):
        return reason
    if getattr(running.model, "keeps_all_rows", False):
        return "its head reads all rows of a sequence, each of its own length"
    if precision == "fp16":
        return "fp16 scales its loss by a value that changes"
    if unfreezing:
        return "what is trained changes on the way (unfreeze.gradual)"
    return None


class _Inputs:
    """The fixed inputs of one bucket in one block of device memory, filled by one copy from pinned memory."""

    def __init__(self, values: dict[str, Tensor], device: torch.device) -> None:
        places, size = {}, 0
        for name, value in values.items():
            places[name] = size
            size += -(-value.numel() * value.element_size() // ALIGNED) * ALIGNED
        cuda = device.type == "cuda"
        self._block = torch.zeros(size, dtype=torch.uint8, device=device)
        # Two sets of host memory: one is filled while the device may still read the other.
        self._staged = [torch.zeros(size, dtype=torch.uint8, pin_memory=cuda) for _ in range(2)]
        self._copied = [torch.cuda.Event() if cuda else None for _ in range(2)]
        self._turn = 0

        def views(block: Tensor) -> dict[str, Tensor]:
            cut = {n: block[places[n] : places[n] + v.numel() * v.element_size()] for n, v in values.items()}
            return {n: cut[n].view(v.dtype).view(v.shape) for n, v in values.items()}

        self.tensors = views(self._block)
        self._host = [views(block) for block in self._staged]

    def fill(self, values: dict[str, Tensor]) -> None:
        """Copy host tensors into the fixed inputs."""
        self._turn = (self._turn + 1) % 2
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        for name, value in values.items():
            self._host[self._turn][name].copy_(value)
        self._block.copy_(self._staged[self._turn], non_blocking=True)
        if copied is not None:
            copied.record()


@dataclass
class _Captured:
    """One bucket's inputs and loss [], and its graph (None: run uncaptured)."""

    inputs: _Inputs
    loss: Tensor
    graph: Any = None


class GraphedGradients:
    """Adds the gradients of one micro-batch to `p.grad` of every parameter that is trained; returns its loss [].

    `loss`: a `StepLoss`, or a function (logits, targets, weights) of each sequence's own logits, summed; `autocast` makes
    the context it is computed in. `compiled`: the backend of torch.compile that forward and loss go through.
    A bucket that cannot be captured runs uncaptured from then on, and the log says why.
    """

    def __init__(
        self,
        running: RunningModel,
        loss: StepLoss | Callable[[Tensor, Tensor, Tensor], Tensor],
        parameters: Sequence[Tensor],
        *,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        capture: bool = True,
        compiled: str | None = None,
    ) -> None:
        self.running, self.autocast, self.capture = running, autocast, capture
        self.loss: StepLoss = loss if hasattr(loss, "fill") else SequenceLoss(loss)  # type: ignore[assignment]
        self.parameters = [p for p in parameters if p.requires_grad]
        self.gradients = [torch.zeros_like(p) for p in self.parameters]
        self.device = self.parameters[0].device
        self.seen: dict[tuple, _Captured] = {}
        self.reason = "" if capture else "capturing was not asked for"
        self._pool: Any = None
        # Any number of tokens and sequences in one compilation
        self._lost = self._forward if compiled is None else torch.compile(self._forward, backend=compiled, dynamic=True)

    def __call__(
        self, batch: PackedBatch, targets: Tensor, weights: Tensor, *, factor: float = 1.0, seed: int = 0
    ) -> Tensor:
        """batch, targets [B, ..] and weights [B] on the host; `factor` multiplies the loss."""
        self._attach()
        bucket = bucket_of(batch)
        values = self._values(batch, targets, weights * factor, bucket, seed)
        key = (bucket, self.running.training, *((name, v.dtype, v.shape) for name, v in values.items()))
        found = self.seen.get(key)
        if found is None:
            loss = torch.zeros((), device=self.device)
            found = self.seen[key] = _Captured(_Inputs(values, self.device), loss)
            found.inputs.fill(values)
            if self.capture and len(self.seen) <= MOST_GRAPHS:
                self._capture(found, bucket)
        else:
            found.inputs.fill(values)
        if found.graph is not None:
            found.graph.replay()
        else:
            self._run(found, bucket)
        return found.loss

    def forget(self) -> None:
        """Let go of all graphs and their memory."""
        self.seen.clear()
        self._pool = None

    def _attach(self) -> None:
        # The optimizer's zero_grad lets go of gradients; a graph writes to where they were when it was captured.
        fresh = [g for p, g in zip(self.parameters, self.gradients, strict=True) if p.grad is not g]
        if fresh:
            torch._foreach_zero_(fresh)
            for p, g in zip(self.parameters, self.gradients, strict=True):
                p.grad = g

    def _values(
        self, batch: PackedBatch, targets: Tensor, weights: Tensor, bucket: Bucket, seed: int
    ) -> dict[str, Tensor]:
        targets, weights = self.loss.fill(batch, bucket, targets, weights)
        filled = fill_up(batch, bucket, self.running.pad_token_id)
        values = {
            "input_ids": filled.input_ids,
            "position_ids": filled.position_ids,
            "cu_seqlens": filled.cu_seqlens,
            "targets": targets,
            "weights": weights,
            "seed": torch.tensor([seed & ((1 << 63) - 1)]),
        }
        if filled.token_type_ids is not None:
            values["token_type_ids"] = filled.token_type_ids
        elif self.running.uses_token_types:
            values["token_type_ids"] = torch.zeros_like(filled.input_ids)
        return values

    def _forward(self, x: dict[str, Tensor], longest: int) -> Tensor:
        """The batch's loss [] from the fixed inputs."""
        layout = VarlenLayout(x["cu_seqlens"], longest, x["input_ids"].shape[0], x["seed"])
        positions = x["position_ids"] + self.running.position_offset
        logits = self.running.run_layout(layout, x["input_ids"], positions, x.get("token_type_ids"))
        scale = self.running.output_scale
        logits = logits if scale is None else scale(logits)
        return self.loss(logits.float(), x["targets"], x["weights"], layout)

    def _compute(self, x: dict[str, Tensor], longest: int) -> Tensor:
        try:
            return self._lost(x, longest)
        except Exception as error:
            if self._lost == self._forward or isinstance(error, torch.OutOfMemoryError):
                raise
            _log.warning("steps run uncompiled: %s", type(error).__name__)
            self._lost = self._forward
            return self._forward(x, longest)

    def _run(self, state: _Captured, bucket: Bucket) -> None:
        """One forward and backward from the fixed inputs."""
        with self.autocast():
            loss = self._compute(state.inputs.tensors, bucket.longest)
        loss.backward()
        state.loss.copy_(loss.detach())

    def _capture(self, state: _Captured, bucket: Bucket) -> None:
        kept = [g.clone() for g in self.gradients]  # warming up adds gradients that are none
        try:
            state.graph = capture(lambda: self._run(state, bucket), warm_up=WARM_UP, pool=self._pool)
            self._pool = self._pool or state.graph.pool()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model does that a graph cannot hold
            self.capture = False
            self.reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error) else ''}"
            _log.warning("steps run without CUDA graphs: %s", self.reason)
        finally:
            for gradient, before in zip(self.gradients, kept, strict=True):
                gradient.copy_(before)
