#!/usr/bin/env bash
# Zero-shot on FGVC Aircraft: 100 class names, two sets of 2000 images each (B and LE), head of CLIP RN50 tuned.
#
# Expect: top-1 17.34 -> 21.94 (the paper's Table 1; not run by us); ViT-B/16: 24.81 -> 30.78
#         with --head-clip ViT-B-16-quickgelu/openai
# Plan:   --plan h100 --plan-processes 8 (estimated, not measured):
#         73.6 GPU-hours on 8 x h100 (9.2 h), 400,000 images, 65,300 PFLOP, 160 GB of images, 8.2 GB per GPU
# GLIDE:  add --sd-model glide:DIR for the paper's generator, 82 TFLOP an image; see docs/synthetic_recognition.md
# Data:   below data/; the paper's split: --split-file split_zhou_<Name>.json where CoOp has one
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch synthetic_recognition.py --preset aircraft "$@"
