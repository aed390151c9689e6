from __future__ import annotations

import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import numpy as np
import pytest

from bundles import session
from regraft.serve.scheduler import Scheduler
from regraft.serve.tickets import Failure, NotReady, Outcome, Overloaded, Ticket, TooLarge
from running import PATIENCE, PROBE, GatedModel, item, scheduling


def marks(ticket: Ticket) -> list[int]:
    """What the ticket's items were answered with."""
    return [int(row[0]) for row in outcome(ticket).rows if not isinstance(row, Failure)]


def outcome(ticket: Ticket) -> Outcome:
    return ticket.future.result(timeout=PATIENCE)


def test_whatever_waits_when_the_model_is_free_is_the_next_batch() -> None:
    model = GatedModel()
    with scheduling(model) as scheduler:
        first = scheduler.submit([item(2, 1)])
        model.await_batch()
        later = [scheduler.submit([item(2, mark)]) for mark in (2, 3, 4)]
        model.open(2)
        assert [marks(ticket) for ticket in [first, *later]] == [[1], [2], [3], [4]]
    assert model.batches == [[1], [2, 3, 4]]


def test_a_batch_holds_no_more_tokens_than_its_budget_and_keeps_the_order() -> None:
    model = GatedModel()
    scheduler = Scheduler(model, probe=PROBE, max_batch_tokens=10, queue_tokens=100)
    tickets = [scheduler.submit([item(tokens, mark)]) for mark, tokens in enumerate((4, 6, 5, 6, 1, 1))]
    model.open(10)
    scheduler.start()
    assert [marks(ticket) for ticket in tickets] == [[0], [1], [2], [3], [4], [5]]
    assert scheduler.stop(PATIENCE)
    assert model.batches == [[0, 1], [2], [3, 4, 5]]


def test_an_item_longer_than_the_budget_stands_alone() -> None:
    model = GatedModel()
    scheduler = Scheduler(model, probe=PROBE, max_batch_tokens=10, queue_tokens=100)
    for mark, tokens in enumerate((2, 30, 2)):
        scheduler.submit([item(tokens, mark)])
    model.open(10)
    scheduler.start().stop(PATIENCE)
    assert model.batches == [[0], [1], [2]]


def test_a_list_that_spans_batches_is_answered_whole_and_in_order() -> None:
    model = GatedModel()
    with scheduling(model) as scheduler:
        model.open(10)
        ticket = scheduler.submit([item(4, mark) for mark in range(7)])
        assert marks(ticket) == list(range(7))
    assert max(len(batch) for batch in model.batches) == 2


def test_the_queue_is_counted_in_tokens_and_frees_them_when_a_batch_starts() -> None:
    model = GatedModel()
    with scheduling(model, queue_tokens=20) as scheduler:
        scheduler.submit([item(10)])
        model.await_batch()
        assert scheduler.waiting_tokens == 0
        scheduler.submit([item(10), item(10)])
        assert scheduler.waiting_tokens == 20
        with pytest.raises(Overloaded, match="20 tokens wait already and the queue takes 20"):
            scheduler.submit([item(1)])
        model.open()
        model.await_batch()
        assert scheduler.waiting_tokens == 10
        scheduler.submit([item(1)])


def test_a_list_larger_than_the_whole_queue_is_told_so() -> None:
    with scheduling(GatedModel(), queue_tokens=20) as scheduler, pytest.raises(TooLarge, match="21 tokens"):
        scheduler.submit([item(7), item(7), item(7)])


def test_retry_after_follows_the_measured_rate() -> None:
    now = 0.0
    model = GatedModel()
    with scheduling(model, queue_tokens=20, clock=lambda: now) as scheduler:
        first = scheduler.submit([item(10)])
        model.await_batch()
        now = 5.0  # ten tokens took five seconds
        model.open()
        outcome(first)
        scheduler.submit([item(10)])
        model.await_batch()
        scheduler.submit([item(10), item(10)])
        with pytest.raises(Overloaded) as refused:
            scheduler.submit([item(8)])
        assert scheduler.rate == pytest.approx(2.0)
        assert refused.value.retry_after == 4


def test_times_say_how_long_a_ticket_waited_and_ran() -> None:
    now = 0.0
    model = GatedModel()
    with scheduling(model, clock=lambda: now) as scheduler:
        first = scheduler.submit([item(10)])
        model.await_batch()
        second = scheduler.submit([item(8), item(8)])
        now = 3.0
        model.open()
        model.await_batch()
        now = 5.0
        model.open()
        model.await_batch()
        now = 9.0
        model.open()
        assert (outcome(first).queue, outcome(first).inference) == (0.0, 3.0)
        assert (outcome(second).queue, outcome(second).inference) == (3.0, 6.0)


def test_cancelling_gives_the_tokens_back() -> None:
    model = GatedModel()
    with scheduling(model) as scheduler:
        scheduler.submit([item(10)])
        model.await_batch()
        ticket = scheduler.submit([item(5), item(5)])
        scheduler.cancel(ticket)
        assert scheduler.waiting_tokens == 0
        with pytest.raises(CancelledError):
            outcome(ticket)


def test_cancelling_a_list_that_is_half_done_stops_its_other_half() -> None:
    model = GatedModel()
    with scheduling(model) as scheduler:
        ticket = scheduler.submit([item(10, mark) for mark in (1, 2, 3)])
        model.await_batch()
        scheduler.cancel(ticket)
        after = scheduler.submit([item(1, 9)])
        model.open(10)
        assert marks(after) == [9]
    assert model.batches == [[1], [9]]


def test_stopping_answers_what_waits_and_refuses_what_comes() -> None:
    model = GatedModel()
    with scheduling(model) as scheduler:
        tickets = [scheduler.submit([item(6, mark)]) for mark in range(4)]
        model.open(10)
        assert scheduler.stop(PATIENCE)
        assert [marks(ticket) for ticket in tickets] == [[0], [1], [2], [3]]
        with pytest.raises(NotReady, match="stopping"):
            scheduler.submit([item(1)])


def test_stopping_waits_for_what_is_still_being_made() -> None:
    model = GatedModel()
    model.open(10)
    with scheduling(model) as scheduler, ThreadPoolExecutor() as threads:
        with scheduler.expecting() as submit:
            stopped = threads.submit(scheduler.stop, PATIENCE)
            while scheduler.problem() is None:
                time.sleep(0.001)
            with pytest.raises(NotReady, match="stopping"):
                scheduler.submit([item(1, 7)])
            ticket = submit([item(6, 3)])
        assert stopped.result(PATIENCE) and marks(ticket) == [3]


def test_what_is_made_after_the_grace_time_is_refused() -> None:
    with scheduling(GatedModel()) as scheduler, scheduler.expecting() as submit:
        assert not scheduler.stop(grace=0.05)
        with pytest.raises(NotReady, match="stopped before this was answered"):
            submit([item(1)])


def test_what_is_not_answered_within_the_grace_time_is_told_so() -> None:
    model = GatedModel()
    with scheduling(model) as scheduler:
        running, waiting = scheduler.submit([item(10)]), scheduler.submit([item(10)])
        model.await_batch()
        assert not scheduler.stop(grace=0.05)
        for ticket in (running, waiting):
            with pytest.raises(NotReady, match="stopped before this was answered"):
                outcome(ticket)


def test_an_idle_worker_probes_the_model() -> None:
    model = GatedModel()
    with scheduling(model, probe_every=0.01) as scheduler:
        while model.probes < 3:
            assert scheduler.problem() is None


def test_a_real_model_answers_through_the_queue_as_it_does_alone() -> None:
    model = session()
    texts = [" ".join(["good", "bad", "film"][: i % 4] * (i % 5 + 1)) for i in range(60)]
    items = model.tokenize(texts)
    with scheduling(model.run, probe=model.probe(), max_batch_tokens=64, queue_tokens=10_000) as scheduler:
        tickets = [scheduler.submit(items[i : i + 3]) for i in range(0, 60, 3)]
        found = np.stack([row for ticket in tickets for row in outcome(ticket).rows])
    np.testing.assert_allclose(found, np.concatenate([model.run([i]) for i in items]), atol=1e-4, rtol=1e-4)
