"""A function over many tasks in forked processes, its results in the order of the tasks."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from common import processes

_function: Callable | None = None


def _start(function: Callable) -> None:
    """What a worker does first: keep the function, and see to it that it ends with its parent."""
    global _function
    _function = function
    processes.die_with(multiprocessing.parent_process().pid)


def _call(task: Any) -> Any:
    return _function(task)


def in_order(function: Callable, tasks: Iterable, workers: int) -> Iterator:
    """function(task) of each task, in order, by `workers` forked processes (0: this one); two tasks a worker wait.

    The function is inherited, not pickled, so it may hold a tokenizer; nothing but tasks and results travels.
    """
    if not workers:
        yield from map(function, tasks)
        return
    waiting: deque = deque()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start, (function,))
    try:
        for task in tasks:
            waiting.append(pool.submit(_call, task))
            if len(waiting) >= 2 * workers + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
