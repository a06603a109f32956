"""Page sizes and page tokens. A token names the last row of a page; it is opaque to callers and holds no secret."""

import base64
import binascii
import json
import math
import re

from hueshift.adapters.errors import InvalidArgument, Reason

DEFAULT_PAGE = 50
MAX_PAGE = 500
_MAX_TOKEN = 256
_KEY = re.compile(r"[A-Za-z0-9._-]{1,64}")


def check_page_size(value: int) -> int:
    """Return the page size to use. Raises InvalidArgument below 0 or above 500."""
    if value < 0 or value > MAX_PAGE:
        raise InvalidArgument.for_field(
            "page_size", f"{value} given; allowed: 0 (meaning {DEFAULT_PAGE}) to {MAX_PAGE}"
        )
    return value or DEFAULT_PAGE


def encode_token(created: float, key: str) -> str:
    """Return the token of the page that follows the row (created, key)."""
    return base64.urlsafe_b64encode(json.dumps([float(created), key]).encode()).decode()


def decode_token(token: str) -> tuple[float, str] | None:
    """Return the row a page follows, None for the first page. Raises InvalidArgument (PAGE_TOKEN_INVALID)."""
    if not token:
        return None
    wrong = InvalidArgument.for_field(
        "page_token",
        "not a token of this server; pass next_page_token as it was returned",
        Reason.PAGE_TOKEN_INVALID,
    )
    # Longer ones would reach the JSON parser's own limits, and no id is that long.
    if len(token) > _MAX_TOKEN:
        raise wrong
    try:
        created, key = json.loads(base64.b64decode(token.encode(), altchars=b"-_", validate=True))
    except (ValueError, TypeError, binascii.Error) as error:
        raise wrong from error
    # A database may stumble over anything but a finite time and plain text.
    if type(created) is not float or not math.isfinite(created) or type(key) is not str or not _KEY.fullmatch(key):
        raise wrong
    return created, key
