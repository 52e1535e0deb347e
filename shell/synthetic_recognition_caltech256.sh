#!/usr/bin/env bash
# Zero-shot on Caltech256: 257 class names, two sets of 2000 images each (B and LE), head of CLIP RN50 tuned.
#
# Expect: top-1 73.36 -> 75.74 (the paper's Table 1; not run by us); ViT-B/16: 80.14 -> 81.43
#         with --head-clip ViT-B-16-quickgelu/openai
# Plan:   --plan h100 --plan-processes 8 (estimated, not measured):
#         189 GPU-hours on 8 x h100 (23.6 h), 1,028,000 images, 168,000 PFLOP, 412 GB of images, 8.2 GB per GPU
# GLIDE:  add --sd-model glide:DIR for the paper's generator, 82 TFLOP an image; see docs/synthetic_recognition.md
# Data:   give --data-dir DIR with DIR/train/<class>/ and DIR/test/<class>/
#         DIR/classes.json, {"folder": "human name", ...}, gives other class names than the folders
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch synthetic_recognition.py --preset caltech256 "$@"
