#!/usr/bin/env bash
# DistDiff on Oxford-IIIT Pets: 37 classes, 3,680 real images, 5 copies of each, ResNet-50 from scratch.
#
# Expect: no figure in the paper; not run by us
# Cost:   18,400 guided images at about 60 TFLOP each (counted)
# Data:   downloaded to data/
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch distdiff.py --preset pets "$@"
