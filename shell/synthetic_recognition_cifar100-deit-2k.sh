#!/usr/bin/env bash
# Pre-training of DeiT-S on 2.4 and 4.0 million images of 2,000 ImageNet names, then CIFAR-100.
#
# Expect: top-1 69.29 without pre-training, 88.57, 88.91 (the paper's Table 9; not run by us)
# Cost:   604 GPU hours for the images, estimated: 163 TFLOP an image at 300 TFLOP/s
# GLIDE:  add --sd-model glide:DIR for the paper's generator, 82 TFLOP an image; see docs/synthetic_recognition.md
# Data:   CIFAR-100 is downloaded to data/
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch synthetic_recognition.py --preset cifar100-deit-2k "$@"
