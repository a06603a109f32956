"""The process that an actor keeps: its command, its settings, its restarts, its end."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from hueshift.server.cluster import child as module
from hueshift.server.cluster.child import Child
from hueshift.server.cluster.placement import Pool

SCRIPT = """
import json, os, pathlib, signal, sys
folder = pathlib.Path(sys.argv[1])
told = {"settings": sys.stdin.readline().strip(), "arguments": sys.argv[2:], "cuda": os.environ["CUDA_VISIBLE_DEVICES"]}
(folder / f"{os.getpid()}.tmp").write_text(json.dumps(told))
(folder / f"{os.getpid()}.tmp").rename(folder / f"{os.getpid()}.json")
if "ignores" in sys.argv[1]:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
while sys.stdin.read(1): pass
if "ignores" in sys.argv[1]: signal.pause()
"""


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Bench:
    """Children that run a script, and what it noted."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.children: list[Child] = []
        monkeypatch.setattr(module, "_FIRST_PAUSE", 0.05)
        real = module._command

        def command(pool: Pool, gpus: float, address: str) -> tuple[list[str], dict[str, str]]:
            return [sys.executable, "-c", SCRIPT, str(folder)], real(pool, gpus, address)[1]

        monkeypatch.setattr(module, "_command", command)

    def start(self, pool: Pool, gpus: float = 0) -> Child:
        self.children.append(Child("hueshift-x-0", pool.value, "{the settings}", gpus, "a" * 56, "10.0.0.7"))
        until(lambda: self.children[-1].status()["pid"] and len(list(self.folder.glob("*.json"))) > 0)
        return self.children[-1]

    def notes(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("*.json"), key=os.path.getmtime)]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    bench = Bench(tmp_path, monkeypatch)
    yield bench
    for child in bench.children:
        child.stop(5.0)


def test_a_worker_that_dies_is_started_again_under_a_new_name(bench: Bench) -> None:
    child = bench.start(Pool.FINETUNE, gpus=1)
    first = child.status()["pid"]
    psutil.Process(first).kill()
    until(lambda: len(bench.notes()) == 2)
    assert child.status()["starts"] == 2
    assert child.status()["pid"] != first
    before, after = bench.notes()
    assert before["settings"] == after["settings"] == "{the settings}"
    assert before["cuda"] == "5"
    owners = [note["arguments"][1] for note in (before, after)]
    assert all(owner.startswith("hueshift-x-0-aaaaaaaa-") for owner in owners)
    assert owners[0] != owners[1]
    child.stop(5.0)
    assert child.status()["pid"] is None
    time.sleep(0.2)
    assert child.status()["starts"] == 2


def test_a_replica_without_a_gpu_sees_none_and_has_no_owner(bench: Bench) -> None:
    bench.start(Pool.SERVE)
    (note,) = bench.notes()
    assert (note["cuda"], note["arguments"]) == ("", [])


def test_a_child_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "ignores"
    folder.mkdir()
    bench = Bench(folder, monkeypatch)
    child = bench.start(Pool.FINETUNE)
    pid = child.status()["pid"]
    begun = time.monotonic()
    child.stop(0.3)
    assert 0.3 <= time.monotonic() - begun < 10
    assert not psutil.pid_exists(pid)


def test_the_real_commands() -> None:
    worker, _ = module._command(Pool.FINETUNE, 1, "10.0.0.7")
    assert worker[-4:] == ["hueshift.server.cli.worker", "--supervised", "--device", "cuda:0"]
    serve, environment = module._command(Pool.SERVE, 0, "10.0.0.7")
    assert serve[-5:] == ["serve", "--supervised", "--json", "--node-address", "10.0.0.7"]
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
