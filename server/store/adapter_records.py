"""What the adapter store answers with, and the limits of what callers may write on an adapter."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from hueshift.adapters.errors import FieldViolation, InvalidArgument, Reason

MAX_DISPLAY_NAME = 120
MAX_LABELS = 16
MAX_LABEL_TEXT = 63
_LABEL_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}")
_LABEL_KEY_RULE = f"1 to {MAX_LABEL_TEXT} of A-Z, a-z, 0-9, '.', '_', '/' and '-', beginning with a letter or digit"


@dataclass(frozen=True, slots=True)
class RevisionRecord:
    """One stored file of an adapter. Times are seconds since the epoch; `job_id` is empty for imports."""

    tenant: str
    adapter_id: str
    revision: int
    content_hash: str
    base_hash: str
    kind: str
    method: str
    identifier: str
    size_bytes: int
    job_id: str
    created: float


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """An adapter and its newest revision."""

    tenant: str
    adapter_id: str
    display_name: str
    labels: Mapping[str, str]
    pinned: bool
    created: float
    updated: float
    newest: RevisionRecord

    @property
    def revision(self) -> int:
        """Number of the newest revision, counted from 1."""
        return self.newest.revision


@dataclass(frozen=True, slots=True)
class AdapterPage:
    """A page of a list; `next_token` is empty on the last."""

    adapters: tuple[AdapterRecord, ...]
    next_token: str


@dataclass(frozen=True, slots=True)
class DeletedAdapter:
    """What a deletion removed. `bytes` leaves out files that other adapters still use; `hashes` names all of them.

    `jobs` are the ids of the adapter's ended fine-tuning jobs, which go with it.
    """

    revisions: int
    bytes: int
    hashes: tuple[str, ...]
    jobs: tuple[str, ...] = ()


def check_display_name(name: str, field: str = "display_name") -> str:
    """Return the name. Raises InvalidArgument above 120 characters or on control characters."""
    if len(name) > MAX_DISPLAY_NAME or not name.isprintable():
        raise InvalidArgument.for_field(
            field,
            f"{name[:40]!r} ({len(name)} characters) given; allowed: at most {MAX_DISPLAY_NAME} printable ones",
        )
    return name


def check_labels(labels: Mapping[str, str], field: str = "labels") -> dict[str, str]:
    """Return the labels as a dict. Raises InvalidArgument naming every label that is too long or malformed."""
    violations = []
    if len(labels) > MAX_LABELS:
        violations.append(FieldViolation(field, f"{len(labels)} labels given; allowed: at most {MAX_LABELS}"))
    for key, value in list(labels.items())[: MAX_LABELS + 1]:
        if not _LABEL_KEY.fullmatch(key):
            violations.append(FieldViolation(field, f"key {key[:80]!r} given; allowed: {_LABEL_KEY_RULE}"))
        if len(value) > MAX_LABEL_TEXT or not value.isprintable():
            violations.append(
                FieldViolation(
                    f"{field}[{key[:MAX_LABEL_TEXT]!r}]",
                    f"{value[:80]!r} ({len(value)} characters) given; allowed: at most {MAX_LABEL_TEXT} printable ones",
                )
            )
    if violations:
        text = "; ".join(f"{v.field}: {v.description}" for v in violations)
        raise InvalidArgument(Reason.INVALID_FIELD, text, violations=violations)
    return dict(labels)
