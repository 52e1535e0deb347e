#!/usr/bin/env bash
# Real-Fake on CIFAR-10, our extension: the paper's code has no trace of it. 32 -> 512 -> 32 pixels, ResNet-18 with a CIFAR stem.
#
# Expect: no figure known; not run by us
# Cost:   estimated at 125 TFLOP/s: images 4.3 GPU-hours
# Data:   downloaded to data/
# Tuning: eight matching batches of 8 are averaged per step, so an eighth of the released number of steps
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch realfake.py --preset cifar10 --sd-batch 64 "$@"
