#!/usr/bin/env bash
# Preference optimisation of DeepSeek-V3 (DPO, hinge, IPO, SimPO), all parameters or adapters.
#
#   bash zoo/deepseek3/dpo.sh                                    tiny model learns a format of answers, any laptop
#   NPROC=8 NNODES=64 bash zoo/deepseek3/dpo.sh --layout 671B-sft --weights DeepSeek-V3 --data pairs.jsonl --export my-V3
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
launch train --job dpo "$@"
