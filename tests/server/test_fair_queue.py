"""Weighted fair sharing: shares follow the weights, nobody saves up credit, priority orders one tenant only."""

from collections import Counter

from hueshift.server.fair_queue import FairQueue


def serve(queue: FairQueue[str], times: int, cost: float = 1.0) -> list[str]:
    """Serve the first item again and again, without taking it out."""
    served = []
    for _ in range(times):
        item = queue.first(lambda _: True)
        assert item is not None
        queue.charge(item[0], cost)
        served.append(item)
    return served


def test_equal_tenants_take_turns_whatever_their_burst() -> None:
    queue: FairQueue[str] = FairQueue()
    for i in range(10):
        queue.push("a", f"a{i}")
    queue.push("b", "b0")
    assert serve(queue, 4) == ["a0", "b0", "a0", "b0"]


def test_shares_follow_the_weights() -> None:
    queue: FairQueue[str] = FairQueue({"a": 3.0})
    queue.push("a", "a")
    queue.push("b", "b")
    assert Counter(serve(queue, 400)) == {"a": 300, "b": 100}


def test_shares_follow_the_cost_not_the_count() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("a", "a")
    queue.push("b", "b")
    served: Counter[str] = Counter()
    for _ in range(600):
        item = queue.first(lambda _: True)
        assert item is not None
        queue.charge(item, 5.0 if item == "b" else 1.0)
        served[item] += 1
    # b's items are five times as dear: the same share buys a fifth as many.
    assert served == {"a": 500, "b": 100}


def test_priority_orders_one_tenant_only() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("a", "a-normal", 2)
    queue.push("a", "a-low", 1)
    queue.push("a", "a-high", 3)
    queue.push("a", "a-high2", 3)
    queue.push("b", "b-low", 1)
    order = []
    while (item := queue.first(lambda _: True)) is not None:
        order.append(item)
        queue.charge(item[0], 1.0)
        queue.remove(item[0], item)
    assert order == ["a-high", "b-low", "a-high2", "a-normal", "a-low"]


def test_a_newcomer_starts_where_the_others_are() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("a", "a")
    queue.push("b", "b")
    serve(queue, 100)
    queue.push("c", "c")
    counts = Counter(serve(queue, 30))
    assert counts == {"a": 10, "b": 10, "c": 10}


def test_using_an_idle_machine_alone_costs_nothing_later() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("a", "a")
    serve(queue, 1000)
    queue.push("b", "b")
    assert abs(Counter(serve(queue, 20))["a"] - 10) <= 1


def test_idling_saves_up_nothing() -> None:
    queue: FairQueue[str] = FairQueue()
    for name in ("a", "b"):
        queue.push(name, name)
    serve(queue, 2)
    queue.remove("b", "b")
    serve(queue, 500)
    queue.push("b", "b")
    assert abs(Counter(serve(queue, 20))["b"] - 10) <= 1


def test_giving_back_counts() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("a", "a")
    queue.push("b", "b")
    queue.charge("a", 10)
    queue.charge("a", -10)
    assert serve(queue, 2) == ["a", "b"]


def test_first_skips_what_is_not_accepted_and_heads_go_rank_by_rank() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "a3", "b1"):
        queue.push(item[0], item)
    assert queue.first(lambda item: item.endswith("2")) == "a2"
    assert queue.first(lambda item: item == "c") is None
    assert list(queue.heads(2)) == ["a1", "b1", "a2"]
    assert (len(queue), queue.tenants) == (4, 2)
    queue.remove("b", "b1")
    queue.remove("b", "not there")
    assert (len(queue), queue.tenants) == (3, 1)


def test_idle_tenants_are_forgotten() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("z", "z")
    for i in range(200):
        queue.push(f"t{i}", "x")
        queue.charge(f"t{i}", 1.0)
        queue.remove(f"t{i}", "x")
        queue.charge("z", 2.0)
    assert len(queue._idle) < 10


def test_tenants_that_never_met_another_are_forgotten_too() -> None:
    # Each alone with an idle machine: nobody behind whom the floor could rise.
    queue: FairQueue[str] = FairQueue()
    for i in range(5000):
        queue.push(f"t{i}", "x")
        queue.charge(f"t{i}", 1.0)
        queue.remove(f"t{i}", "x")
    assert len(queue._idle) <= 1024
    assert (len(queue), queue.tenants) == (0, 0)
    # What was given lately is still owed.
    queue.push("t4999", "again")
    queue.push("new", "n")
    assert queue.first(lambda _: True) == "n"
