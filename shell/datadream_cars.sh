#!/usr/bin/env bash
# DataDream on Stanford Cars: 196 classes, 16 real and 500 generated images each, CLIP ViT-B/16 with LoRA.
#
# Expect: top-1 92.4 with --mode dset (default), 91.2 with --mode cls, 87.5 real shots only (the paper's; not run by us)
# Cost:   hours of one A100, estimated from FLOPs: tuning 8.2 to 13, images 20 to 26; 39 GB of PNG;
#         classifier: 60 epochs of 195,216 images per row and seed, bound by loading (250 images/s with 16 cores)
# Data:   put into data/ by hand; the paper's split: --split-file split_zhou_StanfordCars.json
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch datadream.py --preset cars --sd-micro-batch 1 --clf-micro-batch 32 "$@"
