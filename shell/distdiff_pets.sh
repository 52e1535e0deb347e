#!/usr/bin/env bash
# DistDiff on Oxford-IIIT Pets: 37 classes, 3,680 real images, 5 copies of each, ResNet-50 from scratch.
#
# Expect: no figure in the paper; not run by us
# Plan:   --plan h100 --plan-processes 8 (estimated, not measured):
#         7.1 GPU-hours on 8 x h100 (0.89 h, loading 0.5 h), 55,200 images, 3,510 PFLOP, 5.5 GB of images, 41 GB per GPU
# Data:   downloaded to data/
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch distdiff.py --preset pets "$@"
