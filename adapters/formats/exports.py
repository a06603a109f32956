"""What exporters share: the account of what a form cannot hold."""

from collections.abc import Collection

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.adapters.formats.report import name_some

BASE_HASH_KEY = "hueshift_base_hash"
"""Metadata of files that we write in other programs' forms: imported again, they are checked against the base model."""


class Leftovers:
    """Refuses what a form cannot hold, or with `partial` takes note of it."""

    def __init__(self, form: str, *, partial: bool) -> None:
        self._form = form
        self._partial = partial
        self.notes: list[str] = []

    def refuse(self, what: str, names: Collection[str], why: str = "") -> None:
        """Raise InvalidArgument (ADAPTER_TARGET_UNSUPPORTED) if there are any names, unless the export is partial."""
        if not names:
            return
        message = f"the {self._form} form cannot hold {what} ({name_some(list(names))}){why}"
        if not self._partial:
            raise InvalidArgument(
                Reason.ADAPTER_TARGET_UNSUPPORTED,
                f"{message}; export it in the hueshift form, which holds everything, or ask for a partial export",
            )
        self.notes.append(message)
