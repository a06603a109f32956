"""Log lines: JSON, with the request id and the tenant's hash, without what callers wrote."""

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from hueshift.server.logs import configure_logs, tenant_hash
from hueshift.server.rpc.call import CURRENT_CALL, CallInfo
from hueshift.server.settings import LogSettings


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """Logs into memory, with logging put back as it was afterwards."""
    root = logging.getLogger()
    before = (list(root.handlers), root.level, logging.getLogger("hueshift").level)
    text = io.StringIO()
    yield text
    root.handlers, level, own_level = before
    root.setLevel(level)
    logging.getLogger("hueshift").setLevel(own_level)
    structlog.reset_defaults()


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_lines_carry_the_call_and_hide_what_callers_wrote(stream: io.StringIO) -> None:
    configure_logs(LogSettings(), stream)
    token = CURRENT_CALL.set(CallInfo("m", "request-1", "acme", None))
    try:
        structlog.get_logger().info("accepted", prompt="a secret fox", tenant="acme", pictures=2)
        logging.getLogger("library").warning("from %s", "a library")
    finally:
        CURRENT_CALL.reset(token)
    ours, theirs = lines(stream)
    assert ours["event"] == "accepted"
    assert ours["request_id"] == theirs["request_id"] == "request-1"
    assert ours["tenant_hash"] == theirs["tenant_hash"] == tenant_hash("acme")
    assert ours["pictures"] == 2
    assert theirs["event"] == "from a library"
    assert theirs["logger"] == "library"
    assert "fox" not in stream.getvalue()
    assert "acme" not in stream.getvalue()


@pytest.mark.parametrize("json_lines", [True, False])
def test_tracebacks_do_not_show_local_variables(stream: io.StringIO, json_lines: bool) -> None:
    configure_logs(LogSettings(json_lines=json_lines), stream)

    def fail(prompt: str) -> None:
        raise RuntimeError(f"it is {len(prompt)} long")

    try:
        fail(" ".join(("a", "secret", "fox")))
    except RuntimeError as error:
        structlog.get_logger().error("internal error", exc_info=error)
    assert "it is 12 long" in stream.getvalue()
    assert "secret fox" not in stream.getvalue()


def test_levels(stream: io.StringIO) -> None:
    configure_logs(LogSettings(), stream)
    structlog.get_logger().info("heard")
    structlog.get_logger().debug("unheard")
    logging.getLogger("library").info("unheard: libraries are heard from warning on")
    logging.getLogger("library").warning("heard of a library")
    assert [line["event"] for line in lines(stream)] == ["heard", "heard of a library"]


def test_a_higher_level(stream: io.StringIO) -> None:
    configure_logs(LogSettings(level="error"), stream)
    structlog.get_logger().warning("unheard")
    logging.getLogger("library").warning("unheard")
    structlog.get_logger().error("heard")
    assert [line["event"] for line in lines(stream)] == ["heard"]
