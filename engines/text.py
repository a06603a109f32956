"""Prompts to contexts, with learned words. One encoding per request; nothing of a request outlives it here."""

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.engines.base_model import BaseModel
from hueshift.engines.encoder_weights import TowerWeights
from hueshift.engines.text_tower import Learned, TextTower, Weights
from hueshift.engines.transfer import to_device

# The start and the end of a prompt.
_MARKS = 2


@dataclass(frozen=True, slots=True, eq=False)
class TextResult:
    """`context` [n, tokens, width] fp32 of n prompts, and per prompt how many of its tokens were cut off."""

    context: Tensor
    truncated: list[int]


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """Token ids [max_tokens], padded; where each learned word occurs, one group of positions for each occurrence; and
    how many tokens were cut off. `found` has the occurrences of words that were looked for, learned or not. An
    occurrence that was cut off, even in part, is not there."""

    ids: tuple[int, ...]
    places: Mapping[str, tuple[tuple[int, ...], ...]]
    truncated: int
    found: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    length: int = 0
    """Tokens before the padding, both end marks included."""


Vectors = Mapping[str, Tensor]
"""Embeddings [vectors, width] of learned words; in SDXL those of the first encoder, then those of the second."""

Bypasses = Mapping[str, tuple[Tensor, float]]
"""Textual bypasses v [width] of learned words, with their share."""


class TextStage:
    """The text encoder, or SDXL's two. Safe to call from several threads, which take turns.

    SDXL's context is the hidden states of both encoders side by side, and its pooled text is the second's.
    """

    def __init__(self, base: BaseModel) -> None:
        self._towers = [TextTower(base.text_encoder, penultimate=base.xl is not None)]
        self._pads = [int(base.tokenizer.pad_token_id)]
        if base.xl is not None:
            self._towers.append(TextTower(base.xl.text_encoder, penultimate=True))
            self._pads.append(int(base.xl.tokenizer.pad_token_id))
        self._zero_empty = base.xl is not None and base.xl.zero_empty_prompt
        self._tokenizer = base.tokenizer
        self._max_tokens = base.max_tokens
        self._width = base.layout.token_width
        self._lock = threading.RLock()
        self._empty = self.encode([""], {}).context[0]

    @property
    def empty(self) -> Tensor:
        """Context [tokens, width] of the empty prompt, which serves as the usual negative one. Not to be changed."""
        return self._empty

    def encode(self, prompts: Sequence[str], tokens: Mapping[str, Tensor]) -> TextResult:
        """Encode prompts in one pass.

        `tokens` maps words to their learned embeddings, [width] or [vectors, width], which stand in for the word
        wherever it occurs as a whole word, in any case of letters; a word of several vectors takes as many places.
        Raises InvalidArgument if an embedding has another shape.
        """
        with torch.no_grad():
            return self.encode_differentiably(prompts, tokens)

    def encode_differentiably(self, prompts: Sequence[str], tokens: Mapping[str, Tensor]) -> TextResult:
        """Encode as `encode` does, keeping the gradient with respect to the embeddings: training learns them so."""
        learned = {word: self._checked(word, vectors) for word, vectors in tokens.items()}
        counts = {word: len(vectors) for word, vectors in learned.items()}
        rows = [self.tokenize(prompt, counts) for prompt in prompts]
        context = self.encode_rows(rows, [learned] * len(rows))
        return TextResult(context, [row.truncated for row in rows])

    def encode_rows(
        self, rows: Sequence[TokenizedPrompt], learned: Sequence[Vectors], weights: TowerWeights = ()
    ) -> Tensor:
        """Encode tokenised prompts, each with its own embeddings of its words, as contexts [n, tokens, width] fp32.

        A row's `learned` must have every word of its `places`, with as many vectors. `weights` stand in for the
        encoders' own, for all rows. Keeps gradients.
        """
        return self.encode_pooled(rows, learned, weights)[0]

    def encode_pooled(
        self, rows: Sequence[TokenizedPrompt], learned: Sequence[Vectors], weights: TowerWeights = ()
    ) -> tuple[Tensor, Tensor | None]:
        """Encode as `encode_rows` does; also return SDXL's pooled text [n, pooled width] fp32, None for other models.

        Where the base says so, both are zeros for an empty prompt.
        """
        places = self._placed(rows, learned)
        contexts: list[Tensor] = []
        pooled: Tensor | None = None
        begin = 0
        with self._lock:
            for number, (tower, pad) in enumerate(zip(self._towers, self._pads, strict=True)):
                learned_here = _cut(places, begin, tower.width)
                context, pooled = tower.run(self._ids(rows, pad), learned_here, _weights_of(weights, number))
                contexts.append(context)
                begin += tower.width
        context = torch.cat(contexts, -1) if len(contexts) > 1 else contexts[0]
        if self._zero_empty and pooled is not None:
            filled = to_device(torch.tensor([row.length > _MARKS for row in rows]), context.device)
            context, pooled = context * filled[:, None, None], pooled * filled[:, None]
        return context, pooled

    @torch.no_grad()
    def encode_bypassed(
        self,
        rows: Sequence[TokenizedPrompt],
        learned: Sequence[Vectors],
        bypasses: Sequence[Bypasses],
        weights: TowerWeights = (),
    ) -> tuple[Tensor, Tensor]:
        """Encode as `encode_rows` does; also return the contexts that values see.

        There the last hidden state e at a word's places became e + share |e| v / |v| before the final layer norm
        (Alaluf et al. 2023, section 4.2). Raises InvalidArgument (ADAPTER_TARGET_UNSUPPORTED) for SDXL, which reads
        hidden states before the last layer.
        """
        if len(self._towers) > 1:
            raise InvalidArgument(
                Reason.ADAPTER_TARGET_UNSUPPORTED, "a textual bypass needs a model with one text encoder, not SDXL"
            )
        tower, own = self._towers[0], _weights_of(weights, 0)
        with self._lock:
            context, hidden = tower.run_hidden(self._ids(rows, self._pads[0]), self._placed(rows, learned), own)
            hidden = hidden.clone()
            for number, (row, words) in enumerate(zip(rows, bypasses, strict=True)):
                for word, (vector, share) in words.items():
                    for position in chain.from_iterable(row.places.get(word, ())):
                        encoded = hidden[number, position]
                        change = functional.normalize(vector.to(encoded), dim=0)
                        hidden[number, position] = encoded + share * encoded.norm() * change
            return context, tower.norm_last(hidden, own)

    def _ids(self, rows: Sequence[TokenizedPrompt], pad: int) -> Tensor:
        padded = [(*row.ids[: row.length], *[pad] * (self._max_tokens - row.length)) for row in rows]
        return to_device(torch.tensor(padded), self._towers[0].device)

    def _placed(self, rows: Sequence[TokenizedPrompt], learned: Sequence[Vectors]) -> Learned | None:
        places: list[tuple[int, int]] = []
        vectors: list[Tensor] = []
        for number, (row, words) in enumerate(zip(rows, learned, strict=True)):
            for word, groups in row.places.items():
                for group in groups:
                    places.extend((number, position) for position in group)
                    vectors.append(words[word])
        if not places:
            return None
        where = to_device(torch.tensor(places), self._towers[0].device)
        return where[:, 0], where[:, 1], torch.cat(vectors)

    def tokenize(self, prompt: str, words: Mapping[str, int], find: Sequence[str] = ()) -> TokenizedPrompt:
        """Tokenise a prompt in which each word of `words` takes the given number of places.

        `find` are words or phrases whose places are wanted too: whole words, in any case of letters, plain or learned.
        """
        tokenizer = self._tokenizer
        body: list[int] = []
        # The characters of the prompt behind each token.
        spans: list[tuple[int, int]] = []
        places: dict[str, list[tuple[int, ...]]] = {}
        room = self._max_tokens - 2
        for begin, piece, word in _split(prompt, words):
            if word is None:
                # verbose=False: transformers would log a warning for every long prompt.
                made = tokenizer(piece, add_special_tokens=False, verbose=False, return_offsets_mapping=bool(find))
                body += made.input_ids
                spans += [(begin + first, begin + last) for first, last in made.offset_mapping] if find else ()
                continue
            group = tuple(range(len(body), len(body) + words[word]))
            if group[-1] < room:
                # Places count the start mark.
                places.setdefault(word, []).append(tuple(place + 1 for place in group))
            body += [self._stand_in(word)] * words[word]
            spans += [(begin, begin + len(piece))] * words[word]
        cut = max(0, len(body) - room)
        ids = [tokenizer.bos_token_id, *body[:room], tokenizer.eos_token_id]
        length = len(ids)
        ids += [tokenizer.pad_token_id] * (self._max_tokens - len(ids))
        found = {word: _occurrences(prompt, word, spans, room) for word in find}
        return TokenizedPrompt(tuple(ids), {word: tuple(groups) for word, groups in places.items()}, cut, found, length)

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

    def _stand_in(self, word: str) -> int:
        """An ordinary token to keep a learned word's place: its own first one, if it has an ordinary one."""
        ids: list[int] = self._tokenizer(word, add_special_tokens=False, verbose=False).input_ids
        return next((token for token in ids if token not in self._tokenizer.all_special_ids), 0)

    def _checked(self, word: str, vectors: Tensor) -> Tensor:
        if vectors.dim() not in (1, 2) or vectors.numel() == 0 or vectors.shape[-1] != self._width:
            raise InvalidArgument.for_field(
                f"tokens[{word[:80]!r}]",
                f"shape {list(vectors.shape)}; allowed are [{self._width}] and [vectors, {self._width}]",
            )
        return vectors.reshape(-1, self._width)


def _weights_of(weights: TowerWeights, number: int) -> Weights:
    return weights[number] if weights else {}


def _cut(learned: Learned | None, begin: int, width: int) -> Learned | None:
    """The embeddings of one encoder of several."""
    if learned is None:
        return None
    rows, positions, vectors = learned
    return rows, positions, vectors[:, begin : begin + width]


def _split(prompt: str, words: Mapping[str, int]) -> list[tuple[int, str, str | None]]:
    """Cut a prompt at its learned words: (begin, text, None) or (begin, text, word).

    Longer words win over those they begin with.
    """
    if not words:
        return [(0, prompt, None)]
    known = {word.lower(): word for word in words}
    found = re.compile("|".join(_whole(word) for word in sorted(known, key=len, reverse=True)), re.IGNORECASE)
    pieces: list[tuple[int, str, str | None]] = []
    end = 0
    for match in found.finditer(prompt):
        if prompt[end : match.start()].strip():
            pieces.append((end, prompt[end : match.start()], None))
        pieces.append((match.start(), match.group(), known[match.group().lower()]))
        end = match.end()
    if prompt[end:].strip():
        pieces.append((end, prompt[end:], None))
    return pieces


def _occurrences(prompt: str, word: str, spans: Sequence[tuple[int, int]], room: int) -> tuple[tuple[int, ...], ...]:
    """Places of the tokens behind each occurrence of a word, start mark counted; `spans` are the tokens' characters."""
    # A phrase's words may be apart by any blanks, as the tokenizer has it.
    pattern = r"\s+".join(re.escape(part) for part in word.split())
    groups: list[tuple[int, ...]] = []
    for match in re.finditer(_bounded(word.strip(), pattern), prompt, re.IGNORECASE):
        group = [at for at, (first, last) in enumerate(spans) if first < match.end() and last > match.start()]
        if group and group[-1] < room:
            groups.append(tuple(at + 1 for at in group))
    return tuple(groups)


def _whole(word: str) -> str:
    """A pattern that fits the word, but not inside of a longer one."""
    return _bounded(word, re.escape(word))


def _bounded(word: str, pattern: str) -> str:
    before, after = (r"(?<!\w)" if word[:1].isalnum() else ""), (r"(?!\w)" if word[-1:].isalnum() else "")
    return f"{before}{pattern}{after}"
