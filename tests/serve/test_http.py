from __future__ import annotations

import asyncio
import gzip
from typing import Any

import httpx
import pytest

from bundles import TASKS, session
from regraft.serve.schemas import example_answer
from running import over_http, post


def predictions(body: Any, **options: Any) -> list[dict[str, Any]]:
    answer = post(body, **options)
    assert answer.status_code == 200, answer.text
    return answer.json()["predictions"]


def test_one_text_a_pair_and_a_list_come_back_one_answer_each_in_order() -> None:
    pair = {"text": "good", "text_pair": "bad film"}
    [text_alone], [pair_alone] = predictions({"inputs": "good film"}), predictions({"inputs": pair})
    together = predictions({"inputs": ["good film", pair, {"text": "good film"}]})
    for found, expected in zip(together, [text_alone, pair_alone, text_alone], strict=True):
        assert found["label"] == expected["label"]
        assert found["scores"] == pytest.approx(expected["scores"], abs=1e-4)
    assert pair_alone["tokens"] == 6


def test_both_layouts_give_the_same_answers() -> None:
    inputs = {"inputs": ["good film", "not very bad the a b c", ""]}
    for packed, padded in zip(predictions(inputs), predictions(inputs, layout="padded"), strict=True):
        assert packed["label"] == padded["label"]
        assert packed["scores"] == pytest.approx(padded["scores"], abs=1e-4)


def test_top_k_shortens_the_scores_and_not_the_answer() -> None:
    [answer] = predictions({"inputs": "good film", "top_k": 1})
    assert list(answer["scores"].items()) == [(answer["label"], answer["score"])]


def test_times_are_told_in_milliseconds() -> None:
    times = post({"inputs": "good film"}).json()["times"]
    assert set(times) == {"tokenize_ms", "queue_ms", "inference_ms"}
    assert all(0 <= value < 10_000 for value in times.values()) and times["inference_ms"] > 0


def test_an_item_that_fails_has_an_error_object_and_the_others_their_answers() -> None:
    answers = predictions({"inputs": ["good", "poison", "bad \ud800", "beyond", "bad"]})
    assert [answer.get("error", {}).get("code") for answer in answers] == [None, *["item_failed"] * 3, None]
    assert "surrogate" in answers[2]["error"]["message"]


def test_a_single_text_that_fails_is_a_500_with_the_reason() -> None:
    answer = post({"inputs": "poison"})
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "the model gave a number that is not finite"


def test_a_model_of_pairs_takes_no_single_text_and_the_other_way_round() -> None:
    one, two = {"text": "good"}, {"text": "good", "text_pair": "bad film"}
    for pairs, right, wrong, message in ((True, two, one, "field required"), (False, one, two, "leave it out")):
        assert len(predictions({"inputs": [right, right]}, pairs=pairs)) == 2
        answer = post({"inputs": [right, wrong]}, pairs=pairs)
        error = answer.json()["error"]
        assert (answer.status_code, error["field"]) == (422, "inputs[1].text_pair")
        assert message in error["message"]


def test_half_a_character_in_a_single_text_is_the_clients_422() -> None:
    answer = post({"inputs": "bad \ud800"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["field"]) == (422, "invalid_request", "inputs")
    assert "surrogate" in error["message"]


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ({"inputs": "a", "nothing": 1}, "nothing", "known are inputs, adapter, top_k, tasks"),
        ({"inputs": []}, "inputs", "at least 1 item"),
        ({"inputs": None}, "inputs", "expected a text"),
        ({"inputs": 3}, "inputs", "expected a text"),
        ({}, "inputs", "field required"),
        ({"input": "a"}, "input", "did you mean 'inputs'?"),
        ({"inputs": ["a", 3]}, "inputs[1]", "expected a text"),
        ({"inputs": ["a", ["b"]]}, "inputs[1]", "expected a text"),
        ({"inputs": [{"text": "a", "textpair": "b"}]}, "inputs[0].textpair", "did you mean 'text_pair'?"),
        ({"inputs": [{"text": 1}]}, "inputs[0].text", "valid string"),
        ({"inputs": {"text_pair": "b"}}, "inputs.text", "field required"),
        ({"inputs": "a", "top_k": 0}, "top_k", "greater than or equal to 1"),
        ({"inputs": "a", "\ud800": 1}, None, "JSON object"),
        ([1], None, "JSON object"),
    ],
)
def test_bad_input_is_a_422_that_names_the_field(body: Any, field: str | None, message: str) -> None:
    answer = post(body)
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["field"] == field
    assert message in error["message"]


def test_a_body_that_is_not_json_is_told_where_it_breaks() -> None:
    async def talk(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post("/predict", content=b'{"inputs": nope}', headers={"content-type": "application/json"})

    answer = over_http(talk)
    assert answer.status_code == 422
    assert "character 11" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "headers", "told"),
    [
        (b'{"inputs": "caf\xe9"}', {}, "the body has byte 0xe9 at position 16; expected JSON in UTF-8"),
        (gzip.compress(b'{"inputs": "good"}', mtime=0), {}, "the body is compressed (gzip); expected JSON in UTF-8"),
        (b"\x8b\x02\xff", {"content-encoding": "br"}, "the body is compressed (br); expected JSON in UTF-8"),
        (b'{"inputs": ' + b"[" * 200_000, {}, "the body is nested too deeply; expected JSON in UTF-8"),
        (b'{"inputs": ' + b"1" * 9_000 + b"}", {}, "the body cannot be read: Exceeds the limit"),
    ],
    ids=["not utf-8", "gzip", "brotli", "nested", "a number of 9,000 digits"],
)
def test_a_body_that_cannot_be_read_is_told_with_what_was_expected(content: bytes, headers: Any, told: str) -> None:
    async def talk(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post("/predict", content=content, headers={"content-type": "application/json", **headers})

    answer = over_http(talk)
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["code"] == "invalid_request" and error["message"].startswith(told)


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_large_is_refused_with_413_declared_or_not(declared: bool) -> None:
    content = b'{"inputs": "' + b"a" * 3000 + b'"}'

    async def chunks():
        for start in range(0, len(content), 500):
            yield content[start : start + 500]

    async def talk(client: httpx.AsyncClient) -> list[httpx.Response]:
        headers = {"content-type": "application/json"}
        large = await client.post("/predict", content=content if declared else chunks(), headers=headers)
        small = await client.post("/predict", content=content[:100] + b'"}', headers=headers)
        return [large, small]

    large, small = over_http(talk, max_body_bytes=2000)
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
    assert small.status_code == 200


def test_a_body_in_chunks_within_the_limit_is_read_whole() -> None:
    async def chunks():
        for part in (b'{"inputs": ', b'["good', b' film", "bad"]}'):
            yield part

    async def talk(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post("/predict", content=chunks(), headers={"content-type": "application/json"})

    assert [a["tokens"] for a in over_http(talk).json()["predictions"]] == [4, 3]


@pytest.mark.parametrize("settings", [{"max_items": 3}, {"queue_tokens": 9}])
def test_a_list_that_this_server_never_takes_is_a_413(settings: dict[str, int]) -> None:
    answer = post({"inputs": ["good"] * 4}, **settings)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


def test_health_ready_metadata_and_the_page() -> None:
    async def talk(client: httpx.AsyncClient) -> dict[str, httpx.Response]:
        return {path: await client.get(path) for path in ("/health", "/ready", "/metadata", "/", "/nothing")}

    answers = over_http(talk)
    assert {path: answer.status_code for path, answer in answers.items()} == {
        "/health": 200,
        "/ready": 200,
        "/metadata": 200,
        "/": 200,
        "/nothing": 404,
    }
    bundle = answers["/metadata"].json()["bundle"]
    assert bundle["task"] == TASKS["classification"] and bundle["checksums"]
    assert "negative" in answers["/"].text and "/predict" in answers["/"].text
    assert answers["/nothing"].json()["error"]["code"] == "http_error"


@pytest.mark.parametrize("task", TASKS)
def test_the_openapi_page_shows_the_answers_of_this_task(task: str) -> None:
    document = over_http(lambda client: client.get("/openapi.json"), task=task).json()
    schemas = document["components"]["schemas"]
    shown = schemas["PredictAnswer"]["examples"][0]["predictions"][0]
    assert shown == example_answer(session("packed", task).task)
    [answer] = predictions({"inputs": "good film"}, task=task)
    assert list(shown) == list(answer)
    assert {"200", "413", "422", "429", "503"} <= set(document["paths"]["/predict"]["post"]["responses"])


def test_every_example_of_the_openapi_page_is_answered() -> None:
    document = over_http(lambda client: client.get("/openapi.json")).json()
    for example in document["components"]["schemas"]["PredictRequest"]["examples"]:
        assert len(predictions(example)) == (len(example["inputs"]) if isinstance(example["inputs"], list) else 1)


def test_requests_that_come_together_get_their_own_answers() -> None:
    texts = [" ".join(["good", "bad", "film", "the"][: 1 + i % 4] * (1 + i % 3)) for i in range(60)]

    async def talk(client: httpx.AsyncClient) -> list[dict[str, Any]]:
        answers = await asyncio.gather(*(client.post("/predict", json={"inputs": text}) for text in texts))
        return [answer.json()["predictions"][0] for answer in answers]

    alone = predictions({"inputs": texts})
    for found, expected in zip(over_http(talk), alone, strict=True):
        assert found["tokens"] == expected["tokens"]
        assert found["scores"] == pytest.approx(expected["scores"], abs=1e-4)
