"""The command line, run in this process against a fake server."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from fake_service import FakeServer, start_fake_server

from hueshift.server.cli.main import main


@dataclass(frozen=True)
class Ran:
    """What a command gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its stdout, which must be one JSON document."""
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    """The fake server, serving."""
    fake, server = start_fake_server()
    yield fake
    server.stop(None).wait(5)


@pytest.fixture
def run(fake: FakeServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `hueshift` with the given words against the fake server."""
    monkeypatch.setenv("HUESHIFT_ADDRESS", fake.address)
    monkeypatch.delenv("HUESHIFT_API_KEY", raising=False)

    def run(*words: object) -> Ran:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run
