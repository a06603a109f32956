"""Variables of the environment that look like settings: one that names no section is a mistake, and told."""

from collections.abc import Iterable

from hueshift.adapters.errors import InvalidArgument, Reason


def check_environment(names: Iterable[str], sections: Iterable[str]) -> None:
    """Refuse variables of sections that do not exist; what is wrong within a section is told with the settings.

    Raises InvalidArgument (SETTINGS_INVALID).
    """
    known = tuple(f"HUESHIFT_{section}__".upper() for section in sections)
    ours = (name for name in names if name.upper().startswith("HUESHIFT_") and "__" in name)
    unknown = sorted(name for name in ours if not name.upper().startswith(known))
    if unknown:
        raise InvalidArgument.for_field(
            unknown[0],
            f"there is no such section; variables of settings begin with {', '.join(known)}",
            Reason.SETTINGS_INVALID,
        )
