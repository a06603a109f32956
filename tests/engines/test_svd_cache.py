"""The cached decomposition: right, complete, and never trusted when damaged."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs
from tiny_unet import SD1_LIKE, TinyParts, tiny_parts

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.engines.base_model import BaseModel
from hueshift.engines.svd_cache import SpectralFactors, factors_file, load_factors

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_rebuilds(factors: SpectralFactors, base: BaseModel) -> None:
    """U diag(sigma) V^T equals every weight to fp32's own rounding, with sigma descending and U orthonormal."""
    for layer in base.layout.matrices:
        u, sigma, vh = factors.u[layer.name], factors.sigma[layer.name], factors.vh[layer.name]
        assert u.shape == (layer.rows, layer.rank)
        assert vh.shape == (layer.rank, layer.cols)
        weight = base.unet.get_parameter(f"{layer.name}.weight").reshape(layer.rows, layer.cols).double()
        rebuilt = (u.double() * sigma) @ vh.double()
        assert torch.linalg.norm(rebuilt - weight) < 2e-6 * torch.linalg.norm(weight)
        assert bool((sigma[1:] <= sigma[:-1]).all())
        assert torch.allclose(u.double().T @ u.double(), torch.eye(layer.rank, dtype=torch.float64), atol=1e-5)


def assert_same(a: SpectralFactors, b: SpectralFactors) -> None:
    """Equal bit for bit."""
    for left, right in ((a.u, b.u), (a.sigma, b.sigma), (a.vh, b.vh)):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_factors_rebuild_every_weight(any_tiny: TinyParts) -> None:
    assert_rebuilds(any_tiny.factors, any_tiny.base)


def test_embedded_model_rebuilds(base_model: BaseModel, cache_dir: Path) -> None:
    assert_rebuilds(load_factors(base_model, cache_dir), base_model)


def test_second_load_reads_the_file(tiny: TinyParts, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    first = load_factors(tiny.base, tmp_path, lambda done, total: calls.append((done, total)))
    total = len(tiny.base.layout.matrices)
    assert calls == [(i + 1, total) for i in range(total)]
    second = load_factors(tiny.base, tmp_path, lambda done, total: calls.append((done, total)))
    assert len(calls) == total
    assert_same(first, second)


@pytest.mark.parametrize(
    "damage", ["truncated", "empty", "not safetensors", "one bit", "another layer", "another base"]
)
def test_damaged_file_is_noticed_and_made_again(tiny: TinyParts, tmp_path: Path, damage: str) -> None:
    first = load_factors(tiny.base, tmp_path)
    file = factors_file(tmp_path, tiny.base.base_hash)
    data = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "not safetensors":
        file.write_bytes(b"\x80\x04pickled" * 50)
    elif damage == "one bit":
        data[-100] ^= 1
        file.write_bytes(data)
    elif damage == "another layer":
        tensors = load_file(file)
        tensors["u/other"] = tensors.pop(next(iter(tensors)))
        save_file(tensors, file, {"format": "hueshift.svd/1", "base_hash": tiny.base.base_hash})
    else:
        save_file(load_file(file), file, {"format": "hueshift.svd/1", "base_hash": "0" * 64})
    calls: list[int] = []
    with capture_logs() as logs:
        again = load_factors(tiny.base, tmp_path, lambda done, total: calls.append(done))
    assert [log["log_level"] for log in logs] == ["warning"]
    assert calls
    assert_same(first, again)
    load_factors(tiny.base, tmp_path, lambda done, total: pytest.fail("the repaired file was not read"))


def test_weight_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    parts = tiny_parts(SD1_LIKE)
    name = parts.base.layout.matrices[7].name
    parts.base.unet.get_parameter(f"{name}.weight").data.view(-1)[3] = torch.nan
    with pytest.raises(InvalidArgument, match=name) as caught:
        load_factors(replace(parts.base, base_hash="1" * 64), tmp_path)
    assert caught.value.reason is Reason.MODEL_FILE_INVALID
    assert not list(tmp_path.rglob("*.safetensors"))
