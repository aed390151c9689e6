"""A trained head with its encoder as one model folder: plain Hugging Face files, head.safetensors, regraft.json."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.engine.errors import ModelError
from regraft.engine.files import new_folder, write_bytes
from regraft.engine.heads.head import Head, HeadShape

if TYPE_CHECKING:
    from regraft.engine.trained import Trained

HEAD_FILE = "head.safetensors"
COPIED = ("*.json", "*.txt", "*.model", "*.safetensors", "pytorch_model*.bin")


def save_head(path: Path, head: Head) -> None:
    """Write a head's weights, whole or not at all."""
    from safetensors.torch import save

    write_bytes(path, [save({name: value.contiguous() for name, value in head.state_dict().items()})])


def load_head(path: Path, spec: dict[str, Any]) -> Head:
    """The head as it was saved. Raises ModelError."""
    from safetensors.torch import load_file

    head = Head(HeadShape(**spec))
    try:
        # The scores of a CRF are in the task.
        head.load_state_dict({k: v for k, v in load_file(path).items() if not k.startswith("crf.")})
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{path}: cannot be read as the head that regraft.json describes: {error}") from None
    return head.eval()


def save_grafted(folder: Path, encoder: Path, head_file: Path, facts: dict[str, Any]) -> None:
    """Put encoder files, head and facts into one folder, replacing it at once."""
    from regraft.engine.trained import FACTS, write_facts

    with new_folder(folder) as beside:
        for pattern in COPIED:
            for file in encoder.glob(pattern):
                if file.name not in (HEAD_FILE, FACTS):
                    shutil.copyfile(file, beside / file.name)
        shutil.copyfile(head_file, beside / HEAD_FILE)
        write_facts(beside, facts)


def load_grafted(folder: Path, facts: dict[str, Any], *, packing: str) -> Trained:
    """Encoder and head as one model that answers texts. Raises ModelError."""
    from regraft.engine.config import DataConfig
    from regraft.engine.data.fast_tokenizer import load_fast_tokenizer
    from regraft.engine.features.encoder import GraftedEncoder, load_backbone
    from regraft.engine.methods.adapt import Adaptation
    from regraft.engine.models import ready_to_answer
    from regraft.engine.tasks import task_from_spec
    from regraft.engine.tasks.base import FIRST, TOKENS
    from regraft.engine.trained import Trained

    about = facts["features"]
    tokenizer = load_fast_tokenizer(str(folder))
    head = load_head(folder / HEAD_FILE, facts["head"])
    grafted = GraftedEncoder(
        load_backbone(folder), about["layers"], about["pooling"], normalise=about["normalise"], head=head
    )
    task = task_from_spec(facts["task"])
    running = ready_to_answer(
        grafted, tokenizer.pad_token_id, packing=packing, kernels=packing, reads=TOKENS if head.gives_tokens else FIRST
    )
    return Trained(
        folder,
        task,
        tokenizer,
        facts["max_length"],
        DataConfig.model_validate(facts["data"]),
        facts,
        running,
        Adaptation(facts["method"], running.model),
    )
