#!/usr/bin/env bash
# Benchmarks on this machine, each against its peer in the same run (transformers' training step and generation, plain
# and compiled; the tokenizer library; the disk's read rate).
#
#   bash zoo/deepseek3/perf.sh                                   the tiny size
#   bash zoo/deepseek3/perf.sh --only step --size 671B --layers 4 --experts 32 --vocabulary 32768 --seq-len 4096 --global-batch 1
#   bash zoo/deepseek3/perf.sh --only generate --record
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
launch perf "$@"
