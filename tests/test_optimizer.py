"""Parameters that are gathered beside the forward, states in host memory and fp32 weights kept as remainders change
nothing: runs are equal bit by bit, or differ as `common.optimizer` states. Runs of one kind go on with another's
checkpoint."""

import functools
import shutil
from pathlib import Path
from unittest import mock

import pytest
import qwen_case as case
import test_wan21_layouts as wan
import torch
import torch.distributed as dist
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from ranks import run_ranks
from test_qwen3_memory import trained
from test_resume import tensors

from common import parallel
from common.optimizer import PackedAdamW, divide, unite

pytestmark = pytest.mark.L3

RUN = {"steps": 4, "save_every": 2, "resume": "auto", "warmup": 1, "keep": 9}


def same(one: Path, other: Path, step: int = 4) -> None:
    """Asserts that two runs have equal losses and gradient norms, and equal tensors in a checkpoint, bit by bit."""
    rows, others = case.steps_of(one), case.steps_of(other)
    assert rows == others and len(rows) == 4
    want, got = (tensors(out / f"checkpoints/step-{step:06d}") for out in (one, other))
    assert want.keys() == got.keys()
    assert not [key for key in want if not torch.equal(want[key], got[key])]


def cut(out: Path, name: str) -> Path:
    """Copies a run as it would be if it had died after step 2."""
    copy = shutil.copytree(out, out.with_name(name))
    shutil.rmtree(copy / "checkpoints/step-000004")
    return copy


# ------------------------------------------------------------------------------------- parameters gathered while in use


class Late:
    """Stands in for the handle of an all-gather that brings nothing until it is waited for."""

    def __init__(self, group: _ParamAndGradBucketGroup):
        self.group = group

    def wait(self) -> None:
        group = self.group.intra_distributed_optimizer_instance_group
        for bucket in self.group.buckets:
            mine = bucket.param_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.param_data, mine, group=group)


def start_late(group: _ParamAndGradBucketGroup, force_sync: bool = False) -> None:
    """Takes the place of megatron-core's start of an all-gather. What is to come is no number until then."""
    assert not force_sync and group.param_gather_handle is None
    size, rank = group.intra_distributed_optimizer_instance_size, group.intra_distributed_optimizer_instance_rank
    for bucket in group.buckets:
        for i, part in enumerate(bucket.param_data.chunk(size)):
            if i != rank:
                part.fill_(float("nan"))
    group.param_gather_handle, group.param_gather_dispatched = Late(group), True
    COUNT.append(group)


COUNT: list = []


def overlapped(run, late: bool, *args) -> tuple:
    """Calls run(*args) with buckets of a few thousand parameters, so that there are many, and with compiled code that
    torch interprets. late: as `Late`. Returns (its result, number of all-gathers that `Late` stood in for)."""
    config = functools.partial(parallel.DistributedDataParallelConfig, bucket_size=3000)
    interpreted = functools.partial(torch.compile, backend="eager")
    start = start_late if late else _ParamAndGradBucketGroup.start_param_sync
    with (
        mock.patch.object(parallel, "DistributedDataParallelConfig", config),
        mock.patch.object(torch, "compile", interpreted),
        mock.patch.object(_ParamAndGradBucketGroup, "start_param_sync", start),
    ):
        return run(*args), len(COUNT)


LAYOUTS = {  # and what the overlapped run has besides: compiled blocks, states on the host
    "dp2 recompute full": ("dense", 2, {"recompute": "full"}, {"compile": True}),
    "cp2 ring ep2": ("moe", 2, {"cp": 2, "ulysses": 1, "ep": 2}, {"offload_optimizer": True}),
    "dp2 pp2 vpp2": ("dense tied", 4, {"pp": 2, "vpp": 2}, {"offload_optimizer": True}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_parameter_is_read_or_saved_before_it_has_arrived(name, tmp_path):
    which, world, layout, more = LAYOUTS[name]
    run_ranks(world, overlapped, trained, False, which, tmp_path / "plain", RUN | layout)
    options = RUN | layout | {"overlap_param_gather": True}
    _, gathers = run_ranks(world, overlapped, trained, True, which, tmp_path / "late", options | more)[0]
    assert gathers >= 4 * 3  # steps, and buckets of each
    for step in (2, 4):
        same(tmp_path / "plain", tmp_path / "late", step)
    if name == "dp2 recompute full":  # goes on from a checkpoint, with megatron-core's own all-gathers
        parts = cut(tmp_path / "late", "parts")
        run_ranks(world, overlapped, trained, False, which, parts, options)
        same(tmp_path / "plain", parts)


def test_no_parameter_of_a_video_model_is_read_before_it_has_arrived():
    """Its norms, modulation and patch embedding are read without a call of the module that owns them."""
    (want, _), *_ = run_ranks(2, overlapped, wan.run_layout, False, {}, 3, False)
    options = {"overlap_param_gather": True, "offload_optimizer": True}
    (got, gathers), *_ = run_ranks(2, overlapped, wan.run_layout, True, options, 3, False)
    assert gathers >= 9 and got["losses"] == want["losses"]
    assert not [name for name, weight in want["weights"].items() if not torch.equal(weight, got["weights"][name])]


# ------------------------------------------------------------------------------------------------ states in host memory


def in_pieces(*args) -> set:
    """Trains with pieces of 256 elements, and returns the dtypes of all states after the last step."""
    seen, step = set(), PackedAdamW.step

    def look(self, closure=None):
        step(self)
        seen.update((name, t.dtype) for state in self.state.values() for name, t in state.items())

    with mock.patch.object(PackedAdamW, "step", look), mock.patch.object(PackedAdamW, "PIECE", 256):
        trained(*args)
    return seen


def test_states_on_the_host_take_the_steps_of_the_plain_run_and_keep_their_dtypes_when_it_goes_on(tmp_path):
    options = RUN | {"precision": "bf16", "moments": "bf16"}
    run_ranks(2, trained, "dense", tmp_path / "plain", options)
    options["offload_optimizer"] = True
    run_ranks(2, in_pieces, "dense", tmp_path / "host", options | {"steps": 2})
    dtypes = run_ranks(2, in_pieces, "dense", tmp_path / "host", options)[0]
    for step in (2, 4):
        same(tmp_path / "plain", tmp_path / "host", step)
    moments = {("exp_avg", torch.bfloat16), ("exp_avg_sq", torch.bfloat16)}
    assert dtypes == moments | {("master_param", torch.float32), ("step", torch.float32)}


# ---------------------------------------------------------------------------------------- fp32 weights kept as remainders


def test_numbers_are_divided_without_loss_and_only_ties_are_rounded_otherwise():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (1_000_000,), generator=generator).int()
    ties = (bits & -0x10000) | 0x8000
    for case_bits in (bits, ties, ties - 1, ties + 1, torch.tensor([0, -(2**31), 0x7F7FFFFF, 0x7F800000, 1]).int()):
        numbers = case_bits[~case_bits.view(torch.float32).isnan()].view(torch.float32)
        weight, remainder = divide(numbers)
        assert torch.equal(unite(weight, remainder).view(torch.int32), numbers.view(torch.int32))
        tie = (numbers.view(torch.int32) & 0xFFFF) == 0x8000
        assert torch.equal(weight[~tie], numbers[~tie].bfloat16())
        assert (weight[tie].abs() >= numbers[tie].abs()).all()


@pytest.mark.parametrize("on_host", [False, True])
def test_weights_kept_as_remainders_take_the_steps_of_fp32_ones(on_host):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5000, generator=generator).bfloat16()
    master, p = torch.nn.Parameter(weight.float()), weight.clone()
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    plain, packed = torch.optim.AdamW([master], fused=True, **settings), PackedAdamW([p], **settings)
    packed.remainders, packed.on_host = True, on_host
    for _ in range(20):
        master.grad = p.decoupled_grad = torch.randn(5000, generator=generator)
        plain.step()
        packed.step()
        assert torch.equal(packed.get_unscaled_state(p, "master_param"), master.detach())
        assert torch.equal(p, divide(master.detach())[0])
    assert packed.state[p]["master_param"].dtype == torch.int16


def test_a_plain_run_goes_on_with_remainders_and_that_one_bitwise(tmp_path):
    options, whole = RUN | {"precision": "bf16"}, tmp_path / "whole"
    run_ranks(2, trained, "dense", tmp_path / "plain", options)
    options["master_remainders"] = True
    run_ranks(2, trained, "dense", cut(tmp_path / "plain", "whole"), options | {"save_every": 1})
    parts = shutil.copytree(whole, tmp_path / "parts")
    shutil.rmtree(parts / "checkpoints/step-000004")
    run_ranks(2, trained, "dense", parts, options)
    same(whole, parts)
    losses = [[row["loss"] for row in case.steps_of(out).values()] for out in (tmp_path / "plain", whole)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)  # ties are rounded up: one weight of 131,072
