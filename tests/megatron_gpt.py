"""Trains megatron-core's own GPTModel with a script that one would write for NVIDIA GPUs. To run on Ascend NPUs and on
CPUs it needs only one line of this repository, the import marked below.

    PYTHONPATH=. torchrun --nproc-per-node 2 tests/megatron_gpt.py --tp 2 --sp
    PYTHONPATH=. torchrun --nproc-per-node 2 tests/megatron_gpt.py --pp 2

The model is tiny. Its data are sequences that count upwards.
"""

import argparse
import os

from common import device  # noqa: F401  isort: skip  (the one line: before the first import of megatron)

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

VOCABULARY, LENGTH, GLOBAL_BATCH, MICRO_BATCH, STEPS = 96, 24, 8, 2, 10
OPTIMIZER = dict(lr=3e-3, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, clip_grad=1.0)


class Norm(torch.nn.LayerNorm):
    """torch's LayerNorm with its parameters marked for sequence parallelism. Each rank sees a part of the tokens, and
    megatron-core sums the gradients of marked parameters over the ranks. megatron-core's own wrapper of torch's norm
    refuses sequence parallelism on every device."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__(hidden_size, eps)
        self.weight.sequence_parallel = self.bias.sequence_parallel = config.sequence_parallel


def join(tp: int, pp: int) -> None:
    """Creates the process groups of the job that torchrun started, and seeds each rank's random numbers."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    mpu.initialize_model_parallel(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    model_parallel_cuda_manual_seed(1)


def build(sp: bool = False, **settings) -> GPTModel:
    """Builds this rank's part of the model. sp: sequence parallelism; settings: further fields of TransformerConfig."""
    config = TransformerConfig(
        num_layers=4,
        hidden_size=40,
        ffn_hidden_size=72,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=12,
        tensor_model_parallel_size=mpu.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=mpu.get_pipeline_model_parallel_world_size(),
        pipeline_dtype=torch.float32,
        sequence_parallel=sp,
        **{"attention_dropout": 0.0, "hidden_dropout": 0.0, **settings},
    )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    if sp:
        spec.layer_norm = Norm
        for layer in spec.layer_specs:
            layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    return GPTModel(
        config,
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
        position_embedding_type="rope",
    ).cuda()


def samples(step: int) -> torch.Tensor:
    """Returns the token ids of a step's global batch, int64 [GLOBAL_BATCH, LENGTH + 1]."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(VOCABULARY, (GLOBAL_BATCH, 1), generator=generator)
    return (start + torch.arange(LENGTH + 1)) % VOCABULARY


def forward_step(data, model):
    """Runs the forward of one micro-batch, with the signature that megatron-core's schedules require."""
    tokens = next(data).cuda()
    positions = torch.arange(LENGTH, device="cuda").expand(len(tokens), -1)
    losses = model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())

    def mean_loss(losses):
        loss = losses.mean()
        return loss, {"loss": loss.detach().clone()}  # the schedule divides the first value in place

    return losses, mean_loss


def train(model: GPTModel) -> list[tuple[float, float]]:
    """Trains for STEPS steps. Returns (loss, gradient norm) of each. Only the last pipeline stage knows the loss."""
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True)
    config, model = model.config, DistributedDataParallel(model.config, ddp, model)
    optimizer = get_megatron_optimizer(OptimizerConfig(use_distributed_optimizer=True, **OPTIMIZER), [model])
    config.finalize_model_grads_func, config.no_sync_func = finalize_model_grads, model.no_sync
    config.grad_scale_func = optimizer.scale_loss
    forward_backward, record = get_forward_backward_func(), []
    dp_rank, dp = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    for step in range(STEPS):
        micro_batches = samples(step).chunk(dp)[dp_rank].split(MICRO_BATCH)
        model.zero_grad_buffer()
        optimizer.zero_grad()
        results = forward_backward(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=[model],
            num_microbatches=len(micro_batches),
            seq_length=LENGTH,
            micro_batch_size=MICRO_BATCH,
            forward_only=False,
        )
        loss = torch.stack([result["loss"] for result in results]).mean() if results else torch.zeros([]).cuda()
        dist.all_reduce(loss, dist.ReduceOp.SUM, mpu.get_data_parallel_group())
        _, norm, _ = optimizer.step()
        record.append((loss.item() / dp, float(norm)))
    return record


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--sp", action="store_true")
    options = parser.parse_args()
    join(options.tp, options.pp)
    record = train(build(options.sp))
    if dist.get_rank() == dist.get_world_size() - 1:
        for step, (loss, norm) in enumerate(record):
            print(f"step {step + 1}: loss {loss:.4f}, gradient norm {norm:.4f}")
    dist.destroy_process_group()
