"""Accuracy by a model whose answers are known: every token costs its own number over ten."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from brumby.benchmarks.accuracy import Task, above_chance, accuracy, batches, load_tasks, save_tasks

# context, continuation, characters, question, choice, right choice
CHOICES = [
    ([90, 90], [3, 3, 3], 30, 0, 0, 0),  # costs 0.9, 0.03 a character
    ([90, 90], [5], 1, 0, 1, 0),  # costs 0.5, 0.5 a character
    ([90] * 70, [20], 4, 1, 0, 1),
    ([90] * 70, [10], 4, 1, 1, 1),
]
CLOZE = [([90], [1, 1], 2, 0, 0, 0), ([90] * 63, [1, 2], 2, 1, 0, 0), ([90] * 64, [1], 2, 2, 0, 0)]


def task(rows: list) -> Task:
    contexts, targets, *numbers = zip(*rows, strict=True)
    ids = [np.array(context + target) for context, target in zip(contexts, targets, strict=True)]
    lengths = np.array([len(row) for row in ids])
    return Task(np.concatenate(ids), lengths, np.array([len(t) for t in targets]), *map(np.array, numbers))


def losses_of(ids: Tensor) -> tuple[Tensor, Tensor]:
    labels = ids[:, 1:]
    return labels / 10, labels == 1


TASKS = {"arc_easy": task(CHOICES), "hellaswag": task(CHOICES), "lambada": task(CLOZE)}


@pytest.mark.parametrize("num_tokens", [64, 2**10])
def test_accuracy_of_known_answers(num_tokens: int) -> None:
    found = accuracy(losses_of, TASKS, num_tokens)
    assert found == {"arc_easy": 0.5, "hellaswag": 1.0, "lambada": pytest.approx(2 / 3)}


def test_accuracy_above_chance() -> None:
    assert [task.chance for task in TASKS.values()] == [0.5, 0.5, 0]
    base = {"arc_easy": 0.75, "hellaswag": 1.0, "lambada": 0.5}
    assert above_chance(base, base, TASKS) == 1
    assert above_chance({"arc_easy": 0.5, "hellaswag": 0.75, "lambada": 0.25}, base, TASKS) == pytest.approx(1 / 3)


def test_few_shapes_and_each_request_once() -> None:
    rng = np.random.default_rng(0)
    rows = [([7] * int(n), [1], 1, i, 0, 0) for i, n in enumerate(rng.integers(1, 400, size=200))]
    found = list(batches(task(rows), 2**12))
    assert {tuple(ids.shape) for _, ids, _ in found} == {(64, 65), (32, 129), (16, 257), (8, 513)}
    assert sorted(np.concatenate([requests for requests, _, _ in found])) == list(range(200))
    assert all((ids[: len(is_target), 1:][is_target] == 1).all() for _, ids, is_target in found)


def test_tasks_come_back_from_their_file(tmp_path: Path) -> None:
    with (tmp_path / "tasks.npz").open("wb") as file:
        save_tasks(file, TASKS)
    assert accuracy(losses_of, load_tasks(tmp_path / "tasks.npz")) == accuracy(losses_of, TASKS)


def test_the_models_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    z = torch.randn(100, 100)

    def bigram(ids: Tensor) -> tuple[Tensor, Tensor]:
        logits, labels = z[ids[:, :-1]], ids[:, 1:]
        losses = -logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
        return losses, logits.argmax(-1) == labels

    assert accuracy(bigram, TASKS, 64) == accuracy(bigram, TASKS, 2**12)
