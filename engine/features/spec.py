"""What a feature store holds, as a key: all that changes the numbers except the texts, which address the rows."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from regraft.engine.config import RunConfig
from regraft.engine.data.cache import cache_folder
from regraft.engine.data.fast_tokenizer import FastTokenizer, load_fast_tokenizer
from regraft.engine.errors import ConfigError, ModelError
from regraft.engine.files import write_text
from regraft.engine.pretrained import position_limit, resolve
from regraft.engine.tasks import task_class
from regraft.engine.tasks.base import FIRST

log = logging.getLogger(__name__)

DEPTH_KEYS = ("num_hidden_layers", "n_layers", "n_layer", "encoder_layers")
WIDTH_KEYS = ("hidden_size", "dim", "d_model", "n_embd")
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
NOT_DECISIVE = ("model",)  # the name a model was found by says nothing about its weights


@dataclass(frozen=True)
class FeatureSpec:
    """`layers`: numbers from 0 (embeddings); `hidden`: width; `compute`: precision of the forward pass, `precision`:
    of what is kept. Rows are [len(layers), hidden] a text, or a token for pooling 'none'."""

    model: str
    weights: str
    tokenizer: str
    layers: tuple[int, ...]
    hidden: int
    pooling: str
    normalise: bool
    max_length: int
    precision: str
    compute: str

    @property
    def key(self) -> str:
        """Name of the store's folder."""
        decisive = {k: v for k, v in asdict(self).items() if k not in NOT_DECISIVE}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def bytes_a_row(self) -> int:
        """Bytes kept of one pooled text, or of one token."""
        values = len(self.layers) * self.hidden
        return values + 4 * len(self.layers) if self.precision == "int8" else values * WIDTH[self.precision]


WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}


def feature_spec(config: RunConfig) -> tuple[FeatureSpec, FastTokenizer]:
    """The store that a run needs, without importing torch. Raises ConfigError, ModelError."""
    features = config.features
    folder = model_folder(config)
    tokenizer = load_fast_tokenizer(folder)
    depth, width = depth_and_width(folder)
    takes = [n for n in (tokenizer.max_length, position_limit(str(folder))) if n is not None]
    if config.model.max_length is not None and takes and config.model.max_length > min(takes):
        raise ConfigError(
            f"model.max_length: {config.model.max_length}; {config.model.name} takes at most {min(takes)} tokens"
        )
    pooling = features.pooling
    if pooling == "auto":
        pooling = "none" if config.head.reads_tokens or task_class(config.task.type).reads != FIRST else "mean"
    spec = FeatureSpec(
        model=config.model.name,
        weights=weights_hash(folder),
        tokenizer=tokenizer.fingerprint,
        layers=chosen_layers(features.layers, depth, config.model.name),
        hidden=width,
        pooling=pooling,
        normalise=features.normalise,
        max_length=config.model.max_length or min([*takes, 512]),
        precision=features.precision,
        compute=compute_precision(config.training.precision),
    )
    return spec, tokenizer


def depth_and_width(folder: Path) -> tuple[int, int]:
    """Layers above the embeddings, and values of each hidden state. Raises ModelError."""
    shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    depth, width = (next((shape[k] for k in keys if k in shape), None) for keys in (DEPTH_KEYS, WIDTH_KEYS))
    if depth is None or width is None:
        raise ModelError(f"{folder / 'config.json'}: names neither layers nor width of the encoder")
    return depth, width


def chosen_layers(wanted: str | int | list[int], depth: int, model: str) -> tuple[int, ...]:
    """Layer numbers, ascending. Raises ConfigError for one the model does not have, or one named twice."""
    if wanted == "last4" and depth < 3:
        raise ConfigError(
            f"features.layers: last4: {model} has {depth} layer{'s' if depth != 1 else ''} and its embeddings; use all, or "
            f"name them by number: 0 (the embeddings) to {depth} (the last)"
        )
    if isinstance(wanted, str):
        named = {"last": [depth], "last4": list(range(depth - 3, depth + 1)), "all": list(range(depth + 1))}
        wanted = {**named, "embeddings": [0]}[wanted]
    numbers = [wanted] if isinstance(wanted, int) else wanted
    if not numbers:
        raise ConfigError("features.layers: an empty list; name at least one layer")
    for number in numbers:
        if not -depth - 1 <= number <= depth:
            raise ConfigError(
                f"features.layers: {model} has no layer {number}; it has 0 (the embeddings) to {depth} (the last), or "
                f"-1 to {-depth - 1} counted from the last"
            )
    counted = [n + depth + 1 if n < 0 else n for n in numbers]
    if len(set(counted)) < len(counted):
        raise ConfigError(f"features.layers: {numbers} names layer {max(counted, key=counted.count)} twice")
    return tuple(sorted(counted))


def compute_precision(wanted: str) -> str:
    """fp32, or what the machine multiplies faster; without importing torch where there is no GPU driver."""
    from regraft.engine.machine import cpu_has_bf16

    if wanted != "auto":
        return wanted
    if Path("/dev/nvidiactl").exists():
        import torch

        if torch.cuda.is_available():
            return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if cpu_has_bf16() else "fp32"


def model_folder(config: RunConfig) -> Path:
    """The encoder's files on this machine; a hub name is downloaded first. Raises ModelError."""
    name = resolve(config.model.name)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.model", *WEIGHT_FILES]
    try:
        return Path(snapshot_download(name, revision=config.model.revision, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many kinds
        raise ModelError(f"model.name: {name}: no such folder here, and the hub did not give it ({error})") from None


def weights_hash(folder: Path, *, leave_out: str = "") -> str:
    """sha256 over the encoder's weight files and config.json; kept by path, size and time, so that 2 GB of weights
    are not read again before every run. Raises ModelError where there are no weights."""
    kinds = ([f for f in sorted(folder.glob(pattern)) if f.name != leave_out] for pattern in WEIGHT_FILES)
    files = next(filter(None, kinds), [])
    if not files:
        raise ModelError(f"{folder}: no weights; looked for {', '.join(WEIGHT_FILES)}")
    files = [*files, folder / "config.json"]
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    kept = cache_folder() / "weights" / f"{hashlib.sha256(json.dumps(stats).encode()).hexdigest()}.sha256"
    try:
        return kept.read_text(encoding="ascii").strip()
    except OSError:
        pass
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            whole.update(hashlib.file_digest(opened, "sha256").digest())
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text(kept, whole.hexdigest())
    except OSError as error:  # a full disk, say: the weights are only read again next time
        log.warning("%s: the weights' checksum cannot be kept there for the next run: %s", kept.parent, error)
    return whole.hexdigest()


def spec_from(values: dict[str, Any]) -> FeatureSpec:
    """The spec as `asdict` gave it to JSON."""
    return FeatureSpec(**{**values, "layers": tuple(values["layers"])})
