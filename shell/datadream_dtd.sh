#!/usr/bin/env bash
# DataDream on DTD textures: 47 classes, 16 real and 500 generated images each, CLIP ViT-B/16 with LoRA.
#
# Expect: top-1 74.1 with --mode dset (default), 73.1 with --mode cls, 73.9 real shots only (the paper's; not run by us)
# Plan:   --plan h100 --plan-processes 8 (estimated, not measured):
#         19.4 GPU-hours on 8 x h100 (2.4 h, loading 1.8 h), 47,000 images, 6,640 PFLOP, 18.9 GB of images, 9.6 GB per GPU
# Data:   downloaded to data/; the paper's split: --split-file split_zhou_DescribableTextures.json
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch datadream.py --preset dtd "$@"
