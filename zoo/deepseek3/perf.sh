#!/usr/bin/env bash
# Benchmarks on this machine, each against its peer in the same run (transformers' training step and generation, plain
# and compiled; the tokenizer library; the disk's read rate).
#
#   bash zoo/deepseek3/perf.sh                                   tiny on a CPU, 0.6B on an accelerator
#   bash zoo/deepseek3/perf.sh --only step --size 0.6B --layers 2 --vocabulary 32768 --precision fp32 --seq-len 512 --global-batch 1
#   NPROC=8 bash zoo/deepseek3/perf.sh --size 8B --only step --record
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
launch perf "$@"
