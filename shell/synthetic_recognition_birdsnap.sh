#!/usr/bin/env bash
# Zero-shot on Birdsnap: 500 class names, two sets of 2000 images each (B and LE), head of CLIP RN50 tuned.
#
# Expect: top-1 34.33 -> 38.05 (the paper's Table 1; not run by us); ViT-B/16: 41.90 -> 46.84
#         with --head-clip ViT-B-16-quickgelu/openai
# Plan:   --plan h100 --plan-processes 8 (estimated, not measured):
#         368 GPU-hours on 8 x h100 (46 h), 2,000,000 images, 326,000 PFLOP, 802 GB of images, 8.2 GB per GPU
# GLIDE:  add --sd-model glide:DIR for the paper's generator, 82 TFLOP an image; see docs/synthetic_recognition.md
# Data:   give --data-dir DIR with DIR/train/<class>/ and DIR/test/<class>/
#         DIR/classes.json, {"folder": "human name", ...}, gives other class names than the folders
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch synthetic_recognition.py --preset birdsnap "$@"
