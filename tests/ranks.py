"""Runs a function on several gloo ranks. A rank that raises shows its own traceback, and nothing can hang.

    results = run_ranks(4, some_module_level_function, arg, ...)   # [rank 0's return value, rank 1's, ...]

Importing torch, megatron-core and transformers takes ten seconds, and compiling a module of tests with its recipe half
a second. So one process, the server, does both once, and every rank is forked from it. Ranks end with their call: gloo's
threads outlive their groups and wake a hundred times a second, which would slow down the calls that follow.
"""

import atexit
import contextlib
import gc
import os
import traceback
from multiprocessing import get_context, reduction, set_start_method
from multiprocessing.connection import Connection, wait

import torch.distributed as dist

TIMEOUT = 240  # seconds a call may take
IMPORTS = [  # before the fork; the device adapter before anything imports megatron; no recipe, as a test may change one
    "common.device", "common.train", "common.release", "common.perf", "common.lora", "common.worker", "pytest",
    "common.diffusion.caches", "common.diffusion.features", "common.diffusion.options", "common.diffusion.preference",
    "common.diffusion.sampling", "common.diffusion.vae_parallel", "common.diffusion.videos", "common.language.chat",
    "common.language.generate", "common.language.megatron_import", "common.language.preference",
    "common.language.preprocess", "common.language.text", "cv2", "diffusers.models.autoencoders.autoencoder_kl_wan",
    "diffusers.models.transformers.transformer_wan", "diffusers.schedulers.scheduling_flow_match_euler_discrete",
    "diffusers.schedulers.scheduling_unipc_multistep", "ftfy", "matplotlib.pyplot", "megatron.core.models.backends",
    "megatron.core.transformer.multi_token_prediction", "torch._dynamo", "torch.utils.serialization",
    "torch.utils.tensorboard", "transformers.models.auto.modeling_auto",
    "transformers.models.clip.image_processing_pil_clip", "transformers.models.clip.modeling_clip",
    "transformers.models.qwen3.modeling_qwen3", "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "transformers.models.umt5.modeling_umt5",
]  # fmt: skip
forkserver = get_context("forkserver")
forkserver.set_forkserver_preload(IMPORTS)
_server = None  # (process, pipe, {name of a module that it has imported: that module's variables here})


def _serve(pipe: Connection) -> None:
    set_start_method("fork", force=True)  # as under torchrun: else a data loader's processes are started like this one
    with contextlib.suppress(EOFError):  # at the end of the tests
        while True:
            ranks, (function, args, envs) = [], pipe.recv()  # imports the function's module
            gc.freeze()  # each save of a checkpoint collects garbage; what was imported is none
            try:
                for env in envs:
                    theirs = Connection(reduction.recv_handle(pipe))
                    # No daemon: dist_checkpointing starts writers.
                    ranks.append(get_context("fork").Process(target=_run, args=(theirs, env, function, args)))
                    ranks[-1].start()
                    theirs.close()
                pipe.recv()  # the results are there, or a rank has failed
            finally:
                for rank in ranks:
                    rank.kill()
                    rank.join()
            pipe.send("the ranks have ended")


def _run(pipe: Connection, env: dict[str, str], function, args) -> None:
    os.environ.clear()  # the variables of the server are those of the first call
    os.environ.update(env)
    try:
        import torch

        torch.set_num_threads(1)
        pipe.send((True, function(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    with contextlib.suppress(EOFError):  # until the others have ended too, which may still wait for what this rank sent
        pipe.recv()


@atexit.register
def _end_server() -> None:
    """Ends the server, else Python would wait for it."""
    global _server
    if _server:
        _server[0].kill()
        _server[0].join()
        _server = None


def _server_of(function) -> Connection:
    """Returns the pipe to the server. It is another server if the last one died, or if a test has imported the function's
    module anew."""
    global _server
    function = getattr(function, "func", function)  # of a functools.partial
    name, variables = function.__module__, function.__globals__
    if _server and not (_server[0].is_alive() and _server[2].setdefault(name, variables) is variables):
        _end_server()
    if not _server:
        pipe, theirs = forkserver.Pipe()
        process = forkserver.Process(target=_serve, args=(theirs,))
        process.start()
        theirs.close()
        _server = process, pipe, {name: variables}
    return _server[1]


def run_ranks(world: int, function, *args) -> list:
    """Calls `function(*args)` on `world` ranks with torchrun's environment set. Returns the list of their results."""
    # The store is here, as torchrun's is with its agent: a port that rank 0 was told to listen on may be taken by then.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "OMP_NUM_THREADS": "1"}
    env |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    envs = [os.environ | env | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    server, pending = _server_of(function), {}
    server.send((function, args, envs))
    try:
        for rank in range(world):
            ours, theirs = forkserver.Pipe()
            reduction.send_handle(server, theirs.fileno(), None)
            theirs.close()
            pending[ours] = rank
        return _collect(world, pending)
    finally:
        server.send("kill the ranks")
        server.recv()


def _collect(world: int, pending: dict) -> list:
    """Waits for the result of every rank. pending: pipe -> rank. Raises at the first that fails or is silent."""
    results: dict[int, object] = {}
    while pending:
        ready = wait(list(pending), timeout=TIMEOUT)
        if not ready:
            raise TimeoutError(f"ranks {sorted(pending.values())} of {world} did not answer in {TIMEOUT} s")
        for pipe in ready:
            rank = pending.pop(pipe)
            try:
                ok, value = pipe.recv()
            except EOFError:
                ok, value = False, "the process died"
            if not ok:  # the others may be waiting for this rank in a collective
                raise AssertionError(f"rank {rank} of {world} failed first:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(world)]
