"""The 16-bit decoder: the same pictures, checked before it is used and again at every picture."""

from typing import Any

import numpy as np
import pytest
import structlog
import torch
from torch import Tensor, nn

from hueshift.engines import half_decoder
from hueshift.engines.base_model import BaseModel
from hueshift.engines.fused_blocks import FusedGroupNorm, FusedResnet, fuse_blocks
from hueshift.engines.half_decoder import HalfDecoder, make_half_decoder, serving_decoder
from hueshift.engines.vae import VaeStage

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def latents(base_model: BaseModel) -> Tensor:
    """Two small pictures."""
    return torch.randn(2, 4, 12, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("fuse", [True, False])
@torch.no_grad()
def test_a_copy_draws_what_the_decoder_draws(base_model: BaseModel, latents: Tensor, fuse: bool) -> None:
    made = HalfDecoder(base_model.vae, torch.float32, fuse=fuse)
    torch.testing.assert_close(made(latents), base_model.vae.decode(latents).sample, rtol=1e-3, atol=1e-4)
    modules = list(made._decoder.modules())
    assert any(isinstance(module, FusedResnet) for module in modules) is fuse
    # The norm of its attention reads tokens, and stays.
    assert {type(module) for module in modules if "GroupNorm" in type(module).__name__} <= (
        {FusedGroupNorm, nn.GroupNorm} if fuse else {nn.GroupNorm}
    )
    assert next(base_model.vae.parameters()).dtype == torch.float32


def test_half_precision_is_within_a_level(base_model: BaseModel, latents: Tensor) -> None:
    made = make_half_decoder(base_model, torch.bfloat16, fuse=True)
    assert made is not None
    found = VaeStage(base_model, half=made).decode(latents).astype(int)
    difference = np.abs(found - VaeStage(base_model).decode(latents))
    # bfloat16 has 8 bits where fp16 has 11.
    assert difference.mean() <= 2


def test_a_fused_decoder_that_draws_something_else_is_not_used(
    base_model: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fuse_blocks

    def break_one(decoder: nn.Module, rows: Any) -> int:
        count = whole(decoder, rows)
        norm = next(module for module in decoder.modules() if isinstance(module, FusedGroupNorm))
        norm.silu = not norm.silu
        return count

    monkeypatch.setattr(half_decoder, "fuse_blocks", break_one)
    with structlog.testing.capture_logs() as logs:
        made = make_half_decoder(base_model, torch.float32, fuse=True)
    assert made is not None
    assert not any(isinstance(module, FusedResnet) for module in made._decoder.modules())
    assert [(line["event"], line["fused"]) for line in logs] == [("half_decoder_wrong", True), ("half_decoder", False)]


def test_a_fused_decoder_that_fails_is_not_used(base_model: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(norm: FusedGroupNorm, *_: Tensor) -> Tensor:
        raise OverflowError("out of resource: shared memory")

    monkeypatch.setattr(FusedGroupNorm, "forward", fail)
    with structlog.testing.capture_logs() as logs:
        made = make_half_decoder(base_model, torch.float32, fuse=True)
    assert made is not None
    assert [(line["event"], line["fused"]) for line in logs] == [("half_decoder_failed", True), ("half_decoder", False)]


def test_no_copy_is_used_that_overflows(base_model: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HalfDecoder, "__call__", lambda self, latents: torch.full((1, 3, 8, 8), float("nan")))
    monkeypatch.setattr(base_model.vae, "decode", lambda latents: type("Out", (), {"sample": torch.zeros(1, 3, 8, 8)}))
    assert make_half_decoder(base_model, torch.float16, fuse=True) is None


def test_what_overflows_is_decoded_again(base_model: BaseModel, latents: Tensor) -> None:
    made = HalfDecoder(base_model.vae, torch.float32, fuse=False)
    last = made._decoder.conv_out
    last.bias = nn.Parameter(torch.full_like(last.bias, float("inf")), requires_grad=False)
    with structlog.testing.capture_logs() as logs:
        found = VaeStage(base_model, half=made).decode(latents)
    assert np.array_equal(found, VaeStage(base_model).decode(latents))
    assert [line["event"] for line in logs] == ["decoder_overflow"]


def test_a_cpu_decodes_in_the_bases_own_precision(base_model: BaseModel) -> None:
    assert serving_decoder(base_model, fuse=True) is None
