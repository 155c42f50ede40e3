#!/usr/bin/env bash
# Pretrain Qwen3.
#
#   bash zoo/deepseek3/pretrain.sh                               tiny model on Python's docstrings, two idle cores, about 5 minutes
#   NPROC=8 bash zoo/deepseek3/pretrain.sh --size 8B --weights Qwen3-8B-Base --data qwen3-corpus
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
launch train --job pretrain "$@"
