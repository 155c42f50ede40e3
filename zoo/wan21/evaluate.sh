#!/usr/bin/env bash
# Score sampled videos: how well they follow their captions, and how close they are to real clips.
#
#   bash zoo/wan21/evaluate.sh                               the demo's trained tiny model, scored by the demo's judge
#   bash zoo/wan21/evaluate.sh --weights Wan2.1-T2V-1.3B-Diffusers --data held-out.jsonl --feature-model dinov2-base
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
launch evaluate "$@"
