"""The meeting place: rounds, comings and goings, and that nobody waits for ever whatever a member does."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from hueshift.training.sharing.exchange import Exchange

FOREVER = 60.0
LIMIT = 20.0


class Rounds:
    """Doubles numbers, and remembers which it got together. A number below zero fails."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.before: Callable[[], None] = lambda: None

    def __call__(self, works: Sequence[int]) -> list[int | Exception]:
        self.before()
        self.seen.append(sorted(works))
        return [2 * work if work >= 0 else ValueError(f"{work}") for work in works]


def started(pool: ThreadPoolExecutor, exchange: Exchange[int, int], member: str, work: int) -> Future[int]:
    """Hand in from another thread, and return when that has happened."""
    before = exchange.waiting
    future = pool.submit(exchange.hand_in, member, work)
    until_waiting(exchange, before + 1)
    return future


def until_waiting(exchange: Exchange[int, int], count: int) -> None:
    end = time.monotonic() + LIMIT
    while exchange.waiting < count:
        assert time.monotonic() < end
        time.sleep(0.002)


@contextmanager
def round_going_on(pool: ThreadPoolExecutor, exchange: Exchange[int, int], rounds: Rounds) -> Iterator[None]:
    """A round that ends with the context, of a member that is gone by then: who comes meanwhile meets in the next."""
    entered, go_on = threading.Event(), threading.Event()
    after = rounds.before

    def block() -> None:
        rounds.before = after
        entered.set()
        assert go_on.wait(LIMIT)

    rounds.before = block
    pool.submit(exchange.hand_in, "first", 0)
    assert entered.wait(LIMIT)
    yield
    exchange.leave("first")
    go_on.set()


def test_one_member_alone_never_waits() -> None:
    rounds = Rounds()
    exchange = Exchange(rounds, FOREVER)
    assert [exchange.hand_in("a", work) for work in (1, 2, 3)] == [2, 4, 6]
    assert rounds.seen == [[1], [2], [3]]


def test_members_go_in_step_and_each_gets_its_own() -> None:
    rounds = Rounds()
    exchange = Exchange(rounds, FOREVER)

    def run(member: int) -> list[int]:
        results = [exchange.hand_in(member, 10 * step + member) for step in range(50)]
        exchange.leave(member)
        return results

    with ThreadPoolExecutor(5) as pool:
        with round_going_on(pool, exchange, rounds):
            futures = [pool.submit(run, member) for member in range(4)]
            until_waiting(exchange, 4)
        results = [future.result(LIMIT) for future in futures]
    assert results == [[2 * (10 * step + member) for step in range(50)] for member in range(4)]
    assert rounds.seen == [[0], *([10 * step + member for member in range(4)] for step in range(50))]


def test_a_failed_work_is_its_members_alone() -> None:
    rounds = Rounds()
    exchange = Exchange(rounds, FOREVER)
    with ThreadPoolExecutor(3) as pool:
        with round_going_on(pool, exchange, rounds):
            bad, good = started(pool, exchange, "a", -1), started(pool, exchange, "b", 4)
        assert good.result(LIMIT) == 8
        with pytest.raises(ValueError, match="-1"):
            bad.result(LIMIT)
    assert rounds.seen == [[0], [-1, 4]]


def test_who_leaves_is_not_waited_for() -> None:
    exchange = Exchange(Rounds(), FOREVER)
    exchange.hand_in("b", 1)
    with ThreadPoolExecutor(1) as pool:
        waiting = started(pool, exchange, "a", 5)
        assert not waiting.done()
        exchange.leave("b")
        assert waiting.result(LIMIT) == 10
    exchange.leave("nobody")


def test_who_has_come_is_waited_for_before_its_first_work() -> None:
    rounds = Rounds()
    exchange = Exchange(rounds, FOREVER)
    exchange.come("b")
    with ThreadPoolExecutor(1) as pool:
        waiting = started(pool, exchange, "a", 5)
        assert not waiting.done()
        assert exchange.hand_in("b", 1) == 2
        assert waiting.result(LIMIT) == 10
    assert rounds.seen == [[1, 5]]


def test_a_slow_member_holds_the_others_up_for_the_patience_and_once() -> None:
    exchange = Exchange(Rounds(), patience=0.5)
    exchange.hand_in("slow", 1)
    begun = time.monotonic()
    assert exchange.hand_in("a", 2) == 4
    waited = time.monotonic() - begun
    assert 0.5 <= waited < LIMIT
    begun = time.monotonic()
    assert exchange.hand_in("a", 3) == 6
    assert time.monotonic() - begun < 0.5


def test_who_comes_during_a_long_round_still_waits_for_the_others_after_it() -> None:
    rounds = Rounds()
    exchange = Exchange(rounds, patience=1.0)
    with ThreadPoolExecutor(2) as pool:
        with round_going_on(pool, exchange, rounds):
            late = started(pool, exchange, "b", 2)
            time.sleep(1.1)
        # The round has lasted longer than the patience, which begins with its end.
        assert exchange.hand_in("a", 3) == 6
        assert late.result(LIMIT) == 4
    assert rounds.seen == [[0], [2, 3]]


class _Killed(BaseException):
    """Stands for what ends a thread."""


def test_the_others_go_on_when_the_one_that_works_for_all_goes_down() -> None:
    rounds = Rounds()
    exchange = Exchange(rounds, FOREVER)

    def kill() -> None:
        rounds.before = lambda: None
        raise _Killed

    rounds.before = kill
    with ThreadPoolExecutor(4) as pool:
        with round_going_on(pool, exchange, rounds):
            futures = [started(pool, exchange, member, work) for member, work in (("a", 1), ("b", 2), ("c", 3))]
        ended = [future.exception(LIMIT) for future in futures]
    assert sum(isinstance(error, _Killed) for error in ended) == 1
    assert [error for error in ended if error is not None and not isinstance(error, _Killed)] == []
    assert [len(seen) for seen in rounds.seen] == [1, 2]


def test_members_that_come_and_go_at_random_all_come_to_their_end() -> None:
    rounds = Rounds()
    exchange = Exchange(rounds, patience=0.05)

    def live(member: int) -> int:
        total = 0
        for step in range(40):
            total += exchange.hand_in(member, step)
            if (step * 7 + member) % 5 == 0:
                exchange.leave(member)
            if (step * 3 + member) % 13 == 0:
                time.sleep(0.01)
        exchange.leave(member)
        return total

    with ThreadPoolExecutor(8) as pool:
        totals = [future.result(LIMIT) for future in [pool.submit(live, member) for member in range(8)]]
    assert totals == [2 * sum(range(40))] * 8
    assert sum(map(len, rounds.seen)) == 320
    assert max(map(len, rounds.seen)) > 1
