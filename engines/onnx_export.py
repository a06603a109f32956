"""The exported graphs of a base model: written once for each plan, kept in a cache on disk, checked when read.

The graph is the same for ONNX Runtime and TensorRT. Inputs: sample [batch, 4, height, width], timestep [batch] fp32,
cross [batch, tokens, width] (keys and values, see cross_attention), added [batch, width] (SDXL's, see added_embedding),
adapter_index [batch] int64 (if there is a slab),
spectral_slab [slots, size] fp32 (factored and full plans), lowrank_slab [slots, size] fp32 (if there are low-rank
targets); output: out, like sample. The full plan also has the inputs of graph_guides and the output mask.
Batch, slots, height and width are dynamic, so one graph serves every size (height and width a multiple of 2 to the
number of downsamplings). sample, cross, added and out have the dtype of the graph: the base's own, or fp16 for
TensorRT. Every operator's inputs are of one type, so TensorRT builds it strongly typed.
"""

import hashlib
import inspect
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import onnx
import structlog
import torch

from hueshift.engines import added_embedding, cross_attention, graph_guides, graph_layers, graph_unet, graph_writer
from hueshift.engines.base_model import BaseModel
from hueshift.engines.cache_files import digest_file, exclusive, publish_folder
from hueshift.engines.graph_unet import write_unet
from hueshift.engines.graph_writer import GRAPH_FILE, GraphWriter
from hueshift.engines.interface import Plan
from hueshift.engines.rows import RowLayout
from hueshift.engines.svd_cache import SpectralFactors

STEPS = 3
_MANIFEST = "manifest.json"
_log = structlog.get_logger()

Progress = Callable[[int, int], None]


def export_graph(
    base: BaseModel,
    factors: SpectralFactors,
    rows: RowLayout,
    plan: Plan,
    cache_dir: Path,
    progress: Progress | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Path:
    """Return the graph file of `plan`, from `cache_dir` or exported and stored there, in `dtype` or that of the base.

    An entry counts only if every file in it has the digest of its manifest; a damaged one is logged and made again.
    `progress(done, STEPS)` is called while exporting. Raises InvalidArgument (MODEL_UNSUPPORTED) if the base model
    cannot be exported.
    """
    folder = entry_folder(base, rows, plan, cache_dir, dtype)
    report = progress or (lambda done, total: None)
    with exclusive(folder):
        if not _is_whole(folder):
            report(0, STEPS)
            graph = write_unet(base, factors, rows, plan, dtype)
            publish_folder(folder, lambda path: _fill(path, graph, report))
    return folder / GRAPH_FILE


def entry_folder(
    base: BaseModel, rows: RowLayout, plan: Plan, cache_dir: Path, dtype: torch.dtype | None = None
) -> Path:
    """Where the graph of this plan lies: named by base, plan and the digest of all that decides what it holds."""
    identity = {
        "base": base.base_hash,
        "context": [base.max_tokens, base.layout.token_width],
        "plan": plan,
        "spectral": rows.spectral_size,
        "text_side": rows.text_side,
        "targets": [(target.name, target.rank) for target in rows.targets],
        "dtype": str(dtype or next(base.unet.parameters()).dtype),
        "code": [
            _code_digest(module)
            for module in (added_embedding, cross_attention, graph_guides, graph_layers, graph_unet, graph_writer)
        ],
        "versions": {name: version(name) for name in ("torch", "diffusers", "onnx")},
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return cache_dir / "onnx" / f"{base.base_hash[:12]}-{plan}-{key[:20]}"


def write_manifest(folder: Path) -> None:
    """Record the digest of every file of an entry."""
    files = {file.name: digest_file(file) for file in sorted(folder.iterdir()) if file.name != _MANIFEST}
    (folder / _MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def _fill(folder: Path, graph: GraphWriter, report: Progress) -> None:
    graph.save(folder)
    report(1, STEPS)
    onnx.checker.check_model(str(folder / GRAPH_FILE))
    report(2, STEPS)
    write_manifest(folder)
    report(3, STEPS)


def _is_whole(folder: Path) -> bool:
    if not folder.exists():
        return False
    try:
        files = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["files"]
        whole = GRAPH_FILE in files and all(digest_file(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("graph_cache_unreadable", entry=folder.name, error=str(error))
        return False
    if not whole:
        _log.warning("graph_cache_refused", entry=folder.name, problem="a digest does not fit")
    return whole


def _code_digest(module: ModuleType) -> str:
    return hashlib.sha256(inspect.getsource(module).encode()).hexdigest()
