#!/usr/bin/env bash
# Few-shot on scikit-learn's handwritten digits with the tiny models, on a CPU without network.
#
# Expect: 4 shots: 83 real only, 87 with Real Guidance; the rest in docs/synthetic_recognition.md
# Cost:   83 s on two idle cores
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
at_most=1 launch synthetic_recognition.py --preset digits-few-shot "$@"
