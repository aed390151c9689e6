"""The keys of `training:` that say how fast and on what a run is learned: they change no result beyond rounding."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from regraft.engine.section import Section

# Methods whose weights can be shared out among processes.
SHARDABLE = frozenset({"full", "bitfit", "lora", "ia3", "adapter"})
QUANTISED = frozenset({"qlora", "int8"})


class MachineSettings(Section):
    """Memory, precision, processes."""

    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = Field(
        "adamw", description="8bit: moments in 8 bits (bitsandbytes); paged: moved to the host when a GPU is full"
    )
    offload_optimizer: bool = Field(
        False, description="GPU runs: moments in the host's memory, and the update is computed there"
    )
    gradient_checkpointing: bool = Field(False, description="keep one activation a layer, compute the others again")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    token_budget: int | Literal["auto"] = Field("auto", description="most tokens in one micro-batch")
    sharding: Literal["none", "full", "hybrid", "zero1", "zero2", "zero3"] = Field(
        "none",
        description="several processes: full: weights, gradients and moments shared out among all of them (FSDP2); "
        "hybrid: among those of one machine; zero1 to zero3: by DeepSpeed",
    )
    timeout: float = Field(
        1800, gt=0, description="seconds that processes wait for one of them before the run ends and names it"
    )
    checkpoint_every: int | None = Field(None, ge=1, description="optimizer steps; null: about once a minute")
    threads: int | None = Field(None, ge=1, description="CPU threads; null: the machine's share")
    steps: Literal["auto", "graphs", "compiled", "eager"] = Field(
        "auto", description="on a GPU: what a trial finds fastest, CUDA graphs, torch.compile or kernel by kernel"
    )

    @model_validator(mode="after")
    def _fits_the_machine(self) -> MachineSettings:
        if isinstance(self.token_budget, int) and self.token_budget < 16:
            raise ValueError("token_budget: must be at least 16 tokens")
        if self.optimizer != "adamw" and self.sharding != "none":
            raise ValueError(
                f"optimizer: {self.optimizer} keeps its moments in blocks that cannot be put together again from "
                f"shards; use optimizer: adamw with sharding: {self.sharding}"
            )
        if self.optimizer != "adamw" and self.offload_optimizer:
            raise ValueError(
                f"offload_optimizer: {self.optimizer} has its own ways to save memory; use optimizer: adamw"
            )
        if self.precision == "fp16" and self.sharding != "none":
            raise ValueError(
                f"precision: fp16 scales its loss, which shards do not do alike; with sharding: "
                f"{self.sharding} use bf16 or fp32"
            )
        return self


def check_machine(method: str, training: Any) -> None:
    """Raises ValueError where the method cannot be run as the machine's keys say."""
    if training.ema is not None and training.sharding.startswith("zero"):
        raise ValueError("training.ema: DeepSpeed keeps the weights to itself; use sharding: full, or remove it")
    if training.offload_optimizer and method not in SHARDABLE | QUANTISED:
        raise ValueError(f"training.offload_optimizer: method: {method} has moments for a small head alone; remove it")
    if training.sharding == "none" or method in SHARDABLE:
        return
    why = (
        "keeps its weights in blocks of fewer bits, which are not cut apart"
        if method in QUANTISED
        else "is not shared out"
    )
    raise ValueError(
        f"training.sharding: method: {method} {why}; use method: {' or '.join(sorted(SHARDABLE))}, or sharding: none"
    )
