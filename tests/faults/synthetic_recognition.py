from faults.fault import Fault

FAULTS = {
    "synthetic_recognition.py": [
        Fault(
            "student divided by T too",
            "return F.cross_entropy(z, (z0 / T).softmax(-1))",
            "return F.cross_entropy(z / T, (z0 / T).softmax(-1))",
            tests="test_golden_soft_loss",
        ),
        Fault(
            "templates averaged before they are normalised",
            "scale * F.normalize(F.normalize(text, dim=-1).mean(1), dim=-1)",
            "scale * F.normalize(text.mean(1), dim=-1)",
            tests="test_golden_zero_shot_head",
        ),
        # [3] generate
        Fault(
            "range of stage II doubled again",
            'output_type="pt", **text).images.float()',
            'output_type="pt", **text).images.float() * 2 - 1',
            tests="test_upsampler_equals_the_stock_pipeline",
        ),
    ],
}
