from faults.fault import Fault

FAULTS = {
    "gafi.py": [
        Fault(
            "filter keeps what it should drop",
            "return confidence(probs, label) > threshold",
            "return confidence(probs, label) <= threshold",
            tests="test_golden_mask",
        ),
        Fault(
            "average that forgets at once",
            "[n for _, n in floats], 1 - decay)",
            "[n for _, n in floats], 1.0)",
            tests="test_golden_ema_and_rate",
        ),
    ],
}
