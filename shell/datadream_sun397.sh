#!/usr/bin/env bash
# DataDream on SUN397: 397 classes, 16 real and 500 generated images each, CLIP ViT-B/16 with LoRA.
#
# Expect: top-1 77.5 with --mode dset (default), 77.5 with --mode cls, 77.1 real shots only (the paper's; not run by us)
# Plan:   --plan h100 --plan-processes 8 (estimated, not measured):
#         167 GPU-hours on 8 x h100 (20.9 h, loading 15.4 h), 397,000 images, 58,500 PFLOP, 159 GB of images, 8.6 GB per GPU
# Data:   put into data/ by hand; the paper's split: --split-file split_zhou_SUN397.json
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch datadream.py --preset sun397 "$@"
