"""What a row of the user's data may hold, and how rows become this rank's micro-batches.

Pretraining reads a megatron-core indexed data set (PREFIX.bin, PREFIX.idx; `preprocess.sh` writes one) with one
document per sequence. The shuffled documents of an epoch stand end to end, each with an end-of-text token after it, and
are cut into rows of seq_len tokens (common/language/text.py). Nothing is dropped or padded.

The other jobs read conversations or pairs from a .jsonl or .json file, or from a folder of such files. Other keys are
ignored. `tools` and `tool_calls` may be JSON texts:

    {"instruction": "Add.", "input": "1 + 1", "output": "2", "system": "…", "history": [["q", "a"]]}    Alpaca
    {"conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]}             ShareGPT
    {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]}         OpenAI
    {"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}      a pair; text or messages, or any of the above as the
    prompt

`chosen` and `rejected` may be answers or whole conversations. If they are conversations, a prompt must agree with both,
and the beginning that they share is used once.

The tokenizer's own chat template renders them. The loss is on what the assistant generates: from the end of the
generation prompt through the token that closes the turn (common/language/chat.py). So real thoughts are targets, and
the empty thoughts that `enable_thinking=False` puts into the prompt are not. Text after the last answer is cut off.
`--train-on` selects the answers of a conversation that have loss: all, the last, or the complete ones (those whose
thoughts the template keeps). An answer with `"weight": 0`, `"loss": false` or `"train": false` never has loss. In a
pair only the last answer counts.

Whole conversations are packed into rows of seq_len by best fit decreasing. The rest of a row is padding: a sequence of
its own, without loss. Both answers of a pair are in one row. A conversation or pair longer than a row is dropped and
counted, or cut (`--too-long`; common/language/packing.py).

A micro-batch holds micro_batch rows end to end: tokens, labels (negative: no loss) and positions [T], and the bounds
`cu_seqlens` that attention does not cross. For pairs it also holds what `PackedRows` adds.
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

from .options import TrainOptions, document_end


def rows_of(path, o: TrainOptions, shuffle: bool = True):
    """Opens the rows of a data set: an indexed data set for pretrain, packed pairs for dpo, else packed
    conversations."""
    if o.job == "pretrain":
        end = AutoTokenizer.from_pretrained(o.tokenizer).convert_tokens_to_ids(document_end(o.tokenizer))
        return TextRows(path, o.seq_len, end, o.seed, o.separate_documents, shuffle)
    kind = "dpo" if o.job == "dpo" else "sft"
    prepare = functools.partial(
        prepare_chats, path, o.tokenizer, o.seq_len, o.cache,
        kind=kind, too_long=o.too_long, train_on=o.train_on, max_drop=o.max_drop,
    )  # fmt: skip
    if dist.get_rank() == 0:
        prepare()
    dist.barrier()
    return PackedRows(prepare())  # rank 0 has packed them; this returns their folder


def weighted(micro_batches: list[dict], dp: int, mtp: float = 0.0) -> list[dict]:
    """Adds `weight` to each micro-batch: the weight of its tokens fp32 [T], or of its pairs [P]. A weight is
    micro-batches * dp / (labelled tokens, or pairs, of the whole global batch). The count stays on the device, so that
    the host does not wait for it. With mtp, the weight of the multi-token prediction loss, also adds what that loss
    needs, `following`: next tokens, labels of the tokens after them, and their weights, [T] each."""
    counted = [torch.ones_like(b["pairs"]) if "pairs" in b else b["labels"] >= 0 for b in micro_batches]
    micro_batches = [b | {"weight": w} for b, w in zip(micro_batches, _weights(counted, dp), strict=True)]
    if not mtp:
        return [b | {"following": None} for b in micro_batches]
    shifted = [_shifted(b) for b in micro_batches]
    weights = _weights([labels >= 0 for _, labels in shifted], dp)
    pairs = zip(micro_batches, shifted, weights, strict=True)
    return [b | {"following": (tokens, labels, mtp * w)} for b, (tokens, labels), w in pairs]


def _weights(counted: list[torch.Tensor], dp: int) -> list[torch.Tensor]:
    """Returns fp32 weights for the counted of every micro-batch, whose mean over micro-batches and ranks sums to 1."""
    count = torch.stack([w.sum() for w in counted]).sum(0, keepdim=True).float().clamp(min=1)
    if dp > 1:
        dist.all_reduce(count, group=mpu.get_data_parallel_group())
    return [w * (len(counted) * dp / count) for w in counted]


def _shifted(batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the next token of each token and that one's label, [T] each; no label at the end of a document."""
    tokens, labels, positions = (batch[key] for key in ("tokens", "labels", "positions"))
    same_document = positions.roll(-1) == positions + 1
    return tokens.roll(-1), torch.where(same_document, labels.roll(-1), -100)


class Batches:
    """Yields this rank's micro-batches, step by step. All ranks of a tensor x context x pipeline group read the same
    rows."""

    def __init__(self, o: TrainOptions):
        self.o, self.rows = o, rows_of(o.data, o)
        seed = () if o.job == "pretrain" else (o.seed,)
        self.sampler = self.rows.sampler(o.global_batch, o.micro_batch, mpu.get_data_parallel_rank(), o.dp, *seed)

    def __call__(self, start: int) -> Iterator[Step]:
        return prefetch(self.rows, self.sampler, start, self.o.steps, self.o.workers)

    def prepare(self, loaded: Step) -> list[dict]:
        """Returns the micro-batches of a loaded step, weighted and on the device."""
        if self.o.adapts:
            lora.seed_dropout(self.o.seed, loaded.step)
        mtp = self.o.mtp_weight if self.o.mtp else 0.0
        return weighted([self.on_device(b) for b in loaded.micro_batches], self.o.dp, mtp)

    def on_device(self, batch: dict) -> dict:
        moved = {k: v.to(device.current(), non_blocking=True) for k, v in batch.items() if torch.is_tensor(v)}
        bounds = batch["cu_seqlens"]
        if self.o.job == "pretrain" and not self.o.separate_documents:  # all documents of a row are one sequence
            bounds = list(range(0, len(batch["tokens"]) + 1, self.o.seq_len))
        return batch | moved | {"cu_seqlens": bounds, "rows": self.o.micro_batch}
