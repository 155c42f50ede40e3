"""Evaluate DeepSeek-V3 on benchmarks through lm-eval-harness.

The mechanics are in common/language/evaluate.py.

    bash zoo/deepseek3/evaluate.sh                                                the demo's weights, the demo's tasks
    NPROC=8 bash zoo/deepseek3/evaluate.sh --weights DeepSeek-V3 --tasks mmlu,gsm8k --task-folder benchmarks
"""

import torch.distributed as dist
from transformers import AutoTokenizer

from common.jobs import content_name
from common.language.evaluate import Answers, HarnessModel, answer, broadcast, report, run

from .config import model_config
from .infer import end_tokens, load_model
from .options import EvaluateOptions


def identity(o: EvaluateOptions) -> dict:
    """Returns everything that an answer depends on besides its request."""
    weights = content_name(o.weights)
    return {"weights": str(o.weights.absolute()), "content": weights, "precision": o.precision, "seed": o.seed}


def main(o: EvaluateOptions) -> None:
    config = model_config(o)
    model, tokenizer = load_model(o, config), AutoTokenizer.from_pretrained(o.tokenizer)
    ends, decoders = end_tokens(tokenizer), []
    if dist.get_rank() == 0:
        run_identity = identity(o)

        def ask(job: tuple) -> list:
            return answer(broadcast(job), model, tokenizer, ends, o, decoders)

        lm = HarnessModel(o, config.positions, tokenizer, Answers(o.out / "answers.jsonl", run_identity), ask)
        results = run(o, lm)
        broadcast(None)
        report(o, results, run_identity)
    else:
        while (job := broadcast(None)) is not None:
            answer(job, model, tokenizer, ends, o, decoders)
    dist.barrier()
