#!/usr/bin/env bash
# Pre-training of DeiT-S on 1.2 and 2.4 million images of ImageNet's 1,000 names, then CIFAR-100.
#
# Expect: top-1 69.29 without pre-training, 87.98, 88.39; real ImageNet 88.07 (the paper's Table 9; not run by us)
# Plan:   --plan h100 --plan-processes 8 (estimated, not measured):
#         747 GPU-hours on 8 x h100 (93.3 h, loading 38.4 h), 2,395,200 images, 497,000 PFLOP, 31.4 GB of images, 8.2 GB per GPU
# GLIDE:  add --sd-model glide:DIR for the paper's generator, 82 TFLOP an image; see docs/synthetic_recognition.md
# Data:   CIFAR-100 is downloaded to data/
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch synthetic_recognition.py --preset cifar100-deit "$@"
