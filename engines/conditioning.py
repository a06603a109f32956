"""What a picture's cross-attention reads at each step: prompts with a mix's words, encoded and projected to K and V.

Most mixes need one projection for all steps. A word that changes with the timestep (ProSpect's stages, NeTI's network)
needs one for each of its values among the steps; a word that changes with the layer is encoded once for each layer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from hueshift.adapters.adapter import TokenMapper
from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.engines.added_embedding import AddedStage, added_width, make_time_ids
from hueshift.engines.base_model import BaseModel
from hueshift.engines.cross_attention import CrossStage
from hueshift.engines.cuda_lane import GraphLane, lane_of, make_beside
from hueshift.engines.encoder_weights import EncoderWeights, TowerWeights
from hueshift.engines.residency_tiers import ResidencyObserver
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.text import Bypasses, TextStage, TokenizedPrompt, Vectors
from hueshift.engines.text_side import TextSide, Word

# Rows that the text encoder takes at a time: SD1.5's at 77 tokens need 0.1 GB each in fp32 while they run.
_ENCODER_ROWS = 32
_LEAKY_SLOPE = 0.01


@dataclass(frozen=True, slots=True, eq=False)
class CrossInputs:
    """`stages` of [rows, tokens, width], rows as in the request's prompts; `stage_of` has the stage of every step.

    Without `stage_of` the one stage serves all steps. `added` has SDXL's embeddings [rows, width] of every stage. All
    are fp32, or in the dtype of an engine that runs in another: half the memory, and half the traffic of every step.
    """

    stages: tuple[Tensor, ...]
    stage_of: tuple[int, ...] = ()
    added: tuple[Tensor, ...] = ()

    def at(self, step: int) -> Tensor:
        """Keys and values at a step, counted from 0."""
        return self.stages[self.stage_of[step] if self.stage_of else 0]

    def added_at(self, step: int) -> Tensor | None:
        """What SDXL adds to the time embedding at a step; None for other models."""
        return self.added[self.stage_of[step] if self.stage_of else 0] if self.added else None

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self.stages[0].device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return (*self.stages, *self.added)


@dataclass(frozen=True, slots=True, eq=False)
class Conditioning:
    """`cross` for every step, the tokens of each prompt that were cut off, and where words occur in each."""

    cross: CrossInputs
    truncated: tuple[int, ...]
    prompts: tuple[TokenizedPrompt, ...] = field(default=())


class Conditioner:
    """Makes conditionings, in `dtype` if that is given. Safe to call from several threads.

    It works on a lane of its own, so that no prompt stands between two steps, and returns what is finished. The empty
    prompt, the usual negative one, is encoded once: its encoding depends on nothing but changes of the text encoder.
    """

    def __init__(
        self,
        base: BaseModel,
        text: TextStage,
        cross: CrossStage,
        added: AddedStage | None = None,
        encoders: EncoderWeights | None = None,
        *,
        dtype: torch.dtype | None = None,
        lane: GraphLane | None = None,
    ) -> None:
        self._text, self._cross, self._added = text, cross, added
        self._encoders = encoders or EncoderWeights(base)
        self._size = (base.pixels, base.pixels)
        self._train_steps = base.schedule.train_steps
        self._layers = len(cross.layout.attentions)
        self._dtype = dtype or torch.float32
        # Urgent: its hundreds of small kernels would each wait for one of a step to hand out its last block, and a
        # request cannot join before they are done.
        self._lane = lane or lane_of(text.empty.device, urgent=True)
        self._empty = text.tokenize("", {})
        # The weights were brought to the device on the caller's stream.
        with torch.no_grad(), self._lane.running():
            self._encoded_empty = text.encode_pooled([self._empty], [{}])

    @torch.no_grad()
    def condition(
        self,
        prompts: Sequence[str],
        side: TextSide,
        timesteps: Sequence[float],
        find: Sequence[str] = (),
        size: tuple[int, int] | None = None,
    ) -> Conditioning:
        """Condition on `prompts` (the negative one first, if there is one) for steps at `timesteps`.

        `find` are words whose places in the prompts are wanted; see TextStage.tokenize. `size` is the picture's width
        and height in pixels, which SDXL wants to know; None means the native one. Raises InvalidArgument
        (ADAPTER_TARGET_UNSUPPORTED) if a prompt for SDXL has a word that changes with the layer.

        Where adapters change the text encoder, all prompts are encoded with it changed, the negative one too, as a
        pipeline with a tuned text encoder does.
        """
        make = partial(self._condition, prompts, side, timesteps, find, size)
        return make_beside(self._lane, make, lambda made: made.cross.tensors)

    def _condition(
        self,
        prompts: Sequence[str],
        side: TextSide,
        timesteps: Sequence[float],
        find: Sequence[str],
        size: tuple[int, int] | None,
    ) -> Conditioning:
        counts = {word: _vectors(value) for word, value in side.words.items()}
        rows = tuple(self._text.tokenize(prompt, counts, find) for prompt in prompts)
        used = {word: side.words[word] for row in rows for word in row.places}
        keys = [self._stage_key(used, timestep) for timestep in timesteps]
        first: dict[tuple[float, ...], float] = {}
        for key, timestep in zip(keys, timesteps, strict=True):
            first.setdefault(key, timestep)
        order = {key: number for number, key in enumerate(first)}
        if self._added is not None:
            _refuse_layered(used)
        weights = self._encoders.get(side.encoder)
        stages: list[Tensor] = []
        added: list[Tensor] = []
        for timestep in first.values():
            keys_see, values_see, pooled = self._contexts(rows, used, timestep, weights)
            stages.append(self._cross.project(keys_see, values_see, side.edits).to(self._dtype))
            if self._added is not None and pooled is not None:
                ids = make_time_ids(*(size or self._size))
                added.append(self._added.embed(pooled, ids, side.edits).to(self._dtype))
        stage_of = tuple(order[key] for key in keys) if len(stages) > 1 else ()
        cross = CrossInputs(tuple(stages), stage_of, tuple(added))
        return Conditioning(cross, tuple(row.truncated for row in rows), rows)

    def _stage_key(self, words: Mapping[str, Word], timestep: float) -> tuple[float, ...]:
        return tuple(
            timestep if isinstance(word, TokenMapper) else float(self._stage(word.shape[0], timestep))
            for word in words.values()
        )

    def _stage(self, stages: int, timestep: float) -> int:
        """Which of `stages` equal parts of the training timesteps this one is in, the first at high noise."""
        place = (self._train_steps - 1 - timestep) / self._train_steps
        return min(stages - 1, max(0, math.floor(place * stages)))

    def _contexts(
        self, rows: Sequence[TokenizedPrompt], words: Mapping[str, Word], timestep: float, weights: TowerWeights
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What keys and values see: [n, tokens, width], or [layers, n, tokens, width] if a word changes with the
        layer. Also SDXL's pooled text [n, width]."""
        layered = any(isinstance(word, TokenMapper) or word.shape[1] > 1 for word in words.values())
        made = [self._values(words, timestep, layer) for layer in range(self._layers if layered else 1)]
        every = [row for _ in made for row in rows]
        learned = [vectors for vectors, _ in made for _ in rows]
        bypasses = [bypass for _, bypass in made for _ in rows]
        parts = [
            self._encode(every[at : at + _ENCODER_ROWS], learned[at : at + _ENCODER_ROWS], bypasses[at:], weights)
            for at in range(0, len(every), _ENCODER_ROWS)
        ]
        shape = (len(made), len(rows)) if layered else (len(rows),)
        keys, values = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        pooled = [part[2] for part in parts if part[2] is not None]
        return (
            keys.view(*shape, *keys.shape[1:]),
            values.view(*shape, *values.shape[1:]),
            torch.cat(pooled) if pooled else None,
        )

    def _encode(
        self,
        rows: Sequence[TokenizedPrompt],
        learned: Sequence[Vectors],
        bypasses: Sequence[Bypasses],
        weights: TowerWeights,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        told = [number for number, row in enumerate(rows) if weights or row.ids != self._empty.ids or row.places]
        if not told:
            keys, pooled = self._encoded_empty
            keys = keys.expand(len(rows), -1, -1)
            return keys, keys, None if pooled is None else pooled.expand(len(rows), -1)
        some, words = [rows[number] for number in told], [learned[number] for number in told]
        if any(bypasses):
            keys, values = self._text.encode_bypassed(some, words, [bypasses[number] for number in told], weights)
            pooled = None
        else:
            keys, pooled = self._text.encode_pooled(some, words, weights)
            values = keys
        if len(told) == len(rows):
            return keys, values, pooled
        empty, empty_pooled = self._encoded_empty

        def spread(found: Tensor, other: Tensor) -> Tensor:
            at = {number: place for place, number in enumerate(told)}
            return torch.stack([found[at[number]] if number in at else other[0] for number in range(len(rows))])

        spread_pooled = None if pooled is None or empty_pooled is None else spread(pooled, empty_pooled)
        return spread(keys, empty), spread(values, empty), spread_pooled

    def _values(self, words: Mapping[str, Word], timestep: float, layer: int) -> tuple[Vectors, Bypasses]:
        """Embeddings [vectors, width] of words at a timestep and layer, and their bypasses."""
        vectors: dict[str, Tensor] = {}
        bypasses: dict[str, tuple[Tensor, float]] = {}
        for name, word in words.items():
            if isinstance(word, TokenMapper):
                place = torch.tensor([timestep / self._train_steps, layer / self._layers])
                embedding, bypass = map_word(word, place)
                vectors[name] = embedding[None]
                if bypass is not None:
                    bypasses[name] = (bypass, word.bypass)
            else:
                stages, layers = word.shape[:2]
                vectors[name] = word[self._stage(stages, timestep) if stages > 1 else 0, layer if layers > 1 else 0]
        return vectors, bypasses


def make_conditioner(
    base: BaseModel,
    factors: SpectralFactors,
    observer: ResidencyObserver | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Conditioner:
    """Make the text encoder and the projection of one base model; `observer` hears of its encoder weights.

    `dtype` is that of an engine that takes keys and values in another than fp32.
    """
    added = AddedStage(base, factors) if added_width(base.layout) else None
    encoders = EncoderWeights(base, factors.encoder, observer=observer)
    return Conditioner(base, TextStage(base), CrossStage(base, factors), added, encoders, dtype=dtype)


def map_word(word: TokenMapper, place: Tensor) -> tuple[Tensor, Tensor | None]:
    """Embedding [width] of a NeTI word at `place` [2], and its textual bypass [width] if it has one.

    Alaluf et al. 2023, sections 4.1 and 4.2: Fourier features, hidden layers, and an output whose length, bypass
    included, is `norm`.
    """
    angle = 2 * math.pi * (word.frequencies.float() @ place)
    x = torch.cat([angle.cos(), angle.sin()])
    for layer in word.layers:
        x = functional.linear(x, layer.weight.float(), layer.bias.float())
        x = functional.layer_norm(x, x.shape, layer.norm_weight.float(), layer.norm_bias.float())
        x = functional.leaky_relu(x, _LEAKY_SLOPE)
    out = functional.linear(x, word.output_weight.float(), word.output_bias.float())
    if word.norm:
        out = functional.normalize(out, dim=0) * word.norm
    width = len(out) // 2 if word.bypass else len(out)
    return out[:width], out[width:] if word.bypass else None


def _vectors(word: Word) -> int:
    return 1 if isinstance(word, TokenMapper) else int(word.shape[2])


def _refuse_layered(words: Mapping[str, Word]) -> None:
    # Pooled text belongs to no layer, so there is no saying which of the embeddings it should see; and each prompt
    # would be encoded 70 times by both encoders.
    layered = [name for name, word in words.items() if isinstance(word, TokenMapper) or word.shape[1] > 1]
    if layered:
        raise InvalidArgument(
            Reason.ADAPTER_TARGET_UNSUPPORTED,
            f"the word {layered[0][:80]!r} has an embedding for each layer (P+, NeTI), which SDXL models do not take; "
            "use an adapter whose words are the same for all layers",
        )
