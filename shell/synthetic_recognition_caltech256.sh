#!/usr/bin/env bash
# Zero-shot on Caltech256: 257 class names, two sets of 2000 images each (B and LE), head of CLIP RN50 tuned.
#
# Expect: top-1 73.36 -> 75.74 (the paper's Table 1; not run by us); ViT-B/16: 80.14 -> 81.43
#         with --head-clip ViT-B-16-quickgelu/openai
# Cost:   155 GPU hours for the images, estimated: 163 TFLOP an image at 300 TFLOP/s
# GLIDE:  add --sd-model glide:DIR for the paper's generator, 82 TFLOP an image; see docs/synthetic_recognition.md
# Data:   give --data-dir DIR with DIR/train/<class>/ and DIR/test/<class>/
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch synthetic_recognition.py --preset caltech256 "$@"
