"""A rank without a GPU that takes the losses as one with a GPU does: Liger's, in Triton's interpreter."""

from unittest import mock

import torch

from brumby.train import __main__ as main
from brumby.train import objective, teacher


def as_on_a_gpu(function):
    def call(*args):
        with mock.patch.object(torch.Tensor, "is_cuda", True):
            return function(*args)

    return call


if __name__ == "__main__":
    objective.retraining = as_on_a_gpu(objective.retraining)
    teacher.cross_entropy = as_on_a_gpu(teacher.cross_entropy)
    main.main()
