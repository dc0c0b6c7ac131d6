"""A run on the terminal: a line a step, which stays in one place where the terminal can redraw it."""

import datetime
import re

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

STEP_LINE = re.compile(r"step (\d+)/(\d+)  phase .*")
FIELD = re.compile(r"(\S+) (\S+)(?:  |$)")


def step_line(row: dict, num_steps: int, loss: float | None, base_loss: float | None) -> str:
    """A row of `metrics.jsonl` as `name value` pairs, two spaces between them.

    Args:
        loss, base_loss: the last ones known, in nats.
    """
    left = datetime.timedelta(seconds=round((num_steps - row["step"]) * row["step_seconds"]))
    fields = {
        "step": f"{row['step']}/{num_steps}",
        "phase": row["phase"],
        "stage": row["stage"],
        "objective": number(row["objective"]),
        "loss": number(loss),
        "base": number(base_loss),
        "tokens": f"{row['tokens_seen']:,}",
        "tokens/s": f"{row['tokens_per_second']:,.0f}",
        "MFU": f"{row['mfu']:.1%}",
        "left": str(left).replace(" ", ""),
    }
    return "  ".join(f"{name} {value}" for name, value in fields.items())


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


class LiveLog:
    """Passes lines on to the terminal. On a real one, a step's line replaces the one before it.

    The trainer writes to it, and so does the launcher with what comes from rank 0.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None

    def __enter__(self) -> "LiveLog":
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_) -> None:
        if self.live is not None:
            self.live.stop()

    def write(self, line: str) -> None:
        found = STEP_LINE.search(line) if self.live is not None else None
        if found is None or self.live is None:
            self.console.print(line.rstrip("\n"), markup=False)
            return
        table = Table(box=None, padding=(0, 2, 0, 0))
        fields = FIELD.findall(found.group())
        for name, _ in fields:
            table.add_column(name, justify="right")
        table.add_column()
        bar = ProgressBar(total=int(found.group(2)), completed=int(found.group(1)), width=20)
        table.add_row(*(value for _, value in fields), bar)
        self.live.update(table, refresh=True)
