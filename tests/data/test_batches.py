"""Batches: the same for any ranks, exact blends, no early repeats, and right labels."""

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from brumby.data import Batches, DataConfig, PhaseConfig, prepare
from brumby.data.batches import phase_quotas, phase_starts

T, ROWS = 32, 8  # of make_config


@pytest.fixture
def config(make_config, texts) -> DataConfig:
    """Two sources, two phases of 12 steps together; `math` is gone through more than once."""
    phases = {
        "broad": {"tokens": 5 * ROWS * T, "blend": {"wiki": 3, "math": 1}},
        "narrow": {"tokens": 7 * ROWS * T, "blend": {"math": 1, "wiki": 0.25}},
    }
    config = make_config({"wiki": texts(120, seed=30), "math": texts(12, seed=31, longest=50)}, phases=phases)
    prepare(config, shard_tokens=400)
    return config


def sample_ids(batches: Batches, steps: range) -> list[str]:
    return [s for step in steps for b in batches.micro_batches(step, 0, 1, ROWS) for s in b.sample_ids]


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 2), (8, 1)])
def test_any_number_of_ranks_sees_the_same_rows(config, world_size: int, micro_batch: int):
    batches = Batches(config)
    for step in (0, 4, 5, 11):
        (whole,) = batches.micro_batches(step, 0, 1, ROWS)
        ranks = [batches.micro_batches(step, rank, world_size, micro_batch) for rank in range(world_size)]
        assert {len(rank) for rank in ranks} == {ROWS // (world_size * micro_batch)}
        parts = [batch for accumulation in zip(*ranks, strict=True) for batch in accumulation]
        for name in ("input_ids", "labels", "position_ids"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
        assert [s for part in parts for s in part.sample_ids] == whole.sample_ids
        offsets = [part.cu_seqlens[:-1] + i * micro_batch * T for i, part in enumerate(parts)]
        assert torch.equal(torch.cat(offsets), whole.cu_seqlens[:-1])


def test_rows_match_a_reconstruction_from_the_documents(config, texts, tokenizer):
    """Token by token, from the texts and the Hugging Face tokenizer."""
    reference = AutoTokenizer.from_pretrained(tokenizer)
    streams = {}
    for name, written in (("wiki", texts(120, seed=30)), ("math", texts(12, seed=31, longest=50))):
        stream = []
        for document, text in enumerate(written):
            ids = [*reference(text, add_special_tokens=False).input_ids, reference.eos_token_id]
            stream += [(token, document) for token in ids]
        streams[name] = stream
    batches = Batches(config)
    masked = 0
    for step in range(batches.num_steps):
        for batch in batches.micro_batches(step, 0, 1, 4):
            boundaries = []
            for row, sample in enumerate(batch.sample_ids):
                name, block = sample.split(":")
                piece = streams[name][int(block) * T : int(block) * T + T + 1]
                assert len(piece) == T + 1
                position = 0
                for t in range(T):
                    (token, document), (target, next_document) = piece[t], piece[t + 1]
                    if t == 0 or piece[t - 1][1] != document:
                        position = 0
                        boundaries.append(row * T + t)
                    assert batch.input_ids[row, t] == token
                    assert batch.labels[row, t] == (target if next_document == document else -100)
                    assert batch.position_ids[row, t] == position
                    masked += next_document != document
                    position += 1
            assert batch.cu_seqlens.tolist() == [*boundaries, 4 * T]
            assert (batch.input_ids.dtype, batch.cu_seqlens.dtype) == (torch.int64, torch.int32)
    assert masked > 50


def test_nothing_is_repeated_before_a_source_is_exhausted(config):
    batches = Batches(config)
    ids = sample_ids(batches, range(batches.num_steps))
    assert len(ids) == 12 * ROWS
    drawn = {name: [s for s in ids if s.startswith(name)] for name in ("wiki", "math")}
    assert len(set(drawn["wiki"])) == len(drawn["wiki"])
    num_blocks = len(set(drawn["math"]))
    length = batches._sources[batches._names.index("math")].manifest.num_tokens
    assert num_blocks == (length - 1) // T
    epochs = [drawn["math"][i : i + num_blocks] for i in range(0, len(drawn["math"]), num_blocks)]
    assert len(epochs) > 2
    for epoch in epochs[:-1]:
        assert len(set(epoch)) == num_blocks
    assert len(set(epochs[-1])) == len(epochs[-1])
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0], key=lambda s: int(s.split(":")[1]))
    assert batches.epochs["math"] == pytest.approx(len(drawn["math"]) / num_blocks)
    assert batches.epochs["wiki"] < 1


def test_quotas_are_exact_and_kept(config):
    batches = Batches(config)
    assert batches.quotas == [{"math": 10, "wiki": 30}, {"math": 45, "wiki": 11}]  # 44.8 and 11.2 of 56
    for phase, steps in enumerate((range(5), range(5, 12))):
        counts = Counter(s.split(":")[0] for s in sample_ids(batches, steps))
        assert counts == batches.quotas[phase]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"a": 1, "b": 1, "c": 1}, {"a": 34, "b": 33, "c": 33}),
        ({"a": 0.1, "b": 0.2, "c": 0.7}, {"a": 10, "b": 20, "c": 70}),
        ({"a": 1e-9, "b": 1}, {"a": 0, "b": 100}),
        ({"a": 33.35, "b": 33.35, "c": 33.3}, {"a": 34, "b": 33, "c": 33}),
        ({"c": 2.2, "b": 1.9, "a": 92.5}, {"a": 96, "b": 2, "c": 2}),
    ],
)
def test_largest_remainders(make_config, weights: dict, expected: dict):
    sources = {name: {"path": "x"} for name in weights}
    phases = {"one": {"tokens": 100 * T, "blend": weights}}
    config = make_config(sources=sources, phases=phases, sequences_per_step=4)
    assert phase_quotas(config) == [expected]


def test_phases_switch_at_the_first_step_at_or_after_their_tokens(make_config):
    step = ROWS * T

    def starts(*tokens: int) -> list[int]:
        phases = {str(i): {"tokens": n, "blend": {"a": 1}} for i, n in enumerate(tokens)}
        return phase_starts(make_config(sources={"a": {"path": "x"}}, phases=phases))

    assert starts(3 * step, 2 * step) == [0, 3, 5]
    assert starts(3 * step - 1, 2 * step) == [0, 3, 5]
    assert starts(3 * step + 1, 2 * step) == [0, 4, 6]
    assert starts(1) == [0, 1]
    with pytest.raises(ValueError, match="phase '1' has 5 tokens and no step starts in it; a step has 256"):
        starts(step + 1, 5)


def test_phase_of(config):
    batches = Batches(config)
    assert batches.num_steps == 12
    assert batches.phase_starts == [0, 5]
    assert batches.tokens_per_step == ROWS * T
    assert [batches.phase_of(step) for step in (0, 4, 5, 11)] == [
        (0, "broad"),
        (0, "broad"),
        (1, "narrow"),
        (1, "narrow"),
    ]


def test_a_later_phase_changes_no_earlier_one(config):
    before = Batches(config)
    del config.phases["narrow"]
    config.phases["other"] = PhaseConfig(3 * ROWS * T, {"wiki": 1})
    after = Batches(config)
    assert sample_ids(before, range(5)) == sample_ids(after, range(5))


def test_the_fingerprint_changes_when_the_batches_do(config, make_config, texts, tmp_path):
    fingerprint = Batches(config).fingerprint
    assert Batches(config).fingerprint == fingerprint
    moved = Path(config.root).rename(tmp_path / "moved")
    same = dataclasses.replace(
        config,
        root=str(moved),
        sources=dict(reversed(config.sources.items())),
        phases={
            name: dataclasses.replace(p, blend=dict(reversed(p.blend.items())))
            for name, p in config.phases.items()
        },
    )
    assert Batches(same).fingerprint == fingerprint

    first, second = same.phases.values()
    for change in (
        {"seed": 8},
        {"sequence_length": T // 2},
        {"sequences_per_step": ROWS // 2},
        {"phases": {"broad": dataclasses.replace(first, blend={"wiki": 3, "math": 1.5}), "narrow": second}},
        {"phases": {"broad": first, "narrow": dataclasses.replace(second, tokens=6 * ROWS * T)}},
        {"phases": {"broad": first, "other": second}},
        {"phases": {"broad": first}},
    ):
        assert Batches(dataclasses.replace(same, **change)).fingerprint != fingerprint, change
    other = make_config(
        {"wiki": texts(120, seed=30), "math": texts(12, seed=32, longest=50)},
        root=str(tmp_path / "other"),
        phases={name: dataclasses.asdict(phase) for name, phase in same.phases.items()},
    )
    prepare(other)
    assert Batches(other).fingerprint != fingerprint


def test_what_cannot_be_batched_is_named(config, make_config, texts, tokenizer, tmp_path):
    batches = Batches(config)
    with pytest.raises(ValueError, match="step is 12; the data has steps 0 to 11"):
        batches.micro_batches(12, 0, 1, 1)
    with pytest.raises(ValueError, match="rank is 2; expected one of 0 to 1"):
        batches.micro_batches(0, 2, 2, 1)
    with pytest.raises(ValueError, match=r"With 2 ranks, micro_batch can be one of \[1, 2, 4\]"):
        batches.micro_batches(0, 0, 2, 3)
    with pytest.raises(ValueError, match=r"Use sequences_per_step 9, or .* ranks: \[1, 2, 4, 8\]"):
        batches.micro_batches(0, 0, 3, 1)
    with pytest.raises(ValueError, match=r"math has \d+ tokens; a sequence and its last target need 1025"):
        Batches(dataclasses.replace(config, sequence_length=1024, sequences_per_step=1))
    with pytest.raises(ValueError, match="make them with `brumby prepare`"):
        Batches(dataclasses.replace(config, root=str(tmp_path / "nowhere")))

    retrained = AutoTokenizer.from_pretrained(tokenizer)
    retrained.add_tokens(["state of"])
    retrained.save_pretrained(tmp_path / "retrained")
    other = make_config({"code": texts(30, seed=33)}, tokenizer=str(tmp_path / "retrained"))
    prepare(other)
    mixed = dataclasses.replace(
        config,
        sources=config.sources | other.sources,
        phases={"one": PhaseConfig(1024, {"code": 1, "wiki": 1})},
    )
    with pytest.raises(ValueError, match="which differ; prepare them with one tokenizer"):
        Batches(mixed)


def test_a_source_of_one_block_is_enough(make_config):
    config = make_config({"wiki": ["a state of constant size " * 20]})
    prepare(config)
    length = len(Batches(config)._sources[0])
    config = dataclasses.replace(config, sequence_length=length - 1, sequences_per_step=1)
    batches = Batches(config)
    assert batches.epochs == {"wiki": float(batches.num_steps)}
    (batch,) = batches.micro_batches(0, 0, 1, 1)
    assert batch.labels[0, -1] == batches.eos_token_id
