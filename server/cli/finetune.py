"""`hueshift finetune`: an adapter from a few pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from hueshift.client.choices import Method, Priority, Subject
from hueshift.server.cli.finetune_options import chosen_settings, parse_also, parse_masks, settings_options
from hueshift.server.cli.options import gather
from hueshift.server.cli.parse import parse_labels, read_captions
from hueshift.server.cli.session import Session, connected
from hueshift.server.cli.watching import job_table, plan_table, watch_job

METHODS = tuple(method.value for method in Method if method is not Method.UNKNOWN)


def _lesson_options(
    caption: Annotated[
        list[str] | None,
        typer.Option(help="What a picture shows, with the identifier in it; one per picture, in order."),
    ] = None,
    captions_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="JSON file of captions by file name.")
    ] = None,
    identifier: Annotated[str, typer.Option(help="Word to learn; default: the model's.")] = "",
    class_noun: Annotated[str, typer.Option(help="What it is, for example `animal`; needed without captions.")] = "",
    identifier_init: Annotated[
        list[str] | None, typer.Option(help="Known word the identifier starts from; repeat for a mean.")
    ] = None,
    learn_identifier: Annotated[bool | None, typer.Option(help="Learn an embedding for the identifier.")] = None,
    method: Annotated[str, typer.Option(metavar="|".join(METHODS), help="Method.")] = Method.SVDIFF.value,
    also: Annotated[
        list[str] | None,
        typer.Option(metavar="WORD:NOUN:PICTURE[,PICTURE]", help="One more subject, and the pictures that show it."),
    ] = None,
    mask: Annotated[
        list[str] | None, typer.Option(metavar="PICTURE=MASK", help="Mask of a picture, white where the subject is.")
    ] = None,
    name: Annotated[str, typer.Option(help="Id of the adapter to make, or to give a new revision.")] = "",
    display_name: Annotated[str, typer.Option(help="Name for people.")] = "",
    label: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Label of the adapter.")] = None,
    priority: Annotated[Priority, typer.Option(help="Place among your own waiting jobs.")] = Priority.NORMAL,
    sample_prompt: Annotated[list[str] | None, typer.Option(help="Prompt of a sample picture; up to four.")] = None,
) -> None:
    """Declare what is learned, from what, and what it is called."""


@connected
@gather(_lesson_options, into="lesson")
@gather(settings_options, into="settings")
def finetune(
    session: Session,
    pictures: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, help="Training pictures.")],
    subject: Annotated[
        bool, typer.Option("--subject/--style", help="What the pictures share: one thing, or one manner of drawing.")
    ] = True,
    edit: Annotated[
        str, typer.Option(metavar="PROMPT", help="Learn one picture, which this describes, in order to edit it.")
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the job and tell its cost; queue nothing.")] = False,
    allow_unserved: Annotated[
        bool, typer.Option("--allow-unserved", help="Make it even if this server cannot draw with it, for its file.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job to its end.")] = False,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder for the sample pictures; with --watch.")
    ] = None,
    *,
    lesson: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> None:
    """Learn an adapter from a few pictures of one subject or of one style, or from one picture that is to be edited."""
    if out is not None and not watch:
        raise typer.BadParameter("samples are saved while the job is watched; add --watch", param_hint="--out")
    if dry_run and watch:
        raise typer.BadParameter("there is nothing to watch in a dry run; leave one out", param_hint="--dry-run")
    options = _options(pictures, lesson)
    options["settings"] = chosen_settings(settings)
    options |= _subject(subject, edit, options["captions"])
    options |= {"validate_only": dry_run, "allow_unserved": allow_unserved}
    job = session.client.fine_tune(pictures, **options)
    if dry_run:
        session.output.result(job, plan_table(job))
        return
    if watch:
        job = watch_job(session, job.name, out=out)
    session.output.result(job, job_table(job))
    if not watch:
        session.output.note(f"`hueshift jobs watch {job.id}` follows it.")


def _options(pictures: list[Path], lesson: Mapping[str, Any]) -> dict[str, Any]:
    subjects, shown = parse_also(lesson["also"] or (), pictures)
    options: dict[str, Any] = {
        "captions": _captions(pictures, lesson["caption"] or [], lesson["captions_file"]),
        "method": _method(lesson["method"]),
        "identifier": lesson["identifier"],
        "class_noun": lesson["class_noun"],
        "identifier_init": lesson["identifier_init"] or (),
        "sample_prompts": lesson["sample_prompt"] or (),
        "adapter_id": lesson["name"],
        "display_name": lesson["display_name"],
        "labels": parse_labels(lesson["label"] or ()),
        "priority": lesson["priority"],
        "more_subjects": subjects,
        "picture_subjects": shown,
        "masks": parse_masks(lesson["mask"] or (), pictures),
    }
    if lesson["learn_identifier"] is not None:
        options["learn_identifier"] = lesson["learn_identifier"]
    return options


def _subject(subject: bool, edit: str, captions: list[str]) -> dict[str, Any]:
    if not edit:
        return {"subject": Subject.SUBJECT if subject else Subject.STYLE}
    if not subject or captions:
        raise typer.BadParameter("it says what the picture shows; leave --style and captions out", param_hint="--edit")
    return {"subject": Subject.EDIT, "captions": [edit]}


def _captions(pictures: list[Path], captions: list[str], file: Path | None) -> list[str]:
    if captions and file is not None:
        raise typer.BadParameter("give --caption or --captions-file, not both", param_hint="--captions-file")
    if file is not None:
        return read_captions(file, pictures)
    if captions and len(captions) != len(pictures):
        raise typer.BadParameter(
            f"{len(captions)} captions for {len(pictures)} pictures; give one each, or none", param_hint="--caption"
        )
    return captions


def _method(word: str) -> Method:
    if word not in METHODS:
        raise typer.BadParameter(f"{word!r}; allowed: {', '.join(METHODS)}", param_hint="--method")
    return Method(word)
