"""The shape of requests and answers: pydantic at the edge, one answer type for each type of task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from regraft.engine.tasks import Task


class Pair(BaseModel):
    """A text, with what stands beside it where the task takes more: the second text of a pair, a context, choices."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"text": "How old are you?", "text_pair": "What is your age?"}]}
    )

    text: str | None = Field(default=None, description="The text, or the first text of a pair.")
    text_pair: str | None = Field(default=None, description="The second text of a pair.")
    words: list[str] | None = Field(default=None, description="A text that is cut into words already.")
    question: str | None = Field(default=None, description="What is asked of `context`.")
    context: str | None = Field(default=None, description="The text that holds the answer.")
    choices: list[str] | None = Field(default=None, description="The texts that may follow `text`.")


def _shape(value: Any) -> str | None:
    """Which of the allowed shapes was meant, so that an error speaks of that one only."""
    if isinstance(value, str):
        return "<text>"
    if isinstance(value, dict | Pair):
        return "<pair>"
    return "<list>" if isinstance(value, list) else None


OneInput = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[Pair, Tag("<pair>")],
    Discriminator(
        lambda value: None if _shape(value) == "<list>" else _shape(value),
        custom_error_type="input_shape",
        custom_error_message="expected a text or an object with 'text' and, for a pair, 'text_pair'",
    ),
]
Inputs = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[Pair, Tag("<pair>")]
    | Annotated[list[OneInput], Field(min_length=1), Tag("<list>")],
    Discriminator(
        _shape,
        custom_error_type="input_shape",
        custom_error_message="expected a text, an object with 'text' and 'text_pair', or a list of these",
    ),
]


class PredictRequest(BaseModel):
    """One text, one pair, or a list of texts and pairs."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"inputs": "Where is my parcel?"},
                {"inputs": {"text": "How old are you?", "text_pair": "What is your age?"}},
                {"inputs": ["Where is my parcel?", "I was charged twice."], "top_k": 3},
            ]
        },
    )

    inputs: Inputs
    adapter: str | None = Field(
        default=None, description="Which adapter answers, for a bundle that has several; left out for any other."
    )
    top_k: int | None = Field(
        default=None, ge=1, description="How many scores each answer lists, highest first; all when left out."
    )
    tasks: list[str] | None = Field(
        default=None,
        description="Of a bundle with several tasks, those that are to answer; all that can when left out.",
    )

    def items(self) -> list[Pair]:
        """The inputs as a list, whatever shape they came in."""
        many = self.inputs if isinstance(self.inputs, list) else [self.inputs]
        return [Pair(text=item) if isinstance(item, str) else item for item in many]


class ErrorDetail(BaseModel):
    """What went wrong, for a program (`code`) and for a person (`message`)."""

    code: str
    message: str
    field: str | None = Field(default=None, description="The part of the request at fault, such as `inputs[3].text`.")


class ErrorAnswer(BaseModel):
    """Body of every answer that is not 200."""

    error: ErrorDetail


class ItemError(BaseModel):
    """An item of a list that could not be answered; the other items were."""

    error: ErrorDetail


Tokens = Annotated[int, Field(description="Tokens the model read, special tokens included.")]
Truncated = Annotated[
    int, Field(description="Tokens cut off because the text was longer than the model takes; 0 when it was read whole.")
]


class ClassificationAnswer(BaseModel):
    """The most probable label. `scores` are soft-max probabilities and sum to one over all labels."""

    label: str
    score: float
    scores: dict[str, float]
    tokens: Tokens
    truncated: Truncated


class MultiLabelAnswer(BaseModel):
    """Every label whose probability reaches its threshold. `scores` are independent of each other (sigmoid)."""

    label: list[str]
    scores: dict[str, float]
    tokens: Tokens
    truncated: Truncated


class RegressionAnswer(BaseModel):
    """A number, in the unit of the training labels."""

    label: float
    tokens: Tokens
    truncated: Truncated


ANSWERS: dict[str, type[BaseModel]] = {
    "classification": ClassificationAnswer,
    "multilabel": MultiLabelAnswer,
    "regression": RegressionAnswer,
}


class Times(BaseModel):
    """Milliseconds of this request: on the way to token ids, waiting for the model, in the model."""

    tokenize_ms: float
    queue_ms: float
    inference_ms: float


class OpenAnswer(BaseModel):
    """What the task finds; the example shows the fields."""

    model_config = ConfigDict(extra="allow")

    tokens: Tokens
    truncated: Truncated


def taken(
    task: Task,
    inputs: Sequence[Pair],
    many: bool,
    tasks: list[str] | None = None,
    wants_pairs: bool | None = None,
) -> tuple[list[str], list[Any]]:
    """Texts and what stands beside them, as the task reads objects; `tasks`: those of several that are asked;
    `wants_pairs`: whether the model learned from pairs, None where the task says. Raises pydantic's error at what it
    refuses."""
    if tasks is not None and task.type != "several":
        problem: dict[str, Any] = {"type": "input_fields", "loc": ("body", "tasks"), "input": tasks}
        problem["msg"] = "this bundle has one task"
        raise RequestValidationError([problem])
    texts, beside = [], []
    for number, item in enumerate(inputs):
        given = item.model_dump(exclude_none=True) | ({} if tasks is None else {"tasks": tasks})
        try:
            text, other = task.take(given)
            if wants_pairs and other is None:
                raise ValueError("text_pair: field required; this model learned from pairs of texts")
            if wants_pairs is False and other is not None:
                raise ValueError("text_pair: this model learned from single texts; leave it out")
        except ValueError as error:
            field, _, message = str(error).partition(": ")
            place = ("body", field) if field == "tasks" else ("body", "inputs", *((number,) if many else ()), field)
            problem = {"type": "input_fields", "loc": place, "msg": message, "input": given}
            raise RequestValidationError([problem]) from None
        texts.append(text)
        beside.append(other)
    return texts, beside


def example_answer(task: Task) -> dict[str, Any]:
    """An answer as this task gives it, with its own label names, for the OpenAPI page."""
    return {**task.example_answer(), "tokens": 9, "truncated": 0}


def field_path(location: Sequence[int | str]) -> str:
    """`inputs[3].text` from pydantic's location of an error, without the tags of the shapes above."""
    path = ""
    for part in location[1:] if location and location[0] == "body" else location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("<"):
            path += f".{part}" if path else part
    return path
