"""The cases of `common.ops` and their self-test. `python -m common.ops` runs it, with the speed table of ops_speed.py.

A case is an op, inputs that exercise it (unequal dimensions, ragged blocks) and the same computation in plain torch.
The self-test runs both forward and backward, the plain one in fp64. The tests run the same cases over the npu contract
and in Triton's interpreter.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from common import ops

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative to the largest entry; bf16 keeps 8 bits
HALF = (torch.bfloat16,)
SMALL = dict(L=37, S=41, B=2, H=4, K=2, E=16, D=48, F=40, N=29, G=5, TOP=3, V=101, BLOCK=16)


class Draw:
    """Draws the random inputs of a case. Floats have the dtype under test; `wide` draws those that are always fp32.

    They are drawn on the host, the same on every device, or if `drawn_on` is given, on that device: at full size the
    host would take longer than the measurement.
    """

    def __init__(
        self, sizes: dict[str, int], dtype: torch.dtype, where: torch.device, drawn_on: torch.device | None = None
    ):
        self.__dict__.update(sizes)
        self.dtype, self.where = dtype, where
        self.generator = torch.Generator(drawn_on or torch.device("cpu")).manual_seed(0)
        self.source = {"generator": self.generator, "device": self.generator.device}

    def floats(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        drawn = torch.randn(shape, **self.source) / (shape[-1] ** 0.25)
        return drawn.to(self.where, dtype or self.dtype).requires_grad_()

    def weight(self, *shape: int) -> torch.Tensor:
        """Draws a weight with the fp32 buffer that megatron-core's DDP would give it, see `ops.linear`."""
        weight = self.floats(*shape)
        weight.main_grad = torch.zeros(shape, device=self.where)
        weight.grad_added_to_main_grad = False
        return weight

    def wide(self, *shape: int) -> torch.Tensor:
        return self.floats(*shape, dtype=torch.float32)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, **self.source).to(self.where)

    def angles(self, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        angles = 6 * torch.rand(shape, **self.source)
        return angles.cos().to(self.where), angles.sin().to(self.where)


@dataclass(frozen=True)
class Case:
    """An op, its inputs, its reference and its work.

    make(draw): returns the arguments by name. backends: device -> what the op runs on. dtypes: those that every device
    takes. fixed: sizes that a device's constraints dictate. compiles: whether the speed table has a time of `plain` under
    torch.compile.

    The work of forward and backward together is either of the following, and without both it is not stated.
    traffic: bytes that memory must read or write, in bytes of the first input; vectors and angles are not counted.
    flops(inputs): FLOPs of the matmuls; what is computed twice to save memory counts once.
    """

    make: Callable[[Draw], dict]
    op: Callable
    plain: Callable
    backends: dict[str, str]
    dtypes: tuple = (torch.float32, torch.bfloat16)
    fixed: dict = field(default_factory=dict)
    compiles: bool = True
    traffic: float | None = None
    flops: Callable[[dict], int] | None = None


# ---------------------------------------------------------------------------------------------------- plain references


def plain_attention(q, k, v, causal=False, window=None, bounds=None, blocks=None, block=0, scale=None):
    (L, _, H, E), S = q.shape, k.shape[0]
    k, v = (t.repeat_interleave(H // t.shape[2], 2) for t in (k, v))
    scores = torch.einsum("lbhe,sbhe->bhls", q, k) * (E**-0.5 if scale is None else scale)
    i, j = torch.arange(L, device=q.device)[:, None] + S - L, torch.arange(S, device=q.device)[None]
    seen = torch.ones(L, S, dtype=torch.bool, device=q.device)
    if causal:
        seen &= j <= i
    if window is not None:
        seen &= (j >= i - window[0]) & ((j <= i + window[1]) if window[1] >= 0 else seen)
    if bounds is not None:
        owner = torch.bucketize(torch.arange(L), torch.tensor(bounds.on_host[1:]), right=True).to(q.device)
        seen &= owner[:, None] == owner[None]
    if blocks is not None:
        seen = blocks[:, :, i // block, j // block] if L == S else None
    probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
    return torch.einsum("bhls,sbhv->lbhv", probabilities, v)


def plain_rms_norm(x, weight, eps):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def plain_rotary_interleaved(x, rope):
    first, second, cos, sin = x[..., ::2], x[..., 1::2], rope[..., 0], rope[..., 1]
    return torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2)


def plain_rotary_half(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def plain_experts(tokens, experts, probs, weight):
    """Sums each token's expert outputs, weighted by probs: what permute, grouped matmul and unpermute do together."""
    out = tokens.new_zeros(len(tokens), weight.shape[2])
    for g, matrix in enumerate(weight):
        n, k = (experts == g).nonzero(as_tuple=True)
        out = out.index_add(0, n, probs[n, k, None] * (tokens[n] @ matrix))
    return out


def experts(tokens, experts, probs, weight):
    rows, position = ops.token_permute(tokens, experts)
    counts = F.one_hot(experts.flatten(), len(weight)).sum(0)
    return ops.token_unpermute(ops.grouped_matmul(rows, weight, counts.cumsum(0)), position, probs)


def plain_grouped_matmul(x, weight, ends):
    groups = itertools.pairwise([0, *ends.tolist()])
    return torch.cat([x[start:end] @ matrix for (start, end), matrix in zip(groups, weight, strict=True)])


def plain_linear_cross_entropy(hidden, weight, labels, token_weight):
    losses = F.cross_entropy(hidden @ weight.t(), labels, ignore_index=-100, reduction="none")
    return losses.to(token_weight.dtype) @ token_weight, losses.detach()


def plain_linear_log_probs(hidden, weight, labels):
    return -F.cross_entropy(hidden @ weight.t(), labels, ignore_index=-100, reduction="none")


# --------------------------------------------------------------------------------------------------------------- cases


def qkv(d: Draw, **options) -> dict:
    return (
        dict(q=d.floats(d.L, d.B, d.H, d.E), k=d.floats(d.L, d.B, d.K, d.E), v=d.floats(d.L, d.B, d.K, d.E)) | options
    )


def packed(d: Draw) -> dict:
    return qkv(d, causal=True, bounds=ops.pack_bounds([0, d.L // 3, d.L // 2, d.L], d.where))


def narrow(d: Draw, **options) -> dict:
    """Values of two thirds of the keys' width, as in latent attention (at full size 192 and 128), and a scale."""
    keys = d.E * 3 // 2
    drawn = dict(q=d.floats(d.L, d.B, d.H, keys), k=d.floats(d.L, d.B, d.H, keys), v=d.floats(d.L, d.B, d.H, d.E))
    return drawn | dict(causal=True, scale=1.5 * keys**-0.5) | options


def block_sparse(d: Draw) -> dict:
    inputs = qkv(d, block=d.BLOCK)
    return inputs | {"blocks": ops.select_blocks(inputs["q"], inputs["k"], 0.4, d.BLOCK, always_keys=d.BLOCK)}


def interleaved(d: Draw) -> dict:
    return dict(x=d.floats(d.L, d.B, d.H, d.E), rope=torch.stack(d.angles(d.L, 1, 1, d.E // 2), -1))


def halves(d: Draw) -> dict:  # every sample has its own angles, as in mrope
    cos, sin = (torch.cat((t, t), -1) for t in d.angles(d.L, d.B, 1, d.E // 2))
    return dict(x=d.floats(d.L, d.B, d.H, d.E), cos=cos, sin=sin)


def labelled(d: Draw) -> dict:
    labels = d.integers(d.V, d.N)
    labels[::7] = -100
    return dict(hidden=d.floats(d.N, d.D), weight=d.floats(d.V, d.D), labels=labels, token_weight=d.wide(d.N).detach())


def normed_halves(d: Draw) -> dict:  # x is a view of a wider projection, as q is of a fused qkv
    tables = halves(d)
    return tables | dict(x=d.floats(d.L, d.B, d.H + d.K, d.E)[:, :, : d.H], weight=d.floats(d.E), eps=1e-6)


def unweighted(d: Draw) -> dict:
    return {name: t for name, t in labelled(d).items() if name != "token_weight"}


def weighted_matmul(d: Draw) -> dict:
    return dict(x=d.floats(d.N, d.D), weight=d.weight(d.F, d.D))


def weighted_groups(d: Draw) -> dict:
    """Groups of equal size but for the last, which is empty, and the one before it."""
    ends = torch.arange(1, d.G + 1, device=d.where).mul_(d.N * d.TOP // d.G)
    ends[-2:] = d.N * d.TOP
    return dict(x=d.floats(d.N * d.TOP, d.D), weight=d.weight(d.G, d.D, d.F), ends=ends)


def accumulating(op: Callable, switch: bool) -> Callable:
    """Returns the op with its weight gradients added to main_grad inside the matmul, or if not `switch`, after it."""

    def run(**inputs):
        before = ops.ACCUMULATE, ops.ACCUMULATE_EXPERTS
        ops.ACCUMULATE = ops.ACCUMULATE_EXPERTS = switch
        try:
            return op(**inputs)
        finally:
            ops.ACCUMULATE, ops.ACCUMULATE_EXPERTS = before

    return run


def visible_pairs(q, k, v, causal=False, window=None, bounds=None, blocks=None, block=0, scale=None) -> int:
    """Counts the pairs of query and key, in all heads, that attention multiplies."""
    L, S = len(q), len(k)
    if blocks is not None:
        rows, columns = (torch.full((-(-n // block),), block).to(q.device) for n in (L, S))
        rows[-1] -= -L % block
        columns[-1] -= -S % block
        return int((blocks * rows[:, None] * columns).sum())
    left, right = window or (-1, -1)
    pairs = 0
    for start, end in itertools.pairwise([0, L] if bounds is None else bounds.on_host):
        length, keys = end - start, S if bounds is None else end - start
        last = torch.arange(length) + keys - length  # the key at the place of each query
        first = (last - left).clamp(min=0) if left >= 0 else torch.zeros_like(last)
        end_key = last if causal else last + right if right >= 0 else torch.full_like(last, keys - 1)
        pairs += int((end_key.clamp(max=keys - 1) - first + 1).clamp(min=0).sum())
    return pairs * q.shape[1] * q.shape[2]


def attention_flops(inputs: dict) -> int:
    """Two matmuls forward and five backward, as FlashAttention's authors count (arXiv:2307.08691): four of the width of
    queries and keys, three of that of values."""
    return 2 * (4 * inputs["q"].shape[3] + 3 * inputs["v"].shape[3]) * visible_pairs(**inputs)


def matmul_flops(x: str, weight: str, outputs: int) -> Callable[[dict], int]:
    """Counts one matmul forward and two backward, of the input x and a weight whose dimension `outputs` is that of y."""
    return lambda inputs: 3 * 2 * inputs[x].numel() * inputs[weight].shape[outputs]


def expert_flops(inputs: dict) -> int:
    return inputs["experts"].shape[1] * matmul_flops("tokens", "weight", 2)(inputs)


# Compiled or not, plain attention writes all scores, so a time of each of these cases under torch.compile says nothing.
ATTENTION = {"compiles": False, "flops": attention_flops}


def attention_case(make: Callable, cuda: str, **sizes: int) -> Case:
    backends = {"npu": "npu_fusion_attention", "cuda": cuda, "cpu": "torch SDPA"}
    return Case(
        make, lambda q, k, v, **o: ops.attention(q, k, v, **o), plain_attention, backends, fixed=sizes, **ATTENTION
    )


def on(npu: str, cuda: str, cpu: str = "plain torch") -> dict[str, str]:
    return {"npu": npu, "cuda": cuda, "cpu": cpu}


SDPA, VARLEN = "torch SDPA", "torch varlen_attn (fp32: torch SDPA)"
CASES = {
    "attention": attention_case(lambda d: qkv(d), SDPA),
    "attention, causal": attention_case(lambda d: qkv(d, causal=True), SDPA),
    "attention, keys before the queries": attention_case(
        lambda d: qkv(d, causal=True) | {x: d.floats(d.S, d.B, d.K, d.E) for x in "kv"}, VARLEN
    ),
    "attention, window": attention_case(lambda d: qkv(d, window=(d.L // 4, 3)), VARLEN),
    "attention, causal window": attention_case(lambda d: qkv(d, window=(d.L // 4, -1), causal=True), VARLEN),
    "attention, packed": attention_case(packed, VARLEN, B=1),
    "attention, narrow values": attention_case(narrow, SDPA),
    "attention, narrow values, packed": attention_case(
        lambda d: narrow(d, bounds=packed(d)["bounds"]), VARLEN, B=1
    ),
    "attention, block-sparse": Case(
        block_sparse, lambda q, k, v, blocks, block: ops.block_sparse_attention(q, k, v, blocks, block), plain_attention,
        on("npu_block_sparse_attention", "kernels/block_sparse_attention.py", SDPA), HALF,
        {"E": 128, "BLOCK": 128, "L": 400}, **ATTENTION,
    ),
    "rms_norm": Case(
        lambda d: dict(x=d.floats(d.L, d.B, d.D), weight=d.floats(d.D), eps=1e-6), ops.rms_norm, plain_rms_norm,
        on("npu_rms_norm", "torch rms_norm"), traffic=5,  # x, y; x, dy, dx
    ),
    "add_rms_norm": Case(
        lambda d: dict(x=d.floats(d.L, d.D), residual=d.floats(d.L, d.D), weight=d.floats(d.D), eps=1e-6),
        ops.add_rms_norm, lambda x, residual, weight, eps: (plain_rms_norm(x + residual, weight, eps), x + residual),
        on("npu_add_rms_norm", "kernels/rms_norm.py"), traffic=8,  # x, residual, both outputs; sum, both dy, dx
    ),
    "layer_norm": Case(
        lambda d: dict(x=d.floats(d.L, d.B, d.D), weight=d.floats(d.D), bias=d.floats(d.D), eps=1e-6), ops.layer_norm,
        lambda x, weight, bias, eps: F.layer_norm(x, weight.shape, weight, bias, eps),
        on("torch layer_norm", "torch layer_norm", "torch layer_norm"), traffic=5,
    ),
    "layer_norm_modulate": Case(
        lambda d: dict(x=d.floats(d.L, d.B, d.D), scale=d.wide(d.B, d.D), shift=d.wide(d.B, d.D), eps=1e-6),
        ops.layer_norm_modulate,
        lambda x, scale, shift, eps: F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift,
        on("torch layer_norm", "kernels/modulate.py", "torch layer_norm"), traffic=5,
    ),
    "gate_residual": Case(
        lambda d: dict(x=d.floats(d.L, d.B, d.D), y=d.floats(d.L, d.B, d.D), gate=d.wide(d.B, d.D)), ops.gate_residual,
        lambda x, y, gate: x + y * gate, on("torch addcmul", "kernels/modulate.py", "torch addcmul"),
        traffic=6,  # x, y, out; dout (which is dx), y, dy
    ),
    "swiglu": Case(
        lambda d: dict(x=d.floats(d.L, d.B, 2 * d.F)), ops.swiglu,
        lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], on("npu_swiglu", "kernels/swiglu.py"),
        traffic=4,  # x, half of x out; x, half of x in, dx
    ),
    "swiglu, two inputs": Case(
        lambda d: dict(x=d.floats(d.L, d.B, d.F), up=d.floats(d.L, d.B, d.F)), ops.swiglu,
        lambda x, up: F.silu(x) * up, on("npu_swiglu", "kernels/swiglu.py"), traffic=8,  # 2 in, 1 out; 3 in, 2 out
    ),
    "gelu_tanh": Case(
        lambda d: dict(x=d.floats(d.L, d.B, d.F)), ops.gelu_tanh,
        lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
        on("torch gelu", "torch gelu", "torch gelu"), traffic=5,
    ),
    "rotary_interleaved": Case(
        interleaved, lambda x, rope: ops.rotary_interleaved(x, rope), plain_rotary_interleaved,
        on("npu_rotary_mul", "kernels/rotary.py"), traffic=4,
    ),
    "rotary_half": Case(
        halves, lambda x, cos, sin: ops.rotary_half(x, cos, sin), plain_rotary_half,
        on("npu_rotary_mul", "kernels/rotary.py"), traffic=4,
    ),
    "norm_rotary_half": Case(
        normed_halves, lambda x, weight, cos, sin, eps: ops.norm_rotary_half(x, weight, cos, sin, eps),
        lambda x, weight, cos, sin, eps: plain_rotary_half(plain_rms_norm(x, weight, eps), cos, sin),
        on("npu_rms_norm, npu_rotary_mul", "kernels/norm_rotary.py"), traffic=5,  # x, y; x, dy, dx
    ),
    "permute, grouped matmul, unpermute": Case(
        lambda d: dict(
            tokens=d.floats(d.N, d.D), experts=d.integers(d.G - 1, d.N, d.TOP),  # the last group stays empty
            probs=d.floats(d.N, d.TOP), weight=d.floats(d.G, d.D, d.F),
        ),
        experts, plain_experts,
        on("npu_moe_token_permute, npu_grouped_matmul, npu_moe_token_unpermute",
           "kernels/moe_permute.py, torch grouped_mm (fp32: kernels/grouped_matmul.py)"),
        compiles=False, flops=expert_flops,
    ),
    **{
        f"grouped_matmul, gradient added {where}": Case(
            weighted_groups, accumulating(ops.grouped_matmul, where == "inside"), plain_grouped_matmul,
            on("npu_grouped_matmul" + ", npu_grouped_matmul_add_" * (where == "inside"),
               "kernels/grouped_matmul.py" if where == "inside" else "torch grouped_mm (fp32: kernels/grouped_matmul.py)"),
            compiles=False, flops=matmul_flops("x", "weight", 2),
        )
        for where in ("apart", "inside")
    },
    **{
        f"linear, gradient added {where}": Case(
            weighted_matmul, accumulating(ops.linear, where == "inside"), lambda x, weight: F.linear(x, weight),
            on("torch linear" + ", npu_grouped_matmul_add_" * (where == "inside"),
               "torch linear" + ", addmm into fp32" * (where == "inside"), "torch linear"),
            compiles=False, flops=matmul_flops("x", "weight", 0),
        )
        for where in ("apart", "inside")
    },
    "linear_cross_entropy": Case(
        labelled, ops.linear_cross_entropy, plain_linear_cross_entropy,
        on("npu_cross_entropy_loss, npu_grouped_matmul_add_", "kernels/linear_cross_entropy.py"), flops=matmul_flops("hidden", "weight", 0),
    ),
    "linear_log_probs": Case(
        unweighted, ops.linear_log_probs, plain_linear_log_probs,
        on("npu_cross_entropy_loss, npu_grouped_matmul_add_", "kernels/linear_cross_entropy.py"), flops=matmul_flops("hidden", "weight", 0),
    ),
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- run


def outputs_and_gradients(function: Callable, inputs: dict) -> tuple[list, dict[str, torch.Tensor]]:
    """Returns outputs, and gradients by input name for a fixed random direction of every differentiable output."""
    outputs = function(**inputs)
    outputs = [*outputs] if isinstance(outputs, tuple) else [outputs]
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(out.shape, generator=generator).to(out.device, out.dtype) for out in outputs]
    return outputs, gradients(outputs, directions, inputs)


def gradients(outputs: list, directions: list, inputs: dict) -> dict[str, torch.Tensor]:
    """Returns the gradients by input name. That of a weight with a main_grad is there, as megatron-core's DDP adds it."""
    leaves = {n: t for n, t in inputs.items() if torch.is_tensor(t) and t.requires_grad}
    pairs = [pair for pair in zip(outputs, directions, strict=True) if pair[0].requires_grad]
    roots, directions = zip(*pairs, strict=True)
    grads = dict(zip(leaves, torch.autograd.grad(roots, list(leaves.values()), directions), strict=True))
    for name, leaf in leaves.items():
        if hasattr(leaf, "main_grad"):
            if not leaf.grad_added_to_main_grad:
                leaf.main_grad.add_(grads[name])
            leaf.grad_added_to_main_grad = False
            grads[name] = leaf.main_grad
    return grads


def errors(case: Case, dtype: torch.dtype, where: torch.device, sizes: dict[str, int] = SMALL) -> dict[str, float]:
    """Returns, for each output and gradient, the largest difference from the plain fp64 reference, divided by the
    reference's largest entry."""
    draw = Draw(sizes | case.fixed, dtype, where)
    inputs = case.make(draw)
    exact = {n: exactly(t) if torch.is_tensor(t) else t for n, t in inputs.items()}
    outputs, grads = outputs_and_gradients(case.op, inputs)
    expected, expected_grads = outputs_and_gradients(case.plain, exact)

    def error(a: torch.Tensor, b: torch.Tensor) -> float:
        return ((a.cpu().double() - b).abs().max() / b.abs().max()).item()

    relative = {f"output {i}": error(a, b) for i, (a, b) in enumerate(zip(outputs, expected, strict=True))}
    return relative | {f"gradient of {n}": error(g, expected_grads[n]) for n, g in grads.items()}


def exactly(t: torch.Tensor) -> torch.Tensor:
    """Copies t to the host, where fp64 always exists, with floats as fp64."""
    return t.detach().cpu().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t.cpu()


def self_test(case: Case, where: torch.device) -> tuple[list[str], list[str]]:
    """Returns the largest error in fp32 and in bf16 as text ("-": not a dtype of this device), and what failed."""
    cells, failed = [], []
    for dtype, tolerance in TOLERANCE.items():
        if dtype not in case.dtypes and ops.BACKEND != "cpu":
            cells.append("-")
            continue
        worst = max(errors(case, dtype, where).values())
        cells.append(f"{worst:.1e}")
        if not worst <= tolerance:
            failed.append(f"{dtype}: {worst:.1e}, tolerance {tolerance}")
    return cells, failed
