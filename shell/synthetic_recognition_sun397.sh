#!/usr/bin/env bash
# Zero-shot on SUN397: 397 class names, two sets of 2000 images each (B and LE), head of CLIP RN50 tuned.
#
# Expect: top-1 58.51 -> 60.07 (the paper's Table 1; not run by us); ViT-B/16: 62.51 -> 63.79
#         with --head-clip ViT-B-16-quickgelu/openai
# Cost:   240 GPU hours for the images, estimated: 163 TFLOP an image at 300 TFLOP/s
# GLIDE:  add --sd-model glide:DIR for the paper's generator, 82 TFLOP an image; see docs/synthetic_recognition.md
# Data:   below data/; the paper's split: --split-file split_zhou_<Name>.json where CoOp has one
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch synthetic_recognition.py --preset sun397 "$@"
