#!/usr/bin/env bash
# Zero-shot on CUB: 200 class names, two sets of 2000 images each (B and LE), head of CLIP RN50 tuned.
#
# Expect: top-1 46.69 -> 56.94 (the paper's Table 1; not run by us); ViT-B/16: 55.23 -> 63.79
#         with --head-clip ViT-B-16-quickgelu/openai
# Plan:   --plan h100 --plan-processes 8 (estimated, not measured):
#         147 GPU-hours on 8 x h100 (18.4 h), 800,000 images, 131,000 PFLOP, 321 GB of images, 8.2 GB per GPU
# GLIDE:  add --sd-model glide:DIR for the paper's generator, 82 TFLOP an image; see docs/synthetic_recognition.md
# Data:   give --data-dir DIR with DIR/train/<class>/ and DIR/test/<class>/
#         DIR/classes.json, {"folder": "human name", ...}, gives other class names than the folders
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch synthetic_recognition.py --preset cub "$@"
