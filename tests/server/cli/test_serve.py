"""`hueshift serve` as a process: what it says, and how signals end it."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from hueshift.v1 import generation_pb2 as pb
from hueshift.v1 import generation_pb2_grpc

COMMAND = (sys.executable, "-P", "-m", "hueshift.server.cli.main", "serve")
OPTIONS = ("--port", "0", "--metrics-port", "0", "--workers", "0", "--json")


@contextmanager
def process(store: Path, cache: Path, *options: str) -> Iterator["subprocess.Popen[str]"]:
    """Run the command; whatever happens, it is gone afterwards."""
    environment = {**os.environ, "HUESHIFT_STORE__CACHE_PATH": str(cache)}
    command = [*COMMAND, *OPTIONS, "--store", str(store), *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def log_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
def test_serves_drains_and_exits_with_zero(tmp_path: Path, cache_dir: Path) -> None:
    with process(tmp_path, cache_dir) as server:
        assert server.stdout is not None
        told = json.loads(server.stdout.readline())
        assert set(told) == {"grpc", "metrics"}
        with grpc.insecure_channel(told["grpc"]) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            call = stub.Generate(pb.GenerateRequest(prompt="a secret zebra", steps=12, count=2))
            assert next(call).HasField("queued")
            assert next(call).HasField("progress")
            server.send_signal(signal.SIGTERM)
            events = list(call)
        assert events[-1].finished.images == 2
        out, err = server.communicate(timeout=60)
        assert (server.returncode, out) == (0, "")
    events_told = [line["event"] for line in log_lines(err)]
    assert [event for event in ("serving", "server draining", "server stopped") if event in events_told] == [
        "serving",
        "server draining",
        "server stopped",
    ]
    ended = next(line for line in log_lines(err) if line["event"] == "call ended")
    assert (ended["code"], ended["level"]) == ("OK", "info")
    assert len(ended["tenant_hash"]) == 12
    assert len(ended["request_id"]) == 16
    assert "zebra" not in err


def test_a_signal_during_the_warm_up_ends_it(tmp_path: Path) -> None:
    # An empty cache: the export takes far longer than this test.
    with process(tmp_path / "store", tmp_path / "cache") as server:
        assert server.stderr is not None
        assert json.loads(server.stderr.readline())["event"] == "port open"
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=60)
        assert (server.returncode, out) == (0, "")
    assert log_lines(err)[-1]["event"] == "server stopped"


def test_what_stands_in_the_way_is_one_readable_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with process(tmp_path, tmp_path, "--port", port) as server:
            _, err = server.communicate(timeout=60)
    assert server.returncode == 1
    error = log_lines(err)[-1]["error"]
    assert error["code"] == "SETTINGS_INVALID"
    assert port in error["message"]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--host", "0.0.0.0"), ("0.0.0.0", "hueshift keys create")),
        (("--engine", "abacus"), ("engine.kind", "abacus")),
        (("--config", "/no/such.toml"), ("such.toml",)),
    ],
)
def test_wrong_settings_are_told_in_words(tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    with process(tmp_path, tmp_path, *options) as server:
        _, err = server.communicate(timeout=60)
    assert server.returncode == 1
    message = log_lines(err)[-1]["error"]["message"]
    assert all(word in message for word in words)
