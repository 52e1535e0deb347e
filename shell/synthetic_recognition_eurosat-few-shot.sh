#!/usr/bin/env bash
# Few-shot on EuroSAT: 1, 2, 4, 8 and 16 real images per class, Real Guidance, CLIP RN50 head.
#
# Expect: 16 shots: 85.8 real only, 87.10 B, 87.33 RF, 88.47 RG (the paper's; not run by us)
# Plan:   --plan h100 --plan-processes 8 (estimated, not measured):
#         6.3 GPU-hours on 8 x h100 (0.78 h), 60,000 images, 5,470 PFLOP, 24.1 GB of images, 14.5 GB per GPU
# GLIDE:  add --sd-model glide:DIR for the paper's generator, 82 TFLOP an image; see docs/synthetic_recognition.md
# Data:   below data/; the paper uses CoOp splits: --split-file split_zhou_<Name>.json
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch synthetic_recognition.py --preset eurosat-few-shot "$@"
