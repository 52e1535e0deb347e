#!/usr/bin/env bash
# Pre-training of ResNet-50 on images of ImageNet's 1,000 names, with labels, from random weights and from ImageNet's,
# then CIFAR-100. MoCo v2: synthetic_recognition_cifar100-moco.sh
#
# Expect: no figure; the paper judges these networks by detection (Tables 10 and 11), which is out of scope here
# Plan:   --plan h100 --plan-processes 8 (estimated, not measured):
#         531 GPU-hours on 8 x h100 (66.4 h, loading 11.5 h), 2,395,200 images, 443,000 PFLOP, 31.4 GB of images, 8.2 GB per GPU
# GLIDE:  add --sd-model glide:DIR for the paper's generator, 82 TFLOP an image; see docs/synthetic_recognition.md
# Data:   CIFAR-100 is downloaded to data/
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch synthetic_recognition.py --preset cifar100-agnostic "$@"
