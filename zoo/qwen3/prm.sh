#!/usr/bin/env bash
# Process reward model on Qwen3: a verdict on every step of a solution, from labels of steps.
#
#   bash zoo/qwen3/prm.sh                                    tiny model finds the wrong step of a solution, any laptop
#   NPROC=8 bash zoo/qwen3/prm.sh --size 8B --weights Qwen3-8B --data steps.jsonl --export my-prm
#   bash zoo/qwen3/prm.sh --weights my-prm --score solutions.jsonl --out scores
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
launch train --job prm "$@"
