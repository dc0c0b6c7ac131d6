"""Configurations: the three that ship, and what is refused."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

import brumby.configs
from brumby.data import DataConfig, phase_quotas, phase_starts

BLENDS = Path(brumby.configs.__file__).parent / "data"


def valid() -> dict:
    return {
        "root": "tokens",
        "tokenizer": "tok",
        "sequence_length": 8,
        "sequences_per_step": 4,
        "seed": 0,
        "sources": {"wiki": {"path": "wiki.jsonl"}, "code": {"hub": "a/b", "subset": "c"}},
        "phases": {"one": {"tokens": 64, "blend": {"wiki": 1, "code": 0.5}}},
    }


def test_from_dict_and_omegaconf_agree():
    config = DataConfig.from_dict(valid())
    schema = OmegaConf.structured(DataConfig)
    assert OmegaConf.to_object(OmegaConf.merge(schema, valid())) == config
    assert config.sources["code"].split == "train"
    assert config.phases["one"].blend == {"wiki": 1.0, "code": 0.5}


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
        (("sources", "wiki", "max_tokens"), 0, "max_tokens is 0"),
        (("phases", "one", "tokens"), 1e9, "data.phases.one: tokens is 1000000000.0; expected an integer"),
        (("phases", "one", "blend"), {}, "data.phases.one: the blend is empty"),
        (("phases", "one", "blend", "wiki"), 0, "weight of 'wiki' is 0; it must be above 0"),
        (("phases", "one", "blend", "wiki"), "1", "weight of 'wiki' is '1'; expected a number"),
        (("phases", "one", "blend", "math"), 1, "blends unknown source 'math'; known: code, wiki"),
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


def test_missing_key():
    values = valid()
    del values["tokenizer"]
    with pytest.raises(ValueError, match="data: 'tokenizer' is missing"):
        DataConfig.from_dict(values)


def load(name: str) -> DataConfig:
    values = OmegaConf.create({"model": "somewhere", "data": OmegaConf.load(BLENDS / f"{name}.yaml")})
    return DataConfig.from_dict(OmegaConf.to_container(values, resolve=True)["data"])


@pytest.mark.parametrize("name", ["nemotron_nano", "open"])
def test_shipped_blends_have_the_seed_runs_steps_and_enough_text(name: str):
    config = load(name)
    assert phase_starts(config) == [0, 1000, 2100, 3000]
    quotas = phase_quotas(config)
    for source, where in config.sources.items():
        needed = sum(quota.get(source, 0) for quota in quotas) * config.sequence_length
        assert needed > 0
        assert where.max_tokens > 1.01 * needed, source


def test_the_open_blend_needs_no_approval():
    gated = ("Nemotron-CC-", "Nemotron-Pretraining-Code", "Nemotron-Pretraining-SFT")
    assert not [s.hub for s in load("open").sources.values() if any(name in s.hub for name in gated)]


def test_the_demo_has_three_phases_of_local_text():
    config = load("demo")
    assert list(config.phases) == ["encyclopedia", "code", "mathematics"]
    assert all(source.path for source in config.sources.values())
