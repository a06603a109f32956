"""What an adapter file holds: no base model, no server, no torch. Only norms of our own files look past the header."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from hueshift.adapters.container import PREFIX, ContainerHeader, TensorEntry, header_length, parse_header
from hueshift.adapters.formats.detect import Format, detect, numbered_words
from hueshift.adapters.formats.norms import part_norms
from hueshift.adapters.formats.spelling import Part, split_part
from hueshift.adapters.layout import is_encoder_layer
from hueshift.adapters.validate import AdapterHeader, FileLimits, read_adapter_header

_START = 512
_BY_LAYER = ("spectral", "norm", "lowrank", "kv", "dense")
# The tensor of a module that tells its rank, and on which side of it the rank stands.
_RANK_TENSORS: tuple[tuple[re.Pattern[str], int], ...] = (
    (re.compile(r"[._]lora_?\.?(?:A(?:\.[\w-]+)?|down|linear_layer\.down)\.weight$"), 0),
    (re.compile(r"\.lora_linear_layer\.down\.weight$"), 0),
    (re.compile(r"\.hada_w1_b$"), 0),
    (re.compile(r"\.lokr_w[12]_b$"), 0),
    (re.compile(r"^unet:\d+:down$"), 0),
    (re.compile(r"^lowrank/.+/a$"), 0),
)
_FORMS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("low-rank", _RANK_TENSORS[0][0]),
    ("low-rank", re.compile(r"^unet:\d+:down$|^lowrank/.+/a$|\.lora_linear_layer\.down\.weight$")),
    ("LoHa", re.compile(r"\.hada_w1_a$")),
    ("LoKr", re.compile(r"\.lokr_w1(_a)?$")),
    ("DoRA magnitudes", re.compile(r"\.dora_scale$|\.lora_magnitude_vector")),
    ("norm shifts", re.compile(r"\.w_norm$|^norm/")),
    ("spectral shifts", re.compile(r"\.delta$|^spectral/")),
    ("whole differences", re.compile(r"\.diff$")),
    ("whole matrices", re.compile(r"_custom_diffusion(\.0)?\.weight$")),
    ("learned words", re.compile(r"^<[^<>]+>$|^tokens/|^bundle_emb\.|^emb_params$|^string_to_param\.")),
    ("words by layer or stage", re.compile(r"^grid/|^prospect\.|-0$")),
    ("mappers", re.compile(r"^mapper/.+/output_weight$|^(mapper\.)?output_layer\.0\.weight$")),
    ("key and value deltas", re.compile(r"^kv/")),
    ("full deltas", re.compile(r"^dense/")),
    ("gated edits", re.compile(r"^gated/.+/target$|^target_input$")),
)
# Long texts of training programs (tag counts, bucket lists) say nothing about the adapter itself.
_MAX_TEXT = 120


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What a file says. `ranks` counts layers by rank, `parts` tensors by what they are, `networks` by network.

    `words` gives the vectors of every word, `word_forms` says how a word is taught where that is more than vectors.
    `gated` tells the gate of a word. `norms` are of every part of one of our own files.
    """

    format: str
    size_bytes: int
    tensors: int
    values: int
    kind: str = ""
    method: str = ""
    base_hash: str = ""
    identifier: str = ""
    parts: Mapping[str, int] = field(default_factory=dict)
    ranks: Mapping[int, int] = field(default_factory=dict)
    words: Mapping[str, int] = field(default_factory=dict)
    word_forms: Mapping[str, str] = field(default_factory=dict)
    gated: Mapping[str, str] = field(default_factory=dict)
    norms: Mapping[str, float] = field(default_factory=dict)
    class_noun: str = ""
    dtypes: Mapping[str, int] = field(default_factory=dict)
    networks: Mapping[str, int] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_header(data: bytes, limits: FileLimits | None = None) -> ContainerHeader:
    """Check and return the header of any safetensors file. Raises InvalidArgument as reading an adapter does."""
    limits = limits or FileLimits()
    length = header_length(data[:_START], len(data), limits.max_header_bytes)
    return parse_header(data[PREFIX : PREFIX + length], len(data), limits.max_tensors, foreign=True)


def inspect(data: bytes) -> FileFacts:
    """Describe an adapter file of any known format. Raises InvalidArgument if it is none."""
    header = read_header(data)
    found = detect(header)
    own = read_adapter_header(header) if found is Format.HUESHIFT else None
    entries = header.tensors.values()
    stated = header.metadata.get("hueshift_base_hash", "")
    return FileFacts(
        format=found.value,
        size_bytes=len(data),
        tensors=len(header.tensors),
        values=sum(prod(entry.shape) for entry in entries),
        kind=own.kind.value if own else "",
        method=own.method if own else "",
        base_hash=own.base_hash if own else stated,
        identifier=own.identifier if own else "",
        parts=_parts(header),
        ranks=dict(sorted(Counter(rank for entry in entries if (rank := _rank(entry))).items())),
        words=_words(found, header),
        word_forms=_word_forms(found, header, own),
        gated=_gates(header, own) if own else {},
        norms=part_norms(data, header, own.scales) if own else {},
        class_noun=own.class_noun if own else "",
        dtypes=dict(sorted(Counter(entry.dtype for entry in entries).items())),
        networks=_own_networks(header) if own else _networks(found, header),
        metadata={} if own else _texts(header),
    )


def _parts(header: ContainerHeader) -> dict[str, int]:
    counts = Counter(form for name in header.tensors for form, pattern in _FORMS if pattern.search(name))
    return dict(counts) or {"tensors": len(header.tensors)}


def _rank(entry: TensorEntry) -> int:
    for pattern, side in _RANK_TENSORS:
        if entry.shape and pattern.search(entry.name):
            return entry.shape[side]
    return 0


def _words(found: Format, header: ContainerHeader) -> dict[str, int]:
    """Words and their numbers of vectors."""
    words: dict[str, int] = {}
    for name, entry in header.tensors.items():
        vectors = entry.shape[0] if len(entry.shape) > 1 else 1
        bundled = re.fullmatch(r"bundle_emb\.(.+)\.(?:string_to_param\.\*|emb_params)", name)
        if bundled:
            words[bundled[1]] = vectors
        elif name.startswith("tokens/"):
            words[name.removeprefix("tokens/")] = vectors
        elif name.startswith("grid/") and len(entry.shape) == 4:
            words[name.removeprefix("grid/")] = entry.shape[2]
        elif found in (Format.P_PLUS, Format.PROSPECT):
            words.setdefault(_grid_word(found, name), 1)
        elif re.fullmatch(r"<[^<>]+>", name) or found is Format.TEXTUAL_INVERSION:
            words[name] = vectors
    return words


def _grid_word(found: Format, name: str) -> str:
    return name.rpartition("-")[0] if found is Format.P_PLUS else name.partition(".")[2]


def _word_forms(found: Format, header: ContainerHeader, own: AdapterHeader | None) -> dict[str, str]:
    """How words are taught that are more than rows of vectors."""
    forms: dict[str, str] = {}
    if found is Format.P_PLUS:
        forms = {word: f"{len(names)} layers" for word, names in numbered_words(header.tensors).items()}
    for name, entry in header.tensors.items():
        if found is Format.PROSPECT and name.startswith("prospect."):
            forms[_grid_word(found, name)] = f"{entry.shape[0] if entry.shape else 0} stages"
        elif own and name.startswith("grid/") and len(entry.shape) == 4:
            stages, layers, vectors, _ = entry.shape
            forms[name.removeprefix("grid/")] = f"{vectors} vectors x {layers} layers x {stages} stages"
    for word, numbers in (own.mappers if own else {}).items():
        prefix = f"mapper/{word}/layers/"
        hidden = sum(name.startswith(prefix) and name.endswith("/weight") for name in header.tensors)
        forms[word] = f"mapper of {hidden} hidden layers, norm {numbers.norm:g}, bypass {numbers.bypass:g}"
    return forms


def _gates(header: ContainerHeader, own: AdapterHeader) -> dict[str, str]:
    gates: dict[str, str] = {}
    for word, numbers in own.gated.items():
        layers = sum(name.startswith(f"gated/{word}/outputs/") for name in header.tensors)
        gates[word] = f"{layers} layers, beta {numbers.beta:g}, tau {numbers.tau:g}"
    return gates


def _texts(header: ContainerHeader) -> dict[str, str]:
    found = {name: text for name, text in sorted(header.metadata.items()) if len(text) <= _MAX_TEXT}
    # cloneofsimo's file repeats the rank of every layer.
    return {name: text for name, text in found.items() if not re.search(r":\d+:rank$", name)}


def _own_networks(header: ContainerHeader) -> dict[str, int]:
    """Told where the text encoder is among them; the names of our own files begin with what a tensor is."""
    layers = [rest for group, _, rest in (name.partition("/") for name in header.tensors) if group in _BY_LAYER]
    text = sum(map(is_encoder_layer, layers))
    return {Part.UNET.value: len(layers) - text, Part.TEXT.value: text} if text else {}


def _networks(found: Format, header: ContainerHeader) -> dict[str, int]:
    if found is Format.TEXTUAL_INVERSION:
        return {}
    counts = Counter(split_part(name)[0] for name in header.tensors)
    return {part.value: counts[part] for part in Part if counts[part]}
