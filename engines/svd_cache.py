"""The singular value decomposition of every adaptable matrix of a base model, computed once and kept on disk.

W reshaped to (c_out, c_in * kh * kw) equals U diag(sigma) V^T with sigma descending (Han et al. 2023, section 3.2).
It is computed in fp64 and stored in fp32: the product then equals the fp32 weight to about 1e-6 of its norm.

The text encoders have a file of their own, made when an adapter first changes one of them: most never do.
"""

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import structlog
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.adapters.layout import MatrixLayer
from hueshift.engines.base_model import BaseModel
from hueshift.engines.cache_files import exclusive, write_atomically
from hueshift.engines.encoder_layers import encoders_of, locate_weights

_FORMAT = "hueshift.svd/1"
_log = structlog.get_logger()

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class SpectralFactors:
    """U, sigma and V^T by layer name, fp32 on the CPU: u [rows, rank], sigma [rank] descending, vh [rank, cols].

    `encoder` gives those of the text encoders, loading them at its first call; they lie on the encoders' device. None
    where nobody keeps them.

    With `laid_out` u and vh are as the layers of a UNet hold them, which then makes no copies: on its device, in the
    dtype of its products, vh of a convolution [rank, c_in, kh, kw] in channels_last (training/held_factors.py).
    """

    u: dict[str, Tensor]
    sigma: dict[str, Tensor]
    vh: dict[str, Tensor]
    encoder: "Callable[[], SpectralFactors] | None" = field(default=None, repr=False, compare=False)
    laid_out: bool = False


def load_factors(base: BaseModel, cache_dir: Path, progress: Progress | None = None) -> SpectralFactors:
    """Return the decomposition of `base`, from `cache_dir` or computed and stored there.

    `progress(done, total)` counts layers while computing (emoji-128: 2.3 s on a 2-core x86 CPU, 2026-11-20). A file
    that is damaged or belongs to other weights is logged and computed again. Raises InvalidArgument
    (MODEL_FILE_INVALID) if a weight is not finite.
    """
    file = factors_file(cache_dir, base.base_hash)
    factors = _load(file, base.base_hash, base.layout.matrices, lambda: decompose(base, progress))
    return replace(factors, encoder=EncoderFactors(base, encoder_factors_file(cache_dir, base.base_hash)))


def factors_file(cache_dir: Path, base_hash: str) -> Path:
    """Where the decomposition of a base model lies."""
    return cache_dir / "svd" / f"{base_hash}.safetensors"


def encoder_factors_file(cache_dir: Path, base_hash: str) -> Path:
    """Where the decomposition of its text encoders lies."""
    return cache_dir / "svd" / f"{base_hash}-text.safetensors"


class EncoderFactors:
    """Called, the decomposition of the base's text encoders: from `file`, or computed and stored there, once.

    CLIP-L's 72 matrices give 0.51 GB in fp32. Without a file it is computed and stays in memory. Safe to call from
    several threads.
    """

    def __init__(self, base: BaseModel, file: Path | None = None) -> None:
        self._base, self._file = base, file
        self._lock = threading.Lock()
        self._loaded: SpectralFactors | None = None

    def __call__(self) -> SpectralFactors:
        """Return it, on the device of the encoders. Raises InvalidArgument as `load_factors` does."""
        with self._lock:
            if self._loaded is None:
                found = self._find()
                device = next(self._base.text_encoder.parameters()).device
                u, sigma, vh = (
                    {name: t.to(device) for name, t in part.items()} for part in (found.u, found.sigma, found.vh)
                )
                self._loaded = SpectralFactors(u, sigma, vh)
        return self._loaded

    def _find(self) -> SpectralFactors:
        base = self._base
        if self._file is None:
            return decompose_encoders(base)
        return _load(self._file, base.base_hash, base.layout.encoder_matrices, lambda: decompose_encoders(base))


def decompose(base: BaseModel, progress: Progress | None = None) -> SpectralFactors:
    """Decompose every matrix of the UNet in fp64 on the device of the weights."""
    return _decompose(base, base.layout.matrices, lambda name: base.unet.get_parameter(f"{name}.weight"), progress)


def decompose_encoders(base: BaseModel) -> SpectralFactors:
    """Decompose every adaptable matrix of the text encoders in fp64 on the device of the weights."""
    encoders = encoders_of(base)
    places = locate_weights(encoders)

    def weight_of(name: str) -> Tensor:
        encoder, parameter = places[name]
        return encoders[encoder].get_parameter(parameter)

    return _decompose(base, base.layout.encoder_matrices, weight_of, None)


def _load(
    file: Path, base_hash: str, layers: Sequence[MatrixLayer], decompose_all: Callable[[], SpectralFactors]
) -> SpectralFactors:
    with exclusive(file):
        if file.is_file():
            factors = _read(file, base_hash, layers)
            if factors is not None:
                return factors
        factors = decompose_all()
        write_atomically(file, lambda path: _write(path, factors, base_hash))
    return factors


def _decompose(
    base: BaseModel, layers: Sequence[MatrixLayer], weight_of: Callable[[str], Tensor], progress: Progress | None
) -> SpectralFactors:
    factors = SpectralFactors({}, {}, {})
    for done, layer in enumerate(layers, 1):
        weight = weight_of(layer.name)
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
            progress(done, len(layers))
    return factors


def _write(path: Path, factors: SpectralFactors, base_hash: str) -> None:
    tensors = _flatten(factors)
    save_file(tensors, path, {"format": _FORMAT, "base_hash": base_hash, "digest": _digest(tensors)})


def _read(file: Path, base_hash: str, layers: Sequence[MatrixLayer]) -> SpectralFactors | None:
    """Read and verify a stored decomposition; None, with a log line, if it cannot be used."""
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        _log.warning("svd_cache_unreadable", file=file.name, error=str(error))
        return None
    problem = _problem(metadata, tensors, base_hash, layers)
    if problem is not None:
        _log.warning("svd_cache_refused", file=file.name, problem=problem)
        return None
    names = [layer.name for layer in layers]
    return SpectralFactors(
        {name: tensors[f"u/{name}"] for name in names},
        {name: tensors[f"sigma/{name}"] for name in names},
        {name: tensors[f"vh/{name}"] for name in names},
    )


def _problem(
    metadata: dict[str, str], tensors: dict[str, Tensor], base_hash: str, layers: Sequence[MatrixLayer]
) -> str | None:
    if metadata.get("format") != _FORMAT or metadata.get("base_hash") != base_hash:
        return "another format or base model"
    expected: dict[str, tuple[int, ...]] = {}
    for layer in layers:
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
