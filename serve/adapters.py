"""A bundle of several adapters: each request is read and answered by the task of the adapter that it names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from fastapi.exceptions import RequestValidationError

from regraft.engine.bundle import BundleInfo
from regraft.engine.errors import nearest
from regraft.engine.tasks import Adapters, Prediction, Task
from regraft.serve.tokens import Prepared


class Model(Protocol):
    """What the endpoint asks of a session."""

    info: BundleInfo
    task: Task

    def prepare(self, texts: Sequence[str], pairs: Sequence[Any] | None = None) -> Prepared: ...

    def answers(self, prepared: Prepared, outputs: Sequence[np.ndarray]) -> list[Prediction]: ...


class OneAdapter:
    """A session as the adapter `number` of its bundle sees it. Its items run in one batch with those of the others."""

    def __init__(self, session: Model, number: int) -> None:
        assert isinstance(session.task, Adapters)
        self.info, self.name = session.info, session.info.adapters[number]
        self.task = session.task.tasks[self.name]
        self._session, self._number, self._tasks = session, number, session.task

    def prepare(self, texts: Sequence[str], pairs: Sequence[Any] | None = None) -> Prepared:
        prepared = self._session.prepare(texts, pairs)
        return replace(prepared, items=[replace(item, adapter=self._number) for item in prepared.items])

    def answers(self, prepared: Prepared, outputs: Sequence[np.ndarray]) -> list[Prediction]:
        return self._tasks.decode_with(self.name, np.stack(outputs)) if len(outputs) else []


def answering(session: Model, name: str | None) -> Model:
    """The session, or the one adapter of it that a request names. Raises pydantic's error where they do not fit."""
    names = list(session.info.adapters)
    if not names:
        if name is not None:
            raise _refusal(f"{name!r}: this bundle is one model without adapters; leave the key out", name)
        return session
    if name is None:
        raise _refusal(f"missing; this bundle has {', '.join(names)}", name)
    if name not in names:
        raise _refusal(f"{name!r} is not in this bundle{nearest(name, names)}; it has {', '.join(names)}", name)
    return OneAdapter(session, names.index(name))


def _refusal(message: str, given: str | None) -> RequestValidationError:
    return RequestValidationError([{"type": "adapter", "loc": ("body", "adapter"), "msg": message, "input": given}])
