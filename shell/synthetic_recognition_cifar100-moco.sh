#!/usr/bin/env bash
# Pre-training of a ResNet-50 with MoCo v2 on 1.2 and 2.4 million images of ImageNet's 1,000 names, then CIFAR-100.
# Start: random weights and ImageNet's; 200 epochs at batch 256, queue 65,536.
#
# Expect: no figure; the paper judges these networks by detection (Tables 10 and 11), which is out of scope here
# Plan:   --plan h100 --plan-processes 8 (estimated, not measured):
#         1,540 GPU-hours on 8 x h100 (193 h, loading 138 h), 2,395,200 images, 536,000 PFLOP, 31.4 GB of images, 8.2 GB per GPU
# GLIDE:  add --sd-model glide:DIR for the paper's generator, 82 TFLOP an image; see docs/synthetic_recognition.md
# Data:   CIFAR-100 is downloaded to data/
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch synthetic_recognition.py --preset cifar100-moco "$@"
