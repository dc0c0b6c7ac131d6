"""Batches: the same for any ranks, exact blends, no early repeats, and right labels."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from brumby.data import Batches, DataConfig, PhaseConfig, TokenSource, prepare
from brumby.data.config import RampConfig
from brumby.data.order import Order, permutation, phase_starts, schedule, tokens_drawn, window_counts

T, ROWS = 32, 8  # of make_config


@pytest.fixture
def config(make_config, texts) -> DataConfig:
    """Two sources, two phases of 12 steps together; `math` is gone through more than once."""
    phases = {
        "broad": {"tokens": 5 * ROWS * T, "blend": {"wiki": 0.75, "math": 0.25}},
        "narrow": {"tokens": 7 * ROWS * T, "blend": {"math": 0.8, "wiki": 0.2}},
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
                name, first = sample.split(":")
                piece = streams[name][int(first) : int(first) + T + 1]
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
    length = len(TokenSource(Path(config.root) / "math"))
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
    assert [phase.quotas for phase in batches.phases] == [
        {"math": 10, "wiki": 30},
        {"math": 45, "wiki": 11},
    ]  # 44.8 and 11.2 of 56
    for phase, steps in enumerate((range(5), range(5, 12))):
        counts = Counter(s.split(":")[0] for s in sample_ids(batches, steps))
        assert counts == batches.phases[phase].quotas


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"a": 0.3333333, "b": 0.3333333, "c": 0.3333333}, {"a": 34, "b": 33, "c": 33}),
        ({"a": 0.1, "b": 0.2, "c": 0.7}, {"a": 10, "b": 20, "c": 70}),
        ({"a": 1e-9, "b": 0.999999999}, {"a": 0, "b": 100}),
        ({"a": 0.3335, "b": 0.3335, "c": 0.333}, {"a": 34, "b": 33, "c": 33}),
        ({"c": 0.022, "b": 0.019, "a": 0.959}, {"a": 96, "b": 2, "c": 2}),
    ],
)
def test_largest_remainders(make_config, weights: dict, expected: dict):
    sources = {name: {"path": "x"} for name in weights}
    phases = {"one": {"tokens": 100 * T, "blend": weights}}
    config = make_config(sources=sources, phases=phases, sequences_per_step=4)
    assert [phase.quotas for phase in schedule(config)] == [expected]


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
    assert [batches.phase_of(step)[0] for step in (0, 4, 5, 11)] == [0, 0, 1, 1]
    assert [batches.phase_of(step)[1].name for step in (4, 5)] == ["broad", "narrow"]
    assert [batches.tokens_seen(step) for step in (0, 1, 5, 12)] == [0, ROWS * T, 5 * ROWS * T, 12 * ROWS * T]


def test_a_later_phase_changes_no_earlier_one(config):
    before = Batches(config)
    del config.phases["narrow"]
    config.phases["other"] = PhaseConfig(3 * ROWS * T, {"wiki": 1})
    after = Batches(config)
    assert sample_ids(before, range(5)) == sample_ids(after, range(5))


def test_the_fingerprint_names_what_changed(config, make_config, texts, tmp_path):
    fingerprint = json.loads(json.dumps(Batches(config).fingerprint))
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
    assert Batches(same).changes_since(fingerprint) == []

    first, second = same.phases.values()
    other = dataclasses.replace(first, blend={"wiki": 0.5, "math": 0.5})
    for change, *named in (
        ({"seed": 8}, "seed was 7, now 8"),
        ({"document_boundaries": False}, "document_boundaries was True, now False"),
        ({"sequence_length": T // 2}, "phases.broad.sequence_length was 32, now 16"),
        ({"sequences_per_step": ROWS // 2}, "phases.narrow.sequences_per_step was 8, now 4"),
        ({"phases": {"broad": other, "narrow": second}}, "phases.broad.blend.wiki was 0.75, now 0.5"),
        (
            {"phases": {"broad": first, "narrow": dataclasses.replace(second, tokens=6 * ROWS * T)}},
            "phases.narrow.num_steps was 7, now 6",
        ),
        (
            {"phases": {"broad": first, "other": second}},
            "phases.narrow.num_steps was 7, now not there",
            "phases.other.num_steps was not there, now 7",
        ),
    ):
        changes = Batches(dataclasses.replace(same, **change)).changes_since(fingerprint)
        assert set(named) <= set(changes), changes
    other = make_config(
        {"wiki": texts(120, seed=30), "math": texts(12, seed=32, longest=50)},
        root=str(tmp_path / "other"),
        phases={name: dataclasses.asdict(phase) for name, phase in same.phases.items()},
    )
    prepare(other, shard_tokens=400)
    (change,) = Batches(other).changes_since(fingerprint)
    assert change.startswith("shards of math was ")


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
    with pytest.raises(
        ValueError, match=r"math. has \d+ tokens for sequences of 1024; one and its last target need 1025"
    ):
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
        phases={"one": PhaseConfig(1024, {"code": 0.5, "wiki": 0.5})},
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


def test_without_document_boundaries_a_row_is_one_document(config):
    apart, together = Batches(config), Batches(dataclasses.replace(config, document_boundaries=False))
    for step in range(12):
        (a,), (b,) = (x.micro_batches(step, 0, 1, ROWS) for x in (apart, together))
        assert torch.equal(a.input_ids, b.input_ids)
        assert b.cu_seqlens.tolist() == [i * T for i in range(ROWS + 1)]
        assert torch.equal(b.position_ids, torch.arange(T).expand(ROWS, T))
        assert torch.equal(b.labels[:, :-1], b.input_ids[:, 1:])
        assert torch.equal(torch.where(a.labels == -100, a.labels, b.labels), a.labels)


def test_phases_of_other_lengths_take_other_tokens(make_config, texts):
    phases = {
        "short": {"tokens": 2048, "blend": {"wiki": 1.0}},
        "long": {"tokens": 4096, "blend": {"wiki": 1.0}, "sequence_length": 256, "sequences_per_step": 2},
        "short again": {"tokens": 1024, "blend": {"wiki": 1.0}},
    }
    config = make_config({"wiki": texts(500, seed=34)}, phases=phases, margin=0.02)
    prepare(config)
    batches = Batches(config)
    assert [(p.num_steps, p.tokens_per_step) for p in batches.phases] == [(8, 256), (8, 512), (4, 256)]
    assert [batches.tokens_seen(step) for step in (0, 8, 9, 16, 20)] == [0, 2048, 2560, 6144, 7168]
    seen: Counter = Counter()
    for step in range(batches.num_steps):
        phase = batches.phase_of(step)[1]
        (batch,) = batches.micro_batches(step, 0, 1, phase.sequences_per_step)
        assert batch.input_ids.shape == (phase.sequences_per_step, phase.sequence_length)
        for sample in batch.sample_ids:
            first = int(sample.split(":")[1])
            seen.update(range(first, first + phase.sequence_length))
    assert len(seen) == 7168
    assert set(seen.values()) == {1}
    assert batches.epochs["wiki"] <= 1


def test_a_ramp_is_the_first_phase_in_smaller_steps(config):
    ramp = RampConfig(tokens=2 * ROWS * T, sequences_per_step=2)
    batches = Batches(dataclasses.replace(config, ramp=ramp))
    steps = [(p.name, p.first_step, p.num_steps, p.sequences_per_step) for p in batches.phases]
    assert steps == [("ramp", 0, 8, 2), ("broad", 8, 3, ROWS), ("narrow", 11, 7, ROWS)]
    assert tokens_drawn(batches.config) == tokens_drawn(config)
    assert batches.phases[0].quotas == {"math": 4, "wiki": 12}
    seen = [
        sample
        for step in range(batches.num_steps)
        for batch in batches.micro_batches(step, 0, 1, 2)
        for sample in batch.sample_ids
    ]
    assert len(seen) == 12 * ROWS
    wiki = [sample for sample in seen if sample.startswith("wiki")]
    assert len(set(wiki)) == len(wiki)
    assert batches.fingerprint["phases.ramp.sequences_per_step"] == 2
    assert batches.changes_since(Batches(config).fingerprint)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_permutations_are_permutations(size: int):
    places = np.arange(size)
    found = permutation(places, size, 0, "a")
    assert sorted(found.tolist()) == list(range(size))
    np.testing.assert_array_equal(found[::-1], permutation(places[::-1], size, 0, "a"))
    if size > 500:
        assert (found != permutation(places, size, 1, "a")).mean() > 0.9
        assert abs(np.corrcoef(places, found)[0, 1]) < 4 / size**0.5
        assert np.bincount(found[: size // 2] * 4 // size).min() > size / 8 - 4 * (size / 8) ** 0.5


@pytest.mark.parametrize("seed", range(20))
def test_every_window_has_its_share(seed: int):
    rng = np.random.default_rng(seed)
    quotas = [*(rng.lognormal(0, 3, int(rng.integers(1, 40))) * 30).astype(int).tolist(), 1]
    window = int(rng.integers(1, 300))
    counts = window_counts(quotas, window)
    total = sum(quotas)
    ends = np.minimum(np.arange(len(counts)) * window, total)
    assert counts.sum(1).tolist() == ends.tolist()
    assert (np.abs(counts - ends[:, None] * np.array(quotas) / total) < 1).all()
    assert (np.diff(counts, axis=0) >= 0).all()


def test_a_million_samples_keep_the_mixture(make_config):
    weights = {"a": 0.5, "b": 0.3, "c": 0.15, "d": 0.0495, "e": 0.0005}
    phases = {"one": {"tokens": 3_000_000 * T, "blend": weights}}
    config = make_config(sources={name: {"path": "x"} for name in weights}, phases=phases, sequences_per_step=1000)
    order = Order(config, dict.fromkeys(weights, 100000 * T + 1))
    counts: Counter = Counter()
    for first in range(0, 1_000_000, 1000):
        counts.update(source for source, _ in order.samples(0, range(first, first + 1000)))
    for source, name in enumerate(order.names):
        assert abs(counts[source] / 1_000_000 - weights[name]) < 1e-3


@pytest.mark.parametrize("world_size", range(1, 65))
def test_each_sample_once_an_epoch_over_any_number_of_ranks(make_config, world_size: int):
    """What the ranks get in the order in which they get it, without reading tokens."""
    num_blocks, rows = 131, 2 * world_size
    phases = {"one": {"tokens": 3 * num_blocks * T, "blend": {"wiki": 1.0}}}
    config = make_config(sources={"wiki": {"path": "x"}}, phases=phases, sequences_per_step=rows)
    order = Order(config, {"wiki": num_blocks * T + 1})
    taken = []
    for step in range(order.phases[0].num_steps):
        ranks = [
            order.samples(0, range(step * rows + r, (step + 1) * rows, world_size)) for r in range(world_size)
        ]
        taken += [start for accumulation in zip(*ranks, strict=True) for _, start in accumulation]
    epochs = [taken[i : i + num_blocks] for i in range(0, len(taken), num_blocks)]
    for epoch in epochs[:3]:
        assert sorted(epoch) == [block * T for block in range(num_blocks)]
    assert epochs[0] != epochs[1]
    assert tokens_drawn(config) == {"wiki": len(taken) * T}
