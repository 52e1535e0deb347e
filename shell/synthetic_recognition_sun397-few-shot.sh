#!/usr/bin/env bash
# Few-shot on SUN397: 1, 2, 4, 8 and 16 real images per class, Real Guidance, CLIP RN50 head.
#
# Expect: 16 shots: 71.7 real only, 72.2 mix (read off the paper's Figure 1; not run by us)
# Cost:   199 GPU hours for the images, estimated: 163 TFLOP from noise, 27 to 83 from a shot, at 300 TFLOP/s
# GLIDE:  add --sd-model glide:DIR for the paper's generator, 82 TFLOP an image; see docs/synthetic_recognition.md
# Data:   below data/; the paper uses CoOp splits: --split-file split_zhou_<Name>.json
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch synthetic_recognition.py --preset sun397-few-shot "$@"
