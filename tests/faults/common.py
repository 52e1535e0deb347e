from faults.fault import Fault

FAULTS = {
    "common/diffusion.py": [
        Fault(
            "scaling factor forgotten in decoding",
            "part / pipe.vae.config.scaling_factor",
            "part",
            tests="tests/test_datadream.py::test_drawn_images_equal_those_of_a_stock_pipeline",
        ),
        Fault(
            "adapter left on",
            "            weight.copy_(stock)\n",
            "            pass\n",
            tests="tests/test_datadream.py::test_drawn_images_equal_those_of_a_stock_pipeline",
        ),
        Fault(
            "LoRA starts with a unit Gaussian",
            "generator=generator(*seed, name)) / r if",
            "generator=generator(*seed, name)) if",
            tests="tests/test_datadream.py::test_tuning_equals_a_plain_loop_over_stock_parts",
        ),
    ],
}
