#!/usr/bin/env bash
# Sample videos from a first frame (and, with size 14B-flf2v, a last one) and text: mp4 and GIF.
#
#   bash zoo/wan21/infer_i2v.sh                              the demo's trained tiny model, two pictures of digits
#   bash zoo/wan21/infer_i2v.sh --weights Wan2.1-I2V-14B-480P-Diffusers --image cat.png --prompt "the cat boxes"
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
launch infer --task i2v "$@"
