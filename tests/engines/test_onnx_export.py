"""Exported graphs on disk: valid, named, cached by content, and never trusted when damaged."""

import importlib.util
import json
import threading
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from structlog.testing import capture_logs
from tiny_unet import SD1_LIKE, TinyParts, tiny_parts
from torch import Tensor

from hueshift.engines.added_embedding import added_width
from hueshift.engines.cross_attention import CrossLayout
from hueshift.engines.graph_unet import write_unet
from hueshift.engines.graph_writer import GRAPH_FILE, WEIGHTS_FILE
from hueshift.engines.interface import SLAB_PLANS, Plan
from hueshift.engines.onnx_export import STEPS, entry_folder, export_graph
from hueshift.engines.rows import RowLayout
from hueshift.engines.text_side import is_text_side

pytestmark = pytest.mark.usefixtures("one_thread")


def export(parts: TinyParts, folder: Path, plan: Plan = Plan.FACTORED, steps: list[int] | None = None) -> Path:
    """Export, noting the steps that were reported."""
    report = None if steps is None else lambda done, total: steps.append(done)
    return export_graph(parts.base, parts.factors, parts.rows, plan, folder, report)


def shapes_of(values: Any) -> dict[str, list[int | str]]:
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


@pytest.mark.parametrize("plan", SLAB_PLANS)
def test_graph_has_the_promised_inputs(any_architecture: TinyParts, tmp_path: Path, plan: Plan) -> None:
    model = onnx.load(export(any_architecture, tmp_path, plan), load_external_data=False)
    rows = any_architecture.rows
    expected: dict[str, list[int | str]] = {
        "sample": ["batch", 4, "height", "width"],
        "timestep": ["batch"],
        "cross": ["batch", 5, CrossLayout(rows.layout).width],
        "adapter_index": ["batch"],
        "spectral_slab": ["slots", rows.spectral_size],
        "lowrank_slab": ["slots", rows.lowrank_size],
    }
    if added_width(rows.layout):
        expected["added"] = ["batch", 64]
    if plan is Plan.DENSE:
        del expected["spectral_slab"]
    outputs: dict[str, list[int | str]] = {"out": ["batch", 4, "height", "width"]}
    if plan is Plan.FULL:
        expected |= {"lag": ["batch", 5], "lag_source": ["batch"], "reference": ["batch"]}
        outputs["mask"] = ["batch", "height", "width"]
    assert shapes_of(model.graph.input) == expected
    assert shapes_of(model.graph.output) == outputs
    assert model.opset_import[0].version >= 18


@pytest.mark.parametrize("plan", SLAB_PLANS)
def test_every_weight_lies_under_its_own_name(any_tiny: TinyParts, tmp_path: Path, plan: Plan) -> None:
    model = onnx.load(export(any_tiny, tmp_path, plan))
    weights = {i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()) for i in model.graph.initializer}
    factors = any_tiny.factors
    for layer in any_tiny.base.layout.matrices:
        if is_text_side(layer.name):
            assert not any(name.startswith(f"{layer.name}.") for name in weights), "it is an input"
            continue
        if plan is Plan.DENSE:
            own: dict[str, Tensor] = {"weight": any_tiny.base.unet.get_parameter(f"{layer.name}.weight")}
        else:
            own = {"u": factors.u[layer.name], "vh": factors.vh[layer.name]}
        for leaf, tensor in own.items():
            if layer.is_conv:
                stored = weights[f"{layer.name}.{leaf}"]
                assert torch.equal(stored.flatten(), tensor.flatten())
            else:
                assert torch.equal(weights[f"{layer.name}.{leaf}.transposed"], tensor.T)
    for norm in any_tiny.base.layout.norms:
        assert f"{norm.name}.bias" in weights
        assert (f"{norm.name}.weight" in weights) == (plan is Plan.DENSE)


def test_graph_tells_nothing_of_this_machine(tiny: TinyParts, tmp_path: Path) -> None:
    file = export(tiny, tmp_path)
    data = file.read_bytes()
    for secret in (str(tmp_path), str(Path(__file__).parent), str(Path(torch.__file__).parent)):
        assert secret.encode() not in data


def test_same_model_gives_the_same_bytes(tiny: TinyParts, tmp_path: Path) -> None:
    files = [export(tiny, tmp_path / name) for name in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].with_name(WEIGHTS_FILE).read_bytes() == files[1].with_name(WEIGHTS_FILE).read_bytes()


def test_second_export_is_a_cache_hit(tiny: TinyParts, tmp_path: Path) -> None:
    steps: list[int] = []
    file = export(tiny, tmp_path, steps=steps)
    assert steps == list(range(STEPS + 1))
    stamp = file.stat().st_mtime_ns
    assert export(tiny, tmp_path, steps=steps) == file
    assert len(steps) == STEPS + 1
    assert file.stat().st_mtime_ns == stamp


def test_key_changes_with_what_the_graph_holds(tiny: TinyParts, tiny_sd2: TinyParts, tmp_path: Path) -> None:
    base, layout = tiny.base, tiny.base.layout
    folders = {
        entry_folder(base, tiny.rows, Plan.DENSE, tmp_path),
        entry_folder(base, tiny.rows, Plan.FACTORED, tmp_path),
        entry_folder(base, RowLayout(layout, ("proj_out",), 4), Plan.DENSE, tmp_path),
        entry_folder(base, RowLayout(layout, ("proj_out",), 3), Plan.DENSE, tmp_path),
        entry_folder(tiny_sd2.base, tiny_sd2.rows, Plan.DENSE, tmp_path),
    }
    assert len(folders) == 5
    assert entry_folder(base, tiny.rows, Plan.DENSE, tmp_path) in folders


@pytest.mark.parametrize(
    "damage", ["weights flipped", "graph cut", "weights gone", "no manifest", "manifest odd", "manifest empty"]
)
def test_damaged_entry_is_noticed_and_made_again(tiny: TinyParts, tmp_path: Path, damage: str) -> None:
    file = export(tiny, tmp_path)
    whole = {path.name: path.read_bytes() for path in file.parent.iterdir()}
    weights, manifest = file.with_name(WEIGHTS_FILE), file.with_name("manifest.json")
    if damage == "weights flipped":
        data = bytearray(whole[WEIGHTS_FILE])
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)
    elif damage == "graph cut":
        file.write_bytes(whole[GRAPH_FILE][:1000])
    elif damage == "weights gone":
        weights.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "manifest odd":
        manifest.write_text(json.dumps(["files"]))
    else:
        manifest.write_text(json.dumps({"files": {}}))
    steps: list[int] = []
    with capture_logs() as logs:
        export(tiny, tmp_path, steps=steps)
    assert steps, "it was exported again"
    assert [log["log_level"] for log in logs] == ["warning"]
    assert {path.name: path.read_bytes() for path in file.parent.iterdir()} == whole


def test_export_cut_short_leaves_no_entry(tiny: TinyParts, tmp_path: Path) -> None:
    class PowerCutError(Exception):
        pass

    def cut(done: int, total: int) -> None:
        if done == 2:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        export_graph(tiny.base, tiny.factors, tiny.rows, Plan.DENSE, tmp_path, cut)
    assert not [path for path in (tmp_path / "onnx").iterdir() if path.is_dir()]
    assert export(tiny, tmp_path, Plan.DENSE).is_file()


def test_concurrent_exports_make_one_entry(tiny: TinyParts, tmp_path: Path) -> None:
    steps: list[int] = []
    threads = [threading.Thread(target=export, args=(tiny, tmp_path, Plan.DENSE, steps)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert steps == list(range(STEPS + 1))


def test_half_precision_graph_is_valid(tmp_path: Path) -> None:
    parts = tiny_parts(SD1_LIKE)
    parts.base.unet.half()
    for plan in SLAB_PLANS:
        model = onnx.load(export(parts, tmp_path, plan))
        onnx.checker.check_model(model, full_check=True)
        types = {i.name: i.type.tensor_type.elem_type for i in (*model.graph.input, *model.graph.output)}
        half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
        assert (types["sample"], types["cross"], types["out"]) == (half, half, half)
        assert (types["timestep"], types["lowrank_slab"]) == (single, single)


@pytest.mark.parametrize("targets", [(), ("proj_out", "to_k")])
@pytest.mark.parametrize("plan", SLAB_PLANS)
def test_full_shape_inference_passes(tiny: TinyParts, tmp_path: Path, plan: Plan, targets: tuple[str, ...]) -> None:
    write_unet(tiny.base, tiny.factors, RowLayout(tiny.base.layout, targets, 4), plan).save(tmp_path)
    onnx.checker.check_model(onnx.load(tmp_path / GRAPH_FILE), full_check=True)


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None,
    reason="tensorrt_rtx_bindings (TensorRT's parser, which needs no GPU) is not installed",
)
@pytest.mark.parametrize("plan", [Plan.DENSE, Plan.FACTORED])  # the only ones that TensorRT serves
def test_tensorrt_parser_accepts_the_graph(any_tiny: TinyParts, tmp_path: Path, plan: Plan) -> None:
    trt = importlib.import_module("tensorrt_rtx_bindings")
    network = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_network(0)
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    parsed = parser.parse_from_file(str(export(any_tiny, tmp_path, plan)))
    assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    assert network.num_inputs == (5 if plan is Plan.DENSE else 6)
