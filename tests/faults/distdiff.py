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
        Fault(
            "guide trained at the classifier's rate",
            "args.guide_pretrained, args.guide_epochs, args.guide_lr)",
            "args.guide_pretrained, args.guide_epochs, args.sgd_lr)",
            tests="test_guide_has_a_rate_of_its_own",
        ),
        Fault(
            "sides rounded down twice",
            "int(size * side / min(width, height))",
            "int(size / min(width, height) * side)",
            tests="test_resized_sides_are_those_of_torchvision",
        ),
    ],
}
