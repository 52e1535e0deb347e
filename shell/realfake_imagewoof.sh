#!/usr/bin/env bash
# Real-Fake on ImageWoof, 10 dog breeds of ImageNet, one version, ResNet-50 from scratch.
#
# Expect: no figure known; not run by us
# Cost:   estimated at 125 TFLOP/s: about that of ImageNette
# Data:   data/ with ImageNet's train/<wnid> and val/<wnid>
# Tuning: eight matching batches of 8 are averaged per step, so an eighth of the released number of steps
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch realfake.py --preset imagewoof --sd-batch 64 "$@"
