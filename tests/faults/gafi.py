from faults.fault import Fault

GAN = "test_gan_training_equals_a_plain_loop_over_stock_parts"
CLASSIFIER = "test_classifier_training_equals_a_plain_loop_over_stock_parts"
SETS = "test_sets_equal_a_plain_filter_loop"
SEARCH = "test_search_and_rows_train_on_what_they_record"
PRESETS = "test_presets_are_the_methods_table"
STREAM = "test_stream_is_a_function_of_class_and_index_and_expansion_scales_it"
PRECISION = "test_precision_of_the_gan_is_its_own_and_fp32_as_in_the_paper"

FAULTS = {
    "gafi.py": [
        # flags and presets
        Fault("width of a preset", "    resnet_width: Width = 64", "    resnet_width: Width = 32", tests=PRESETS),
        Fault("width of the GAN", "10_000)] = 128", "10_000)] = 96", tests=PRESETS),
        Fault("batch of a preset", "    gan_batch: Many = 192", "    gan_batch: Many = 64", tests=PRESETS),
        Fault(
            "epochs of a preset",
            'dataset="fashionmnist", data_dir="data", gan_epochs=300',
            'dataset="fashionmnist", data_dir="data", gan_epochs=500',
            tests=PRESETS,
        ),
        Fault(
            "epochs of the miniature", "resnet_epochs=10, real_epochs=15", "resnet_epochs=10, real_epochs=10", PRESETS
        ),
        Fault(
            "average of DermaMNIST as long as the others'",
            "gan_epochs=150, gan_ema=0.999,",
            "gan_epochs=150,",
            tests=PRESETS,
        ),
        Fault("CINIC-10 in fp32", ', precision="bf16",\n    ),', ",\n    ),", tests=PRESETS),
        Fault("mirror for digits", "val_per_class=20, random_flip=False,", "val_per_class=20,", tests=PRESETS),
        Fault(
            "rate without a range",
            "    gan_lr: Rate = 2e-4",
            "    gan_lr: float = 2e-4",
            tests="test_every_number_out_of_its_range_is_refused_at_the_start",
        ),
        Fault(
            "data not looked at first",
            "    check_data(args, data)\n",
            "",
            tests="test_what_cannot_work_is_told_before_the_first_stage",
        ),
        # classifiers
        Fault(
            "no augmentation", "augmented(x[rows].float(), args, g).contig", "x[rows].float().contig", tests=CLASSIFIER
        ),
        Fault(
            "drops ignored",
            "lr_at(epoch, args.resnet_lr, args.resnet_drops)",
            "lr_at(epoch, args.resnet_lr, ())",
            tests=CLASSIFIER,
        ),
        Fault("weight decay 0", "args.resnet_lr, args.resnet_wd, args", "args.resnet_lr, 0.0, args", tests=CLASSIFIER),
        Fault("momentum ignored", "args.resnet_wd, args.resnet_momentum)", "args.resnet_wd)", tests=CLASSIFIER),
        Fault(
            "test split scored in the search",
            'if "row" in about or sets.select_on == "test" else',
            "if True else",
            CLASSIFIER,
        ),
        Fault(
            "epoch chosen on test",
            "if row[sets.select_on] > best",
            'if row["test"] > best',
            tests="test_epoch_is_chosen_on_the_split_that_is_named",
        ),
        Fault("F chosen on test", 'args.real_epochs, "val"', "args.real_epochs, args.select_on", tests=SEARCH),
        # [2] gan
        Fault(
            "validation images missing from the GAN's set",
            'splits = [data.train, data.val] if args.gan_images == "train+val" else',
            "splits = [data.train, data.val] if False else",
            tests=GAN,
        ),
        Fault(
            "mirror whatever the flag",
            "x = mirrored(x, coins[rows]) if args.random_flip else x",
            "x = mirrored(x, coins[rows])",
            tests=GAN,
        ),
        Fault("every step the same images", "order[i * b : (i + 1) * b]", "order[:b]", tests=GAN),
        Fault("every step the same latents", "DRAWN_STEPS)[i % DRAWN_STEPS]", "DRAWN_STEPS)[0]", tests=GAN),
        Fault(
            "fake labels random",
            "fake = self.g(z, y)  # the fake",
            "fake = self.g(z, y[torch.randperm(len(y))])  # the fake",
            tests=GAN,
        ),
        Fault("D steps 1", "for i, z_d in enumerate(z_of_d, 1):", "for i, z_d in enumerate(z_of_d[:1], 1):", tests=GAN),
        Fault("G never trained", "for u in loop.units(b, of=self.g_adam):", "for u in loop.units(b):", tests=GAN),
        Fault("D at G's rate", "lr=args.gan_d_lr or args.gan_lr", "lr=args.gan_lr", tests=GAN),
        Fault(
            "raw G saved",
            "dict(gan.ema.state_dict()))",
            "dict(gan.g.state_dict()))",
            tests=GAN,
        ),
        Fault("start of the average ignored", "    if step <= start:\n", "    if step <= 0:\n", tests=GAN),
        Fault(
            "decay of the average ignored",
            "args.gan_ema_start, args.gan_ema)",
            "args.gan_ema_start, 0.9999)",
            tests=GAN,
        ),
        Fault(
            "average that forgets at once",
            "[n for _, n in floats], 1 - decay)",
            "[n for _, n in floats], 1.0)",
            tests="test_golden_ema_and_rate",
        ),
        Fault(
            "GAN in the precision of the pipeline",
            "with autocast(self.args.gan_precision, x.device):",
            "with autocast(self.args.precision, x.device):",
            tests=PRECISION,
        ),
        Fault(
            "parts of a batch are added, not averaged",
            "loop.backward(self.loss_of_d(z_d[u], x[u], y[u]) * (len(y[u]) / b))",
            "loop.backward(self.loss_of_d(z_d[u], x[u], y[u]))",
            tests="test_a_batch_in_parts_is_the_mean_of_its_parts",
        ),
        # samples and sets
        Fault(
            "wrong predictions are confident too",
            "torch.where(probs.argmax(1) == label, p, -torch.ones_like(p))",
            "p",
            tests="test_golden_mask test_golden_filter",
        ),
        Fault("set not filtered", "passed = x[conf > threshold]", "passed = x", tests=f"{SETS} test_golden_filter"),
        Fault("a draw begins again", "self.used.update(sizes)", "pass", tests=f"{SETS} {STREAM}"),
        Fault("sigma does not reach the sampler", "return self.sigma * z[start", "return z[start", f"{SETS} {STREAM}"),
        Fault(
            "sigma of the source ignored",
            "Samples(source.sampler, source.sigma, self.n,",
            "Samples(source.sampler, 1.0, self.n,",
            tests=SETS,
        ),
        Fault(
            "threshold ignored",
            "-math.inf if source.threshold is None else source.threshold",
            "-math.inf if source.threshold is None else 0.0",
            tests=SETS,
        ),
        Fault(
            "unfiltered source is filtered",
            "-math.inf if source.threshold is None else source.threshold",
            "source.threshold or 0.0",
            tests=SETS,
        ),
        Fault("baseline filtered", 'fixed set", filtered=False)', 'fixed set")', tests="test_rows_of_the_table"),
        Fault("recycle keeps the old set", "(epoch - 1) // self.period if self.period else 0", "0", tests=SETS),
        Fault(
            "set of MultiGAN from one generator",
            "[self.draw(source, j) for source in self.sources]",
            "[self.draw(self.sources[0], j) for source in self.sources]",
            tests=SETS,
        ),
        Fault(
            "row multi of one generator",
            "args.gan_seeds if recipe.every_gan else",
            "args.gan_seeds[:1] if recipe.every_gan else",
            tests="test_rows_of_the_table",
        ),
        # [3] search
        Fault(
            "test split in the search",
            "= args.resnet_epochs, args.select_on",
            '= args.resnet_epochs, "test"',
            tests=SEARCH,
        ),
        Fault(
            "sigma of the search not sampled",
            "Source(seed, sampler, sigma, threshold),",
            "Source(seed, sampler, 1.0, threshold),",
            tests=SEARCH,
        ),
        Fault(
            "threshold of the search not applied",
            "Source(seed, sampler, sigma, threshold),",
            "Source(seed, sampler, sigma),",
            tests=SEARCH,
        ),
        Fault(
            "search that forgets its choices",
            "(seed, *b[:i], value, *b[i + 1 :])",
            "(seed, *(150, 1.0, 0.0)[:i], value, *b[i + 1 :])",
            tests="test_search_visits_the_grids_in_order_and_ties_go_to_the_first",
        ),
    ],
    "common/augment.py": [
        Fault(
            "crop padded with black",
            "x = F.pad(x, (pad,) * 4)\n",
            "x = F.pad(x, (pad,) * 4, value=-1)\n",
            tests=f"tests/test_gafi.py::{CLASSIFIER} tests/test_gafi.py::test_golden_augmentation",
        ),
    ],
    "common/sgdw.py": [
        Fault(
            "weight decay scaled by the rate",
            'torch._foreach_mul_(params, 1 - group["wd"])',
            'torch._foreach_mul_(params, 1 - group["wd"] * lr)',
            tests=f"tests/test_gafi.py::{CLASSIFIER}",
        ),
    ],
    "common/spectral.py": [
        Fault(
            "layers of one shape share the first one's norm",
            "w / sigma[:, None, None]",
            "w / sigma[:1, None, None]",
            tests="tests/test_gafi.py::test_layers_of_one_shape_are_normed_as_each_alone",
        ),
        Fault(
            "spectral-norm vectors stand still",
            "        if layers[0].training:\n",
            "        if False:\n",
            tests=f"tests/test_gafi.py::test_golden_spectral_norm tests/test_gafi.py::{GAN}",
        ),
    ],
    "common/plans/gafi.py": [
        Fault(
            "repeated configurations counted",
            "sigma=grids[1] - 1",
            "sigma=grids[1]",
            tests="tests/test_common_plan.py::test_gafi_counts_its_networks_and_the_runs_of_the_search",
        ),
        Fault(
            "one update of D counted",
            "one = args.gan_d_steps * (",
            "one = (",
            tests="tests/test_common_plan.py::test_gafi_counts_its_networks_and_the_runs_of_the_search",
        ),
    ],
}
