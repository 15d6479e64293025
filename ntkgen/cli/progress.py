"""Progress bars with a rate and an ETA. They are shown only if stderr is a terminal."""

from collections.abc import Iterator
from contextlib import contextmanager

from ntkgen.progress import Report, ignore_report

_UNITS = {
    "training": "steps",
    "diagonal": "blocks",
    "tiles": "tiles",
    "stored product": "tiles",
    "exact product": "batches",
    "exact rows": "samples",
    "pairs": "pairs",
    "files": "files",
    "recomputed": "tiles",
    "mirrored": "tiles",
    "imported": "tiles",
    "waiting": "turns",
    "matrix": "tiles",
    "block means": "tiles",
    "spectrum": "tiles",
    "eigenvalues": "matrices",
    "aligned": "tiles",
    "compared": "tiles",
    "predicted": "tiles",
    "solved": "passes",
    "integrated": "times",
    "factor": "products",
}


@contextmanager
def progress_bars(title: str, *, quiet: bool) -> Iterator[Report]:
    """Show one bar per stage. The bar of a resumed stage starts at its earlier position; its rate counts new steps.

    A stage may name what it belongs to, as in ``seed0: training``.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class RateColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(
                "" if speed is None else f"{speed:.3g} {_UNITS[task.fields['stage'].rpartition(': ')[2]]}/s",
                style="cyan",
            )

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield ignore_report
        return
    columns = [
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), RateColumn(),
        TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    ]  # fmt: skip
    with Progress(*columns, console=console) as bars:
        tasks = {}

        def report(stage: str, done: int, total: int, note: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(
                    f"{title} {stage}".strip(), completed=done, total=total, stage=stage, note=note
                )
                return
            bars.update(tasks[stage], completed=done, total=total)
            if note:
                bars.update(tasks[stage], note=note)

        yield report
