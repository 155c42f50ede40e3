#!/usr/bin/env bash
# Low-rank adapters (LoRA) for Wan2.1 text-to-video, in a folder that diffusers and peft load.
#
#   bash zoo/wan21/lora_t2v.sh                               the demo's tiny model learns to blink, any laptop
#   NPROC=8 bash zoo/wan21/lora_t2v.sh --size 14B --weights Wan2.1-T2V-14B-Diffusers --data my.jsonl --lr 1e-4
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
launch train --job lora --task t2v "$@"
