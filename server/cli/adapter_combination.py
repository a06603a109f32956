"""`hueshift adapters combine`: an adapter made of others, on the server or of files on this machine."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hueshift.server.cli.files import save
from hueshift.server.cli.output import Output, rows_table, size_text
from hueshift.server.cli.parse import parse_labels, parse_use
from hueshift.server.cli.session import Session, connected

if TYPE_CHECKING:
    from hueshift.adapters.adapter import Adapter
    from hueshift.adapters.layout import BaseLayout
    from hueshift.client.combination import AdapterRef, Operation

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Make an adapter of others: of the server's adapters, or with --out of files, without a server.",
)

_USE = "NAME[@REVISION][:WEIGHT][:BLOCK=WEIGHT,...]"
_First = Annotated[str, typer.Argument(metavar="NAME[@REVISION]", help="Adapter, or with --out a file.")]
_Second = Annotated[str, typer.Argument(metavar="NAME[@REVISION]", help="The other one.")]
_Id = Annotated[str, typer.Option("--name", help="Id of the adapter to make, or to give a new revision.")]
_Display = Annotated[str, typer.Option("--display-name", help="Name for people.")]
_Labels = Annotated[list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="Label; repeatable.")]
_Out = Annotated[
    Path | None, typer.Option(dir_okay=False, help="Combine adapter files instead, and write the result to this file.")
]
_Model = Annotated[
    Path | None, typer.Option(file_okay=False, help="With --out: folder of the base model; default: the settings'.")
]


@app.command("sum")
@connected
def combine_sum(
    session: Session,
    adapters: Annotated[
        list[str], typer.Argument(metavar=f"{_USE}...", help="Adapters, or with --out files, and their weights.")
    ],
    name: _Id = "",
    display_name: _Display = "",
    label: _Labels = None,
    out: _Out = None,
    model: _Model = None,
) -> None:
    """Add adapters with weights, which may differ by block."""
    from hueshift.client.combination import Sum
    from hueshift.client.generation import AdapterUse

    uses = [AdapterUse(*parse_use(text, "ADAPTERS")) for text in adapters]
    if out is None:
        _combine(session, Sum(uses), name, display_name, label)
        return
    if any(use.revision for use in uses):
        raise typer.BadParameter("files have no revisions", param_hint="ADAPTERS")

    def run(read: "Callable[[str], Adapter]", layout: "BaseLayout") -> "Adapter":
        from hueshift.adapters.algebra import add
        from hueshift.adapters.blocks import resolve_blocks, scale_weight

        return add(
            [
                (
                    read(use.adapter),
                    scale_weight(resolve_blocks(use.block_weights, layout) if use.block_weights else 1.0, use.weight),
                )
                for use in uses
            ]
        )

    _combine_files(session.output, out, model, run)


@app.command("interpolate")
@connected
def combine_between(
    session: Session,
    first: _First,
    second: _Second,
    position: Annotated[float, typer.Option(help="Where between them: 0 is the first, 1 the second.")] = 0.5,
    name: _Id = "",
    display_name: _Display = "",
    label: _Labels = None,
    out: _Out = None,
    model: _Model = None,
) -> None:
    """Take the point between two adapters."""
    from hueshift.client.combination import Interpolation

    if out is None:
        _combine(session, Interpolation(_ref(first), _ref(second), position), name, display_name, label)
        return

    def run(read: "Callable[[str], Adapter]", layout: "BaseLayout") -> "Adapter":
        from hueshift.adapters.algebra import interpolate

        return interpolate(read(first), read(second), position)

    _combine_files(session.output, out, model, run)


@app.command("mix-blocks")
@connected
def combine_blocks(
    session: Session,
    structure: _First,
    appearance: _Second,
    block: Annotated[
        list[str] | None,
        typer.Option(help="Block to take from the first; repeatable. Default: the last two down blocks."),
    ] = None,
    name: _Id = "",
    display_name: _Display = "",
    label: _Labels = None,
    out: _Out = None,
    model: _Model = None,
) -> None:
    """Take some blocks of one adapter, by default those of structure, and the rest of another."""
    from hueshift.client.combination import BlockMix

    if out is None:
        _combine(session, BlockMix(_ref(structure), _ref(appearance), block or ()), name, display_name, label)
        return

    def run(read: "Callable[[str], Adapter]", layout: "BaseLayout") -> "Adapter":
        from hueshift.adapters.algebra import mix_blocks
        from hueshift.adapters.blocks import STRUCTURE, resolve_blocks

        weight = resolve_blocks(dict.fromkeys(block or (STRUCTURE,), 1.0), layout, "--block")
        return mix_blocks(read(structure), read(appearance), weight)

    _combine_files(session.output, out, model, run)


def _combine(session: Session, operation: "Operation", name: str, display_name: str, label: list[str] | None) -> None:
    combined = session.client.combine_adapters(
        operation, adapter_id=name, display_name=display_name, labels=parse_labels(label or ())
    )
    row = (combined.id, combined.kind.value, str(combined.revision), size_text(combined.size_bytes))
    session.output.result(combined, rows_table(("adapter", "kind", "revision", "size"), [row]))
    for note in combined.notes:
        session.output.note(note)


def _combine_files(
    output: Output, out: Path, model: Path | None, run: "Callable[[Callable[[str], Adapter], BaseLayout], Adapter]"
) -> None:
    from transformers.utils.logging import disable_progress_bar

    from hueshift.adapters.file import write_adapter
    from hueshift.adapters.formats.draft import ImportBase, ImportOptions
    from hueshift.adapters.formats.importing import import_adapter
    from hueshift.adapters.validate import FileLimits
    from hueshift.engines.base_model import load_base_model
    from hueshift.server.settings import load_settings

    disable_progress_bar()
    layout = load_base_model(model or load_settings(None).model.path).layout

    def read(path: str) -> "Adapter":
        # Nobody's upload: a file of this machine may be as large as it is.
        limits = FileLimits(max_bytes=max(1, Path(path).stat().st_size))
        return import_adapter(Path(path), ImportBase(layout), ImportOptions(), limits)[0]

    combined = run(read, layout)
    data = write_adapter(combined)
    path = save(out, data)
    record = {"path": str(path), "bytes": len(data), "kind": combined.kind.value, "words": list(combined.words)}
    output.result(record, f"{path} ({size_text(len(data))})")


def _ref(text: str) -> "AdapterRef":
    from hueshift.client.combination import AdapterRef

    name, _, revision = text.partition("@")
    if not name or not (revision or "0").isdecimal():
        raise typer.BadParameter(f"{text!r} is not an adapter; write NAME or NAME@REVISION")
    return AdapterRef(name, int(revision or 0))
