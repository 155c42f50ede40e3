#!/usr/bin/env bash
# Benchmarks on this machine, each against its peer in the same run (diffusers' training step, plain and compiled; the
# disk's read rate; plain sampling). Published rows of the same workload are printed beside the training step.
#
#   bash zoo/wan21/perf.sh                                   tiny on a CPU, 1.3B on an accelerator
#   NPROC=8 bash zoo/wan21/perf.sh --size 14B --only step --record
#   NPROC=2 bash zoo/wan21/perf.sh --only generation         sampling on two processes, seconds beside quality
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
launch perf "$@"
