"""Small random adapters of every text-side kind, valid for a given base layout; equal seeds give equal adapters."""

import torch
from torch import Tensor

from hueshift.adapters.adapter import Adapter, AdapterKind, GatedEdit, MapperLayer, TokenMapper
from hueshift.adapters.layout import BaseLayout, MatrixLayer

# As large as the embeddings of CLIP's vocabulary are, in root mean square.
_EMBEDDING = 0.02


def multi_vector(layout: BaseLayout, word: str = "<art>", vectors: int = 3, seed: int = 0) -> Adapter:
    """Textual Inversion with several vectors a word."""
    return _taught(layout, "multi-vector", word, tokens={word: _embedding(seed, vectors, layout.token_width)})


def layer_tokens(layout: BaseLayout, word: str = "<layers>", vectors: int = 1, seed: int = 0) -> Adapter:
    """P+: an embedding of its own for every cross-attention layer."""
    shape = (1, len(layout.cross_attentions), vectors, layout.token_width)
    return _taught(layout, "p-plus", word, token_grids={word: _embedding(seed, *shape)})


def stage_tokens(
    layout: BaseLayout,
    word: str = "<stages>",
    stages: int = 4,
    vectors: int = 1,
    seed: int = 0,
    *,
    layers: bool = False,
) -> Adapter:
    """ProSpect: an embedding of its own for every stage of sampling; with `layers`, for every layer too."""
    shape = (stages, len(layout.cross_attentions) if layers else 1, vectors, layout.token_width)
    return _taught(layout, "prospect", word, token_grids={word: _embedding(seed, *shape)})


def mapper(
    layout: BaseLayout,
    word: str = "<mapped>",
    seed: int = 0,
    *,
    features: int = 4,
    hidden: tuple[int, ...] = (8, 8),
    bypass: bool = True,
    norm: float = 0.4,
) -> Adapter:
    """NeTI: a network from timestep and layer to the embedding and, with `bypass`, to the textual bypass."""
    draw = torch.Generator().manual_seed(seed)
    layers: list[MapperLayer] = []
    width = 2 * features
    for size in hidden:
        layers.append(
            MapperLayer(
                weight=torch.randn(size, width, generator=draw) / width**0.5,
                bias=0.1 * torch.randn(size, generator=draw),
                norm_weight=1 + 0.1 * torch.randn(size, generator=draw),
                norm_bias=0.1 * torch.randn(size, generator=draw),
            )
        )
        width = size
    outputs = layout.token_width * (2 if bypass else 1)
    network = TokenMapper(
        frequencies=torch.randn(features, 2, generator=draw),
        layers=tuple(layers),
        output_weight=torch.randn(outputs, width, generator=draw) / width**0.5,
        output_bias=0.1 * torch.randn(outputs, generator=draw),
        norm=norm,
        bypass=0.25 if bypass else 0.0,
    )
    return _taught(layout, "neti", word, mappers={word: network})


def kv_deltas(layout: BaseLayout, word: str = "<new1>", seed: int = 0, *, size: float = 0.05) -> Adapter:
    """Custom Diffusion: deltas of every cross-attention's keys and values, and a word unless it is empty."""
    draw = torch.Generator().manual_seed(seed)
    kv = {layer.name: size * torch.randn(layer.rows, layer.cols, generator=draw) for layer in _keys_and_values(layout)}
    tokens = {word: _embedding(seed + 1, 1, layout.token_width)} if word else {}
    return Adapter(AdapterKind.KV, layout.base_hash, "custom-diffusion", kv=kv, tokens=tokens, identifier=word)


def gated(
    layout: BaseLayout, word: str = "<locked>", seed: int = 0, *, beta: float = 0.75, tau: float = 0.1
) -> Adapter:
    """Perfusion: a gated rank-1 edit of every cross-attention's keys and values, and the word's embedding."""
    draw = torch.Generator().manual_seed(seed)
    layers = _keys_and_values(layout)
    width = layers[0].cols
    target = torch.randn(width, generator=draw)
    # C is symmetric and positive definite, as covariances are, so <C^-1 i*, i*> is above 0.
    root = torch.randn(width, width, generator=draw) / width**0.5
    dual = torch.linalg.solve(root @ root.T + torch.eye(width), target)
    outputs = {layer.name: 0.3 * torch.randn(layer.rows, generator=draw) for layer in layers}
    return Adapter(
        AdapterKind.KV,
        layout.base_hash,
        "perfusion",
        tokens={word: _embedding(seed + 1, 1, layout.token_width)},
        gated={word: GatedEdit(target, dual, outputs, beta, tau)},
        identifier=word,
    )


def _keys_and_values(layout: BaseLayout) -> list[MatrixLayer]:
    names = {f"{name}.{side}" for name in layout.cross_attentions for side in ("to_k", "to_v")}
    return [layer for layer in layout.matrices if layer.name in names]


def _embedding(seed: int, *shape: int) -> Tensor:
    return _EMBEDDING * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _taught(
    layout: BaseLayout,
    method: str,
    word: str,
    *,
    tokens: dict[str, Tensor] | None = None,
    token_grids: dict[str, Tensor] | None = None,
    mappers: dict[str, TokenMapper] | None = None,
) -> Adapter:
    return Adapter(
        AdapterKind.TOKENS,
        layout.base_hash,
        method,
        tokens=tokens or {},
        token_grids=token_grids or {},
        mappers=mappers or {},
        identifier=word,
    )
