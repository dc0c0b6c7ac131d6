"""A conversion's report, for the terminal."""

from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_report(report: dict[str, Any], out: Path, console: Console | None = None) -> None:
    """A table of what was made and how it compares with the base."""
    parameters, parity, logits = report["parameters"], report["parity"], report["parity"]["logits"]
    sinks = report["sink"] if isinstance(report["sink"], list) else [report["sink"]]
    hows = Counter(file["how"] for file in report["files"])
    rows = {
        "source": f"{report['source']} ({report['family']})",
        "parameters": "{total:,} = {carried:,} carried + {new:,} new".format(**parameters),
        "dtype": report["dtype"],
        "gates": f"{report['gates']['init']}, {'with' if report['gates']['bias'] else 'without'} bias",
        "sink": " to ".join(f"{sink:.3g}" for sink in sorted({min(sinks), max(sinks)})),
        "files": ", ".join(f"{count} {how}" for how, count in hows.items())
        + f"; {sum(file['bytes'] for file in report['files']) / 1e9:.2f} GB",
        "tensors": ", ".join(
            f"{count} {how.replace('_', ' ')}" for how, count in parity["tensors"].items() if count
        ),
    }
    if "skipped" in logits:
        rows["logits"] = f"not compared: {logits['skipped']}"
    else:
        rows["logits"] = (
            f"differ by at most {logits['max_abs_difference']:.1e} with softmax "
            f"({logits['num_tokens']} tokens, float32)"
        )
        rows["loss"] = (
            f"{logits['loss_base']:.3f} base, {logits['loss_after_swap']:.3f} after the swap, before training"
        )
    rows["time"] = f"{report['seconds']:.1f} s"
    table = Table("", str(out), title="Converted", title_justify="left")
    for row in rows.items():
        table.add_row(*row)
    for note in report["notes"]:
        table.add_row("note", note)
    (console or Console()).print(table)
