"""What can be adapted in a base model: its layers, their shapes, and where each one's values lie in a flat row.

The order of layers is the order of `named_modules()` of the UNet, which diffusers fixes for an architecture; the base
hash ties an adapter to the weights themselves, because singular vectors of other weights mean something else.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TypeVar

ENCODERS = ("text_encoder", "text_encoder_2")
"""First part of the names of text encoder layers: the folders that diffusers keeps them in, the second one SDXL's."""

_T = TypeVar("_T")
_RUN_ORDER = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}


@dataclass(frozen=True, slots=True)
class MatrixLayer:
    """A linear or convolution layer seen as a matrix of `rows` x `cols`.

    The matrix is the weight reshaped to (c_out, c_in * kh * kw), as in SVDiff (Han et al. 2023, section 3.2).
    """

    name: str
    weight_shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Output features."""
        return self.weight_shape[0]

    @property
    def cols(self) -> int:
        """Input features times kernel size."""
        return prod(self.weight_shape[1:])

    @property
    def rank(self) -> int:
        """Number of singular values."""
        return min(self.rows, self.cols)

    @property
    def is_conv(self) -> bool:
        """True for convolutions, whatever their kernel."""
        return len(self.weight_shape) == 4

    @property
    def is_pointwise(self) -> bool:
        """True for linear layers and 1x1 convolutions, which act on each position alone."""
        return not self.is_conv or self.weight_shape[2:] == (1, 1)


@dataclass(frozen=True, slots=True)
class NormLayer:
    """A group or layer norm with `size` weights."""

    name: str
    size: int


@dataclass(frozen=True)
class BaseLayout:
    """Every adaptable layer of one base model.

    A spectral row is one flat fp32 vector of `spectral_size` values: the singular values of all matrices in order, then
    the weights of all norms in order. `matrix_offsets` and `norm_offsets` tell where each layer begins in it.

    `token_width` is that of a word's embedding. Where a base model has two text encoders (SDXL) it holds those of both
    side by side, and `token_parts` are their widths; else that is empty.

    `encoder_matrices` and `encoder_norms` are layers of the text encoders. They have no place in a spectral row: what
    they give is an input of the UNet. Their names begin with one of ENCODERS, which no layer of a UNet does.
    """

    base_hash: str
    matrices: tuple[MatrixLayer, ...]
    norms: tuple[NormLayer, ...]
    token_width: int
    token_parts: tuple[int, ...] = ()
    encoder_matrices: tuple[MatrixLayer, ...] = ()
    encoder_norms: tuple[NormLayer, ...] = ()
    matrix_offsets: dict[str, int] = field(init=False, repr=False, compare=False)
    norm_offsets: dict[str, int] = field(init=False, repr=False, compare=False)
    sigma_size: int = field(init=False)
    spectral_size: int = field(init=False)

    def __post_init__(self) -> None:
        """Compute the offsets."""
        position = 0
        matrix_offsets: dict[str, int] = {}
        for matrix in self.matrices:
            matrix_offsets[matrix.name] = position
            position += matrix.rank
        object.__setattr__(self, "sigma_size", position)
        norm_offsets: dict[str, int] = {}
        for norm in self.norms:
            norm_offsets[norm.name] = position
            position += norm.size
        object.__setattr__(self, "matrix_offsets", matrix_offsets)
        object.__setattr__(self, "norm_offsets", norm_offsets)
        object.__setattr__(self, "spectral_size", position)

    @property
    def cross_attentions(self) -> tuple[str, ...]:
        """Names of the cross-attention layers in the order the UNet runs them, which is not that of its modules."""
        names = [layer.name.removesuffix(".to_k") for layer in self.matrices if layer.name.endswith(".attn2.to_k")]
        return tuple(sorted(names, key=lambda name: _RUN_ORDER.get(name.partition(".")[0], len(_RUN_ORDER))))

    def matrix(self, name: str) -> MatrixLayer | None:
        """Return the matrix layer of that name, or None."""
        return next((layer for layer in self.matrices if layer.name == name), None)

    def spans(self) -> Iterator[tuple[str, int, int]]:
        """Yield (layer name, begin, end) of every layer in a spectral row."""
        for matrix in self.matrices:
            begin = self.matrix_offsets[matrix.name]
            yield matrix.name, begin, begin + matrix.rank
        for norm in self.norms:
            begin = self.norm_offsets[norm.name]
            yield norm.name, begin, begin + norm.size

    def encoder_names(self) -> tuple[str, ...]:
        """Names of all layers of the text encoders."""
        matrices, norms = self.encoder_matrices, self.encoder_norms
        return (*(layer.name for layer in matrices), *(layer.name for layer in norms))


def is_encoder_layer(name: str) -> bool:
    """True for names of text encoder layers."""
    return name.partition(".")[0] in ENCODERS


def is_text_side(name: str) -> bool:
    """True for matrix layers of a UNet whose results are inputs of its graph, computed once per request.

    Keys and values of cross-attention, and what SDXL adds to the time embedding for pooled text and sizes. Their full
    deltas stand in `Adapter.kv`, never in `Adapter.dense`.
    """
    return name.endswith((".attn2.to_k", ".attn2.to_v")) or name.startswith("add_embedding.")


def split_layers(parts: Mapping[str, _T]) -> tuple[dict[str, _T], dict[str, _T]]:
    """Return what belongs to layers of the UNet, and what to those of text encoders."""
    unet = {name: part for name, part in parts.items() if not is_encoder_layer(name)}
    return unet, {name: part for name, part in parts.items() if name not in unet}
