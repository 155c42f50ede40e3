"""Run a function on several gloo ranks. Processes are forked from one that has imported torch and megatron-core, which
takes seconds, and are kept between calls; a rank that raises shows its own traceback; nothing can hang.

    results = run_ranks(4, some_module_level_function, arg, ...)   # [rank 0's return value, rank 1's, ...]
"""

import atexit
import gc
import os
import traceback
from multiprocessing import get_context, set_start_method
from multiprocessing.connection import wait

import torch.distributed as dist

TIMEOUT = 240  # seconds a call may take
THREADS = 400  # of a process; gloo's outlive their groups, and 2,000 of them slow every collective down tenfold
IMPORTS = [  # before the fork; the device adapter before anything imports megatron
    "common.device", "common.train", "common.release", "common.perf", "pytest", "matplotlib.pyplot", "torch._dynamo",
    "torch.utils.tensorboard", "transformers.models.auto.modeling_auto", "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.qwen3_moe.modeling_qwen3_moe", "transformers.models.umt5.modeling_umt5",
    "diffusers.models.autoencoders.autoencoder_kl_wan", "diffusers.models.transformers.transformer_wan",
]  # fmt: skip
_context = get_context("forkserver")
_context.set_forkserver_preload(IMPORTS)
_pool: list = []  # [(process, pipe)]


def _serve(pipe) -> None:
    set_start_method("fork", force=True)  # as under torchrun: else a data loader's processes are started like this one
    gc.freeze()  # each save of a checkpoint collects garbage; what was imported is none
    while True:
        try:
            function, args, env = pipe.recv()
        except EOFError:
            return
        os.environ.clear()  # the server's are those of the first call
        os.environ.update(env)
        try:
            import torch

            torch.set_num_threads(1)
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        finally:
            from common import parallel

            parallel.shutdown()


def _threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task")) if os.path.isdir(f"/proc/{pid}/task") else 0


def stop() -> None:
    for process, pipe in _pool:
        pipe.close()
        process.kill()
        process.join()
    _pool.clear()


atexit.register(stop)


def run_ranks(world: int, function, *args) -> list:
    """Call `function(*args)` on `world` ranks with torchrun's environment set; the list of their return values."""
    if any(_threads(process.pid) > THREADS for process, _ in _pool):
        stop()
    while len(_pool) < world:
        ours, theirs = _context.Pipe()
        process = _context.Process(target=_serve, args=(theirs,))  # no daemon: dist_checkpointing starts writers
        process.start()
        theirs.close()
        _pool.append((process, ours))
    # The store is here, as torchrun's is with its agent: a port that rank 0 was told to listen on may be taken by then.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = os.environ | {
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "OMP_NUM_THREADS": "1",
    }
    env |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    for rank, (_, pipe) in enumerate(_pool[:world]):
        pipe.send((function, args, env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))
    results: dict[int, object] = {}
    pending = {pipe: rank for rank, (_, pipe) in enumerate(_pool[:world])}
    while pending:
        ready = wait(list(pending), timeout=TIMEOUT)
        if not ready:
            stop()
            raise TimeoutError(f"ranks {sorted(pending.values())} of {world} did not answer in {TIMEOUT} s")
        for pipe in ready:
            rank = pending.pop(pipe)
            try:
                ok, value = pipe.recv()
            except EOFError:
                ok, value = False, "the process died"
            if not ok:
                stop()  # the others may be waiting for this rank in a collective
                raise AssertionError(f"rank {rank} of {world} failed first:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(world)]
