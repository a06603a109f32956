"""`hueshift jobs`: fine-tuning jobs."""

from pathlib import Path
from typing import Annotated

import typer

from hueshift.client.choices import JobState
from hueshift.server.cli.output import rows_table, size_text, time_text
from hueshift.server.cli.session import Session, connected
from hueshift.server.cli.watching import job_table, watch_job

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="List, show, watch, cancel, retry and delete fine-tuning jobs."
)

Job = Annotated[str, typer.Argument(help="Id or resource name.")]
_STATES = [state.value for state in JobState if state is not JobState.UNKNOWN]


@app.command("list")
@connected
def list_jobs(
    session: Session,
    state: Annotated[
        list[str] | None, typer.Option(metavar="|".join(_STATES), help="Only jobs in this state; repeatable.")
    ] = None,
) -> None:
    """List your jobs, newest first."""
    wrong = [word for word in state or () if word not in _STATES]
    if wrong:
        raise typer.BadParameter(f"{wrong[0]!r}; allowed: {', '.join(_STATES)}", param_hint="--state")
    found = list(session.client.list_jobs([JobState(word) for word in state or ()]))
    rows = [
        (
            job.id,
            job.state.value,
            f"{job.method.value}, {job.subject.value}",
            f"{job.step}/{job.steps}",
            job.adapter.rsplit("/", 1)[-1],
            time_text(job.created),
        )
        for job in found
    ]
    session.output.result(found, rows_table(("job", "state", "method", "steps", "adapter", "queued"), rows))
    if not found:
        session.output.note("No jobs: `hueshift finetune` queues one.")


@app.command("show")
@connected
def show_job(session: Session, job: Job) -> None:
    """Show a job's record."""
    found = session.client.get_job(job)
    session.output.result(found, job_table(found))


@app.command("watch")
@connected
def watch(
    session: Session,
    job: Job,
    after: Annotated[int, typer.Option(help="Number of the last event already seen.")] = 0,
    out: Annotated[Path | None, typer.Option(file_okay=False, help="Folder for the sample pictures.")] = None,
) -> None:
    """Follow a job to its end; under --json, one line per event. Exits with 1 unless it succeeds."""
    ended = watch_job(session, job, after=after, out=out, stream=session.output.as_json)
    if not session.output.as_json:
        session.output.result(ended, job_table(ended))


@app.command("cancel")
@connected
def cancel(session: Session, job: Job) -> None:
    """Ask a job to stop: a queued one at once, a running one at its next step."""
    stopped = session.client.cancel_job(job)
    session.output.result(stopped, job_table(stopped))


@app.command("retry")
@connected
def retry(session: Session, job: Job) -> None:
    """Queue a failed job again, from its last checkpoint; its attempts are counted anew."""
    queued = session.client.retry_job(job)
    session.output.result(queued, job_table(queued))
    session.output.note(f"`hueshift jobs watch {queued.id} --after {queued.sequence}` follows it.")


@app.command("delete")
@connected
def delete(
    session: Session,
    jobs: Annotated[list[str], typer.Argument(metavar="JOB...", help="Ids or resource names.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove jobs that wait or have ended, with their pictures, samples and checkpoints; their adapters stay."""
    if not yes:
        typer.confirm(f"Delete {', '.join(jobs)} with their pictures?", abort=True, err=True)
    deleted = {job: session.client.delete_job(job) for job in jobs}
    rows = [(job, str(done.events), size_text(done.picture_bytes)) for job, done in deleted.items()]
    session.output.result(deleted, rows_table(("deleted", "events", "pictures"), rows))
