#!/usr/bin/env bash
# Zero-shot on CUB: 200 class names, two sets of 2000 images each (B and LE), head of CLIP RN50 tuned.
#
# Expect: top-1 46.69 -> 56.94 (the paper's Table 1; not run by us); ViT-B/16: 55.23 -> 63.79
#         with --head-clip ViT-B-16-quickgelu/openai
# Cost:   120 GPU hours for the images, estimated: 163 TFLOP an image at 300 TFLOP/s
# GLIDE:  add --sd-model glide:DIR for the paper's generator, 82 TFLOP an image; see docs/synthetic_recognition.md
# Data:   give --data-dir DIR with DIR/train/<class>/ and DIR/test/<class>/
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch synthetic_recognition.py --preset cub "$@"
