#!/usr/bin/env bash
# Zero-shot on Flowers102: 102 class names, two sets of 2000 images each (B and LE), head of CLIP RN50 tuned.
#
# Expect: top-1 66.08 -> 67.05 (the paper's Table 1; not run by us); ViT-B/16: 71.30 -> 72.60
#         with --head-clip ViT-B-16-quickgelu/openai
# Plan:   --plan h100 --plan-processes 8 (estimated, not measured):
#         75 GPU-hours on 8 x h100 (9.4 h), 408,000 images, 66,600 PFLOP, 164 GB of images, 8.2 GB per GPU
# GLIDE:  add --sd-model glide:DIR for the paper's generator, 82 TFLOP an image; see docs/synthetic_recognition.md
# Data:   below data/; the paper's split: --split-file split_zhou_<Name>.json where CoOp has one
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch synthetic_recognition.py --preset flowers "$@"
