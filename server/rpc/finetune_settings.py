"""FineTuneSettings to the settings of training, which have the same names, and back."""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from hueshift.adapters.errors import FieldViolation, InvalidArgument, Reason
from hueshift.training.checks import LISTS
from hueshift.training.spec import LoraInit, Precision, RateSchedule
from hueshift.v1 import finetune_pb2 as pb

_ENUMS: Mapping[str, tuple[Any, Mapping[int, StrEnum]]] = MappingProxyType(
    {
        "rate_schedule": (
            pb.FineTuneSchedule,
            {
                pb.FINE_TUNE_SCHEDULE_LINEAR: RateSchedule.LINEAR,
                pb.FINE_TUNE_SCHEDULE_CONSTANT: RateSchedule.CONSTANT,
                pb.FINE_TUNE_SCHEDULE_COSINE: RateSchedule.COSINE,
            },
        ),
        "precision": (
            pb.FineTunePrecision,
            {
                pb.FINE_TUNE_PRECISION_AUTO: Precision.AUTO,
                pb.FINE_TUNE_PRECISION_FP32: Precision.FP32,
                pb.FINE_TUNE_PRECISION_BF16: Precision.BF16,
            },
        ),
        "lora_init": (
            pb.FineTuneLoraInit,
            {
                pb.FINE_TUNE_LORA_INIT_GAUSSIAN: LoraInit.GAUSSIAN,
                pb.FINE_TUNE_LORA_INIT_PISSA: LoraInit.PISSA,
            },
        ),
    }
)


def read_settings(message: pb.FineTuneSettings) -> dict[str, Any]:
    """Return what a message sets, by name. Raises InvalidArgument on an enum value that this server does not know."""
    given: dict[str, Any] = {}
    problems: list[FieldViolation] = []
    for field, value in message.ListFields():
        if field.name not in _ENUMS:
            given[field.name] = tuple(value) if field.name in LISTS else value
            continue
        enum, known = _ENUMS[field.name]
        if value in known:
            given[field.name] = known[value]
        else:
            names = ", ".join(enum.keys())
            problems.append(FieldViolation(f"settings.{field.name}", f"{value} given; allowed: {names}"))
    if problems:
        text = "; ".join(f"{problem.field}: {problem.description}" for problem in problems)
        raise InvalidArgument(Reason.INVALID_FIELD, text, violations=problems)
    return given


def write_settings(settings: Mapping[str, Any]) -> pb.FineTuneSettings:
    """Return those of the training settings that a caller can set, as a message."""
    message = pb.FineTuneSettings()
    for name, value in settings.items():
        if name in _ENUMS:
            setattr(message, name, next(number for number, known in _ENUMS[name][1].items() if known == value))
        elif isinstance(value, tuple):
            getattr(message, name).extend(value)
        elif name in message.DESCRIPTOR.fields_by_name:
            setattr(message, name, value)
    return message
