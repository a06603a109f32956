"""Which TensorRT is taken, and in what its versions differ."""

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from recording_tensorrt import make_module
from tensorrt_world import World

from hueshift.adapters.errors import Reason
from hueshift.engines.tensorrt_loader import Fallback, TensorRT, TensorRtError, load_tensorrt


def importer(**found: Any) -> Any:
    """Import what is given: a version to answer with, or an error to raise."""

    def import_module(name: str) -> ModuleType:
        answer = found.get(name, ModuleNotFoundError(f"No module named {name!r}", name=name))
        if isinstance(answer, Exception):
            raise answer
        module: ModuleType = make_module(World(version=answer))
        return module

    return import_module


def test_absent_says_what_to_install() -> None:
    with pytest.raises(TensorRtError, match=r"no TensorRT is installed; install the extra `hueshift\[tensorrt\]`") as e:
        load_tensorrt(importer())
    assert e.value.fallback is Fallback.MISSING
    assert e.value.reason is Reason.ENGINE_UNAVAILABLE


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ({"tensorrt": "9.3.0"}, "tensorrt 9.3.0 is older than 10"),
        ({"tensorrt": ImportError("libnvinfer.so.10: no such file")}, "cannot be imported .libnvinfer"),
        ({"tensorrt": ModuleNotFoundError("no", name="tensorrt_libs")}, "tensorrt lacks tensorrt_libs"),
    ],
)
def test_unusable_says_why(found: dict[str, Any], told: str) -> None:
    with pytest.raises(TensorRtError, match=told):
        load_tensorrt(importer(**found))


@pytest.mark.parametrize(
    ("found", "name", "version"),
    [
        ({"tensorrt": "10.0.1", "tensorrt_rtx": "1.7.1"}, "tensorrt", "10.0.1"),
        ({"tensorrt": "8.6.1", "tensorrt_rtx_bindings": "1.7.1.116"}, "tensorrt_rtx", "1.7.1.116"),
        ({"tensorrt_rtx": "1.4.0"}, "tensorrt_rtx", "1.4.0"),
    ],
)
def test_first_usable_is_taken(found: dict[str, Any], name: str, version: str) -> None:
    trt = load_tensorrt(importer(**found))
    assert (trt.name, trt.version, trt.is_rtx) == (name, version, name == "tensorrt_rtx")


def test_only_ten_asks_for_strong_types() -> None:
    asked: dict[str, int] = {}
    for name, version in (("tensorrt", "10.2.0"), ("tensorrt", "11.4.1"), ("tensorrt_rtx", "1.7.1")):
        trt = load_tensorrt(importer(**{name: version}))
        builder = SimpleNamespace(create_network=lambda flags, key=version: asked.__setitem__(key, flags))
        trt.create_network(builder)
    assert asked == {"10.2.0": 2, "11.4.1": 0, "1.7.1": 0}


def test_scratch_memory_of_old_and_new() -> None:
    trt: TensorRT = load_tensorrt(importer(tensorrt="10.0.1"))
    assert trt.memory_size(SimpleNamespace(device_memory_size=7)) == 7
    assert trt.memory_size(SimpleNamespace(device_memory_size_v2=9)) == 9
    old = SimpleNamespace(device_memory=0)
    trt.give_memory(old, 512, 9)
    assert old.device_memory == 512


def test_complaints_are_kept_until_forgotten() -> None:
    trt = load_tensorrt(importer(tensorrt="10.0.1"))
    for number in range(20):
        trt.logger.log(trt.module.ILogger.ERROR, f"error {number}")
    trt.logger.log(trt.module.ILogger.INFO, "all is well")
    assert trt.errors().endswith("error 19")
    assert "error 2;" not in trt.errors()
    trt.forget_errors()
    assert trt.errors() == "no error was given"
