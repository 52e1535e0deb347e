#!/usr/bin/env bash
# DistDiff on FGVC-Aircraft: 100 aircraft variants, 3,334 real images (the train split), 5 copies of each, ResNet-50 from scratch.
#
# Expect: no figure in the paper; not run by us
# Cost:   16,670 guided images at about 60 TFLOP each (counted)
# Data:   downloaded to data/
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch distdiff.py --preset fgvc_aircraft "$@"
