#!/usr/bin/env bash
# Evaluate DeepSeek-V3 on benchmarks with lm-eval-harness. Data sets are local folders; results are in the run folder.
#
#   bash zoo/deepseek3/evaluate.sh                               the demo's tiny model on the demo's two tasks
#   NPROC=8 NNODES=4 bash zoo/deepseek3/evaluate.sh --tp 32 --weights DeepSeek-V3 --tasks mmlu,gsm8k --task-folder benchmarks
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
launch evaluate "$@"
