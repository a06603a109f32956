"""Any adapter file in: its format is told by its content, and what comes out is an adapter of this base model.

The order of checks is that of native files: size, header, format, names, shapes, then values; and in the end nothing of
the file may be left that was not understood.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.errors import FailedPrecondition, InvalidArgument, Reason
from hueshift.adapters.file import read_adapter
from hueshift.adapters.formats import (
    cloneofsimo,
    custom_diffusion,
    dense,
    kohya,
    mkshing,
    neti,
    p_plus,
    peft,
    perfusion,
    prospect,
    textual_inversion,
)
from hueshift.adapters.formats.detect import Format, detect
from hueshift.adapters.formats.draft import Draft, ImportBase, ImportOptions
from hueshift.adapters.formats.exports import BASE_HASH_KEY
from hueshift.adapters.formats.lowering import lower_rank
from hueshift.adapters.formats.report import ImportReport, name_some
from hueshift.adapters.formats.source import ForeignFile
from hueshift.adapters.validate import FileLimits

READERS: Mapping[Format, Callable[[Draft, ForeignFile], None]] = {
    Format.CLONEOFSIMO: cloneofsimo.read,
    Format.CUSTOM_DIFFUSION: custom_diffusion.read,
    Format.MKSHING: mkshing.read,
    Format.KOHYA: kohya.read,
    Format.PEFT: peft.read,
    Format.DENSE: dense.read,
    Format.TEXTUAL_INVERSION: textual_inversion.read,
    Format.P_PLUS: p_plus.read,
    Format.PROSPECT: prospect.read,
    Format.NETI: neti.read,
    Format.PERFUSION: perfusion.read,
}
BOUND_BY_SHAPES = (
    "the file does not say which weights it was made for; its layers and shapes fit, so it is bound to this base model"
)
# Algorithms of LyCORIS that are known and not converted, by the endings of their tensors.
_UNSUPPORTED = {
    "OFT or BOFT": re.compile(r"\.(oft_blocks|oft_diag|oft_R|boft_\w+|rescale)\b"),
    "GLoRA": re.compile(r"\.(a1|a2|b1|b2|bm)\.weight$"),
    "IA3": re.compile(r"\.(on_input|ia3_l)\b"),
    "an embedding LoRA": re.compile(r"\.lora_embedding_[AB]\b"),
}


def import_adapter(
    data: bytes | Path, base: ImportBase, options: ImportOptions | None = None, limits: FileLimits | None = None
) -> tuple[Adapter, ImportReport | None]:
    """Return the adapter in a file, and the report of its conversion where there was one.

    Files of other programs are converted, and our own that hold full deltas if a rank is asked for.

    Raises InvalidArgument as `read_adapter` does, naming the tensor, what it is and what is allowed;
    (ADAPTER_TENSOR_UNKNOWN) with the names that nothing here understands; FailedPrecondition (ADAPTER_BASE_MISMATCH)
    when no layer of the file is one of the base model's.
    """
    options, limits = options or ImportOptions(), limits or FileLimits()
    if not 0 <= options.rank <= limits.max_rank:
        raise InvalidArgument.for_field("rank", f"{options.rank} given; allowed: 0 to {limits.max_rank}")
    if options.dense and options.rank:
        raise InvalidArgument.for_field("dense", f"given with rank {options.rank}; allowed: one of them, or neither")
    with ForeignFile(data, limits) as source:
        found = detect(source.header)
        if found is not Format.HUESHIFT:
            return _convert(found, source, Draft(base, options, limits))
    adapter = read_adapter(data, base.layout, limits)
    return lower_rank(adapter, base, options, limits) if options.rank and adapter.dense else (adapter, None)


def _convert(found: Format, source: ForeignFile, draft: Draft) -> tuple[Adapter, ImportReport]:
    stated = source.metadata.get(BASE_HASH_KEY)
    own = draft.base.layout.base_hash
    if stated is not None and stated != own:
        raise FailedPrecondition(
            Reason.ADAPTER_BASE_MISMATCH,
            f"the file says that it belongs to the base model {stated[:64]!r}, but this server runs {own}",
            metadata={"adapter_base_hash": stated[:64], "server_base_hash": own},
        )
    READERS[found](draft, source)
    if source.leftover:
        raise _not_understood(found, source)
    if stated is None:
        draft.notes.append(BOUND_BY_SHAPES)
    return draft.finish(found.value)


def _not_understood(found: Format, source: ForeignFile) -> InvalidArgument | FailedPrecondition:
    names = source.leftover
    for algorithm, pattern in _UNSUPPORTED.items():
        theirs = [name for name in names if pattern.search(name)]
        if theirs:
            return InvalidArgument(
                Reason.ADAPTER_TARGET_UNSUPPORTED,
                f"adapter file refused: it holds {algorithm}, which cannot be converted: {name_some(theirs)}",
            )
    told = f"recognised as {found}, but {len(names)} of its {len(source.entries)} tensors fit no layer of this base "
    told += f"model: {name_some(names)}"
    if len(names) == len(source.entries):
        return FailedPrecondition(
            Reason.ADAPTER_BASE_MISMATCH, f"adapter file refused: {told}; it was made for another base model"
        )
    return InvalidArgument(Reason.ADAPTER_TENSOR_UNKNOWN, f"adapter file refused: {told}")
