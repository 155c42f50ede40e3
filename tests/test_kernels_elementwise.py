"""The elementwise Triton kernels, interpreted, equal fp64 references in plain torch in outputs and every gradient."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton: pip install --no-deps triton==3.7.1")

from kernels import modulate, norm_rotary, rms_norm, rotary, swiglu

pytestmark = pytest.mark.L2

fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {fp32: 1e-5, bf16: 1e-2, fp16: 2e-3}
EPS = 0.1  # so large that a kernel without it fails
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
WIDTHS = pytest.mark.parametrize("D", [1, 33, 130])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Makes tiles and grids so small that every loop of every kernel runs more than twice on a few rows."""
    for module in (rms_norm, modulate, swiglu, rotary, norm_rotary):
        for name, value in {"TILE": 32, "GATE_COLS": 8, "MOST_COLS": 8}.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
        for name in ("FORWARD_PROGRAMS", "BACKWARD_PROGRAMS", "MOST_PROGRAMS"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, 2)


def randn(*shape, dtype=fp32):
    return torch.randn(shape).to(dtype)


def strided(*shape, dtype=fp32):
    """Draws a tensor of this shape in which no stride equals that of a contiguous tensor."""
    return randn(*(2 * n for n in reversed(shape)), dtype=dtype).permute(*reversed(range(len(shape))))[
        tuple(slice(n) for n in shape)
    ]


def sliced(*shape):
    """Draws a tensor of this shape that is a slice of a tensor with longer rows, as q is of a fused qkv."""
    return randn(*shape[:-1], 3 * shape[-1])[..., shape[-1] : 2 * shape[-1]]


def error(ours, reference, *inputs):
    """Returns the worst error, relative to the largest entry, of the outputs and of every input's gradient.

    The reference runs on the inputs in fp64. The gradients of the outputs are strided.
    """
    narrow = [t.detach().requires_grad_() for t in inputs]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    out, expected = (y if isinstance(y, tuple) else (y,) for y in (ours(*narrow), reference(*wide)))
    dout = [strided(*y.shape, dtype=y.dtype) for y in out]
    got = [*out, *torch.autograd.grad(out, narrow, dout)]
    want = [*expected, *torch.autograd.grad(expected, wide, [d.double() for d in dout])]
    assert [t.shape for t in got] == [t.shape for t in want]
    assert [t.dtype for t in got[len(out) :]] == [t.dtype for t in inputs]
    return max(((g - w).abs().max() / w.abs().max()).item() for g, w in zip(got, want, strict=True) if w.numel())


# The references, as the papers define them.


def ref_rms_norm(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight


def ref_add_rms_norm(x, residual, weight):
    return ref_rms_norm(x + residual, weight), x + residual


def ref_layer_norm_modulate(x, scale, shift):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * (1 + scale) + shift


def ref_gate_residual(x, y, gate):
    return x + y * gate


def ref_swiglu(x):
    a, b = x.chunk(2, dim=-1)
    return a * torch.sigmoid(a) * b


def ref_rotary_interleaved(x, rope):
    cos, sin = rope.double().unbind(-1)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def ref_rotary_half(x, cos, sin):
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos.double() + torch.cat([-x2, x1], dim=-1) * sin.double()


def ref_swiglu_of_two(a, b):
    return a * torch.sigmoid(a) * b


def ref_norm_rotary_half(x, weight, cos, sin):
    return ref_rotary_half(ref_rms_norm(x, weight), cos, sin)


def our_rms_norm(x, weight):
    return rms_norm.rms_norm(x, weight, EPS)


def our_add_rms_norm(x, residual, weight):
    return rms_norm.add_rms_norm(x, residual, weight, EPS)


def our_layer_norm_modulate(x, scale, shift):
    return modulate.layer_norm_modulate(x, scale, shift, EPS)


def our_norm_rotary_half(x, weight, cos, sin):
    return norm_rotary.norm_rotary_half(x, weight, cos, sin, EPS)


# RMSNorm


@DTYPES
@WIDTHS
def test_rms_norm_equals_fp64(dtype, D):
    assert error(our_rms_norm, ref_rms_norm, randn(3, 5, D, dtype=dtype), randn(D, dtype=dtype)) <= TOLERANCE[dtype]


@DTYPES
@WIDTHS
def test_add_rms_norm_equals_fp64_in_both_outputs(dtype, D):
    inputs = randn(3, 5, D, dtype=dtype), randn(3, 5, D, dtype=dtype), randn(D, dtype=dtype)
    assert error(our_add_rms_norm, ref_add_rms_norm, *inputs) <= TOLERANCE[dtype]


@pytest.mark.parametrize("used", [0, 1])
def test_add_rms_norm_gradients_when_one_output_is_used(used):
    inputs = randn(6, 33), randn(6, 33), randn(33)
    # The weight only reaches the first output; + 0 * weight keeps it in the graph of the second.
    ours, reference = (lambda x, r, w, f=f: f(x, r, w)[used] + 0 * w for f in (our_add_rms_norm, ref_add_rms_norm))
    assert error(ours, reference, *inputs) <= TOLERANCE[fp32]


def test_rms_norm_takes_fp32_weight_with_bf16_rows():
    assert our_rms_norm(randn(4, 33, dtype=bf16), randn(33)).dtype == bf16
    assert error(our_rms_norm, ref_rms_norm, randn(4, 33, dtype=bf16), randn(33)) <= TOLERANCE[bf16]


# Modulations


@DTYPES
@WIDTHS
def test_layer_norm_modulate_equals_fp64(dtype, D):
    inputs = randn(5, 2, D, dtype=dtype), randn(2, D), randn(2, D)
    if D == 1:  # x - mean and its gradient are 0, so there is no relative error
        y = our_layer_norm_modulate(*inputs)
        assert (y - inputs[2]).abs().max() <= TOLERANCE[dtype]
    else:
        assert error(our_layer_norm_modulate, ref_layer_norm_modulate, *inputs) <= TOLERANCE[dtype]


def test_layer_norm_modulate_centres_before_it_squares():
    inputs = randn(5, 2, 33) + 1000, randn(2, 33), randn(2, 33)
    assert error(our_layer_norm_modulate, ref_layer_norm_modulate, *inputs) <= 2e-4  # fp32 resolves 2^-14 at 1000


@DTYPES
@WIDTHS
def test_gate_residual_equals_fp64(dtype, D):
    inputs = randn(5, 2, D, dtype=dtype), randn(5, 2, D, dtype=dtype), randn(2, D)
    assert error(modulate.gate_residual, ref_gate_residual, *inputs) <= TOLERANCE[dtype]


def test_gate_residual_adds_a_bf16_branch_to_an_fp32_stream():
    x, y, gate = randn(5, 2, 33), randn(5, 2, 33, dtype=bf16), randn(2, 33)
    assert torch.equal(modulate.gate_residual(x, y, gate), x + y.float() * gate)


# SwiGLU


@DTYPES
@pytest.mark.parametrize("width", [1, 33, 130])
def test_swiglu_equals_fp64(dtype, width):
    assert error(swiglu.swiglu, ref_swiglu, randn(3, 5, 2 * width, dtype=dtype)) <= TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("width", [1, 33, 130])
def test_swiglu_of_two_inputs_equals_fp64(dtype, width):
    inputs = sliced(3, 5, width).to(dtype), randn(3, 5, width, dtype=dtype)
    assert error(swiglu.swiglu, ref_swiglu_of_two, *inputs) <= TOLERANCE[dtype]


@pytest.mark.filterwarnings("ignore:overflow")  # exp(1e4) is inf, and 1 / inf is the right sigmoid
def test_swiglu_of_large_gates_is_finite():
    x = torch.tensor([[1e4, -1e4, 2.0, 3.0]]).requires_grad_()  # gates 1e4 and -1e4
    y = swiglu.swiglu(x)
    assert y.tolist() == [[2e4, 0.0]]
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [[2.0, 0.0, 1e4, 0.0]]


# Rotary


def tables(L, B, E):
    """Returns rope (interleaved form), cos and sin (half form). Their halves differ: no kernel may assume equal
    ones."""
    angle = randn(L, B, 1, E)
    return torch.stack([angle.cos(), angle.sin()], dim=-1)[..., : E // 2, :], angle.cos(), angle.sin()


@DTYPES
@pytest.mark.parametrize("L, B, H, E", [(5, 2, 3, 16), (3, 1, 5, 22), (2, 2, 1, 2), (2, 3, 40, 128)])
@pytest.mark.parametrize("per_token, per_sample", [(True, False), (True, True), (False, False)])
def test_rotary_equals_fp64(dtype, L, B, H, E, per_token, per_sample):
    rope, cos, sin = tables(L if per_token else 1, B if per_sample else 1, E)
    x = randn(L, B, H, E, dtype=dtype)
    for ours, reference, args in (
        (rotary.rotary_interleaved, ref_rotary_interleaved, (rope,)),
        (rotary.rotary_half, ref_rotary_half, (cos, sin)),
    ):
        assert error(lambda x: ours(x, *args), lambda x: reference(x, *args), x) <= TOLERANCE[dtype]  # noqa: B023


@pytest.mark.parametrize(
    "ours, reference, which",
    [
        (rotary.rotary_interleaved, ref_rotary_interleaved, slice(0, 1)),
        (rotary.rotary_half, ref_rotary_half, slice(1, 3)),
    ],
)
def test_rotary_in_place_turns_a_slice_of_fused_qkv_and_nothing_else(ours, reference, which):
    args, leaf, dout = tables(5, 2, 16)[which], randn(5, 2, 9, 16).requires_grad_(), randn(5, 2, 9, 16)

    fused = leaf * 1
    q = fused[:, :, 2:5]
    version = q._version
    assert ours(q, *args, inplace=True).data_ptr() == q.data_ptr()
    assert q._version > version
    (dleaf,) = torch.autograd.grad(fused, leaf, dout)

    wide = leaf.detach().double().requires_grad_()
    expected = torch.cat([wide[:, :, :2], reference(wide[:, :, 2:5], *args), wide[:, :, 5:]], dim=2)
    (dwide,) = torch.autograd.grad(expected, wide, dout.double())
    assert (fused - expected).abs().max() <= 1e-5 and (dleaf - dwide).abs().max() <= 1e-5


def test_rotary_keeps_no_activation_for_the_backward():
    rope, cos, sin = tables(4, 1, 16)
    x, saved = randn(4, 2, 3, 16).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        rotary.rotary_interleaved(x, rope), rotary.rotary_half(x, cos, sin)
    assert saved == [rope.data_ptr(), cos.data_ptr(), sin.data_ptr()]


@DTYPES
@pytest.mark.parametrize("L, B, H, E", [(5, 2, 3, 16), (3, 1, 5, 22), (2, 2, 1, 2), (2, 3, 40, 128)])
@pytest.mark.parametrize("per_token, per_sample", [(True, False), (True, True), (False, False)])
def test_norm_and_rotary_in_one_kernel_equal_fp64(dtype, L, B, H, E, per_token, per_sample):
    """x is a slice of a fused qkv, as the model's may be."""
    _, cos, sin = tables(L if per_token else 1, B if per_sample else 1, E)
    x, weight = randn(L, B, 3 * H, E, dtype=dtype)[:, :, H : 2 * H], randn(E, dtype=dtype)
    ours, reference = (lambda x, w, f=f: f(x, w, cos, sin) for f in (our_norm_rotary_half, ref_norm_rotary_half))
    assert error(ours, reference, x, weight) <= TOLERANCE[dtype]


def test_norm_and_rotary_keep_the_input_and_one_number_a_head_for_the_backward():
    x, weight, (_, cos, sin), saved = randn(4, 2, 3, 16).requires_grad_(), randn(16), tables(4, 1, 16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        our_norm_rotary_half(x, weight, cos, sin)
    assert [t.data_ptr() for t in saved[:4]] == [t.data_ptr() for t in (x, weight, cos, sin)]
    assert [(t.shape, t.dtype) for t in saved[4:]] == [((4, 2, 3), fp32)]


# All of them


CASES = {
    "rms_norm": (our_rms_norm, ref_rms_norm, [(21, 22), (22,)]),
    "add_rms_norm": (our_add_rms_norm, ref_add_rms_norm, [(3, 7, 22), (3, 7, 22), (22,)]),
    "layer_norm_modulate": (our_layer_norm_modulate, ref_layer_norm_modulate, [(13, 2, 22), (2, 22), (2, 22)]),
    "gate_residual": (modulate.gate_residual, ref_gate_residual, [(13, 2, 22), (13, 2, 22), (2, 22)]),
    "swiglu": (swiglu.swiglu, ref_swiglu, [(21, 22)]),
    "swiglu of two": (swiglu.swiglu, ref_swiglu_of_two, [(21, 22), (21, 22)]),
    "rotary_interleaved": (rotary.rotary_interleaved, ref_rotary_interleaved, [(7, 2, 5, 22), (7, 1, 1, 11, 2)]),
    "rotary_half": (rotary.rotary_half, ref_rotary_half, [(7, 2, 5, 22), (7, 1, 1, 22), (7, 1, 1, 22)]),
    "norm_rotary_half": (
        our_norm_rotary_half,
        ref_norm_rotary_half,
        [(7, 2, 5, 22), (22,), (7, 1, 1, 22), (7, 1, 1, 22)],
    ),
}
GRADIENTS = {"rotary_interleaved": 1, "rotary_half": 1, "norm_rotary_half": 2}  # the tables of a rotation get none
EVERY = pytest.mark.parametrize("name", CASES)


def case(name, make=randn):
    """Returns (ours, reference, inputs that get gradients). The functions of a rotation have its tables bound in."""
    ours, reference, shapes = CASES[name]
    inputs = [make(*shape) for shape in shapes]
    differentiable = inputs[: GRADIENTS.get(name)]
    args = inputs[len(differentiable) :]
    return lambda *xs: ours(*xs, *args), lambda *xs: reference(*xs, *args), differentiable


@EVERY
@pytest.mark.parametrize("make", [strided, sliced])
def test_strided_inputs_equal_fp64(name, make):
    ours, reference, inputs = case(name, make)
    assert error(ours, reference, *inputs) <= TOLERANCE[fp32]


@EVERY
def test_programs_that_stride_over_rows_and_columns_equal_fp64(name, tiny_tiles):
    ours, reference, inputs = case(name)
    assert error(ours, reference, *inputs) <= TOLERANCE[fp32]


@EVERY
def test_no_rows_give_no_rows_and_zero_gradients(name):
    rows = CASES[name][2][0][0]
    inputs = [randn(*((0, *s[1:]) if s[0] == rows else s)).requires_grad_() for s in CASES[name][2]]
    out = CASES[name][0](*inputs)
    out = out if isinstance(out, tuple) else (out,)
    assert all(y.shape[0] == 0 for y in out)
    differentiable = inputs[: GRADIENTS.get(name)]
    grads = torch.autograd.grad(out, differentiable, [torch.empty_like(y) for y in out])
    assert [g.shape for g in grads] == [t.shape for t in differentiable] and not any(g.any() for g in grads)


PLANTED = {
    "rms_norm": lambda x, w: ref_rms_norm(x, w.flip(0)),
    "add_rms_norm": lambda x, r, w: (ref_rms_norm(x + r, w), x - r),
    "layer_norm_modulate": lambda x, scale, shift: ref_layer_norm_modulate(x, shift, scale),
    "gate_residual": lambda x, y, gate: ref_gate_residual(y, x, gate),
    "swiglu": lambda x: ref_swiglu(x.roll(x.shape[-1] // 2, -1)),
    "swiglu of two": lambda a, b: ref_swiglu_of_two(b, a),
    "rotary_interleaved": lambda x, rope: ref_rotary_interleaved(x, rope.flip(-1)),
    "rotary_half": lambda x, cos, sin: ref_rotary_half(x, cos, -sin),
    "norm_rotary_half": lambda x, w, cos, sin: ref_rms_norm(ref_rotary_half(x, cos, sin), w),
}


@EVERY
def test_a_swapped_argument_is_far_beyond_tolerance(name, monkeypatch):
    monkeypatch.setitem(CASES, name, (CASES[name][0], PLANTED[name], CASES[name][2]))
    ours, wrong, inputs = case(name)
    assert error(ours, wrong, *inputs) > 1000 * TOLERANCE[fp32]


@EVERY
def test_fp64_inputs_are_refused(name):
    inputs = [randn(*shape).double() for shape in CASES[name][2]]
    with pytest.raises(ValueError, match="torch.float64.*expected"):
        CASES[name][0](*inputs)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: our_rms_norm(randn(3, 8), randn(7)), r"weight is \[7\], x \[3, 8\]"),
        (lambda: our_add_rms_norm(randn(3, 8), randn(4, 8), randn(8)), r"\[4, 8\]; expected x's .*\[3, 8\]"),
        (lambda: our_add_rms_norm(randn(3, 8), randn(3, 8, dtype=bf16), randn(8)), "bfloat16.*expected x's .*float32"),
        (lambda: our_layer_norm_modulate(randn(3, 8), randn(3, 8), randn(3, 8)), r"\[3, 8\]; expected .*\[L, B, D\]"),
        (lambda: our_layer_norm_modulate(randn(3, 2, 8), randn(2, 8), randn(1, 8)), r"shift .*\[1, 8\].*\[3, 2, 8\]"),
        (lambda: our_layer_norm_modulate(randn(3, 2, 8), randn(2, 8, dtype=bf16), randn(2, 8)), "scale .*bfloat16"),
        (lambda: modulate.gate_residual(randn(3, 2, 8), randn(4, 2, 8), randn(2, 8)), r"\[4, 2, 8\], x \[3, 2, 8\]"),
        (lambda: swiglu.swiglu(randn(3, 7)), r"\[3, 7\]; expected .*even"),
        (lambda: swiglu.swiglu(randn(3, 8), randn(1, 8)), r"up is .*\[1, 8\]; expected x's .*\[3, 8\]"),
        (lambda: swiglu.swiglu(randn(3, 8), randn(3, 8, dtype=bf16)), "up is .*bfloat16.*expected x's .*float32"),
        (lambda: rotary.rotary_interleaved(randn(3, 2, 4, 7), randn(3, 1, 1, 3, 2)), r"\[3, 2, 4, 7\].*E even"),
        (lambda: rotary.rotary_interleaved(randn(3, 2, 4, 8), randn(2, 1, 1, 4, 2)), r"rope .*\[2, .*x \[3, 2, 4, 8\]"),
        (lambda: rotary.rotary_half(randn(3, 2, 4, 8), randn(3, 1, 1, 8), randn(3, 1, 1, 4)), r"sin .*\[3, 1, 1, 4\]"),
        (
            lambda: rotary.rotary_interleaved(strided(3, 2, 4, 8), randn(3, 1, 1, 4, 2), True),
            "strides.*expected 1 last",
        ),
        (lambda: rotary.rotary_half(randn(3, 2, 4, 8), randn(3, 1, 1, 8), randn(1, 1, 1, 8)), r"\[1, .*cos \[3, "),
        (lambda: our_norm_rotary_half(randn(3, 2, 4, 7), randn(7), *2 * [randn(3, 1, 1, 7)]), r"4, 7\].*E even"),
        (
            lambda: our_norm_rotary_half(randn(3, 2, 4, 8), randn(4), *2 * [randn(3, 1, 1, 8)]),
            r"weight is \[4\], x \[3",
        ),
        (lambda: our_norm_rotary_half(randn(3, 2, 4, 8), randn(8), *2 * [randn(2, 1, 1, 8)]), r"cos .*\[2, .*x \[3"),
        (
            lambda: our_norm_rotary_half(randn(3, 2, 4, 8), randn(8), randn(3, 1, 1, 8), randn(1, 1, 1, 8)),
            r"sin is \[1, .*cos \[3, ",
        ),
    ],
)
def test_wrong_shapes_and_dtypes_are_refused_naming_both_sides(call, said):
    with pytest.raises(ValueError, match=said):
        call()


# The compiler


class NoGPU:
    """The part of a Triton driver that compiling needs."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_for_hopper():
    """Calls every function, forward and backward. Launches stop at the machine code. Prints the kernels' names."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    def compile_only(self, *args, grid, warmup, **kwargs):
        assert launch(self, *args, grid=grid, warmup=True, **kwargs).asm["cubin"]
        print(f"{self.__module__}.{self.__name__}")

    launch, JITFunction.run = JITFunction.run, compile_only
    driver.set_active(NoGPU())
    for ours, _, shapes in CASES.values():
        out = ours(*[randn(*shape).requires_grad_() for shape in shapes])
        torch.autograd.backward(
            out, [torch.empty_like(y) for y in out] if isinstance(out, tuple) else torch.empty_like(out)
        )


def test_every_kernel_compiles_for_hopper(tmp_path):
    """The interpreter accepts what the compiler refuses. The test compiles in a process that interprets nothing."""
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    modules = rms_norm, modulate, swiglu, rotary, norm_rotary
    kernels = {f"{m.__name__}.{name}" for m in modules for name in vars(m) if name.endswith("_kernel")}
    assert set(result.stdout.split()) == kernels


if __name__ == "__main__":
    compile_for_hopper()
