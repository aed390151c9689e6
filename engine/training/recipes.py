"""Which recipe a method trains by: the one of `run.py`, or what a method changes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.engine.config import RunConfig
from regraft.engine.heads.settings import BAG_METHODS, WORD_METHODS

if TYPE_CHECKING:
    from regraft.engine.training.run import _Run


def recipe_of(config: RunConfig) -> type[_Run]:
    """The class whose `go` trains `config.method`; only that method's own modules are imported."""
    if config.method == "frozen":
        from regraft.engine.heads.run import FrozenRun

        return FrozenRun
    if config.method == "contrastive":
        from regraft.engine.heads.contrastive import ContrastiveRun

        return ContrastiveRun
    if config.method in BAG_METHODS:
        from regraft.engine.words.bag_run import BagRun

        return BagRun
    if config.method in WORD_METHODS:
        from regraft.engine.words.run import WordsRun

        return WordsRun
    from regraft.engine.training.run import _Run

    return _Run
