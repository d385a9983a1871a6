"""Progress bars for people, plain lines for log files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress_bar(console: Console, title: str, total: int) -> Iterator[Callable[..., None]]:
    """Gives a function tick(done, loss=None) that moves the bar.

    Where the output is not a terminal, a bar would not show, and each loss is printed as a line instead.
    """
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
    )
    with bar:
        task = bar.add_task(f"{title:<38}", total=total, note="")

        def tick(done: int, loss: float | None = None) -> None:
            bar.update(task, completed=done)
            if loss is not None:
                bar.update(task, note=f"loss {loss:.4f}")
                if not console.is_terminal:
                    console.print(f"{title}: step {done} of {total}, loss {loss:.4f}", soft_wrap=True)

        yield tick
