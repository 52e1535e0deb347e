#!/usr/bin/env bash
# DataDream on FGVC-Aircraft: 100 classes, 16 real and 500 generated images each, CLIP ViT-B/16 with LoRA.
#
# Expect: top-1 72.3 with --mode dset (default), 68.3 with --mode cls, 59.3 real shots only (the paper's; not run by us)
# Plan:   --plan h100 --plan-processes 8 (estimated, not measured):
#         42.1 GPU-hours on 8 x h100 (5.3 h, loading 3.9 h), 100,000 images, 14,500 PFLOP, 40.1 GB of images, 8.6 GB per GPU
# Data:   downloaded to data/; official splits of the variants
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch datadream.py --preset fgvc_aircraft "$@"
