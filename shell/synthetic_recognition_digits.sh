#!/usr/bin/env bash
# Zero-shot on scikit-learn's handwritten digits with the tiny models, on a CPU without network.
#
# Expect: not measured yet, see docs/synthetic_recognition.md
# Cost:   not measured yet
python synthetic_recognition.py --preset digits "$@"
