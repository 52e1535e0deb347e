#!/usr/bin/env bash
# Real-Fake on CIFAR-10, our extension: the paper's code has no trace of it. 32 -> 512 -> 32 pixels, ResNet-18 with a CIFAR stem.
#
# Expect: no figure known; not run by us
# Plan:   --plan h100 --plan-processes 8 (estimated, not measured):
#         6.3 GPU-hours on 8 x h100 (0.78 h, loading 0.2 h), 50,000 images, 4,210 PFLOP, 0.078 GB of images, 11.9 GB per GPU
# Data:   downloaded to data/
# Faster: --sd-batch 64 --sd-lr 2.8e-4 tunes in an eighth of the steps; the released recipe is 8 at 1e-4
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch realfake.py --preset cifar10 "$@"
