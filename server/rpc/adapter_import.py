"""Uploaded files of any known format, brought to adapters of this server's base model. Run in a thread."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.adapters.file import pack_adapter
from hueshift.adapters.formats.draft import ImportBase, ImportOptions
from hueshift.adapters.formats.exporting import ExportForm, export_adapter
from hueshift.adapters.formats.importing import import_adapter
from hueshift.adapters.formats.report import ImportReport, name_some
from hueshift.adapters.tensors import Packed
from hueshift.adapters.validate import FileLimits
from hueshift.v1 import adapters_pb2 as pb

_FORMS: Mapping[int, ExportForm] = {
    pb.ADAPTER_FORMAT_UNSPECIFIED: ExportForm.HUESHIFT,
    pb.ADAPTER_FORMAT_HUESHIFT: ExportForm.HUESHIFT,
    pb.ADAPTER_FORMAT_KOHYA: ExportForm.KOHYA,
    pb.ADAPTER_FORMAT_PEFT: ExportForm.PEFT,
    pb.ADAPTER_FORMAT_MKSHING: ExportForm.MKSHING,
    pb.ADAPTER_FORMAT_TEXTUAL_INVERSION: ExportForm.TEXTUAL_INVERSION,
    pb.ADAPTER_FORMAT_CUSTOM_DIFFUSION: ExportForm.CUSTOM_DIFFUSION,
}


@dataclass(frozen=True, slots=True)
class ReadFile:
    """An adapter; for files that were converted also its file in our own form, and the report of the conversion."""

    adapter: Adapter
    packed: Packed | None = None
    report: pb.ImportReport | None = None


@dataclass(frozen=True)
class AdapterFormats:
    """Reads and writes adapter files for one base model.

    `branches` are the layers that the engine has a low-rank branch on, with the largest rank it serves there; None
    where that is not known. A file that asks for more is stored all the same, because settings change; the report says
    so. `dense_slots` tells how many mixes with full deltas the engine holds at a time; None where that is not known.
    """

    base: ImportBase
    branches: Mapping[str, int] | None = None
    dense_slots: Callable[[], int] | None = None

    def read(self, file: Path, spec: pb.ImportAdapterSpec, limits: FileLimits) -> ReadFile:
        """Read an uploaded file. Raises what `import_adapter` raises, and (UPLOAD_TOO_LARGE) for what it becomes."""
        served = self.branches if spec.served_only else None
        options = ImportOptions(rank=spec.rank, word=spec.word, served=served, complete=spec.complete, dense=spec.dense)
        adapter, report = import_adapter(file, self.base, options, limits)
        if report is None:
            return ReadFile(adapter)
        packed = pack_adapter(adapter)
        if packed.size_bytes > limits.max_bytes:
            raise InvalidArgument(
                Reason.UPLOAD_TOO_LARGE,
                f"the converted adapter has {packed.size_bytes} bytes; allowed: at most {limits.max_bytes_text}. "
                + ("Import it without dense" if adapter.dense else "Import it with a smaller rank"),
            )
        notes = (*report.notes, *self.unserved(adapter))
        return ReadFile(adapter, packed, report_message(replace(report, notes=notes)))

    def write(self, adapter: Adapter, form: int, *, partial: bool) -> bytes:
        """Write an adapter in a form of the contract. Raises InvalidArgument for an unknown one, or one too small."""
        if form not in _FORMS:
            names = ", ".join(name for name, number in pb.AdapterFormat.items() if number in _FORMS)
            raise InvalidArgument.for_field("format", f"{form} given; allowed: {names}")
        return export_adapter(adapter, _FORMS[form], self.base, partial=partial).data

    def unserved(self, adapter: Adapter) -> list[str]:
        """Say what keeps the engine from drawing with an adapter; nothing if it can, or if that is not known."""
        notes = []
        if adapter.dense and self.dense_slots is not None and self.dense_slots() == 0:
            notes.append(
                f"{len(adapter.dense)} layers have full deltas, which this server's engine does not serve, so it "
                "cannot draw with this adapter yet: set engine.kind to torch, on a GPU with engine.merged_slots of 1 "
                f"or more, or import it with a rank ({name_some(list(adapter.dense))})"
            )
        if self.branches is None:
            return notes
        without = [name for name in adapter.lowrank if name not in self.branches]
        higher = [name for name, part in adapter.lowrank.items() if part.rank > self.branches.get(name, part.rank)]
        if without:
            notes.append(
                f"{len(without)} layers have no low-rank branch in this server's engine, so it cannot draw with this "
                f"adapter yet: set engine.lowrank_targets, or import it with served_only ({name_some(without)})"
            )
        if higher:
            notes.append(
                f"{len(higher)} layers have a higher rank than this server's engine serves, so it cannot draw with "
                f"this adapter yet: set engine.lowrank_rank, or import it with a smaller rank ({name_some(higher)})"
            )
        return notes


def is_own_form(form: int) -> bool:
    """True for the form in which adapters are stored."""
    return _FORMS.get(form) is ExportForm.HUESHIFT


def report_message(report: ImportReport) -> pb.ImportReport:
    """Return a report as a message of the contract."""
    return pb.ImportReport(
        format=report.format,
        layers=[
            pb.ImportedLayer(layer=layer.layer, form=layer.form, rank=layer.rank, error=layer.error)
            for layer in report.layers
        ],
        words=report.words,
        error=report.error,
        left_out=[pb.LeftOut(count=part.count, keys=part.keys, reason=part.reason) for part in report.left_out],
        notes=report.notes,
    )
