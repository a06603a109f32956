"""The words that name what is learned: their starting embeddings, and the contexts of captions that hold them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hueshift.adapters.errors import InvalidArgument
from hueshift.engines.base_model import BaseModel
from hueshift.engines.encoder_layers import encoders_of
from hueshift.engines.encoder_weights import TowerWeights
from hueshift.engines.text import TextStage, TokenizedPrompt, Vectors
from hueshift.training.conditions import add_sizes, check_base, encode_packed, native_sizes
from hueshift.training.methods.encoder_shifts import EncoderShifts
from hueshift.training.methods.learnable import Values
from hueshift.training.spec import Subject, TrainingSpec

IDENTIFIER = "identifier"


def value_name(subject: int) -> str:
    """Name of the embedding of a subject's word among the values in training."""
    return IDENTIFIER if subject == 0 else f"{IDENTIFIER}/{subject}"


@dataclass(frozen=True, slots=True, eq=False)
class Wording:
    """What has to be encoded for the contexts of some captions: `prompts`, each with its own `learned` embeddings.

    `assemble` makes the contexts of what came out [prompts, tokens, width], or of None where there are no prompts. For
    SDXL both are packed conditions (training/conditions.py).
    """

    prompts: tuple[TokenizedPrompt, ...]
    learned: tuple[Vectors, ...]
    assemble: Callable[[Tensor | None], Tensor]

    def encode(self, text: TextStage, passes: int = 1) -> Tensor | None:
        """Encode the prompts in so many equal passes."""
        if not self.prompts:
            return None
        size = len(self.prompts) // passes
        parts = [
            encode_packed(text, self.prompts[begin : begin + size], self.learned[begin : begin + size])
            for begin in range(0, len(self.prompts), size)
        ]
        return torch.cat(parts) if passes > 1 else parts[0]


class Captions:
    """Encodes captions, with own embeddings for the subjects' words where the job has them.

    A word has one if the job learns it, or starts it from other words; else it is a word like any other. An embedding
    is [layers, vectors, width], where layers is 1, or the number of cross-attentions (P+, Voynov et al. 2023).

    With `encoder` the text encoder learns too: then every caption is encoded anew with its values, the empty one too.

    Contexts for SDXL are packed conditions (training/conditions.py), and an embedding has the numbers of both its
    encoders, side by side.
    """

    def __init__(
        self, base: BaseModel, text: TextStage, spec: TrainingSpec, encoder: EncoderShifts | None = None
    ) -> None:
        """Raises InvalidArgument if a word to be learned or a word of `identifier_init` is not in the vocabulary, or if
        words are to differ by layer in SDXL."""
        check_base(spec, base)
        self._text, self._tokenizer, self._encoder = text, base.tokenizer, encoder
        encoders: tuple[Any, ...] = encoders_of(base)
        self._tables: list[Tensor] = [encoder.get_input_embeddings().weight.detach() for encoder in encoders]
        self._subjects = spec.subjects
        self._vectors, self._layers = spec.token_vectors, 1
        if spec.per_layer:
            self._layers = len(base.layout.cross_attentions)
        self._fixed: dict[str, Tensor] = {}
        self._prompts: dict[str, TokenizedPrompt] = {}
        self._native = native_sizes(base)
        self._empty = text.empty if self._native is None else self._plain([""])[0]
        self.learns = spec.learn_identifier and spec.identifier_learning_rate > 0
        owned = [
            (number, subject)
            for number, subject in enumerate(self._subjects)
            if spec.learn_identifier or subject.identifier_init
        ]
        self._initial = {value_name(number): self._start(number, subject) for number, subject in owned}
        self._words = {value_name(number): subject.identifier for number, subject in owned}
        self._counts = dict.fromkeys(self._words.values(), self._vectors)

    @property
    def empty(self) -> Tensor:
        """The base's own context [tokens, width] of the empty prompt, for pictures of the native size."""
        return self._sized(self._empty[None], None)[0]

    def initial(self) -> dict[str, Tensor]:
        """Return the starting embeddings [layers, vectors, width] by value name."""
        return {name: start.clone() for name, start in self._initial.items()}

    def contexts(
        self, captions: Sequence[str], values: Mapping[str, Tensor] | None, sizes: Tensor | None = None
    ) -> Tensor:
        """Contexts [n, tokens, width] of captions, or [n, tokens, layers * width] where words differ by layer.

        Differentiable with respect to what of `values` they depend on. None means the base's own words and encoder.
        `sizes` [n, 6] are those of the captions' pictures (training/pictures.py), which SDXL is told; None means
        pictures that the base draws at its native size.
        """
        if self._encoder is not None and values is not None:
            unique = list(dict.fromkeys(captions))
            made = self._encode(unique, self._embeddings(values), self._encoder.weights(values))
            places = {caption: place for place, caption in enumerate(unique)}
            return self._sized(torch.stack([made[places[caption]] for caption in captions]), sizes)
        if values is None:
            return self._sized(self._plain(captions), sizes)
        wording = self._wording(captions, values, sizes)
        # On the CPU layer by layer: it gains nothing from one large pass, and jobs keep the bits that they had.
        together = self._text.empty.device.type != "cpu"
        return wording.assemble(wording.encode(self._text, self._layers if not together else 1))

    def wording(self, captions: Sequence[str], values: Values, sizes: Tensor | None = None) -> "Wording | None":
        """Return what `contexts` would encode, for who encodes it with that of others; None if nobody else can.

        A text encoder that learns is the job's own.
        """
        return None if self._encoder is not None else self._wording(captions, values, sizes)

    def _wording(self, captions: Sequence[str], values: Values, sizes: Tensor | None) -> "Wording":
        if not self._words:
            fixed = self._sized(self._plain(captions), sizes)
            return Wording((), (), lambda _: fixed)
        embeddings, count = self._embeddings(values), self._layers
        unique = [caption for caption in dict.fromkeys(captions) if caption]
        prompts = [self._tokenized(caption) for caption in unique]
        layers = [{word: part[layer] for word, part in embeddings.items()} for layer in range(count)]
        learned = [words for words in layers for _ in unique]
        empty = self._repeated(self._empty)

        def assemble(encoded: Tensor | None) -> Tensor:
            made = () if encoded is None else torch.cat(torch.split(encoded, len(unique)), dim=-1)
            found: Mapping[str, Tensor] = {"": empty, **dict(zip(unique, made, strict=True))}
            return self._sized(torch.stack([found[caption] for caption in captions]), sizes)

        return Wording(tuple(prompts * count), tuple(learned), assemble)

    def places(self, caption: str, word: str) -> list[int]:
        """Positions of a subject's word in the encoded caption."""
        groups = self._text.tokenize(caption, {**self._counts, word: self._counts.get(word, 1)}).places
        return [position for group in groups.get(word, ()) for position in group]

    def tokens(self, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the adapter's tokens [vectors, width] and its token grids [1, layers, vectors, width], by word."""
        made = {
            word: values.get(name, self._initial[name]).detach().cpu().clone() for name, word in self._words.items()
        }
        if self._layers == 1:
            return {word: embedding[0] for word, embedding in made.items()}, {}
        return {}, {word: embedding[None] for word, embedding in made.items()}

    def _embeddings(self, values: Values) -> dict[str, Tensor]:
        return {word: values.get(name, self._initial[name]) for name, word in self._words.items()}

    def _encode(self, captions: Sequence[str], embeddings: Mapping[str, Tensor], weights: TowerWeights = ()) -> Tensor:
        rows = [self._tokenized(caption) for caption in captions]
        parts: list[Tensor] = []
        for layer in range(self._layers):
            learned: Vectors = {word: embedding[layer] for word, embedding in embeddings.items()}
            parts.append(encode_packed(self._text, rows, [learned] * len(rows), weights))
        return torch.cat(parts, dim=-1)

    def _tokenized(self, caption: str) -> TokenizedPrompt:
        """Captions of a job are few, and each comes again at every step."""
        if caption not in self._prompts:
            self._prompts[caption] = self._text.tokenize(caption, self._counts)
        return self._prompts[caption]

    def _sized(self, packed: Tensor, sizes: Tensor | None) -> Tensor:
        if self._native is None:
            return packed
        return add_sizes(packed, self._native.expand(len(packed), -1) if sizes is None else sizes)

    def _repeated(self, context: Tensor) -> Tensor:
        return context.repeat(*[1] * (context.dim() - 1), self._layers) if self._layers > 1 else context

    def _plain(self, captions: Sequence[str]) -> Tensor:
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._fixed]
        if new:
            rows = [self._text.tokenize(caption, {}) for caption in new]
            with torch.no_grad():
                self._fixed.update(zip(new, encode_packed(self._text, rows, [{}] * len(rows)), strict=True))
        return torch.stack([self._fixed[caption] for caption in captions])

    def _start(self, number: int, subject: Subject) -> Tensor:
        """The mean of the starting words' tokens, or each vector one of them in turn; without them the word's own."""
        field = "identifier_init" if number == 0 else f"more_subjects[{number - 1}].identifier_init"
        ids = [token for word in subject.identifier_init for token in self._tokens(word, field)]
        ids = ids or [self._text.token_id(subject.identifier)]
        known = torch.cat([table[ids].float() for table in self._tables], -1)
        if self._vectors == 1:
            known = known.mean(0, keepdim=True)
        return known[torch.arange(self._vectors) % len(known)].expand(self._layers, -1, -1).contiguous()

    def _tokens(self, word: str, field: str) -> list[int]:
        ids: list[int] = self._tokenizer(word, add_special_tokens=False, verbose=False).input_ids
        if not ids or any(token in self._tokenizer.all_special_ids for token in ids):
            raise InvalidArgument.for_field(
                field, f"{word[:80]!r} is not made of words of the base model's vocabulary; leave it out"
            )
        return ids
