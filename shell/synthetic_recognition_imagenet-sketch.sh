#!/usr/bin/env bash
# Zero-shot on ImageNet-Sketch: 1000 class names, two sets of 2000 images each (B and LE), head of CLIP RN50 tuned.
#
# Expect: top-1 33.29 -> 36.55 (the paper's Table 1; not run by us); ViT-B/16: 46.20 -> 48.47
#         with --head-clip ViT-B-16-quickgelu/openai
# Plan:   --plan h100 --plan-processes 8 (estimated, not measured):
#         735 GPU-hours on 8 x h100 (91.9 h), 4,000,000 images, 653,000 PFLOP, 1,600 GB of images, 9.9 GB per GPU
# GLIDE:  add --sd-model glide:DIR for the paper's generator, 82 TFLOP an image; see docs/synthetic_recognition.md
# Data:   give --data-dir DIR with DIR/train/<class>/ and DIR/test/<class>/
#         DIR/classes.json, {"folder": "human name", ...}, gives other class names than the folders
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch synthetic_recognition.py --preset imagenet-sketch "$@"
