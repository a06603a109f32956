"""The UNet of Stable Diffusion 1.x, 2.x and XL as an ONNX graph, written from its modules.

torch's own exporter traces the same network twice with symbolic sizes and names folded weights by number: 26 s for the
dense graph of emoji-128 and 44 s for the factored one, where this takes 0.1 s (CPU time on a busy 2-core x86 CPU,
2026-11-20). Every graph is compared with torch before it serves (engines/parity.py). The order of operations is that of
diffusers' modules; a configuration that has other operations is refused.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.engines.added_embedding import added_width
from hueshift.engines.base_model import BaseModel
from hueshift.engines.cross_attention import CrossLayout
from hueshift.engines.graph_guides import MASK, GraphGuides
from hueshift.engines.graph_layers import GraphLayers
from hueshift.engines.graph_writer import GraphWriter
from hueshift.engines.interface import Plan
from hueshift.engines.rows import RowLayout
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.text_side import is_text_side

OUTPUT = "out"
_MAX_PERIOD = 10_000
# Settings of diffusers' UNet2DConditionModel that add or change an operation, and the value the graph is written for.
_WRITTEN_FOR: dict[str, Any] = {
    "act_fn": "silu",
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}


def write_unet(
    base: BaseModel, factors: SpectralFactors, rows: RowLayout, plan: Plan, dtype: torch.dtype | None = None
) -> GraphWriter:
    """Write the graph in `dtype` (that of the weights if None); inputs and outputs as in onnx_export.

    Raises InvalidArgument (MODEL_UNSUPPORTED) naming the setting or layer that the graph cannot express.
    """
    unet: Any = base.unet
    dtype = dtype or unet.dtype
    _check(base, unet.config, dtype)
    graph = GraphWriter()
    size: list[int | str] = ["batch", base.latent_channels, "height", "width"]
    sample = graph.input("sample", dtype, size)
    timestep = graph.input("timestep", torch.float32, ["batch"])
    layout = CrossLayout(rows.layout)
    cross = graph.input("cross", dtype, ["batch", base.max_tokens, layout.width])
    width = added_width(rows.layout)
    added = graph.input("added", dtype, ["batch", width]) if width else ""
    network = _Network(graph, GraphLayers(graph, rows, factors, plan, dtype), unet, dtype)
    if plan is Plan.FULL:
        network.guides = GraphGuides(graph, network.layers, base.max_tokens, dtype)
    graph.output(OUTPUT, network.run(sample, timestep, network.cut(cross, layout), added), dtype, size)
    if network.guides is not None:
        graph.output(MASK, network.guides.picture(sample), torch.float32, ["batch", "height", "width"])
    expected = {name for name, _, _ in rows.layout.spans() if not is_text_side(name)}
    if network.layers.written != expected:
        odd = sorted(network.layers.written ^ expected)
        raise _refusal(base, f"its layers {', '.join(odd[:4])} have no place in the architecture")
    return graph


class _Network:
    """The forward pass, module by module. Names are those of the modules; results are names of values."""

    def __init__(self, graph: GraphWriter, layers: GraphLayers, unet: Any, dtype: torch.dtype) -> None:
        self.graph = graph
        self.layers = layers
        self.unet = unet
        self.dtype = dtype
        self.guides: GraphGuides | None = None
        self.cross: Mapping[str, str] = {}
        self.time = ""

    def cut(self, cross: str, layout: CrossLayout) -> dict[str, str]:
        """Cut the input into the keys and values [batch, tokens, width] of each cross-attention."""
        self.graph.scope = "cross"
        sizes = self.graph.integers(*(end - begin for begin, end in layout.spans.values()))
        parts = self.graph.ops("Split", len(layout.spans), cross, sizes, axis=2)
        return dict(zip(layout.spans, parts, strict=True))

    def run(self, sample: str, timestep: str, cross: Mapping[str, str], added: str) -> str:
        unet, layers = self.unet, self.layers
        self.cross = cross
        time = self.time_embedding(timestep)
        self.time = self.silu(self.graph.op("Add", time, added) if added else time)
        x = layers.conv("conv_in", unet.conv_in, sample)
        skips = [x]
        for i, block in enumerate(unet.down_blocks):
            at = f"down_blocks.{i}"
            for j, resnet in enumerate(block.resnets):
                x = self.stage(at, j, block, resnet, x)
                skips.append(x)
            for j, downsampler in enumerate(block.downsamplers or ()):
                x = layers.conv(f"{at}.downsamplers.{j}.conv", downsampler.conv, x)
                skips.append(x)
        x = self.resnet("mid_block.resnets.0", unet.mid_block.resnets[0], x)
        for j, attention in enumerate(unet.mid_block.attentions):
            x = self.transformer(f"mid_block.attentions.{j}", attention, x)
            x = self.resnet(f"mid_block.resnets.{j + 1}", unet.mid_block.resnets[j + 1], x)
        for i, block in enumerate(unet.up_blocks):
            at = f"up_blocks.{i}"
            for j, resnet in enumerate(block.resnets):
                x = self.graph.op("Concat", x, skips.pop(), axis=1)
                x = self.stage(at, j, block, resnet, x)
            for j, upsampler in enumerate(block.upsamplers or ()):
                x = self.twice(f"{at}.upsamplers.{j}", x)
                x = layers.conv(f"{at}.upsamplers.{j}.conv", upsampler.conv, x)
        x = self.silu(layers.group_norm("conv_norm_out", unet.conv_norm_out, x))
        return layers.conv("conv_out", unet.conv_out, x)

    def stage(self, at: str, j: int, block: Any, resnet: Any, x: str) -> str:
        x = self.resnet(f"{at}.resnets.{j}", resnet, x)
        if getattr(block, "has_cross_attention", False):
            x = self.transformer(f"{at}.attentions.{j}", block.attentions[j], x)
        return x

    def time_embedding(self, timestep: str) -> str:
        """Sinusoids of the timestep (Vaswani et al. 2017, section 3.5) in fp32, then two linear layers."""
        graph, settings, module = self.graph, self.unet.time_proj, self.unet.time_embedding
        graph.scope = "time_proj"
        half = settings.num_channels // 2
        exponent = -math.log(_MAX_PERIOD) * torch.arange(half, dtype=torch.float32)
        frequencies = torch.exp(exponent / (half - settings.downscale_freq_shift))[None] * settings.scale
        angle = graph.op("Unsqueeze", timestep, graph.integers(1))
        angle = graph.op("Mul", angle, graph.weight("time_proj.frequencies", frequencies, torch.float32))
        waves = [graph.op("Sin", angle), graph.op("Cos", angle)]
        embedding = graph.op("Concat", *(reversed(waves) if settings.flip_sin_to_cos else waves), axis=1)
        if self.dtype != torch.float32:
            embedding = graph.cast(embedding, self.dtype)
        hidden = self.layers.linear("time_embedding.linear_1", module.linear_1, embedding, dims=2)
        return self.layers.linear("time_embedding.linear_2", module.linear_2, self.silu(hidden), dims=2)

    def resnet(self, at: str, module: Any, x: str) -> str:
        graph, layers = self.graph, self.layers
        hidden = self.silu(layers.group_norm(f"{at}.norm1", module.norm1, x))
        hidden = layers.conv(f"{at}.conv1", module.conv1, hidden)
        time = layers.linear(f"{at}.time_emb_proj", module.time_emb_proj, self.time, dims=2)
        hidden = graph.op("Add", hidden, graph.op("Unsqueeze", time, graph.integers(2, 3)))
        hidden = self.silu(layers.group_norm(f"{at}.norm2", module.norm2, hidden))
        hidden = layers.conv(f"{at}.conv2", module.conv2, hidden)
        if module.conv_shortcut is not None:
            x = layers.conv(f"{at}.conv_shortcut", module.conv_shortcut, x)
        return self.times(graph.op("Add", x, hidden), 1 / module.output_scale_factor)

    def transformer(self, at: str, module: Any, x: str) -> str:
        layers, residual = self.layers, x
        if self.guides is not None:
            self.guides.enter(at, residual)
        x = layers.group_norm(f"{at}.norm", module.norm, x)
        if module.use_linear_projection:
            x = layers.linear(f"{at}.proj_in", module.proj_in, self.to_tokens(x, module.in_channels))
        else:
            x = layers.conv(f"{at}.proj_in", module.proj_in, x)
            x = self.to_tokens(x, module.inner_dim)
        for i, block in enumerate(module.transformer_blocks):
            x = self.block(f"{at}.transformer_blocks.{i}", block, x)
        if module.use_linear_projection:
            x = self.to_pixels(layers.linear(f"{at}.proj_out", module.proj_out, x), residual, module.in_channels)
        else:
            x = layers.conv(f"{at}.proj_out", module.proj_out, self.to_pixels(x, residual, module.inner_dim))
        return self.graph.op("Add", x, residual)

    def block(self, at: str, module: Any, x: str) -> str:
        """Self-attention, cross-attention and feed-forward, each after a norm and with a residual."""
        graph, layers = self.graph, self.layers
        normal = layers.layer_norm(f"{at}.norm1", module.norm1, x)
        x = graph.op("Add", self.attention(f"{at}.attn1", module.attn1, normal), x)
        normal = layers.layer_norm(f"{at}.norm2", module.norm2, x)
        x = graph.op("Add", self.attention(f"{at}.attn2", module.attn2, normal), x)
        normal = layers.layer_norm(f"{at}.norm3", module.norm3, x)
        gated = layers.linear(f"{at}.ff.net.0.proj", module.ff.net[0].proj, normal)
        half = module.ff.net[0].proj.out_features // 2
        value, gate = graph.ops("Split", 2, gated, graph.integers(half, half), axis=2)
        hidden = graph.op("Mul", value, self.gelu(gate))
        return graph.op("Add", layers.linear(f"{at}.ff.net.2", module.ff.net[2], hidden), x)

    def attention(self, at: str, module: Any, x: str) -> str:
        """Attention of positions [batch, positions, width] to themselves, or to the keys and values given for `at`."""
        graph, layers, heads = self.graph, self.layers, module.heads
        crossed = f"{at}.to_k" in self.cross
        query = layers.linear(f"{at}.to_q", module.to_q, x)
        key = self.cross[f"{at}.to_k"] if crossed else layers.linear(f"{at}.to_k", module.to_k, x)
        value = self.cross[f"{at}.to_v"] if crossed else layers.linear(f"{at}.to_v", module.to_v, x)
        width = module.to_q.out_features // heads
        graph.scope = at
        query, key, value = (
            graph.op("Transpose", graph.reshape(part, 0, 0, heads, width), perm=[0, 2, 1, 3])
            for part in (query, key, value)
        )
        if self.guides is not None and not crossed:
            query, key, value = self.guides.share(query, key, value)
        key = graph.op("Transpose", key, perm=[0, 1, 3, 2])
        # Scaling the query, not the larger scores, and before the product, keeps fp16 in range.
        scores = graph.op("Softmax", graph.op("MatMul", self.times(query, width**-0.5), key), axis=-1)
        if self.guides is not None and crossed:
            self.guides.confine(at, scores)
        mixed = graph.op("Transpose", graph.op("MatMul", scores, value), perm=[0, 2, 1, 3])
        return layers.linear(f"{at}.to_out.0", module.to_out[0], graph.reshape(mixed, 0, 0, heads * width))

    def to_tokens(self, x: str, channels: int) -> str:
        return self.graph.op("Transpose", self.graph.reshape(x, 0, channels, -1), perm=[0, 2, 1])

    def to_pixels(self, tokens: str, like: str, channels: int) -> str:
        graph = self.graph
        sides = graph.op("Shape", like, start=2)
        shape = graph.op("Concat", graph.integers(0, channels), sides, axis=0)
        return graph.op("Reshape", graph.op("Transpose", tokens, perm=[0, 2, 1]), shape)

    def twice(self, at: str, x: str) -> str:
        self.graph.scope = at
        options = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        return self.graph.op("Resize", x, "", self.graph.numbers(1, 1, 2, 2), **options)

    def silu(self, x: str) -> str:
        return self.graph.op("Mul", x, self.graph.op("Sigmoid", x))

    def gelu(self, x: str) -> str:
        """The exact one, in the form that runtimes know to fuse (Hendrycks and Gimpel 2016)."""
        graph, dtype = self.graph, self.dtype
        erf = graph.op("Erf", graph.op("Div", x, graph.number(math.sqrt(2), dtype)))
        product = graph.op("Mul", x, graph.op("Add", erf, graph.number(1.0, dtype)))
        return graph.op("Mul", product, graph.number(0.5, dtype))

    def times(self, x: str, factor: float) -> str:
        return x if factor == 1 else self.graph.op("Mul", x, self.graph.number(factor, self.dtype))


def _check(base: BaseModel, config: Any, dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float16):
        raise _refusal(base, f"its weights are {dtype} (the graph takes torch.float32 and torch.float16)")
    for name, expected in _WRITTEN_FOR.items():
        given = config.get(name, expected)
        if given != expected and not _all_are(given, expected):
            raise _refusal(base, f"its UNet has {name} {given!r} (the graph is written for {expected!r})")


def _all_are(given: Any, expected: Any) -> bool:
    return isinstance(given, Iterable) and not isinstance(given, str) and all(value == expected for value in given)


def _refusal(base: BaseModel, problem: str) -> InvalidArgument:
    return InvalidArgument(
        Reason.MODEL_UNSUPPORTED, f"{base.name} cannot run on exported graphs: {problem}; set engine.kind to torch"
    )
