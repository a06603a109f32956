"""A fake server per test."""

from collections.abc import Iterator

import pytest
from fake_service import FakeServer, start_fake_server

from hueshift.client.retry import RetryPolicy


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    """The fake server, serving."""
    fake, server = start_fake_server()
    yield fake
    server.stop(None).wait(5)


@pytest.fixture
def quick() -> RetryPolicy:
    """A policy whose waits are short and always the longest of their range."""
    return RetryPolicy(attempts=3, first_delay=0.01, longest_delay=0.05, patience=1.0, draw=lambda: 1.0)
