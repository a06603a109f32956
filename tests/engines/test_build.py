"""Which engine a deployment gets, and what it is told when it cannot have the one it asked for."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from structlog.testing import capture_logs
from tiny_unet import TinyParts

from hueshift.adapters.errors import FailedPrecondition, HueshiftError, InvalidArgument, Reason
from hueshift.engines.build import EngineOptions, build_engine, choose_device, choose_kind, cuda_options
from hueshift.engines.cuda_options import CompileKind, KernelUse
from hueshift.server.settings import EngineSettings

pytestmark = pytest.mark.usefixtures("one_thread")

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def everything(module: str) -> bool:
    return True


def without(*missing: str) -> Callable[[str], bool]:
    return lambda module: module not in missing


@pytest.mark.parametrize(
    ("kind", "device", "installed", "expected"),
    [
        ("auto", CPU, everything, "onnxruntime"),
        ("auto", CUDA, everything, "torch"),
        ("onnxruntime", CPU, everything, "onnxruntime"),
        ("torch", CPU, everything, "torch"),
        ("torch", CPU, without("onnx", "onnxruntime"), "torch"),
        ("auto", CUDA, without("onnx", "onnxruntime"), "torch"),
    ],
)
def test_engine_for_settings(kind: str, device: torch.device, installed: Callable[[str], bool], expected: str) -> None:
    with capture_logs() as logs:
        assert choose_kind(kind, device, installed) == expected
    assert not logs


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_auto_without_the_extra_runs_torch_and_says_so(missing: str) -> None:
    with capture_logs() as logs:
        assert choose_kind("auto", CPU, without(missing)) == "torch"
    assert [(log["log_level"], log["missing"], log["install"]) for log in logs] == [
        ("warning", [missing], "hueshift[onnx]")
    ]


@pytest.mark.parametrize(
    ("kind", "device", "installed", "error", "reason", "named"),
    [
        (
            "onnxruntime",
            CPU,
            without("onnxruntime"),
            FailedPrecondition,
            Reason.ENGINE_UNAVAILABLE,
            r"hueshift\[onnx\]",
        ),
        ("onnxruntime", CUDA, everything, InvalidArgument, Reason.SETTINGS_INVALID, "CPU only"),
        (
            "tensorflow",
            CPU,
            everything,
            InvalidArgument,
            Reason.SETTINGS_INVALID,
            "auto, onnxruntime, torch or tensorrt",
        ),
    ],
)
def test_engines_that_cannot_be_had(
    kind: str,
    device: torch.device,
    installed: Callable[[str], bool],
    error: type[HueshiftError],
    reason: Reason,
    named: str,
) -> None:
    with pytest.raises(error, match=named) as caught:
        choose_kind(kind, device, installed)
    assert caught.value.reason is reason


@pytest.mark.parametrize("device", ["cuda:977", "nonsense"])
def test_devices_that_are_not_there(tiny: TinyParts, device: str) -> None:
    with pytest.raises(FailedPrecondition, match=f"engine.device '{device}'") as caught:
        choose_device(device, tiny.base)
    assert caught.value.reason is Reason.ENGINE_UNAVAILABLE


def test_auto_device_is_where_the_base_lies(tiny: TinyParts) -> None:
    assert choose_device("auto", tiny.base) == CPU


def test_progress_names_its_stages(tiny: TinyParts, tmp_path: Path) -> None:
    stages: dict[str, tuple[int, int]] = {}
    build_engine(
        tiny.base,
        EngineOptions(cache_dir=tmp_path, kind="onnxruntime", threads=1),
        progress=lambda stage, done, total: stages.__setitem__(stage, (done, total)),
    )
    assert list(stages) == ["decompose", "export dense", "export factored", "export full", "check"]
    assert all(done == total for done, total in stages.values())


def test_one_slot_is_too_few(tiny: TinyParts, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"engine\.slots"):
        build_engine(tiny.base, EngineOptions(cache_dir=tmp_path, kind="torch", slots=1))


def test_no_lowrank_targets_is_an_engine(tiny: TinyParts, tmp_path: Path) -> None:
    for kind in ("torch", "onnxruntime"):
        options = EngineOptions(cache_dir=tmp_path, kind=kind, threads=1, lowrank_targets=())
        engine = build_engine(tiny.base, options)
        assert engine.rows.lowrank_size == 0
        engine.warm()


def test_defaults_are_those_of_the_settings(tmp_path: Path) -> None:
    options, settings = EngineOptions(cache_dir=tmp_path), EngineSettings()
    for name in type(settings).model_fields:
        assert getattr(options, name) == getattr(settings, name)


def test_cuda_options_are_in_latents(tiny: TinyParts, tmp_path: Path) -> None:
    options = EngineOptions(cache_dir=tmp_path, max_size=256, attention="sdpa,80:cudnn", kernels="on", merged_slots=3)
    made = cuda_options(tiny.base, options)
    assert made.warm_sizes == ((8, 8),)
    assert made.max_area == 32 * 32
    assert (made.compile, made.kernels, made.weight_slots) == (CompileKind.GRAPH, KernelUse.ON, 3)
    sized = cuda_options(tiny.base, replace(options, warm_sizes=((64, 128), (256, 256)), compile="inductor"))
    assert sized.warm_sizes == ((8, 16), (32, 32))
    assert sized.compile is CompileKind.INDUCTOR
    for unknown in (replace(options, compile="fast"), replace(options, kernels="maybe")):
        with pytest.raises(InvalidArgument, match=r"engine\.(compile|kernels)"):
            cuda_options(tiny.base, unknown)
    for wrong in ((64, 72), (0, 64), (512, 64)):
        with pytest.raises(InvalidArgument, match="warm_sizes"):
            cuda_options(tiny.base, replace(options, warm_sizes=(wrong,)))


def test_settings_of_the_cuda_engine_are_checked() -> None:
    EngineSettings(attention="cudnn,40:sdpa,160:xformers", warm_sizes=((512, 512), (512, 768)))
    for wrong in ({"attention": "flash"}, {"compile": "fast"}, {"kernels": "maybe"}, {"merged_slots": -1}):
        with pytest.raises(ValidationError):
            EngineSettings.model_validate(wrong)
