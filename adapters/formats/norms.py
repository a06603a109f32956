"""How strong the parts of one of our own files are, without torch: an adapter file is looked at in a moment."""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from hueshift.adapters.container import ContainerHeader, TensorEntry, invalid
from hueshift.adapters.errors import InvalidArgument, Reason

_GROUPS = ("spectral", "norm", "tokens", "grid", "kv", "dense")
_TYPES: Mapping[str, str] = {"F16": "<f2", "F32": "<f4", "BF16": "<u2"}


def part_norms(data: bytes, header: ContainerHeader, scales: Mapping[str, float]) -> dict[str, float]:
    """Return the Frobenius norm of every shift, delta, embedding and low-rank product, by `<group>/<layer or word>`.

    Raises InvalidArgument (ADAPTER_FILE_INVALID) for factors that do not fit together, (ADAPTER_NOT_FINITE) naming a
    part that holds what is not finite.
    """
    norms: dict[str, float] = {}
    for name, entry in header.tensors.items():
        if name.partition("/")[0] in _GROUPS:
            norms[name] = float(np.linalg.norm(_values(data, header, entry)))
    for layer, scale in scales.items():
        norms[f"lowrank/{layer}"] = abs(scale) * _product_norm(data, header, layer)
    broken = next((name for name, norm in norms.items() if not math.isfinite(norm)), None)
    if broken is not None:
        raise InvalidArgument(
            Reason.ADAPTER_NOT_FINITE, f"adapter file refused: {broken!r} holds values that are not finite"
        )
    return norms


def _product_norm(data: bytes, header: ContainerHeader, layer: str) -> float:
    pair = [header.tensors.get(f"lowrank/{layer}/{side}") for side in "ab"]
    shapes = [entry.shape if entry else () for entry in pair]
    if [len(shape) for shape in shapes] != [2, 2] or shapes[0][0] != shapes[1][1]:
        raise invalid(f"the factors of layer {layer[:120]!r} are missing or do not fit together")
    a, b = (_values(data, header, entry).reshape(entry.shape) for entry in pair if entry)
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.sqrt(max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0)))


def _values(data: bytes, header: ContainerHeader, entry: TensorEntry) -> NDArray[np.float64]:
    """The tensor's values in a row, fp64."""
    count = math.prod(entry.shape)
    stored = np.frombuffer(data, _TYPES[entry.dtype], count, header.data_begin + entry.begin)
    if entry.dtype == "BF16":
        # The upper half of fp32.
        stored = (stored.astype("<u4") << 16).view("<f4")
    return stored.astype(np.float64)
