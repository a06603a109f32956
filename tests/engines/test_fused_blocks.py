"""Fused blocks against diffusers' own, with the names and parameters they had, and where networks use them."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from tiny_unet import TinyParts
from torch import Tensor, nn

from hueshift.engines.adapted_layers import CallRows, RowGroupNorm, RowLayerNorm
from hueshift.engines.cuda_engine import CudaEngine
from hueshift.engines.cuda_lane import HostLane
from hueshift.engines.cuda_layers import SlabRows
from hueshift.engines.cuda_options import CompileKind, CudaOptions, KernelUse
from hueshift.engines.fused_blocks import (
    FusedGroupNorm,
    FusedResnet,
    FusedTransformer,
    PixelLinear,
    fuse_blocks,
)
from hueshift.engines.fused_tokens import FusedGate, FusedLayerNorm, FusedTokenBlock
from hueshift.engines.interface import Plan
from hueshift.engines.merged_slots import BASE_ROLE

pytestmark = pytest.mark.usefixtures("one_thread")


def picture(channels: int, samples: int = 2) -> Tensor:
    """Pictures of an odd size in channels_last."""
    return torch.randn(samples, channels, 5, 7).contiguous(memory_format=torch.channels_last)


def rows_of(sigma: dict[str, Tensor], slots: list[int]) -> SlabRows:
    """Slabs of norms' weights, and the slots of a call."""
    return SlabRows(sigma, {}, torch.ones(4), slots=torch.tensor(slots))


def randomise(network: nn.Module) -> None:
    """Give norms weights that are not ones."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)


class Holder(nn.Module):
    """Something that holds one block by a name."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *inputs: Any) -> Any:
        """Run it."""
        return self.block(*inputs)


@pytest.mark.parametrize("channels", [(8, 8), (8, 12)])
@torch.no_grad()
def test_a_residual_block_equals_diffusers(channels: tuple[int, int]) -> None:
    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=channels[0], out_channels=channels[1], temb_channels=6, groups=4).eval()
    randomise(block)
    x, temb = picture(channels[0]), torch.randn(2, 6)
    expected, names = block(x, temb), dict(block.named_parameters())
    holder = Holder(block)
    # Two norms and the block itself; the shortcut's convolution where the channels change.
    assert fuse_blocks(holder, rows_of({}, [0, 0])) == 3 + (channels[0] != channels[1])
    assert isinstance(holder.block, FusedResnet)
    found = holder(x, temb)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)
    after = dict(holder.block.named_parameters())
    assert {name: id(part) for name, part in after.items()} == {name: id(part) for name, part in names.items()}


@pytest.mark.parametrize(
    "change",
    [{"time_embedding_norm": "scale_shift"}, {"down": True}, {"output_scale_factor": 2.0}, {"non_linearity": "gelu"}],
)
@torch.no_grad()
def test_a_block_of_another_kind_keeps_its_way_and_its_result(change: dict[str, Any]) -> None:
    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=8, out_channels=8, temb_channels=6, groups=4, **change).eval()
    randomise(block)
    x, temb = picture(8), torch.randn(2, 6)
    expected = block(x, temb)
    holder = Holder(block)
    fuse_blocks(holder, rows_of({}, [0, 0]))
    assert isinstance(holder.block, ResnetBlock2D)
    torch.testing.assert_close(holder(x, temb), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_norms_read_the_weights_of_each_samples_slot() -> None:
    torch.manual_seed(0)
    slab = torch.rand(4, 20) + 0.5
    group, layer = nn.GroupNorm(4, 8), nn.LayerNorm(12)
    randomise(group)
    randomise(layer)
    rows = rows_of({"group": slab[:, :8], "layer": slab[:, 8:]}, [3, 1])
    plain = CallRows(values={"group": slab[[3, 1], :8], "layer": slab[[3, 1], 8:]})
    row_group, row_layer = RowGroupNorm("group", plain, group), RowLayerNorm("layer", plain, layer)
    x, tokens = picture(8), torch.randn(2, 9, 12)
    torch.testing.assert_close(FusedGroupNorm(row_group, rows)(x), row_group(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(FusedLayerNorm(row_layer, rows)(tokens), row_layer(tokens), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_gates_and_products_on_pixels_equal_diffusers() -> None:
    torch.manual_seed(0)
    gate, convolution = GEGLU(6, 10), nn.Conv2d(8, 12, 1)
    tokens, x = torch.randn(2, 9, 6), picture(8)
    torch.testing.assert_close(FusedGate(gate)(tokens), gate(tokens), rtol=1e-5, atol=1e-6)
    found = PixelLinear(convolution)(x)
    torch.testing.assert_close(found, convolution(x), rtol=1e-5, atol=1e-6)
    assert found.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_a_whole_unet_equals_diffusers_and_keeps_the_names_of_its_weights(any_architecture: TinyParts) -> None:
    parts = any_architecture
    unet: Any = UNet2DConditionModel.from_config(parts.base.unet.config).eval()
    unet.to(memory_format=torch.channels_last)
    names = {name for name, _ in unet.named_parameters()}
    sample = torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    given: dict[str, Any] = {"encoder_hidden_states": torch.randn(2, 5, unet.config.cross_attention_dim)}
    if unet.config.addition_embed_type:
        given["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 20), "time_ids": torch.rand(2, 6)}
    expected = unet(sample, 500, **given).sample
    assert fuse_blocks(unet, rows_of({}, [0, 0])) > 10
    kinds = {type(module) for module in unet.modules()}
    assert kinds >= {FusedResnet, FusedTransformer, FusedTokenBlock, FusedGroupNorm, FusedGate}
    assert not kinds & {ResnetBlock2D, Transformer2DModel, BasicTransformerBlock, nn.GroupNorm, nn.LayerNorm, GEGLU}
    torch.testing.assert_close(unet(sample, 500, **given).sample, expected, rtol=1e-4, atol=1e-5)
    assert {name for name, _ in unet.named_parameters()} == names


def make_engine(parts: TinyParts, compile: CompileKind, kernels: KernelUse) -> CudaEngine:
    """An engine with merged weights."""
    options = CudaOptions(warm_sizes=((8, 8),), max_area=64, weight_slots=1, compile=compile, kernels=kernels)
    return CudaEngine(
        parts.base, parts.factors, parts.rows, parts.norms, slots=3, max_batch=2, lane=HostLane(), options=options
    )


@pytest.mark.parametrize(
    ("compile", "kernels", "fused"),
    [
        (CompileKind.GRAPH, KernelUse.ON, True),
        (CompileKind.GRAPH, KernelUse.OFF, False),
        (CompileKind.INDUCTOR, KernelUse.ON, False),
    ],
)
def test_networks_are_fused_with_the_kernels_unless_torch_compiles_them(
    tiny: TinyParts, compile: CompileKind, kernels: KernelUse, fused: bool
) -> None:
    networks = make_engine(tiny, compile, kernels).networks
    networks.settle()
    for role in (Plan.DENSE.value, Plan.FACTORED.value, "merged 0", BASE_ROLE):
        assert bool(networks.named(role).unet.fused_blocks) is fused, role


def test_merged_weights_are_read_by_fused_blocks(tiny: TinyParts) -> None:
    plain, fused = (make_engine(tiny, CompileKind.GRAPH, use) for use in (KernelUse.OFF, KernelUse.ON))
    fused.networks.settle()
    inputs = tiny.inputs(2)
    found = []
    for engine in (plain, fused):
        engine.load_row(1, tiny.row((tiny.random_adapter(1), 1.0)))
        engine.merge(1)
        found.append(engine.denoise(Plan.MERGED, *inputs, torch.tensor([1, 1])))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    base = plain.denoise(Plan.FACTORED, *inputs, torch.tensor([0, 0]))
    assert float((found[1] - base).abs().max()) > 1e-3
