"""A whole head: standardise, combine the layers, a body, dropout, one linear layer to the logits of a text or of each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from regraft.engine.heads.bodies import AttentionPooling, BiLSTM, Convolutions, Perceptron
from regraft.engine.heads.combine import Concatenation, ScalarMix, Standardise
from regraft.engine.heads.settings import HeadConfig

ON_THE_SPHERE = frozenset({"centroid", "zeroshot"})  # compare directions


@dataclass(frozen=True)
class HeadShape:
    """What a head is built from. `layers` features of `hidden` a row or token; `outputs` logits; `tokens`: of each token."""

    layers: int
    hidden: int
    outputs: int
    settings: dict[str, Any]
    tokens: bool = False

    def spec(self) -> dict[str, Any]:
        """JSON for a model folder."""
        return asdict(self)


class Head(nn.Module):
    """Logits [B, C] from pooled rows [B, J, H], or from cells [B, L, J, H] with lengths [B].

    Of tokens (`gives_tokens`): [B, L, C] from cells, or [..., C] from [..., J, H] where each token is judged alone.
    """

    # As transformers' models say it: nothing in here is a backbone's, and no layer has a rate of its own.
    base_model_prefix = "backbone"
    config = SimpleNamespace(num_hidden_layers=0)

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        config = HeadConfig.model_validate(shape.settings)
        self.shape, self.kind = shape, config.type
        self.reads_tokens, self.gives_tokens = config.reads_tokens, shape.tokens
        self.standardise = Standardise(shape.layers, shape.hidden)
        several = shape.layers > 1
        if several and config.mix == "scalar":
            self.combine: nn.Module = ScalarMix(shape.layers, layer_norm=config.layer_norm, penalty=config.mix_penalty)
            width = shape.hidden
        else:
            self.combine, width = Concatenation(), shape.layers * shape.hidden
        self.body = self._body(config, width)
        self.dropout = nn.Dropout(config.dropout)
        self.logits = nn.Linear(getattr(self.body, "width", width), shape.outputs)

    @staticmethod
    def _body(config: HeadConfig, width: int) -> nn.Module | None:
        if config.type == "mlp":
            return Perceptron(width, config.hidden, config.dropout)
        if config.type == "attention":
            return AttentionPooling(width, config.hidden)
        if config.type == "bilstm":
            return BiLSTM(width, config.hidden)
        if config.type == "cnn":
            return Convolutions(width, config.hidden, config.kernels)
        return None

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.judged(self.combined(features), lengths)

    def judged(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits from combined features: pooled rows [B, H], cells [B, L, H] with lengths, or tokens [..., H]."""
        if self.reads_tokens:
            body: Any = self.body
            x = body.states(x, lengths) if self.gives_tokens else body(x, lengths)
        elif self.body is not None:
            x = self.body(x)
        return self.logits(self.dropout(x))

    def combined(self, features: Tensor) -> Tensor:
        """One vector a row or token: what a fitted head is solved on."""
        x = self.combine(self.standardise(features))
        return nn.functional.normalize(x, dim=-1) if self.kind in ON_THE_SPHERE else x

    @property
    def mix(self) -> ScalarMix | None:
        return self.combine if isinstance(self.combine, ScalarMix) else None

    def findings(self, layers: Sequence[int]) -> dict[str, Any]:
        """The learned weights of the layers, by their numbers, for the report; empty where none were mixed."""
        if self.mix is None:
            return {}
        shares = [{"layer": n, "weight": w} for n, w in zip(layers, self.mix.shares(), strict=True)]
        return {"layer_weights": {"gamma": float(self.mix.gamma.detach()), "layers": shares}}

    @torch.no_grad()
    def start_at(self, scale: tuple[float, float] | None) -> None:
        """Begin at the mean of numeric targets, with their spread; None leaves the layer as it was drawn."""
        if scale is not None:
            self.logits.bias.fill_(scale[0])
            self.logits.weight.mul_(scale[1])

    @torch.no_grad()
    def set_linear(self, weight: Tensor, bias: Tensor) -> None:
        """Put a solution into the last layer. Shape: [C, H], [C]."""
        self.logits.weight.copy_(weight)
        self.logits.bias.copy_(bias)


def build_head(config: HeadConfig, layers: int, hidden: int, outputs: int, *, tokens: bool = False) -> Head:
    return Head(HeadShape(layers, hidden, outputs, config.model_dump(mode="json"), tokens))
