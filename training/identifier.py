"""The word that names what is learned: its starting embedding, and the contexts of captions that hold it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hueshift.adapters.errors import InvalidArgument
from hueshift.engines.base_model import BaseModel
from hueshift.engines.text import TextStage
from hueshift.training.spec import TrainingSpec


class Captions:
    """Encodes captions, with an own embedding for the identifier where the job has one.

    It has one if it learns it, or if it starts from other words; else the identifier is a word like any other.
    """

    def __init__(self, base: BaseModel, text: TextStage, spec: TrainingSpec) -> None:
        """Raises InvalidArgument if the identifier or a word of `identifier_init` does not fit the vocabulary."""
        self._text = text
        self._word = spec.identifier
        self._fixed: dict[str, Tensor] = {}
        self.learns = spec.learn_identifier and spec.identifier_learning_rate > 0
        self.has_embedding = spec.learn_identifier or bool(spec.identifier_init)
        self._table: Tensor = base.text_encoder.get_input_embeddings().weight.detach()
        self._tokenizer = base.tokenizer
        self._init = spec.identifier_init
        if self.has_embedding:
            self._token = text.token_id(spec.identifier)

    def initial(self) -> Tensor:
        """Return the starting embedding [width]: the mean of the tokens of `identifier_init`, or the word's own."""
        ids = [token for word in self._init for token in self._tokens(word)] or [self._token]
        return self._table[ids].float().mean(0).cpu()

    def contexts(self, captions: Sequence[str], embedding: Tensor | None) -> Tensor:
        """Contexts [n, tokens, width] of captions; differentiable with respect to `embedding` [width].

        The empty caption and, without an embedding, all captions are encoded once and kept.
        """
        if embedding is not None and any(captions):
            unique = [caption for caption in dict.fromkeys(captions) if caption]
            encoded = self._text.encode_differentiably(unique, {self._word: embedding}).context
            found: Mapping[str, Tensor] = {"": self._text.empty, **dict(zip(unique, encoded, strict=True))}
        else:
            self._remember(captions)
            found = self._fixed
        return torch.stack([found[caption] for caption in captions])

    def tokens(self, embedding: Tensor | None) -> dict[str, Tensor]:
        """Return the adapter's tokens: the identifier's embedding as [1, width], if there is one."""
        return {} if embedding is None else {self._word: embedding.detach().clone()[None]}

    def _remember(self, captions: Sequence[str]) -> None:
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._fixed]
        if new:
            self._fixed.update(zip(new, self._text.encode(new, {}).context, strict=True))

    def _tokens(self, word: str) -> list[int]:
        ids: list[int] = self._tokenizer(word, add_special_tokens=False, verbose=False).input_ids
        if not ids or any(token in self._tokenizer.all_special_ids for token in ids):
            raise InvalidArgument.for_field(
                "identifier_init", f"{word[:80]!r} is not made of words of the base model's vocabulary; leave it out"
            )
        return ids
