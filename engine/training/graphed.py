"""Forward and backward of a micro-batch as one CUDA graph a bucket: one launch instead of a thousand.

At 32 short sequences a step is bound by its launches. Here every micro-batch is filled up to a bucket by dummy
sequences (`engine.buckets`), its inputs are copied from pinned memory into fixed tensors, and the graph captured for
that bucket is replayed. Gradients are added up in fixed tensors; clipping and the optimizer follow on them as always.
Dropout's seed is one of the fixed tensors, so every replay draws masks of its own, and the same ones after a resume.

The same code runs uncaptured on any device (`capture=False`): that is how it is tested without a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regraft.engine.buckets import Bucket, bucket_of, fill_rows, fill_up
from regraft.engine.models import RunningModel
from regraft.engine.packing import PackedBatch
from regraft.engine.varlen_layout import VarlenLayout

if TYPE_CHECKING:
    from regraft.engine.tasks import Task

WARM_UP = 3  # runs before a capture: libraries set themselves up, Triton compiles
MOST_GRAPHS = 64
_log = logging.getLogger("regraft.training")
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def why_not_graphed(running: RunningModel, *, precision: str, kernels: str, capturable: bool = True) -> str | None:
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
    if running.reads != "first" or getattr(running.model, "keeps_all_rows", False):
        return "its head reads more than the first row of each sequence"
    if precision == "fp16":
        return "fp16 scales its loss by a value that changes"
    return None


@dataclass
class _Captured:
    """Fixed inputs of one bucket, host copies to fill them from in turn, and the graph (None: run uncaptured)."""

    inputs: dict[str, Tensor]
    staged: list[dict[str, Tensor]]
    copied: list[Any]
    loss: Tensor
    graph: Any = None
    turn: int = 0

    def fill(self, values: dict[str, Tensor]) -> None:
        """Copy host tensors into the fixed inputs, through pinned memory that no earlier copy still reads."""
        self.turn = (self.turn + 1) % len(self.staged)
        stage, done = self.staged[self.turn], self.copied[self.turn]
        if done is not None:
            done.synchronize()
        for name, value in values.items():
            stage[name].copy_(value)
            self.inputs[name].copy_(stage[name], non_blocking=True)
        if done is not None:
            done.record()


class GraphedGradients:
    """Adds the gradients of one micro-batch to `p.grad` of every parameter that is trained; returns its loss [].

    `loss(logits, targets, weights)` is summed over the sequences; `autocast` makes the context it is computed in.
    A bucket that cannot be captured runs uncaptured from then on, and the log says why.
    """

    def __init__(
        self,
        running: RunningModel,
        loss: Loss,
        parameters: Sequence[Tensor],
        *,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        capture: bool = True,
    ) -> None:
        self.running, self.loss, self.autocast, self.capture = running, loss, autocast, capture
        self.parameters = [p for p in parameters if p.requires_grad]
        self.gradients = [torch.zeros_like(p) for p in self.parameters]
        self.device = self.parameters[0].device
        self.seen: dict[tuple, _Captured] = {}
        self.reason = "" if capture else "capturing was not asked for"
        self._pool: Any = None

    def __call__(
        self, batch: PackedBatch, targets: Tensor, weights: Tensor, *, factor: float = 1.0, seed: int = 0
    ) -> Tensor:
        """batch, targets [B, ..] and weights [B] on the host; `factor` multiplies the loss."""
        self._attach()
        bucket = bucket_of(batch)
        values = self._values(
            fill_up(batch, bucket, self.running.pad_token_id), targets, weights * factor, bucket, seed
        )
        key = (bucket, self.running.training, *((name, v.dtype, v.shape) for name, v in values.items()))
        found = self.seen.get(key)
        if found is None:
            found = self.seen[key] = self._prepare(values)
            found.fill(values)
            if self.capture and len(self.seen) <= MOST_GRAPHS:
                self._capture(found, bucket)
        else:
            found.fill(values)
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
        values = {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "cu_seqlens": batch.cu_seqlens,
            "targets": fill_rows(targets, bucket.sequences),
            "weights": fill_rows(weights, bucket.sequences),
            "seed": torch.tensor([seed & ((1 << 63) - 1)]),
        }
        if batch.token_type_ids is not None:
            values["token_type_ids"] = batch.token_type_ids
        elif self.running.uses_token_types:
            values["token_type_ids"] = torch.zeros_like(batch.input_ids)
        return values

    def _prepare(self, values: dict[str, Tensor]) -> _Captured:
        cuda = self.device.type == "cuda"
        host = lambda v: torch.empty_like(v, pin_memory=cuda)  # noqa: E731
        return _Captured(
            inputs={name: torch.empty_like(v, device=self.device) for name, v in values.items()},
            staged=[{name: host(v) for name, v in values.items()} for _ in range(2)],
            copied=[torch.cuda.Event() if cuda else None for _ in range(2)],
            loss=torch.zeros((), device=self.device),
        )

    def _run(self, state: _Captured, bucket: Bucket) -> None:
        """One forward and backward from the fixed inputs."""
        x = state.inputs
        with self.autocast():
            layout = VarlenLayout(x["cu_seqlens"], bucket.longest, bucket.tokens, x["seed"])
            positions = x["position_ids"] + self.running.position_offset
            logits = self.running.run_layout(layout, x["input_ids"], positions, x.get("token_type_ids"))
            scale = self.running.output_scale
            logits = logits if scale is None else scale(logits)
            loss = self.loss(logits.float(), x["targets"], x["weights"])
        loss.backward()
        state.loss.copy_(loss.detach())

    def _capture(self, state: _Captured, bucket: Bucket) -> None:
        kept = [g.clone() for g in self.gradients]  # warming up adds gradients that are none
        try:
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(WARM_UP):
                    self._run(state, bucket)
            torch.cuda.current_stream().wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                self._run(state, bucket)
            self._pool = self._pool or graph.pool()
            state.graph = graph
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model does that a graph cannot hold
            self.capture = False
            self.reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error) else ''}"
            _log.warning("steps run without CUDA graphs: %s", self.reason)
            torch.cuda.synchronize()
        finally:
            for gradient, before in zip(self.gradients, kept, strict=True):
                gradient.copy_(before)


def graph_steps(
    running: RunningModel,
    task: Task,
    parameters: Sequence[Tensor],
    *,
    precision: str,
    kernels: str,
    autocast: Callable[[], AbstractContextManager],
    say: Callable[[str], None],
) -> GraphedGradients | None:
    """Captured gradients for a run, where they can be; on a GPU the reason is said where they cannot."""
    reason = why_not_graphed(running, precision=precision, kernels=kernels)
    if reason is None:
        return GraphedGradients(running, loss_of(task), parameters, autocast=autocast)
    if next(running.parameters()).device.type == "cuda":
        say(f"steps run without CUDA graphs: {reason}")
    return None


def loss_of(task: Task) -> Loss:
    """The task's loss over a batch of which only the first rows are read: no length enters it."""
    return lambda logits, targets, weights: task.batch_loss(logits, targets, weights, ())


@torch.no_grad()
def average_over_processes(gradients: Sequence[Tensor], processes: int) -> None:
    """Mean of every gradient over all processes, in few messages. The graphs run on the bare model, so that no
    communication has to be captured."""
    if processes < 2:
        return
    import torch.distributed as dist

    for dtype in dict.fromkeys(g.dtype for g in gradients):
        mine = [g for g in gradients if g.dtype == dtype]
        flat = torch._utils._flatten_dense_tensors(mine)
        dist.all_reduce(flat)
        flat /= processes
        torch._foreach_copy_(mine, list(torch._utils._unflatten_dense_tensors(flat, mine)))
