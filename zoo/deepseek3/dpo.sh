#!/usr/bin/env bash
# Preference optimisation of Qwen3 (DPO, hinge, IPO, SimPO), all parameters or adapters.
#
#   bash zoo/deepseek3/dpo.sh                                    tiny model learns a format of answers, any laptop
#   NPROC=8 bash zoo/deepseek3/dpo.sh --size 8B --weights Qwen3-8B --data pairs.jsonl --export my-8B
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
launch train --job dpo "$@"
