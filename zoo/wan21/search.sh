#!/usr/bin/env bash
# Find the cache settings of infer_t2v.sh that keep a stated quality. Prints a table of the trials and the best options.
#
#   bash zoo/wan21/search.sh                                 the demo's tiny model, 32 dB PSNR to its uncached videos
#   bash zoo/wan21/search.sh --weights Wan2.1-T2V-1.3B-Diffusers --prompts my.txt --psnr 30
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
launch search "$@"
