"""The singular value decomposition of every adaptable matrix of a base model, computed once and kept on disk.

W reshaped to (c_out, c_in * kh * kw) equals U diag(sigma) V^T with sigma descending (Han et al. 2023, section 3.2).
It is computed in fp64 and stored in fp32: the product then equals the fp32 weight to about 1e-6 of its norm.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.adapters.layout import BaseLayout
from hueshift.engines.base_model import BaseModel
from hueshift.engines.cache_files import exclusive, write_atomically

_FORMAT = "hueshift.svd/1"
_log = structlog.get_logger()

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class SpectralFactors:
    """U, sigma and V^T by layer name, fp32 on the CPU: u [rows, rank], sigma [rank] descending, vh [rank, cols]."""

    u: dict[str, Tensor]
    sigma: dict[str, Tensor]
    vh: dict[str, Tensor]


def load_factors(base: BaseModel, cache_dir: Path, progress: Progress | None = None) -> SpectralFactors:
    """Return the decomposition of `base`, from `cache_dir` or computed and stored there.

    `progress(done, total)` counts layers while computing (emoji-128: 2.3 s on a 2-core x86 CPU, 2026-11-20). A file
    that is damaged or belongs to other weights is logged and computed again. Raises InvalidArgument
    (MODEL_FILE_INVALID) if a weight is not finite.
    """
    file = factors_file(cache_dir, base.base_hash)
    with exclusive(file):
        if file.is_file():
            factors = _read(file, base.layout)
            if factors is not None:
                return factors
        factors = decompose(base, progress)
        write_atomically(file, lambda path: _write(path, factors, base.base_hash))
    return factors


def factors_file(cache_dir: Path, base_hash: str) -> Path:
    """Where the decomposition of a base model lies."""
    return cache_dir / "svd" / f"{base_hash}.safetensors"


def decompose(base: BaseModel, progress: Progress | None = None) -> SpectralFactors:
    """Decompose every matrix of the layout in fp64 on the device of the weights."""
    factors = SpectralFactors({}, {}, {})
    total = len(base.layout.matrices)
    for done, layer in enumerate(base.layout.matrices, 1):
        weight = base.unet.get_parameter(f"{layer.name}.weight")
        matrix = weight.detach().reshape(layer.rows, layer.cols).double()
        if not bool(torch.isfinite(matrix).all()):
            raise InvalidArgument(
                Reason.MODEL_FILE_INVALID, f"{base.path}: the weight of {layer.name} holds values that are not finite"
            )
        u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
        factors.u[layer.name] = u.float().cpu().contiguous()
        factors.sigma[layer.name] = sigma.float().cpu().contiguous()
        factors.vh[layer.name] = vh.float().cpu().contiguous()
        if progress is not None:
            progress(done, total)
    return factors


def _write(path: Path, factors: SpectralFactors, base_hash: str) -> None:
    tensors = _flatten(factors)
    save_file(tensors, path, {"format": _FORMAT, "base_hash": base_hash, "digest": _digest(tensors)})


def _read(file: Path, layout: BaseLayout) -> SpectralFactors | None:
    """Read and verify a stored decomposition; None, with a log line, if it cannot be used."""
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        _log.warning("svd_cache_unreadable", file=file.name, error=str(error))
        return None
    problem = _problem(metadata, tensors, layout)
    if problem is not None:
        _log.warning("svd_cache_refused", file=file.name, problem=problem)
        return None
    names = [layer.name for layer in layout.matrices]
    return SpectralFactors(
        {name: tensors[f"u/{name}"] for name in names},
        {name: tensors[f"sigma/{name}"] for name in names},
        {name: tensors[f"vh/{name}"] for name in names},
    )


def _problem(metadata: dict[str, str], tensors: dict[str, Tensor], layout: BaseLayout) -> str | None:
    if metadata.get("format") != _FORMAT or metadata.get("base_hash") != layout.base_hash:
        return "another format or base model"
    expected: dict[str, tuple[int, ...]] = {}
    for layer in layout.matrices:
        expected[f"u/{layer.name}"] = (layer.rows, layer.rank)
        expected[f"sigma/{layer.name}"] = (layer.rank,)
        expected[f"vh/{layer.name}"] = (layer.rank, layer.cols)
    if {key: tuple(tensor.shape) for key, tensor in tensors.items()} != expected:
        return "other layers or shapes"
    if metadata.get("digest") != _digest(tensors):
        return "the digest does not fit"
    return None


def _flatten(factors: SpectralFactors) -> dict[str, Tensor]:
    parts = (("u", factors.u), ("sigma", factors.sigma), ("vh", factors.vh))
    return {f"{part}/{name}": tensor for part, tensors in parts for name, tensor in tensors.items()}


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
