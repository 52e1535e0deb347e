#!/usr/bin/env bash
# Pre-training of ResNet-50 on 1.2, 2.4 and 3.6 million images of the CIFAR-100 names, then CIFAR-100.
#
# Expect: top-1 78.83 without pre-training, 83.90, 85.03, 85.24; from ImageNet's weights 84.50, 84.90, 85.32, 85.52
#         (the paper's Table 8; not run by us)
# Plan:   --plan h100 --plan-processes 8 (estimated, not measured):
#         830 GPU-hours on 8 x h100 (104 h, loading 21.3 h), 3,600,000 images, 689,000 PFLOP, 47.2 GB of images, 8.2 GB per GPU
# GLIDE:  add --sd-model glide:DIR for the paper's generator, 82 TFLOP an image; see docs/synthetic_recognition.md
# Data:   CIFAR-100 is downloaded to data/
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch synthetic_recognition.py --preset cifar100-pretrain "$@"
