"""Write the reference tables of the README (settings, metrics, errors) from the code, so that they cannot drift.

`python -P docs/tables.py` rewrites README.md between its `<!-- table: ... -->` marks; a test compares.
"""

import ast
import re
import sys
from collections import defaultdict
from pathlib import Path
from types import UnionType
from typing import Literal, Union, get_args, get_origin

from prometheus_client import CollectorRegistry
from pydantic import BaseModel

from hueshift.adapters import errors
from hueshift.adapters.errors import HueshiftError, Reason
from hueshift.server.metrics import Metrics
from hueshift.server.rpc.status import grpc_code, is_retryable
from hueshift.server.settings import Settings

PROJECT = Path(__file__).resolve().parent.parent
SOURCES = ("adapters", "engines", "training", "server")
# Functions that make an error of their own type from the reason they are given.
HELPERS = {"not_found": "NotFound", "_full": "ResourceExhausted"}


MEANINGS: dict[Reason, str] = {
    Reason.INVALID_FIELD: "A field is wrong; BadRequest lists every one.",
    Reason.MESSAGE_MALFORMED: "The bytes are not a message of this type.",
    Reason.MESSAGE_OUT_OF_ORDER: "An upload's messages came in another order than spec, then chunks.",
    Reason.UPLOAD_SIZE_MISMATCH: "The chunks do not add up to the announced size.",
    Reason.UPLOAD_TOO_LARGE: "The upload or one of its chunks is over the limit.",
    Reason.ADAPTER_FILE_INVALID: "The adapter file's header or layout is wrong.",
    Reason.ADAPTER_FILE_UNSAFE: "The file is a pickle or an archive; only safetensors are read.",
    Reason.ADAPTER_TENSOR_UNKNOWN: "A tensor names a layer that the base model does not have, or is not understood.",
    Reason.ADAPTER_SHAPE_MISMATCH: "A tensor's shape does not fit its layer.",
    Reason.ADAPTER_DTYPE_UNSUPPORTED: "A tensor is not of floating-point values that can be used.",
    Reason.ADAPTER_NOT_FINITE: "A tensor holds NaN or infinity, or the picture did, drawn with these adapters.",
    Reason.ADAPTER_RANK_TOO_LARGE: "A file, or the adapters of a request together, have too high a rank.",
    Reason.ADAPTER_TARGET_UNSUPPORTED: "The engine has no low-rank branch there, or a file form cannot hold a part.",
    Reason.ADAPTER_BASE_MISMATCH: "The adapter belongs to another base model.",
    Reason.ADAPTERS_INCOMPATIBLE: "The adapters of a request cannot be used together.",
    Reason.PICTURE_INVALID: "A picture cannot be read, or is no PNG, JPEG or WebP.",
    Reason.PICTURE_TOO_LARGE: "A picture has too many bytes or pixels.",
    Reason.PAGE_TOKEN_INVALID: "The page token is not one of this server's.",
    Reason.SETTINGS_INVALID: "A setting is wrong (at start).",
    Reason.MODEL_UNSUPPORTED: "The base model is of another kind (at start).",
    Reason.MODEL_FILE_INVALID: "A part of the base model cannot be read (at start).",
    Reason.ENGINE_UNAVAILABLE: "The engine asked for is not installed (at start).",
    Reason.ENGINE_PARITY: "The exported graph, or the kernels where they are forced, differ from torch (at start).",
    Reason.PLAN_UNAVAILABLE: "The engine has no full plan, which LAG sampling and shared attention need.",
    Reason.STORE_SCHEMA: "The database belongs to another version (at start).",
    Reason.RAY_UNAVAILABLE: "No Ray cluster answers, or ray is not installed (`hueshift cluster`).",
    Reason.ADAPTER_NOT_FOUND: "There is no such adapter for this tenant.",
    Reason.ADAPTER_REVISION_NOT_FOUND: "The adapter has no such revision.",
    Reason.ADAPTER_DELETED: "The adapter was deleted while the request used it.",
    Reason.FINE_TUNE_NOT_FOUND: "There is no such job for this tenant.",
    Reason.MODEL_NOT_FOUND: "There is no such base model.",
    Reason.METHOD_NOT_FOUND: "There is no such RPC.",
    Reason.IDEMPOTENCY_CONFLICT: "The idempotency key was used for another request.",
    Reason.CREDENTIAL_MISSING: "The call has no API key.",
    Reason.CREDENTIAL_INVALID: "The API key is unknown or revoked.",
    Reason.QUEUE_FULL: "Too many pictures wait.",
    Reason.TOO_MANY_CALLS: "As many calls are inside the server as it takes at a time.",
    Reason.TENANT_STORAGE: "The tenant's adapters and pictures would take more bytes than it may store.",
    Reason.TENANT_QUOTA: "This tenant has too much waiting.",
    Reason.SLOTS_EXHAUSTED: "Every slot of the engine is pinned or in use.",
    Reason.DEVICE_MEMORY: "A picture does not fit in the device's memory, even alone.",
    Reason.DEVICE_LOST: "The device has failed; the server ends, and its supervisor starts it again.",
    Reason.DEADLINE_TOO_SHORT: "The request cannot finish before its deadline, and was not begun.",
    Reason.DEADLINE_PASSED: "The deadline passed.",
    Reason.CANCELLED: "The caller or an operator cancelled it.",
    Reason.DRAINING: "The server is stopping.",
    Reason.STORE_UNAVAILABLE: "The database is busy or away.",
    Reason.NO_REPLICA: "A front end has no replica that answers.",
    Reason.STORE_FULL: "The disk is full.",
    Reason.WARMING_UP: "The server is starting.",
    Reason.TRAINING_DIVERGED: "The loss became NaN or infinite (in a job's error).",
    Reason.ATTEMPTS_EXHAUSTED: "The job's workers failed too often (in a job's error).",
    Reason.JOB_TIME_LIMIT: "The job used up the device time a job may take (in a job's error).",
    Reason.JOB_MEMORY_LIMIT: "The job needs more memory than a job may take (in a job's error).",
    Reason.FINE_TUNE_RUNNING: "A running job cannot be deleted; cancel it first.",
    Reason.JOB_NOT_RETRYABLE: "The job did not fail, would fail again, or its files are gone.",
    Reason.LEASE_LOST: "Another worker has the job (among workers).",
    Reason.STORE_DAMAGED: "A stored file does not match its hash.",
    Reason.INTERNAL: "A defect of ours; the metadata carries an incident id.",
}


def settings_table() -> str:
    """One row per setting."""
    rows = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for section, field in Settings.model_fields.items():
        model = field.annotation
        if isinstance(model, type) and issubclass(model, BaseModel):
            for name, info in model.model_fields.items():
                default = str(info.default).replace(str(PROJECT) + "/", "") or " "
                rows.append(
                    f"| `{section}.{name}` | {_type_name(info.annotation)} | `{default}` | {info.description or ''} |"
                )
    return "\n".join(rows)


def metrics_table() -> str:
    """One row per metric family."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    labels = {
        collector._name: collector._labelnames
        for collector in vars(metrics).values()
        if hasattr(collector, "_labelnames")
    }
    rows = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for family in registry.collect():
        suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
        names = ", ".join(f"`{label}`" for label in labels.get(family.name, ()))
        rows.append(f"| `{family.name}{suffix}` | {family.type} | {names} | {family.documentation} |")
    return "\n".join(rows)


def errors_table() -> str:
    """One row per reason: its meaning, the codes it comes with, and whether the same call may succeed later."""
    codes = _codes_by_reason()
    rows = ["| reason | code | a retry helps | meaning |", "|---|---|---|---|"]
    for reason in Reason:
        names = ", ".join(sorted(codes[reason]))
        retry = "yes" if is_retryable(reason) else "no"
        rows.append(f"| `{reason.value}` | {names} | {retry} | {MEANINGS[reason]} |")
    return "\n".join(rows)


def render(text: str) -> str:
    """Return the README with its tables rewritten. Raises ValueError if a mark is missing."""
    tables = {"settings": settings_table, "metrics": metrics_table, "errors": errors_table}
    for name, make in tables.items():
        begin, end = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
        if begin not in text or end not in text:
            raise ValueError(f"README.md lacks the mark {begin} or {end}")
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        filled = f"{begin}\n{make()}\n{end}"
        text = pattern.sub(lambda _match, filled=filled: filled, text)  # type: ignore[misc]
    return text


def _codes_by_reason() -> dict[Reason, set[str]]:
    """Read from the source which error types each reason is raised with."""
    types = {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, HueshiftError) and kind is not HueshiftError
    }
    found: dict[Reason, set[str]] = defaultdict(set)
    for file in (path for folder in SOURCES for path in sorted((PROJECT / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                kind = types.get(HELPERS.get(name := _called_type(node.func), name))
                if kind is not None:
                    code = grpc_code(kind(Reason.INTERNAL, "")).name
                    for reason in _reasons_in(node):
                        found[reason].add(code)
    return found


def _called_type(func: ast.expr) -> str:
    if isinstance(func, ast.Attribute):
        return _called_type(func.value) if func.attr == "for_field" else func.attr
    return func.id if isinstance(func, ast.Name) else ""


def _reasons_in(call: ast.Call) -> list[Reason]:
    named = [
        Reason[node.attr]
        for argument in (*call.args, *(keyword.value for keyword in call.keywords))
        for node in ast.walk(argument)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Reason"
    ]
    is_field = isinstance(call.func, ast.Attribute) and call.func.attr == "for_field"
    return named or ([Reason.INVALID_FIELD] if is_field else [])


def _type_name(annotation: object) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if get_origin(annotation) in (UnionType, Union):
        return " or ".join(_type_name(part) for part in get_args(annotation) if part is not type(None)) + ", optional"
    if get_origin(annotation) is tuple:
        return "list"
    if get_origin(annotation) is dict:
        return "table"
    return {
        "Path": "path",
        "str": "text",
        "int": "integer",
        "float": "number",
        "bool": "true, false",
        "SecretStr": "text",
    }.get(getattr(annotation, "__name__", ""), str(annotation))


def main() -> None:
    """Rewrite README.md."""
    readme = PROJECT / "README.md"
    readme.write_text(render(readme.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write("README.md: tables written\n")


if __name__ == "__main__":
    main()
