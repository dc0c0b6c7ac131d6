"""A run on the terminal: one live line where it can be redrawn, one line a step where it cannot."""

import datetime

from rich.console import Console
from rich.live import Live
from rich.table import Table


class Terminal:
    """Shows the newest row of `metrics.jsonl`.

    Args:
        num_steps: the run's length, for the time that is left.
        start: steps done before, when a run is resumed.
    """

    def __init__(self, num_steps: int, console: Console | None = None) -> None:
        self.num_steps = num_steps
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.base_loss: float | None = None
        self.live: Live | None = None

    def __enter__(self) -> "Terminal":
        if self.console.is_terminal:
            self.live = Live(console=self.console, auto_refresh=False)
            self.live.start()
        return self

    def __exit__(self, *_) -> None:
        if self.live is not None:
            self.live.stop()

    def update(self, row: dict) -> None:
        self.base_loss = row.get("base_loss") or self.base_loss
        eta = datetime.timedelta(seconds=round((self.num_steps - row["step"]) * row["step_seconds"]))
        cells = {
            "step": f"{row['step']}/{self.num_steps}",
            "phase": str(row["phase"]),
            "loss": f"{row['loss']:.3f}",
            "base": "-" if self.base_loss is None else f"{self.base_loss:.3f}",
            "tokens": f"{row['tokens_seen']:,}",
            "tokens/s": f"{row['tokens_per_second']:,.0f}",
            "MFU": f"{row['mfu']:.1%}",
            "left": str(eta),
        }
        if self.live is None:
            self.console.print("  ".join(f"{name} {value}" for name, value in cells.items()))
            return
        table = Table(box=None, padding=(0, 2, 0, 0))
        for name in cells:
            table.add_column(name, justify="right")
        table.add_row(*cells.values())
        self.live.update(table, refresh=True)
