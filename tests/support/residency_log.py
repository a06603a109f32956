"""What the adapter caches reported, counted."""

from collections import Counter

from hueshift.engines.residency_tiers import Tier


class ResidencyLog:
    """A ResidencyObserver that counts."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.contents: dict[Tier, tuple[int, int]] = {}

    def looked_up(self, tier: Tier, *, hit: bool) -> None:
        """Count hits and misses."""
        self.counts[f"{tier} {'hits' if hit else 'misses'}"] += 1

    def loaded(self, tier: Tier, seconds: float) -> None:
        """Count loads."""
        assert seconds >= 0
        self.counts[f"{tier} loads"] += 1

    def evicted(self, tier: Tier) -> None:
        """Count evictions."""
        self.counts[f"{tier} evictions"] += 1

    def holds(self, tier: Tier, entries: int, nbytes: int) -> None:
        """Keep the last contents."""
        self.contents[tier] = (entries, nbytes)
