"""Base models that the graph cannot express are refused before anything is written."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny_unet import SD1_LIKE, SDXL_LIKE, TinyParts, run, tiny_parts

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.engines.build import EngineOptions, build_engine
from hueshift.engines.graph_unet import write_unet
from hueshift.engines.interface import SLAB_PLANS, Plan

pytestmark = pytest.mark.usefixtures("one_thread")


def refusal_of(parts: TinyParts) -> str:
    with pytest.raises(InvalidArgument) as caught:
        write_unet(parts.base, parts.factors, parts.rows, Plan.DENSE)
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED
    assert "set engine.kind to torch" in caught.value.message
    return caught.value.message


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("act_fn", "gelu"),
        ("resnet_time_scale_shift", "scale_shift"),
        ("time_cond_proj_dim", 16),
        ("dual_cross_attention", True),
        ("only_cross_attention", True),
        ("mid_block_type", "UNetMidBlock2D"),
        ("timestep_post_act", "silu"),
        ("center_input_sample", True),
        ("downsample_padding", 0),
    ],
)
def test_settings_with_other_operations_are_refused(setting: str, value: object) -> None:
    message = refusal_of(tiny_parts({**SD1_LIKE, setting: value}))
    assert setting in message
    assert repr(value) in message


def test_bfloat16_is_refused() -> None:
    parts = tiny_parts(SD1_LIKE)
    parts.base.unet.bfloat16()
    assert "torch.bfloat16" in refusal_of(parts)


def test_layer_without_a_place_is_refused() -> None:
    class Extended(UNet2DConditionModel):  # type: ignore[misc]
        """A UNet with a layer that diffusers' has not."""

        def __init__(self, config: Mapping[str, Any]) -> None:
            super().__init__(**{key: value for key, value in config.items() if not key.startswith("_")})
            self.extra = torch.nn.Linear(3, 3)

    parts = tiny_parts(SD1_LIKE)
    config: Any = parts.base.unet.config
    wide = tiny_parts(SD1_LIKE, unet=Extended(config))
    assert "extra" in refusal_of(wide)


@pytest.mark.parametrize(
    "variant",
    [
        {"attention_head_dim": [1, 8]},
        {"layers_per_block": 2, "transformer_layers_per_block": 2},
        {"flip_sin_to_cos": False, "freq_shift": 1, "resnet_out_scale_factor": 1.5},
        {"only_cross_attention": [False, False], "block_out_channels": [16, 24], "norm_eps": 1e-3},
        {"block_out_channels": [8, 16, 32], "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2]}
        | {"up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"], "attention_head_dim": 4},
        SDXL_LIKE,
    ],
)
def test_variants_equal_diffusers(variant: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    parts = tiny_parts({**SD1_LIKE, **variant})
    options = EngineOptions(cache_dir=tmp_path_factory.mktemp("cache"), kind="onnxruntime", threads=1)
    engine = build_engine(parts.base, options)
    inputs, added = parts.inputs(2), parts.added(2)
    for plan in SLAB_PLANS:
        out = engine.denoise(plan, *inputs, torch.zeros(2, dtype=torch.int64), added)
        assert torch.allclose(out, run(parts.base.unet, *inputs, added), atol=2e-5)
