"""A frozen encoder that gives its layers' hidden states, pooled or one a token, and perhaps a head's logits.

`GraftedEncoder` looks to `RunningModel` like a transformers model, so it runs packed, is proven so, and exports through
the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import ModelOutput

from regraft.engine.errors import ModelError
from regraft.engine.models import AroundBackbone

if TYPE_CHECKING:
    from pathlib import Path


class GraftedEncoder(AroundBackbone):
    """An encoder cut off above the highest layer asked for, and a head over what it gives.

    `head` takes pooled rows [B, J, H], or for pooling 'none' cells [B, L, J, H] with `lengths` [B]; one that judges tokens
    gives logits [1, T, C] packed, [B, L, C] padded. Without one the features themselves come out: [B, J * H], or
    [T, J * H].
    """

    keeps_all_rows = True  # RunningModel hands on every token, not the first of each sequence

    def __init__(
        self,
        backbone: nn.Module,
        layers: Sequence[int],
        pooling: str,
        *,
        normalise: bool = False,
        head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.layers, self.pooling, self.normalise = tuple(layers), pooling, normalise
        self.head = head
        self.bare = head is None  # features come out, whether there is a head or not
        self._seen: list[Tensor] = []
        # What comes out last is read where it comes out; lower layers where they pass.
        self._last_alone = self.depth > 0 and self.layers == (self.depth,)
        self._hooked = not self._last_alone and self._hook()

    def forward(self, **inputs: Tensor) -> ModelOutput:
        """As transformers' models: an output with `logits`."""
        hidden, mask = self.hidden(inputs), inputs.get("attention_mask")
        head = None if self.bare else self.head
        return SequenceClassifierOutput(logits=self.headed(head, hidden, mask, self.pooling, self.normalise))

    def headed(
        self, head: nn.Module | None, hidden: Tensor, mask: Tensor | None, pooling: str, normalise: bool
    ) -> Tensor:
        """A head's logits [B, C] over hidden states [1, T, J, H] or, with a mask [B, L], [B, L, J, H]; without a head
        the features themselves."""
        with _full_precision(hidden.device.type):
            if pooling == "none":
                return self._tokens(head, hidden, mask)
            rows = self._pooled(hidden, mask, pooling)
            if normalise:
                rows = nn.functional.normalize(rows, dim=-1)
            return rows.flatten(1) if head is None else head(rows)

    def hidden(self, inputs: dict[str, Tensor]) -> Tensor:
        """Hidden states of the chosen layers. Shape: [1, T, J, H] packed, [B, L, J, H] padded."""
        if self._last_alone:
            return self.backbone(**inputs).last_hidden_state[:, :, None].float()
        self._seen.clear()
        if self._hooked:
            output = self.backbone(**inputs)
            states = [*self._seen]
            if self.layers[-1] == self.depth:
                states[-1] = output.last_hidden_state  # after a final norm, where the model has one
        else:
            states = list(self.backbone(**inputs, output_hidden_states=True).hidden_states)
        self._seen.clear()
        return torch.stack([states[n] for n in self.layers], dim=2).float()

    @property
    def depth(self) -> int:
        return int(self.backbone.config.num_hidden_layers)

    def _pooled(self, hidden: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
        if mask is None:
            layout = self.regraft_state.layout
            rows = hidden[0]
            if pooling == "first":
                return rows.index_select(0, layout.starts)
            if pooling == "mean":
                return layout.means(rows.flatten(1)).unflatten(1, rows.shape[1:])
            if not hasattr(layout, "pad_index"):  # not a graph that is being exported
                from regraft.kernels.pooling import segment_pool  # brings Triton along

                return segment_pool(rows.flatten(1), layout.cu_seqlens, "max").unflatten(1, rows.shape[1:])
            cells, lengths = to_cells(rows, layout)
        elif pooling == "first":
            return hidden[:, 0]
        else:
            cells, lengths = hidden, mask.sum(dim=1)
        inside = inside_of(cells, lengths)[..., None, None]
        if pooling == "max":
            return torch.where(inside, cells, -torch.inf).amax(dim=1)
        return (cells * inside).sum(dim=1) / lengths[:, None, None].to(cells.dtype)

    def _tokens(self, head: nn.Module | None, hidden: Tensor, mask: Tensor | None) -> Tensor:
        if head is None:
            rows = hidden[0] if mask is None else hidden[mask.bool()]
            return rows.flatten(1)
        some: Any = head
        x = some.combined(hidden)
        if not some.reads_tokens:
            return some.judged(x)  # each token alone
        if mask is not None:
            return some.judged(x, mask.sum(dim=1))
        layout = self.regraft_state.layout
        logits = some.judged(*to_cells(x[0], layout))
        return to_rows(logits, layout)[None] if some.gives_tokens else logits

    def _hook(self) -> bool:
        # Where the layers stand in one list: its first layer's input is layer 0, each output the next one.
        found = _layer_list(self.backbone)
        if found is None:
            return False
        owner, name, layers = found
        top = max(self.layers[-1], 1)
        if top < len(layers):
            layers = layers[:top]
            setattr(owner, name, layers)
        layers[0].register_forward_pre_hook(self._see_input, with_kwargs=True)
        for layer in layers:
            layer.register_forward_hook(self._see_output)
        return True

    def _see_input(self, module: nn.Module, positional: Any, named: Any) -> None:
        self._seen.append(positional[0] if positional else named["hidden_states"])

    def _see_output(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._seen.append(output if isinstance(output, Tensor) else output[0])


def _full_precision(device: str) -> AbstractContextManager:
    # Recurrence and softmax in bf16 lose more than they gain; an exported graph has no such context.
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def to_cells(rows: Tensor, layout: Any) -> tuple[Tensor, Tensor]:
    """Rows [T, ...] of a packed batch as cells [B, L, ...] (padding cells repeat a row) and lengths [B]."""
    if hasattr(layout, "pad_index"):  # a graph that is being exported is given the index
        index, lengths = layout.pad_index, layout.lengths
    else:
        lengths = layout.cu_seqlens.long().diff()
        at = torch.arange(_longest(layout), device=rows.device)
        index = torch.where(at[None] < lengths[:, None], layout.starts[:, None] + at[None], 0)
    cells = rows.index_select(0, index.flatten())
    return cells.view(*index.shape, *rows.shape[1:]), lengths


def to_rows(cells: Tensor, layout: Any) -> Tensor:
    """Cells [B, L, ...] of a packed batch as its rows again, [T, ...]."""
    if hasattr(layout, "pad_index"):
        index = layout.token_index
    else:
        starts, lengths = layout.starts, layout.cu_seqlens.long().diff()
        sequence = torch.arange(len(lengths), device=cells.device)
        owner = torch.repeat_interleave(sequence, lengths, output_size=layout.tokens)
        index = owner * cells.shape[1] + torch.arange(layout.tokens, device=cells.device) - starts[owner]
    return cells.flatten(0, 1).index_select(0, index)


def _longest(layout: Any) -> int:
    # Known on the host by either kind of layout: asking the device would hold it up.
    return int(layout.longest if hasattr(layout, "longest") else max(layout.lengths))


def inside_of(cells: Tensor, lengths: Tensor) -> Tensor:
    """Which cells [B, L, ...] hold a token, [B, L] bool."""
    return torch.arange(cells.shape[1], device=cells.device)[None] < lengths[:, None]


def _layer_list(backbone: Any) -> tuple[nn.Module, str, nn.ModuleList] | None:
    depth = getattr(backbone.config, "num_hidden_layers", None)
    for owner in backbone.modules():
        for name, child in owner.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == depth and hasattr(child[-1], "forward"):
                return owner, name, child
    return None


def load_backbone(folder: Path) -> Any:
    """The bare encoder in fp32. Raises ModelError."""
    from transformers import AutoModel
    from transformers.utils import logging

    from regraft.engine.pretrained import explain

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = AutoModel.from_pretrained(folder, dtype="float32")
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(explain(str(folder), error)) from None
    return model.requires_grad_(False).eval()
