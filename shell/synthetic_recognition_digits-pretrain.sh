#!/usr/bin/env bash
# Pre-training on scikit-learn's handwritten digits with the tiny models, on a CPU without network.
#
# Expect: the table in docs/synthetic_recognition.md
# Cost:   minutes on 2 cores
python synthetic_recognition.py --preset digits-pretrain "$@"
