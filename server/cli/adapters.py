"""`hueshift adapters`: what a tenant has learned or brought in."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group

from hueshift.client.choices import AdapterFormat
from hueshift.client.conversion import Conversion
from hueshift.server.cli.adapter_combination import app as combination
from hueshift.server.cli.adapter_files import diff_files, inspect_file
from hueshift.server.cli.adapter_report import report_table
from hueshift.server.cli.files import save
from hueshift.server.cli.output import facts_table, rows_table, size_text, time_text
from hueshift.server.cli.parse import parse_labels
from hueshift.server.cli.session import Session, connected

if TYPE_CHECKING:
    from rich.table import Table

    from hueshift.client.adapters import Adapter

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="List, show, import, export, combine, inspect, diff, delete and warm adapters; show the room they take.",
)

Name = Annotated[str, typer.Argument(help="Id or resource name.")]
Labels = Annotated[list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="Label; repeatable.")]


@app.command("list")
@connected
def list_adapters(session: Session, label: Labels = None) -> None:
    """List your adapters, newest first."""
    found = list(session.client.list_adapters(parse_labels(label or ())))
    rows = [
        (
            adapter.id,
            adapter.method,
            adapter.kind.value,
            str(adapter.revision),
            size_text(adapter.size_bytes),
            _residency(adapter),
            time_text(adapter.updated),
        )
        for adapter in found
    ]
    session.output.result(
        found, rows_table(("adapter", "method", "kind", "revision", "size", "loaded", "updated"), rows)
    )
    if not found:
        session.output.note(
            "No adapters yet: `hueshift finetune` learns one, `hueshift adapters import` brings one in."
        )


@app.command("show")
@connected
def show_adapter(session: Session, name: Name) -> None:
    """Show an adapter's record."""
    adapter = session.client.get_adapter(name)
    session.output.result(adapter, adapter_table(adapter))


@app.command("import")
@connected
def import_adapter(
    session: Session,
    file: Annotated[
        Path, typer.Argument(exists=True, help="Adapter file (safetensors) of any known program, or its folder.")
    ],
    name: Annotated[str, typer.Option(help="Id of the adapter to make, or to give a new revision.")] = "",
    display_name: Annotated[str, typer.Option(help="Name for people.")] = "",
    label: Labels = None,
    rank: Annotated[
        int, typer.Option(min=0, max=128, help="Largest rank of a converted layer; 0: as the file has it, or 16.")
    ] = 0,
    word: Annotated[str, typer.Option(help="Word for a learned embedding whose file names none.")] = "",
    served_only: Annotated[
        bool, typer.Option("--served-only", help="Leave out layers that the engine has no low-rank branch on.")
    ] = False,
    complete: Annotated[
        bool, typer.Option("--complete", help="Refuse a file of which anything has to be left out.")
    ] = False,
    dense: Annotated[
        bool, typer.Option("--dense", help="Keep what is not low-rank (whole UNets, differences) as full deltas.")
    ] = False,
) -> None:
    """Store an adapter file, converting those of other programs."""
    from hueshift.adapters.formats.folder import bundle

    bundled = bundle(file)
    if bundled.note:
        session.output.note(bundled.note)
    adapter = session.client.import_adapter(
        bundled.data,
        adapter_id=name,
        display_name=display_name,
        labels=parse_labels(label or ()),
        conversion=Conversion(rank, word, served_only, complete, dense),
    )
    if adapter.report is None:
        session.output.result(adapter, adapter_table(adapter))
        return
    session.output.result(adapter, Group(adapter_table(adapter), report_table(adapter.report)))


@app.command("export")
@connected
def export_adapter(
    session: Session,
    name: Name,
    revision: Annotated[int, typer.Option(help="Revision; 0 is the newest.")] = 0,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="File to write; default: ID.safetensors.")] = None,
    form: Annotated[
        AdapterFormat, typer.Option("--format", help="Form of the file; only hueshift holds every adapter.")
    ] = AdapterFormat.HUESHIFT,
    partial: Annotated[bool, typer.Option("--partial", help="Leave out what that form cannot hold.")] = False,
) -> None:
    """Write an adapter's file to disk."""
    exported = session.client.export_adapter(name, revision, form=form, partial=partial)
    path = save(out or Path(f"{exported.adapter.id}.safetensors"), exported.data)
    record = {"path": str(path), "bytes": len(exported.data), "adapter": exported.adapter}
    session.output.result(record, f"{path} ({size_text(len(exported.data))})")


app.add_typer(combination, name="combine")
app.command("inspect")(inspect_file)
app.command("diff")(diff_files)


@app.command("delete")
@connected
def delete_adapter(
    session: Session,
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Ids or resource names.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove adapters with all their revisions and files, and their ended jobs."""
    if not yes:
        typer.confirm(f"Delete {', '.join(names)} with all revisions and ended jobs?", abort=True, err=True)
    deleted = {name: session.client.delete_adapter(name) for name in names}
    rows = [(name, str(done.revisions), size_text(done.bytes), str(done.jobs)) for name, done in deleted.items()]
    session.output.result(deleted, rows_table(("deleted", "revisions", "freed", "jobs"), rows))


@app.command("storage")
@connected
def show_storage(session: Session) -> None:
    """Show what your adapters and training pictures take of the room that you have."""
    used = session.client.storage()
    facts = {
        "adapters": size_text(used.adapters),
        "pictures": size_text(used.pictures),
        "allowed": "no limit" if used.limit is None else f"{size_text(used.limit)} in all",
    }
    session.output.result(used, facts_table(facts))


@app.command("warm")
@connected
def warm_adapter(
    session: Session,
    name: Name,
    revision: Annotated[int, typer.Option(help="Revision; 0 is the newest.")] = 0,
    pin: Annotated[bool | None, typer.Option("--pin/--unpin", help="Never evict it, or allow that again.")] = None,
) -> None:
    """Load an adapter before it is needed."""
    warmed = session.client.warm_adapter(name, revision=revision, pin=pin)
    session.output.result(warmed, f"{warmed.adapter.id} {'loaded' if warmed.loaded else 'was loaded already'}")


def adapter_table(adapter: "Adapter") -> "Table":
    """Return a record for people."""
    return facts_table(
        {
            "adapter": adapter.name,
            "display name": adapter.display_name,
            "kind": adapter.kind.value,
            "method": adapter.method,
            "identifier": adapter.identifier,
            "revision": adapter.revision,
            "content hash": adapter.content_hash,
            "base hash": adapter.base_hash,
            "size": size_text(adapter.size_bytes),
            "loaded": _residency(adapter),
            "labels": ", ".join(f"{key}={value}" for key, value in adapter.labels.items()),
            "job": adapter.fine_tune,
            "created": time_text(adapter.created),
            "updated": time_text(adapter.updated),
        }
    )


def _residency(adapter: "Adapter") -> str:
    return "pinned" if adapter.pinned else "yes" if adapter.resident else "no"
