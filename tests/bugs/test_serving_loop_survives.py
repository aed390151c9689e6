"""A batch loop that dies of one batch, one client or one callback leaves everybody hanging (ray 41057, 50046, 66140);
one bad item fails its whole batch (text-embeddings-inference)."""

from __future__ import annotations

import serving_support  # noqa: F401
from bundles import session
from regraft.serve.tickets import Failure
from running import PATIENCE, GatedModel, item, scheduling


def test_one_bad_item_fails_alone_and_its_batch_is_answered() -> None:
    model = GatedModel({13: RuntimeError("bad luck")})
    with scheduling(model, max_batch_tokens=100) as scheduler:
        first = scheduler.submit([item(1, 0)])
        model.await_batch()
        tickets = [scheduler.submit([item(1, mark)]) for mark in (11, 12, 13, 14, 15)]
        model.open(100)
        rows = [ticket.future.result(PATIENCE).rows[0] for ticket in [first, *tickets]]
    assert model.batches[1] == [11, 12, 13, 14, 15]
    assert rows[3] == Failure("the model failed on this item: bad luck")
    assert [int(row[0]) for row in rows if not isinstance(row, Failure)] == [0, 11, 12, 14, 15]


def test_items_that_the_real_runtime_refuses_or_answers_with_nan_fail_alone() -> None:
    model = session()
    texts = ["good", "bad beyond film", "the film", "poison", "not bad"]
    with scheduling(model.run, probe=model.probe(), max_batch_tokens=1000) as scheduler:
        rows = scheduler.submit(model.tokenize(texts)).future.result(PATIENCE).rows
        assert [isinstance(row, Failure) for row in rows] == [False, True, False, True, False]
        assert "out of data bounds" in rows[1].message
        assert "not finite" in rows[3].message
        assert scheduler.problem() is None


def test_a_client_that_cancels_in_the_middle_of_its_batch_takes_nobody_along() -> None:
    model = GatedModel()
    with scheduling(model) as scheduler:
        scheduler.submit([item(1, 0)])
        model.await_batch()
        leaving, staying = scheduler.submit([item(1, 1)]), scheduler.submit([item(1, 2)])
        model.open()
        model.await_batch()
        scheduler.cancel(leaving)
        model.open()
        assert int(staying.future.result(PATIENCE).rows[0][0]) == 2
    assert model.batches == [[0], [1, 2]]


def test_a_callback_that_raises_does_not_end_the_loop() -> None:
    model = GatedModel()
    with scheduling(model) as scheduler:
        ticket = scheduler.submit([item(1, 1)])

        def broken(_: object) -> None:
            raise RuntimeError("the loop of this client is closed")

        ticket.future.add_done_callback(broken)
        model.open(10)
        assert int(scheduler.submit([item(1, 2)]).future.result(PATIENCE).rows[0][0]) == 2
        assert scheduler.problem() is None


def test_a_model_that_gives_too_few_answers_is_not_believed() -> None:
    def run(items: list) -> object:
        answers = session().run(items)
        return answers[:-1] if len(items) > 1 else answers

    model = session()
    with scheduling(run, probe=model.probe(), max_batch_tokens=1000) as scheduler:
        rows = scheduler.submit(model.tokenize(["good", "bad", "film"])).future.result(PATIENCE).rows
        assert not any(isinstance(row, Failure) for row in rows)
