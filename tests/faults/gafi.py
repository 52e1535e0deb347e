from faults.fault import Fault

GAN = "test_gan_training_equals_a_plain_loop_over_stock_parts"
CLASSIFIER = "test_classifier_training_equals_a_plain_loop_over_stock_parts"
SETS = "test_sets_equal_a_plain_filter_loop"
SEARCH = "test_search_and_rows_train_on_what_they_record"
PRESETS = "test_presets_are_the_methods_table"
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
            "grids without limit",
            "if (last - first) / step > MOST_VALUES:",
            "if False:",
            tests="test_bad_flags_are_refused_by_name",
        ),
        Fault(
            "rate without a range",
            "    gan_lr: Rate = 2e-4",
            "    gan_lr: float = 2e-4",
            tests="test_every_number_out_of_its_range_is_refused_at_the_start",
        ),
        Fault(
            "data not looked at first",
            "    check_data(args, data, n)\n",
            "",
            tests="test_what_cannot_work_is_told_before_the_first_stage",
        ),
        Fault(
            "other data unnoticed",
            ", data_dir=data_hash(data, class_names))",
            ")",
            tests="test_run_does_not_go_on_with_other_data",
        ),
        Fault(
            "hash of the sizes only",
            "found.update(np.ascontiguousarray(x.cpu().numpy())), found.update",
            "found.update",
            tests="test_run_does_not_go_on_with_other_data",
        ),
        # [2] gan
        Fault(
            "validation images missing from the GAN's set",
            'if args.gan_images == "train+val" else [data["train"]]\n    images',
            'if False else [data["train"]]\n    images',
            tests=GAN,
        ),
        Fault(
            "mirror whatever the flag",
            "            if args.random_flip:\n                coin = torch.rand(b,",
            "            if True:\n                coin = torch.rand(b,",
            tests=GAN,
        ),
        Fault(
            "fake labels random",
            "fake = self.g(z, y)  # the fake",
            "fake = self.g(z, y[torch.randperm(len(y))])  # the fake",
            tests=GAN,
        ),
        Fault("D steps 1", "for i, z in enumerate(zs[:-1], 1):", "for i, z in enumerate(zs[:1], 1):", tests=GAN),
        Fault(
            "raw G saved",
            "for k, v in gan.ema.state_dict().items()}",
            "for k, v in gan.g.state_dict().items()}",
            tests=GAN,
        ),
        Fault("start of the average ignored", "    if step <= start:\n", "    if step <= 0:\n", tests=GAN),
        Fault(
            "decay of the average ignored",
            "self.args.gan_ema_start, self.args.gan_ema)",
            "self.args.gan_ema_start, 0.9999)",
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
            "with mixed(self.args.gan_precision, x.device):",
            "with mixed(self.args.precision, x.device):",
            tests=PRECISION,
        ),
        Fault(
            "bf16 where fp32 is said",
            'if precision == "bf16" else nullcontext()',
            "if precision else nullcontext()",
            tests=f"{GAN} {CLASSIFIER}",
        ),
        # samples and sets
        Fault(
            "filter keeps what it should drop",
            "return confidence(probs, label) > threshold",
            "return confidence(probs, label) <= threshold",
            tests="test_golden_mask",
        ),
        Fault(
            "sigma does not reach the sampler",
            "return self.sigma * z[start",
            "return z[start",
            tests=f"{SETS} test_stream_is_a_function_of_class_and_index_and_expansion_scales_it",
        ),
        Fault(
            "sigma of the source ignored",
            "SampleStream(source.sampler, source.sigma, self.n,",
            "SampleStream(source.sampler, 1.0, self.n,",
            tests=SETS,
        ),
        Fault(
            "threshold ignored",
            "source.threshold if source.filtered else -math.inf",
            "0.0 if source.filtered else -math.inf",
            tests=SETS,
        ),
        Fault(
            "unfiltered source is filtered",
            "source.threshold if source.filtered else -math.inf",
            "source.threshold",
            tests=SETS,
        ),
        Fault(
            "baseline filtered",
            'filtered = row != "baseline"',
            "filtered = True",
            tests="test_rows_of_the_table",
        ),
        Fault("recycle keeps the old set", "        if self.k != k:\n", "        if self.k is None:\n", tests=SETS),
        Fault(
            "set of MultiGAN from one generator",
            "new = [self.draw(source, j) for source in self.sources]",
            "new = [self.draw(self.sources[0], j) for source in self.sources]",
            tests=SETS,
        ),
        Fault(
            "row multi of one generator",
            'seeds = args.gan_seeds if row == "multi" else',
            "seeds = args.gan_seeds[:1] if row else",
            tests="test_rows_of_the_table",
        ),
        Fault(
            "rejected samples kept",
            "more_x = more_x[more_conf > self.floor]",
            "pass",
            tests="test_rejected_samples_are_not_kept_and_change_nothing",
        ),
        Fault(
            "floor of the set's own threshold in the threshold step",
            "floor = threshold if self.shared is None else",
            "floor = threshold if True else",
            tests="test_sets_keep_what_some_threshold_accepts",
        ),
        # classifiers
        Fault("no augmentation", "augmented(x[rows].float(), args, g)", "x[rows].float()", tests=CLASSIFIER),
        Fault(
            "crop padded with black",
            "x = F.pad(x, (pad,) * 4)\n",
            "x = F.pad(x, (pad,) * 4, value=-1)\n",
            tests=f"{CLASSIFIER} test_golden_augmentation",
        ),
        Fault(
            "drops ignored",
            "lr_at(epoch, args.resnet_lr, args.resnet_drops)",
            "lr_at(epoch, args.resnet_lr, ())",
            tests=CLASSIFIER,
        ),
        Fault("weight decay 0", "args.resnet_lr, args.resnet_wd, args", "args.resnet_lr, 0.0, args", tests=CLASSIFIER),
        Fault(
            "weight decay scaled by the rate",
            'if group["wd_mode"] == "lr_scaled" else 1)',
            'if group["wd_mode"] else 1)',
            tests=CLASSIFIER,
        ),
        # [3] search, [4] final, [5] evaluate
        Fault(
            "test split in the search",
            "how = args.resnet_epochs, args.seed, folder, about, args.select_on",
            'how = args.resnet_epochs, args.seed, folder, about, "test"',
            tests=SEARCH,
        ),
        Fault(
            "epoch chosen on test",
            "if row[select_on] > best",
            'if row["test"] > best',
            tests="test_epoch_is_chosen_on_the_split_that_is_named",
        ),
        Fault("F chosen on test", 'seed, folder, about, "val")', "seed, folder, about, args.select_on)", tests=SEARCH),
        Fault(
            "sigma of the search not sampled",
            "source = Source(seed, samplers[e], sigma, t)",
            "source = Source(seed, samplers[e], 1.0, t)",
            tests=SEARCH,
        ),
        Fault(
            "threshold of the search not applied",
            "source = Source(seed, samplers[e], sigma, t)",
            "source = Source(seed, samplers[e], sigma)",
            tests=SEARCH,
        ),
    ],
}
