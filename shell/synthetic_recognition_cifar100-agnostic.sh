#!/usr/bin/env bash
# Pre-training of ResNet-50 on images of ImageNet's 1,000 names, with labels and by MoCo v2, from random weights and from
# ImageNet's, then CIFAR-100.
#
# Expect: no figure; the paper judges these networks by detection (Tables 10 and 11), which is out of scope here
# Cost:   362 GPU hours for the images, estimated: 163 TFLOP an image at 300 TFLOP/s
# GLIDE:  add --sd-model glide:DIR for the paper's generator, 82 TFLOP an image; see docs/synthetic_recognition.md
# Data:   CIFAR-100 is downloaded to data/
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch synthetic_recognition.py --preset cifar100-agnostic "$@"
