"""Accuracy on multiple-choice and cloze tasks, from the likelihood of each continuation.

A request is a context with one of its question's choices behind it. The answer is the choice of the highest
log-likelihood, divided by its characters for the tasks in `NORMALISED`: lm-eval's `acc` and `acc_norm`. A question
of one choice counts if each of its tokens is the model's most likely one, as in LAMBADA.

Shapes: R requests, B requests of a batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

NORMALISED = {"hellaswag", "piqa"}
SHORTEST = 64  # tokens of the shortest padded batch; the others are powers of two, so that few shapes are compiled
Losses = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Task:
    """Requests in the order of their questions."""

    ids: np.ndarray  # the tokens of all requests, one request after the other
    lengths: np.ndarray  # [R], tokens of each
    targets: np.ndarray  # [R], how many of them, at the end, are the continuation
    characters: np.ndarray  # [R], of the continuation, without the space before it
    question: np.ndarray  # [R], from 0
    choice: np.ndarray  # [R], from 0 in each question
    gold: np.ndarray  # [R], the right choice of the question

    @property
    def choices(self) -> np.ndarray:
        """How many each question has."""
        return np.bincount(self.question)

    @property
    def chance(self) -> float:
        return float(np.where(self.choices > 1, 1 / self.choices, 0).mean())


def save_tasks(file: IO[bytes], tasks: dict[str, Task]) -> None:
    np.savez_compressed(
        file, **{f"{name}.{field}": array for name, task in tasks.items() for field, array in asdict(task).items()}
    )


def load_tasks(path: Path) -> dict[str, Task]:
    fields: dict[str, dict[str, np.ndarray]] = {}
    with np.load(path) as arrays:
        for key, array in arrays.items():
            name, field = key.rsplit(".", 1)
            fields.setdefault(name, {})[field] = array
    return {name: Task(**arrays) for name, arrays in fields.items()}


def accuracy(losses_of: Losses, tasks: dict[str, Task], num_tokens: int = 2**16) -> dict[str, float]:
    """The share of each task's questions that are answered rightly.

    Args:
        losses_of: from ids [B, T + 1] the cross-entropy [B, T] of each next token, and whether it is the most
            likely one [B, T]. It has to be causal: rows are padded on the right.
        num_tokens: B * T.
    """
    return {name: task_accuracy(losses_of, task, name in NORMALISED, num_tokens) for name, task in tasks.items()}


def task_accuracy(losses_of: Losses, task: Task, normalised: bool, num_tokens: int) -> float:
    score, greedy = np.zeros(len(task.lengths)), np.zeros(len(task.lengths), dtype=bool)
    for requests, ids, is_target in batches(task, num_tokens):
        losses, hits = (values.cpu()[: len(requests)] for values in losses_of(ids))
        score[requests] = -(losses.double() * is_target).sum(1).numpy()
        greedy[requests] = (hits | ~is_target).all(1).numpy()
    if normalised:
        score /= task.characters
    num_questions, num_choices = len(task.choices), task.choices.max()
    table = np.full((num_questions, num_choices), -np.inf)
    table[task.question, task.choice] = score
    gold = np.zeros(num_questions, dtype=np.int64)
    gold[task.question] = task.gold
    single = np.zeros(num_questions, dtype=bool)
    single[task.question] = greedy
    return float(np.where(task.choices > 1, table.argmax(1) == gold, single).mean())


def batches(task: Task, num_tokens: int) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
    """Requests of like lengths: their numbers, ids [B, T + 1] and which losses [requests, T] are the targets'.

    T is a power of two; B, the same for all batches of one T, may be more than the requests.
    """
    starts = np.cumsum(task.lengths) - task.lengths
    order = np.argsort(task.lengths, kind="stable")
    widths = SHORTEST << np.ceil(np.log2(np.maximum((task.lengths - 1) / SHORTEST, 1))).astype(np.int64)
    for T in np.unique(widths).tolist():
        B = max(1, num_tokens // T)
        of_width = order[widths[order] == T]
        for requests in np.split(of_width, range(B, len(of_width), B)):
            ids, is_target = (
                torch.zeros(B, T + 1, dtype=torch.long),
                torch.zeros(len(requests), T, dtype=torch.bool),
            )
            for row, r in enumerate(requests):
                length, targets = task.lengths[r], task.targets[r]
                ids[row, :length] = torch.from_numpy(task.ids[starts[r] : starts[r] + length].astype(np.int64))
                is_target[row, length - 1 - targets : length - 1] = True
            yield requests, ids, is_target


def above_chance(found: dict[str, float], base: dict[str, float], tasks: dict[str, Task]) -> float:
    """Mean over tasks of the share of the base's accuracy above chance that is left."""
    shares = [(found[name] - task.chance) / (base[name] - task.chance) for name, task in tasks.items()]
    return sum(shares) / len(shares)
