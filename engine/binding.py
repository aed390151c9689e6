"""Other forwards bound on instances of modules, by their form, and kept only where the logits stay the same."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from regraft.engine.models import RunningModel

PROOF_TOLERANCE = 1e-4
SHORT = (torch.bfloat16, torch.float16)
_log = logging.getLogger("regraft.kernels")
Kinds = dict[str, tuple[Callable[[Any], bool], Callable[..., Any]]]


def bind_kinds(running: RunningModel, kinds: Kinds) -> dict[str, int]:
    """Bind each kind's forward where a module is built alike and the logits stay the same; how many of each were."""
    batch = small_batch(running)
    before: Any = None
    bound = {}
    for name, (built_alike, forward) in kinds.items():
        found = [m for m in running.model.modules() if "forward" not in vars(m) and built_alike(m)]
        if found and before is None:
            before = logits_of_small(running, batch)
        for module in found:
            module.forward = forward.__get__(module)
        kept = not found or stays_same(running, batch, before, name)
        if not kept:
            for module in found:
                del module.forward
        bound[name] = len(found) if kept else 0
    return bound


def stays_same(running: RunningModel, batch: Any, before: Any, what: str) -> bool:
    """Whether the model gives the logits `before` with `what` bound; the log says why not."""
    try:
        if same(logits_of_small(running, batch), before):
            return True
        _log.warning("%s stays as it was: the logits are others with it", what)
    except Exception as error:  # a module of like parts that is called in another way, a kernel that cannot run
        text = str(error).strip().splitlines()
        _log.warning("%s stays as it was: %s: %s", what, type(error).__name__, text[0][:160] if text else "")
    return False


def same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, tuple):  # of tokens and of pairs
        return all(same(one, other) for one, other in zip(found, wanted, strict=True))
    return torch.allclose(found.float(), wanted.float(), rtol=PROOF_TOLERANCE, atol=PROOF_TOLERANCE)


def small_batch(running: RunningModel) -> Any:
    from regraft.engine.packing import pack

    generator = torch.Generator().manual_seed(11)
    config = running.model.config
    vocabulary = config.vocab_size
    window = getattr(config, "sliding_window", None) or getattr(config, "local_attention", None) or 0
    longest = min(getattr(config, "max_position_embeddings", 512) - 4, 2 * window + 9)  # longer than a window
    lengths = (5, 1, 17, 17, max(9, longest))
    ids = [torch.randint(min(10, vocabulary - 1), vocabulary, (n,), generator=generator).numpy() for n in lengths]
    return pack(ids).to(next(running.parameters()).device)


@contextmanager
def in_full_precision(model: nn.Module) -> Iterator[None]:
    """Within, layers that round to 16 bits by themselves, as bitsandbytes' do over weights in 4 bits, work in fp32: two ways of
    computing the same differ by less there than by a mistake."""
    rounding: list[Any] = [m for m in model.modules() if getattr(m, "compute_dtype", None) in SHORT]
    before = [module.compute_dtype for module in rounding]
    for module in rounding:
        module.compute_dtype = torch.float32
    try:
        yield
    finally:
        for module, dtype in zip(rounding, before, strict=True):
            module.compute_dtype = dtype


@torch.no_grad()
def logits_of_small(running: RunningModel, batch: Any) -> Tensor:
    was_training = running.training
    running.eval()
    try:
        with in_full_precision(running.model):
            return running(batch)
    finally:
        running.train(was_training)


def is_output(module: Any) -> bool:
    # BertSelfOutput, BertOutput and their kin: LayerNorm(dropout(dense(x)) + residual)
    parts = [type(getattr(module, name, None)) for name in ("LayerNorm", "dropout")]
    return parts == [nn.LayerNorm, nn.Dropout] and isinstance(getattr(module, "dense", None), nn.Module) and not any(
        hasattr(module, name) for name in ("query", "word_embeddings")
    )  # fmt: skip


def is_exact_gelu(act: Any) -> bool:
    # The exact GELU alone: its class in transformers, or torch's without approximation
    return type(act).__name__ == "GELUActivation" or (type(act) is nn.GELU and act.approximate == "none")


def is_intermediate(module: Any) -> bool:
    exact = is_exact_gelu(getattr(module, "intermediate_act_fn", None))
    return exact and type(getattr(module, "dense", None)) is nn.Linear
