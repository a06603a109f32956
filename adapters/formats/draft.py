"""An adapter in the making: importers add what they understood, and the draft keeps the account of it."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hueshift.adapters.adapter import Adapter, AdapterKind, EncoderChange, GatedEdit, LowRankFactors, TokenMapper
from hueshift.adapters.container import invalid
from hueshift.adapters.dense_deltas import store_delta
from hueshift.adapters.errors import FailedPrecondition, InvalidArgument, Reason
from hueshift.adapters.formats.compress import Product, compress, compress_product, product_norm
from hueshift.adapters.formats.report import MAX_NAMED, ConvertedLayer, ImportReport, LeftOut, name_some
from hueshift.adapters.formats.spelling import EncoderNames, LayerNames, Part, split_part
from hueshift.adapters.layout import BaseLayout, MatrixLayer, is_encoder_layer, is_text_side, split_layers
from hueshift.adapters.text_parts import check_edit, check_text_parts
from hueshift.adapters.validate import FileLimits
from hueshift.adapters.words import check_word

DEFAULT_RANK = 16
"""Rank of what is not low-rank by nature, unless the caller says otherwise: the default of engine.lowrank_rank."""

TEXT_ENCODER = "it changes the text encoder, in a part or in a form that is not adapted here"
BIAS = "it changes a bias; biases are not adapted here"
NEGATIVE = "-neg"
"""What the negative word of a pair ends in, as DreamArtist (Dong et al. 2022) names the two."""
NO_BRANCH = "this server's engine has no low-rank branch on these layers (setting engine.lowrank_targets)"


@dataclass(frozen=True)
class ImportBase:
    """The base model that a file is to be bound to: its layout, and its UNet's parameters by name, with those of text
    encoders under the layout's names.

    Formats that hold whole weights, magnitudes or singular values of norms need the parameters; without them such files
    are refused.
    """

    layout: BaseLayout
    parameters: Mapping[str, Tensor] = field(default_factory=dict)

    def parameter(self, name: str) -> Tensor:
        """Return a parameter of the base. Raises FailedPrecondition (ADAPTER_BASE_MISMATCH) without it."""
        found = self.parameters.get(name)
        if found is None:
            raise FailedPrecondition(
                Reason.ADAPTER_BASE_MISMATCH,
                f"this format is defined against the base model's own weights, and {name!r} of them is not at hand",
            )
        return found.detach().cpu()

    def matrix(self, layer: MatrixLayer) -> Tensor:
        """The layer's weight as the matrix [rows, cols] of the layout, fp64."""
        return self.parameter(f"{layer.name}.weight").reshape(layer.rows, layer.cols).double()


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """What the caller decides.

    `rank` is the largest rank of a layer; 0 keeps low-rank files as they are and brings all others to DEFAULT_RANK.
    With `dense`, which goes with rank 0 only, changes of the UNet that are not low-rank are kept whole instead. `word`
    names a learned embedding whose file does not. With `served`, low-rank layers that are not in it are left out and
    reported. With `complete`, a file of which anything must be left out is refused.
    """

    rank: int = 0
    word: str = ""
    served: Collection[str] | None = None
    complete: bool = False
    dense: bool = False


class Draft:
    """Collects parts. Layer methods raise InvalidArgument when a layer is given twice or holds what is not finite."""

    def __init__(self, base: ImportBase, options: ImportOptions, limits: FileLimits) -> None:
        self.base = base
        self.options = options
        self.limits = limits
        layout = base.layout
        self.names, self.encoder_names = LayerNames(layout), EncoderNames(layout)
        self.matrices = {layer.name: layer for layer in (*layout.matrices, *layout.encoder_matrices)}
        self.norm_sizes = {layer.name: layer.size for layer in (*layout.norms, *layout.encoder_norms)}
        self.notes: list[str] = []
        self._layers: dict[str, ConvertedLayer] = {}
        self._lowrank: dict[str, LowRankFactors] = {}
        self._norm: dict[str, Tensor] = {}
        self._spectral: dict[str, Tensor] = {}
        self._tokens: dict[str, Tensor] = {}
        self._grids: dict[str, Tensor] = {}
        self._mappers: dict[str, TokenMapper] = {}
        self._kv: dict[str, Tensor] = {}
        self._dense: dict[str, Tensor] = {}
        self._gated: dict[str, GatedEdit] = {}
        self._left_out: dict[str, list[str]] = {}

    def locate(self, module: str) -> str | None:
        """Return the base layer of a foreign module name with its prefix; None for other networks and unknown names."""
        part, name = split_part(module)
        return self.names.find(name) if part is Part.UNET else self.encoder_names.find(module)

    def add_product(self, layer: MatrixLayer, a: Tensor, b: Tensor, scale: float, form: str) -> None:
        """Add scale * b a: kept as it is, value for value, unless its rank is above the wanted or the possible one."""
        if not math.isfinite(scale):
            raise _not_finite(layer.name)
        limit = min(self.options.rank or layer.rank, layer.rank)
        if a.shape[0] > limit:
            product = compress_product(a, b, limit)
            self._put(layer, product, scale, form)
            return
        norm = product_norm(a, b) * abs(scale)
        self._count(ConvertedLayer(layer.name, form, a.shape[0], norm))
        self._lowrank[layer.name] = LowRankFactors(a, b, scale)

    def add_delta(self, layer: MatrixLayer, delta: Tensor, form: str) -> None:
        """Add a change [rows, cols] of a matrix: whole where that is asked for, else brought to the wanted rank.

        A change of nothing is only counted.
        """
        delta = delta.double()
        if not bool(torch.isfinite(delta).all()) or float(delta.abs().max()) > torch.finfo(torch.float32).max:
            raise _not_finite(layer.name)
        if not bool(delta.any()):
            self._count(ConvertedLayer(layer.name, form, 0, 0.0))
            return
        if self.options.dense and not is_encoder_layer(layer.name):
            self._keep_whole(layer, delta, form)
            return
        self._put(layer, compress(delta, min(self.options.rank or DEFAULT_RANK, layer.rank)), 1.0, form)

    def add_norm(self, layer: str, shift: Tensor, form: str = "norm") -> None:
        """Add a change [size] of a norm's weights, exactly."""
        if not bool(torch.isfinite(shift).all()):
            raise _not_finite(layer)
        self._count(ConvertedLayer(layer, form, 0, float(torch.linalg.norm(shift.double()))))
        self._norm[layer] = shift.contiguous()

    def add_spectral(self, layer: str, shift: Tensor) -> None:
        """Add shifts [rank] of the singular values of a matrix, exactly."""
        self._count(ConvertedLayer(layer, "spectral", 0, float(torch.linalg.norm(shift.double()))))
        self._spectral[layer] = shift.contiguous()

    def add_kv(self, layer: MatrixLayer, delta: Tensor) -> None:
        """Add a change [rows, cols] of keys or values of a cross-attention, whole, in fp32."""
        whole = delta.float()
        if not bool(torch.isfinite(whole).all()):
            raise _not_finite(layer.name)
        self._count(ConvertedLayer(layer.name, "kv", 0, float(torch.linalg.norm(whole.double()))))
        if bool(whole.any()):
            self._kv[layer.name] = whole.contiguous()

    def add_word(self, word: str, vectors: Tensor, key: str) -> None:
        """Add a learned word: [width] or [vectors, width]."""
        rows = vectors.reshape(1, -1) if vectors.dim() == 1 else vectors
        width, most = self.base.layout.token_width, self.limits.max_word_vectors
        if rows.dim() != 2 or rows.shape[1] != width or rows.shape[0] > most:
            raise InvalidArgument(
                Reason.ADAPTER_SHAPE_MISMATCH,
                f"adapter file refused: tensor {key!r} has shape {list(vectors.shape)}; allowed: [{width}] or "
                f"[vectors, {width}] with 1 to {most} vectors, the width of this base model's text encoder",
            )
        self._tokens[self._new_word(word, key)] = rows.contiguous()

    def add_grid(self, word: str, grid: Tensor, key: str) -> None:
        """Add a word's embeddings [stages, layers, vectors, width]."""
        self._grids[self._new_word(word, key)] = grid.contiguous()

    def add_mapper(self, word: str, mapper: TokenMapper, key: str) -> None:
        """Add a word's network."""
        self._mappers[self._new_word(word, key)] = mapper

    def add_gated(self, word: str, edit: GatedEdit) -> None:
        """Add the gated edit of a word. Raises InvalidArgument (ADAPTER_FILE_INVALID) if its gate divides by zero."""
        check_edit(word, edit)
        for layer, output in edit.outputs.items():
            self._count(ConvertedLayer(layer, "gated", 0, float(torch.linalg.norm(output.double()))))
        self._gated[word] = edit

    def _new_word(self, word: str, key: str) -> str:
        problem = check_word(word)
        if problem:
            raise invalid(f"tensor {key!r}: the word {problem}")
        if word in self._words:
            raise invalid(f"the word {word!r} is given twice")
        return word

    @property
    def _words(self) -> tuple[str, ...]:
        return (*self._tokens, *self._grids, *self._mappers)

    def leave_out(self, keys: Sequence[str], reason: str) -> None:
        """Keep account of tensors that have no effect."""
        self._left_out.setdefault(reason, []).extend(keys)

    def finish(self, format_name: str) -> tuple[Adapter, ImportReport]:
        """Return the adapter and its report.

        Raises InvalidArgument (ADAPTER_RANK_TOO_LARGE, ADAPTER_TARGET_UNSUPPORTED, ADAPTER_FILE_INVALID).
        """
        if self.options.served is not None:
            self._drop_unserved(self.options.served)
        self._check_ranks()
        left_out = tuple(LeftOut(len(keys), tuple(keys[:MAX_NAMED]), why) for why, keys in self._left_out.items())
        if self.options.complete and left_out:
            raise InvalidArgument(
                Reason.ADAPTER_TARGET_UNSUPPORTED,
                "adapter file refused, as asked, because a part of it has no effect here: "
                + "; ".join(f"{part.reason} ({name_some(self._left_out[part.reason])})" for part in left_out),
            )
        if not (self._by_layer or self._gated or self._words):
            why = "; ".join(f"{reason} ({name_some(keys)})" for reason, keys in self._left_out.items())
            raise invalid(f"nothing of it has an effect here: {why or 'it changes nothing'}")
        order = {name: place for place, name in enumerate((*self.matrices, *self.norm_sizes))}
        layers = tuple(sorted(self._layers.values(), key=lambda layer: order[layer.layer]))
        spectral, encoder_spectral = split_layers(self._spectral)
        norm, encoder_norm = split_layers(self._norm)
        lowrank, encoder_lowrank = split_layers(self._lowrank)
        adapter = Adapter(
            kind=self._kind,
            base_hash=self.base.layout.base_hash,
            method=format_name,
            spectral=spectral,
            norm=norm,
            lowrank=lowrank,
            tokens=self._tokens,
            identifier=self._identifier,
            token_grids=self._grids,
            mappers=self._mappers,
            kv=self._kv,
            gated=self._gated,
            encoder=EncoderChange(encoder_spectral, encoder_norm, encoder_lowrank),
            dense=self._dense,
        )
        check_text_parts(adapter, self.base.layout, self.limits)
        return adapter, ImportReport(format_name, layers, self._words, left_out, tuple(self.notes))

    @property
    def _by_layer(self) -> dict[str, object]:
        return {**self._lowrank, **self._norm, **self._spectral, **self._kv, **self._dense}

    @property
    def _kind(self) -> AdapterKind:
        if self._dense:
            return AdapterKind.DENSE
        if self._lowrank:
            return AdapterKind.LOWRANK
        if self._spectral or self._norm:
            return AdapterKind.SPECTRAL
        return AdapterKind.KV if self._kv or self._gated else AdapterKind.TOKENS

    @property
    def _identifier(self) -> str:
        """The file's only word; of a pair for prompt and negative prompt, the one for the prompt."""
        known = self._words
        words = [word for word in known if not (word.endswith(NEGATIVE) and word.removesuffix(NEGATIVE) in known)]
        return words[0] if len(words) == 1 else ""

    def _keep_whole(self, layer: MatrixLayer, delta: Tensor, form: str) -> None:
        stored = store_delta(delta)
        lost = float(torch.linalg.norm(delta - stored.double()))
        self._count(ConvertedLayer(layer.name, form, 0, float(torch.linalg.norm(delta)), lost))
        if bool(stored.any()):
            (self._kv if is_text_side(layer.name) else self._dense)[layer.name] = stored

    def _put(self, layer: MatrixLayer, product: Product, scale: float, form: str) -> None:
        if not (bool(torch.isfinite(product.a).all()) and bool(torch.isfinite(product.b).all())):
            raise _not_finite(layer.name)
        rank = product.a.shape[0]
        size = abs(scale)
        self._count(ConvertedLayer(layer.name, form, rank, product.norm * size, product.residual * size))
        self._lowrank[layer.name] = LowRankFactors(product.a, product.b, scale)

    def _count(self, layer: ConvertedLayer) -> None:
        if not math.isfinite(layer.norm):
            raise _not_finite(layer.layer)
        if layer.layer in self._layers:
            raise invalid(f"layer {layer.layer!r} is changed twice, under two spellings or in two forms")
        self._layers[layer.layer] = layer

    def _drop_unserved(self, served: Collection[str]) -> None:
        # Text encoders run no branches: their weights are put together, whatever the rank.
        dropped = [name for name in self._lowrank if name not in served and not is_encoder_layer(name)]
        for name in dropped:
            del self._lowrank[name]
            lost = self._layers[name]
            self._layers[name] = ConvertedLayer(name, lost.form, 0, lost.norm, lost.norm)
        if dropped:
            self.leave_out(dropped, NO_BRANCH)

    def _check_ranks(self) -> None:
        for name, factors in self._lowrank.items():
            if factors.rank > self.limits.max_rank:
                raise InvalidArgument(
                    Reason.ADAPTER_RANK_TOO_LARGE,
                    f"adapter file refused: layer {name!r} has rank {factors.rank}; allowed: 1 to "
                    f"{self.limits.max_rank}. Import it with a rank, and it is brought to that one",
                    metadata={"layer": name, "rank": str(factors.rank), "max_rank": str(self.limits.max_rank)},
                )


def _not_finite(layer: str) -> InvalidArgument:
    return InvalidArgument(
        Reason.ADAPTER_NOT_FINITE, f"adapter file refused: the change of layer {layer!r} does not fit into fp32"
    )
