"""The program itself: fast help, exit codes, readable errors."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from fake_service import Failure, FakeServer

from hueshift.server.cli.main import COMMANDS, main

CLIENT_COMMANDS = ("generate", "finetune", "adapters", "jobs", "model")


def test_help_names_every_command(run: Callable[..., Any]) -> None:
    shown = run("--help")
    assert shown.code == 0
    assert all(name in shown.out for name in COMMANDS)
    assert run("--version").out.startswith("hueshift ")


@pytest.mark.parametrize("name", CLIENT_COMMANDS)
def test_every_summary_is_the_commands_own(name: str, run: Callable[..., Any]) -> None:
    shown = run(name, "--help")
    assert shown.code == 0
    first = COMMANDS[name].summary.rstrip(".").split()[:4]
    assert " ".join(first) in " ".join(shown.out.split())


def test_help_is_fast_and_calling_a_server_loads_no_torch() -> None:
    script = (
        "import sys, time; begun = time.perf_counter()\n"
        "from hueshift.server.cli.main import main\n"
        "code = main(['--help'])\n"
        "helped = time.perf_counter() - begun\n"
        "main(['adapters', 'list', '--address', '127.0.0.1:1'])\n"
        "heavy = [m for m in ('torch', 'diffusers', 'transformers', 'numpy', 'sqlalchemy') if m in sys.modules]\n"
        "print('REPORT', code, helped, heavy, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    report = next(line for line in done.stderr.splitlines() if line.startswith("REPORT"))
    _, code, seconds, heavy = report.split(maxsplit=3)
    assert (code, heavy) == ("0", "[]")
    assert float(seconds) < 1.0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nope"], "nope"),
        (["generate"], "prompt"),
        (["generate", "x", "--size", "big"], "128x128"),
        (["generate", "x", "--adapter", "fox:much"], "NAME:WEIGHT"),
        (["generate", "x", "--sampler", "magic"], "dpmpp_2m"),
        (["generate", "x", "--preview"], "terminal"),
        (["adapters", "list", "--label", "nolabel"], "key=value"),
        (["jobs", "list", "--state", "lost"], "queued"),
        (["adapters", "list", "--address", "db:1", "--api-key", "hs_secret"], "--tls"),
    ],
)
def test_wrong_usage_ends_with_2_and_says_what_is_right(words: list[str], told: str, run: Callable[..., Any]) -> None:
    ran = run(*words)
    assert ran.code == 2
    assert told in ran.err
    assert "hs_secret" not in ran.err
    assert ran.out == ""


def test_an_error_is_one_line_with_fields_and_advice(fake: FakeServer, run: Callable[..., Any]) -> None:
    fields = {"steps": "151 given; allowed: 1 to 150", "eta": "2 given; allowed: 0 to 1"}
    fake.service.fail(
        "Generate", Failure(grpc.StatusCode.INVALID_ARGUMENT, "2 fields are wrong", "INVALID_FIELD", fields=fields)
    )
    ran = run("generate", "x", "--steps", "151")
    assert ran.code == 1
    lines = ran.err.splitlines()
    assert lines[0] == "Error: 2 fields are wrong (INVALID_FIELD)"
    assert [line.strip() for line in lines[1:]] == [f"{name}: {text}" for name, text in fields.items()]


def test_advice_says_what_to_do(fake: FakeServer, run: Callable[..., Any]) -> None:
    assert "hueshift adapters list" in run("adapters", "show", "nobody").err
    fake.service.fail("GetModel", Failure(grpc.StatusCode.UNAUTHENTICATED, "no key", "CREDENTIAL_MISSING"))
    assert "HUESHIFT_API_KEY" in run("model").err
    fake.service.fail(
        "GetModel", Failure(grpc.StatusCode.INTERNAL, "internal error", "INTERNAL", metadata={"incident": "inc-9"})
    )
    assert "inc-9" in run("model").err
    fake.service.fail("Generate", Failure(grpc.StatusCode.DEADLINE_EXCEEDED, "too late", "DEADLINE_PASSED"))
    assert "--timeout" in run("generate", "x").err


def test_an_absent_server(run: Callable[..., Any]) -> None:
    ran = run("model", "--address", "127.0.0.1:1")
    assert ran.code == 1
    assert ran.err.splitlines()[0].startswith("Error: cannot reach a server at 127.0.0.1:1 (Connection refused)")
    assert "hueshift serve" in ran.err


def test_errors_as_json(run: Callable[..., Any]) -> None:
    ran = run("adapters", "show", "nobody", "--json")
    assert (ran.code, ran.out) == (1, "")
    error = json.loads(ran.err)["error"]
    assert (error["code"], error["grpc_code"]) == ("ADAPTER_NOT_FOUND", "NOT_FOUND")


def test_the_key_comes_from_the_environment(
    fake: FakeServer, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUESHIFT_API_KEY", "hs_env")
    assert run("model").code == 0
    assert fake.service.metadata[-1]["authorization"] == "Bearer hs_env"
    assert run("model", "--api-key", "hs_given").code == 0
    assert fake.service.metadata[-1]["authorization"] == "Bearer hs_given"


def test_interrupts_end_with_130(monkeypatch: pytest.MonkeyPatch, fake: FakeServer) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hueshift.client.sync.Client.model", interrupted)
    begun = time.monotonic()
    assert main(["model", "--address", fake.address]) == 130
    assert time.monotonic() - begun < 5
