"""What a process chooses before it trains on a GPU."""

import os
from collections.abc import Iterator

import pytest
import torch

from hueshift.training.devices import prepare_device

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Devices that were set; what was chosen for the process is taken back."""
    devices: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    yield devices
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("given", "found"), [(None, ":4096:8"), (":16:8", ":16:8"), (":4096:8", ":4096:8"), (":4096:2:16:8", ":4096:8")]
)
def test_a_gpu_repeats_its_bits_strictly(
    chosen: list[int], monkeypatch: pytest.MonkeyPatch, given: str | None, found: str
) -> None:
    monkeypatch.delenv(WORKSPACE, raising=False)
    if given is not None:
        monkeypatch.setenv(WORKSPACE, given)
    prepare_device(torch.device("cuda", 1))
    assert torch.are_deterministic_algorithms_enabled()
    # Where torch would only warn, attention's way back does not repeat.
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]  # set on the module
    assert not torch.backends.cudnn.benchmark
    assert os.environ[WORKSPACE] == found
    assert chosen == [1]


def test_on_the_cpu_nothing_is_chosen(chosen: list[int]) -> None:
    prepare_device(torch.device("cpu"))
    assert not torch.are_deterministic_algorithms_enabled()
    assert chosen == []
