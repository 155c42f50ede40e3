"""Applies a function to many tasks in forked processes, with the results in the order of the tasks."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from common import processes

_function: Callable | None = None


def _start(function: Callable) -> None:
    """Starts a worker: keeps the function, and makes the worker end with its parent."""
    global _function
    _function = function
    processes.die_with(multiprocessing.parent_process().pid)


def _call(task: Any) -> Any:
    return _function(task)


def in_order(function: Callable, tasks: Iterable, workers: int) -> Iterator:
    """Yields function(task) of each task, in order, from `workers` forked processes (0: from this one). At most
    2 * workers + 1 tasks are submitted and not yet yielded.

    Workers inherit the function, which is not pickled, so it may hold a tokenizer. Only tasks and results are sent.
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
