#!/usr/bin/env bash
# GaFi on DermaMNIST (7 classes, strongly imbalanced; the synthetic sets are balanced): three BigGAN-deep of 150 epochs.
#
# Expect: no figure is known to us
# Plan:   --plan h100 --plan-processes 3 (estimated, not measured):
#         1.5 GPU-hours on 3 x h100 (0.49 h), 700 images, 648 PFLOP, 0.0043 GB of images, 13.3 GB per GPU
# Data:   dermamnist.npz (28 x 28), downloaded to data/
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
at_most=3 launch gafi.py --preset dermamnist --compile "$@"
