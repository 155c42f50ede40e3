#!/usr/bin/env bash
# Low-rank adapters (LoRA) for Wan2.1 image-to-video, in a folder that diffusers and peft load.
#
#   bash zoo/wan21/lora_i2v.sh                               the demo's tiny model learns to blink, any laptop
#   NPROC=8 bash zoo/wan21/lora_i2v.sh --size 14B-i2v --weights Wan2.1-I2V-14B-480P-Diffusers --data my.jsonl --lr 1e-4
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
launch train --job lora --task i2v "$@"
