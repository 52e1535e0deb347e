#!/usr/bin/env bash
# Real-Fake on ImageNette, the 10 ImageNet classes with all of their images, one version, ResNet-50 from scratch.
#
# Expect: the paper's figure could not be read; not run by us
# Cost:   estimated at 125 TFLOP/s: tuning 8 GPU-hours, images 1.1, classifier 17 minutes a seed
# Data:   data/ with ImageNet's train/<wnid> and val/<wnid>; fast.ai's download has another split, not comparable
# Tuning: eight matching batches of 8 are averaged per step, so an eighth of the released number of steps
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch realfake.py --preset imagenette --sd-batch 64 "$@"
