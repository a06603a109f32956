"""The fp16 graphs: equal to torch on ONNX Runtime, and taken by TensorRT's own parser with every name we refit."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from tiny_unet import SD1_LIKE, SD2_LIKE, SDXL_LIKE, TinyParts, tiny_parts

from hueshift.engines.adapted_unet import AdaptedUNet
from hueshift.engines.added_embedding import added_width
from hueshift.engines.base_model import BaseModel
from hueshift.engines.cross_attention import CrossLayout
from hueshift.engines.graph_writer import GRAPH_FILE
from hueshift.engines.interface import Plan
from hueshift.engines.onnx_engine import open_session
from hueshift.engines.onnx_export import export_graph
from hueshift.engines.parity import random_slabs
from hueshift.engines.rows import RowLayout, read_norms
from hueshift.engines.svd_cache import load_factors
from hueshift.engines.tensorrt_build import BuildSpec, build_plan, make_profile, mark_refittable, parse
from hueshift.engines.tensorrt_engine import TensorRtEngine
from hueshift.engines.tensorrt_loader import TensorRT, load_tensorrt
from hueshift.engines.tensorrt_plans import PlanRanges
from hueshift.engines.tensorrt_weights import refit_weights
from hueshift.engines.text_side import is_text_side
from hueshift.engines.torch_engine import example_added, example_inputs

# Stable Diffusion 1.5's and 2.1's blocks at a tenth of their width.
SD15_SHAPED = {
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "block_out_channels": [32, 64, 128, 128],
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
# SDXL's, with heads of width 64; 3 transformer layers stand for its 10.
SDXL_SHAPED = {
    **SDXL_LIKE,
    "block_out_channels": [32, 64, 64],
    "attention_head_dim": [1, 1, 1],
    "transformer_layers_per_block": [1, 2, 3],
    "norm_num_groups": 32,
}
ROLES = ("dense", "factored", "merged")
# TensorRT has no full plan: its parser refuses the TopK and Range that LAG's medians and shared attention need.
PLANS = TensorRtEngine.plans


def export(parts: TinyParts, folder: Path, role: str) -> Path:
    """The graph that a role's plan is built of."""
    rows = RowLayout(parts.base.layout, (), 4, False) if role == "merged" else parts.rows
    plan = Plan.FACTORED if role == "factored" else Plan.DENSE
    return export_graph(parts.base, parts.factors, rows, plan, folder, dtype=torch.float16)


def fp16_error(parts: TinyParts, folder: Path, plan: Plan, base: BaseModel) -> float:
    """Largest error of the fp16 graph on ONNX Runtime against torch in fp32, over the largest output or 1."""
    spectral, lowrank = random_slabs(parts.rows, parts.factors, parts.norms)
    latents, timesteps, cross, _ = example_inputs(base, 3)
    index, added = torch.arange(3), example_added(base, 3)
    unet = AdaptedUNet(base, parts.factors, parts.rows, plan, channels_last=False)
    with torch.no_grad():
        slab = spectral if plan is Plan.FACTORED else None
        expected = unet(latents, timesteps, cross, index, slab, lowrank, added)
    session = open_session(export(parts, folder, plan.value), 1)
    feeds = {
        "sample": latents.half(),
        "timestep": timesteps,
        "cross": cross.half(),
        "adapter_index": index,
        "spectral_slab": spectral,
        "lowrank_slab": lowrank,
        **({} if added is None else {"added": added.half()}),
    }
    names = {value.name for value in session.get_inputs()}
    out = torch.from_numpy(session.run(None, {k: v.numpy() for k, v in feeds.items() if k in names})[0]).float()
    return float((out - expected).abs().max()) / max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    "variant",
    [
        {**SD1_LIKE, **SD15_SHAPED, "attention_head_dim": 8},
        {**SD2_LIKE, **SD15_SHAPED, "attention_head_dim": [2, 4, 8, 8]},
        SDXL_SHAPED,
    ],
    ids=["sd15", "sd21", "sdxl"],
)
def test_sd_shaped_graph_equals_torch(tmp_path: Path, variant: dict[str, Any], plan: Plan) -> None:
    parts = tiny_parts(variant)
    found = fp16_error(parts, tmp_path, plan, parts.base)
    # Exactly zero would mean that nothing was rounded: a graph in fp32.
    assert 0 < found < 5e-3
    onnx.checker.check_model(str(next(tmp_path.glob(f"onnx/*/{GRAPH_FILE}"))), full_check=True)


@pytest.mark.parametrize("plan", PLANS)
def test_embedded_model_equals_torch(base_model: BaseModel, cache_dir: Path, tmp_path: Path, plan: Plan) -> None:
    layout = base_model.layout
    norms = read_norms(layout, lambda name: base_model.unet.get_parameter(f"{name}.weight"))
    parts = TinyParts(
        base_model, load_factors(base_model, cache_dir), RowLayout(layout, ("proj_out",), 4, False), norms
    )
    assert 0 < fp16_error(parts, tmp_path, plan, base_model) < 1e-2


def test_every_operator_gets_one_type(tiny: TinyParts, tmp_path: Path) -> None:
    """Strong typing: what mixes fp16 and fp32 without a cast would be refused."""
    for role in ROLES:
        model = onnx.load(export(tiny, tmp_path, role))
        typed = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
        types = {v.name: v.type.tensor_type.elem_type for v in (*typed.graph.value_info, *typed.graph.input)}
        types |= {weight.name: weight.data_type for weight in typed.graph.initializer}
        floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}
        for node in typed.graph.node:
            # A Resize takes its factors in fp32 by definition.
            kinds = {types[name] for name in node.input if name and types.get(name) in floats}
            assert len(kinds) <= 1 or node.op_type == "Resize", f"{role}: {node.name} mixes types"


@pytest.fixture(scope="module")
def real() -> TensorRT:
    """TensorRT itself: its parser and builder's front end need no GPU."""
    if importlib.util.find_spec("tensorrt_rtx_bindings") is None:
        pytest.skip("tensorrt_rtx_bindings (TensorRT's parser, which needs no GPU) is not installed")
    return load_tensorrt(importlib.import_module)


@pytest.mark.parametrize("role", ROLES)
def test_real_parser_takes_the_graph_with_its_names(
    real: TensorRT, any_architecture: TinyParts, tmp_path: Path, role: str
) -> None:
    builder = real.module.Builder(real.logger)
    network = real.create_network(builder)
    graph = export(any_architecture, tmp_path, role)
    parse(real, network, graph)
    kinds, rows = real.module.DataType, any_architecture.rows
    expected = {
        "sample": ((-1, 4, -1, -1), kinds.HALF),
        "timestep": ((-1,), kinds.FLOAT),
        "cross": ((-1, 5, CrossLayout(rows.layout).width), kinds.HALF),
    }
    if added_width(rows.layout):
        expected["added"] = ((-1, 64), kinds.HALF)
    if role != "merged":
        expected |= {
            "adapter_index": ((-1,), kinds.INT64),
            "lowrank_slab": ((-1, rows.lowrank_size), kinds.FLOAT),
        }
    if role == "factored":
        expected["spectral_slab"] = ((-1, rows.spectral_size), kinds.FLOAT)
    inputs = [network.get_input(number) for number in range(network.num_inputs)]
    assert {tensor.name: (tuple(tensor.shape), tensor.dtype) for tensor in inputs} == expected
    out = network.get_output(0)
    assert (out.name, tuple(out.shape), out.dtype) == ("out", (-1, 4, -1, -1), kinds.HALF)
    # Layers are more than nodes: weights are layers, and some operators are several.
    assert network.num_layers > len(onnx.load(graph, load_external_data=False).graph.node) / 2
    if role == "merged":
        names = [weight.name for weight in refit_weights(any_architecture.base.layout)]
        mark_refittable(network, names)
        assert all(network.are_weights_marked_refittable(name) for name in names)
    make_profile(builder, network, PlanRanges(4, (2, 8, 16), 5))


@pytest.mark.slow
def test_real_builder_builds_the_dense_plan_without_a_gpu(real: TensorRT, tiny: TinyParts, tmp_path: Path) -> None:
    if not real.is_rtx:
        pytest.skip("only TensorRT-RTX builds plans without a GPU")
    shares: list[int] = []
    spec = BuildSpec(export(tiny, tmp_path, "dense"), PlanRanges(4, (2, 8, 16), 5))
    built = build_plan(real, spec, lambda done, total: shares.append(done))
    assert len(built.data) > 1_000_000
    assert shares == sorted(shares)
    assert shares[-1] == 1000


def test_refit_map_covers_every_adapted_layer(any_architecture: TinyParts, tmp_path: Path) -> None:
    weights = refit_weights(any_architecture.base.layout)
    model = onnx.load(export(any_architecture, tmp_path, "merged"))
    stored = {i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()) for i in model.graph.initializer}
    layers = [name for name, _, _ in any_architecture.base.layout.spans() if not is_text_side(name)]
    assert [weight.layer for weight in weights] == layers
    for weight in weights:
        own = any_architecture.base.unet.get_parameter(f"{weight.layer}.weight").half()
        own = own.T if weight.is_transposed else own
        assert torch.equal(stored[weight.name].flatten(), own.flatten())
        assert stored[weight.name].numel() == weight.count
