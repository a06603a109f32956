"""The capacity that is told holds while pictures are decoded and encoder weights are kept."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from host_cuda import built_engine, cuda_options
from memory_lane import MemoryLane, result_bytes
from structlog.testing import capture_logs
from tiny_unet import SD1_LIKE, TinyParts, tiny_parts
from torch import nn

from hueshift.engines import cuda_reserve
from hueshift.engines.cuda_lane import HostLane
from hueshift.engines.cuda_options import KernelUse
from hueshift.engines.cuda_reserve import DECODED_PICTURES, DECODED_PIXELS, Reserve, measure_reserve
from hueshift.engines.encoder_weights import most_bytes
from hueshift.engines.vae import VaeStage
from hueshift.server import decode_stage

pytestmark = pytest.mark.usefixtures("one_thread")

MUCH = 1 << 50


@pytest.fixture(scope="module")
def parts() -> TinyParts:
    """A base with an autoencoder of one small block."""
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    made = tiny_parts(SD1_LIKE)
    return replace(made, base=replace(made.base, vae=vae.requires_grad_(False).eval(), latent_factor=1))


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode four pictures of the native size at a time, not a thousand."""
    monkeypatch.setattr(cuda_reserve, "DECODED_PIXELS", 4 * 8 * 8)


def test_a_capacity_is_what_fits_beside_all_the_others(parts: TinyParts, tmp_path: Path) -> None:
    options: dict[str, Any] = {"weight_slots": 0, "max_area": 64, "kernels": KernelUse.OFF}
    empty = MemoryLane(MUCH)
    assert built_engine(parts, empty, tmp_path, **options).capacity == {(8, 8): 4}
    reserve = measure_reserve(parts.base, empty, cuda_options(**options), 4)
    # Its graphs alone would fit, and half of what the others need.
    lane = MemoryLane(empty.pool + reserve.total - empty.pool // 2)
    with capture_logs() as logs:
        engine = built_engine(parts, lane, tmp_path, **options)
    assert 0 < engine.capacity[8, 8] < 4
    assert next(log["rows"] for log in logs if log["event"] == "capture_without_memory") == 4
    # All of the rest can be taken while the largest call of that capacity runs.
    assert lane.held == 0
    with lane.holding(reserve.total):
        assert lane.pool > 0
    latents = torch.zeros(4, 4, 8, 8)
    assert reserve.pictures >= result_bytes(lambda: VaeStage(parts.base).decode(latents))


def test_merged_weights_give_way_to_what_others_need(
    parts: TinyParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve = Reserve(pictures=1 << 30)
    monkeypatch.setattr("hueshift.engines.cuda_setup.measure_reserve", lambda *_: reserve)
    free: list[int | None] = []

    class Watched(MemoryLane):
        """A lane whose merges need three quarters of the reserve."""

        def beside(self) -> "Watched":
            free.append(self.free_bytes())
            if len(free) % 2 == 0 and (self.free_bytes() or 0) < 3 << 28:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return self

    engine = built_engine(parts, Watched((1 << 30) + (1 << 29)), tmp_path, weight_slots=1, kernels=KernelUse.OFF)
    assert engine.weight_slots == 0
    assert engine.capacity == {(8, 8): 4}


def test_a_device_without_room_for_the_others_serves_and_says_so(
    parts: TinyParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hueshift.engines.cuda_setup.measure_reserve", lambda *_: Reserve(encoders=MUCH))
    with capture_logs() as logs:
        engine = built_engine(parts, MemoryLane(1 << 30), tmp_path, weight_slots=0, kernels=KernelUse.OFF)
    assert engine.capacity == {(8, 8): 4}
    assert [log["log_level"] for log in logs if log["event"] == "engine_reserve_without_memory"] == ["warning"]


def test_what_is_reserved_counts_what_lies_on_the_device(parts: TinyParts) -> None:
    lane, options = MemoryLane(MUCH), cuda_options(max_area=256)
    found = measure_reserve(parts.base, lane, options, 4)
    # The encoder of this base has no weights, so none of them come to lie anywhere.
    assert found.encoders == 0
    assert found.prompts == 3 * 4 * parts.base.max_tokens * parts.inputs(1)[2].shape[2] * 4
    sides = [
        layer for layer in parts.base.layout.matrices if ".attn2.to_k" in layer.name or ".attn2.to_v" in layer.name
    ]
    kept = [part[layer.name] for layer in sides for part in (parts.factors.u, parts.factors.vh)]
    assert found.vectors == sum(tensor.numel() * 4 for tensor in kept) > 0
    assert found.total == found.encoders + found.pictures + found.prompts + found.vectors
    encoder = nn.Linear(2, 2)
    encoder.config = parts.base.text_encoder.config
    with_encoder = measure_reserve(replace(parts.base, text_encoder=encoder), lane, options, 4)
    assert with_encoder.encoders == most_bytes(replace(parts.base, text_encoder=encoder))
    elsewhere = replace(parts.base, vae=parts.base.vae.__class__(block_out_channels=(8,), norm_num_groups=4).to("meta"))
    assert measure_reserve(elsewhere, lane, options, 4).pictures == 0
    assert measure_reserve(parts.base, HostLane(), options, 4) == Reserve()


def test_pictures_are_counted_as_the_server_decodes_them() -> None:
    assert DECODED_PIXELS == decode_stage._BATCH_PIXELS
    assert DECODED_PICTURES == decode_stage._BATCH_PICTURES
