"""Which replica a call goes to: the same for the same adapters, few moves when replicas come and go, a bounded load."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from hueshift.server.cluster.affinity import affinity_key, choose, ranked

REPLICAS = [f"replica-{n}" for n in range(5)]
KEYS = [f"tenant/adapter-{n}" for n in range(1000)]


def test_a_replica_that_leaves_moves_only_its_own_keys() -> None:
    before = {key: ranked(key, REPLICAS)[0] for key in KEYS}
    after = {key: ranked(key, REPLICAS[1:])[0] for key in KEYS}
    moved = [key for key in KEYS if before[key] != after[key]]
    assert {before[key] for key in moved} == {REPLICAS[0]}
    # Each replica has about a fifth: 200, standard deviation 13.
    assert all(140 < count < 260 for count in Counter(before.values()).values())


def test_one_loved_adapter_spreads_over_the_replicas() -> None:
    loads = dict.fromkeys(REPLICAS, 0)
    for _ in range(100):
        chosen = choose("tenant/loved", loads, 1, 1.25)
        assert chosen is not None
        loads[chosen] += 1
    assert max(loads.values()) <= 25
    # And no further than it must: the last in its order has the least.
    assert min(loads, key=lambda each: loads[each]) == ranked("tenant/loved", REPLICAS)[-1]


@given(
    st.dictionaries(st.sampled_from(REPLICAS), st.integers(0, 50), min_size=1),
    st.integers(0, 16),
    st.floats(1, 3),
    st.sampled_from(KEYS),
)
def test_no_replica_takes_more_than_the_bound_unless_all_are_over(
    loads: dict[str, int], cost: int, bound: float, key: str
) -> None:
    chosen = choose(key, loads, cost, bound)
    assert chosen is not None
    mean = (sum(loads.values()) + cost) / len(loads)
    assert loads[chosen] + cost <= bound * mean + 1 or loads[chosen] == min(loads.values())


def test_a_mix_has_one_key_in_any_order_and_by_any_name() -> None:
    assert affinity_key("acme", ["fox", "tenants/acme/adapters/owl"]) == affinity_key("acme", ["owl", "fox"])
    assert affinity_key("acme", ["fox"]) != affinity_key("other", ["fox"])
    assert affinity_key("acme", []) == ""
    assert choose("any", {}, 1, 1.25) is None
