"""Resource names. A name of another tenant is answered exactly as one that does not exist."""

import re
import secrets

from hueshift.adapters.errors import InvalidArgument, NotFound, Reason, ResourceRef

_ID = re.compile(r"[a-z][a-z0-9-]{0,62}")
_ID_RULE = "1 to 63 of a-z, 0-9 and '-', beginning with a letter"


def make_id(prefix: str) -> str:
    """Return a new id: the prefix and 96 random bits."""
    return f"{prefix}-{secrets.token_hex(12)}"


def check_id(value: str, field: str) -> str:
    """Return `value` if it is a well-formed id, else raise InvalidArgument for `field`."""
    if not _ID.fullmatch(value):
        raise InvalidArgument.for_field(field, f"{value[:80]!r} is not an id; allowed: {_ID_RULE}")
    return value


def adapter_name(tenant: str, adapter_id: str) -> str:
    """Return the resource name of an adapter."""
    return f"tenants/{tenant}/adapters/{adapter_id}"


def fine_tune_name(tenant: str, job_id: str) -> str:
    """Return the resource name of a fine-tuning job."""
    return f"tenants/{tenant}/fineTunes/{job_id}"


def parse_adapter_name(name: str, tenant: str, field: str = "name") -> str:
    """Return the adapter id of a resource name or bare id within `tenant`.

    Raises InvalidArgument on a malformed name, NotFound on another tenant's.
    """
    return _parse(name, tenant, field, "adapters", Reason.ADAPTER_NOT_FOUND)


def parse_fine_tune_name(name: str, tenant: str, field: str = "name") -> str:
    """Return the job id of a resource name or bare id within `tenant`; errors as `parse_adapter_name`."""
    return _parse(name, tenant, field, "fineTunes", Reason.FINE_TUNE_NOT_FOUND)


def not_found(reason: Reason, collection: str, name: str) -> NotFound:
    """Build the one answer for everything that is not there, or not the caller's."""
    noun = {"adapters": "adapter", "fineTunes": "fine-tuning job", "models": "model"}[collection]
    return NotFound(reason, f"there is no {noun} {name!r}", resource=ResourceRef(f"hueshift.v1/{collection}", name))


def _parse(name: str, tenant: str, field: str, collection: str, reason: Reason) -> str:
    if "/" not in name:
        return check_id(name, field)
    parts = name.split("/")
    if len(parts) != 4 or parts[0] != "tenants" or parts[2] != collection:
        raise InvalidArgument.for_field(
            field, f"{name[:160]!r} is not a name; allowed: 'tenants/{{tenant}}/{collection}/{{id}}' or the bare id"
        )
    check_id(parts[1], field)
    check_id(parts[3], field)
    if parts[1] != tenant:
        raise not_found(reason, collection, name)
    return parts[3]
