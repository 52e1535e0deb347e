#!/usr/bin/env bash
# Pre-training on scikit-learn's handwritten digits with the tiny models, on a CPU without network.
#
# Expect: 82 from random weights, 91 with 600 synthetic images; the rest in docs/synthetic_recognition.md
# Cost:   215 s on two idle cores with NPROC=2
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
at_most=1 launch synthetic_recognition.py --preset digits-pretrain "$@"
