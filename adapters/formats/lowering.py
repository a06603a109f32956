"""One of our own adapters with full deltas, brought to a low rank: for engines that run no weights of a mix's own."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.dense_deltas import with_product
from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.adapters.formats.draft import Draft, ImportBase, ImportOptions
from hueshift.adapters.formats.report import ImportReport, name_some
from hueshift.adapters.validate import FileLimits

FORMAT_NAME = "hueshift"


def lower_rank(
    adapter: Adapter, base: ImportBase, options: ImportOptions, limits: FileLimits
) -> tuple[Adapter, ImportReport]:
    """Return the adapter with its full deltas projected on `options.rank` directions, and the report of what was lost.

    A low-rank part of the same layer is projected with the delta, one of another layer is brought to that rank too.
    Deltas of keys and values stay whole: they cost nothing per step. Everything else is kept as it is.

    Raises InvalidArgument (ADAPTERS_INCOMPATIBLE) if it has spectral shifts beside, which no file of low-rank parts
    holds; otherwise as `Draft` does.
    """
    if adapter.spectral:
        raise InvalidArgument(
            Reason.ADAPTERS_INCOMPATIBLE,
            "the adapter has spectral shifts beside its full deltas "
            f"({name_some(list(adapter.spectral))}); no file holds those together with low-rank parts. Import it "
            "without a rank",
        )
    draft = Draft(base, options, limits)
    deltas: Mapping[str, Tensor] = adapter.dense
    for name in dict.fromkeys((*deltas, *adapter.lowrank)):
        layer, part = draft.matrices[name], adapter.lowrank.get(name)
        if name not in deltas and part is not None:
            draft.add_product(layer, part.a, part.b, part.scale, "lora")
        else:
            draft.add_delta(layer, with_product(deltas[name], part), "dense")
    for name, shift in adapter.norm.items():
        draft.add_norm(name, shift)
    lowered, report = draft.finish(FORMAT_NAME)
    return replace(adapter, kind=lowered.kind, lowrank=lowered.lowrank, dense={}), report
