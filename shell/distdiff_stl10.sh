#!/usr/bin/env bash
# DistDiff on STL-10: 10 classes, 5,000 real images of 96 pixels, 5 copies of each, ResNet-50 from scratch.
#
# Expect: no figure in the paper; not run by us
# Cost:   25,000 guided images at about 60 TFLOP each (counted)
# Data:   downloaded to data/
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch distdiff.py --preset stl10 "$@"
