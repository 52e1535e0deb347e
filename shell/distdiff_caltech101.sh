#!/usr/bin/env bash
# DistDiff on Caltech-101: 100 classes, 3,000 real images, 5 copies of each, ResNet-50 from scratch.
#
# Expect: top-1 real 66.7, SD 76.6, DistDiff 83.1 (the paper's, on a split that is not published; not run by us)
# Plan:   --plan h100 --plan-processes 8 (estimated, not measured; the paper, DistDiff alone: 55 hours of one RTX 3090):
#         6 GPU-hours on 8 x h100 (0.75 h, loading 0.42 h), 45,000 images, 2,870 PFLOP, 4.5 GB of images, 41 GB per GPU
# Data:   downloaded to data/
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch distdiff.py --preset caltech101 "$@"
