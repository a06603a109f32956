"""Prompts of an evaluation: a list for each kind of thing, and those that measure what the base model has kept.

A prompt has one `{}`, where the learned thing's phrase stands: `sks animal` with the adapter, `animal` for the base
model and for CLIP-T. The lists in prompts.json are for emoji pictures and take the part of DreamBooth's 25 prompts for
objects and 25 for live subjects (Ruiz et al. 2023, supplement), which ask for scenes that a model of emoji cannot draw.
"""

import json
import re
from collections.abc import Sequence
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

from hueshift.adapters.errors import InvalidArgument

_LISTS = Path(__file__).with_name("prompts.json")
_PLACE = "{}"


class CaseKind(StrEnum):
    """What was learned: a thing, something alive, or a way of drawing."""

    OBJECT = "object"
    LIVE = "live"
    STYLE = "style"


def case_prompts(kind: CaseKind, count: int | None = None) -> tuple[str, ...]:
    """The first `count` prompts of a kind, all without it."""
    return _stored()[kind.value][:count]


def prior_prompts(count: int | None = None) -> tuple[str, ...]:
    """The first `count` prompts of things that the embedded base model knows."""
    return _stored()["prior"][:count]


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read a JSON list of prompts. Raises InvalidArgument naming what is wrong; OSError as the file does."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidArgument.for_field("prompts", f"{path} is not JSON: {error}") from error
    if not isinstance(found, list) or not all(isinstance(prompt, str) for prompt in found):
        raise InvalidArgument.for_field("prompts", f"{path} holds {type(found).__name__}; give a list of texts")
    return tuple(found)


def check_places(prompts: Sequence[str], field: str) -> None:
    """Raise InvalidArgument naming `field` unless every prompt has one place for the learned thing."""
    for number, prompt in enumerate(prompts):
        if prompt.count(_PLACE) != 1:
            raise InvalidArgument.for_field(
                f"{field}[{number}]", f"{prompt!r} has {prompt.count(_PLACE)} places; write {_PLACE} once"
            )


def fill(prompt: str, phrase: str) -> str:
    """Put `phrase` into the prompt's place, with the article that it needs: `a {}` becomes `an emoji`."""
    before, _, after = prompt.partition(_PLACE)
    if phrase[:1].lower() in "aeiou" and phrase:
        before = re.sub(r"\b([aA]) $", r"\1n ", before)
    else:
        before = re.sub(r"\b([aA])n $", r"\1 ", before)
    return " ".join(f"{before}{phrase}{after}".split())


@cache
def _stored() -> dict[str, tuple[str, ...]]:
    lists: dict[str, list[str]] = json.loads(_LISTS.read_text(encoding="utf-8"))
    return {name: tuple(prompts) for name, prompts in lists.items()}
