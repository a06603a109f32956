"""The text-side parts of an adapter file, checked from its header alone: names, shapes and numbers.

Tensors are named `grid/<word>` [stages, layers, vectors, token_width]; `mapper/<word>/frequencies` [features, 2],
`mapper/<word>/layers/<n>/weight` and so on; `kv/<layer>` [rows, cols]; `gated/<word>/target` and `/dual` [cols] and
`gated/<word>/outputs/<layer>` [rows]. A word may hold a slash, so names are read from their ends. torch is not needed.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hueshift.adapters.container import (
    TensorEntry,
    expect_shape,
    invalid,
    is_finite,
    show,
    unknown_tensor,
    wrong_shape,
)
from hueshift.adapters.layout import BaseLayout, MatrixLayer, is_text_side
from hueshift.adapters.words import check_word, checked_word

if TYPE_CHECKING:
    from hueshift.adapters.validate import FileLimits

TEXT_SIDE_GROUPS = ("grid", "mapper", "kv", "gated")
_MAPPER = re.compile(
    r"(.+)/(frequencies|output_weight|output_bias|layers/\d{1,2}/(?:weight|bias|norm_weight|norm_bias))"
)
_GATED = re.compile(r"(.+)/(target|dual|outputs/[^/]+)")
_MAPPER_ENDS = ("frequencies", "output_weight", "output_bias")
_LAYER_ENDS = ("weight", "bias", "norm_weight", "norm_bias")


@dataclass(frozen=True, slots=True)
class MapperNumbers:
    """What a TokenMapper has besides tensors."""

    norm: float
    bypass: float


@dataclass(frozen=True, slots=True)
class GatedNumbers:
    """What a GatedEdit has besides tensors."""

    beta: float
    tau: float


@dataclass(frozen=True, slots=True)
class TextSidePlan:
    """Which tensor becomes what. Parts of mappers and gated edits are by the ends of their names."""

    grids: dict[str, TensorEntry] = field(default_factory=dict)
    mappers: dict[str, dict[str, TensorEntry]] = field(default_factory=dict)
    kv: dict[str, TensorEntry] = field(default_factory=dict)
    gated: dict[str, dict[str, TensorEntry]] = field(default_factory=dict)

    def add(self, entry: TensorEntry, group: str, rest: str) -> None:
        """Take a tensor of one of TEXT_SIDE_GROUPS. Raises InvalidArgument for a name that is none."""
        if group == "grid":
            self.grids[checked_word(entry, rest)] = entry
            return
        if group == "kv":
            self.kv[rest] = entry
            return
        pattern, parts = (_MAPPER, self.mappers) if group == "mapper" else (_GATED, self.gated)
        found = pattern.fullmatch(rest)
        if found is None:
            ends = [*_MAPPER_ENDS, "layers/<n>/weight"] if group == "mapper" else ["target", "dual", "outputs/<layer>"]
            raise unknown_tensor(entry, f"its name must be {group}/<word>/ and one of {', '.join(ends)}")
        parts.setdefault(checked_word(entry, found[1]), {})[found[2]] = entry


def mapper_depth(parts: Collection[str]) -> int:
    """Return the number of hidden layers that a mapper's parts speak of."""
    return 1 + max((int(part.split("/")[1]) for part in parts if part.startswith("layers/")), default=-1)


def gated_layers(parts: Collection[str]) -> list[str]:
    """Return the layers that a gated edit has outputs for."""
    return [part.removeprefix("outputs/") for part in parts if part.startswith("outputs/")]


def read_mapper_numbers(data: Any) -> dict[str, MapperNumbers]:
    """Check the header's `mappers`: {word: {norm, bypass}}. Raises InvalidArgument (ADAPTER_FILE_INVALID)."""
    found = {word: MapperNumbers(**values) for word, values in _numbers(data, "mappers", ("norm", "bypass")).items()}
    for word, numbers in found.items():
        if numbers.norm < 0:
            raise invalid(f"mappers: the norm of {word!r} is {numbers.norm}; allowed: 0 or above")
    return found


def read_gated_numbers(data: Any) -> dict[str, GatedNumbers]:
    """Check the header's `gated`: {word: {beta, tau}}. Raises InvalidArgument (ADAPTER_FILE_INVALID)."""
    found = {word: GatedNumbers(**values) for word, values in _numbers(data, "gated", ("beta", "tau")).items()}
    for word, numbers in found.items():
        if numbers.tau <= 0:
            raise invalid(f"gated: tau of {word!r} is {numbers.tau}; allowed: above 0, the gate divides by it")
    return found


def check_text_side(
    plan: TextSidePlan,
    layout: BaseLayout,
    limits: "FileLimits",
    tokens: Collection[str],
    mappers: Mapping[str, MapperNumbers],
    gated: Mapping[str, GatedNumbers],
) -> None:
    """Check all shapes against the base model, and that every word is taught once.

    Raises InvalidArgument (ADAPTER_TENSOR_UNKNOWN, ADAPTER_SHAPE_MISMATCH, ADAPTER_FILE_INVALID) naming the tensor.
    """
    _check_words(plan, limits, tokens)
    _same_words("mapper", plan.mappers, mappers)
    _same_words("gated", plan.gated, gated)
    for entry in plan.grids.values():
        _check_grid(entry, layout, limits)
    for word, parts in plan.mappers.items():
        _check_mapper(word, parts, layout.token_width, limits)
        doubled = parts["output_weight"].shape[0] == 2 * layout.token_width
        if doubled != bool(mappers[word].bypass):
            raise invalid(
                f"the mapper of {word!r} gives out {parts['output_weight'].shape[0]} values and has bypass "
                f"{mappers[word].bypass:g}; allowed: {layout.token_width} values with bypass 0, "
                f"{2 * layout.token_width} with another one"
            )
    if not plan.kv and not plan.gated:
        return
    names = {f"{attention}.{side}" for attention in layout.cross_attentions for side in ("to_k", "to_v")}
    projections = {layer.name: layer for layer in layout.matrices if layer.name in names}
    once = {layer.name: layer for layer in layout.matrices if is_text_side(layer.name)}
    for name, entry in plan.kv.items():
        layer = _projection(entry, name, {**projections, **once})
        expect_shape(entry, (layer.rows, layer.cols))
    for word, parts in plan.gated.items():
        _check_gated(word, parts, projections)


def _numbers(data: Any, what: str, names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    if not isinstance(data, dict):
        raise invalid(f"{what} must map words to {', '.join(names)}")
    found: dict[str, dict[str, float]] = {}
    for word, values in data.items():
        problem = check_word(word)
        if problem:
            raise invalid(f"{what}: the word {problem}")
        if not isinstance(values, dict) or set(values) != set(names):
            raise invalid(f"{what}: {word!r} has {show(values)}; allowed: exactly {', '.join(names)}")
        for name, value in values.items():
            if type(value) not in (int, float) or not is_finite(value):
                raise invalid(f"{what}: {name} of {word!r} is {show(value)}; allowed: a finite number")
        found[word] = {name: float(value) for name, value in values.items()}
    return found


def _same_words(group: str, parts: Collection[str], numbers: Collection[str]) -> None:
    wrong = sorted(set(parts) ^ set(numbers))
    if wrong:
        raise invalid(f"every {group} must have its tensors and its numbers; the word {wrong[0]!r} lacks one of them")


def _check_words(plan: TextSidePlan, limits: "FileLimits", tokens: Collection[str]) -> None:
    taught = [*tokens, *plan.grids, *plan.mappers]
    if len(taught) > limits.max_words:
        raise invalid(f"it teaches {len(taught)} words; allowed: at most {limits.max_words}")
    twice = next((word for word in taught if taught.count(word) > 1), None)
    if twice is not None:
        raise invalid(f"the word {twice!r} is taught twice; allowed: one of tokens, grid and mapper for each word")
    untaught = next((word for word in plan.gated if word not in taught), None)
    if untaught is not None:
        raise invalid(f"the gated edit of {untaught!r} has no embedding; allowed: words of tokens, grid or mapper")


def _check_grid(entry: TensorEntry, layout: BaseLayout, limits: "FileLimits") -> None:
    layers = len(layout.cross_attentions)
    fits = (
        len(entry.shape) == 4
        and entry.shape[0] <= limits.max_stages
        and entry.shape[1] in (1, layers)
        and entry.shape[2] <= limits.max_word_vectors
        and entry.shape[3] == layout.token_width
    )
    if not fits:
        raise wrong_shape(
            entry,
            f"[stages, layers, vectors, {layout.token_width}] with 1 to {limits.max_stages} stages, 1 or {layers} "
            f"layers and 1 to {limits.max_word_vectors} vectors",
        )


def _check_mapper(word: str, parts: Mapping[str, TensorEntry], width: int, limits: "FileLimits") -> None:
    depth = mapper_depth(parts)
    if not 1 <= depth <= limits.max_mapper_layers:
        raise invalid(f"the mapper of {word!r} has {depth} hidden layers; allowed: 1 to {limits.max_mapper_layers}")
    needed = {*_MAPPER_ENDS, *(f"layers/{n}/{end}" for n in range(depth) for end in _LAYER_ENDS)}
    if set(parts) != needed:
        wrong = sorted(set(parts) ^ needed)[0]
        raise invalid(f"tensor 'mapper/{word}/{wrong}' is missing, or has no place in a mapper of {depth} layers")
    frequencies = parts["frequencies"]
    if len(frequencies.shape) != 2 or frequencies.shape[1] != 2 or frequencies.shape[0] > limits.max_mapper_width:
        raise wrong_shape(frequencies, f"[features, 2] with 1 to {limits.max_mapper_width} features")
    inputs = 2 * frequencies.shape[0]
    for number in range(depth):
        weight = parts[f"layers/{number}/weight"]
        if len(weight.shape) != 2 or weight.shape[0] > limits.max_mapper_width or weight.shape[1] != inputs:
            raise wrong_shape(weight, f"[size, {inputs}] with a size of 1 to {limits.max_mapper_width}")
        inputs = weight.shape[0]
        for end in _LAYER_ENDS[1:]:
            expect_shape(parts[f"layers/{number}/{end}"], (inputs,))
    output = parts["output_weight"]
    if output.shape not in ((width, inputs), (2 * width, inputs)):
        raise wrong_shape(output, f"[{width}, {inputs}], or with a bypass [{2 * width}, {inputs}]")
    expect_shape(parts["output_bias"], output.shape[:1])


def _check_gated(word: str, parts: Mapping[str, TensorEntry], projections: Mapping[str, MatrixLayer]) -> None:
    layers = gated_layers(parts)
    for missing in (name for name in ("target", "dual") if name not in parts):
        raise invalid(f"the gated edit of {word!r} has no {missing!r}")
    if not layers:
        raise invalid(f"the gated edit of {word!r} changes no layer: it has no tensor 'gated/{word}/outputs/<layer>'")
    for name in layers:
        entry = parts[f"outputs/{name}"]
        layer = _projection(entry, name, projections)
        expect_shape(entry, (layer.rows,))
        expect_shape(parts["target"], (layer.cols,))
        expect_shape(parts["dual"], (layer.cols,))


def _projection(entry: TensorEntry, name: str, projections: Mapping[str, MatrixLayer]) -> MatrixLayer:
    found = projections.get(name)
    if found is None:
        raise unknown_tensor(
            entry, f"{name[:120]!r} is no projection of keys or values of a cross-attention in the base model"
        )
    return found
