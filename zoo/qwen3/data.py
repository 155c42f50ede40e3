"""What a row of the user's data may hold, and how rows become this rank's micro-batches.

Pretraining reads a megatron-core indexed data set (PREFIX.bin, PREFIX.idx; `preprocess.sh` writes one), one document per
sequence. The shuffled documents of an epoch stand end to end, an end-of-text token after each, and are cut into rows of
seq_len tokens (common/language/text.py). Nothing is dropped or padded.

The other jobs read conversations or pairs, .jsonl or .json, a file or a folder of them. Other keys are ignored; `tools`
and `tool_calls` may be JSON texts:

    {"instruction": "Add.", "input": "1 + 1", "output": "2", "system": "…", "history": [["q", "a"]]}    Alpaca
    {"conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]}             ShareGPT
    {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]}         OpenAI
    {"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}      a pair; text or messages, or any of the above as the prompt

`chosen` and `rejected` may be answers or whole conversations. A prompt beside whole conversations must agree with them,
and the beginning that they share is taken once.

The tokenizer's own template renders them. The loss is on what the assistant generates: from where the prompt for a
generation ends (so the empty thoughts that `enable_thinking=False` puts there are no target, and real thoughts are)
through the token that closes the turn (common/language/chat.py). What follows the last answer is cut off. Of a
conversation `--train-on` chooses all answers, the last one, or the complete ones, whose thoughts the template does not
leave out. An answer with `"weight": 0`, `"loss": false` or `"train": false` is never learnt. In a pair only the last answer
counts.

Whole conversations fill rows of seq_len, best fit decreasing; the rest of a row is padding, a sequence of its own without
loss. A pair shares a row. One longer than a row is dropped and counted, or cut, as `--too-long` says
(common/language/packing.py).

A micro-batch holds micro_batch rows end to end: tokens, labels (negative: no loss) and positions [T], the bounds
`cu_seqlens` that attention does not cross, and for pairs what `PackedRows` adds.
"""

import functools
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from transformers import AutoTokenizer

from common import device, lora
from common.data import Step, prefetch
from common.language.packing import PackedRows, prepare_chats
from common.language.text import TextRows

from .options import DOCUMENT_END, TrainOptions


def rows_of(path, o: TrainOptions, shuffle: bool = True):
    """The rows of a data set: an indexed one's stream to pretrain, packed conversations, or pairs for dpo."""
    if o.job == "pretrain":
        end = AutoTokenizer.from_pretrained(o.tokenizer).convert_tokens_to_ids(DOCUMENT_END)
        return TextRows(path, o.seq_len, end, o.seed, o.separate_documents, shuffle)
    kind = "dpo" if o.job == "dpo" else "sft"
    prepare = functools.partial(
        prepare_chats, path, o.tokenizer, o.seq_len, o.cache,
        kind=kind, too_long=o.too_long, train_on=o.train_on, max_drop=o.max_drop,
    )  # fmt: skip
    if dist.get_rank() == 0:
        prepare()
    dist.barrier()
    return PackedRows(prepare())  # made already: finds it


def weighted(micro_batches: list[dict], dp: int, aux: float = 0.0) -> list[dict]:
    """Adds to each micro-batch the weight of its tokens fp32 [T], or of its pairs [P]: micro-batches * dp / (labelled
    tokens, or pairs, of the whole global batch). The count is summed on the device: nothing waits for it."""
    wanted = [torch.ones_like(b["pairs"]) if "pairs" in b else b["labels"] >= 0 for b in micro_batches]
    count = torch.stack([w.sum() for w in wanted]).sum(0, keepdim=True).float().clamp(min=1)
    if dp > 1:
        dist.all_reduce(count, group=mpu.get_data_parallel_group())
    scale = len(micro_batches) * dp / count
    return [b | {"weight": w * scale, "aux": aux} for b, w in zip(micro_batches, wanted, strict=True)]


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
        if self.o.adapts:
            lora.seed_dropout(self.o.seed, loaded.step)
        aux = self.o.aux if self.o.aux_over == "model" else 0.0  # of each layer: the model adds it itself
        return weighted([self.on_device(b) for b in loaded.micro_batches], self.o.dp, aux)

    def on_device(self, batch: dict) -> dict:
        moved = {k: v.to(device.current(), non_blocking=True) for k, v in batch.items() if torch.is_tensor(v)}
        bounds = batch["cu_seqlens"]
        if self.o.job == "pretrain" and not self.o.separate_documents:  # a row is one sequence, whatever it holds
            bounds = list(range(0, len(batch["tokens"]) + 1, self.o.seq_len))
        return batch | moved | {"cu_seqlens": bounds, "rows": self.o.micro_batch}
