#!/usr/bin/env bash
# DistDiff on DTD: 47 textures, 3,760 real images (train and val of partition 1), 5 copies of each, ResNet-50 from scratch.
#
# Expect: the paper has a figure only; not run by us
# Cost:   18,800 guided images at about 60 TFLOP each (counted); the paper: 69 hours of one RTX 3090
# Data:   downloaded to data/
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch distdiff.py --preset dtd "$@"
