#!/usr/bin/env bash
# Sample videos from text: mp4 and GIF.
#
#   bash zoo/wan21/infer_t2v.sh                              the demo's trained tiny model, two prompts it knows
#   bash zoo/wan21/infer_t2v.sh --weights Wan2.1-T2V-1.3B-Diffusers --prompt "two cats box on a spotlighted stage"
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
launch infer --task t2v "$@"
