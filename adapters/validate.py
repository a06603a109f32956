"""What an adapter file may hold for one base model: names, shapes, ranks and texts, checked from its header alone."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hueshift.adapters.adapter import AdapterKind
from hueshift.adapters.container import (
    ContainerHeader,
    TensorEntry,
    expect_shape,
    invalid,
    is_finite,
    parse_json,
    show,
    unknown_tensor,
    wrong_shape,
)
from hueshift.adapters.errors import FailedPrecondition, InvalidArgument, Reason
from hueshift.adapters.layout import BaseLayout, MatrixLayer, is_encoder_layer, is_text_side
from hueshift.adapters.text_side import (
    TEXT_SIDE_GROUPS,
    GatedNumbers,
    MapperNumbers,
    TextSidePlan,
    check_text_side,
    read_gated_numbers,
    read_mapper_numbers,
)
from hueshift.adapters.words import MAX_WORD, check_class_noun, checked_word
from hueshift.adapters.words import check_word as check_word

FORMAT = "hueshift.adapter/1"
"""Files without text-side parts. Every server reads them."""

FORMAT_TEXT_SIDE = "hueshift.adapter/2"
"""Files that hold a part, a kind or a class noun which version 1 does not know; servers that know only 1 say so."""

FORMAT_ENCODER = "hueshift.adapter/3"
"""Files that change layers of the text encoder, under the names that layers of the UNet have otherwise."""

FORMAT_DENSE = "hueshift.adapter/4"
"""Files of the kind `dense`, with full deltas of weight matrices, beside anything that earlier versions know."""

METADATA_KEY = "hueshift"
_MIB = 1024 * 1024
_METHOD = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_Layer = TypeVar("_Layer")
_HASH = re.compile(r"[0-9a-f]{64}")
_FIELDS = ("format", "kind", "base_hash", "method", "identifier", "scales")
_FIELDS_OF_2 = (*_FIELDS, "class_noun", "mappers", "gated")
_FIELDS_OF = {
    FORMAT: _FIELDS,
    FORMAT_TEXT_SIDE: _FIELDS_OF_2,
    FORMAT_ENCODER: _FIELDS_OF_2,
    FORMAT_DENSE: _FIELDS_OF_2,
}
# Tooling of the safetensors project adds {"format": "pt"}.
_METADATA_KEYS = {METADATA_KEY, "format"}
_GROUPS_OF_1 = {
    AdapterKind.SPECTRAL: ("spectral", "norm", "tokens"),
    AdapterKind.LOWRANK: ("lowrank", "norm", "tokens"),
    AdapterKind.TOKENS: ("tokens",),
}
_GROUPS = {
    AdapterKind.SPECTRAL: ("spectral", "norm", "tokens", *TEXT_SIDE_GROUPS),
    AdapterKind.LOWRANK: ("lowrank", "norm", "tokens", *TEXT_SIDE_GROUPS),
    AdapterKind.TOKENS: ("tokens", "grid", "mapper"),
    AdapterKind.KV: ("tokens", *TEXT_SIDE_GROUPS),
    AdapterKind.DENSE: ("dense", "spectral", "lowrank", "norm", "tokens", *TEXT_SIDE_GROUPS),
}
# Which kinds a version knows: a reader of that version has no others.
_KINDS_OF = {
    FORMAT: tuple(_GROUPS_OF_1),
    FORMAT_TEXT_SIDE: tuple(kind for kind in AdapterKind if kind is not AdapterKind.DENSE),
    FORMAT_ENCODER: tuple(kind for kind in AdapterKind if kind is not AdapterKind.DENSE),
    FORMAT_DENSE: (AdapterKind.DENSE,),
}


@dataclass(frozen=True, slots=True)
class FileLimits:
    """Caps of an adapter file. An SVDiff file of Stable Diffusion 1.x has 1.7 MB, 391 tensors and a 60 KB header.

    Full deltas of all its layers have 1.7 GB in fp16, more than `max_bytes` allows unless a server's setting says so.
    """

    max_bytes: int = 256 * _MIB
    max_header_bytes: int = 8 * _MIB
    max_tensors: int = 8192
    max_rank: int = 128
    max_words: int = 16
    # A prompt has 77 places, two of them end marks.
    max_word_vectors: int = 75
    # As many as the training timesteps of Stable Diffusion.
    max_stages: int = 1000
    # NeTI has 1024 frequencies and two hidden layers of 128.
    max_mapper_width: int = 4096
    max_mapper_layers: int = 8

    @property
    def max_bytes_text(self) -> str:
        """The cap in words, with the setting that a server takes it from."""
        return f"{self.max_bytes} (setting limits.max_adapter_bytes)"


@dataclass(frozen=True, slots=True)
class AdapterHeader:
    """What a file says of itself, once checked.

    `scales` has one entry per low-rank layer, `mappers` and `gated` the numbers of every word with such a part.
    """

    kind: AdapterKind
    base_hash: str
    method: str
    identifier: str
    scales: Mapping[str, float]
    format: str = FORMAT
    class_noun: str = ""
    mappers: Mapping[str, MapperNumbers] = field(default_factory=dict)
    gated: Mapping[str, GatedNumbers] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FilePlan:
    """Which tensor of the file becomes what; layer names are those of the base layout, text encoders included."""

    header: AdapterHeader
    spectral: dict[str, TensorEntry] = field(default_factory=dict)
    norm: dict[str, TensorEntry] = field(default_factory=dict)
    lowrank: dict[str, tuple[TensorEntry, TensorEntry]] = field(default_factory=dict)
    tokens: dict[str, TensorEntry] = field(default_factory=dict)
    dense: dict[str, TensorEntry] = field(default_factory=dict)
    text_side: TextSidePlan = field(default_factory=TextSidePlan)


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
    version = data.get("format") if isinstance(data, dict) else data
    if not isinstance(data, dict) or not isinstance(version, str) or version not in _FIELDS_OF:
        known = " or ".join(map(repr, _FIELDS_OF))
        raise invalid(f"format {show(version)} given; allowed: {known}. A newer Hueshift may read it")
    fields = _FIELDS_OF[version]
    if set(data) != set(fields):
        wrong = sorted(set(data) ^ set(fields))
        raise invalid(f"metadata fields must be exactly {list(fields)}; missing or unknown: {str(wrong)[:200]}")
    kinds = [kind.value for kind in _KINDS_OF[version]]
    if not isinstance(data["kind"], str) or data["kind"] not in kinds:
        raise invalid(f"kind {show(data['kind'])} given; allowed: {kinds}")
    return AdapterHeader(
        kind=AdapterKind(data["kind"]),
        base_hash=_text(data, "base_hash", _HASH, "64 hexadecimal digits"),
        method=_text(data, "method", _METHOD, "1 to 32 of a-z, 0-9, '_' and '-', beginning with a letter"),
        identifier=_identifier(data["identifier"]),
        scales=_scales(data["scales"]),
        format=version,
        class_noun=_class_noun(data.get("class_noun", "")),
        mappers=read_mapper_numbers(data.get("mappers", {})),
        gated=read_gated_numbers(data.get("gated", {})),
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
    if header.format in (FORMAT_ENCODER, FORMAT_DENSE):
        matrices |= {layer.name: layer for layer in layout.encoder_matrices}
        norms |= {layer.name: layer.size for layer in layout.encoder_norms}
    plan = FilePlan(header)
    factors: dict[str, dict[str, TensorEntry]] = {}
    groups = (_GROUPS_OF_1 if header.format == FORMAT else _GROUPS)[header.kind]
    for entry in container.tensors.values():
        group, _, rest = entry.name.partition("/")
        if group not in groups:
            raise unknown_tensor(entry, f"a {header.kind} adapter of {header.format} holds {', '.join(groups)}")
        if group == "spectral":
            expect_shape(entry, (_layer(entry, rest, matrices).rank,))
            plan.spectral[rest] = entry
        elif group == "norm":
            expect_shape(entry, (_layer(entry, rest, norms),))
            plan.norm[rest] = entry
        elif group == "dense":
            _check_dense(entry, rest, matrices)
            plan.dense[rest] = entry
        elif group == "tokens":
            plan.tokens[checked_word(entry, rest)] = entry
        elif group in TEXT_SIDE_GROUPS:
            plan.text_side.add(entry, group, rest)
        else:
            layer, _, side = rest.rpartition("/")
            _layer(entry, layer, matrices)
            if side not in ("a", "b"):
                raise unknown_tensor(entry, "factors end in '/a' or '/b'")
            factors.setdefault(layer, {})[side] = entry
    _pair_factors(plan, factors, matrices, limits)
    _check_tokens(plan, layout.token_width, limits)
    check_text_side(plan.text_side, layout, limits, plan.tokens, header.mappers, header.gated)
    if not container.tensors:
        raise invalid("it holds no tensors")
    return plan


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


def _class_noun(value: Any) -> str:
    if not isinstance(value, str) or not check_class_noun(value):
        raise invalid(f"class_noun {show(value)} given; allowed: at most {MAX_WORD} printable characters")
    return value


def _scales(value: Any) -> dict[str, float]:
    if not isinstance(value, dict):
        raise invalid("scales must map layers to numbers")
    for layer, scale in value.items():
        if type(scale) not in (int, float) or not is_finite(scale):
            raise invalid(f"the scale of layer {layer[:120]!r} is {show(scale)}; allowed: a finite number")
    return {layer: float(scale) for layer, scale in value.items()}


def _layer(entry: TensorEntry, layer: str, known: Mapping[str, _Layer]) -> _Layer:
    found = known.get(layer)
    if found is None:
        raise unknown_tensor(entry, f"the base model has no such layer {layer[:120]!r} of that kind")
    return found


def _check_dense(entry: TensorEntry, name: str, matrices: Mapping[str, MatrixLayer]) -> None:
    layer = _layer(entry, name, matrices)
    if is_encoder_layer(name):
        raise unknown_tensor(entry, "full deltas are of the UNet's layers; text encoders have spectral, norm, lowrank")
    if is_text_side(name):
        raise unknown_tensor(entry, f"full deltas of a layer of the text side are kept as 'kv/{name}'")
    expect_shape(entry, (layer.rows, layer.cols))


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
        expect_shape(a, (rank, matrices[layer].cols))
        expect_shape(b, (matrices[layer].rows, rank))
        plan.lowrank[layer] = (a, b)
    if set(plan.header.scales) != set(factors):
        wrong = sorted(set(plan.header.scales) ^ set(factors))[0]
        raise invalid(f"every low-rank layer must have one scale and no other may; layer {wrong[:120]!r} does not fit")


def _check_tokens(plan: FilePlan, token_width: int, limits: FileLimits) -> None:
    for entry in plan.tokens.values():
        if len(entry.shape) != 2 or entry.shape[0] > limits.max_word_vectors or entry.shape[1] != token_width:
            raise wrong_shape(entry, f"[vectors, {token_width}] with 1 to {limits.max_word_vectors} vectors")
