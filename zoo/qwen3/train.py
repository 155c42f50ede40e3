"""Train Qwen3: data, model, objective, loop.

    bash zoo/qwen3/pretrain.sh                                                # laptop: tiny model, docstrings of Python
    NPROC=8 bash zoo/qwen3/pretrain.sh --size 8B --weights Qwen3-8B-Base --data corpus

Every rank of a tensor x context x pipeline group reads the same rows; the loss is a mean over the labelled tokens of the
whole global batch, so packing and layout change neither it nor its gradients.
"""

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Iterator

from common import device  # isort: skip  (before megatron)
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from transformers import AutoTokenizer

from common import checkpoint, cli, parallel
from common import train as loop
from common.data import Step, prefetch

from . import convert, data
from .config import DEMO_DATA, HERE, InferOptions, Qwen3Config, TrainOptions, model_config, parse
from .infer import end_tokens, generate
from .model import Qwen3Block, build, fill, load_balancing_loss, router_metrics

# --------------------------------------------------------------------------------------------------------- objective


def forward_step(iterator: Iterator[dict], model: torch.nn.Module):
    """One micro-batch through one model chunk, as megatron-core's schedules want it."""
    batch = next(iterator)
    output = model(*(batch[k] for k in ("tokens", "positions", "cu_seqlens", "rows", "labels", "weight")))
    return output, lambda output: loss(output, batch, model)


def loss(output: tuple, batch: dict, model: torch.nn.Module) -> tuple[torch.Tensor, dict]:
    """The cross entropy of this rank's tokens, weighted (see `weighted`) so that summing over context parallel ranks,
    and averaging over micro-batches and data parallel ranks, gives the mean over every labelled token of the global
    batch: a document counts by its tokens, wherever packing has put it. For experts also aux * load-balancing loss."""
    value, routing = output
    chunk = parallel.unwrapped(model)
    tp = chunk.config.tensor_model_parallel_size
    # Every tp rank has computed the same number; global_loss takes the mean over them unless they hold other tokens.
    reported = value.detach() / (tp if chunk.config.sequence_parallel else 1)
    if batch["aux"]:  # a sum over the ranks of a row: they hold parts of its tokens, or sum the router's gradient
        balance = load_balancing_loss(routing, chunk.qwen.num_experts_per_tok)
        value = value + batch["aux"] / (tp * chunk.config.context_parallel_size) * balance
    return value, {"loss": reported.clone()}  # the schedule scales the first one in place


def weighted(micro_batches: list[dict], dp: int, aux: float = 0.0) -> list[dict]:
    """Adds to each micro-batch the weight of its tokens, fp32 [T]: micro-batches * dp / (labelled tokens of the whole
    global batch). The count is summed on the device: nothing waits for it."""
    count = torch.stack([(b["labels"] >= 0).sum() for b in micro_batches]).sum(0, keepdim=True).float().clamp(min=1)
    if dp > 1:
        dist.all_reduce(count, group=mpu.get_data_parallel_group())
    scale = len(micro_batches) * dp / count
    return [b | {"weight": (b["labels"] >= 0) * scale, "aux": aux} for b in micro_batches]


# -------------------------------------------------------------------------------------------------------------- data


def rows_of(path, o: TrainOptions, shuffle: bool = True):
    """The rows of a data set: an indexed one's stream to pretrain, packed conversations for sft."""
    if o.job == "pretrain":
        end = AutoTokenizer.from_pretrained(o.tokenizer).convert_tokens_to_ids(data.DOCUMENT_END)
        return data.TextRows(path, o.seq_len, end, o.seed, o.separate_documents, shuffle)
    prepare = functools.partial(
        data.prepare_chats, path, o.tokenizer, o.seq_len, o.cache, too_long=o.too_long, max_drop=o.max_drop
    )
    if dist.get_rank() == 0:
        prepare()
    dist.barrier()
    return data.PackedRows(prepare())  # made already: finds it


class Batches:
    """Steps of micro-batches for this rank: every rank of a tensor x context x pipeline group reads the same rows."""

    def __init__(self, o: TrainOptions):
        self.o, self.rows = o, rows_of(o.data, o)
        seed = () if o.job == "pretrain" else (o.seed,)
        self.sampler = self.rows.sampler(o.global_batch, o.micro_batch, mpu.get_data_parallel_rank(), o.dp, *seed)

    def __call__(self, start: int) -> Iterator[Step]:
        return prefetch(self.rows, self.sampler, start, self.o.steps, self.o.workers)

    def prepare(self, loaded: Step) -> list[dict]:
        """A loaded step -> its micro-batches, on the device."""
        aux = self.o.aux if self.o.aux_over == "model" else 0.0  # of each layer: the model adds it itself
        return weighted([self.on_device(b) for b in loaded.micro_batches], self.o.dp, aux)

    def on_device(self, batch: dict) -> dict:
        moved = {k: v.to(device.current(), non_blocking=True) for k, v in batch.items() if torch.is_tensor(v)}
        bounds = batch["cu_seqlens"]
        if self.o.job == "pretrain" and not self.o.separate_documents:  # a row is one sequence, whatever it holds
            bounds = list(range(0, len(batch["tokens"]) + 1, self.o.seq_len))
        return batch | moved | {"cu_seqlens": bounds, "rows": self.o.micro_batch}


# -------------------------------------------------------------------------------------------------------- evaluation


def held_out_rows(o: TrainOptions):
    """The rows to evaluate on at the end, or None. ValueError: too few, said before the training and not after."""
    if o.validation is None:
        return None
    rows = rows_of(o.validation, o, shuffle=False)
    if len(rows) < o.global_batch:
        raise ValueError(
            f"{o.validation} holds {len(rows)} rows of {o.seq_len} tokens, a global batch takes {o.global_batch}; "
            "fix: --validation or --global-batch"
        )
    return rows


@torch.no_grad()
def held_out_loss(o: TrainOptions, wrapped, batches: Batches, rows) -> tuple[float, int]:
    """(mean cross entropy in nats, number) of the labelled tokens of the held-out rows, as far as they fill whole
    global batches, under the run's own layout."""
    rank, total, tokens = mpu.get_data_parallel_rank(), 0.0, 0
    for step in range(len(rows) // o.global_batch):
        first = step * o.global_batch + rank * o.micro_batch
        starts = range(first, (step + 1) * o.global_batch, o.micro_batch * o.dp)
        loaded = [rows.fetch(list(range(i, i + o.micro_batch))) for i in starts]
        micro_batches = weighted([batches.on_device(b) for b in loaded], o.dp)
        count = torch.tensor([sum(int((b["labels"] >= 0).sum()) for b in loaded)], device=device.current())
        dist.all_reduce(count, group=mpu.get_data_parallel_group())
        results = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(micro_batches) for _ in wrapped] if len(wrapped) > 1 else iter(micro_batches),
            model=wrapped if len(wrapped) > 1 else wrapped[0],
            num_microbatches=len(micro_batches),
            seq_length=o.seq_len,
            micro_batch_size=o.micro_batch,
            forward_only=True,
        )
        total += loop.global_loss(o, results, False)[0] * int(count)
        tokens += int(count)
    return total / tokens, tokens


def finish(o: TrainOptions, config: Qwen3Config, wrapped, batches: Batches, rows, result: dict) -> None:
    """The loss on the held-out rows, and on the demo's data what it compares with."""
    loss, count = held_out_loss(o, wrapped, batches, rows)
    main, demo = dist.get_rank() == 0, DEMO_DATA in o.data.parents
    lines = [f"result: step {result['steps']}, perplexity {math.exp(loss):.2f} on {count:,} held-out tokens"]
    if demo and o.job == "pretrain" and main:
        from .demo import trigram

        lines[0] += (
            f" (trigram model of the same text: {trigram.perplexity(o.data, o.validation, config.vocab_size):.2f})"
        )
    if demo and o.job == "sft":
        if (o.vpp, o.cp, o.fsdp, o.sp) == (1, 1, False, False):
            right, asked = exact_match(o, parallel.unwrapped(wrapped[0]))
            lines.append(f"        exact match on {asked} questions never trained on: {right / asked:.0%} (chance 2%)")
        else:
            lines.append("        exact match: not measured under this layout; see generate.sh")
    if main:
        print(f"run folder  {o.out}\nloss curve  {o.out / 'loss.png'}")
        print("\n".join(lines), flush=True)
        (o.out / "result.json").write_text(json.dumps({"held_out_loss": loss, "tokens": count, "lines": lines}))


def exact_match(o: TrainOptions, model) -> tuple[int, int]:
    """(right, asked) of the demo's questions, answered greedily."""
    tokenizer = AutoTokenizer.from_pretrained(o.tokenizer)
    chats = [json.loads(line)["messages"] for line in o.validation.read_text().splitlines()]
    options = {"add_generation_prompt": True, "tokenize": False, "enable_thinking": False}
    prompts = [
        tokenizer(tokenizer.apply_chat_template(c[:-1], **options), add_special_tokens=False).input_ids for c in chats
    ]
    asked = InferOptions(
        **{f.name: f.default for f in dataclasses.fields(InferOptions)} | {"max_new_tokens": 24, "batch": 64}
    )
    model.eval()
    answers = generate(model, prompts, asked, end_tokens(tokenizer))
    right = [tokenizer.decode(a).strip() == c[-1]["content"].strip() for a, c in zip(answers, chats, strict=True)]
    return sum(right), len(right)


# -------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    o = parse("train", sys.argv[1:])
    parallel.initialize(o)
    config = model_config(o)
    chunks = build(o, config)
    fill(chunks, o, config)
    wrapped = parallel.wrap(chunks, o, Qwen3Block)
    batches, held_out = Batches(o), held_out_rows(o)
    result = loop.train(
        o,
        wrapped,
        forward_step,
        batches,
        batches.prepare,
        sequence_length=lambda batch: o.seq_len,
        samples=lambda batch: (o.seq_len, config.flops(o.seq_len)),
        header=loop.run_header(o, HERE.name, o.job, config.parameters, config.flops(o.seq_len)),
        state={"model": dataclasses.asdict(config)},
        measure=(lambda: router_metrics(wrapped, config)) if config.num_experts else None,
    )
    if result["reason"] == "finished" and held_out is not None:
        finish(o, config, wrapped, batches, held_out, result)
    if o.export and dist.get_rank() == 0:
        tensors = checkpoint.tensor_sizes(result["checkpoint"])
        element = {name: tensors[name] // math.prod(shape) for name, shape in convert.shapes(config).items()}
        read = functools.partial(checkpoint.read_tensor, result["checkpoint"])
        convert.write_released(o.export, config, element, read, o.tokenizer)
        print(f"exported {o.export}", flush=True)
    dist.barrier()
    parallel.shutdown()


if __name__ == "__main__":
    cli.exit_on_bad_input(main)
