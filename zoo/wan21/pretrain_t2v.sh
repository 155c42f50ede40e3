#!/usr/bin/env bash
# Pretrain Wan2.1 text-to-video.
#
#   bash zoo/wan21/pretrain_t2v.sh                           tiny model on the demo clips, two idle cores, about 4 minutes
#   bash zoo/wan21/pretrain_t2v.sh --size 14B --weights Wan2.1-T2V-14B-Diffusers --data my.jsonl --layout 14B
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
launch train --job pretrain --task t2v "$@"
