"""Configurations: those that ship, and what is refused."""

from fractions import Fraction

import pytest
from omegaconf import OmegaConf

from brumby.data import DataConfig, phase_starts
from brumby.data.order import tokens_drawn
from brumby.launch import cli


def valid() -> dict:
    return {
        "root": "tokens",
        "tokenizer": "tok",
        "sequence_length": 8,
        "sequences_per_step": 4,
        "seed": 0,
        "sources": {"wiki": {"path": "wiki.jsonl"}, "code": {"hub": "a/b", "subset": "c"}},
        "phases": {"one": {"tokens": 64, "blend": {"wiki": 0.75, "code": 0.25}}},
    }


def test_from_dict_and_omegaconf_agree():
    config = DataConfig.from_dict(valid())
    schema = OmegaConf.structured(DataConfig)
    assert OmegaConf.to_object(OmegaConf.merge(schema, valid())) == config
    assert config.sources["code"].split == "train"
    assert config.phases["one"].blend == {"wiki": 0.75, "code": 0.25}


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("seeds",), 1, "data: unknown key 'seeds'; known: root, tokenizer"),
        (("sources", "wiki", "paths"), "x", "data.sources.wiki: unknown key 'paths'"),
        (("phases", "one", "weight"), 1, r"data.phases.one: unknown key 'weight'"),
        (("root",), "", "root is ''; expected a non-empty string"),
        (("sequence_length",), 0, "sequence_length is 0; expected an integer of at least 1"),
        (("sequences_per_step",), "8", "sequences_per_step is '8'; expected an integer"),
        (("seed",), -1, "seed is -1"),
        (("phases",), {}, "`phases` is empty"),
        (("phases",), [], "data.phases is a list; expected a mapping"),
        (("sources",), {}, "`sources` is empty"),
        (("sources",), ["wiki"], "data.sources is a list; expected a mapping"),
        (("sources", "../wiki"), {"path": "x"}, "'../wiki' is no folder name"),
        (("sources", "wiki", "hub"), "a/b", "either `path` or `hub`; found both"),
        (("sources", "wiki"), {}, "data.sources.wiki: a source needs either `path` or `hub`; found neither"),
        (("sources", "wiki", "subset"), "x", "`subset` and `revision` belong to `hub`"),
        (("sources", "wiki", "filters"), [["a", "=", 1]], r"filter .*'='.* is no \[column, operator, value\]"),
        (("sources", "wiki", "filters"), [["a", "in", 1]], "needs a list of values after 'in'"),
        (("sources", "wiki", "gated"), "no", "data.sources.wiki: gated is 'no'; expected true or false"),
        (("margin",), -0.1, "margin is -0.1"),
        (("ramp",), {"tokens": 64, "sequences_per_step": 2}, "ramp.tokens is 64; the ramp is a part of the first"),
        (("ramp",), {"tokens": 32}, "data.ramp: 'sequences_per_step' is missing"),
        (("ramp",), 32, "data.ramp is a int; expected a mapping"),
        (("decontaminate",), {"quiz": {}}, "data.decontaminate.quiz: a source needs either"),
        (("phases", "one", "sequence_length"), 0, "data.phases.one: sequence_length is 0"),
        (("phases", "one", "blend", "wiki"), 0.7, "the blend's weights sum to 0.95; they must sum to 1"),
        (("phases", "one", "tokens"), 1e9, "data.phases.one: tokens is 1000000000.0; expected an integer"),
        (("phases", "one", "blend"), {}, "data.phases.one: the blend is empty"),
        (("phases", "one", "blend", "wiki"), 0, "weight of 'wiki' is 0; it must be above 0"),
        (("phases", "one", "blend", "wiki"), "1", "weight of 'wiki' is '1'; expected a number"),
        (("phases", "one", "blend"), {"math": 1}, "blends unknown source 'math'; known: code, wiki"),
    ],
)
def test_errors_name_the_field(place: tuple, value: object, message: str):
    values = valid()
    inner = values
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(ValueError, match=message):
        DataConfig.from_dict(values)


def test_no_phase_has_the_ramps_name():
    values = valid()
    values["phases"] = {"ramp": values["phases"]["one"]}
    assert DataConfig.from_dict(values).ramp is None
    with pytest.raises(ValueError, match="a phase is named 'ramp', which is what `ramp` makes"):
        DataConfig.from_dict(values | {"ramp": {"tokens": 32, "sequences_per_step": 2}})


def test_missing_key():
    values = valid()
    del values["tokenizer"]
    with pytest.raises(ValueError, match="data: 'tokenizer' is missing"):
        DataConfig.from_dict(values)


def load(name: str) -> DataConfig:
    config = cli.compose("prepare", [f"data={name}", "model=somewhere"])
    return DataConfig.from_dict(cli.plain(config.data))


BLENDS = ("nemotron_nano2", "nemotron_super3_open", "open")


@pytest.mark.parametrize("name", BLENDS)
def test_shipped_blends_are_whole(name: str):
    config = load(name)
    assert phase_starts(config) == [0, 1000, 2100, 3000]
    assert sum(phase.tokens for phase in config.phases.values()) == 3000 * 736 * 8192
    drawn = tokens_drawn(config)
    assert drawn.keys() == config.sources.keys()
    assert sum(drawn.values()) == 3000 * 736 * 8192
    for phase in config.phases.values():
        assert sum(Fraction(str(weight)) for weight in phase.blend.values()) == 1
    for source in config.sources.values():
        assert source.license
        assert source.gated == (source.license == "NVIDIA Data Agreement for Model Training")
        assert ("STEM-SFT" in (source.subset or "")) <= ("GSM8K" in (source.contamination or ""))
    assert {"gsm8k", "mmlu"} <= config.decontaminate.keys()


def test_the_published_percentages_are_kept():
    """A few by hand: 93 and 98.1 of Nemotron 3 Nano's 100, 80.4 and 82.9 of super3's are published."""
    for name, phase, source, weight in (
        ("nemotron_nano2", "diversity", "code", 14 / 93),
        ("nemotron_nano2", "annealing", "crawl_medium_high", 4 / 98.1),
        ("nemotron_super3_open", "diversity", "finepdfs", 6.1 / 80.4),
        ("nemotron_super3_open", "quality", "stem_sft", 4 / 82.9),
    ):
        assert load(name).phases[phase].blend[source] == pytest.approx(weight, abs=1e-5)


def test_the_open_blend_needs_no_approval():
    assert not [name for name, source in load("open").sources.items() if source.gated]


@pytest.mark.parametrize("name", ["demo", "local"])
def test_local_text(name: str):
    assert all(source.path for source in load(name).sources.values())
