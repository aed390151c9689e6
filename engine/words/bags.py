"""Texts as bags of words and runs of words, TF-IDF or one-hot, under one linear layer.

Words are counted from the ids that the run's own tokenizer gives, so training, `predict` and whoever reads the folder count
alike. A run of ids is one number: its ids as digits in base `base`; ids below those of words are in no run.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from regraft.engine.errors import ModelError
from regraft.engine.files import new_folder
from regraft.engine.packing import PackedBatch
from regraft.engine.words.tokens import SPECIAL

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from regraft.engine.trained import Trained

WEIGHTS = "bag.safetensors"
MOST_FEATURES = 200_000


@dataclass(frozen=True)
class BagShape:
    """What is counted: runs of up to `longest` ids below `base`; `weighting`: tfidf or onehot."""

    base: int
    longest: int
    weighting: str
    features: int
    outputs: int


def runs_of_ids(ids: np.ndarray, lengths: np.ndarray, base: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Every run of 1 to `longest` words within a text as its number, and the text it is of; [M] int64 each."""
    flat, owner = ids.astype(np.int64), np.repeat(np.arange(len(lengths)), lengths)
    word = flat >= len(SPECIAL)
    number, whole = flat, word
    found = [(number[whole], owner[whole])]
    for size in range(2, longest + 1):
        end = flat[size - 1 :]
        number = number[:-1] * base + end
        whole = whole[:-1] & word[size - 1 :] & (owner[: len(end)] == owner[size - 1 :])
        found.append((number[whole], owner[: len(end)][whole]))
    return np.concatenate([n for n, _ in found]), np.concatenate([o for _, o in found])


def counts(numbers: np.ndarray, owner: np.ndarray, known: np.ndarray, texts: int) -> csr_matrix:
    """How often each text has each of the `known` runs (ascending), [texts, features]."""
    from scipy.sparse import csr_matrix

    at = np.minimum(np.searchsorted(known, numbers), max(len(known) - 1, 0))
    here = known[at] == numbers if len(known) else np.zeros(len(numbers), dtype=bool)
    ones = np.ones(int(here.sum()), dtype=np.float32)
    return csr_matrix((ones, (owner[here], at[here])), shape=(texts, len(known)))  # adds up what occurs twice


def frequent_runs(numbers: np.ndarray, owner: np.ndarray, texts: int, least: int) -> np.ndarray:
    """The runs that at least `least` texts have, ascending; of more than MOST_FEATURES those in most texts."""
    known = np.unique(numbers)
    spread = np.diff(counts(numbers, owner, known, texts).tocsc().indptr)
    kept = np.flatnonzero(spread >= least)
    if len(kept) > MOST_FEATURES:
        kept = np.sort(kept[np.argsort(-spread[kept], kind="stable")[:MOST_FEATURES]])
    return known[kept]


class BagModel(nn.Module):
    """Logits of texts from what they count. Shape: PackedBatch of B texts -> [B, C]."""

    base_model_prefix = "backbone"
    config = SimpleNamespace(num_hidden_layers=0)
    codes: Tensor
    idf: Tensor

    def __init__(self, shape: BagShape) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("codes", torch.zeros(shape.features, dtype=torch.int64))
        self.register_buffer("idf", torch.ones(shape.features))
        self.weight = nn.Parameter(torch.zeros(shape.outputs, shape.features))
        self.bias = nn.Parameter(torch.zeros(shape.outputs))

    def weighted(self, ids: np.ndarray, lengths: np.ndarray) -> csr_matrix:
        """What the linear layer sees, [B, features]: (1 + ln count) idf in rows of length 1, or 1 for what is there."""
        shape = self.shape
        numbers, owner = runs_of_ids(ids, lengths, shape.base, shape.longest)
        x = counts(numbers, owner, self.codes.numpy(), len(lengths))
        if shape.weighting == "onehot":
            x.data[:] = 1.0
            return x
        x.data = (1.0 + np.log(x.data)) * self.idf.numpy()[x.indices]
        norms = np.sqrt(np.add.reduceat(np.append(x.data**2, 0.0), x.indptr[:-1]) * (np.diff(x.indptr) > 0))
        x.data /= np.repeat(np.maximum(norms, 1e-12), np.diff(x.indptr))
        return x

    def forward(self, batch: PackedBatch) -> Tensor:
        x = self.weighted(batch.input_ids.numpy(), np.asarray(batch.lengths))
        logits = x @ self.weight.detach().numpy().T + self.bias.detach().numpy()
        return torch.from_numpy(np.asarray(logits, dtype=np.float32))


class RunningBag(nn.Module):
    """A bag as the training loop and `predict` see a model."""

    reads = "first"
    packed = False
    reason = (
        "a bag of words is no graph: it is answered from the run folder by `regraft predict` and `regraft evaluate`"
    )
    output_scale = None
    position_offset = 0

    def __init__(self, model: BagModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PackedBatch) -> Tensor:
        return self.model(batch)


def save_bag(folder: Path, model: BagModel, tokenizer: Any, facts: dict[str, Any]) -> None:
    """Write weights, tokenizer and facts, replacing `folder` at once."""
    from safetensors.torch import save_file

    from regraft.engine.trained import write_facts

    with new_folder(folder) as beside:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, beside / WEIGHTS)
        tokenizer.save(beside)
        write_facts(beside, facts | {"bag": asdict(model.shape)})


def load_bag(folder: Path, facts: dict[str, Any]) -> Trained:
    """A bag that answers texts. Raises ModelError."""
    from regraft.engine.config import DataConfig
    from regraft.engine.methods.adapt import Adaptation
    from regraft.engine.tasks import task_from_spec
    from regraft.engine.trained import Trained
    from regraft.engine.words.tokens import read_word_tokenizer

    model = BagModel(BagShape(**facts["bag"]))
    put_weights(model, folder)
    data, running = DataConfig.model_validate(facts["data"]), RunningBag(model).eval()
    return Trained(
        folder,
        task_from_spec(facts["task"]),
        read_word_tokenizer(folder),
        facts["max_length"],
        data,
        facts,
        running,  # type: ignore[arg-type]
        Adaptation(facts["method"], model),
    )


def put_weights(model: BagModel, folder: Path) -> None:
    """Put a folder's weights into the model. Raises ModelError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{folder / WEIGHTS}: cannot be read as the model that regraft.json describes: {error}"
        ) from None
