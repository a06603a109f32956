"""Which words of a prompt confine the low-rank branches of LAG sampling, and where they stand."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.errors import FieldViolation, InvalidArgument, Reason
from hueshift.engines.text import TokenizedPrompt
from hueshift.engines.text_side import is_text_side
from hueshift.server.generation import GenerationRequest, LagRequest

_ADVICE = "name the words that count in lag.words"


def choose_words(lag: LagRequest, adapters: Sequence[tuple[str, Adapter]]) -> tuple[str, ...]:
    """Return the words of a request with these named adapters: its own, or the identifier and class noun of each.

    Adapters without a branch in the UNet are passed over. Raises InvalidArgument if none has one, or if one has no
    identifier and no words are given.
    """
    confined = [(name, adapter) for name, adapter in adapters if any(not is_text_side(at) for at in adapter.lowrank)]
    if not confined:
        raise InvalidArgument.for_field(
            "lag", "none of the request's adapters has a low-rank part that LAG sampling could confine; leave it out"
        )
    if lag.words:
        return lag.words
    for name, adapter in confined:
        if not adapter.identifier:
            raise InvalidArgument.for_field(
                "lag.words", f"empty, and the adapter {name!r} has no identifier; {_ADVICE}"
            )
    words = [word for _, adapter in confined for word in (adapter.identifier, adapter.class_noun) if word]
    return tuple(dict.fromkeys(words))


def mark_tokens(request: GenerationRequest, words: Sequence[str], prompt: TokenizedPrompt) -> Tensor:
    """Return [tokens] fp32 with 1 at every token of every occurrence of the words in the request's prompt.

    Raises InvalidArgument naming each word that is not there: by its place in lag.words, or for the field prompt.
    """
    limit = f"the first {len(prompt.ids) - 2} tokens of the prompt"
    given = request.lag is not None and bool(request.lag.words)
    violations: list[FieldViolation] = []
    for number, word in enumerate(words):
        if prompt.found.get(word):
            continue
        text = f"LAG sampling looks for {word[:80]!r}, which is not a whole word within {limit}"
        if given:
            violations.append(FieldViolation(f"lag.words[{number}]", f"{text}; leave it out, or write it there"))
        else:
            violations.append(FieldViolation("prompt", f"{text}; write it there, or {_ADVICE}"))
    if violations:
        told = "; ".join(f"{v.field}: {v.description}" for v in violations)
        raise InvalidArgument(Reason.INVALID_FIELD, told, violations=violations)
    marks = torch.zeros(len(prompt.ids))
    for word in words:
        for group in prompt.found[word]:
            marks[list(group)] = 1
    return marks
