#!/usr/bin/env bash
# DataDream on SUN397: 397 classes, 16 real and 500 generated images each, CLIP ViT-B/16 with LoRA.
#
# Expect: top-1 77.5 with --mode dset (default), 77.5 with --mode cls, 77.1 real shots only (the paper's; not run by us)
# Cost:   hours of one A100, estimated from FLOPs: tuning 17 to 26, images 40 to 53; 79 GB of PNG;
#         classifier: 60 epochs of 395,412 images per row and seed, bound by loading (250 images/s with 16 cores)
# Data:   put into data/ by hand; the paper's split: --split-file split_zhou_SUN397.json
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch datadream.py --preset sun397 --sd-micro-batch 1 --clf-micro-batch 32 "$@"
