#!/usr/bin/env bash
# DataDream on Food-101: 101 classes, 16 real and 500 generated images each, CLIP ViT-B/16 with LoRA.
#
# Expect: top-1 87.6 with --mode dset (default), 87.5 with --mode cls, 87.6 real shots only (the paper's; not run by us)
# Plan:   --plan h100 --plan-processes 8 (estimated, not measured):
#         42.8 GPU-hours on 8 x h100 (5.3 h, loading 4 h), 101,000 images, 14,800 PFLOP, 40.5 GB of images, 8.6 GB per GPU
# Data:   downloaded to data/; the paper's split: --split-file split_zhou_Food101.json
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch datadream.py --preset food101 "$@"
