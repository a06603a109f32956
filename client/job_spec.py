"""Options of a fine-tuning job as the contract's spec."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from hueshift.client.uploads import new_key
from hueshift.client.wire import to_enum
from hueshift.v1 import finetune_pb2 as pb
from hueshift.v1 import generation_pb2

if TYPE_CHECKING:
    from hueshift.client.jobs import FineTuneOptions


Setting: TypeAlias = float | str | Sequence[str]
"""Value of a setting: a number, a switch, a choice as a word, or a list of words."""


def make_spec(pictures: Sequence[bytes], masks: Mapping[int, bytes], options: "FineTuneOptions") -> pb.FineTuneSpec:
    """Return the spec. Raises ValueError where options and pictures do not match, or a setting is unknown."""
    spec = pb.FineTuneSpec(
        adapter_id=options.get("adapter_id", ""),
        display_name=options.get("display_name", ""),
        identifier=options.get("identifier", ""),
        class_noun=options.get("class_noun", ""),
        identifier_init=options.get("identifier_init", ()),
        sample_prompts=options.get("sample_prompts", ()),
        settings=_settings(options.get("settings", {})),
        pictures=_pictures(pictures, masks, options),
        idempotency_key=options.get("idempotency_key") or new_key(),
        labels=options.get("labels", {}),
        learn_identifier=options.get("learn_identifier"),
        more_subjects=[
            pb.FineTuneSubjectSpec(
                identifier=subject.identifier, class_noun=subject.class_noun, identifier_init=subject.identifier_init
            )
            for subject in options.get("more_subjects", ())
        ],
        validate_only=options.get("validate_only", False),
        allow_unserved=options.get("allow_unserved", False),
    )
    if "method" in options:
        spec.method = to_enum(pb.FineTuneMethod, "FINE_TUNE_METHOD", options["method"])
    if "priority" in options:
        spec.priority = to_enum(generation_pb2.Priority, "PRIORITY", options["priority"])
    if "subject" in options:
        spec.subject = to_enum(pb.FineTuneSubject, "FINE_TUNE_SUBJECT", options["subject"])
    return spec


def _pictures(
    pictures: Sequence[bytes], masks: Mapping[int, bytes], options: "FineTuneOptions"
) -> list[pb.PictureSpec]:
    count = len(pictures)
    captions = options.get("captions") or [""] * count
    if len(captions) != count:
        raise ValueError(f"{len(captions)} captions for {count} pictures: give one each, or none")
    subjects = options.get("picture_subjects") or [0] * count
    repeats = options.get("picture_repeats") or [1] * count
    for what, given in (("picture_subjects", subjects), ("picture_repeats", repeats)):
        if len(given) != count:
            raise ValueError(f"{len(given)} {what} for {count} pictures: give one each, or none")
    for index in masks:
        if not 0 <= index < count:
            raise ValueError(f"a mask of picture {index}, but there are {count} pictures, counted from 0")
    return [
        pb.PictureSpec(
            caption=caption,
            size_bytes=len(picture),
            subject=subject,
            repeats=repeat,
            mask_size_bytes=len(masks.get(index, b"")),
        )
        for index, (picture, caption, subject, repeat) in enumerate(
            zip(pictures, captions, subjects, repeats, strict=True)
        )
    ]


def _settings(given: Mapping[str, Setting]) -> pb.FineTuneSettings:
    fields: Mapping[str, Any] = pb.FineTuneSettings.DESCRIPTOR.fields_by_name
    settings = pb.FineTuneSettings()
    for name, value in given.items():
        if name not in fields:
            raise ValueError(f"there is no setting {name!r}; there are {', '.join(fields)}")
        field = fields[name]
        if field.is_repeated:
            getattr(settings, name).extend([value] if isinstance(value, str) else value)
        elif field.enum_type is not None:
            setattr(settings, name, _choice(name, field.enum_type, value))
        else:
            _set_number(settings, name, value)
    return settings


def _set_number(settings: pb.FineTuneSettings, name: str, value: Setting) -> None:
    try:
        setattr(settings, name, value)
    except ValueError as error:
        raise ValueError(f"setting {name}: {value!r} given, which its field cannot hold") from error


def read_settings(message: pb.FineTuneSettings) -> dict[str, Setting]:
    """Return what a message sets, by name, choices as words; choices newer than this client are left out."""
    settings: dict[str, Setting] = {}
    for field, value in message.ListFields():
        if field.is_repeated:
            settings[field.name] = tuple(value)
        elif field.enum_type is None:
            settings[field.name] = value
        else:
            words = {number: word for word, number in _words(field.enum_type).items()}
            if value in words:
                settings[field.name] = words[value]
    return settings


def _words(enum: Any) -> dict[str, int]:
    """Choices by word: `linear` of FINE_TUNE_SCHEDULE_LINEAR."""
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return {
        value.name.removeprefix(prefix).lower(): number for number, value in enum.values_by_number.items() if number
    }


def _choice(name: str, enum: Any, word: Setting) -> int:
    words = _words(enum)
    if not isinstance(word, str) or word not in words:
        raise ValueError(f"{name} {word!r}: allowed are {', '.join(words)}")
    return words[word]
