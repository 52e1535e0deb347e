#!/usr/bin/env bash
# DistDiff on DTD: 47 textures, 3,760 real images (train and val of partition 1), 5 copies of each, ResNet-50 from scratch.
#
# Expect: the paper has a figure only; not run by us
# Plan:   --plan h100 --plan-processes 8 (estimated, not measured; the paper, DistDiff alone: 69 hours of one RTX 3090):
#         7.2 GPU-hours on 8 x h100 (0.9 h, loading 0.49 h), 56,400 images, 3,580 PFLOP, 5.7 GB of images, 41 GB per GPU
# Data:   downloaded to data/
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch distdiff.py --preset dtd "$@"
