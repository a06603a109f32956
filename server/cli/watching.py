"""The events of a fine-tuning job, drawn live, written as JSON lines, and their samples saved."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hueshift.server.cli.files import picture_name, save
from hueshift.server.cli.output import facts_table, plain, time_text

if TYPE_CHECKING:
    from rich.table import Table

    from hueshift.client.jobs import FineTune, JobEvent, Scores
    from hueshift.server.cli.session import Session


def watch_job(
    session: "Session", name: str, *, after: int = 0, out: Path | None = None, stream: bool = False
) -> "FineTune":
    """Follow a job to its end and return it. Raises FineTuneFailed unless it succeeded.

    `out` is a folder for the sample pictures. `stream` writes every event as a line of JSON under `--json`. An
    interrupt ends the watch, never the job.
    """
    from hueshift.client.jobs import succeeded

    view = JobView(session, name, out, stream)
    with view.bar:
        try:
            for event in session.client.watch(name, after):
                view.show(event)
        except KeyboardInterrupt:
            session.output.note(
                f"The job goes on. `hueshift jobs watch {name} --after {view.sequence}` takes the watch up again, "
                f"`hueshift jobs cancel {name}` ends the job."
            )
            raise
    return succeeded(session.client.get_job(name))


class JobView:
    """Draws one job's events."""

    def __init__(self, session: "Session", name: str, out: Path | None, stream: bool) -> None:
        self.output = session.output
        self.sequence = 0
        self._out = out
        self._stream = stream
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.output.stderr,
            disable=not self.output.interactive,
        )
        self._name = name.rsplit("/", 1)[-1]
        self._task = self.bar.add_task(self._name, total=None, loss="")

    def show(self, event: "JobEvent") -> None:
        """Draw one event, save its sample, and stream it if asked."""
        from hueshift.client.jobs import StateChanged, TrainingProgress, TrainingSample

        self.sequence = event.sequence
        saved: Path | None = None
        match event:
            case StateChanged():
                job = event.job
                self.bar.update(self._task, description=f"{self._name} {job.state.value}", total=job.steps or None)
            case TrainingProgress():
                self.bar.update(self._task, completed=event.step, total=event.steps, loss=f"loss {event.loss:.4f}")
            case TrainingSample():
                saved = self._save(event.step, event.prompt, event.data)
        if self._stream:
            record = {"event": type(event).__name__, **plain(event)}
            self.output.event(record if saved is None else {**record, "path": str(saved)})

    def _save(self, step: int, prompt: str, data: bytes) -> Path | None:
        if self._out is None:
            return None
        name = f"step-{step:05d}-{picture_name(prompt, self.sequence, 'image/png')}"
        return save(self._out / name, data)


def job_table(job: "FineTune") -> "Table":
    """Return a job for people."""
    scores = job.scores
    return facts_table(
        {
            "job": job.name,
            "state": job.state.value,
            "method": f"{job.method.value}, {job.subject.value}",
            "priority": None if job.priority is None else job.priority.value,
            "steps": _steps_text(job),
            "loss": None if job.loss is None else f"{job.loss:.4f}",
            "adapter": f"{job.adapter}@{job.revision}" if job.revision else job.adapter,
            "attempt": job.attempt or None,
            "error": f"{job.error.message} ({job.error.reason})" if job.error else None,
            "queued": time_text(job.created),
            "started": time_text(job.started),
            "ended": time_text(job.ended),
            "CLIP-I": None if scores is None else f"{scores.clip_i:.3f} (base model: {scores.clip_i_base:.3f})",
            "CLIP-T": None if scores is None else f"{scores.clip_t:.3f}",
            "prior kept": _share(None if scores is None else scores.prior_kept),
            "diversity": _share(None if scores is None else scores.diversity),
            "inversion": None if scores is None else _inversion_text(scores),
            "kept": None if job.kept_energy is None else f"{job.kept_energy:.1%} of what was learned",
            "device": f"{job.device_seconds:.0f} s" if job.device_seconds else None,
            "cost": _cost_text(job),
        }
    )


def plan_table(job: "FineTune") -> "Table":
    """Return a job that was only checked, for people."""
    return facts_table(
        {
            "method": f"{job.method.value}, {job.subject.value}",
            "steps": str(job.steps),
            "adapter": job.adapter or None,
            "cost": _cost_text(job) or "not known: no job of this kind has run on this server yet",
        }
    )


def _steps_text(job: "FineTune") -> str:
    from hueshift.client.choices import JobState

    early = job.state is JobState.SUCCEEDED and job.step < job.steps
    return f"{job.step} of {job.steps}{', stopped early' if early else ''}"


def _inversion_text(scores: "Scores") -> str | None:
    if scores.inversion_error is None or scores.inversion_error_base is None:
        return None
    return f"{scores.inversion_error:.1%} off after the way back (base model: {scores.inversion_error_base:.1%})"


def _cost_text(job: "FineTune") -> str | None:
    if job.cost is None:
        return None
    cost = job.cost
    return f"{cost.gpu_seconds:.0f} s ({cost.seconds_per_step:.2f} s a step, mean of {cost.measured_steps})"


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"
