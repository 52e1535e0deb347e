#!/usr/bin/env bash
# Real-Fake on ImageNet-100, one version, ResNet-50 from scratch with ImageNette's recipe (its own is not released).
#
# Expect: the paper's figure could not be read; not run by us
# Cost:   estimated at 125 TFLOP/s: ten times the images of ImageNette: 11 GPU-hours; tuning 8
# Data:   data/ with ImageNet's train/<wnid> and val/<wnid>
# Tuning: eight matching batches of 8 are averaged per step, so an eighth of the released number of steps
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch realfake.py --preset imagenet100 --sd-batch 64 "$@"
