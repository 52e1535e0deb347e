#!/usr/bin/env bash
# Real-Fake on ImageNet-1K, one version (--gen-versions 10 --net-versions 1 10 for ten), ResNet-50 from scratch.
#
# Expect: top-1 70.9 with one version, 76.0 with ten (the paper's abstract); not run by us
# Plan:   --plan h100 --plan-processes 8 (estimated, not measured):
#         802 GPU-hours on 8 x h100 (100 h, loading 92.5 h), 1,281,167 images, 168,000 PFLOP, 67.2 GB of images, 11.9 GB per GPU
# Data:   data/ with ImageNet's train/<wnid> and val/<wnid>
# Faster: --sd-batch 64 --sd-lr 2.8e-4 tunes in an eighth of the steps; the released recipe is 8 at 1e-4
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch realfake.py --preset imagenet1k "$@"
