#!/usr/bin/env bash
# Pre-training of DeiT-S on 1.2 and 2.4 million images of ImageNet's 1,000 names, then CIFAR-100.
#
# Expect: top-1 69.29 without pre-training, 87.98, 88.39; real ImageNet 88.07 (the paper's Table 9; not run by us)
# Cost:   362 GPU hours for the images, estimated: 163 TFLOP an image at 300 TFLOP/s
# GLIDE:  add --sd-model glide:DIR for the paper's generator, 82 TFLOP an image; see docs/synthetic_recognition.md
# Data:   CIFAR-100 is downloaded to data/
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch synthetic_recognition.py --preset cifar100-deit "$@"
