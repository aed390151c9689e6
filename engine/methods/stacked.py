"""Several LoRA adapters in one model: A and B of all of them stacked, and each sequence's taken out by its number.

    y_t = W x_t + b + B[a] A[a] x_t       for token t of a sequence with adapter a

Shape: A [N, r, in], B [N, out, r] with the scale in B; ranks below the largest are filled up with zeros, which changes
nothing. What trains whole (head, fresh pooler) is stacked too, [N, C, H], with zero rows for labels that an adapter lacks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regraft.engine.errors import ExportError
from regraft.engine.methods.quantise import whole_weight
from regraft.engine.methods.walk import backbone_linears, head_modules
from regraft.engine.trained import Trained

ADAPTER = "default"
STACKABLE = ("lora", "qlora", "int8")


class StackedLora(nn.Module):
    """A frozen linear layer with N low-rank updates. `per_sequence`: it is given one row a sequence, not all tokens."""

    regraft_state: Any

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor, *, per_sequence: bool) -> None:
        super().__init__()
        self.base, self.per_sequence = base, per_sequence
        self.down, self.up = nn.Parameter(down, requires_grad=False), nn.Parameter(up, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        layout, out = self.regraft_state.layout, self.base(x)
        down = self.down.index_select(0, layout.adapter).transpose(1, 2)
        up = self.up.index_select(0, layout.adapter).transpose(1, 2)
        if self.per_sequence:
            return out + torch.matmul(torch.matmul(x.reshape(-1, 1, x.shape[-1]), down), up).view(out.shape)
        # A sequence's tokens as the cells of attention, so that its matrices are read once for all of them.
        cells = x[0].index_select(0, layout.pad_index.flatten()).view(*layout.pad_index.shape, -1)
        added = torch.matmul(torch.matmul(cells, down), up).flatten(0, 1)
        return out + added.index_select(0, layout.token_index)[None]


class StackedLinear(nn.Module):
    """N linear layers, of which each sequence uses one. Shape: [B, H] or [B, 1, H] -> [B, C] or [B, 1, C]."""

    regraft_state: Any

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        adapter = self.regraft_state.layout.adapter
        out = torch.matmul(x.reshape(-1, 1, x.shape[-1]), self.weight.index_select(0, adapter).transpose(1, 2))
        if self.bias is not None:
            out = out + self.bias.index_select(0, adapter)[:, None]
        return out if x.dim() == 3 else out[:, 0]


class StackedNorm(nn.Module):
    """N layer norms, of which each sequence uses one. Shape: [B, H] or [B, 1, H], as it comes."""

    regraft_state: Any

    def __init__(self, norms: Sequence[nn.LayerNorm]) -> None:
        super().__init__()
        self.shape, self.eps = norms[0].normalized_shape, norms[0].eps
        self.weight = nn.Parameter(torch.stack([n.weight.detach() for n in norms]), requires_grad=False)
        biased = norms[0].bias is not None
        self.bias = nn.Parameter(torch.stack([n.bias.detach() for n in norms]), requires_grad=False) if biased else None

    def forward(self, x: Tensor) -> Tensor:
        adapter = self.regraft_state.layout.adapter
        out = nn.functional.layer_norm(x, self.shape, eps=self.eps)
        rows = (-1, *[1] * (x.dim() - 2), x.shape[-1])
        out = out * self.weight.index_select(0, adapter).view(rows)
        return out if self.bias is None else out + self.bias.index_select(0, adapter).view(rows)


def stacked_model(adapters: Mapping[str, Trained]) -> Any:
    """A model of the first adapter's class that holds all of them; it runs packed, and only with a layout that names an
    adapter for each sequence. Raises ExportError for what cannot be stacked."""
    from regraft.engine.config import ModelConfig
    from regraft.engine.pretrained import load_classifier

    models = [trained.running.model for trained in adapters.values()]
    first = next(iter(adapters.values()))
    _check(adapters)
    model: Any = load_classifier(ModelConfig.model_validate(first.facts["model"]), first.task)
    for path, plain in backbone_linears(model).items():
        layers = [m.get_submodule(path) for m in models]
        held = getattr(layers[0], "base_layer", layers[0])
        plain.weight.data = whole_weight(held)
        if any(hasattr(layer, "lora_A") for layer in layers):
            _put(model, path, StackedLora(plain, *_pairs(path, layers), per_sequence=".pooler" in path))
    for path in head_modules(model):
        heads = [_trained_copy(m.get_submodule(path)) for m in models]
        for inside, leaf in list(model.get_submodule(path).named_modules()):
            if next(leaf.parameters(recurse=False), None) is None:
                continue
            where = f"{path}.{inside}" if inside else path
            _put(model, where, _stack(where, [head.get_submodule(inside) for head in heads]))
    return model.eval().requires_grad_(False)


def _check(adapters: Mapping[str, Trained]) -> None:
    first = next(iter(adapters.values()))
    for name, trained in adapters.items():
        method = trained.facts["method"]
        if method not in STACKABLE:
            raise ExportError(f"{name}: method {method!r}; {', '.join(STACKABLE)} can be stacked in one graph")
        if "head" in trained.facts:
            raise ExportError(
                f"{name}: a head of ours; adapters with transformers' own heads can be stacked in one graph"
            )
        quantised = [(t.facts["method"], t.facts["quantise"]) for t in (first, trained) if t.facts["method"] != "lora"]
        if quantised and (len(quantised) < 2 or quantised[0] != quantised[1]):
            raise ExportError(
                f"{name}: method {method!r} computes with other backbone weights than {next(iter(adapters))} "
                f"({first.facts['method']!r}); adapters of one bundle are quantised alike or not at all"
            )
        if type(trained.running.model) is not type(first.running.model):
            raise ExportError(
                f"{name}: {type(trained.running.model).__name__}, {next(iter(adapters))} is a "
                f"{type(first.running.model).__name__}; one graph has one kind of head"
            )


def _pairs(path: str, layers: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """A [N, r, in] and B [N, out, r] of a layer; zeros for an adapter that leaves it alone."""
    with_lora = [layer for layer in layers if hasattr(layer, "lora_A")]
    if any(layer.lora_magnitude_vector for layer in with_lora):
        raise ExportError(f"{path}: DoRA's magnitudes are no low-rank update; export that run merged, by itself")
    rank = max(layer.lora_A[ADAPTER].weight.shape[0] for layer in with_lora)
    down = torch.zeros(len(layers), rank, with_lora[0].in_features)
    up = torch.zeros(len(layers), with_lora[0].out_features, rank)
    for number, layer in enumerate(layers):
        if hasattr(layer, "lora_A"):
            a, b = layer.lora_A[ADAPTER].weight.detach(), layer.lora_B[ADAPTER].weight.detach()
            down[number, : len(a)] = a
            up[number, :, : len(a)] = b * layer.scaling[ADAPTER]
    return down, up


def _trained_copy(module: Any) -> nn.Module:
    return module.modules_to_save[ADAPTER] if hasattr(module, "modules_to_save") else module


def _stack(where: str, leaves: Sequence[Any]) -> nn.Module:
    if all(isinstance(leaf, nn.LayerNorm) for leaf in leaves):
        return StackedNorm(leaves)
    if not all(type(leaf) is nn.Linear for leaf in leaves):
        raise ExportError(f"{where}: a {type(leaves[0]).__name__} in the head cannot be stacked")
    rows = max(leaf.out_features for leaf in leaves)
    fill = lambda x: nn.functional.pad(x.detach(), (0, 0) * (x.dim() - 1) + (0, rows - len(x)))  # noqa: E731
    biased = leaves[0].bias is not None
    return StackedLinear(
        torch.stack([fill(leaf.weight) for leaf in leaves]),
        torch.stack([fill(leaf.bias) for leaf in leaves]) if biased else None,
    )


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, last = path.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
