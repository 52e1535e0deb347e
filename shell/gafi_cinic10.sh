#!/usr/bin/env bash
# GaFi on CINIC-10: train and valid pooled, three BigGAN-deep of 500 epochs, 17,000 generated images per class and set.
#
# Expect: no figure is known to us
# Plan:   --plan h100 --plan-processes 3 (estimated, not measured):
#         45.2 GPU-hours on 3 x h100 (15.1 h), 1,000 images, 29,000 PFLOP, 0.0061 GB of images, 13.6 GB per GPU
# Data:   unpack CINIC-10.tar.gz into data/CINIC-10 (train/, valid/, test/)
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
at_most=3 launch gafi.py --preset cinic10 --compile "$@"
