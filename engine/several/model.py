"""One encoder under the heads of several tasks, each head transformers' own for its kind of task.

To `RunningModel` it looks like a transformers model, so it runs packed, is proven so, and exports through the same code.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput

from regraft.engine.errors import ConfigError, ModelError
from regraft.engine.models import AroundBackbone, logits_of
from regraft.engine.output_scale import OutputScale, scale_output
from regraft.engine.tasks.base import FIRST, MARKED

if TYPE_CHECKING:
    from regraft.engine.config import ModelConfig
    from regraft.engine.tasks.several import Several

HEADS_FILE = "heads.safetensors"
SEEN_BY_HEADS = {"input_ids", "attention_mask"}
LOG_VARIANCE_RATE = 1e-2  # learning rate of the losses' weights: one number a task has far to go in few steps


class Given(nn.Module):
    """Stands where a head's own encoder was, and gives it what the shared one found, through the head's own pooler."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.holds = SimpleNamespace(output=None)  # no attribute of the module: an export would trip over it
        # Tasks that share a pooler pull at one layer of it: each has its own, as it has in a run of its own.
        self.pooler = getattr(encoder, "pooler", None)
        self.activation = getattr(encoder, "pooler_activation", None)  # ALBERT's pooler is a bare linear layer

    def forward(self, *_: Any, **__: Any) -> Any:
        output = self.holds.output
        if self.pooler is None:
            return output
        hidden = output.last_hidden_state
        pooled = self.pooler(hidden) if self.activation is None else self.activation(self.pooler(hidden[:, 0]))
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)


class ManyHeads(AroundBackbone):
    """`views`: transformers' models, one a task, whose encoders are replaced by one of them.

    Logits of all heads come side by side: [B, sum of all C] where every head reads first rows; else at tokens, [1, T,
    sum of all C] packed or [B, L, sum of all C], a first row's logits repeated along its sequence.
    """

    def __init__(self, views: Sequence[Any], reads: Sequence[str]) -> None:
        super().__init__()
        self.regraft_fresh = _fresh_names(views)
        encoders = [getattr(view, view.base_model_prefix) for view in views]
        for view, encoder in zip(views, encoders, strict=True):
            setattr(view, view.base_model_prefix, Given(encoder))
        self.backbone = encoders[0]
        self._put_pooler(None)
        self.heads = nn.ModuleList(views)
        self.taken = [SEEN_BY_HEADS & set(inspect.signature(view.forward).parameters) for view in views]
        self.log_variances: nn.ParameterList | None = None
        self.reads = tuple(reads)
        self.joined_at_tokens = any(r != FIRST for r in reads)
        self._packed = False

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def gradient_checkpointing_enable(self, options: dict[str, Any]) -> None:
        self.backbone.gradient_checkpointing_enable(options)

    def add_log_variances(self) -> None:
        """Make the log-variance of every task's loss a parameter, 0 at first (Kendall et al. 2018)."""
        self.log_variances = nn.ParameterList(nn.Parameter(torch.zeros(1)) for _ in self.heads)
        for value in self.log_variances:
            value.learning_rate = LOG_VARIANCE_RATE

    def forward(self, **inputs: Tensor) -> SequenceClassifierOutput:
        """As transformers' models: an output with `logits`."""
        self._packed = "attention_mask" not in inputs
        output = self.backbone(**inputs)
        firsts = self._first_rows(output) if self.joined_at_tokens and self._packed else output
        logits = []
        view: Any
        for view, given, reads, taken in zip(self.heads, self._given(), self.reads, self.taken, strict=True):
            given.holds.output = firsts if reads == FIRST else output
            found = logits_of(view(**{name: value for name, value in inputs.items() if name in taken}))
            given.holds.output = None
            logits.append(self._along(found, inputs["input_ids"]) if reads == FIRST else found)
        joined = torch.cat(logits, dim=-1)
        if self.training and torch.distributed.is_available() and torch.distributed.is_initialized():
            # Several processes average every gradient that a step has: here it has all of them.
            joined = joined + 0.0 * sum(p.sum() for p in self.loose_parameters())
        return SequenceClassifierOutput(logits=joined)

    def loose_parameters(self) -> list[nn.Parameter]:
        """Those that only losses read: of CRFs, and the log-variances."""
        return [p for n, p in self.named_parameters() if ".crf." in n or n.startswith("log_variances.")]

    def _first_rows(self, output: Any) -> Any:
        # Heads take `[:, 0]`: give them one row a sequence.
        layout, hidden = self.regraft_state.layout, output.last_hidden_state[0]
        if getattr(self.config, "classifier_pooling", "cls") == "mean":
            rows = layout.means(hidden)
        else:
            rows = hidden.index_select(0, layout.starts)
        return type(output)(**{**output, "last_hidden_state": rows[:, None]})

    def _along(self, logits: Tensor, input_ids: Tensor) -> Tensor:
        """First rows' logits [B, C] at each of their sequence's tokens, where that is where logits stand."""
        if not self.joined_at_tokens:
            return logits
        if not self._packed:
            return logits[:, None].expand(-1, input_ids.shape[1], -1)
        return logits.index_select(0, owners(self.regraft_state.layout, input_ids.shape[1]))[None]

    def save_pretrained(self, folder: Path) -> None:
        """The encoder as a plain Hugging Face model, with a pooler that a head has; the heads beside it by their tasks'
        place."""
        from safetensors.torch import save_file

        self._put_pooler(next((given.pooler for given in self._given() if given.pooler is not None), None))
        self.backbone.save_pretrained(folder)
        self._put_pooler(None)
        save_file({n: p.detach().contiguous() for n, p in self.heads.state_dict().items()}, folder / HEADS_FILE)

    def _given(self) -> list[Given]:
        heads: Iterator[Any] = iter(self.heads)
        return [getattr(view, view.base_model_prefix) for view in heads]

    def _put_pooler(self, pooler: nn.Module | None) -> None:
        if hasattr(self.backbone, "pooler"):
            self.backbone.pooler = pooler


def owners(layout: Any, tokens: int) -> Tensor:
    """The sequence that each token is of, [T] int64."""
    if hasattr(layout, "pad_index"):  # a graph that is being exported is given the index
        return torch.div(layout.token_index, layout.pad_index.shape[1], rounding_mode="floor")
    lengths = layout.cu_seqlens.diff().long()
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths, output_size=tokens)


def _fresh_names(views: Sequence[Any]) -> frozenset[str]:
    """What was drawn at random, by its name here."""
    found = set()
    for number, view in enumerate(views):
        prefix = f"{view.base_model_prefix}."
        for name in getattr(view, "regraft_fresh", ()):
            if not name.startswith(prefix) or name.startswith(f"{prefix}pooler."):
                found.add(f"heads.{number}.{name}")
            elif number == 0:
                found.add(f"backbone.{name.removeprefix(prefix)}")
    return frozenset(found)


def load_heads(config: ModelConfig, several: Several) -> ManyHeads:
    """The encoder that `config` names, with a fresh head for every task. Raises ModelError."""
    from regraft.engine.pretrained import load_classifier

    for name, task in several.tasks.items():
        if task.reads == MARKED:
            raise ConfigError(f"tasks.{name}.type: {task.type} reads marked tokens, which the others have none of")
    views = [load_classifier(config, task) for task in several.tasks.values()]
    model = ManyHeads(views, [task.reads for task in several.tasks.values()])
    model.config.num_labels = 2  # the encoder's own config says nothing of any one task
    model.config.problem_type = None
    return model


def saved_weights(folder: Path) -> dict[str, Tensor]:
    """Weights of a saved model by their names in `ManyHeads`. Raises ModelError."""
    from safetensors.torch import load_file

    try:
        encoder, heads = load_file(folder / "model.safetensors"), load_file(folder / HEADS_FILE)
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{folder}: cannot be read: {error}") from None
    named = {f"backbone.{n}": value for n, value in encoder.items()}
    return named | {f"heads.{n}": value for n, value in heads.items()}


def put_heads(model: ManyHeads, folder: Path) -> None:
    """Put the saved heads of `folder` in. Raises ModelError where they do not fit."""
    saved = {n: value for n, value in saved_weights(folder).items() if n.startswith("heads.")}
    own = {n: p for n, p in model.state_dict().items() if n.startswith("heads.")}
    for name, value in own.items():
        if name not in saved or saved[name].shape != value.shape:
            raise ModelError(f"{folder / HEADS_FILE}: {name} {tuple(value.shape)} is not there in that shape")
    model.load_state_dict({n: value for n, value in saved.items() if n in own}, strict=False)


@dataclass(frozen=True)
class Pick:
    """One task's own logits among those of all: its columns, and of a head that reads first rows those rows."""

    columns: slice
    first_of_tokens: bool

    @classmethod
    def of(cls, several: Several, name: str) -> Pick:
        return cls(several.columns[name], several.reads != FIRST and several.tasks[name].reads == FIRST)

    def __call__(self, logits: Tensor, lengths: Sequence[int]) -> Tensor:
        """Shape: [B or T, sum of all C] -> [B or T, C]."""
        if self.first_of_tokens:
            ends = torch.tensor(lengths, device=logits.device).cumsum(0)
            logits = logits.index_select(0, ends - torch.tensor(lengths, device=logits.device))
        return logits[:, self.columns]


@dataclass(frozen=True, eq=False)
class JoinedScale:
    """The output scales of those heads that have one, over the logits of all (see output_scale.py)."""

    outputs: int
    scales: Sequence[tuple[int, OutputScale]]

    def __call__(self, logits: Tensor) -> Tensor:
        spread, mean = torch.ones(self.outputs), torch.zeros(self.outputs)
        for column, scale in self.scales:
            spread[column], mean[column] = scale.spread, scale.mean
        return logits.float() * spread.to(logits.device) + mean.to(logits.device)

    @contextmanager
    def folded(self) -> Iterator[None]:
        with ExitStack() as stack:
            for _, scale in self.scales:
                stack.enter_context(scale.folded())
            yield


def joined_scale(model: ManyHeads, several: Several) -> JoinedScale | None:
    """The scales of all numeric targets; None where there are none."""
    found = []
    for head, (name, task) in zip(model.heads, several.tasks.items(), strict=True):
        scale = None if task.scale is None else scale_output(head, *task.scale)
        if scale is not None:
            found.append((several.columns[name].start, scale))
    return JoinedScale(several.outputs, found) if found else None
