"""`hueshift adapters inspect` and `diff`: files on this machine, without a server."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hueshift.server.cli.adapter_report import norms_text, ranks_text
from hueshift.server.cli.output import Output, facts_table, plain, rows_table, size_text

if TYPE_CHECKING:
    from rich.table import Table

    from hueshift.adapters.formats.inspect import FileFacts

# Rows of a comparison that are shown to people; --json gives all.
_SHOWN = 20

_File = Annotated[Path, typer.Argument(exists=True, help="Adapter file of any known program, or its folder.")]
_Json = Annotated[bool, typer.Option("--json", help="Write JSON to stdout.")]


def inspect_file(file: _File, as_json: _Json = False) -> None:
    """Say what an adapter file holds: format, kind, base, layers, ranks, words, size. Needs no server."""
    from hueshift.adapters.formats.folder import bundle
    from hueshift.adapters.formats.inspect import inspect

    output = Output(as_json)
    facts = inspect(bundle(file).data)
    output.result(facts, _facts_table(facts))


def diff_files(first: _File, second: _File, as_json: _Json = False) -> None:
    """Say how two adapter files differ, layer by layer. Exit code 1 if they do. Needs no server."""
    from hueshift.adapters.formats.difference import compare
    from hueshift.adapters.formats.folder import bundle

    output = Output(as_json)
    found = compare(bundle(first).data, bundle(second).data)
    different = [part for part in found.compared if part.difference]
    facts: dict[str, object] = {
        **{name: f"{a} | {b}" for name, (a, b) in found.fields.items()},
        "only in the first": ", ".join(found.only_first[:_SHOWN]),
        "only in the second": ", ".join(found.only_second[:_SHOWN]),
        "equal parts": len(found.compared) - len(different),
        "different parts": len(different),
    }
    rows = [
        (part.name, f"{part.first:.4g}", f"{part.second:.4g}", f"{part.difference:.3g}") for part in different[:_SHOWN]
    ]
    output.result({"equal": found.equal, **plain(found)}, facts_table(facts))
    if rows and not as_json:
        output.stdout.print(rows_table(("part", "norm", "norm", "difference"), rows))
    if not found.equal:
        raise typer.Exit(1)


def _facts_table(facts: "FileFacts") -> "Table":
    return facts_table(
        {
            "format": facts.format,
            "kind": facts.kind,
            "method": facts.method,
            "identifier": facts.identifier,
            "base hash": facts.base_hash or "not stated",
            "holds": ", ".join(f"{count} {part}" for part, count in facts.parts.items()),
            "ranks": ranks_text(dict(facts.ranks)),
            "class noun": facts.class_noun,
            "words": ", ".join(_word_texts(facts)),
            "gated edits": ", ".join(f"{word} ({gate})" for word, gate in facts.gated.items()),
            "norms": norms_text(facts.norms),
            "networks": ", ".join(f"{network} {count} tensors" for network, count in facts.networks.items()),
            "types": ", ".join(f"{dtype} {count}" for dtype, count in facts.dtypes.items()),
            "values": f"{facts.values:,}",
            "size": size_text(facts.size_bytes),
            "metadata": "\n".join(f"{key} = {value}" for key, value in facts.metadata.items()),
        }
    )


def _word_texts(facts: "FileFacts") -> list[str]:
    plain_words = {word: f"{count} vectors" for word, count in facts.words.items()}
    return [f"{word} ({form})" for word, form in {**plain_words, **facts.word_forms}.items()]
