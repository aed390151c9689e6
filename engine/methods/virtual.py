"""Virtual tokens through peft: trained vectors before each text (`prompt`, Lester et al. 2021), or trained keys and values
in every layer (`prefix`, Li and Liang 2021).

A prompt's vectors are k more rows of the word embedding, under the ids after the last word's: a text with k ids before it
runs packed, padded and in a graph like any other. A prefix adds no rows, only what attention may look at. What is saved
is peft's folder, and plain peft answers the same: a prompt's first vector is what a head reads that takes `[:, 0]`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regraft.engine.errors import ModelError
from regraft.engine.packing import PackedBatch

if TYPE_CHECKING:
    from regraft.engine.methods.settings import PromptSettings

ADAPTER = "default"


class PromptedEmbedding(nn.Module):
    """A word embedding [V, E] with the rows of a prompt [k, E] behind it. Shape: ids [..], below V + k -> [.., E]."""

    def __init__(self, table: nn.Embedding, prompt: nn.Embedding) -> None:
        super().__init__()
        self.table, self.prompt = table, prompt

    @property
    def weight(self) -> Tensor:
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        place = ids - self.table.num_embeddings
        words = self.table(ids.clamp(max=self.table.num_embeddings - 1))
        return torch.where((place >= 0)[..., None], self.prompt(place.clamp(min=0)), words)


@dataclass(frozen=True)
class Prompt:
    """`count` ids from `first` on stand before every sequence."""

    first: int
    count: int

    def before(self, batch: PackedBatch) -> tuple[PackedBatch, Tensor]:
        """The batch with the prompt before each sequence, and the rows [T] of its own tokens there."""
        device, k = batch.input_ids.device, self.count
        lengths = torch.tensor(batch.lengths, device=device)
        numbers = torch.arange(batch.sequences, device=device)
        rows = torch.arange(batch.tokens, device=device) + k * (1 + torch.repeat_interleave(numbers, lengths))
        starts = batch.cu_seqlens[:-1].long()
        added = ((starts + k * numbers)[:, None] + torch.arange(k, device=device)).flatten()
        size = batch.tokens + k * batch.sequences

        def joined(own: Tensor, virtual: Tensor) -> Tensor:
            return own.new_zeros(size).index_copy(0, rows, own).index_copy(0, added, virtual)

        each = torch.arange(k, device=device)
        positions = (batch.position_ids.index_select(0, starts)[:, None] + each).flatten()
        types = batch.token_type_ids
        longer = replace(
            batch,
            input_ids=joined(batch.input_ids, (self.first + each).repeat(batch.sequences)),
            position_ids=joined(batch.position_ids + k, positions),
            cu_seqlens=batch.cu_seqlens + k * torch.arange(batch.sequences + 1, dtype=torch.int32, device=device),
            lengths=tuple(n + k for n in batch.lengths),
            token_type_ids=None if types is None else joined(types, types.new_zeros(len(added))),
            marks=None if batch.marks is None else rows.index_select(0, batch.marks),
        )
        return longer, rows


@dataclass(frozen=True, eq=False)
class Prefix:
    """`table.weight` [k, layers * 2 * H * D]: keys and values of every layer that all tokens of a text attend to."""

    table: nn.Embedding
    layers: int
    heads: int

    @property
    def count(self) -> int:
        return self.table.num_embeddings

    def of_layer(self, number: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [k, H, D] each."""
        both = self.table.weight.view(self.count, self.layers, 2, self.heads, -1)[:, number]
        return both[:, 0], both[:, 1]

    def cache(self, batch: int) -> Any:
        """The same for transformers' padded forward, each [B, H, k, D]."""
        from transformers import DynamicCache

        whole = self.table.weight.view(self.count, self.layers, 2, self.heads, -1).permute(1, 2, 3, 0, 4)
        return DynamicCache(tuple(layer[:, None].expand(-1, batch, -1, -1, -1) for layer in whole))


@dataclass(frozen=True, eq=False)
class PrefixedState:
    """What an attention module of one layer sees of the running batch: the shared state's, after its own prefix."""

    shared: Any
    prefix: Prefix
    layer: int

    @property
    def layout(self) -> PrefixedLayout:
        return PrefixedLayout(self.shared.layout, *self.prefix.of_layer(self.layer))


@dataclass(frozen=True, eq=False)
class PrefixedLayout:
    """A layout whose attention also looks at `keys` and `values` [k, H, D]."""

    inner: Any
    keys: Tensor
    values: Tensor

    @property
    def starts(self) -> Tensor:
        return self.inner.starts

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout_p: float, window: int | None) -> Tensor:
        if window is not None:
            raise NotImplementedError("a prefix in a layer with a window")
        return self.inner.attend_after(self.keys, self.values, q, k, v, scale=scale, dropout_p=dropout_p)

    def attend_merged(self, qkv: Tensor, *, scale: float, dropout_p: float) -> Tensor:
        return self.attend(*qkv.unbind(1), scale=scale, dropout_p=dropout_p, window=None)

    def attend_first(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout_p: float) -> Tensor:
        return self.inner.attend_after(self.keys, self.values, q, k, v, scale=scale, dropout_p=dropout_p, first=True)


def virtual_tokens(model: Any) -> Prompt | Prefix | None:
    """What `put_virtual_tokens` put into the model."""
    return getattr(model, "regraft_virtual", None)


def with_virtual_tokens(model: Any, method: str, settings: PromptSettings) -> Any:
    """peft's model around `model`, which carries the virtual tokens too. Raises ModelError where it cannot take them."""
    from peft import PrefixTuningConfig, PromptTuningConfig

    from regraft.engine.methods.adapt import peft_options, wrap

    options = peft_options(model) | {
        "num_virtual_tokens": settings.tokens,
        "num_transformer_submodules": 1,
        "num_layers": model.config.num_hidden_layers,
        "num_attention_heads": model.config.num_attention_heads,
    }
    if method == "prompt":
        start = {"words": "SAMPLE_VOCAB", "random": "RANDOM"}[settings.start]
        size = model.get_input_embeddings().embedding_dim
        wrapped = wrap(model, PromptTuningConfig(prompt_tuning_init=start, token_dim=size, **options))
        if settings.start == "random":
            table = model.get_input_embeddings().weight
            nn.init.normal_(wrapped.prompt_encoder[ADAPTER].embedding.weight, std=float(table.detach().std()))
    else:
        if "past_key_values" not in inspect.signature(model.base_model.forward).parameters:
            raise ModelError(
                f"method: prefix: {type(model).__name__} has no way to take keys and values from outside; "
                "use method: prompt or lora"
            )
        wrapped = wrap(model, PrefixTuningConfig(token_dim=model.config.hidden_size, **options))
        nn.init.normal_(wrapped.prompt_encoder[ADAPTER].embedding.weight, std=settings.spread)
    put_virtual_tokens(model, wrapped)
    return wrapped


def put_virtual_tokens(model: Any, wrapped: Any) -> None:
    """Let `model` itself hold what peft's model around it holds: a prompt behind its words, a prefix in its backbone."""
    trained = wrapped.prompt_encoder[ADAPTER].embedding
    config = wrapped.peft_config[ADAPTER]
    if config.peft_type == "PROMPT_TUNING":
        table = model.get_input_embeddings()
        model.set_input_embeddings(PromptedEmbedding(table, trained))
        model.regraft_virtual = Prompt(table.num_embeddings, config.num_virtual_tokens)
    else:
        model.base_model.virtual_tokens = trained
        model.regraft_virtual = Prefix(trained, config.num_layers, config.num_attention_heads)
