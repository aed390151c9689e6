"""What a model is made of, found by walking it: the head, the backbone's linear layers, where its sublayers end."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from regraft.engine.errors import ModelError, nearest

_ATTENTION_ENDS = ("dense", "out_lin", "o_proj", "Wo", "o", "out_proj")
_KEYS_AND_VALUES = ("key", "value", "k_lin", "v_lin", "k_proj", "v_proj", "key_proj", "value_proj", "k", "v", "Wqkv")


def backbone_prefix(model: Any) -> str:
    """Path of the backbone inside the model, with its dot."""
    return f"{model.base_model_prefix}."


def head_modules(model: Any) -> list[str]:
    """Full paths of the modules that train whole and are saved whole, whatever the method: those of the head, and what
    inside the backbone was drawn at random because its checkpoint has none (a pooler)."""
    backbone = model.base_model_prefix
    found = [n for n, m in model.named_children() if n != backbone and any(True for _ in m.parameters())]
    fresh = {n.rpartition(".")[0] for n in getattr(model, "regraft_fresh", ()) if n.startswith(f"{backbone}.")}
    return found + sorted(n for n in fresh if n)


def head_parameters(model: Any) -> set[str]:
    """Names of the parameters in `head_modules`, and of those that hang on the model itself."""
    inside = tuple(f"{m}." for m in head_modules(model))
    return {n for n, _ in model.named_parameters() if n.startswith(inside) or "." not in n}


def backbone_linears(model: Any) -> dict[str, nn.Linear]:
    """All linear layers of the backbone by full path; never the head, never a fresh pooler.

    Raises ModelError where there is none.
    """
    prefix, head = backbone_prefix(model), tuple(f"{m}." for m in head_modules(model))
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(prefix) and not f"{name}.".startswith(head)
    }
    if not found:
        raise ModelError(
            f"method: {type(model).__name__} has no linear layers in its backbone to adapt; use method: full"
        )
    return found


def chosen_linears(model: Any, wanted: list[str] | None) -> list[str]:
    """Full paths of the backbone's linear layers whose paths end like one of `wanted`; None: all of them.

    Raises ModelError for an entry that matches nothing.
    """
    linears = backbone_linears(model)
    if wanted is None:
        return list(linears)
    chosen: list[str] = []
    for end in wanted:
        matching = [n for n in linears if n == end or n.endswith(f".{end}")]
        if not matching:
            ends = sorted({n.rpartition(".")[2] for n in linears})
            raise ModelError(
                f"lora.targets: no linear layer of the backbone ends in {end!r}{nearest(end, ends)}; there are {', '.join(ends)}"
            )
        chosen += [n for n in matching if n not in chosen]
    return chosen


def check_patterns(key: str, patterns: dict[str, Any], names: list[str]) -> None:
    """Raise ModelError for a pattern that is no regular expression or matches no path, by peft's way of matching."""
    for pattern in patterns:
        try:
            hit = any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)
        except re.error as error:
            raise ModelError(f"{key}: {pattern!r} is not a regular expression: {error}") from None
        if not hit:
            raise ModelError(f"{key}: {pattern!r} matches none of the {len(names)} layers, such as {names[0]}")


def inner_size(config: Any) -> int:
    """Width of the feed-forward layers."""
    size: Any = getattr(config, "intermediate_size", None) or getattr(config, "hidden_dim", 0)
    return size


def feed_forward_ends(model: Any) -> list[str]:
    """The linear layers that end a feed-forward sublayer (the wide to narrow ones)."""
    inner = inner_size(model.config)
    return [n for n, m in backbone_linears(model).items() if m.in_features == inner and m.out_features < inner]


def attention_ends(model: Any) -> list[str]:
    """The linear layers that end an attention sublayer."""
    inner = inner_size(model.config)
    found = []
    for name, module in backbone_linears(model).items():
        path, _, last = name.rpartition(".")
        at_end = last in _ATTENTION_ENDS and "att" in path and ".self." not in f".{path}."
        if at_end and module.in_features != inner:
            found.append(name)
    return found


def keys_and_values(model: Any) -> list[str]:
    """The projections to keys and values (or to all of queries, keys and values, where they are one)."""
    return [n for n in backbone_linears(model) if n.rpartition(".")[2] in _KEYS_AND_VALUES]


def layer_of(name: str) -> int | None:
    """Number of the layer a path lies in, None outside the layers."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found.group(1)) if found else None
