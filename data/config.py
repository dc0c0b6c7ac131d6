"""What is read, how it is blended and how it is cut into steps: typed, and checked once.

The classes are plain dataclasses with plain field types, so that they serve both as a schema for
OmegaConf (`OmegaConf.structured(DataConfig)`) and through `DataConfig.from_dict`.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
OPERATORS = ("==", "!=", "<", "<=", ">", ">=", "in", "not in")
BLEND_TOLERANCE = 1e-6
RAMP = "ramp"  # the name of the phase that `DataConfig.ramp` makes


@dataclass
class SourceConfig:
    """Where the text of a source comes from: exactly one of `path` and `hub`.

    Args:
        path: A file, a folder (searched recursively) or a glob. `.parquet` holds one document a row,
            `.jsonl` and `.json` one object a line; of any other kind each file is one document. JSON
            and text may be compressed (`.gz`, `.zst`, `.bz2`, `.xz`).
        hub: Dataset id on the Hugging Face Hub, streamed.
        subset: Configuration of the hub dataset.
        split: Split of the hub dataset.
        revision: Branch, tag or commit of the hub dataset; without it the newest commit is taken
            and written to the manifest.
        text_column: Column with the text; text files have the one column "text".
        filters: Conditions that a row must meet, all of them: [column, operator, value] each, where
            the operator is one of ==, !=, <, <=, >, >=, in, not in. A null meets none.
        license: As on the dataset's page.
        gated: Whether access must be asked for.
        contamination: What of it is known to overlap with evaluations.

    Raises:
        ValueError: a value out of range, naming the field.
    """

    path: str | None = None
    hub: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    text_column: str = "text"
    filters: list[Any] = field(default_factory=list)
    license: str | None = None
    gated: bool = False
    contamination: str | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.hub is None):
            found = "both" if self.path is not None else "neither"
            raise ValueError(f"a source needs either `path` or `hub`; found {found}")
        for name in ("path", "hub", "subset", "revision", "license", "contamination"):
            if getattr(self, name) is not None:
                _check_string(name, getattr(self, name))
        if self.path is not None and (self.subset is not None or self.revision is not None):
            raise ValueError(f"`subset` and `revision` belong to `hub`; path {self.path!r} has neither")
        for name in ("split", "text_column"):
            _check_string(name, getattr(self, name))
        _check_bool("gated", self.gated)
        self.filters = [self._checked(condition) for condition in self.filters]

    @staticmethod
    def _checked(condition: Any) -> list[Any]:
        if not isinstance(condition, list | tuple) or len(condition) != 3 or condition[1] not in OPERATORS:
            raise ValueError(
                f"filter {condition!r} is no [column, operator, value]; the operators are {', '.join(OPERATORS)}"
            )
        column, operator, value = condition
        _check_string("a filter's column", column)
        if operator in ("in", "not in") and not isinstance(value, list | tuple):
            raise ValueError(f"filter {condition!r} needs a list of values after {operator!r}")
        return [column, operator, value]


@dataclass
class PhaseConfig:
    """A stretch of training with one blend.

    Args:
        tokens: Its length; the next phase begins at the first step at or after its end.
        blend: Share of each source in the phase's sequences; they sum to 1.
        sequence_length: Of this phase; without it, that of the data.
        sequences_per_step: Of this phase; without it, that of the data.

    Raises:
        ValueError: a value out of range, naming the field.
    """

    tokens: int
    blend: dict[str, float]
    sequence_length: int | None = None
    sequences_per_step: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "sequence_length", "sequences_per_step"):
            if name == "tokens" or getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
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
        total = math.fsum(self.blend.values())
        if abs(total - 1) > BLEND_TOLERANCE:
            raise ValueError(f"the blend's weights sum to {total:.9g}; they must sum to 1. Divide each by that")
        self.blend = {source: float(weight) for source, weight in self.blend.items()}


@dataclass
class RampConfig:
    """A run's beginning in smaller steps, with the sequence length and the blend of its first phase.

    Args:
        tokens: Its length, less than that of the first phase.
        sequences_per_step: Sequences in an optimizer step.
    """

    tokens: int
    sequences_per_step: int

    def __post_init__(self) -> None:
        _check_count("tokens", self.tokens)
        _check_count("sequences_per_step", self.sequences_per_step)


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
        ramp: See `RampConfig`; a part of the first phase, and a phase of its own in what is logged.
        margin: Share of tokens prepared beyond what the phases take; .inf prepares all there is.
        document_boundaries: Whether the documents of a sequence are kept apart (`Batch.cu_seqlens`).
        deduplicate: Whether a document whose text came before, in any source, is dropped.
        decontaminate: Evaluation sets by name; a document that shares 13 words in a row with one is dropped.
        skip_bad_rows: Drop and count rows that are empty, no text or absurdly long, instead of ending.

    Raises:
        ValueError: a value out of range, an unknown source in a blend, a name that is no folder name.
    """

    root: str
    tokenizer: str
    sequence_length: int
    sequences_per_step: int
    sources: dict[str, SourceConfig]
    phases: dict[str, PhaseConfig]
    ramp: RampConfig | None = None
    seed: int = 0
    margin: float = 0.02
    document_boundaries: bool = True
    deduplicate: bool = True
    decontaminate: dict[str, SourceConfig] = field(default_factory=dict)
    skip_bad_rows: bool = False

    def __post_init__(self) -> None:
        _check_string("root", self.root)
        _check_string("tokenizer", self.tokenizer)
        _check_count("sequence_length", self.sequence_length)
        _check_count("sequences_per_step", self.sequences_per_step)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed is {self.seed!r}; expected an integer of at least 0")
        if isinstance(self.margin, bool) or not isinstance(self.margin, int | float) or not self.margin >= 0:
            raise ValueError(f"margin is {self.margin!r}; expected a number of at least 0")
        for name in ("document_boundaries", "deduplicate", "skip_bad_rows"):
            _check_bool(name, getattr(self, name))
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
        first = next(iter(self.phases.values()))
        if self.ramp and self.ramp.tokens >= first.tokens:
            raise ValueError(
                f"ramp.tokens is {self.ramp.tokens:,}; the ramp is a part of the first phase, which has "
                f"{first.tokens:,}"
            )
        if self.ramp and RAMP in self.phases:
            raise ValueError(f"a phase is named {RAMP!r}, which is what `ramp` makes; rename it")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DataConfig":
        """Build from plain dicts and lists, as a YAML file holds them.

        Raises:
            ValueError: an unknown or missing key (named with its place), or a value out of range.
        """
        values = dict(values)
        _check_keys(cls, values, "data")
        for name, kind in (("sources", SourceConfig), ("phases", PhaseConfig), ("decontaminate", SourceConfig)):
            value = values.get(name, {})
            if not isinstance(value, dict):
                raise ValueError(f"data.{name} is a {type(value).__name__}; expected a mapping of names")
            values[name] = {key: _build(kind, entry, f"data.{name}.{key}") for key, entry in value.items()}
        if values.get("ramp") is not None:
            values["ramp"] = _build(RampConfig, values["ramp"], "data.ramp")
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


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; expected true or false")
