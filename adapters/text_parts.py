"""Text-side parts in and out of adapter files: their tensors by name, their numbers for the header."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hueshift.adapters.adapter import Adapter, GatedEdit, MapperLayer, TokenMapper
from hueshift.adapters.container import TensorEntry, invalid
from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.adapters.layout import BaseLayout
from hueshift.adapters.text_side import (
    GatedNumbers,
    MapperNumbers,
    TextSidePlan,
    check_text_side,
    gated_layers,
    mapper_depth,
    read_gated_numbers,
    read_mapper_numbers,
)

if TYPE_CHECKING:
    from hueshift.adapters.validate import FileLimits

# s(e) divides by <dual, target>. For a covariance of condition k, the cosine between i* and C^-1 i* is at least about
# 2 / sqrt(k); fp32 inverts up to k = 1e7 or so.
_SMALLEST_COSINE = 1e-6
_Read = Callable[[TensorEntry], Tensor]


def has_text_side(adapter: Adapter) -> bool:
    """Return whether the adapter holds a part that only the second version of the format knows."""
    return bool(adapter.token_grids or adapter.mappers or adapter.kv or adapter.gated)


def text_side_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Return the tensors of text-side parts by their names in a file."""
    tensors = {f"grid/{word}": grid for word, grid in adapter.token_grids.items()}
    tensors |= {f"kv/{layer}": delta for layer, delta in adapter.kv.items()}
    for word, mapper in adapter.mappers.items():
        own = {
            "frequencies": mapper.frequencies,
            "output_weight": mapper.output_weight,
            "output_bias": mapper.output_bias,
        }
        for number, layer in enumerate(mapper.layers):
            own[f"layers/{number}/weight"] = layer.weight
            own[f"layers/{number}/bias"] = layer.bias
            own[f"layers/{number}/norm_weight"] = layer.norm_weight
            own[f"layers/{number}/norm_bias"] = layer.norm_bias
        tensors |= {f"mapper/{word}/{name}": tensor for name, tensor in own.items()}
    for word, edit in adapter.gated.items():
        tensors |= {f"gated/{word}/target": edit.target, f"gated/{word}/dual": edit.dual}
        tensors |= {f"gated/{word}/outputs/{layer}": output for layer, output in edit.outputs.items()}
    return tensors


def text_side_numbers(adapter: Adapter) -> dict[str, Any]:
    """Return the header's `mappers` and `gated`.

    Raises InvalidArgument (ADAPTER_NOT_FINITE, ADAPTER_FILE_INVALID) for numbers that reading would refuse.
    """
    numbers: dict[str, dict[str, dict[str, float]]] = {
        "mappers": {word: {"norm": float(m.norm), "bypass": float(m.bypass)} for word, m in adapter.mappers.items()},
        "gated": {word: {"beta": float(e.beta), "tau": float(e.tau)} for word, e in adapter.gated.items()},
    }
    for words in numbers.values():
        for word, values in words.items():
            for name, value in values.items():
                if not math.isfinite(value):
                    raise InvalidArgument(Reason.ADAPTER_NOT_FINITE, f"{name} of the word {word!r} is {value}")
    for word, mapper in adapter.mappers.items():
        if mapper.norm < 0:
            raise invalid(f"the norm of {word!r} is {mapper.norm}; allowed: 0 or above")
    for word, edit in adapter.gated.items():
        check_edit(word, edit)
    return numbers


def read_mappers(plan: TextSidePlan, numbers: Mapping[str, MapperNumbers], read: _Read) -> dict[str, TokenMapper]:
    """Read every mapper of a checked plan."""
    mappers: dict[str, TokenMapper] = {}
    for word, parts in plan.mappers.items():
        mappers[word] = TokenMapper(
            frequencies=read(parts["frequencies"]),
            layers=tuple(
                MapperLayer(
                    weight=read(parts[f"layers/{number}/weight"]),
                    bias=read(parts[f"layers/{number}/bias"]),
                    norm_weight=read(parts[f"layers/{number}/norm_weight"]),
                    norm_bias=read(parts[f"layers/{number}/norm_bias"]),
                )
                for number in range(mapper_depth(parts))
            ),
            output_weight=read(parts["output_weight"]),
            output_bias=read(parts["output_bias"]),
            norm=numbers[word].norm,
            bypass=numbers[word].bypass,
        )
    return mappers


def read_gated(plan: TextSidePlan, numbers: Mapping[str, GatedNumbers], read: _Read) -> dict[str, GatedEdit]:
    """Read every gated edit of a checked plan. Raises InvalidArgument (ADAPTER_FILE_INVALID) as `check_edit` does."""
    edits: dict[str, GatedEdit] = {}
    for word, parts in plan.gated.items():
        edits[word] = GatedEdit(
            target=read(parts["target"]),
            dual=read(parts["dual"]),
            outputs={layer: read(parts[f"outputs/{layer}"]) for layer in gated_layers(parts)},
            beta=numbers[word].beta,
            tau=numbers[word].tau,
        )
        check_edit(word, edits[word])
    return edits


def check_text_parts(adapter: Adapter, layout: BaseLayout, limits: "FileLimits") -> None:
    """Check the text-side parts of an adapter as if they were read from a file: shapes, words, numbers.

    Raises InvalidArgument as reading does, with the names that the tensors have in our own files.
    """
    plan = TextSidePlan()
    for name, tensor in text_side_tensors(adapter).items():
        group, _, rest = name.partition("/")
        plan.add(TensorEntry(name, str(tensor.dtype), tuple(tensor.shape), 0, 0), group, rest)
    numbers = text_side_numbers(adapter)
    mappers, gated = read_mapper_numbers(numbers["mappers"]), read_gated_numbers(numbers["gated"])
    check_text_side(plan, layout, limits, adapter.tokens, mappers, gated)


def check_edit(word: str, edit: GatedEdit) -> None:
    """Raise InvalidArgument (ADAPTER_FILE_INVALID) if the gate would divide by zero: tau, or <dual, target>."""
    if edit.tau <= 0:
        raise invalid(f"tau of the gated edit of {word!r} is {edit.tau}; allowed: above 0, the gate divides by it")
    target, dual = edit.target.double(), edit.dual.double()
    size = float(torch.linalg.norm(target) * torch.linalg.norm(dual))
    product = float(target @ dual)
    if math.isfinite(size) and abs(product) <= _SMALLEST_COSINE * size:
        raise invalid(
            f"the gated edit of {word!r} cannot tell its concept: <dual, target> is {product:.3g}, with lengths whose "
            f"product is {size:.3g}; allowed: more than {_SMALLEST_COSINE:g} of that, the gate divides by it"
        )
