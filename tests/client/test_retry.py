"""When to try again, as arithmetic."""

import grpc
import pytest
from fake_service import job_events

from hueshift.client.errors import ErrorFacts, HueshiftClientError
from hueshift.client.jobs import WatchCursor
from hueshift.client.retry import Deadline, Reconnects, RetryPolicy

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def error(
    code: grpc.StatusCode = UNAVAILABLE, *, retryable: bool = True, retry_after: float | None = None
) -> HueshiftClientError:
    return HueshiftClientError(
        ErrorFacts(code, "no", metadata={"retryable": "true" if retryable else "false"}, retry_after=retry_after)
    )


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_the_wait_doubles_up_to_its_limit() -> None:
    policy = RetryPolicy(attempts=9, first_delay=1.0, longest_delay=5.0, draw=lambda: 1.0)
    assert [policy.delay(n, error(), None) for n in (1, 2, 3, 4)] == [1.0, 2.0, 4.0, 5.0]


def test_jitter_takes_off_at_most_half() -> None:
    policy = RetryPolicy(first_delay=1.0, draw=lambda: 0.0)
    assert policy.delay(1, error(), None) == 0.5


def test_only_what_the_server_marks_is_repeated() -> None:
    assert RetryPolicy().delay(1, error(retryable=False), None) is None
    assert RetryPolicy().delay(1, error(retryable=False, retry_after=0.1), None) is not None


def test_the_last_attempt_is_the_last() -> None:
    policy = RetryPolicy(attempts=2)
    assert policy.delay(1, error(), None) is not None
    assert policy.delay(2, error(), None) is None


def test_never_earlier_than_the_server_asks() -> None:
    policy = RetryPolicy(first_delay=0.1, draw=lambda: 0.0)
    assert policy.delay(1, error(retry_after=3.0), None) == 3.0


def test_a_wait_that_would_not_fit_is_not_begun() -> None:
    policy = RetryPolicy(draw=lambda: 0.0)
    assert policy.delay(1, error(retry_after=3.0), 2.9) is None
    assert policy.delay(1, error(retry_after=3.0), 3.1) == 3.0


def test_nobody_sleeps_until_a_quota_of_the_day_begins_again() -> None:
    assert RetryPolicy().delay(1, error(retry_after=40_000.0), None) is None
    assert RetryPolicy(patience=100_000.0).delay(1, error(retry_after=40_000.0), None) is not None


def test_a_deadline_never_goes_below_zero() -> None:
    clock = Clock()
    deadline = Deadline(2.0, clock)
    clock.seconds = 1.5
    assert deadline.remaining() == 0.5
    clock.seconds = 9.0
    assert deadline.remaining() == 0.0
    assert Deadline(None, clock).remaining() is None


@pytest.mark.parametrize("code", [UNAVAILABLE, grpc.StatusCode.CANCELLED])
def test_a_lost_watch_is_taken_up_for_as_long_as_patience_lasts(code: grpc.StatusCode) -> None:
    clock = Clock()
    reconnects = Reconnects(RetryPolicy(first_delay=1.0, longest_delay=4.0, patience=10.0, draw=lambda: 1.0), clock)
    waits = []
    while (wait := reconnects.delay(error(code, retryable=False))) is not None:
        waits.append(wait)
        clock.seconds += wait
        reconnects.opened()
    assert waits == [1.0, 2.0, 4.0]


def test_an_event_or_a_long_stream_ends_the_trouble() -> None:
    clock = Clock()
    reconnects = Reconnects(RetryPolicy(first_delay=1.0, patience=10.0, draw=lambda: 1.0), clock)
    assert reconnects.delay(None) == 1.0
    assert reconnects.delay(None) == 2.0
    reconnects.heard()
    assert reconnects.delay(None) == 1.0
    reconnects.opened()
    clock.seconds += 3600.0
    assert reconnects.delay(None) == 1.0


def test_a_watch_ends_at_an_error_that_will_not_pass() -> None:
    reconnects = Reconnects(RetryPolicy())
    assert reconnects.delay(error(grpc.StatusCode.NOT_FOUND, retryable=False)) is None
    assert reconnects.delay(error(grpc.StatusCode.RESOURCE_EXHAUSTED)) is not None


def test_a_watch_shows_no_event_twice() -> None:
    cursor = WatchCursor("job-1", after_sequence=1)
    events = job_events()
    taken = [cursor.take(event) for event in (*events[:3], *events[:4], events[4])]
    assert [event.sequence for event in taken if event is not None] == [2, 3, 4, 5]
    assert cursor.ended
