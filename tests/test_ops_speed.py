"""The speed table of `common.ops`: the work that cases state is what torch counts, what does not fit is a cell of a
row, and the rest goes on."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from common import ops_check, ops_speed
from common.ops_check import CASES, SMALL, Draw

pytestmark = pytest.mark.L2

CPU = torch.device("cpu")
MACHINE = ops_speed.Machine(bytes=1e9, flops=1e12, occupy=lambda: None)


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith(("linear", "grouped"))])
def test_flops_of_a_case_are_those_that_torch_counts_in_its_plain_version(name):
    """Exactly: forward and backward have three matmuls."""
    case = CASES[name]
    inputs = case.make(Draw(SMALL | case.fixed, torch.float32, CPU))
    with FlopCounterMode(display=False) as counter:
        ops_speed.forward_and_backward(case.plain, inputs)()
    assert case.flops(inputs) == counter.get_total_flops()


def test_flops_of_experts_count_every_choice():
    case = CASES["permute, grouped matmul, unpermute"]
    inputs = case.make(Draw(SMALL, torch.float32, CPU))
    with FlopCounterMode(display=False) as counter:
        ops_speed.forward_and_backward(case.plain, inputs)()
    assert case.flops(inputs) == counter.get_total_flops()


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("attention")])
def test_pairs_of_attention_are_the_scores_that_its_plain_version_keeps(name, monkeypatch):
    case, kept = CASES[name], []
    inputs = case.make(Draw(SMALL | case.fixed, torch.bfloat16, CPU))
    fill = torch.Tensor.masked_fill
    # The plain version hides scores in one call, whose mask is [L, S] or, for blocks, [B, H, L, S].
    monkeypatch.setattr(
        torch.Tensor, "masked_fill", lambda x, mask, v: kept.append((~mask.expand_as(x)).sum()) or fill(x, mask, v)
    )
    case.plain(**inputs)
    assert [ops_check.visible_pairs(**inputs)] == [int(n) for n in kept]
    E, V = inputs["q"].shape[3], inputs["v"].shape[3]
    products = E + V + (E + V + V + E + E)  # forward: scores, out; backward: scores, dp, dv, dq, dk
    assert case.flops(inputs) == 2 * products * int(kept[0])


def test_draws_of_the_self_test_do_not_depend_on_where_a_table_draws():
    host, table = (Draw(SMALL, torch.bfloat16, CPU, where) for where in (None, CPU))
    assert torch.equal(host.floats(5, 7), table.floats(5, 7)) and torch.equal(
        host.integers(9, 40), table.integers(9, 40)
    )
    assert torch.equal(host.angles(3, 2)[1], table.angles(3, 2)[1])


def refusing(**inputs):
    raise torch.OutOfMemoryError("tried to allocate 9 GiB")


def test_plain_version_without_room_is_a_cell_and_its_row_goes_on(monkeypatch, capsys):
    case = CASES["rms_norm"]
    without_room = ops_check.Case(case.make, case.op, refusing, case.backends, traffic=case.traffic)
    monkeypatch.setattr(ops_speed, "self_test", lambda case, where: (["1e-7", "1e-3"], ["bf16: 1e-3, tolerance 1e-4"]))
    monkeypatch.setattr(ops_speed, "compiler_missing", lambda: "triton is not installed")
    compiler = ops_speed.Compiler()
    failed = ops_speed.print_row("rms_norm", without_room, MACHINE, compiler, Draw(SMALL, torch.float32, CPU))
    row = capsys.readouterr().out
    assert "out of memory" in row and "refused" in row and "GB/s" in row and row.rstrip().endswith("%")
    assert failed == ["rms_norm bf16: 1e-3, tolerance 1e-4"] and compiler.notes == ["triton is not installed"]
    with pytest.raises(RuntimeError, match="a fault"):
        ops_speed.time_or_reason(lambda: (_ for _ in ()).throw(RuntimeError("a fault")), MACHINE)


def test_rate_is_work_over_time_beside_its_ceiling():
    case = CASES["swiglu"]
    inputs = case.make(Draw(SMALL, torch.float32, CPU))  # x [37, 2, 80] fp32, which memory reads or writes 4 times
    assert ops_speed.rate(case, inputs, 1.0, MACHINE) == (f"{4 * 37 * 2 * 80 * 4 / 1e-3 / 1e9:.4g} GB/s", "9%")


def test_a_compiler_that_is_missing_or_fails_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert ops_speed.compiler_missing() == "no compiler is found (no-such-compiler); fix: export CXX=PATH"
    monkeypatch.setattr(ops_speed, "compiler_missing", lambda: None)

    def fails(plain, dynamic):
        raise RuntimeError("ninja is too old\nand more")

    monkeypatch.setattr(torch, "compile", lambda plain, dynamic: lambda **inputs: fails(plain, dynamic))
    compiler, inputs = ops_speed.Compiler(), {"x": torch.zeros(2, requires_grad=True)}
    assert compiler.time("swiglu", None, inputs, MACHINE) == "failed"
    compiler.left = 0
    assert compiler.time("gelu_tanh", None, inputs, MACHINE) == "no time left"
    spent = f"gelu_tanh: {ops_speed.COMPILE_SECONDS} s of compiling are spent; fix: --only"
    assert compiler.notes == ["swiglu: RuntimeError: ninja is too old", spent]


def test_only_selects_rows_and_refuses_a_name_that_is_none(monkeypatch, capsys):
    monkeypatch.setattr(ops_speed, "measure_machine", lambda dtype, where: MACHINE)
    names = []
    monkeypatch.setattr(ops_speed, "print_row", lambda name, *rest: names.append(name) or [])
    monkeypatch.setattr("sys.argv", ["ops", "--only", "rotary"])
    ops_speed.main()
    assert names == ["rotary_interleaved", "rotary_half", "norm_rotary_half"]
    monkeypatch.setattr("sys.argv", ["ops", "--only", "rotery"])
    with pytest.raises(SystemExit) as end:
        ops_speed.main()
    assert end.value.code == 2 and "no op's name contains 'rotery'; expected a part of" in capsys.readouterr().err
