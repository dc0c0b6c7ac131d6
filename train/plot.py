"""`loss.png`: the run's loss against tokens, its phases marked, the base's loss beside it."""

import math
from pathlib import Path


def plot_loss(rows: list[dict], phase_starts: list[tuple[str, int]], path: Path) -> None:
    """Draw the rows of `metrics.jsonl`.

    Args:
        phase_starts: each phase's name and the tokens seen at its start.
        path: the PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(
        [r["tokens_seen"] for r in rows],
        [math.nan if r["loss"] is None else r["loss"] for r in rows],
        label="retention (this run)",
        linewidth=1.2,
    )
    measured = [(r["tokens_seen"], r["base_loss"]) for r in rows if r.get("base_loss") is not None]
    if measured:
        axes.plot(
            *zip(*measured, strict=True), "--", color="black", linewidth=1, label="softmax base, same batches"
        )
    last = max((r["tokens_seen"] for r in rows), default=0)
    for name, start in phase_starts:
        if start < last:
            axes.axvline(start, color="grey", linewidth=0.6, linestyle=":")
            axes.annotate(
                name,
                (start, 1),
                xycoords=("data", "axes fraction"),
                xytext=(4, -12),
                textcoords="offset points",
            )
    axes.set(xlabel="tokens seen", ylabel="cross-entropy (nats per token)", ylim=(0, None), xlim=(0, None))
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0.93))
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, dpi=130, format="png")
    temporary.rename(path)
