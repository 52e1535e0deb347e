from faults.fault import Fault

FAULTS = {
    "distdiff.py": [
        Fault(
            "no projection into the ball",
            "return torch.minimum(torch.maximum(v, z - radius), z + radius)",
            "return v",
            tests="test_golden_projection",
        ),
        Fault(
            "energy of squared distances",
            "return lam_class * (f - p).norm(dim=1)",
            "return lam_class * (f - p).norm(dim=1).square()",
            tests="test_golden_transform_guidance",
        ),
    ],
}
