"""Collects what is wrong with a request, so that a caller learns of every wrong field at once."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from hueshift.adapters.errors import FieldViolation, HueshiftError, InvalidArgument, Reason
from hueshift.v1 import generation_pb2 as pb

_Number = TypeVar("_Number", bound=int)
_Choice = TypeVar("_Choice")
_Result = TypeVar("_Result")


class Checker:
    """Collects violations, so that a caller learns of all of them at once."""

    def __init__(self) -> None:
        self._violations: list[FieldViolation] = []
        self._not_found: HueshiftError | None = None

    def wrong(self, field: str, description: str) -> None:
        """Keep one wrong field."""
        self._violations.append(FieldViolation(field, description))

    def take(self, error: HueshiftError) -> None:
        """Keep an error raised by another check: its violations, or itself if it has none (NotFound)."""
        if error.violations:
            self._violations.extend(error.violations)
        elif self._not_found is None:
            self._not_found = error

    def run(self, verify: Callable[[], _Result]) -> _Result | None:
        """Return what a check returns; None if it raises, and its error is kept."""
        try:
            return verify()
        except HueshiftError as error:
            self.take(error)
            return None

    def whole(self, field: str, value: int, low: int, high: int, *, default: int) -> int:
        """Return `value`, or the default for 0."""
        if value == 0:
            return default
        if not low <= value <= high:
            self.wrong(field, f"{value} given; allowed: {low} to {high}, or 0 for the default ({default})")
            return default
        return value

    def choice(self, field: str, value: _Number, choices: Mapping[_Number, _Choice], enum: str) -> _Choice:
        """Return what an enum value stands for."""
        if value not in choices:
            names = pb.DESCRIPTOR.enum_types_by_name[enum].values_by_number
            allowed = ", ".join(names[number].name for number in choices)
            self.wrong(field, f"{value} is not a value of this server's contract; allowed: {allowed}")
            return next(iter(choices.values()))
        return choices[value]

    def done(self) -> None:
        """Raise what was found: wrong fields first, for a malformed request tells nothing of what exists."""
        if self._violations:
            text = "; ".join(f"{v.field}: {v.description}" for v in self._violations)
            raise InvalidArgument(Reason.INVALID_FIELD, text, violations=self._violations)
        if self._not_found is not None:
            raise self._not_found
