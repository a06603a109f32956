"""Which layers of a base's text encoders can be adapted, and where their weights lie in the encoders' own modules."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from hueshift.adapters.layout import ENCODERS, MatrixLayer, NormLayer

if TYPE_CHECKING:
    # Which reads its layout with what is here.
    from hueshift.engines.base_model import BaseModel

# Where CLIP keeps its transformer: queries, keys, values and output of attention, and the two layers of the MLP.
# Embeddings and SDXL's projection of pooled text stay as they are, as they do for LoRA programs.
_LAYERS = "encoder.layers."
# The first part of the names in some versions and classes of transformers, which others leave out.
_ROOT = "text_model."


def encoders_of(base: "BaseModel") -> tuple[nn.Module, ...]:
    """The text encoder, or SDXL's two, in the order of ENCODERS."""
    return (base.text_encoder,) if base.xl is None else (base.text_encoder, base.xl.text_encoder)


def read_encoder_layout(encoders: Sequence[nn.Module]) -> tuple[tuple[MatrixLayer, ...], tuple[NormLayer, ...]]:
    """List the adaptable layers of text encoders: the linear layers of their transformers, and all layer norms."""
    matrices: list[MatrixLayer] = []
    norms: list[NormLayer] = []
    for number, encoder in enumerate(encoders):
        for name, _, weight in _adaptable(number, encoder):
            if weight.dim() == 2:
                matrices.append(MatrixLayer(name, tuple(weight.shape)))
            else:
                norms.append(NormLayer(name, weight.numel()))
    return tuple(matrices), tuple(norms)


def locate_weights(encoders: Sequence[nn.Module]) -> dict[str, tuple[int, str]]:
    """Map each adaptable layer to its encoder, counted from 0, and the name of its weight among the parameters."""
    return {
        name: (number, parameter)
        for number, encoder in enumerate(encoders)
        for name, parameter, _ in _adaptable(number, encoder)
    }


def encoder_parameters(base: "BaseModel") -> dict[str, Tensor]:
    """Weights of the adaptable layers by the layout's names with `.weight` behind them."""
    encoders = encoders_of(base)
    places = locate_weights(encoders)
    return {f"{name}.weight": encoders[number].get_parameter(parameter) for name, (number, parameter) in places.items()}


def _adaptable(number: int, encoder: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    for path, module in encoder.named_modules():
        matrix = isinstance(module, nn.Linear) and _LAYERS in path
        if matrix or isinstance(module, nn.LayerNorm):
            yield f"{ENCODERS[number]}.{path.removeprefix(_ROOT)}", f"{path}.weight", module.weight
