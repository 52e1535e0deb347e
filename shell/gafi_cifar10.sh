#!/usr/bin/env bash
# GaFi on CIFAR-10: three BigGAN-deep of 500 epochs, ResNet-20 (width 64) on 40,000 generated images, no image twice.
#
# Expect: accuracy 1.78 points below the same ResNet-20 trained on the real images
#         (the paper's abstract; chosen on test images, --select-on test; not run by us)
# Plan:   --plan h100 --plan-processes 3 (estimated, not measured):
#         16.9 GPU-hours on 3 x h100 (5.6 h), 1,000 images, 7,470 PFLOP, 0.0061 GB of images, 14.5 GB per GPU
# Note:   One GAN per process, then the search runs are shared out. With NPROC=8 five GPUs wait for the GANs (3.7 h);
#         --gan-micro-batch 24 lets eight share a GAN (2.3 h), each with BatchNorm statistics of 24 images
# Data:   downloaded to data/
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
at_most=3 launch gafi.py --preset cifar10 --compile "$@"
