#!/usr/bin/env bash
# Few-shot on Stanford Cars: 1, 2, 4, 8 and 16 real images per class, Real Guidance, CLIP RN50 head.
#
# Expect: the paper shows a curve only; not run by us
# Cost:   98 GPU hours for the images, estimated: 163 TFLOP from noise, 27 to 83 from a shot, at 300 TFLOP/s
# GLIDE:  add --sd-model glide:DIR for the paper's generator, 82 TFLOP an image; see docs/synthetic_recognition.md
# Data:   below data/; the paper uses CoOp splits: --split-file split_zhou_<Name>.json
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch synthetic_recognition.py --preset cars-few-shot "$@"
