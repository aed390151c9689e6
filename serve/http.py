"""The endpoint: what comes in is checked here, what goes out is shaped here, and nothing is computed here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict
from time import perf_counter
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, ConfigDict, create_model

from regraft.engine.tasks import Prediction, Task
from regraft.serve.adapters import Model, answering
from regraft.serve.limits import BodyLimit
from regraft.serve.page import info_page
from regraft.serve.refusals import ClientGone, add_error_answers, error_answer
from regraft.serve.scheduler import Scheduler
from regraft.serve.schemas import (
    ANSWERS,
    ErrorAnswer,
    ItemError,
    OpenAnswer,
    PredictRequest,
    Times,
    example_answer,
    taken,
)
from regraft.serve.settings import ServeSettings
from regraft.serve.tickets import Failure, Outcome, Overloaded, Ticket, TooLarge
from regraft.serve.tokens import Encoded, Prepared

# So many characters for each token that the queue takes may wait for the tokenizer; more would find the queue full.
BACKLOG_CHARACTERS = 8


def create_app(session: Model, scheduler: Scheduler, settings: ServeSettings | None = None) -> FastAPI:
    """The ASGI application. Starts and stops nothing but its own tokenising threads; the scheduler is the caller's."""
    settings = settings or ServeSettings()
    tokenizing = ThreadPoolExecutor(max_workers=2, thread_name_prefix="regraft-tokenize")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watch = asyncio.create_task(_watch(scheduler))
        yield
        watch.cancel()
        tokenizing.shutdown(wait=False, cancel_futures=True)

    backlog = 0  # characters on their way to the tokenizer; only the event loop's thread touches it

    app = FastAPI(
        title="Regraft", description=_description(session), version=str(session.info.format), lifespan=lifespan
    )
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes)
    add_error_answers(app)
    answer_type: Any = ANSWERS.get(session.task.type, OpenAnswer)
    predict_answer: Any = create_model(
        "PredictAnswer",
        __config__=ConfigDict(
            json_schema_extra={
                "examples": [
                    {
                        "predictions": [example_answer(session.task)],
                        "times": {"tokenize_ms": 0.2, "queue_ms": 1.1, "inference_ms": 6.0},
                    }
                ]
            }
        ),
        predictions=(list[answer_type | ItemError], ...),
        times=(Times, ...),
    )
    refusals: dict[int | str, dict[str, Any]] = {
        413: {"model": ErrorAnswer, "description": "More than this server ever takes at a time"},
        422: {"model": ErrorAnswer, "description": "Not what is expected; `field` names the part at fault"},
        429: {"model": ErrorAnswer, "description": "Overloaded; try again after `Retry-After` seconds"},
        500: {"model": ErrorAnswer, "description": "The only text of the request could not be answered"},
        503: {"model": ErrorAnswer, "description": "Not ready, or stopping"},
    }

    @app.post("/predict", response_model=predict_answer, responses=refusals, summary="Answer a text, a pair or a list")
    async def predict(body: PredictRequest, request: Request) -> Any:
        """Every input gets one entry in `predictions`, in the order it came. A list is taken whole or refused whole."""
        inputs, model = body.items(), answering(session, body.adapter)
        if len(inputs) > settings.max_items:
            raise TooLarge(f"{len(inputs)} inputs in one request; at most {settings.max_items} are taken at a time")
        nonlocal backlog
        with scheduler.expecting() as submit:
            texts, pairs = taken(model.task, inputs, isinstance(body.inputs, list), body.tasks, session.info.pairs)
            characters = sum(map(len, texts)) + sum(len(pair) for pair in pairs if isinstance(pair, str))
            if backlog and backlog + characters > settings.queue_tokens * BACKLOG_CHARACTERS:
                raise Overloaded(f"{backlog} characters wait for the tokenizer already", 1)
            backlog += characters
            began = perf_counter()
            try:
                prepared = await asyncio.get_running_loop().run_in_executor(tokenizing, model.prepare, texts, pairs)
            finally:
                backlog -= characters
            took = perf_counter() - began
            if prepared.problems and not isinstance(body.inputs, list):
                return error_answer(422, "invalid_request", next(iter(prepared.problems.values())), "inputs")
            ticket = submit(prepared.items) if prepared.items else None
        outcome = Outcome((), 0.0, 0.0)
        if ticket is not None:
            outcome = await _answer_or_leave(scheduler, ticket, request)
        failed = prepared.problems | {
            owner: row.message
            for owner, row in zip(prepared.owners, outcome.rows, strict=True)
            if isinstance(row, Failure)
        }
        if failed and not isinstance(body.inputs, list):
            return error_answer(500, "item_failed", next(iter(failed.values())))
        times = Times(tokenize_ms=_ms(took), queue_ms=_ms(outcome.queue), inference_ms=_ms(outcome.inference))
        if any(isinstance(row, Failure) for row in outcome.rows):
            # What is left is answered as if the failed inputs had not been asked.
            left = [i for i in range(prepared.inputs) if i not in failed]
            outputs = dict(zip(_places(prepared), outcome.rows, strict=True))
            prepared = model.prepare([texts[i] for i in left], [pairs[i] for i in left])
            found = [outputs[left[owner], nth] for owner, nth in _places(prepared)]
            answered = model.answers(prepared, found) if left else []  # type: ignore[arg-type]
            items = {left[o]: [prepared.items[n] for n in prepared.of(o)] for o in range(len(left))}
        else:
            answered = model.answers(prepared, outcome.rows) if prepared.items else []  # type: ignore[arg-type]
            items = {o: [prepared.items[n] for n in prepared.of(o)] for o in set(prepared.owners)}
        shaped = _answers(model.task, answer_type, len(inputs), answered, items, failed, body.top_k)
        return predict_answer(predictions=shaped, times=times)

    @app.get("/health", summary="Is the process alive?")
    async def health() -> dict[str, bool]:
        return {"alive": True}

    @app.get("/ready", summary="Can the model answer?", responses={503: {"model": ErrorAnswer}})
    async def ready() -> Any:
        if (problem := scheduler.check()) is not None:
            return error_answer(503, "not_ready", problem)
        return {
            "ready": True,
            "waiting_tokens": scheduler.waiting_tokens,
            "tokens_per_second": round(scheduler.rate, 1),
        }

    @app.get("/metadata", summary="The bundle that answers, and how this server runs it")
    async def metadata() -> dict[str, Any]:
        limits = ("max_batch_tokens", "queue_tokens", "max_items", "max_body_bytes")
        return {
            "bundle": asdict(session.info),
            "threads": getattr(session, "threads", None),
            "providers": getattr(session, "providers", None),
            "limits": {name: getattr(settings, name) for name in limits},
        }

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(info_page(session.info, session.task))

    return app


async def _answer_or_leave(scheduler: Scheduler, ticket: Ticket, request: Request) -> Outcome:
    """The ticket's outcome. When the client leaves first, what still waits is withdrawn from the queue."""
    answer = asyncio.wrap_future(ticket.future)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientGone
        return answer.result()
    finally:
        gone.cancel()
        if not answer.done():
            scheduler.cancel(ticket)


async def _disconnected(request: Request) -> None:
    # After the body nothing comes but the news that the client has left.
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _watch(scheduler: Scheduler) -> None:
    while True:
        scheduler.check()
        await asyncio.sleep(1.0)


def _places(prepared: Prepared) -> list[tuple[int, int]]:
    """For each item the input it is of, and the how manieth of that input's it is."""
    seen: dict[int, int] = {}
    places = []
    for owner in prepared.owners:
        places.append((owner, seen.get(owner, 0)))
        seen[owner] = seen.get(owner, 0) + 1
    return places


def _answers(
    task: Task,
    answer_type: Any,
    inputs: int,
    answered: Sequence[Prediction],
    items: dict[int, list[Encoded]],
    failed: dict[int, str],
    top_k: int | None,
) -> list[BaseModel]:
    decoded = iter(answered)
    answers: list[BaseModel] = []
    for number in range(inputs):
        if number in failed:
            answers.append(ItemError.model_validate({"error": {"code": "item_failed", "message": failed[number]}}))
        else:
            tokens = sum(item.tokens for item in items[number])
            truncated = sum(item.truncated for item in items[number])
            answers.append(answer_type(**task.answer(next(decoded), top_k), tokens=tokens, truncated=truncated))
    return answers


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def _description(session: Model) -> str:
    if session.info.adapters:
        return (
            f"Several adapters over one encoder; each request names its `adapter`: {', '.join(session.info.adapters)}."
        )
    labels = session.task.labels
    shown = ", ".join(f"`{name}`" for name in labels[:30]) + (
        f" and {len(labels) - 30} more" if len(labels) > 30 else ""
    )
    return f"A {session.task.type} endpoint." + (f" Labels: {shown}." if labels else "")
