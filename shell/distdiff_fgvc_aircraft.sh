#!/usr/bin/env bash
# DistDiff on FGVC-Aircraft: 100 aircraft variants, 3,334 real images (the train split), 5 copies of each, ResNet-50 from scratch.
#
# Expect: no figure in the paper; not run by us
# Plan:   --plan h100 --plan-processes 8 (estimated, not measured):
#         6.7 GPU-hours on 8 x h100 (0.84 h, loading 0.47 h), 50,010 images, 3,190 PFLOP, 5 GB of images, 41 GB per GPU
# Data:   downloaded to data/
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch distdiff.py --preset fgvc_aircraft "$@"
