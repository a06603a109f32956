"""Write the adapted UNet as an ONNX graph, once for each base model and plan, and keep it in a cache on disk.

The graph is the same for ONNX Runtime and TensorRT. Inputs: sample [batch, 4, height, width], timestep [batch], context
[batch, tokens, width], adapter_index [batch] int64, spectral_slab [slots, size] (factored plan only), lowrank_slab
[slots, size]; output: out. Batch, slots, height and width are dynamic, so one graph serves every size; dynamic sizes
cost nothing at run time in ONNX Runtime (100.7 against 101.9 ms at batch 2) and a few seconds of the one export.
"""

import hashlib
import inspect
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import structlog
import torch
from torch import Tensor
from torch.export import Dim

from hueshift.engines import adapted_layers, adapted_unet, graph_names
from hueshift.engines.adapted_unet import AdaptedUNet
from hueshift.engines.base_model import BaseModel
from hueshift.engines.cache_files import digest_file, exclusive, publish_folder
from hueshift.engines.interface import Plan
from hueshift.engines.rows import RowLayout
from hueshift.engines.svd_cache import SpectralFactors

OPSET = 18
INPUTS = ("sample", "timestep", "context", "adapter_index", "spectral_slab", "lowrank_slab")
OUTPUT = "out"
STEPS = 4
_GRAPH = "graph.onnx"
_MANIFEST = "manifest.json"
# A protobuf file ends at 2 GiB; the rest of that is room for the graph itself.
_INLINE_BYTES = 1_900_000_000
_log = structlog.get_logger()

Progress = Callable[[int, int], None]


def export_graph(
    base: BaseModel,
    factors: SpectralFactors,
    rows: RowLayout,
    plan: Plan,
    cache_dir: Path,
    progress: Progress | None = None,
) -> Path:
    """Return the graph file of `plan`, from `cache_dir` or exported and stored there.

    An entry counts only if every file in it has the digest of its manifest; a damaged one is logged and made again.
    `progress(done, STEPS)` is called while exporting.
    """
    folder = cache_dir / "onnx" / f"{base.base_hash[:12]}-{plan}-{graph_key(base, rows, plan)[:20]}"
    report = progress or (lambda done, total: None)
    with exclusive(folder):
        if not _is_whole(folder):
            unet = AdaptedUNet(base, factors, rows, plan, channels_last=False)
            publish_folder(folder, lambda path: _fill(path, unet, base, rows, report))
    return folder / _GRAPH


def graph_key(base: BaseModel, rows: RowLayout, plan: Plan) -> str:
    """SHA-256 of everything that decides what the graph holds: weights, rows, our code, and the libraries' versions."""
    identity = {
        "base": base.base_hash,
        "context": [base.max_tokens, base.layout.token_width],
        "plan": plan,
        "opset": OPSET,
        "spectral": rows.spectral_size,
        "targets": [(t.name, t.rank) for t in rows.targets],
        "dtype": str(next(base.unet.parameters()).dtype),
        "code": [_code_digest(module) for module in (adapted_layers, adapted_unet, graph_names)],
        "export": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "onnx", "onnxscript")},
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _fill(folder: Path, unet: AdaptedUNet, base: BaseModel, rows: RowLayout, report: Progress) -> None:
    report(0, STEPS)
    with _quiet():
        traced = _trace(unet, base, rows)
        report(1, STEPS)
        names = [name for name in INPUTS if name != "spectral_slab" or unet.plan is Plan.FACTORED]
        program: Any = torch.onnx.export(
            traced,
            (),
            dynamo=True,
            opset_version=OPSET,
            input_names=names,
            output_names=[OUTPUT],
            verbose=False,
        )
    report(2, STEPS)
    graph_names.tidy(program.model, dict(unet.named_parameters()))
    size = sum(p.numel() * p.element_size() for p in unet.parameters())
    program.save(folder / _GRAPH, external_data=size > _INLINE_BYTES)
    report(3, STEPS)
    onnx.checker.check_model(str(folder / _GRAPH))
    files = {file.name: digest_file(file) for file in sorted(folder.iterdir())}
    (folder / _MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    report(4, STEPS)


def _trace(unet: AdaptedUNet, base: BaseModel, rows: RowLayout) -> torch.export.ExportedProgram:
    factored = unet.plan is Plan.FACTORED
    dtype = next(unet.parameters()).dtype
    scale = 2 ** (len(base.unet.config.block_out_channels) - 1)  # type: ignore[union-attr, arg-type]
    # Distinct sizes, none of them 0 or 1: torch would take those for constants, and equal ones for one dimension.
    examples: list[Tensor | None] = [
        torch.zeros(3, base.latent_channels, 4 * scale, 6 * scale, dtype=dtype),
        torch.zeros(3),
        torch.zeros(3, base.max_tokens, base.layout.token_width, dtype=dtype),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(5, rows.spectral_size) if factored else None,
        torch.zeros(5, rows.lowrank_size),
    ]
    # diffusers copies tensors of 64 and more samples before it upsamples, which changes no value: below that the trace
    # has no such branch, and the graph takes any batch.
    batch, slots = Dim("batch", max=63), Dim("slots")
    height, width = Dim("height_blocks"), Dim("width_blocks")
    shapes = (
        {0: batch, 2: scale * height, 3: scale * width},
        {0: batch},
        {0: batch},
        {0: batch},
        {0: slots} if factored else None,
        {0: slots},
    )
    with torch.no_grad():
        return torch.export.export(unet, tuple(examples), dynamic_shapes=shapes, strict=False)


def _is_whole(folder: Path) -> bool:
    manifest = folder / _MANIFEST
    if not manifest.is_file():
        return False
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        whole = _GRAPH in files and all(digest_file(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("graph_cache_unreadable", entry=folder.name, error=str(error))
        return False
    if not whole:
        _log.warning("graph_cache_refused", entry=folder.name, problem="a digest does not fit")
    return whole


def _code_digest(module: ModuleType) -> str:
    return hashlib.sha256(inspect.getsource(module).encode()).hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes on its own future, and on optional packages, out of our logs."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
