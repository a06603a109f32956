"""An adapter out, in the form that another program reads."""

from dataclasses import dataclass
from enum import StrEnum

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.errors import FailedPrecondition, Reason
from hueshift.adapters.file import write_adapter
from hueshift.adapters.formats import custom_diffusion, kohya, mkshing, peft, textual_inversion
from hueshift.adapters.formats.draft import ImportBase
from hueshift.adapters.formats.exports import Leftovers


class ExportForm(StrEnum):
    """Forms of files that can be written."""

    HUESHIFT = "hueshift"
    KOHYA = "kohya"
    PEFT = "peft"
    MKSHING = "mkshing"
    TEXTUAL_INVERSION = "textual_inversion"
    CUSTOM_DIFFUSION = "custom_diffusion"


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """The file's bytes, and what a partial export left out."""

    data: bytes
    left_out: tuple[str, ...]


def export_adapter(adapter: Adapter, form: ExportForm, base: ImportBase, *, partial: bool = False) -> ExportedFile:
    """Write an adapter in a form. Tensors keep their values and dtypes, so importing it again gives the same ones.

    Raises InvalidArgument (ADAPTER_TARGET_UNSUPPORTED) naming what the form cannot hold, unless the export is
    `partial`; FailedPrecondition (ADAPTER_BASE_MISMATCH) for an adapter of another base model.
    """
    if adapter.base_hash != base.layout.base_hash:
        raise FailedPrecondition(
            Reason.ADAPTER_BASE_MISMATCH,
            f"the adapter belongs to base model {adapter.base_hash}, not to {base.layout.base_hash}",
        )
    left = Leftovers(form.value, partial=partial)
    if form is not ExportForm.HUESHIFT:
        _refuse_text_side(adapter, form, left)
    if form is ExportForm.KOHYA:
        data = kohya.write(adapter, base.layout, left)
    elif form is ExportForm.PEFT:
        data = peft.write(adapter, base.layout, left)
    elif form is ExportForm.MKSHING:
        data = mkshing.write(adapter, base, left)
    elif form is ExportForm.TEXTUAL_INVERSION:
        data = textual_inversion.write(adapter, base.layout, left)
    elif form is ExportForm.CUSTOM_DIFFUSION:
        data = custom_diffusion.write(adapter, base, left)
    else:
        data = write_adapter(adapter)
    return ExportedFile(data, tuple(left.notes))


def _refuse_text_side(adapter: Adapter, form: ExportForm, left: Leftovers) -> None:
    left.refuse("words with embeddings by layer or stage", adapter.token_grids)
    left.refuse("words made by a mapper", adapter.mappers)
    left.refuse("gated edits", adapter.gated)
    if form is not ExportForm.KOHYA:
        encoder = adapter.encoder
        left.refuse("changes of the text encoder", [*encoder.spectral, *encoder.norm, *encoder.lowrank])
        left.refuse("full deltas", adapter.dense, "; the kohya form holds them")
    if form not in (ExportForm.CUSTOM_DIFFUSION, ExportForm.KOHYA):
        left.refuse("deltas of keys and values", adapter.kv)
