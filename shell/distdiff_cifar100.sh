#!/usr/bin/env bash
# DistDiff on 100 images per class of CIFAR-100: 10,000 real images, 5 copies of each, ResNet-50 from scratch.
#
# Expect: the paper has a figure only; not run by us
# Cost:   50,000 guided images at about 60 TFLOP each (counted); the paper: 182 hours of one RTX 3090
# Data:   downloaded to data/
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch distdiff.py --preset cifar100 "$@"
