"""The `model` section of a configuration: which encoder, how it runs, and what is made of it before training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from regraft.engine.section import Section

# YAML reads a bare `off` as false.
AutoOrOff = Annotated[Literal["auto", "off"], BeforeValidator(lambda value: "off" if value is False else value)]


class ModelConfig(Section):
    """The pretrained encoder, or the architecture of one to be trained from nothing."""

    name: str = Field(description="folder, name on the Hugging Face hub, or another run's folder")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    config: dict[str, Any] | None = Field(
        None,
        description="keys of the architecture over those of `name`; given, even as {}, weights are drawn at random by "
        "training.seed, and `name` may be a folder that holds a tokenizer alone",
    )
    new_words: int | list[str] | None = Field(
        None,
        description="words that become tokens of their own, or how many: the commonest of the training texts that the "
        "tokenizer cuts into pieces; each starts as the mean of its pieces",
    )
    max_length: int | None = Field(
        None, ge=3, description="tokens kept of a text or pair; null: what the model takes, at most 512"
    )
    packing: AutoOrOff = Field("auto", description="run without pad tokens where the model is proven to allow it")
    kernels: AutoOrOff = Field("auto", description="off: plain transformers modules, for comparison")
    dropout: float | None = Field(None, ge=0, lt=1, description="null: the model's own")

    def check(self, method: str) -> None:
        """Refuse words that are none, and a method that would leave weights at random or unsaved. Raises ValueError."""
        if isinstance(self.new_words, int) and self.new_words < 1:
            raise ValueError("model.new_words: must be at least 1")
        for word in self.new_words if isinstance(self.new_words, list) else ():
            if len(word.split()) != 1 or word != word.strip():
                raise ValueError(f"model.new_words: {word!r} is not one word")
        if method == "full":
            return
        if self.config is not None:
            raise ValueError(
                f"model.config: weights drawn at random are of no use to method: {method}; set method: full"
            )
        if self.new_words is not None:
            raise ValueError(f"model.new_words: method: {method} does not train and save the embedding of new words")
