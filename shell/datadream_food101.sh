#!/usr/bin/env bash
# DataDream on Food-101: 101 classes, 16 real and 500 generated images each, CLIP ViT-B/16 with LoRA.
#
# Expect: top-1 87.6 with --mode dset (default), 87.5 with --mode cls, 87.6 real shots only (the paper's; not run by us)
# Cost:   hours of one A100, estimated from FLOPs: tuning 4.2 to 6.7, images 10 to 13; 20 GB of PNG;
#         classifier: 60 epochs of 100,596 images per row and seed, bound by loading (250 images/s with 16 cores)
# Data:   downloaded to data/; the paper's split: --split-file split_zhou_Food101.json
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch datadream.py --preset food101 --sd-micro-batch 1 --clf-micro-batch 32 "$@"
