#!/usr/bin/env bash
# DistDiff on Flowers-102: 102 flowers, 1,020 real images (the train split), 5 copies of each, ResNet-50 from scratch.
#
# Expect: no figure in the paper; not run by us
# Plan:   --plan h100 --plan-processes 8 (estimated, not measured):
#         2.4 GPU-hours on 8 x h100 (0.3 h, loading 0.19 h), 15,300 images, 990 PFLOP, 1.5 GB of images, 41 GB per GPU
# Data:   downloaded to data/
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch distdiff.py --preset flowers102 "$@"
