"""The sections of a configuration that belong to a method, and which method takes which."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from regraft.engine.section import Section

# Methods whose result is a small folder beside the backbone; the others save a whole model.
ADAPTERS = frozenset({"lora", "qlora", "int8", "ia3", "adapter", "prompt", "prefix"})
# Those of them that work through tokens that no text has.
VIRTUAL = frozenset({"prompt", "prefix"})
# Methods that only one kind of section has a say in.
SECTIONS = {
    "lora": {"lora", "qlora", "int8"},
    "quantise": {"qlora", "int8"},
    "adapter": {"adapter"},
    "prompt": {"prompt", "prefix"},
    "unfreeze": {"full", "bitfit"},
}
Positive = Annotated[int, Field(ge=1)]


class LoraSettings(Section):
    """LoRA (Hu et al. 2021): y = W x + b + scale B A x, with A [rank, in] and B [out, rank] trained."""

    rank: Positive = 8
    alpha: float = Field(16.0, gt=0, description="scale is alpha / rank, or alpha / sqrt(rank) with rslora")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the input of A")
    rslora: bool = Field(False, description="rank-stabilised scale (Kalajdzievski 2023)")
    dora: bool = Field(False, description="weight-decomposed, a magnitude a row is trained too (Liu et al. 2024)")
    plus_ratio: float = Field(1.0, ge=1, description="LoRA+: learning rate of B over that of A (Hayou et al. 2024)")
    targets: list[str] | None = Field(
        None, min_length=1, description="ends of module paths, such as query; null: all linear layers of the backbone"
    )
    rank_pattern: dict[str, Positive] = Field({}, description="regular expression over module paths: rank there")
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field({}, description="the same for alpha")


class QuantiseSettings(Section):
    """The frozen weights under LoRA in 4 bits (QLoRA, Dettmers et al. 2023) or 8."""

    double: bool = Field(True, description="qlora: quantise the block scales too")
    compute: Literal["auto", "fp32", "bf16"] = Field("auto", description="qlora: what products run in")


class AdapterSettings(Section):
    """Bottleneck adapters: h + up(f(down(h))), after Houlsby et al. 2019 or Pfeiffer et al. 2021."""

    kind: Literal["houlsby", "pfeiffer"] = Field(
        "houlsby", description="houlsby: after attention and feed-forward; pfeiffer: after feed-forward alone"
    )
    reduction: int | None = Field(None, ge=1, description="hidden size over bottleneck size; null: by size")
    size: int | None = Field(None, ge=1, description="bottleneck size; null and no reduction: 64")
    nonlinearity: Literal["relu", "gelu", "tanh", "silu", "identity"] = "gelu"
    dropout: float = Field(0.0, ge=0, lt=1)


class PromptSettings(Section):
    """Virtual tokens: trained vectors before each text (prompt), or trained keys and values in each layer (prefix)."""

    tokens: Positive = 16
    start: Literal["words", "random"] = Field(
        "words", description="prompt: vectors of words drawn at random, or numbers of their spread"
    )
    spread: float = Field(0.1, gt=0, description="prefix: standard deviation of keys and values at the start")


class UnfreezeSettings(Section):
    """Which layers train, and from when (Howard and Ruder 2018)."""

    last_layers: int | None = Field(None, ge=0, description="only the last k layers and the head; null: all layers")
    gradual: bool = Field(False, description="head first, then one more layer from the top at a time")
    every: int | Literal["epoch"] = Field("epoch", description="gradual: optimizer steps, or epoch, between layers")

    @model_validator(mode="after")
    def _every_some_steps(self) -> UnfreezeSettings:
        if isinstance(self.every, int) and self.every < 1:
            raise ValueError("every: must be at least 1")
        return self


def libraries(method: str, optimizer: str) -> tuple[str, ...]:
    """Packages beyond the usual ones whose versions decide a run's numbers."""
    quantised = method == "qlora" or optimizer != "adamw"
    return (*(("peft",) if method in ADAPTERS - {"adapter"} else ()), *(("bitsandbytes",) if quantised else ()))
