"""Compile all kernels of a call side by side, before its first launch.

Triton compiles a kernel when it is first launched, one after the other, on one core: half a minute for the twenty
of a form. Here a call is run once without launching anything, and a pool of threads compiles what it would launch,
builds the launchers and loads them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

_ready: set[Hashable] = set()


def compile_ahead(key: Hashable, call: Callable[[], object]) -> None:
    """Compile what `call` launches on the current device, once a key. What it returns here has no meaning.

    What cannot be compiled or loaded says so when it is launched.
    """
    if key in _ready:
        return
    _ready.add(key)
    found = []
    launch = JITFunction.run

    def note(self: JITFunction, *args: Any, warmup: bool, **kwargs: Any) -> None:
        found.append(launch(self, *args, warmup=True, **kwargs))

    device = torch.cuda.current_device()
    with ThreadPoolExecutor(initializer=partial(torch.cuda.set_device, device)) as pool:
        with triton.AsyncCompileMode(pool, ignore_errors=True):
            JITFunction.run = note
            try:
                call()
            finally:
                JITFunction.run = launch
        compiled = (x.result(ignore_errors=True) if hasattr(x, "result") else x for x in found)
        list(pool.map(_load, {id(kernel): kernel for kernel in compiled if kernel is not None}.values()))


def _load(kernel: CompiledKernel) -> None:
    with suppress(OutOfResources):
        kernel.run  # noqa: B018  # makes the launcher and loads the kernel
