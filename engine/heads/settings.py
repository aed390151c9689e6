"""The sections of a configuration for what is trained on features or words instead of in the encoder."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from regraft.engine.section import Section

Fraction = Annotated[float, Field(ge=0, lt=1)]


class FeaturesConfig(Section):
    """Which hidden states of the frozen encoder are kept, and how (method: frozen, `regraft features`)."""

    layers: Literal["last", "last4", "all", "embeddings"] | int | list[int] = Field(
        "last", description="0 is the embedding layer; negative numbers count from the last"
    )
    pooling: Literal["auto", "mean", "first", "max", "none"] = Field(
        "auto", description="none: every token is kept; auto: what the head reads"
    )
    normalise: bool = Field(False, description="pooled rows to length 1, as sentence encoders are compared")
    precision: Literal["fp32", "bf16", "fp16", "int8"] = Field("fp32", description="int8: with a scale for each row")
    store: str | None = Field(None, description="folder of stores; null: features in the cache folder")
    limit_gb: float | None = Field(None, gt=0, description="least recently used shards are deleted beyond this")


SOLVED = frozenset({"logistic", "svm", "centroid", "zeroshot"})  # at once, then they are linear
TOKEN_HEADS = frozenset({"attention", "bilstm", "cnn"})


class HeadConfig(Section):
    """What is trained on the features."""

    type: Literal["linear", "mlp", "attention", "bilstm", "cnn", "logistic", "svm", "centroid", "zeroshot"] = "linear"
    mix: Literal["scalar", "concat"] = Field("scalar", description="how several layers become one vector")
    layer_norm: bool = Field(False, description="scalar mix: normalise each layer first")
    mix_penalty: float = Field(0.0, ge=0, description="scalar mix: lambda of ELMo's lambda * |w|^2")
    hidden: int = Field(256, ge=1, description="units of mlp, attention and each direction of bilstm; filters of cnn")
    kernels: list[Annotated[int, Field(ge=1)]] = Field(
        [3, 4, 5], min_length=1, description="cnn: tokens each filter spans"
    )
    dropout: Fraction = 0.1
    c: float = Field(1.0, gt=0, description="logistic, svm: inverse strength of regularisation")
    descriptions: dict[str, str] = Field({}, description="zeroshot: what a label means, in words; default: its name")

    @property
    def reads_tokens(self) -> bool:
        return self.type in TOKEN_HEADS


class WordsConfig(Section):
    """Static word vectors (method: vectors), or an embedding learned from nothing (method: scratch)."""

    vectors: str | None = Field(None, description="GloVe or word2vec text, word2vec .bin, fastText .vec, .npz, .json")
    vocabulary: str | None = Field(None, description=".npz: JSON of word to row; null: vocab.json beside it")
    trained: bool = Field(False, description="vectors: go on training them")
    unit: Literal["auto", "word", "mixed", "character", "longest"] = Field(
        "auto",
        description="mixed: words, and Chinese characters one by one; longest: the longest words of the vocabulary, from the "
        "left, as for Chinese words",
    )
    dimension: int = Field(100, ge=1, description="scratch: width of the embedding")
    min_count: int = Field(2, ge=1, description="scratch: words seen less often in training are unknown")
    ngrams: int | None = Field(
        None, ge=1, le=3, description="tfidf, onehot: longest run that is counted; null: 2 words, or 3 characters"
    )
    max_words: int = Field(50_000, ge=10, description="largest vocabulary")


WORD_METHODS = ("vectors", "scratch")
BAG_METHODS = ("tfidf", "onehot")
# Heads of ours that take the place of transformers' own, trained end to end with the encoder, and by which methods.
LIVE_HEADS = frozenset({"mlp", "attention", "bilstm", "cnn"})
LIVE_METHODS = ("full", "bitfit", "lora", "qlora", "int8", "ia3", "adapter")
# What sections are set to, where the run does not say: there is no pretrained encoder to be careful with, or its weights stay
# and few new ones have all to learn.
DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    **{method: {"training": {"learning_rate": 1e-3}} for method in ("lora", "qlora", "int8", "adapter", "bitfit")},
    "ia3": {"training": {"learning_rate": 1e-2}},
    "prompt": {"training": {"learning_rate": 3e-2}},
    "prefix": {"training": {"learning_rate": 3e-2}},
    "frozen": {"training": {"learning_rate": 1e-3, "epochs": 20}},
    "contrastive": {"training": {"learning_rate": 5e-5, "epochs": 20}, "head": {"type": "logistic"}},
    "vectors": {"training": {"learning_rate": 1e-3, "epochs": 8}, "head": {"type": "bilstm", "dropout": 0.3}},
    "scratch": {"training": {"learning_rate": 1e-3, "epochs": 8}, "head": {"type": "bilstm", "dropout": 0.3}},
    "tfidf": {"head": {"type": "logistic", "c": 10.0}},
    "onehot": {"head": {"type": "logistic"}},
}
FRESH_HEAD_RATE = 1e-3  # a body of ours is drawn at random: at the encoder's rate it would hardly learn


def method_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """A run's sections as given, with what its method and head set where nothing is said."""
    method, head = values.get("method", "full"), values.get("head")
    own = dict(DEFAULTS.get(method, {})) if isinstance(method, str) else {}
    training = own.pop("training", {})
    if method in LIVE_METHODS and isinstance(head, dict) and head.get("type") in LIVE_HEADS:
        training = training | {"head_learning_rate": FRESH_HEAD_RATE}
    if training and isinstance(values.get("training", {}), dict):
        values = {**values, "training": training | values.get("training", {})}
    values = own | values
    model = values.get("model", {})
    if method in (*WORD_METHODS, *BAG_METHODS) and isinstance(model, dict):
        values = {**values, "model": {"name": "none"} | model}
    return values
