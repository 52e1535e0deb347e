#!/usr/bin/env bash
# Few-shot on Caltech101: 1, 2, 4, 8 and 16 real images per class, Real Guidance, CLIP RN50 head.
#
# Expect: the paper shows a curve only; not run by us
# Plan:   --plan h100 --plan-processes 8 (estimated, not measured):
#         61.7 GPU-hours on 8 x h100 (7.7 h), 600,000 images, 54,700 PFLOP, 241 GB of images, 14.5 GB per GPU
# GLIDE:  add --sd-model glide:DIR for the paper's generator, 82 TFLOP an image; see docs/synthetic_recognition.md
# Data:   below data/; the paper uses CoOp splits: --split-file split_zhou_<Name>.json
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch synthetic_recognition.py --preset caltech101-few-shot "$@"
