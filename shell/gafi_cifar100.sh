#!/usr/bin/env bash
# GaFi on CIFAR-100: three BigGAN-deep of 500 epochs, 400 generated images per class and set; filtering gives up after
# ten draws of a class.
#
# Expect: accuracy 3.99 points below the same ResNet-20 trained on the real images
#         (the paper's abstract; chosen on test images, --select-on test; not run by us)
# Plan:   --plan h100 --plan-processes 3 (estimated, not measured):
#         16.9 GPU-hours on 3 x h100 (5.6 h), 10,000 images, 7,470 PFLOP, 0.061 GB of images, 14.5 GB per GPU
# Data:   downloaded to data/
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
at_most=3 launch gafi.py --preset cifar100 --compile "$@"
