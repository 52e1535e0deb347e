#!/usr/bin/env bash
# Real-Fake on ImageWoof, 10 dog breeds of ImageNet, one version, ResNet-50 from scratch.
#
# Expect: no figure known; not run by us
# Plan:   --plan h100 --plan-processes 8 (estimated, not measured):
#         9.2 GPU-hours on 8 x h100 (1.1 h, loading 0.6 h), 12,454 images, 4,640 PFLOP, 0.65 GB of images, 11.9 GB per GPU
# Data:   data/ with ImageNet's train/<wnid> and val/<wnid>
# Faster: --sd-batch 64 --sd-lr 2.8e-4 tunes in an eighth of the steps; the released recipe is 8 at 1e-4
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch realfake.py --preset imagewoof "$@"
