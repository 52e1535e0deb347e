#!/usr/bin/env bash
# GaFi on CIFAR-100: three BigGAN-deep of 500 epochs, 400 generated images per class and set; filtering gives up after
# ten draws of a class.
#
# Expect: accuracy 3.99 points below the same ResNet-20 trained on the real images
#         (the paper's abstract; chosen on test images, --select-on test; not run by us)
# Cost:   32 h of one GPU at 60 TFLOP/s (estimate from FLOPs; fp32 reaches less)
# Data:   downloaded to data/
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
at_most=3 launch gafi.py --preset cifar100 --compile "$@"
