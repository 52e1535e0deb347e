#!/usr/bin/env bash
# GaFi on DermaMNIST (7 classes, strongly imbalanced; the synthetic sets are balanced): three BigGAN-deep of 150 epochs.
#
# Expect: no figure is known to us
# Cost:   2.7 h of one GPU at 60 TFLOP/s (estimate from FLOPs; fp32 reaches less)
# Data:   data/dermamnist.npz (28 x 28), or pip install medmnist, which fetches it
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
at_most=3 launch gafi.py --preset dermamnist --compile "$@"
