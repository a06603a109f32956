"""A graph beyond 2 GiB, honestly: a whole SD1.5- or SDXL-shaped UNet of random weights is exported, checked and parsed.

Writes the dense graph, runs onnx.checker on it by path, and TensorRT's own parser where it is installed: no errors, and
the inputs and outputs of onnx_export. Appends a line with seconds, bytes and peak memory to
benchmarks/results/export_large.jsonl. Needs as much free disk as the weights take, and that much memory twice over.
"""

import argparse
import importlib
import importlib.util
import json
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import torch
from diffusers import UNet2DConditionModel

from hueshift.engines.base_model import BaseModel, read_layout
from hueshift.engines.graph_unet import write_unet
from hueshift.engines.graph_writer import GRAPH_FILE
from hueshift.engines.interface import Plan
from hueshift.engines.noise_schedule import NoiseSchedule
from hueshift.engines.rows import RowLayout
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.tensorrt_build import parse
from hueshift.engines.tensorrt_loader import load_tensorrt

RESULTS = Path(__file__).resolve().parent / "results" / "export_large.jsonl"
SHAPES: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768},
    "sdxl": {
        "sample_size": 128,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [320, 640, 1280],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "cross_attention_dim": 2048,
    },
}
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def make_base(shape: str, dtype: torch.dtype) -> BaseModel:
    """A base model without text encoder and VAE; its weights are small random numbers."""
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**SHAPES[shape]).to(dtype)
    unet = unet.to_empty(device="cpu").eval().requires_grad_(False)
    for tensor in unet.parameters():
        tensor.uniform_(-0.02, 0.02)
    width = SHAPES[shape]["cross_attention_dim"]
    nothing: Any = None
    return BaseModel(
        name=shape,
        path=Path(shape),
        base_hash=f"{shape:0<64}",
        unet=unet,
        vae=nothing,
        text_encoder=SimpleNamespace(config=SimpleNamespace(max_position_embeddings=77, hidden_size=width)),
        tokenizer=nothing,
        schedule=NoiseSchedule.from_config({}),
        layout=read_layout(unet, f"{shape:0<64}", width),
        latent_channels=4,
        latent_factor=8,
        sample_size=SHAPES[shape]["sample_size"],
        size_multiple=32,
    )


def timed(what: Callable[[], object], row: dict[str, object], name: str) -> None:
    """Run a stage; note its seconds and the largest resident memory of the process so far, in GB."""
    begin = time.perf_counter()
    what()
    row[f"{name}_s"] = round(time.perf_counter() - begin, 1)
    row[f"{name}_peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)
    print(f"{name}: {row[f'{name}_s']} s, peak {row[f'{name}_peak_gb']} GB", file=sys.stderr)


def parse_graph(graph: Path, row: dict[str, object]) -> None:
    """Give the graph to TensorRT's parser; note its inputs, outputs and layers. Raises TensorRtError on an error."""
    trt = load_tensorrt(importlib.import_module)
    builder = trt.module.Builder(trt.logger)
    network = trt.create_network(builder)
    parse(trt, network, graph)
    tensors = [network.get_input(number) for number in range(network.num_inputs)] + [network.get_output(0)]
    row["parsed"] = {tensor.name: [*tensor.shape, str(tensor.dtype).rpartition(".")[2]] for tensor in tensors}
    row["parsed_layers"] = network.num_layers
    row["versions"] = {**dict(_pairs(row["versions"])), trt.name: trt.version}


def _pairs(value: object) -> list[tuple[str, str]]:
    return list(value.items()) if isinstance(value, dict) else []


def run(shape: str, dtype: str, folder: Path) -> dict[str, object]:
    """Export, check and parse; return the row of results."""
    row: dict[str, object] = {
        "bench": "export_large",
        "case": f"{shape}-dense-{dtype}",
        "hardware": f"{os.cpu_count()}-core {platform.machine()} CPU",
        "versions": {name: version(name) for name in ("torch", "diffusers", "onnx")},
        "date": datetime.now(UTC).date().isoformat(),
    }
    made: list[BaseModel] = []
    timed(lambda: made.append(make_base(shape, DTYPES[dtype])), row, "model")
    rows = RowLayout(made[0].layout, ("proj_out",), 16, text_side=False)
    timed(lambda: write_unet(made[0], SpectralFactors({}, {}, {}), rows, Plan.DENSE).save(folder), row, "write")
    row["bytes"] = sum(file.stat().st_size for file in folder.iterdir())
    row["ms"] = float(str(row["write_s"])) * 1000
    row["case"] = f"{row['case']}, {int(str(row['bytes'])) / 1e9:.1f} GB written"
    # So that what follows does not count the model.
    made.clear()
    timed(lambda: onnx.checker.check_model(str(folder / GRAPH_FILE)), row, "checker")
    if importlib.util.find_spec("tensorrt_rtx_bindings") is not None:
        timed(lambda: parse_graph(folder / GRAPH_FILE, row), row, "parser")
    return row


def main() -> None:
    """Run one case and append its row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="sdxl")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp16")
    parser.add_argument("--folder", type=Path, help="where the graph is written for a while (default: a temporary one)")
    options = parser.parse_args()
    need = 8 * 2**30
    if shutil.disk_usage(options.folder or tempfile.gettempdir()).free < need:
        parser.exit(1, "skipped: less than 8 GiB of disk are free; give another --folder\n")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        row = run(options.shape, options.dtype, Path(folder))
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
