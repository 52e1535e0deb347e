#!/usr/bin/env bash
# Few-shot on SUN397: 1, 2, 4, 8 and 16 real images per class, Real Guidance, CLIP RN50 head.
#
# Expect: 16 shots: 71.7 real only, 72.2 mix (read off the paper's Figure 1; not run by us)
# Plan:   --plan h100 --plan-processes 8 (estimated, not measured):
#         245 GPU-hours on 8 x h100 (30.6 h), 2,382,000 images, 217,000 PFLOP, 955 GB of images, 14.5 GB per GPU
# GLIDE:  add --sd-model glide:DIR for the paper's generator, 82 TFLOP an image; see docs/synthetic_recognition.md
# Data:   below data/; the paper uses CoOp splits: --split-file split_zhou_<Name>.json
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch synthetic_recognition.py --preset sun397-few-shot "$@"
