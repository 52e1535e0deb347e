#!/usr/bin/env bash
# GaFi on CIFAR-10: three BigGAN-deep of 500 epochs, ResNet-20 (width 64) on 40,000 generated images, no image twice.
#
# Expect: accuracy 1.78 points below the same ResNet-20 trained on the real images
#         (the paper's abstract; chosen on test images, --select-on test; not run by us)
# Cost:   32 h of one GPU at 60 TFLOP/s (estimate from FLOPs; fp32 reaches less).
#         One GAN per process, then the search runs are shared out
# Data:   downloaded to data/
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
at_most=3 launch gafi.py --preset cifar10 --compile "$@"
