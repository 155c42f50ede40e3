#!/usr/bin/env bash
# Pretrain DeepSeek-V3.
#
#   bash zoo/deepseek3/pretrain.sh                               tiny model on Python's docstrings, two idle cores, about 6 minutes
#   NPROC=8 NNODES=64 bash zoo/deepseek3/pretrain.sh --layout 671B --weights DeepSeek-V3-Base --data deepseek3-corpus
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
launch train --job pretrain "$@"
