"""Decodes: reads the prompts of a batch, then one token of each sequence a step, with a key-value cache.

There are two ways, with the same tokens:

    decode_eagerly   the cache grows, and every operation is launched from Python. cpu, npu, and where ranks communicate
    Decoder          every tensor stays where it is, so a step is a CUDA graph: one launch instead of a thousand

A CUDA graph repeats kernels with the arguments that they had when it was captured. So what changes from step to step
(the tokens, their position, the cache) lies in tensors on the device, which a step itself updates. The cache has its
final length from the beginning. A step attends to its first `reach` places and hides those behind the position with a
mask. There is a graph for each reach, of which there are few (`reach_of`), so the work follows the length.

What may be captured launches the same kernels whatever the values, and the host waits for nothing in between
(`graph_obstacle`). Draws are not captured: `torch.multinomial` waits for the device. Such a step is a graph up to the
last states; the logits and the draw follow.

generate.py says what a model must have.
"""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import cli, device, ops, quantize
from common.language.options import InferOptions

# Not yet chosen by a clock on a GPU.
GRAPHS = True  # whether decode steps are captured on cuda
FUSED = True  # attention of a captured step: torch's fused kernel with a mask, or two matmuls and a softmax
SCORES = 2**26  # scores of latent attention in memory at once, 12 bytes each in bf16; one query may have more
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # cuDNN makes a plan per shape
SHORTEST = 256  # the smallest reach
LOOKS_BEHIND = device.KIND == "cuda"  # whether greedy steps are launched before the tokens of the last one are read

Generators = list[torch.Generator | None]


class Cache:
    """The keys [S, B, K, E] and values [S, B, K, V] of every layer so far, for B sequences of the same length."""

    def __init__(self, batch: int, length: int):
        self.batch, self.length, self.kept, self.used = batch, length, {}, 0

    def attend(
        self,
        layer: torch.nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor | int,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Stores k and v, and returns the attention of the n newest tokens to all tokens, [B*n, 1, H, V].

        q [B*n, 1, H, E], k [B*n, 1, K, E] and v [B*n, 1, K, V] hold the sequences end to end. scale: None is
        1/sqrt(E). If v is a number, the values are the first v numbers of each key, and only keys are kept: the latent
        cache of multi-head latent attention (arXiv:2405.04434, section 2.1), with K = 1 and the up-projections of keys
        and values absorbed by those of queries and outputs. See `attend_latent`.
        """
        new = [t.unflatten(0, (self.batch, -1)).squeeze(2).transpose(0, 1) for t in (q, k, v) if torch.is_tensor(t)]
        q, *new = new  # [n, B, H, E], [n, B, K, E], [n, B, K, V]
        if layer not in self.kept:
            self.kept[layer] = tuple(t.new_empty(self.length, *t.shape[1:]) for t in new)
        end = self.used + len(q)
        for all_tokens, newest in zip(self.kept[layer], new, strict=True):
            all_tokens[self.used : end] = newest
        kept = [t[:end] for t in self.kept[layer]]
        if isinstance(v, int):
            out = attend_latent(q.permute(1, 2, 0, 3), kept[0].permute(1, 2, 0, 3), v, scale).transpose(1, 2)
        else:
            out = ops.attention(q, *kept, causal=len(q) > 1, scale=scale)  # [n, B, H, V]; a single query sees all
            out = out.transpose(0, 1)
        return out.flatten(0, 1).unsqueeze(1)


class StaticCache:
    """The keys [B, K, length, E] and values [B, K, length, V] of every layer, for B sequences of the same length.

    The first call reads the prompts (`reach` is 0). Each later call has one token of each sequence, at the place
    `position` [1] on the device, and attends to the first `reach` places. `mask` [reach] is -inf behind the position.
    """

    def __init__(self, batch: int, length: int, where: torch.device, dtype: torch.dtype):
        self.batch, self.length, self.kept, self.reach = batch, length, {}, 0
        self.position = torch.zeros(1, dtype=torch.int64, device=where)
        self.places = torch.arange(length, device=where)
        self.zeros = torch.zeros(length, dtype=dtype, device=where)
        self.mask: torch.Tensor | None = None

    def advance(self) -> None:
        """Moves the position by one and makes the mask of this step."""
        self.position += 1
        self.mask = self.zeros[: self.reach].masked_fill(self.places[: self.reach] > self.position, -torch.inf)

    def attend(
        self,
        layer: torch.nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor | int,
        scale: float | None = None,
    ) -> torch.Tensor:
        """As `Cache.attend`."""
        new = [t.unflatten(0, (self.batch, -1)).squeeze(2).transpose(1, 2) for t in (q, k, v) if torch.is_tensor(t)]
        q, *new = new  # [B, H, n, E], [B, K, n, E], [B, K, n, V]
        if layer not in self.kept:  # zeros: what a mask hides is still multiplied, by 0, and must be finite
            self.kept[layer] = tuple(t.new_zeros(*t.shape[:2], self.length, t.shape[3]) for t in new)
        if not self.reach:
            for places, newest in zip(self.kept[layer], new, strict=True):
                places[:, :, : q.shape[2]] = newest
            if isinstance(v, int):
                return attend_latent(q, new[0], v, scale).transpose(1, 2).flatten(0, 1).unsqueeze(1)
            q, k, v = (t.permute(2, 0, 1, 3) for t in (q, *new))  # [n, B, H, E]
            out = ops.attention(q, k, v, causal=len(q) > 1, scale=scale)
            return out.transpose(0, 1).flatten(0, 1).unsqueeze(1)
        for places, newest in zip(self.kept[layer], new, strict=True):
            places.index_copy_(2, self.position, newest)
        # The H/K query heads of a key head are H/K queries, so no kernel need know of shared heads.
        q = q.squeeze(2).unflatten(1, (new[0].shape[1], -1))  # [B, K, H/K, E]
        kept = [t[:, :, : self.reach] for t in self.kept[layer]]
        if isinstance(v, int):
            out = attend_by_matmuls(q, kept[0], kept[0][..., :v], self.mask, scale)
        else:
            out = attend_masked(q, *kept, self.mask, scale)
        return out.flatten(1, 2).unsqueeze(1)


def held_bytes(cache: Cache | StaticCache) -> int:
    """Returns the bytes of all keys and values that a cache has room for, on this rank."""
    return sum(t.nbytes for kept in cache.kept.values() for t in kept)


def attend_masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Returns softmax(scale q k^T + mask) v: q [B, K, L, E], k [B, K, S, E], v [B, K, S, V], mask [S] in q's dtype."""
    if FUSED:
        with sdpa_kernel(KERNELS):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(*q.shape[:3], -1), scale=scale)
    return attend_by_matmuls(q, k, v, mask, scale)


def attend_by_matmuls(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """As `attend_masked`, by two matmuls and a softmax in fp32."""
    scores = (q @ k.mT).float() * (q.shape[3] ** -0.5 if scale is None else scale) + mask
    return scores.softmax(-1).to(v.dtype) @ v


def attend_latent(q: torch.Tensor, k: torch.Tensor, width: int, scale: float | None = None) -> torch.Tensor:
    """Returns causal attention of the n newest of S tokens whose values are the first `width` numbers of the keys:
    q [B, H, n, E], k [B, K, S, E] -> [B, H, n, width].

    No fused kernel takes E = 576, so it is two matmuls and a softmax, for as many queries at a time as SCORES allows.
    With K = 1 the heads of a query are rows of one matmul. Reading n tokens costs E + width = 1088 multiplications a pair
    and head, 3.4 times those of the keys and values that are not absorbed (192 + 128).
    """
    (B, H, n), (K, S) = q.shape[:3], k.shape[1:3]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    parts, end = [], S - n
    for rows in q.unflatten(1, (K, -1)).split(max(1, SCORES // (B * H * S)), 3):  # [B, K, H/K, r, E]
        heads, r = rows.shape[2:4]
        end += r
        scores = (rows.flatten(2, 3) @ k[:, :, :end].mT).float() * scale  # [B, K, H/K * r, end]
        scores.unflatten(2, (heads, r)).masked_fill_(~ops.visible(r, end, (-1, 0), q.device), -torch.inf)
        out = scores.softmax(-1).to(k.dtype) @ k[:, :, :end, :width]
        parts.append(out.unflatten(2, (heads, r)))
    return torch.cat(parts, 3).flatten(1, 2)


def reach_of(length: int, most: int) -> int:
    """Returns how many places a step attends to whose sequences have this length: at most a quarter more, or less than
    SHORTEST more, so that few graphs serve many lengths. most: the cache's length."""
    step = max(SHORTEST, 2 ** (length.bit_length() - 3))
    return min(-(-length // step) * step, most)


def graph_obstacle(model) -> str:
    """Returns why a decode step of this model is not captured as a CUDA graph, or "" if it is."""
    c = model.config
    if device.KIND != "cuda":
        return f"{device.KIND} has none"
    if c.tensor_model_parallel_size > 1 or c.pipeline_model_parallel_size > 1:
        return f"its ranks communicate (tp={c.tensor_model_parallel_size}, pp={c.pipeline_model_parallel_size})"
    if c.expert_model_parallel_size > 1:
        return f"the host reads how many tokens go to each rank's experts (ep={c.expert_model_parallel_size})"
    if c.num_moe_experts and torch.cuda.get_device_capability()[0] not in (9, 10):
        return "torch's grouped matmul reads the groups on the host, except on Hopper and Blackwell (sm_90, sm_100)"
    if quantize.is_packed(model):
        return "unpacking 4-bit weights was never captured"
    return "" if GRAPHS else "GRAPHS is off"


@functools.cache
def announce(obstacle: str) -> None:
    """Says on rank 0, once, how decode steps run on cuda."""
    if device.KIND == "cuda" and dist.get_rank() == 0:
        cli.say(f"decode steps are {f'no CUDA graphs: {obstacle}' if obstacle else 'CUDA graphs'}")


def capture(step: Callable[[], None], side: torch.cuda.Stream, pool) -> Callable[[], None]:
    """Runs a step, and returns a function that repeats it by a CUDA graph.

    The first, plain run compiles kernels and makes the libraries' workspaces, which a capture may not. It is on the
    stream of the capture, because workspaces belong to a stream. The capture itself runs nothing. The graphs of one
    pool share the memory of their intermediate tensors, so none may be read after another graph ran. Raises
    RuntimeError if the step waits for the device.
    """
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on meanwhile: data loaders, NCCL's watchdog.
    with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
        step()
    return graph.replay


class Decoder:
    """Decodes B sequences at a time on tensors that stay where they are. It may serve batch after batch.

    tokens [B]: the newest token of each sequence, at `cache.position` + 1, not read yet
    states [B, 1, D]: the last stage's states of the token at `cache.position`
    chosen [B]: `tokens`, but -1 where logits are not finite
    given [length + 1, B]: the prompts' token at each place, -1 after a prompt
    """

    def __init__(self, model, batch: int, length: int):
        self.model, self.batch = model, batch
        where, dtype = next(model.parameters()).device, model.config.params_dtype
        length = -(-length // 64) * 64  # aligned, as fused kernels want the mask
        self.cache = StaticCache(batch, length, where, dtype)
        self.tokens, self.chosen = (torch.zeros(batch, dtype=torch.int64, device=where) for _ in range(2))
        self.given = torch.full((length + 1, batch), -1, dtype=torch.int64, device=where)
        self.states = torch.zeros(batch, 1, model.hidden_size, dtype=dtype, device=where)
        self.replays: dict[tuple[int, bool], Callable[[], None]] = {}  # by reach, and whether the step is greedy
        self.side, self.pool = None, None  # of the captures

    def forward(self) -> None:
        """Reads `tokens` and updates the cache and `states`."""
        self.cache.advance()
        self.states.copy_(run_stages(self.model, self.tokens, self.cache.position.expand(self.batch), self.cache))

    def settle(self, o: InferOptions, generators: Generators) -> None:
        """Chooses the next tokens from `states`: updates `chosen` and `tokens`."""
        given = self.given.index_select(0, self.cache.position + 1)[0]
        self.chosen.copy_(next_tokens(self.model, self.states[:, 0], given, o, generators))
        torch.clamp(self.chosen, min=0, out=self.tokens)  # an embedding has no row -1

    def repeat(self, step: Callable[[], None], greedy: bool) -> None:
        """Runs a step by the graph of its reach, which the first such step captures."""
        key = self.cache.reach, greedy
        if key in self.replays:
            self.replays[key]()
        else:
            if self.side is None:
                self.side, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            self.replays[key] = capture(step, self.side, self.pool)

    def decode(self, prompts: list[list[int]], o: InferOptions, generators: Generators) -> Iterator[torch.Tensor]:
        """Yields the same tokens as `decode_eagerly`, always in the tensor `chosen`, which the next step overwrites."""
        shortest, longest = min(map(len, prompts)), max(map(len, prompts))
        padded = torch.tensor(
            [p + [-1] * (longest - len(p)) for p in prompts], device=self.given.device
        )  # [B, longest]
        self.given.fill_(-1)[:longest].copy_(padded.t())
        self.cache.position.fill_(shortest - 1)
        self.cache.reach, greedy = 0, o.temperature == 0
        positions = torch.arange(shortest, device=padded.device).repeat(self.batch)
        states = run_stages(self.model, padded[:, :shortest].flatten(), positions, self.cache)
        self.states.copy_(states.view(self.batch, shortest, -1)[:, -1:])
        self.settle(o, drawing(generators, prompts, shortest))

        def greedy_step() -> None:
            self.forward()
            self.settle(o, generators)

        try:
            yield self.chosen
            for length in range(shortest + 1, longest + o.max_new_tokens):
                self.cache.reach = reach_of(length, self.cache.length)
                self.repeat(greedy_step if greedy else self.forward, greedy)
                if not greedy:
                    self.settle(o, drawing(generators, prompts, length))
                yield self.chosen
        finally:
            device.synchronize()  # no graph is freed while it runs


def fitting(kept: list[Decoder], model, batch: int, length: int) -> Decoder:
    """Returns a decoder of this model for this batch and at least this length: the one that is kept, or a new one, which
    is kept instead."""
    if not kept or kept[0].model is not model or kept[0].batch != batch or kept[0].cache.length < length:
        kept.clear()  # its memory is free before the next is made
        kept.append(Decoder(model, batch, length))
    return kept[0]


def decode_eagerly(model, prompts: list[list[int]], o: InferOptions, generators: Generators) -> Iterator[torch.Tensor]:
    """Yields the token that follows each sequence, int64 [B], until the longest prompt has o.max_new_tokens more. It is
    the prompt's own while the rest of a prompt is read, and -1 where logits are not finite."""
    where = next(model.parameters()).device
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    cache = Cache(len(prompts), longest + o.max_new_tokens)
    tokens = torch.tensor([p[:shortest] for p in prompts], device=where)  # [B, n]
    rest = [p[shortest:] + [-1] * (longest - len(p)) for p in prompts]
    rest = torch.tensor(rest, dtype=torch.int64, device=where)  # [B, longest - shortest], -1 after a prompt
    for length in range(shortest, longest + o.max_new_tokens):
        n = tokens.shape[1]
        positions = torch.arange(cache.used, cache.used + n, device=where).repeat(len(prompts))
        states = run_stages(model, tokens.flatten(), positions, cache)
        cache.used += n
        given = rest[:, length - shortest] if length < longest else None
        states = states.view(len(prompts), n, -1)[:, -1]
        chosen = next_tokens(model, states, given, o, drawing(generators, prompts, length))
        yield chosen
        tokens = (chosen.clamp(min=0) if LOOKS_BEHIND else chosen).unsqueeze(1)


def drawing(generators: Generators, prompts: list[list[int]], length: int) -> Generators:
    """Returns the generators of the sequences whose prompt has been read. The others draw nothing, so the draws of an
    answer are the same in any batch."""
    return [g if len(p) <= length else None for g, p in zip(generators, prompts, strict=True)]


def read_tokens(steps: Iterator[torch.Tensor], looks_behind: bool) -> Iterator[list[int]]:
    """Yields the tokens [B] of each step as numbers. If it looks behind, the next step is launched before the host
    waits for the tokens of the last one, so the device is never idle; the caller may stop a step too late."""
    if not looks_behind:
        yield from (chosen.tolist() for chosen in steps)
        return
    copies: list[tuple[torch.Tensor, torch.cuda.Event]] = []
    for i, chosen in enumerate(steps):
        if i < 2:  # two take turns
            host = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=device.KIND != "cpu")
            copies.append((host, torch.cuda.Event()))
        host, copied = copies[i % 2]
        host.copy_(chosen, non_blocking=True)
        copied.record()
        if i:
            yield wait(*copies[(i - 1) % 2])
    yield wait(*copies[i % 2])


def wait(host: torch.Tensor, copied: torch.cuda.Event) -> list[int]:
    copied.synchronize()
    return host.tolist()


def run_stages(model, tokens: torch.Tensor, positions: torch.Tensor, cache: Cache | StaticCache) -> torch.Tensor:
    """Runs this pipeline stage on the states of the previous one. Returns its states [T, 1, D], normalised if it is the
    last; the others send them to the next stage."""
    group = mpu.get_pipeline_model_parallel_group()
    if not model.first:
        states = torch.empty(len(tokens), 1, model.hidden_size, dtype=model.config.params_dtype, device=tokens.device)
        dist.recv(states, mpu.get_pipeline_model_parallel_prev_rank(), group=group)
        model.set_input_tensor(states)
    out = model(tokens, positions, [], cache=cache)
    if model.last:
        return out[0]
    dist.send(out.contiguous(), mpu.get_pipeline_model_parallel_next_rank(), group=group)
    return out


def next_tokens(
    model, states: torch.Tensor, given: torch.Tensor | None, o: InferOptions, generators: Generators
) -> torch.Tensor:
    """Returns the token [B] that follows, on every pipeline stage: the prompt's where `given` [B] is not negative, else
    the chosen one, -1 where logits are not finite. states [B, D]: the last stage's."""
    if model.last:
        chosen = choose(gather_logits(states, model), o, generators)
    else:
        chosen = torch.empty(len(generators), dtype=torch.int64, device=states.device)
    if not (model.first and model.last):
        last = mpu.get_pipeline_model_parallel_last_rank()
        dist.broadcast(chosen, last, group=mpu.get_pipeline_model_parallel_group())
    return chosen if given is None else torch.where((given < 0) | (chosen < 0), chosen, given)


def choose(logits: torch.Tensor, o: InferOptions, generators: Generators) -> torch.Tensor:
    """Returns the next token [B] for logits fp32 [B, V], or -1 where logits are not finite.

    At temperature 0 it is the likeliest token. Otherwise each row draws with its own generator, from the top_k
    likeliest of the tokens that make up top_p of the probability. A row without a generator gets the likeliest; its
    caller ignores it.
    """
    likeliest = logits.argmax(-1).masked_fill_(~logits.isfinite().all(-1), -1)
    if o.temperature == 0:
        return likeliest
    probabilities, tokens = (logits / o.temperature).softmax(-1).sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= o.top_p, 0)
    if o.top_k:
        probabilities[:, o.top_k :] = 0
    chosen = []
    for i, generator in enumerate(generators):
        if generator is None:
            chosen.append(likeliest[i : i + 1])
        else:
            usable = probabilities[i].nan_to_num(nan=1.0)  # a row with NaN becomes -1 below
            chosen.append(tokens[i, torch.multinomial(usable, 1, generator=generator)])
    return torch.where(likeliest < 0, -1, torch.cat(chosen))


def gather_logits(hidden: torch.Tensor, model) -> torch.Tensor:
    """Returns logits fp32 [B, V] of states [B, D], with the vocabulary gathered over tensor parallel ranks."""
    local = (hidden @ model.output_weight.t()).float()
    tp = model.config.tensor_model_parallel_size
    if tp == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(tp)]
    dist.all_gather(parts, local, group=mpu.get_tensor_model_parallel_group())
    return torch.cat(parts, -1)
