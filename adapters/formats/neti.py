"""NeTI (Alaluf et al. 2023): the mapper's state dict of the authors' program, with the encoder's frequencies beside it.

The program (NeuralTextualInversion/NeTI) pickles the encoder as a Python module; docs/adapters.md has the lines that
make a safetensors file of it: the state dict's names, `encoder.w` [n, 2], and the metadata `placeholder_token` and
`target_norm`. Its network becomes ours without loss:

- features sin(w x), cos(w x) of x = (timestep, layer number), scaled to length 1, which is a division by sqrt(n): ours
  are cos(2 pi f p), sin(2 pi f p) of p = (timestep / 1000, layer / layers), so f = w (1000, layers) / (2 pi);
- a linear layer on them without activation (`net.0`), which is multiplied into the next one (`net.1`);
- then linear, layer norm, leaky ReLU, twice, and a linear output, all as ours.
"""

import math

import torch
from torch import Tensor

from hueshift.adapters.adapter import MapperLayer, TokenMapper
from hueshift.adapters.container import invalid
from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.adapters.formats.draft import Draft
from hueshift.adapters.formats.source import ForeignFile
from hueshift.adapters.formats.words import word_of

# The program's number of timesteps, and the weight of its bypass.
_TIMESTEPS = 1000
_BYPASS = 0.2
_PLACEHOLDER = "placeholder_token"
_NORM = "target_norm"
_EMBEDDING_NOTE = (
    "the embedding {key!r} beside the mapper has no effect: it only reserves the word in a vocabulary; the mapper "
    "makes the word's embeddings"
)


def read(draft: Draft, source: ForeignFile) -> None:
    """Add the mapper. Raises InvalidArgument (ADAPTER_FILE_INVALID, ADAPTER_SHAPE_MISMATCH) naming what is wrong."""
    prefix = "mapper." if "mapper.output_layer.0.weight" in source.entries else ""
    norm = _target_norm(source)
    frequencies = _read_matrix(source, f"{prefix}encoder.w", 2)
    layers = _layers(source, prefix, frequencies)
    hidden = layers[-1].weight.shape[0]
    output = _read_matrix(source, f"{prefix}output_layer.0.weight", hidden)
    width = draft.base.layout.token_width
    if output.shape[0] not in (width, 2 * width):
        raise InvalidArgument(
            Reason.ADAPTER_SHAPE_MISMATCH,
            f"adapter file refused: the mapper gives out {output.shape[0]} values; allowed: {width}, or with a bypass "
            f"{2 * width}, the width of this base model's text encoder",
        )
    bypass = output.shape[0] == 2 * width
    count = len(draft.base.layout.cross_attentions)
    scale = torch.tensor([_TIMESTEPS, count], dtype=torch.float64) / (2 * math.pi)
    mapper = TokenMapper(
        frequencies=(frequencies.double() * scale).float(),
        layers=layers,
        output_weight=output,
        output_bias=source.read_shaped(f"{prefix}output_layer.0.bias", output.shape[0]),
        norm=norm,
        bypass=_BYPASS if bypass else 0.0,
    )
    _skip_copies(draft, source, prefix)
    draft.add_mapper(_word(draft, source), mapper, f"{prefix}output_layer.0.weight")


def _layers(source: ForeignFile, prefix: str, frequencies: Tensor) -> tuple[MapperLayer, ...]:
    features = frequencies.shape[0]
    if f"{prefix}net.0.weight" not in source.entries:
        raise invalid("its mapper has no 'net.0.weight': mappers without positional encoding are not read")
    first = _read_matrix(source, f"{prefix}net.0.weight", 2 * features).double() / math.sqrt(features)
    first_bias = source.read_shaped(f"{prefix}net.0.bias", first.shape[0]).double()
    # Their features begin with the sines, ours with the cosines.
    first = torch.cat([first[:, features:], first[:, :features]], dim=1)
    layers: list[MapperLayer] = []
    inputs = first.shape[0]
    while f"{prefix}net.{3 * len(layers) + 1}.weight" in source.entries:
        linear, norm = f"{prefix}net.{3 * len(layers) + 1}", f"{prefix}net.{3 * len(layers) + 2}"
        weight = _read_matrix(source, f"{linear}.weight", inputs)
        inputs = weight.shape[0]
        bias = source.read_shaped(f"{linear}.bias", inputs)
        if not layers:
            bias = (weight.double() @ first_bias + bias.double()).float()
            weight = (weight.double() @ first).float()
        norm_weight = source.read_shaped(f"{norm}.weight", inputs)
        layers.append(MapperLayer(weight, bias, norm_weight, source.read_shaped(f"{norm}.bias", inputs)))
    if not layers:
        raise invalid("its mapper has no hidden layer 'net.1.weight'")
    return tuple(layers)


def _read_matrix(source: ForeignFile, key: str, cols: int) -> Tensor:
    entry = source.entries.get(key)
    if entry is None:
        raise invalid(f"it has no tensor {key!r}, which mappers of NeTI need; docs/adapters.md tells how to save it")
    rows = entry.shape[0] if entry.shape else 0
    return source.read_shaped(key, rows, cols)


def _target_norm(source: ForeignFile) -> float:
    """The length that outputs are scaled to: it is in the program's settings, not in its state dict."""
    text = source.metadata.get(_NORM)
    if text is None:
        raise invalid(
            f"it does not say the mapper's {_NORM!r} in its metadata; allowed: a number, or None where outputs are not "
            "normalised"
        )
    if text.lower() in ("none", ""):
        return 0.0
    return source.stated_number(_NORM) or 0.0


def _skip_copies(draft: Draft, source: ForeignFile, prefix: str) -> None:
    """The state dict has `net.0` under a second name; the learned embedding beside the mapper is not one."""
    for end in ("weight", "bias"):
        key = f"{prefix}input_layer.{end}"
        if key in source.entries:
            same = source.read_shaped(key, *source.entries[f"{prefix}net.0.{end}"].shape)
            if not torch.equal(same, source.read(f"{prefix}net.0.{end}")):
                raise invalid(f"tensors {key!r} and '{prefix}net.0.{end}' differ; they are one layer under two names")
    for key in source.leftover:
        if key.startswith("<") or key == source.metadata.get(_PLACEHOLDER):
            source.skip(key)
            draft.notes.append(_EMBEDDING_NOTE.format(key=key[:80]))


def _word(draft: Draft, source: ForeignFile) -> str:
    beside = [key for key in source.entries if key.startswith("<")]
    stated = source.metadata.get(_PLACEHOLDER) or (beside[0] if len(beside) == 1 else "*")
    return word_of(stated, draft, source)
