"""Progress of an example, one bar per stage, on stderr."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class Bars:
    """Stages that begin, move and end. Where there is no terminal, each stage is told by one line when it ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]\u2713[/green]"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        """Begin to draw."""
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop drawing."""
        self._progress.stop()

    @contextmanager
    def stage(self, name: str) -> Iterator["Stage"]:
        """Show a stage while the block runs."""
        stage = Stage(self._progress, self._progress.add_task(name, total=None, detail=""))
        yield stage
        stage.finish()
        if not self._console.is_terminal:
            self._console.print(f"{name}: done")


class Stage:
    """One bar."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def move(self, done: float, of: float, detail: str = "") -> None:
        """Show how far the stage is."""
        self._progress.update(self._task, completed=done, total=of, detail=detail)

    def tell(self, detail: str) -> None:
        """Show a word beside the bar."""
        self._progress.update(self._task, detail=detail)

    def finish(self) -> None:
        """Fill the bar."""
        total = self._progress.tasks[self._task].total or 1
        self._progress.update(self._task, completed=total, total=total, detail="")
