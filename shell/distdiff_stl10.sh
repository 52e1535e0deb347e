#!/usr/bin/env bash
# DistDiff on STL-10: 10 classes, 5,000 real images of 96 pixels, 5 copies of each, ResNet-50 from scratch.
#
# Expect: no figure in the paper; not run by us
# Plan:   --plan h100 --plan-processes 8 (estimated, not measured):
#         9.9 GPU-hours on 8 x h100 (1.2 h, loading 0.7 h), 75,000 images, 4,780 PFLOP, 7.5 GB of images, 41 GB per GPU
# Data:   downloaded to data/
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch distdiff.py --preset stl10 "$@"
