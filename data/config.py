"""What is read, how it is blended and how it is cut into steps: typed, and checked once.

The classes are plain dataclasses with plain field types, so that they serve both as a schema for
OmegaConf (`OmegaConf.structured(DataConfig)`) and through `DataConfig.from_dict`.
"""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass
class SourceConfig:
    """Where the text of a source comes from: exactly one of `path` and `hub`.

    Args:
        path: A file, a folder (searched recursively) or a glob. `.parquet` holds one document a row,
            `.jsonl` and `.json` one object a line; of any other kind each file is one document. JSON
            and text may be compressed (`.gz`).
        hub: Dataset id on the Hugging Face Hub, streamed.
        subset: Configuration of the hub dataset.
        split: Split of the hub dataset.
        revision: Branch, tag or commit of the hub dataset; without it the newest commit is taken
            and written to the manifest.
        text_column: Column with the text; text files have the one column "text".
        max_documents: Stop after that many documents.
        max_tokens: Stop after the document that reaches that many tokens.

    Raises:
        ValueError: a value out of range, naming the field.
    """

    path: str | None = None
    hub: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    text_column: str = "text"
    max_documents: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.hub is None):
            found = "both" if self.path is not None else "neither"
            raise ValueError(f"a source needs either `path` or `hub`; found {found}")
        for name in ("path", "hub", "subset", "revision"):
            if getattr(self, name) is not None:
                _check_string(name, getattr(self, name))
        if self.path is not None and (self.subset is not None or self.revision is not None):
            raise ValueError(f"`subset` and `revision` belong to `hub`; path {self.path!r} has neither")
        for name in ("split", "text_column"):
            _check_string(name, getattr(self, name))
        for name in ("max_documents", "max_tokens"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))


@dataclass
class PhaseConfig:
    """A stretch of training with one blend.

    Args:
        tokens: Its length; the next phase begins at the first step at or after its end.
        blend: Weight of each source; weights need not sum to anything.

    Raises:
        ValueError: a value out of range, naming the field.
    """

    tokens: int
    blend: dict[str, float]

    def __post_init__(self) -> None:
        _check_count("tokens", self.tokens)
        if not self.blend:
            raise ValueError("the blend is empty; give at least one source a weight")
        for source, weight in self.blend.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise ValueError(f"weight of {source!r} is {weight!r}; expected a number")
            if not (weight > 0 and math.isfinite(weight)):
                raise ValueError(
                    f"weight of {source!r} is {weight}; it must be above 0. "
                    "Leave a source out of the blend to give it none"
                )
        self.blend = {source: float(weight) for source, weight in self.blend.items()}


@dataclass
class DataConfig:
    """The data of a run.

    Args:
        root: Folder of the token shards, one sub-folder a source.
        tokenizer: Folder or Hub id of the tokenizer.
        sequence_length: Tokens in a training sequence.
        sequences_per_step: Sequences in an optimizer step, over all ranks and accumulations.
        seed: Seed of the order.
        sources: Where each source's text comes from.
        phases: The blends by name, in the order of training.

    Raises:
        ValueError: a value out of range, an unknown source in a blend, a name that is no folder name.
    """

    root: str
    tokenizer: str
    sequence_length: int
    sequences_per_step: int
    sources: dict[str, SourceConfig]
    phases: dict[str, PhaseConfig]
    seed: int = 0

    def __post_init__(self) -> None:
        _check_string("root", self.root)
        _check_string("tokenizer", self.tokenizer)
        _check_count("sequence_length", self.sequence_length)
        _check_count("sequences_per_step", self.sequences_per_step)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed is {self.seed!r}; expected an integer of at least 0")
        if not self.sources:
            raise ValueError("`sources` is empty; name at least one")
        if not self.phases:
            raise ValueError("`phases` is empty; name at least one")
        for name in self.sources:
            if not NAME.fullmatch(str(name)):
                raise ValueError(f"source name {name!r} is no folder name; use letters, digits, '_', '-' and '.'")
        for phase, config in self.phases.items():
            unknown = sorted(config.blend.keys() - self.sources.keys())
            if unknown:
                known = ", ".join(sorted(self.sources))
                raise ValueError(f"phase {phase!r} blends unknown source {unknown[0]!r}; known: {known}")

    @property
    def tokens_per_step(self) -> int:
        return self.sequence_length * self.sequences_per_step

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DataConfig":
        """Build from plain dicts and lists, as a YAML file holds them.

        Raises:
            ValueError: an unknown or missing key (named with its place), or a value out of range.
        """
        values = dict(values)
        _check_keys(cls, values, "data")
        sources, phases = values["sources"], values["phases"]
        for name, value in (("sources", sources), ("phases", phases)):
            if not isinstance(value, dict):
                raise ValueError(f"data.{name} is a {type(value).__name__}; expected a mapping of names")
        values["sources"] = {name: _build(SourceConfig, v, f"data.sources.{name}") for name, v in sources.items()}
        values["phases"] = {name: _build(PhaseConfig, v, f"data.phases.{name}") for name, v in phases.items()}
        return cls(**values)


def _build(cls: type, values: Any, where: str) -> Any:
    _check_keys(cls, values, where)
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_keys(cls: type, values: Any, where: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{where} is a {type(values).__name__}; expected a mapping")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = [str(key) for key in values if key not in fields]
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(fields)}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ValueError(f"{where}: {name!r} is missing")


def _check_string(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} is {value!r}; expected a non-empty string")


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; expected an integer of at least 1")
