"""How two adapter files differ: by what they do where both are ours, else tensor by tensor."""

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hueshift.adapters.container import ContainerHeader, invalid
from hueshift.adapters.formats.compress import product_norm
from hueshift.adapters.formats.detect import Format, detect
from hueshift.adapters.formats.inspect import read_header
from hueshift.adapters.tensors import read_tensor
from hueshift.adapters.validate import AdapterHeader, read_adapter_header


@dataclass(frozen=True, slots=True)
class PartDifference:
    """One layer, word or tensor of both files: both norms, and the norm of the difference over the larger of them."""

    name: str
    first: float
    second: float
    difference: float


@dataclass(frozen=True, slots=True)
class FileDifference:
    """`fields` are facts of the headers that differ, with both values. `compared` has the largest difference first."""

    fields: Mapping[str, tuple[str, str]]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    compared: tuple[PartDifference, ...]

    @property
    def equal(self) -> bool:
        """True if both do the same, value for value."""
        same = not (self.fields or self.only_first or self.only_second)
        return same and all(part.difference == 0 for part in self.compared)


def compare(first: bytes, second: bytes) -> FileDifference:
    """Compare two files of known formats. Raises InvalidArgument if one is none, or holds what is not finite.

    Low-rank parts of our own files are compared as products, because different factors may mean the same change.
    """
    headers = read_header(first), read_header(second)
    formats = detect(headers[0]), detect(headers[1])
    ours = formats == (Format.HUESHIFT, Format.HUESHIFT)
    parts = [_parts(data, header, ours) for data, header in zip((first, second), headers, strict=True)]
    fields = {} if formats[0] == formats[1] else {"format": (formats[0].value, formats[1].value)}
    if ours:
        facts = [read_adapter_header(header) for header in headers]
        stated = [_stated(header) for header in facts]
        for name in dict.fromkeys((*stated[0], *stated[1])):
            values = stated[0].get(name, ""), stated[1].get(name, "")
            if values[0] != values[1]:
                fields[name] = values
    only = [[name for name in mine if name not in theirs] for mine, theirs in (parts, parts[::-1])]
    compared: list[PartDifference] = []
    for name in (name for name in parts[0] if name in parts[1]):
        mine, theirs = parts[0][name], parts[1][name]
        if mine.shape == theirs.shape:
            compared.append(_compare(name, mine.read(), theirs.read()))
        else:
            for names, part in ((only[0], mine), (only[1], theirs)):
                names.append(f"{name} {list(part.shape)}")
    ranked = sorted(compared, key=lambda part: (-part.difference, part.name))
    return FileDifference(fields, tuple(only[0]), tuple(only[1]), tuple(ranked))


def _stated(header: AdapterHeader) -> dict[str, str]:
    """What a header says, as texts: besides the plain facts the numbers of mappers and gated edits."""
    said = {name: str(getattr(header, name)) for name in ("kind", "base_hash", "method", "identifier", "class_noun")}
    for word, mapper in header.mappers.items():
        said |= {f"mapper {word} norm": f"{mapper.norm:g}", f"mapper {word} bypass": f"{mapper.bypass:g}"}
    for word, gate in header.gated.items():
        said |= {f"gated {word} beta": f"{gate.beta:g}", f"gated {word} tau": f"{gate.tau:g}"}
    return said


_Factors = tuple[Tensor, Tensor]
"""A and B of a product; a plain tensor x is the pair (x as one row, [[1]])."""


@dataclass(frozen=True, slots=True)
class _Part:
    shape: tuple[int, ...]
    read: Callable[[], _Factors]


def _parts(data: bytes, header: ContainerHeader, ours: bool) -> dict[str, _Part]:
    scales = read_adapter_header(header).scales if ours else {}
    file = io.BytesIO(data)

    def read(name: str) -> Tensor:
        return read_tensor(file, header.data_begin, header.tensors[name]).double()

    def plain(name: str) -> _Part:
        one = torch.ones(1, 1, dtype=torch.float64)
        return _Part(
            header.tensors[name].shape, lambda: (read(name).reshape(1, math.prod(header.tensors[name].shape)), one)
        )

    def product(layer: str) -> _Part:
        names = f"lowrank/{layer}/a", f"lowrank/{layer}/b"
        shapes = [header.tensors[name].shape if name in header.tensors else () for name in names]
        if [len(shape) for shape in shapes] != [2, 2] or shapes[0][0] != shapes[1][1]:
            raise invalid(f"the factors of layer {layer[:120]!r} are missing or do not fit together")
        return _Part((shapes[1][0], shapes[0][1]), lambda: (read(names[0]), scales[layer] * read(names[1])))

    parts = {name: plain(name) for name in header.tensors if not (ours and name.startswith("lowrank/"))}
    return parts | {f"lowrank/{layer}": product(layer) for layer in scales}


def _compare(name: str, first: _Factors, second: _Factors) -> PartDifference:
    norms = product_norm(*first), product_norm(*second)
    if first[0].shape == second[0].shape and torch.equal(first[0], second[0]) and torch.equal(first[1], second[1]):
        return PartDifference(name, *norms, 0.0)
    joined = torch.cat([first[0], second[0]]), torch.cat([first[1], -second[1]], dim=1)
    largest = max(norms)
    return PartDifference(name, *norms, product_norm(*joined) / largest if largest else 0.0)
