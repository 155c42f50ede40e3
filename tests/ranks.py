"""Runs a function on several gloo ranks. A rank that raises shows its own traceback, and nothing can hang.

    results = run_ranks(4, some_module_level_function, arg, ...)   # [rank 0's return value, rank 1's, ...]

Importing torch, megatron-core and transformers takes ten seconds. So one process imports them once, and every rank is
forked from it. Ranks end with their call: gloo's threads outlive their groups and wake a hundred times a second, which
would slow down the calls that follow.
"""

import contextlib
import gc
import os
import traceback
from multiprocessing import get_context, set_start_method
from multiprocessing.connection import wait

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


def _run(pipe, env: dict[str, str], function, args) -> None:
    set_start_method("fork", force=True)  # as under torchrun: else a data loader's processes are started like this one
    gc.freeze()  # each save of a checkpoint collects garbage; what was imported is none
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


def run_ranks(world: int, function, *args) -> list:
    """Calls `function(*args)` on `world` ranks with torchrun's environment set. Returns the list of their results."""
    # The store is here, as torchrun's is with its agent: a port that rank 0 was told to listen on may be taken by then.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "OMP_NUM_THREADS": "1"}
    env |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    processes, pending = [], {}
    try:
        for rank in range(world):
            ours, theirs = forkserver.Pipe()
            of_rank = os.environ | env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # No daemon: dist_checkpointing starts writers.
            processes.append(forkserver.Process(target=_run, args=(theirs, of_rank, function, args)))
            processes[-1].start()
            theirs.close()
            pending[ours] = rank
        return _collect(world, pending)
    finally:
        for process in processes:
            process.kill()
            process.join()


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
