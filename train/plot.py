"""`loss.png`: the run's loss against tokens, phases and stages marked, the base's loss beside it."""

import math
from pathlib import Path

Starts = list[tuple[str, int]]


def plot_loss(rows: list[dict], phases: Starts, stages: Starts, path: Path) -> None:
    """Draw the rows of `metrics.jsonl`.

    Args:
        phases, stages: names, and the tokens seen at the start of each.
        path: the PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    known = [r for r in rows if r["loss"] is not None or r["objective"] is None]  # or not measured
    axes.plot(
        [r["tokens_seen"] for r in known],
        [math.nan if r["loss"] is None else r["loss"] for r in known],
        label="retention (this run)",
        linewidth=1.2,
    )
    measured = [(r["tokens_seen"], r["base_loss"]) for r in rows if r.get("base_loss") is not None]
    if measured:
        axes.plot(
            *zip(*measured, strict=True), "--", color="black", linewidth=1, label="softmax base, same batches"
        )
    last = max((r["tokens_seen"] for r in rows), default=0)
    for starts, color, height in ((phases, "grey", -12), (stages if len(stages) > 1 else [], "tab:red", -26)):
        for name, start in starts:
            if start < last:
                axes.axvline(start, color=color, linewidth=0.6, linestyle=":")
                axes.annotate(
                    name,
                    (start, 1),
                    xycoords=("data", "axes fraction"),
                    xytext=(4, height),
                    textcoords="offset points",
                    color=color,
                )
    axes.set(xlabel="tokens seen", ylabel="cross-entropy (nats per token)", ylim=(0, None), xlim=(0, None))
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0.93))
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, dpi=130, format="png")
    temporary.rename(path)
