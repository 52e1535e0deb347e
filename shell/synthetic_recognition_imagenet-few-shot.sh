#!/usr/bin/env bash
# Few-shot on ImageNet: 1, 2, 4, 8 and 16 real images per class, Real Guidance, CLIP RN50 head.
#
# Expect: the paper shows a curve only; not run by us
# Plan:   --plan h100 --plan-processes 8 (estimated, not measured):
#         617 GPU-hours on 8 x h100 (77.1 h), 6,000,000 images, 547,000 PFLOP, 2,410 GB of images, 14.5 GB per GPU
# GLIDE:  add --sd-model glide:DIR for the paper's generator, 82 TFLOP an image; see docs/synthetic_recognition.md
# Data:   data/imagenet with train/<wnid>/ and val/<wnid>/
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch synthetic_recognition.py --preset imagenet-few-shot "$@"
