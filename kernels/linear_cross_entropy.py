"""The two kernels of a linear cross entropy that is chunked over tokens and split over the vocabulary.

loss = lse - logits[label],  lse = log sum_c exp(logits[c]),  d loss / d logits[c] = exp(logits[c] - lse) - [c == label]

This is the whole algorithm; the caller runs its GEMMs, its collectives and the chunk loop. For each chunk of n tokens:
  1. logits = hidden @ weight^T, this rank's V columns of the vocabulary;
  2. `row_statistics`: peak = max_c logits, total = sum_c exp(logits - peak), target = logits[label], or 0 on the ranks
     whose shard lacks the label;
  3. over the ranks: top = max(peak), lse = top + log(sum(total exp(peak - top))), loss = lse - sum(target);
  4. `softmax_gradient_`: the logits are overwritten by their gradient; weight is the gradient of each token's loss (0
     for an ignored token);
  5. d hidden = logits @ weight (summed over the ranks), d weight += logits^T @ hidden.
The forward computes the gradient, so only one chunk of logits exists at a time: n V instead of tokens V elements. This
is the chunking of Liger-Kernel's fused linear cross entropy (arXiv 2410.10989). The maximum and the sum are taken in
one pass (Milakov and Gimelshein, arXiv 1805.02867).

Unusual: `row_statistics` loads the label's logit by its address and compares no column with the label. Logits may be
-inf (padded vocabulary), even a whole shard of them.

n V logits of s bytes: `row_statistics` reads n V s bytes, 4 FLOPs an element; `softmax_gradient_` reads and writes
them, 2 n V s bytes, 4 FLOPs an element.

The kernels keep to the subset that triton-ascend compiles too (no CUDA-only intrinsics, no inline assembly, no atomics,
power-of-two blocks, explicit masks). Their speed on a device is unmeasured; the tests run them in Triton's interpreter.
"""

import torch
import triton
import triton.language as tl

MAX_GRID = 65535  # programs in a launch on Ascend
MAX_BLOCK = 4096


def row_statistics(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits [n, V] fp32, bf16 or fp16; labels [n] int64, the local column, outside [0, V) if not in this shard
    -> three of fp32 [n]: peak = max(logits), total = sum exp(logits - peak), target = the label's logit or 0."""
    _check(logits, labels=labels)
    n, V = logits.shape
    peak, total, target = torch.empty(3, n, dtype=torch.float32, device=logits.device)
    if n:
        _statistics_kernel[(min(n, MAX_GRID),)](
            logits, labels.contiguous(), peak, total, target, n, V, *logits.stride(), BLOCK=_block(V)
        )
    return peak, total, target


def softmax_gradient_(
    logits: torch.Tensor, lse: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Sets logits to (exp(logits - lse) - [column == label]) weight, in place, and returns them. logits and labels as
    in `row_statistics`, lse and weight [n] fp32."""
    _check(logits, labels=labels, lse=lse, weight=weight)
    n, V = logits.shape
    if n and V:
        _gradient_kernel[(min(n, MAX_GRID),)](
            logits, lse.contiguous(), labels.contiguous(), weight.contiguous(), n, V, *logits.stride(), BLOCK=_block(V)
        )
    return logits


def _check(logits: torch.Tensor, **rows: torch.Tensor) -> None:
    if logits.dim() != 2 or logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"logits are {logits.dtype} {list(logits.shape)}; expected [n, V] in fp32, bf16 or fp16")
    for name, row in rows.items():
        dtype = torch.int64 if name == "labels" else torch.float32
        if row.shape != logits.shape[:1] or row.dtype != dtype:
            raise ValueError(
                f"{name} is {row.dtype} {list(row.shape)}; expected {dtype} [{logits.shape[0]}], one of each row of "
                f"logits {list(logits.shape)}"
            )


def _block(V: int) -> int:
    return min(MAX_BLOCK, triton.next_power_of_2(max(V, 1)))


@triton.jit
def _statistics_kernel(
    logits, labels, peaks, totals, targets, n, V, row_stride: tl.int64, column_stride, BLOCK: tl.constexpr
):
    for row in range(tl.program_id(0), n, tl.num_programs(0)):
        x_row = logits + row * row_stride  # int64: n V may pass 2^31
        peak = -float("inf")
        total = 0.0
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(x_row + columns * column_stride, mask=columns < V, other=-float("inf")).to(tl.float32)
            new_peak = tl.maximum(peak, tl.max(x, 0))
            base = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # -inf minus -inf is NaN
            total = total * tl.exp(peak - base) + tl.sum(tl.exp(x - base), 0)
            peak = new_peak
        label = tl.load(labels + row)
        here = (label >= 0) & (label < V)
        tl.store(peaks + row, peak)
        tl.store(totals + row, total)
        tl.store(targets + row, tl.load(x_row + label * column_stride, mask=here, other=0.0).to(tl.float32))


@triton.jit
def _gradient_kernel(logits, lses, labels, weights, n, V, row_stride: tl.int64, column_stride, BLOCK: tl.constexpr):
    for row in range(tl.program_id(0), n, tl.num_programs(0)):
        x_row = logits + row * row_stride
        lse, label, weight = tl.load(lses + row), tl.load(labels + row), tl.load(weights + row)
        label = tl.where((label >= 0) & (label < V), label, -1).to(tl.int32)  # not every unit compares int64 vectors
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(x_row + columns * column_stride, mask=columns < V, other=0.0).to(tl.float32)
            gradient = (tl.exp(x - lse) - tl.where(columns == label, 1.0, 0.0)) * weight
            tl.store(x_row + columns * column_stride, gradient.to(logits.dtype.element_ty), mask=columns < V)
