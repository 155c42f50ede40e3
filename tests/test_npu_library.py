"""Checks the npu branch against the real torch_npu 2.13.0 library, without an NPU, in host memory. Level B calls the
library's dispatcher and shape functions. Level C runs ops and the recipe on its `npu` device, with CPU kernels (see
fake_ascend.py). Nothing here ran on Ascend; it says nothing about an NPU's numerics or speed.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import fake_ascend
import npu_contract
import pytest
import torch
from fake_ascend import ROOT
from ranks import run_ranks
from torch._C._distributed_c10d import FakeProcessGroup
from torch.utils._pytree import tree_leaves, tree_map

from common import ops_check
from zoo.wan21.demo import make_data

pytestmark = pytest.mark.L3

BF16, F32 = torch.bfloat16, torch.float32


def environment(device: bool) -> dict[str, str]:
    try:
        return os.environ | fake_ascend.environment(device=device)
    except fake_ascend.Unavailable as error:
        pytest.skip(str(error))


# ------------------------------------------------------------------------------- level B: the library's own signatures


def real(*shape: int, dtype=BF16) -> torch.Tensor:
    return torch.rand(shape).to(dtype)


def whole(*values, dtype=torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def attention(layout: str, **options) -> tuple:
    """Returns (positional, keyword) arguments: 2 sequences of 5 queries and 7 keys, 4 query heads, 2 key-value heads,
    head dim 16."""
    q, k = {
        "BSH": ((2, 5, 64), (2, 7, 32)),
        "SBH": ((5, 2, 64), (7, 2, 32)),
        "BSND": ((2, 5, 4, 16), (2, 7, 2, 16)),
        "BNSD": ((2, 4, 5, 16), (2, 2, 7, 16)),
        "TND": ((10, 4, 16), (14, 2, 16)),
    }[layout]
    if layout == "TND":
        options |= {"actual_seq_qlen": [5, 10], "actual_seq_kvlen": [7, 14]}
    return (real(*q), real(*k), real(*k), 4, layout), options


def attention_grad(layout: str) -> tuple:
    (q, *rest), options = attention(layout)
    statistics = (10, 4, 8) if layout == "TND" else (2, 4, 5, 8)
    peak, total = real(*statistics, dtype=F32), real(*statistics, dtype=F32)
    args = (q, *rest[:2], real(*q.shape), *rest[2:])
    return args, options | {"softmax_max": peak, "softmax_sum": total, "attention_in": real(*q.shape)}


CAUSAL = {"atten_mask": torch.ones(2048, 2048, dtype=torch.bool).triu(1), "sparse_mode": 3}
BLOCKS = (real(1, 4, 130, 128), real(1, 2, 260, 128), real(1, 2, 260, 128))
BLOCK_MASK = torch.ones(1, 4, 2, 3, dtype=torch.int8)
TWO = "a group of two"  # the name of a communicator that sends nothing: only shapes are looked at
npu_contract.GROUPS[TWO] = FakeProcessGroup._create_internal(0, 2)
LAYOUTS = ("BSH", "SBH", "BSND", "BNSD", "TND")
# case -> (op, positional arguments, keyword arguments); almost all dimensions of a case are different
CASES = {
    **{f"npu_fusion_attention {layout}": ("npu_fusion_attention", *attention(layout)) for layout in LAYOUTS},
    "npu_fusion_attention causal": ("npu_fusion_attention", *attention("BSND", **CAUSAL)),
    **{f"npu_fusion_attention_grad {layout}": ("npu_fusion_attention_grad", *attention_grad(layout)) for layout in LAYOUTS},
    "npu_block_sparse_attention": (
        "npu_block_sparse_attention",
        (*BLOCKS, BLOCK_MASK, [128, 128]),
        {"q_input_layout": "BNSD", "kv_input_layout": "BNSD", "num_key_value_heads": 2, "scale_value": 0.1,
         "inner_precise": 0, "softmax_lse_flag": 1},
    ),
    "npu_block_sparse_attention_backward": (
        "npu_block_sparse_attention_backward",
        (BLOCKS[0], *BLOCKS, BLOCKS[0], real(1, 4, 130, 1, dtype=F32), BLOCK_MASK, [128, 128], None, None, "BNSD",
         "BNSD", 2, 0.1),
        {},
    ),
    "npu_rms_norm": ("npu_rms_norm", (real(2, 5, 24), real(24), 1e-6), {}),
    "npu_rms_norm_backward": ("npu_rms_norm_backward", (real(2, 5, 24), real(2, 5, 24), real(24), real(2, 5, 1, dtype=F32)), {}),
    "npu_add_rms_norm": ("npu_add_rms_norm", (real(2, 5, 24), real(2, 5, 24), real(24), 1e-6), {}),
    "npu_swiglu": ("npu_swiglu", (real(2, 5, 24), -1), {}),
    "npu_swiglu_backward": ("npu_swiglu_backward", (real(2, 5, 12), real(2, 5, 24), -1), {}),
    "npu_rotary_mul": ("npu_rotary_mul", (real(2, 5, 4, 64), real(1, 5, 1, 64), real(1, 5, 1, 64), "interleave"), {}),
    "npu_rotary_mul_backward": (
        "npu_rotary_mul_backward",
        (real(2, 5, 4, 64), real(2, 5, 4, 64), real(1, 5, 1, 64), real(1, 5, 1, 64), "half"),
        {},
    ),
    "npu_moe_token_permute": ("npu_moe_token_permute", (real(3, 24), whole([0, 1], [2, 0], [1, 2], dtype=torch.int32)), {}),
    "npu_moe_token_permute_grad": (
        "npu_moe_token_permute_grad",
        (real(3, 24), real(6, 24), whole([0, 1], [2, 0], [1, 2], dtype=torch.int32), whole(*range(6), dtype=torch.int32)),
        {},
    ),
    "npu_moe_token_unpermute": (
        "npu_moe_token_unpermute", (real(6, 24), whole(*range(6), dtype=torch.int32), real(3, 2)), {}
    ),
    "npu_moe_token_unpermute_grad": (
        "npu_moe_token_unpermute_grad", (real(6, 24), real(3, 24), whole(*range(6), dtype=torch.int32), real(3, 2)), {}
    ),
    "npu_grouped_matmul": (
        "npu_grouped_matmul",
        ([real(5, 24)], [real(3, 24, 16)]),
        {"group_list": whole(2, 0, 3), "split_item": 2, "group_type": 0, "group_list_type": 1},
    ),
    "npu_grouped_matmul_add_": (
        "npu_grouped_matmul_add_",
        (real(3, 24, 16, dtype=F32), real(5, 24), real(5, 16), whole(2, 2, 5)),
        {"transpose_x": True, "group_type": 2, "group_list_type": 0},
    ),
    "npu_grouped_matmul weight gradient": (
        "npu_grouped_matmul",
        ([real(24, 5)], [real(5, 16)]),
        {"group_list": whole(2, 2, 5), "split_item": 3, "group_type": 2, "group_list_type": 0},
    ),
    "npu_mm_all_reduce_base": ("npu_mm_all_reduce_base", (real(2, 5, 24), real(24, 16), TWO), {}),
    "npu_mm_reduce_scatter_base": ("npu_mm_reduce_scatter_base", (real(6, 256), real(256, 16), TWO, 2), {}),
    "npu_all_gather_base_mm": ("npu_all_gather_base_mm", (real(5, 256), real(256, 16), TWO, 2), {}),
    "npu_cross_entropy_loss": ("npu_cross_entropy_loss", (real(3, 24), whole(0, 7, 23)), {"reduction": "none"}),
    "npu_cross_entropy_loss mean": ("npu_cross_entropy_loss", (real(3, 24), whole(0, 7, 23)), {}),
    "npu_cross_entropy_loss_backward": (
        "npu_cross_entropy_loss_backward", (real(3), real(3, 24), whole(0, 7, 23)), {"reduction": "none"}
    ),
    "npu_apply_adam_w.out": (
        "npu_apply_adam_w.out",
        (0.9, 0.99, 1e-3, 0.1, 0.9, 0.99, 1e-8, real(5, 24, dtype=F32), None, False, False),
        {"out": [real(5, 24, dtype=F32) for _ in range(3)]},
    ),
}  # fmt: skip


def kinds(result) -> list:
    """Lists [dtype, shape] of every tensor, "nothing" for None or an empty tensor, which stand for an omitted output,
    and the type of any other value."""

    def kind(x):
        if torch.is_tensor(x) and x.numel():
            return [str(x.dtype), list(x.shape)]
        return "nothing" if x is None or torch.is_tensor(x) else type(x).__name__

    return [kind(x) for x in tree_leaves(result, is_leaf=lambda x: x is None)]


def ask_library() -> None:
    """Prints the schema of every op, the result of its shape function for every case, and the error of a sum on the
    device. Runs in a process that has the library and no kernels."""
    import torch_npu  # noqa: F401

    answers: dict = {"schemas": {}, "results": {}, "sum": "an answer"}
    try:
        torch.empty(3, device="npu") + 1
    except RuntimeError as error:
        answers["sum"] = str(error)
    for name in npu_contract.SCHEMAS:
        answers["schemas"][name] = str(fake_ascend.op(f"npu::{name}")._schema)
    for case, (name, args, options) in CASES.items():
        args, options = tree_map(lambda x: x.to("meta") if torch.is_tensor(x) else x, (args, options))
        try:
            answers["results"][case] = kinds(fake_ascend.op(f"npu::{name}")(*args, **options))
        except Exception as error:
            answers["results"][case] = repr(error)
    print("\n" + json.dumps(answers))


def answer(question: str, env: dict[str, str]) -> dict:
    """Calls a function of this file in a process with this environment and returns the JSON that it prints last."""
    command = [sys.executable, "-c", f"import torch, test_npu_library; test_npu_library.{question}()"]
    env = env | {"ZOO_DEVICE": "npu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def library() -> dict:
    return answer("ask_library", environment(device=False))


def test_every_op_of_the_contract_has_a_case():
    assert {op for op, *_ in CASES.values()} == set(npu_contract.SCHEMAS)


@pytest.mark.parametrize("name", npu_contract.SCHEMAS)
def test_schema_is_the_librarys(name, library):
    assert library["schemas"][name] == f"npu::{npu_contract.SCHEMAS[name]}"


def test_an_op_without_a_kernel_fails_instead_of_doing_nothing(library):
    assert "it has no such op" in library["sum"]


@pytest.mark.parametrize("case", CASES)
def test_result_shapes_and_dtypes_are_the_librarys(case, library):
    name, args, options = CASES[case]
    names = [a.name for a in torch._C.parse_schema(f"npu::{npu_contract.SCHEMAS[name]}").arguments]
    options = tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, options)  # one op writes to its `out`
    ours = npu_contract.KERNELS[name](**dict(zip(names, args, strict=False)), **options)
    assert kinds(ours) == library["results"][case]


# ------------------------------------------------------------ level C: ops and the recipe on the library's `npu` device


@pytest.fixture(scope="module")
def on_npu() -> dict[str, str]:
    return environment(device=True)


def errors_on_device() -> dict:
    """Returns the largest error of every op and its gradients, which torch_npu's own autograd formulas compute. Runs in
    a process whose npu device computes."""
    from common import ops_check

    largest_errors: dict = {}
    for name, case in ops_check.CASES.items():
        for dtype in case.dtypes:
            try:
                largest_errors[f"{name} {dtype}"] = max(ops_check.errors(case, dtype, torch.device("npu")).values())
            except Exception as error:
                largest_errors[f"{name} {dtype}"] = repr(error)
    return largest_errors


@pytest.mark.parametrize("name", ops_check.CASES)
def test_op_and_its_gradients_through_the_librarys_autograd_equal_fp64(name, one_device):
    for dtype in ops_check.CASES[name].dtypes:
        error = one_device["errors"][f"{name} {dtype}"]
        assert not isinstance(error, str), error
        assert error <= ops_check.TOLERANCE[dtype], dtype


RUNS = {
    "one process": (1, ""),
    "tp2 sp": (2, "--tp 2 --sp"),
    "dp2": (2, ""),
    "fsdp2": (2, "--fsdp"),
}


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [s.getsockname()[1] for s in sockets]


def arguments(clips, folder, name: str) -> list[str]:
    """Returns the options of two steps on the clips under a layout, with encoders, a checkpoint and one sample. The run
    folder has the layout's name."""
    prompts = folder / "prompts.txt"
    prompts.write_text("a handwritten three moves up\n")
    shared = f"--size tiny --from-scratch --data {clips} --cache {folder}/latents --precision fp32 --save-every 0"
    shared += f" --steps 2 --micro-batch 2 --global-batch 4 --workers 1 --sample-steps 1 --sample-prompts {prompts}"
    return [*f"{shared} {RUNS[name][1]}".split(), "--out", str(folder / name)]


def on_devices(processes: int, program: str, argument, env: dict[str, str]) -> None:
    """Calls a function of this file with an argument in `processes` processes whose npu device computes."""
    # The device comes before megatron, which this file imports through common.ops.
    call = f"import torch, common.device, test_npu_library; test_npu_library.{program}({argument!r})"
    env = env | {"ZOO_DEVICE": "npu", "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", call], env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip
    try:
        for rank, process in enumerate(ranks):
            printed, _ = process.communicate(timeout=240)
            assert process.returncode == 0, f"rank {rank}: {printed}"
    finally:
        for process in ranks:
            process.kill()


def pretrain(argv: list[str]) -> None:
    """Runs the training job in this process."""
    from common import worker
    from zoo.wan21 import options

    worker.run("zoo.wan21", "train", options.parse("train", argv))


def pretrain_all(runs: list[tuple[int, list[str]]]) -> None:
    """Runs the training job in this process for every (port of rank 0's store, options). Each run has its own store: in
    a shared one, a group would find keys of the previous layout's groups."""
    for port, argv in runs:
        os.environ["MASTER_PORT"] = str(port)
        pretrain(argv)


def check_ops_and_pretrain(asked: tuple[str, list[tuple[int, list[str]]]]) -> None:
    """Writes what `errors_on_device` returns to a file, then calls `pretrain_all`. asked: the file, and the runs."""
    file, runs = asked
    Path(file).write_text(json.dumps(errors_on_device()))
    pretrain_all(runs)


def record_of(out) -> list[dict]:
    assert (out / "checkpoints" / "latest").exists() and list((out / "samples").iterdir())
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(record: list[dict]) -> list[float]:
    return [row["loss"] for row in record if row["kind"] == "step"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Makes a list of 8 demo clips."""
    return make_data.make(tmp_path_factory.mktemp("clips") / "demo", train=8, test=0) / "train.jsonl"


@pytest.fixture(scope="module")
def on_cpu(clips, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("cpu")
    run_ranks(1, pretrain, arguments(clips, folder, "one process"))
    return record_of(folder / "one process")


@pytest.fixture(scope="module")
def one_device(on_npu, clips, tmp_path_factory) -> dict:
    """Returns the errors of the ops, and the record of the run on one device. One process does both, because it takes
    long to import everything on this device."""
    folder = tmp_path_factory.mktemp("npu")
    runs = [(free_ports(1)[0], arguments(clips, folder, "one process"))]
    on_devices(1, "check_ops_and_pretrain", (str(folder / "errors.json"), runs), on_npu)
    errors = json.loads((folder / "errors.json").read_text())
    return {"errors": errors, "one process": record_of(folder / "one process")}


@pytest.fixture(scope="module")
def records(one_device, on_npu, clips, tmp_path_factory) -> dict[str, list[dict]]:
    folder, names = tmp_path_factory.mktemp("npu"), [name for name, (count, _) in RUNS.items() if count == 2]
    runs = [(port, arguments(clips, folder, name)) for port, name in zip(free_ports(len(names)), names, strict=True)]
    on_devices(2, "pretrain_all", runs, on_npu)
    return one_device | {name: record_of(folder / name) for name in names}


@pytest.mark.parametrize("name", RUNS)
def test_pretraining_on_the_stand_in_device_has_the_losses_of_the_cpu(name, records, on_cpu):
    record = records[name]
    assert record[0]["hardware"].startswith("Ascend")  # the stub gives torch_npu this name; it is host memory
    assert len(losses(record)) == 2
    assert losses(record) == pytest.approx(losses(on_cpu), rel=1e-5)
