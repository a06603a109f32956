"""What a job does unless it says otherwise, and the check that turns a request into a complete spec.

The numbers were chosen on emoji-128, whose pictures are 128x128, on a CPU: docs/training.md has the trials.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from hueshift.adapters.errors import FieldViolation, InvalidArgument, Reason
from hueshift.training.spec import Method, SubjectKind, TrainingSpec

MAX_TEXT = 400
MAX_IDENTIFIER = 64
MAX_INIT_WORDS = 16
MAX_SAMPLE_PROMPTS = 4
MAX_PICTURES = 64


@dataclass(frozen=True, slots=True)
class NumberRange:
    """What a number may be: `least` to `most`, `least` itself excluded where `above`."""

    least: float
    most: float
    whole: bool = False
    above: bool = False

    def problem(self, value: float) -> str | None:
        """Say what is wrong with a value, what was given and what is allowed; None if it is fine."""
        low = value <= self.least if self.above else value < self.least
        fits = isinstance(value, int) if self.whole else isinstance(value, int | float)
        # A value that is not a number compares false with everything, so it must be asked about the other way round.
        if fits and not isinstance(value, bool) and not low and value <= self.most:
            return None
        kind = "whole numbers " if self.whole else ""
        bounds = f"above {self.least:g}, at most {self.most:g}" if self.above else f"{self.least:g} to {self.most:.20g}"
        return f"{value!r} given; allowed: {kind}{bounds}"


RANGES: Mapping[str, NumberRange] = MappingProxyType(
    {
        "steps": NumberRange(1, 5000, whole=True),
        "batch_size": NumberRange(1, 16, whole=True),
        "learning_rate": NumberRange(0, 1, above=True),
        "norm_learning_rate": NumberRange(0, 1),
        "identifier_learning_rate": NumberRange(0, 1),
        "warmup_steps": NumberRange(0, 1000, whole=True),
        "seed": NumberRange(0, 2**64 - 1, whole=True),
        "prior_weight": NumberRange(0, 100),
        "prior_images": NumberRange(1, 200, whole=True),
        "sample_interval": NumberRange(0, 5000, whole=True),
        "checkpoint_interval": NumberRange(1, 1000, whole=True),
        "caption_dropout": NumberRange(0, 0.5),
        "anchor_below": NumberRange(0, 1000, whole=True),
        "ema_decay": NumberRange(0, 0.9999),
        "min_snr_gamma": NumberRange(0, 100),
    }
)

_COMMON: Mapping[str, Any] = MappingProxyType(
    {
        "batch_size": 4,
        "warmup_steps": 5,
        "seed": 0,
        "prior_weight": 0.0,
        "prior_images": 24,
        "sample_interval": 0,
        "checkpoint_interval": 25,
        "caption_dropout": 0.1,
        "mirror": False,
        "anchor_below": 250,
        "ema_decay": 0.0,
        "min_snr_gamma": 0.0,
    }
)
_CHOSEN: Mapping[tuple[Method, SubjectKind], Mapping[str, Any]] = MappingProxyType(
    {
        (Method.SVDIFF, SubjectKind.SUBJECT): {
            "steps": 120,
            "learning_rate": 1.5e-2,
            "norm_learning_rate": 1e-3,
            "identifier_learning_rate": 2e-2,
            "anchor_below": 150,
            "ema_decay": 0.9,
        },
        (Method.SVDIFF, SubjectKind.STYLE): {
            "steps": 150,
            "learning_rate": 2e-2,
            "norm_learning_rate": 3e-3,
            "identifier_learning_rate": 1e-2,
            "anchor_below": 100,
            "ema_decay": 0.9,
        },
        (Method.RESIDUALS, SubjectKind.SUBJECT): {
            "steps": 120,
            "learning_rate": 3e-3,
            "norm_learning_rate": 0.0,
            "identifier_learning_rate": 1e-2,
        },
        (Method.RESIDUALS, SubjectKind.STYLE): {
            "steps": 150,
            "learning_rate": 3e-3,
            "norm_learning_rate": 0.0,
            "identifier_learning_rate": 3e-3,
        },
    }
)


def check_identifier(identifier: str, tokenizer: Any, field: str = "identifier") -> int:
    """Return the token id of a word that can be learned.

    `tokenizer` is the base's. Raises InvalidArgument naming `field` unless the word is exactly one ordinary token.
    """
    ids: list[int] = tokenizer(identifier, add_special_tokens=False, verbose=False).input_ids
    if len(ids) != 1 or ids[0] in tokenizer.all_special_ids:
        raise InvalidArgument.for_field(
            field,
            f"{identifier[:80]!r} is {len(ids)} tokens of the base model's vocabulary; a learned word must be exactly "
            "one ordinary token, for example 'sks'",
        )
    return ids[0]


def method_defaults(method: Method, subject_kind: SubjectKind) -> dict[str, Any]:
    """Return the numbers of a job of this method and kind that gives none."""
    return {**_COMMON, **_CHOSEN[method, subject_kind]}


def complete_spec(
    *,
    method: Method,
    subject_kind: SubjectKind,
    captions: Sequence[str],
    identifier: str,
    class_noun: str = "",
    learn_identifier: bool | None = None,
    identifier_init: Sequence[str] = (),
    sample_prompts: Sequence[str] = (),
    **given: float | None,
) -> TrainingSpec:
    """Check a request and fill in what it leaves open.

    `captions` has one entry per picture; an empty one becomes `a {identifier} {class_noun}`. `learn_identifier` None
    means True. `given` holds numbers of TrainingSpec, None for those to be filled in. No sample prompt means the first
    caption. Raises InvalidArgument with every wrong field (`settings.steps`, `pictures[2].caption`, ...), what was
    given and what is allowed. Whether the identifier is one token needs the tokenizer: `check_identifier`.
    """
    learn = learn_identifier is not False
    numbers = {name: value for name, value in given.items() if value is not None}
    problems = _check_numbers(numbers)
    defaults = method_defaults(method, subject_kind)
    chosen = {**defaults, **numbers}
    problems += _check_words(identifier, class_noun, captions, identifier_init, sample_prompts)
    if float(chosen["prior_weight"]) > 0 and not class_noun:
        problems.append(FieldViolation("class_noun", "empty; prior preservation needs the noun of the class"))
    filled = tuple(caption if caption.strip() else f"a {identifier} {class_noun}" for caption in captions)
    if learn and not problems and not any(identifier.lower() in caption.lower() for caption in filled):
        problems.append(
            FieldViolation(
                "identifier",
                f"{identifier!r} stands in no caption, so it cannot be learned; write it into the captions, leave them "
                "empty, or set learn_identifier to false",
            )
        )
    if problems:
        text = "; ".join(f"{problem.field}: {problem.description}" for problem in problems)
        raise InvalidArgument(Reason.INVALID_FIELD, text, violations=problems)
    return TrainingSpec(
        method=method,
        subject_kind=subject_kind,
        captions=filled,
        identifier=identifier,
        class_noun=class_noun,
        learn_identifier=learn,
        identifier_init=tuple(identifier_init),
        sample_prompts=tuple(sample_prompts) or filled[:1],
        **chosen,
    )


def _check_numbers(numbers: Mapping[str, float]) -> list[FieldViolation]:
    problems: list[FieldViolation] = []
    for name, value in numbers.items():
        if name == "mirror":
            continue
        if name not in RANGES:
            problems.append(FieldViolation(f"settings.{name}", f"unknown; allowed: {', '.join(RANGES)}"))
        elif (problem := RANGES[name].problem(value)) is not None:
            problems.append(FieldViolation(f"settings.{name}", problem))
    return problems


def _check_words(
    identifier: str,
    class_noun: str,
    captions: Sequence[str],
    identifier_init: Sequence[str],
    sample_prompts: Sequence[str],
) -> list[FieldViolation]:
    problems: list[FieldViolation] = []
    if not identifier or any(c.isspace() for c in identifier) or len(identifier) > MAX_IDENTIFIER:
        given = f"{identifier[:80]!r} given; allowed: one word of at most {MAX_IDENTIFIER} characters"
        problems.append(FieldViolation("identifier", given))
    if len(class_noun) > MAX_IDENTIFIER:
        given = f"{len(class_noun)} characters given; allowed: at most {MAX_IDENTIFIER}"
        problems.append(FieldViolation("class_noun", given))
    problems += _check_count("pictures", captions, 1, MAX_PICTURES)
    problems += _check_count("identifier_init", identifier_init, 0, MAX_INIT_WORDS)
    problems += _check_count("sample_prompts", sample_prompts, 0, MAX_SAMPLE_PROMPTS)
    paths = [(f"pictures[{i}].caption", caption, MAX_TEXT) for i, caption in enumerate(captions)]
    paths += [(f"identifier_init[{i}]", word, MAX_IDENTIFIER) for i, word in enumerate(identifier_init)]
    paths += [(f"sample_prompts[{i}]", prompt, MAX_TEXT) for i, prompt in enumerate(sample_prompts)]
    for field, text, most in paths:
        if len(text) > most:
            problems.append(FieldViolation(field, f"{len(text)} characters given; allowed: at most {most}"))
        elif text.strip():
            continue
        elif not field.endswith(".caption"):
            problems.append(FieldViolation(field, "empty; write it or leave it out"))
        elif not class_noun.strip():
            problems.append(FieldViolation(field, "empty, and there is no class_noun to make one from; give either"))
    return problems


def _check_count(field: str, given: Sequence[str], least: int, most: int) -> list[FieldViolation]:
    if least <= len(given) <= most:
        return []
    return [FieldViolation(field, f"{len(given)} given; allowed: {least} to {most}")]
