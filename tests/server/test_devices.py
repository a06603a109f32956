"""A GPU trains or serves, never both; a worker sees its own device alone."""

import subprocess
import sys
from pathlib import Path

import pytest

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.server.devices import worker_environment
from hueshift.server.settings import TrainingSettings, load_settings
from hueshift.server.stop import StopFlag
from hueshift.server.supervisor import worker_devices
from hueshift.server.worker_process import run_worker


@pytest.mark.parametrize(
    ("engine", "training"),
    [
        ({"device": "cuda:1"}, ("cuda:0", "cuda:1")),
        ({"device": "cuda"}, ("cuda:0",)),
        ({"device": "auto"}, ("cuda:0",)),
        ({"kind": "tensorrt"}, ("cuda:0",)),
    ],
)
def test_a_serving_device_may_not_train(engine: dict[str, str], training: tuple[str, ...]) -> None:
    with pytest.raises(InvalidArgument, match="serves already") as refused:
        load_settings(None, engine=engine, training={"devices": training})
    assert refused.value.reason is Reason.SETTINGS_INVALID


@pytest.mark.parametrize(
    ("engine", "role"),
    [
        ({"device": "cuda:1"}, "single"),
        ({"device": "cpu"}, "single"),
        ({"kind": "onnxruntime"}, "single"),
        ({}, "frontend"),
    ],
)
def test_devices_that_serve_nothing_may_train(engine: dict[str, str], role: str) -> None:
    settings = load_settings(None, engine=engine, training={"devices": ("cuda:0", "cuda:2")}, cluster={"role": role})
    assert worker_devices(settings.training) == ("cuda:0", "cuda:2")


@pytest.mark.parametrize("devices", [("cpu",), ("cuda",), ("cuda:1", "cuda:1"), ("gpu0",)])
def test_devices_are_named_once_and_by_number(devices: tuple[str, ...]) -> None:
    with pytest.raises(InvalidArgument, match=r"training\.devices"):
        load_settings(None, training={"devices": devices})


def test_no_secret_of_the_settings_is_told_with_an_error() -> None:
    with pytest.raises(InvalidArgument) as refused:
        load_settings(None, training={"devices": ("cuda:0",)}, store={"database_url": "postgresql://u:hush@h/d"})
    assert "hush" not in refused.value.message


def test_workers_per_device() -> None:
    assert worker_devices(TrainingSettings(workers=2)) == (None, None)
    assert worker_devices(TrainingSettings(devices=("cuda:1",), workers=0)) == ()


def test_a_worker_sees_its_device_alone() -> None:
    seen = "CUDA_VISIBLE_DEVICES"
    assert worker_environment("cuda:1", {"A": "b"}) == {"A": "b", seen: "1"}
    assert worker_environment("cuda:1", {seen: "4,GPU-7"})[seen] == "GPU-7"
    assert worker_environment(None, {seen: "0,1"})[seen] == ""
    with pytest.raises(InvalidArgument, match="shows 1 devices"):
        worker_environment("cuda:1", {seen: "4"})


def test_a_worker_by_hand_may_not_take_the_serving_device(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "hueshift.server.cli.worker", "--device", "cuda:0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "serves already" in done.stderr


@pytest.mark.parametrize("count", [0, 2])
def test_a_worker_that_does_not_see_its_device_alone_refuses(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    with pytest.raises(InvalidArgument, match=f"cuda:1 given, and its worker sees {count} CUDA devices"):
        run_worker(load_settings(None), stop=StopFlag(), device="cuda:1")
