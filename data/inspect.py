"""What a run will see, or saw: tokens by source and phase, and the documents of a step."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from brumby.data.batches import Batches
from brumby.data.config import DataConfig

EXCERPT = 400  # characters of a document that are shown


def show_mixture(config: DataConfig, batches: Batches, console: Console, steps: int | None = None) -> None:
    """Print the tokens that each source gives to each phase, of the first `steps` steps or of all."""
    counted = batches.count(batches.num_steps if steps is None else steps)
    title = "whole run" if steps is None else f"steps 1 to {steps} of {batches.num_steps}"
    table = Table(title=title, title_justify="left")
    table.add_column("source")
    for phase in batches.phases:
        table.add_column(f"{phase.name}\nfrom step {phase.first_step + 1}", justify="right")
    for name in ("of the tokens", "times seen", "rows dropped"):
        table.add_column(name, justify="right")
    total = max(1, sum(sum(tokens.values()) for tokens in counted))
    for name, source in batches.sources.items():
        tokens = [phase.get(name, 0) for phase in counted]
        dropped = {fate: count for fate, count in source.manifest.fates.items() if fate != "kept"}
        table.add_row(
            name,
            *(f"{n:,}" for n in tokens),
            f"{sum(tokens) / total:.3%}",
            f"{batches.epochs[name]:.2f}",
            ", ".join(f"{count:,} {fate.replace('_', ' ')}" for fate, count in dropped.items()),
        )
    table.add_section()
    table.add_row("in all", *(f"{sum(phase.values()):,}" for phase in counted), "", "", "")
    console.print(table)
    for name in batches.sources:
        if note := config.sources[name].contamination:
            console.print(f"contamination  {name}: {note}", highlight=False)


def documents(config: DataConfig, batches: Batches, step: int) -> Iterator[dict[str, Any]]:
    """The documents of a step, from 0, in the order of its rows.

    Yields:
        `row`, `source`, `token` (where the row begins in the source), `text`; a document that a row
        cuts off is cut off here.

    Raises:
        ValueError: no such step, or a tokenizer other than that of the shards.
    """
    from transformers import AutoTokenizer

    from brumby.data.tokenizing import tokenizer_sha256

    rows = batches.phase_of(step)[1].sequences_per_step
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
    if tokenizer_sha256(tokenizer) != batches.tokenizer_sha256:
        raise ValueError(f"the shards below {config.root} were not made by the tokenizer {config.tokenizer}")
    for row in range(rows):
        (batch,) = batches.micro_batches(step, row, rows, 1)
        source, token = batch.sample_ids[0].rsplit(":", 1)
        tokens = batch.input_ids[0].tolist()
        bounds = [0, *(i + 1 for i, t in enumerate(tokens[:-1]) if t == batches.eos_token_id), len(tokens)]
        for start, end in itertools.pairwise(bounds):
            piece = tokens[start : end - (tokens[end - 1] == batches.eos_token_id)]
            yield {"row": row, "source": source, "token": int(token), "text": tokenizer.decode(piece)}


def show_documents(config: DataConfig, batches: Batches, step: int, samples: int, console: Console) -> None:
    """Print the beginnings of the documents in the first rows of a step."""
    shown = -1
    for document in documents(config, batches, step):
        if document["row"] == samples:
            return
        if document["row"] != shown:
            shown = document["row"]
            console.rule(f"row {shown}  {document['source']}:{document['token']}", align="left")
        text = document["text"]
        console.print(escape(text if len(text) <= EXCERPT else f"{text[:EXCERPT]}..."), highlight=False)
        console.print("[dim]end of document[/dim]")


def write_documents(config: DataConfig, batches: Batches, step: int, out: Path) -> None:
    """Write all documents of a step as JSON lines."""
    temporary = out.with_name(out.name + ".tmp")
    with open(temporary, "w") as file:
        for document in documents(config, batches, step):
            file.write(json.dumps(document, ensure_ascii=False) + "\n")
    temporary.replace(out)
