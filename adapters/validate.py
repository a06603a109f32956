"""What an adapter file may hold for one base model: names, shapes, ranks and texts, checked from its header alone."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hueshift.adapters.adapter import AdapterKind
from hueshift.adapters.container import ContainerHeader, TensorEntry, invalid, parse_json, show
from hueshift.adapters.errors import FailedPrecondition, InvalidArgument, Reason
from hueshift.adapters.layout import BaseLayout, MatrixLayer

FORMAT = "hueshift.adapter/1"
METADATA_KEY = "hueshift"
MAX_WORD = 64
_MIB = 1024 * 1024
_METHOD = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_Layer = TypeVar("_Layer")
_HASH = re.compile(r"[0-9a-f]{64}")
_FIELDS = ("format", "kind", "base_hash", "method", "identifier", "scales")
# Tooling of the safetensors project adds {"format": "pt"}.
_METADATA_KEYS = {METADATA_KEY, "format"}
_GROUPS = {
    AdapterKind.SPECTRAL: ("spectral", "norm", "tokens"),
    AdapterKind.LOWRANK: ("lowrank", "norm", "tokens"),
    AdapterKind.TOKENS: ("tokens",),
}


@dataclass(frozen=True, slots=True)
class FileLimits:
    """Caps of an adapter file. An SVDiff file of Stable Diffusion 1.x has 1.7 MB, 391 tensors and a 60 KB header."""

    max_bytes: int = 256 * _MIB
    max_header_bytes: int = 8 * _MIB
    max_tensors: int = 8192
    max_rank: int = 128
    max_words: int = 16
    # A prompt has 77 places, two of them end marks.
    max_word_vectors: int = 75


@dataclass(frozen=True, slots=True)
class AdapterHeader:
    """What a file says of itself, once checked. `scales` has one entry per low-rank layer."""

    kind: AdapterKind
    base_hash: str
    method: str
    identifier: str
    scales: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class FilePlan:
    """Which tensor of the file becomes what; layer names are those of the base layout."""

    header: AdapterHeader
    spectral: dict[str, TensorEntry] = field(default_factory=dict)
    norm: dict[str, TensorEntry] = field(default_factory=dict)
    lowrank: dict[str, tuple[TensorEntry, TensorEntry]] = field(default_factory=dict)
    tokens: dict[str, TensorEntry] = field(default_factory=dict)


def read_adapter_header(container: ContainerHeader) -> AdapterHeader:
    """Check the adapter's own header. Raises InvalidArgument (ADAPTER_FILE_INVALID) naming the field."""
    extra = sorted(set(container.metadata) - _METADATA_KEYS)
    if extra:
        raise invalid(f"unknown metadata {extra[0][:80]!r}; allowed: {sorted(_METADATA_KEYS)}")
    text = container.metadata.get(METADATA_KEY)
    if text is None:
        raise invalid(
            f"it has no {METADATA_KEY!r} metadata, so it is not an adapter of Hueshift; allowed: files that Hueshift "
            f"trained or exported (format {FORMAT!r})"
        )
    data = parse_json(text, f"the {METADATA_KEY!r} metadata")
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        given = data.get("format") if isinstance(data, dict) else data
        raise invalid(f"format {show(given)} given; allowed: {FORMAT!r}")
    if set(data) != set(_FIELDS):
        wrong = sorted(set(data) ^ set(_FIELDS))
        raise invalid(f"metadata fields must be exactly {list(_FIELDS)}; missing or unknown: {str(wrong)[:200]}")
    kinds = [kind.value for kind in AdapterKind]
    if not isinstance(data["kind"], str) or data["kind"] not in kinds:
        raise invalid(f"kind {show(data['kind'])} given; allowed: {kinds}")
    return AdapterHeader(
        kind=AdapterKind(data["kind"]),
        base_hash=_text(data, "base_hash", _HASH, "64 hexadecimal digits"),
        method=_text(data, "method", _METHOD, "1 to 32 of a-z, 0-9, '_' and '-', beginning with a letter"),
        identifier=_identifier(data["identifier"]),
        scales=_scales(data["scales"]),
    )


def plan_file(container: ContainerHeader, header: AdapterHeader, layout: BaseLayout, limits: FileLimits) -> FilePlan:
    """Match every tensor of the file to a layer of the base model.

    Raises FailedPrecondition (ADAPTER_BASE_MISMATCH) for another base model, InvalidArgument (ADAPTER_TENSOR_UNKNOWN,
    ADAPTER_SHAPE_MISMATCH, ADAPTER_RANK_TOO_LARGE, ADAPTER_FILE_INVALID) naming the tensor.
    """
    if header.base_hash != layout.base_hash:
        raise FailedPrecondition(
            Reason.ADAPTER_BASE_MISMATCH,
            f"the adapter belongs to the base model {header.base_hash}, but this server runs {layout.base_hash}; send "
            "it to a server of its own base model, or train it again on this one",
            metadata={"adapter_base_hash": header.base_hash, "server_base_hash": layout.base_hash},
        )
    matrices = {layer.name: layer for layer in layout.matrices}
    norms = {layer.name: layer.size for layer in layout.norms}
    plan = FilePlan(header)
    factors: dict[str, dict[str, TensorEntry]] = {}
    for entry in container.tensors.values():
        group, _, rest = entry.name.partition("/")
        if group not in _GROUPS[header.kind]:
            raise _unknown(entry, f"a {header.kind} adapter holds {', '.join(_GROUPS[header.kind])}")
        if group == "spectral":
            _expect(entry, (_layer(entry, rest, matrices).rank,))
            plan.spectral[rest] = entry
        elif group == "norm":
            _expect(entry, (_layer(entry, rest, norms),))
            plan.norm[rest] = entry
        elif group == "tokens":
            plan.tokens[_word(entry, rest)] = entry
        else:
            layer, _, side = rest.rpartition("/")
            _layer(entry, layer, matrices)
            if side not in ("a", "b"):
                raise _unknown(entry, "factors end in '/a' or '/b'")
            factors.setdefault(layer, {})[side] = entry
    _pair_factors(plan, factors, matrices, limits)
    _check_tokens(plan, layout.token_width, limits)
    if not container.tensors:
        raise invalid("it holds no tensors")
    return plan


def check_word(word: str) -> str | None:
    """Return what is wrong with a placeholder word, None if nothing: 1 to 64 printable characters without spaces."""
    if not 1 <= len(word) <= MAX_WORD:
        return f"{word[:MAX_WORD]!r} has {len(word)} characters; allowed: 1 to {MAX_WORD}"
    if not word.isprintable() or any(letter.isspace() for letter in word):
        return f"{word!r} holds a space or a character that cannot be printed"
    return None


def _text(data: dict[str, Any], name: str, pattern: re.Pattern[str], rule: str) -> str:
    value = data[name]
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise invalid(f"{name} {show(value)} given; allowed: {rule}")
    return value


def _identifier(value: Any) -> str:
    if not isinstance(value, str):
        raise invalid(f"identifier must be text, {type(value).__name__} given")
    problem = check_word(value) if value else None
    if problem:
        raise invalid(f"identifier: {problem}")
    return value


def _scales(value: Any) -> dict[str, float]:
    if not isinstance(value, dict):
        raise invalid("scales must map layers to numbers")
    for layer, scale in value.items():
        if type(scale) not in (int, float) or not _is_finite(scale):
            raise invalid(f"the scale of layer {layer[:120]!r} is {show(scale)}; allowed: a finite number")
    return {layer: float(scale) for layer, scale in value.items()}


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _layer(entry: TensorEntry, layer: str, known: Mapping[str, _Layer]) -> _Layer:
    found = known.get(layer)
    if found is None:
        raise _unknown(entry, f"the base model has no such layer {layer[:120]!r} of that kind")
    return found


def _word(entry: TensorEntry, word: str) -> str:
    problem = check_word(word)
    if problem:
        raise invalid(f"tensor {entry.name!r}: the word {problem}")
    return word


def _pair_factors(
    plan: FilePlan, factors: dict[str, dict[str, TensorEntry]], matrices: dict[str, MatrixLayer], limits: FileLimits
) -> None:
    for layer, pair in factors.items():
        if len(pair) != 2:
            present, missing = ("a", "b") if "a" in pair else ("b", "a")
            raise invalid(f"tensor 'lowrank/{layer}/{present}' has no partner 'lowrank/{layer}/{missing}'")
        a, b = pair["a"], pair["b"]
        rank = a.shape[0]
        if rank > limits.max_rank:
            raise InvalidArgument(
                Reason.ADAPTER_RANK_TOO_LARGE,
                f"adapter file refused: tensor {a.name!r} has rank {rank}; allowed: 1 to {limits.max_rank}",
            )
        _expect(a, (rank, matrices[layer].cols))
        _expect(b, (matrices[layer].rows, rank))
        plan.lowrank[layer] = (a, b)
    if set(plan.header.scales) != set(factors):
        wrong = sorted(set(plan.header.scales) ^ set(factors))[0]
        raise invalid(f"every low-rank layer must have one scale and no other may; layer {wrong[:120]!r} does not fit")


def _check_tokens(plan: FilePlan, token_width: int, limits: FileLimits) -> None:
    if len(plan.tokens) > limits.max_words:
        raise invalid(f"it teaches {len(plan.tokens)} words; allowed: at most {limits.max_words}")
    for entry in plan.tokens.values():
        if len(entry.shape) != 2 or entry.shape[0] > limits.max_word_vectors or entry.shape[1] != token_width:
            raise _wrong_shape(entry, f"[vectors, {token_width}] with 1 to {limits.max_word_vectors} vectors")


def _expect(entry: TensorEntry, shape: tuple[int, ...]) -> None:
    if entry.shape != shape:
        raise _wrong_shape(entry, str(list(shape)))


def _wrong_shape(entry: TensorEntry, allowed: str) -> InvalidArgument:
    return InvalidArgument(
        Reason.ADAPTER_SHAPE_MISMATCH,
        f"adapter file refused: tensor {entry.name!r} has shape {list(entry.shape)}; allowed: {allowed}",
    )


def _unknown(entry: TensorEntry, why: str) -> InvalidArgument:
    return InvalidArgument(
        Reason.ADAPTER_TENSOR_UNKNOWN, f"adapter file refused: tensor {entry.name!r} is unknown: {why}"
    )
