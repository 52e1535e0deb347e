#!/usr/bin/env bash
# Pre-training of DeiT-S on 2.4 and 4.0 million images of 2,000 ImageNet names, then CIFAR-100.
#
# Expect: top-1 69.29 without pre-training, 88.57, 88.91 (the paper's Table 9; not run by us)
# Plan:   --plan h100 --plan-processes 8 (estimated, not measured):
#         1,240 GPU-hours on 8 x h100 (155 h, loading 63.8 h), 3,996,000 images, 827,000 PFLOP, 52.4 GB of images, 8.2 GB per GPU
# GLIDE:  add --sd-model glide:DIR for the paper's generator, 82 TFLOP an image; see docs/synthetic_recognition.md
# Data:   CIFAR-100 is downloaded to data/
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch synthetic_recognition.py --preset cifar100-deit-2k "$@"
