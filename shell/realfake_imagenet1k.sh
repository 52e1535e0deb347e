#!/usr/bin/env bash
# Real-Fake on ImageNet-1K, one version (--gen-versions 10 --net-versions 1 10 for ten), ResNet-50 from scratch.
#
# Expect: top-1 70.9 with one version, 76.0 with ten (the paper's abstract); not run by us
# Cost:   estimated at 125 TFLOP/s: images 110 GPU-hours a version, classifier 43 a seed; 670 GB of PNG a version
# Data:   data/ with ImageNet's train/<wnid> and val/<wnid>
# Tuning: eight matching batches of 8 are averaged per step, so an eighth of the released number of steps
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch realfake.py --preset imagenet1k --sd-batch 64 "$@"
