"""`hueshift health`, as containers run it."""

from collections.abc import Callable
from typing import Any

import pytest

from hueshift.server.cli.main import main

Run = Callable[..., Any]


def test_ready(run: Run) -> None:
    ran = run("health", "--json")
    assert ran.code == 0
    assert ran.json == {"ready": True}


def test_not_ready_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    # Port 1 of loopback: nothing listens there.
    code = main(["health", "--address", "127.0.0.1:1", "--wait", "0.3"])
    assert code == 1
    assert "cannot reach a server at 127.0.0.1:1" in capsys.readouterr().err
