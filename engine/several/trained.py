"""A trained folder with many heads: loaded whole, or seen as one of its tasks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from regraft.engine.config import DataConfig, ModelConfig
from regraft.engine.errors import ConfigError
from regraft.engine.several.data import data_of
from regraft.engine.several.model import Pick, load_heads, put_heads
from regraft.engine.tasks import task_from_spec
from regraft.engine.tasks.several import Several
from regraft.engine.trained import Trained

if TYPE_CHECKING:
    from regraft.engine.packing import PackedBatch


def load_many(folder: Path, facts: dict[str, Any], *, packing: str, device: str | None) -> Trained:
    """Encoder and heads as one model that answers for every task. Raises ModelError."""
    from regraft.engine.data.fast_tokenizer import load_fast_tokenizer
    from regraft.engine.methods.adapt import Adaptation
    from regraft.engine.models import ready_to_answer

    several = task_from_spec(facts["task"])
    assert isinstance(several, Several)
    tokenizer = load_fast_tokenizer(str(folder))
    model = load_heads(ModelConfig(name=str(folder)), several)
    put_heads(model, folder)
    running = ready_to_answer(
        model, tokenizer.pad_token_id, reads=several.reads, packing=packing, kernels=packing, device=device
    )
    data = DataConfig.model_validate(facts["data"])
    adaptation = Adaptation(facts["method"], model)
    return Trained(folder, several, tokenizer, facts["max_length"], data, facts, running, adaptation)


class OneHead(nn.Module):
    """A running model with many heads, giving the logits of one."""

    def __init__(self, running: nn.Module, several: Several, name: str) -> None:
        super().__init__()
        self.running = running
        self.reads = several.tasks[name].reads
        self.pick = Pick.of(several, name)

    def forward(self, batch: PackedBatch) -> Tensor:
        return self.pick(self.running(batch), batch.lengths)


def as_task(trained: Trained, name: str) -> Trained:
    """The model as one of its tasks. Raises ConfigError."""
    several = trained.task
    if not isinstance(several, Several):
        raise ConfigError(f"--task {name}: {trained.folder} has one task ({several.type}); leave --task out")
    try:
        task = several.named(name)
    except ConfigError as error:
        raise ConfigError(f"--task {name}: {error}") from None
    one: Any = OneHead(trained.running, several, name).eval()
    return replace(trained, task=task, data=data_of(trained, name), running=one)
