"""Prompts to contexts, with learned words. One encoding per request; nothing of a request outlives it here."""

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from hueshift.adapters.errors import InvalidArgument
from hueshift.engines.base_model import BaseModel


@dataclass(frozen=True, slots=True, eq=False)
class TextResult:
    """`context` [n, tokens, width] fp32 of n prompts, and per prompt how many of its tokens were cut off."""

    context: Tensor
    truncated: list[int]


class TextStage:
    """The text encoder. Safe to call from several threads, which take turns.

    The stage runs its own tree of modules over the base's weights, so its hook for learned words is never seen by
    others who use the same encoder, and transformers' own signatures do not matter.
    """

    def __init__(self, base: BaseModel) -> None:
        encoder: Any = base.text_encoder
        shared = {id(t): t for t in chain(encoder.parameters(), encoder.buffers())}
        self._encoder: Any = copy.deepcopy(encoder, shared)
        self._tokenizer = base.tokenizer
        self._max_tokens = base.max_tokens
        self._width = base.layout.token_width
        self._lock = threading.Lock()
        self._learned: dict[int, Tensor] = {}
        self._encoder.get_input_embeddings().register_forward_hook(self._replace)
        self._empty = self.encode([""], {}).context[0]

    @property
    def empty(self) -> Tensor:
        """Context [tokens, width] of the empty prompt, which serves as the usual negative one. Not to be changed."""
        return self._empty

    def encode(self, prompts: Sequence[str], tokens: Mapping[str, Tensor]) -> TextResult:
        """Encode prompts in one pass.

        `tokens` maps words to their learned embeddings, [width] or [1, width], which stand in for the word's own
        embedding wherever its token occurs. Raises InvalidArgument if a word is not exactly one token of the base's
        vocabulary, or an embedding has another shape.
        """
        with torch.no_grad():
            return self.encode_differentiably(prompts, tokens)

    def encode_differentiably(self, prompts: Sequence[str], tokens: Mapping[str, Tensor]) -> TextResult:
        """Encode as `encode` does, keeping the gradient with respect to the embeddings: training learns them so."""
        learned = {self.token_id(word): self._checked(word, vector) for word, vector in tokens.items()}
        with self._lock:
            rows = [self._tokenize(prompt) for prompt in prompts]
            ids = torch.tensor([row for row, _ in rows], device=self._encoder.device)
            self._learned = learned
            try:
                context = self._encoder(input_ids=ids)[0]
            finally:
                self._learned = {}
        return TextResult(context.float(), [cut for _, cut in rows])

    def token_id(self, word: str) -> int:
        """Return the id of a word that is a single token. Raises InvalidArgument when it is not."""
        ids = self._tokenizer(word, add_special_tokens=False, verbose=False).input_ids
        if len(ids) != 1 or ids[0] in self._tokenizer.all_special_ids:
            raise InvalidArgument.for_field(
                "identifier",
                f"{word[:80]!r} is {len(ids)} tokens of the base model's vocabulary; a learned word must be exactly "
                "one ordinary token, for example 'sks'",
            )
        return int(ids[0])

    def _tokenize(self, prompt: str) -> tuple[list[int], int]:
        # verbose=False: transformers would log a warning for every long prompt.
        ids: list[int] = self._tokenizer(prompt, verbose=False).input_ids
        cut = max(0, len(ids) - self._max_tokens)
        if cut:
            ids = [*ids[: self._max_tokens - 1], ids[-1]]
        return ids + [self._tokenizer.pad_token_id] * (self._max_tokens - len(ids)), cut

    def _checked(self, word: str, vector: Tensor) -> Tensor:
        if vector.numel() != self._width or vector.shape[-1] != self._width:
            raise InvalidArgument.for_field(
                f"tokens[{word[:80]!r}]",
                f"shape {list(vector.shape)}; served are [{self._width}] or [1, {self._width}], one vector per word",
            )
        return vector.reshape(-1)

    def _replace(self, _module: torch.nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not self._learned:
            return None
        for token, vector in self._learned.items():
            output = torch.where((args[0] == token)[..., None], vector.to(output), output)
        return output
