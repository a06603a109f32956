"""Small random adapters with full deltas, valid for a given base layout; equal seeds give equal adapters."""

from collections.abc import Sequence

import torch

from hueshift.adapters.adapter import Adapter, AdapterKind
from hueshift.adapters.layout import BaseLayout, is_text_side


def dense_adapter(
    layout: BaseLayout,
    seed: int = 0,
    layers: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float16,
    size: float = 0.05,
) -> Adapter:
    """Deltas of all matrices of the UNet, or of those named: the text side's among `kv`, all others in `dense`."""
    draw = torch.Generator().manual_seed(seed)
    deltas = {
        layer.name: (size * torch.randn(layer.rows, layer.cols, generator=draw)).to(dtype)
        for layer in layout.matrices
        if layers is None or layer.name in layers
    }
    return Adapter(
        AdapterKind.DENSE,
        layout.base_hash,
        "dreambooth",
        dense={name: delta for name, delta in deltas.items() if not is_text_side(name)},
        kv={name: delta for name, delta in deltas.items() if is_text_side(name)},
    )
