"""Which weights of a plan follow an adapter, under which names the graph holds them, and which way round."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from hueshift.adapters.layout import BaseLayout
from hueshift.engines.text_side import is_text_side


@dataclass(frozen=True, slots=True)
class RefitWeight:
    """One initializer of the dense graph that a refit writes: `count` fp16 values of `layer`'s weight.

    A linear layer's matrix is stored transposed, [cols, rows], as MatMul reads it; a convolution's as torch holds it.
    """

    name: str
    layer: str
    count: int
    is_norm: bool = False
    is_transposed: bool = False


def refit_weights(layout: BaseLayout) -> tuple[RefitWeight, ...]:
    """Every weight of the graph that spectral, norm or low-rank adapters change: the union, so that no adapter leaves
    a trace. Keys and values of cross-attention are the graph's input, so their weights are not in it.
    """
    matrices = [
        RefitWeight(
            name=f"{layer.name}.weight" if layer.is_conv else f"{layer.name}.weight.transposed",
            layer=layer.name,
            count=layer.rows * layer.cols,
            is_transposed=not layer.is_conv,
        )
        for layer in layout.matrices
        if not is_text_side(layer.name)
    ]
    norms = [RefitWeight(f"{layer.name}.weight", layer.name, layer.size, is_norm=True) for layer in layout.norms]
    return (*matrices, *norms)


def weight_table(weights: Iterable[RefitWeight]) -> list[dict[str, object]]:
    """Return the map as it is kept beside a plan."""
    return [asdict(weight) for weight in weights]
