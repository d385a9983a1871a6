"""Makes Triton's interpreter and Numba's simulator faster for the tests, without changing what they compute."""

from __future__ import annotations

import random
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np


def patch_triton_once_a_launch() -> None:
    """Triton's interpreter replaces triton.language's functions at every call of a device function.

    It has done so for the whole launch already, if it is told of both modules that have them.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    both, patch = SimpleNamespace(__globals__={"tl": tl, "core": tl.core}), interpreter._patch_lang

    def call(function: Any, *args: Any, **options: Any) -> Any:
        return function.rewrite()(*args, **options)

    interpreter._patch_lang = lambda kernel: patch(both)
    interpreter.InterpretedFunction.__call__ = call


def let_numba_wait_at_barriers() -> None:
    """Numba's simulator polls its threads until all are at a barrier, which keeps them from running.

    Here one thread runs at a time, to its next barrier. After each barrier their order is another one, but the same in
    every run: a missing barrier shows on every machine or on none.
    """
    from numba.cuda.simulator import kernel

    class Thread(kernel.BlockThread):
        """A thread of a block of threads, as the simulator has it."""

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.may_run, self.stopped = threading.Lock(), threading.Lock()  # who waits acquires; the other releases
            self.may_run.acquire()
            self.stopped.acquire()

        def run(self) -> None:
            self.may_run.acquire()
            if not self.abort:
                super().run()  # it keeps an exception for later
            self.stopped.release()

        def syncthreads(self) -> None:
            self.syncthreads_blocked = True
            self.stopped.release()
            self.may_run.acquire()
            self.syncthreads_blocked = False
            if self.abort:
                raise RuntimeError("another thread of the block has failed")

        def go_on(self) -> None:
            self.may_run.release()
            self.stopped.acquire()

    def run(manager: kernel.BlockManager, place: tuple[int, ...], *args: Any) -> None:
        def kernel_of_one_thread() -> None:
            manager._f(*args)

        threads = [
            Thread(kernel_of_one_thread, manager, place, thread, manager._debug)
            for thread in np.ndindex(*manager._block_dim)
        ]
        for thread in threads:
            thread.start()
        order = random.Random(0)
        while threads:
            order.shuffle(threads)
            for thread in threads:
                thread.go_on()
                if thread.exception:
                    for other in threads:
                        other.abort = True
                        other.may_run.release()
                    error, trace = thread.exception
                    raise error.with_traceback(trace)
            threads = [thread for thread in threads if thread.syncthreads_blocked]

    kernel.BlockManager.run = run
