"""What settings and words of a job may be, each with what is wrong and what is allowed when it is not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from hueshift.adapters.errors import FieldViolation
from hueshift.adapters.words import MAX_WORD, check_class_noun, check_word
from hueshift.training.spec import LoraInit, Method, Precision, RateSchedule, Subject

MAX_TEXT = 400
MAX_IDENTIFIER = MAX_WORD
MAX_INIT_WORDS = 16
MAX_SAMPLE_PROMPTS = 4
MAX_PICTURES = 64
MAX_SUBJECTS = 4
MAX_REPEATS = 100
MAX_TARGETS = 32


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
        "gradient_accumulation": NumberRange(1, 64, whole=True),
        "learning_rate": NumberRange(0, 1, above=True),
        "norm_learning_rate": NumberRange(0, 1),
        "identifier_learning_rate": NumberRange(0, 1),
        "warmup_steps": NumberRange(0, 1000, whole=True),
        "seed": NumberRange(0, 2**64 - 1, whole=True),
        "prior_weight": NumberRange(0, 100),
        "prior_images": NumberRange(1, 200, whole=True),
        "sample_interval": NumberRange(0, 5000, whole=True),
        "checkpoint_interval": NumberRange(1, 1000, whole=True),
        "checkpoint_limit": NumberRange(1, 10, whole=True),
        "caption_dropout": NumberRange(0, 0.5),
        "anchor_below": NumberRange(0, 1000, whole=True),
        "ema_decay": NumberRange(0, 0.9999),
        "min_snr_gamma": NumberRange(0, 100),
        "offset_noise": NumberRange(0, 1),
        "background_weight": NumberRange(0, 1),
        "cut_mix_probability": NumberRange(0, 0.9),
        "unmix_weight": NumberRange(0, 1000),
        "random_crops": NumberRange(0, 16, whole=True),
        "rank": NumberRange(0, 128, whole=True),
        "alpha": NumberRange(0, 1024),
        "token_vectors": NumberRange(1, 16, whole=True),
        "early_stop": NumberRange(0, 100, whole=True),
        "text_encoder_learning_rate": NumberRange(0, 1),
    }
)
SWITCHES = frozenset({"mirror", "per_layer", "gradient_checkpointing", "train_text_encoder"})
CHOICES: Mapping[str, type[StrEnum]] = MappingProxyType(
    {"rate_schedule": RateSchedule, "lora_init": LoraInit, "precision": Precision}
)
LISTS = frozenset({"targets", "unmix_layers"})


def check_settings(given: Mapping[str, Any]) -> list[FieldViolation]:
    """Check each setting by itself."""
    problems: list[FieldViolation] = []
    for name, value in given.items():
        if (problem := _setting_problem(name, value)) is not None:
            problems.append(FieldViolation(f"settings.{name}", problem))
    return problems


def check_together(method: Method, chosen: Mapping[str, Any], subjects: Sequence[Subject]) -> list[FieldViolation]:
    """Check settings that must fit the method, the subjects and each other; each was found right by itself."""
    problems: list[FieldViolation] = []

    def refuse(name: str, problem: str) -> None:
        problems.append(FieldViolation(f"settings.{name}", problem))

    ranked = (Method.LORA, Method.DREAMBOOTH)
    if method is Method.LORA and chosen["rank"] < 1:
        refuse("rank", f"{chosen['rank']} given; {method} needs 1 to 128; {Method.DREAMBOOTH} takes 0")
    if method is Method.LORA and chosen["alpha"] <= 0:
        refuse("alpha", f"{chosen['alpha']} given; allowed: above 0, at most 1024")
    if method is Method.LORA and not chosen["targets"]:
        refuse("targets", "none given; name the endings of layers, for example attn2.to_k")
    if method not in ranked and chosen["targets"]:
        refuse("targets", f"{method} chooses its layers itself; leave it out, or use {' or '.join(ranked)}")
    if (problem := _encoder_problem(method, chosen)) is not None:
        refuse(*problem)
    if len(subjects) < 2 and chosen["cut_mix_probability"] > 0:
        refuse("cut_mix_probability", "above 0, but one subject cannot be mixed with another; give 0 or more subjects")
    if chosen["unmix_weight"] > 0 and chosen["cut_mix_probability"] == 0:
        refuse("unmix_weight", "above 0, but no rows are cut; give cut_mix_probability too, or 0")
    if chosen["prior_weight"] > 0:
        problems += [
            FieldViolation(f"{subject_path(i)}class_noun", "empty; prior preservation needs the noun of the class")
            for i, subject in enumerate(subjects)
            if not subject.class_noun
        ]
    return problems


def _encoder_problem(method: Method, chosen: Mapping[str, Any]) -> tuple[str, str] | None:
    trains, rate = chosen["train_text_encoder"], chosen["text_encoder_learning_rate"]
    if trains and method is not Method.SVDIFF:
        return "train_text_encoder", f"true given, but {method} does not shift it; leave it out, or use {Method.SVDIFF}"
    if trains and rate <= 0:
        return "text_encoder_learning_rate", "0 given; allowed: above 0, at most 1, or train_text_encoder off"
    return None


def check_learning(method: Method, learn: bool, rate: float) -> list[FieldViolation]:
    """Check that a method of words alone learns words."""
    if method is not Method.TEXTUAL_INVERSION or (learn and rate > 0):
        return []
    field = "settings.identifier_learning_rate" if learn else "learn_identifier"
    return [FieldViolation(field, "off, but the word is all that textual_inversion learns; turn it on")]


def check_edit(
    method: Method, captions: Sequence[str], first: Subject, learn: bool | None, several: bool
) -> list[FieldViolation]:
    """Check a job of one picture and its prompt. `several`: other subjects or pictures of them were named."""
    problems: list[FieldViolation] = []

    def refuse(field: str, problem: str) -> None:
        problems.append(FieldViolation(field, problem))

    if method is Method.TEXTUAL_INVERSION:
        refuse("method", f"{method} learns words alone, and an edit learns none; use {Method.SVDIFF}")
    if len(captions) != 1:
        refuse("pictures", f"{len(captions)} given; an edit takes 1")
    for i, caption in enumerate(captions):
        if (problem := _text_problem(caption, MAX_TEXT)) is not None:
            refuse(f"pictures[{i}].caption", f"{problem}: an edit begins with what the picture shows")
    if first.identifier:
        refuse("identifier", f"{first.identifier[:80]!r} given, but an edit learns no word; leave it out")
    if learn:
        refuse("learn_identifier", "true given, but an edit learns no word; leave it out")
    if first.identifier_init:
        refuse("identifier_init", "given, but an edit learns no word; leave it out")
    if several:
        refuse("more_subjects", "given, but an edit has its one picture; leave them out")
    if (problem := _noun_problem(first.class_noun)) is not None:
        refuse("class_noun", problem)
    return problems


def check_subjects(subjects: Sequence[Subject], shown: Sequence[int]) -> list[FieldViolation]:
    """Check the subjects, and that each picture shows one of them and each of them is shown."""
    problems: list[FieldViolation] = []
    for number, subject in enumerate(subjects):
        path, word = subject_path(number), subject.identifier
        # The rules of adapter files: the job would succeed with one that no server could read.
        if check_word(word) is not None:
            given = f"{word[:80]!r} given; allowed: one word of at most {MAX_IDENTIFIER} printable characters"
            problems.append(FieldViolation(f"{path}identifier", given))
        elif word.lower() in {other.identifier.lower() for other in subjects[:number]}:
            problems.append(FieldViolation(f"{path}identifier", f"{word!r} is another subject's too; take another"))
        if (problem := _noun_problem(subject.class_noun)) is not None:
            problems.append(FieldViolation(f"{path}class_noun", problem))
        problems += check_count(f"{path}identifier_init", subject.identifier_init, 0, MAX_INIT_WORDS)
        problems += [
            FieldViolation(f"{path}identifier_init[{i}]", problem)
            for i, init in enumerate(subject.identifier_init)
            if (problem := _text_problem(init, MAX_IDENTIFIER)) is not None
        ]
    problems += check_count("more_subjects", subjects[1:], 0, MAX_SUBJECTS - 1)
    for picture, subject_number in enumerate(shown):
        if not 0 <= subject_number < len(subjects):
            given = f"{subject_number} given; allowed: 0 to {len(subjects) - 1}, 0 being the first subject"
            problems.append(FieldViolation(f"pictures[{picture}].subject", given))
    for number in sorted(set(range(len(subjects))) - set(shown)):
        if len(subjects) > 1:
            problems.append(FieldViolation("pictures", f"none shows subject {number}; give each at least one"))
    return problems


def check_pictures(
    captions: Sequence[str], shown: Sequence[int], subjects: Sequence[Subject], repeats: Sequence[int]
) -> list[FieldViolation]:
    """Check captions, which may be empty where the subject has a noun to make one from, and repeats."""
    problems = check_count("pictures", captions, 1, MAX_PICTURES)
    for i, (caption, number) in enumerate(zip(captions, shown, strict=True)):
        field = f"pictures[{i}].caption"
        if len(caption) > MAX_TEXT:
            problems.append(FieldViolation(field, f"{len(caption)} characters given; allowed: at most {MAX_TEXT}"))
        elif not caption.strip() and 0 <= number < len(subjects) and not subjects[number].class_noun.strip():
            problems.append(FieldViolation(field, "empty, and there is no class_noun to make one from; give either"))
    times = NumberRange(1, MAX_REPEATS, whole=True)
    for i, repeat in enumerate(repeats):
        if (problem := times.problem(repeat)) is not None:
            problems.append(FieldViolation(f"pictures[{i}].repeats", problem))
    return problems


def check_prompts(prompts: Sequence[str]) -> list[FieldViolation]:
    """Check the prompts of sample pictures."""
    problems = check_count("sample_prompts", prompts, 0, MAX_SAMPLE_PROMPTS)
    for i, prompt in enumerate(prompts):
        if (problem := _text_problem(prompt, MAX_TEXT)) is not None:
            problems.append(FieldViolation(f"sample_prompts[{i}]", problem))
    return problems


def check_count(field: str, given: Sequence[object], least: int, most: int) -> list[FieldViolation]:
    """Check how many there are."""
    if least <= len(given) <= most:
        return []
    return [FieldViolation(field, f"{len(given)} given; allowed: {least} to {most}")]


def subject_path(number: int) -> str:
    """Field path of a subject: the first one's fields are the spec's own."""
    return "" if number == 0 else f"more_subjects[{number - 1}]."


def _setting_problem(name: str, value: Any) -> str | None:
    if name in RANGES:
        return RANGES[name].problem(value)
    if name in SWITCHES:
        return None if isinstance(value, bool) else f"{value!r} given; allowed: true, false"
    if name in CHOICES:
        known = [choice.value for choice in CHOICES[name]]
        return None if value in known else f"{value!r} given; allowed: {', '.join(known)}"
    if name in LISTS:
        if len(value) > MAX_TARGETS:
            return f"{len(value)} given; allowed: at most {MAX_TARGETS}"
        return next((problem for part in value if (problem := _text_problem(part, MAX_IDENTIFIER * 2))), None)
    return f"unknown; allowed: {', '.join((*RANGES, *sorted(SWITCHES), *CHOICES, *sorted(LISTS)))}"


def _noun_problem(noun: str) -> str | None:
    if check_class_noun(noun):
        return None
    given = f"{noun[:80]!r} ({len(noun)} characters) given"
    return f"{given}; allowed: at most {MAX_IDENTIFIER} printable ones, without blanks around them"


def _text_problem(text: str, most: int) -> str | None:
    if len(text) > most:
        return f"{len(text)} characters given; allowed: at most {most}"
    return None if text.strip() else "empty; write it or leave it out"
