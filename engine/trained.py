"""A trained model folder: plain Hugging Face files, and `regraft.json` with what Regraft knows besides.

It loads with `AutoModelForSequenceClassification.from_pretrained` and gives the same logits there.
"""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.engine.config import DataConfig, ModelConfig, RunConfig
from regraft.engine.errors import ModelError, nearest
from regraft.engine.files import new_folder, write_text
from regraft.engine.pretrained import source_of
from regraft.engine.tasks import Task, task_from_spec

if TYPE_CHECKING:
    from regraft.engine.data.fast_tokenizer import FastTokenizer
    from regraft.engine.methods.adapt import Adaptation
    from regraft.engine.models import RunningModel
    from regraft.engine.training.setup import Prepared

FACTS = "regraft.json"


@dataclass(frozen=True)
class Trained:
    """A model folder ready to answer."""

    folder: Path
    task: Task
    tokenizer: FastTokenizer
    max_length: int
    data: DataConfig
    facts: dict[str, Any]
    running: RunningModel
    adaptation: Adaptation


# Tasks of a text or of a pair of texts: which it is, a model's training rows said.
TEXT_OR_PAIR = ("classification", "multilabel", "regression", "ordinal")


def takes_pairs(trained: Trained) -> bool | None:
    """Whether the model learned from pairs of texts; None where the task itself says what stands beside a text."""
    return trained.data.columns.text_pair is not None if trained.task.type in TEXT_OR_PAIR else None


def save_trained(
    folder: Path, running: RunningModel, config: RunConfig, data: Prepared, adaptation: Adaptation
) -> None:
    """Write weights (an adapter's alone, where the method makes one), config, tokenizer and facts, replacing `folder`
    at once."""
    with new_folder(folder) as beside:
        with running.output_scale.folded() if running.output_scale else nullcontext():
            adaptation.save(beside)
        hugging_face_tokenizer(config.model).save_pretrained(beside)
        if data.new_words is not None:
            data.tokenizer.save(beside)  # tokenizer.json is all that has grown
        facts = {
            "task": data.task.spec(),
            "max_length": data.max_length,
            "position_offset": running.position_offset,
            "data": config.data.model_dump(mode="json"),
            "base_model": config.model.name,
            "method": config.method,
            "seed": config.training.seed,
            **getattr(adaptation.model, "facts", {}),  # of a head that is none of transformers'
        }
        if config.tasks:
            facts["tasks"] = {name: task.data.model_dump(mode="json") for name, task in config.tasks.items()}
        if adaptation.is_adapter:
            facts |= {
                "model": config.model.model_dump(mode="json"),
                "backbone": adaptation.fingerprint,
                "quantise": config.quantise.model_dump(mode="json"),
            }
        write_facts(beside, facts)


def hugging_face_tokenizer(model: ModelConfig) -> Any:
    """transformers' own tokenizer object, loaded once: its files make the model folder complete."""
    return _tokenizer_of(source_of(model), model.revision)


@lru_cache(maxsize=2)
def _tokenizer_of(name: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, revision=revision)


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    write_text(folder / FACTS, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def find_trained(path: str | Path) -> Path:
    """The model folder that a run folder or a model folder means. Raises ModelError."""
    path = Path(path)
    for folder in (path / "best", path):
        if (folder / FACTS).is_file():
            return folder
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ModelError(f"{path}: no such folder{nearest(path.name, siblings)}")
    if (path / "checkpoints").is_dir():
        raise ModelError(f"{path}: this run has no best model yet; start its training again to go on")
    raise ModelError(f"{path}: neither a run folder nor a model that Regraft trained ({FACTS} is missing)")


def name_of(path: str | Path) -> str:
    """What a trained model is called: its folder's name, or for the best/ in a run folder the run's."""
    path = Path(os.path.abspath(path))  # noqa: PTH100 links keep the name they were given
    return path.parent.name if path.name == "best" and (path.parent / "run.json").is_file() else path.name


def read_facts(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{folder / FACTS}: cannot be read: {error}") from None


def load_trained(path: str | Path, *, packing: str = "auto", device: str | None = None, merge: bool = True) -> Trained:
    """Load a run's best model (or a model folder) for inference. Raises ModelError.

    `merge`: work an adapter into the weights where that rounds nothing; the answers are the same and faster.
    """
    import transformers
    from transformers.utils import logging

    from regraft.engine.data.fast_tokenizer import load_fast_tokenizer
    from regraft.engine.methods.adapt import WEIGHTS, Adaptation
    from regraft.engine.methods.folder import is_adapter_folder, load_adapter
    from regraft.engine.models import ready_to_answer
    from regraft.engine.pretrained import explain

    folder = find_trained(path)
    facts = read_facts(folder)
    if "bag" in facts:
        from regraft.engine.words.bags import load_bag

        return load_bag(folder, facts)
    if "words" in facts:
        from regraft.engine.words.model import load_words

        return load_words(folder, facts)
    if "head" in facts and not is_adapter_folder(folder):
        from regraft.engine.heads.model import load_grafted

        return load_grafted(folder, facts, packing=packing)
    if "tasks" in facts:
        from regraft.engine.several.trained import load_many

        return load_many(folder, facts, packing=packing, device=device)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = load_fast_tokenizer(str(folder))
    task = task_from_spec(facts["task"])
    if is_adapter_folder(folder):
        adaptation = load_adapter(folder, facts)
        if merge and adaptation.mergeable:
            try:
                adaptation.merge()
            except ModelError as error:
                raise ModelError(f"{folder / WEIGHTS}: {error}") from None
    else:
        try:
            model = getattr(transformers, task.auto_model).from_pretrained(folder, dtype="float32")
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(explain(str(folder), error)) from None
        adaptation = Adaptation(facts.get("method", "full"), model)
    running = ready_to_answer(
        adaptation.model,
        tokenizer.pad_token_id,
        reads=task.reads,
        packing=packing,
        kernels=packing,
        device=device,
    )
    return Trained(
        folder,
        task,
        tokenizer,
        facts["max_length"],
        DataConfig.model_validate(facts["data"]),
        facts,
        running,
        adaptation,
    )
