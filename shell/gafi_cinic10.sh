#!/usr/bin/env bash
# GaFi on CINIC-10: train and valid pooled, three BigGAN-deep of 500 epochs, 17,000 generated images per class and set.
#
# Expect: no figure is known to us
# Cost:   126 h of one GPU at 60 TFLOP/s (estimate from FLOPs; the GANs' fp32 reaches less)
# Data:   unpack CINIC-10.tar.gz into data/CINIC-10 (train/, valid/, test/)
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
at_most=3 launch gafi.py --preset cinic10 --compile "$@"
