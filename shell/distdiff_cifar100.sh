#!/usr/bin/env bash
# DistDiff on 100 images per class of CIFAR-100: 10,000 real images, 5 copies of each, ResNet-50 from scratch.
#
# Expect: the paper has a figure only; not run by us
# Plan:   --plan h100 --plan-processes 8 (estimated, not measured; the paper, DistDiff alone: 182 hours of one RTX 3090):
#         19.7 GPU-hours on 8 x h100 (2.5 h, loading 1.4 h), 150,000 images, 9,550 PFLOP, 15 GB of images, 41 GB per GPU
# Data:   downloaded to data/
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch distdiff.py --preset cifar100 "$@"
