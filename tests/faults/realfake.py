from faults.fault import Fault

FAULTS = {
    "realfake.py": [
        Fault(
            "min-SNR weight upside down",
            "return snr.clamp(max=gamma) / snr",
            "return snr / snr.clamp(max=gamma)",
            tests="test_golden_snr",
        ),
        Fault(
            "matching term of the mean residual",
            "r).sum(0).pow(2).mean()",
            "r).mean(0).pow(2).mean()",
            tests="test_golden_loss",
        ),
    ],
}
