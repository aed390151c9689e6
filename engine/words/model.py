"""An embedding table in the place of an encoder, so that words run, export and serve by the same code."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regraft.engine.errors import ModelError
from regraft.engine.features.encoder import GraftedEncoder
from regraft.engine.files import new_folder
from regraft.engine.heads.head import Head, HeadShape
from regraft.engine.models import ready_to_answer
from regraft.engine.tasks.base import FIRST, TOKENS

if TYPE_CHECKING:
    from regraft.engine.models import RunningModel
    from regraft.engine.trained import Trained

WEIGHTS = "words.safetensors"


class WordTable(nn.Module):
    """Word vectors as an encoder of no layers: hidden state 0 is the embedding. Shape: ids [B, L] -> [B, L, D]."""

    def __init__(self, words: int, dimension: int, *, trained: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, dimension, padding_idx=0)
        self.embedding.weight.requires_grad_(trained)
        self.config = SimpleNamespace(
            vocab_size=words,
            hidden_size=dimension,
            num_hidden_layers=0,
            pad_token_id=0,
            max_position_embeddings=64,  # how long the sequences are that packing is proven on
            _attn_implementation="none",
        )

    def set_attn_implementation(self, name: str) -> None:
        self.config._attn_implementation = name

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = True
    ) -> SimpleNamespace:
        return SimpleNamespace(hidden_states=(self.embedding(input_ids),))


def word_model(words: int, dimension: int, head: Head, *, trained: bool) -> GraftedEncoder:
    pooling = "none" if head.reads_tokens or head.gives_tokens else "mean"
    return GraftedEncoder(WordTable(words, dimension, trained=trained), (0,), pooling, head=head)


def running_words(model: GraftedEncoder) -> RunningModel:
    """The model set up to run packed; shown, as every model is, to give what the padded path gives."""
    head: Any = model.head
    reads = TOKENS if head.gives_tokens else FIRST
    return ready_to_answer(model, 0, packing="auto", kernels="off", reads=reads)


def save_words(folder: Path, model: GraftedEncoder, tokenizer: Any, facts: dict[str, Any]) -> None:
    """Write table, head, tokenizer and facts, replacing `folder` at once."""
    from safetensors.torch import save_file

    from regraft.engine.trained import write_facts

    with new_folder(folder) as beside:
        save_file({n: v.contiguous() for n, v in model.state_dict().items()}, beside / WEIGHTS)
        tokenizer.save(beside)
        write_facts(beside, facts)


def load_words(folder: Path, facts: dict[str, Any]) -> Trained:
    """A word model that answers texts. Raises ModelError."""
    from safetensors.torch import load_file

    from regraft.engine.config import DataConfig
    from regraft.engine.methods.adapt import Adaptation
    from regraft.engine.tasks import task_from_spec
    from regraft.engine.trained import Trained
    from regraft.engine.words.tokens import read_word_tokenizer

    about = facts["words"]
    model = word_model(about["words"], about["dimension"], Head(HeadShape(**facts["head"])), trained=False)
    try:
        # The scores of a CRF are in the task.
        weights = {k: v for k, v in load_file(folder / WEIGHTS).items() if not k.startswith("crf.")}
        model.load_state_dict(weights)
    except (OSError, RuntimeError) as error:
        raise ModelError(
            f"{folder / WEIGHTS}: cannot be read as the model that regraft.json describes: {error}"
        ) from None
    running = running_words(model)
    running.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return Trained(
        folder,
        task_from_spec(facts["task"]),
        read_word_tokenizer(folder),
        facts["max_length"],
        DataConfig.model_validate(facts["data"]),
        facts,
        running,
        Adaptation(facts["method"], running.model),
    )
