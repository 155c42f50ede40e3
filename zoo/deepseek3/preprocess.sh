#!/usr/bin/env bash
# Tokenize text into a megatron-core indexed data set for pretraining.
#
#   bash zoo/deepseek3/preprocess.sh                             the demo's text, with the demo's tokenizer
#   bash zoo/deepseek3/preprocess.sh --data corpus/ --weights DeepSeek-V3 --out deepseek3-corpus --workers 32
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
launch preprocess "$@"
