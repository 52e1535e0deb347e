#!/usr/bin/env bash
# DistDiff on Flowers-102: 102 flowers, 1,020 real images (the train split), 5 copies of each, ResNet-50 from scratch.
#
# Expect: no figure in the paper; not run by us
# Cost:   5,100 guided images at about 60 TFLOP each (counted)
# Data:   downloaded to data/
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch distdiff.py --preset flowers102 "$@"
