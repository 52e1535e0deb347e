from faults.fault import Fault

SAMPLER = "test_guided_images_equal_a_plain_loop_over_stock_parts"
SGD = "test_training_equals_a_plain_loop_of_sgd"
MEANS = "test_prototypes_equal_scikit_learn_on_features_of_a_stock_network"
ENCODE = "test_encode_equals_the_stock_vae"
ROWS = "test_rows_are_trained_on_what_they_say"
PRESETS = "test_presets_are_the_method_pages"
MODELS = "test_models_of_a_run_are_looked_through_before_the_first_stage"

FAULTS = {
    "distdiff.py": [
        # What a network sees
        Fault(
            "resize before storing by another filter",
            "return image if image.size == (side, side) else image.resize((side, side), Image.Resampling.BILINEAR)",
            "return image if image.size == (side, side) else image.resize((side, side), Image.Resampling.BICUBIC)",
            MEANS,
        ),
        Fault(
            "stored at another size than trained",
            "return squashed(images.to_pil(image), side) if side",
            "return squashed(images.to_pil(image), side - 1) if side",
            "test_stored_at_256_pixels_images_give_the_same_training_bits",
        ),
        Fault(
            "MixUp leaves the labels",
            "return lam * x + (1 - lam) * x[index], lam * y + (1 - lam) * y[index]",
            "return lam * x + (1 - lam) * x[index], y",
            f"test_golden_mixup {SGD}[mixup]",
        ),
        Fault(
            "nothing is hidden",
            "x, y = seen_by(net, x) * keep, ",
            "x, y = seen_by(net, x), ",
            f"{SGD}[erasing]",
        ),
        # Training
        Fault(
            "constant rate",
            "lr=epoch_lr(step // batches.per_epoch, job.lr, job.epochs)",
            "lr=job.lr",
            f"{SGD}[none]",
        ),
        Fault(
            "no momentum",
            "momentum=0.9, nesterov=True, weight_decay",
            "momentum=0.0, nesterov=False, weight_decay",
            f"{SGD}[none]",
        ),
        Fault(
            "no Nesterov",
            "momentum=0.9, nesterov=True",
            "momentum=0.9, nesterov=False",
            f"{SGD}[none]",
        ),
        Fault(
            "no weight decay",
            "nesterov=True, weight_decay=args.sgd_wd",
            "nesterov=True, weight_decay=0.0",
            f"{SGD}[none]",
        ),
        Fault(
            "loss of a short batch",
            "F.cross_entropy(logits.float(), y) * len(y) / len(batch)",
            "F.cross_entropy(logits.float(), y) * len(y) / b / 2",
            f"{SGD}[none]",
        ),
        Fault(
            "guide trained at the classifier's rate",
            "args.guide, weights, args.guide_epochs, args.guide_lr,",
            "args.guide, weights, args.guide_epochs, args.sgd_lr,",
            "test_guide_has_a_rate_of_its_own",
        ),
        # [3] prototypes
        Fault(
            "prototypes from raw pixels 0..255",
            "guide.features(seen_by(guide, x))",
            "guide.features(x.float())",
            MEANS,
        ),
        Fault(
            "linkage other than average",
            'linkage="average"',
            'linkage="ward"',
            MEANS,
        ),
        Fault(
            "wrong feature layer",
            "self.net.forward_features(x), pre_logits=True)",
            "self.net.forward_features(x), pre_logits=False)",
            "test_networks_and_their_features",
        ),
        Fault(
            "features with a crop",
            "view = partial(centre_view, resize=args.clf_size, size=args.clf_size)",
            "view = partial(centre_view, resize=args.clf_size + 8, size=args.clf_size)",
            MEANS,
        ),
        Fault(
            "means of features that are not normalised",
            "u = F.normalize(features.float(), dim=1)\n    class_mean",
            "u = features.float()\n    class_mean",
            MEANS,
        ),
        # [4] encode
        Fault(
            "latents x 0.1",
            "parts.append(pipe.vae.config.scaling_factor * (mean",
            "parts.append(0.1 * pipe.vae.config.scaling_factor * (mean",
            ENCODE,
        ),
        Fault(
            "mean of the posterior, no draw",
            "(mean + std * padded(list(noise), b))",
            "(mean + 0 * std)",
            ENCODE,
        ),
        Fault(
            "centre crop",
            "(int(torch.randint(free + 1, (), generator=g)) for free in (w - size, h - size))",
            "(free // 2 for free in (w - size, h - size))",
            ENCODE,
        ),
        Fault(
            "sides rounded down twice",
            "int(size * side / min(width, height))",
            "int(size / min(width, height) * side)",
            "test_resized_sides_are_those_of_torchvision",
        ),
        # [5] expand
        Fault(
            "prototypes of the next class",
            "self.p, self.q = sampler.class_unit[labels], sampler.group_unit[labels]",
            "self.p, self.q = sampler.class_unit.roll(-1, 0)[labels], sampler.group_unit.roll(-1, 0)[labels]",
            SAMPLER,
        ),
        Fault(
            "prompts of the next class",
            "h_c = sampler.text[labels]",
            "h_c = sampler.text[(labels + 1) % len(sampler.text)]",
            SAMPLER,
        ),
        Fault(
            "group prototypes ignored",
            "args.gen_class_weight, args.gen_group_weight)[0]",
            "args.gen_class_weight, 0)[0]",
            SAMPLER,
        ),
        Fault(
            "no projection into the ball",
            "return torch.minimum(torch.maximum(v, z - radius), z + radius)",
            "return v",
            "test_golden_projection",
        ),
        Fault(
            "energy of squared distances",
            "return lam_class * (f - p).norm(dim=1)",
            "return lam_class * (f - p).norm(dim=1).square()",
            "test_golden_transform_guidance",
        ),
        Fault(
            "energy with the opposite sign",
            "e, b = e - rho * grad_e, b - rho * grad_b",
            "e, b = e + rho * grad_e, b + rho * grad_b",
            SAMPLER,
        ),
        Fault(
            "gradient through the projection",
            "before = score(affine(z, e, b), i)",
            "before = score(project(affine(z, e, b), z, radius), i)",
            SAMPLER,
        ),
        Fault(
            "e and b swapped",
            "z, _ = transform_guidance(z, e, b, i, args.gen_rho",
            "z, _ = transform_guidance(z, b, e, i, args.gen_rho",
            SAMPLER,
        ),
        Fault(
            "radius ignored",
            "z, _ = transform_guidance(z, e, b, i, args.gen_rho, args.gen_radius,",
            "z, _ = transform_guidance(z, e, b, i, args.gen_rho, 10.0,",
            SAMPLER,
        ),
        Fault(
            "look-ahead of 1",
            "return look_ahead(v, i, args.gen_period,",
            "return look_ahead(v, i, 1,",
            SAMPLER,
        ),
        Fault(
            "guidance one step later",
            "self.guided_at = args.gen_steps - args.gen_step_from_end",
            "self.guided_at = args.gen_steps - args.gen_step_from_end + 1",
            SAMPLER,
        ),
        Fault(
            "guidance scale 1",
            "guided(eps_u, eps_c, s.args.gen_guidance)",
            "guided(eps_u, eps_c, 1.0)",
            SAMPLER,
        ),
        Fault(
            "strength ignored",
            "self.first = start_index(args.gen_strength, args.gen_steps)",
            "self.first = 0",
            SAMPLER,
        ),
        Fault(
            "DDIM with noise",
            "return x0, abar_next**0.5 * x0 + (1 - abar_next) ** 0.5 * eps",
            "return x0, abar_next**0.5 * x0 + (1 - abar_next) ** 0.5 * torch.randn_like(eps)",
            SAMPLER,
        ),
        Fault(
            "guide sees normalised pixels",
            'if args.gen_guide_input == "normalized" else ()',
            "if args.gen_guide_input else ()",
            SAMPLER,
        ),
        Fault(
            "copies with equal seeds",
            "return distributed.seed_of(args.gen_seed, key, copy)",
            "return distributed.seed_of(args.gen_seed, key)",
            "test_copies_have_seeds_of_their_own_and_rows_share_them",
        ),
        # [6] train
        Fault(
            "originals left out",
            "sources, folder = [originals, *([copies(row, k)] if k else [])],",
            "sources, folder = [copies(row, k)] if k else [originals],",
            ROWS,
        ),
        Fault(
            "originals not repeated",
            "length = len(real) * sets_in_epoch(args, row, k)",
            "length = len(real) * (sets_in_epoch(args, row, k) if k else 1)",
            ROWS,
        ),
        Fault(
            "all copies for every k",
            "real).images(k), args.clf_resize)",
            "real).images(5), args.clf_resize)",
            ROWS,
        ),
        # Presets
        Fault(
            "another rho by default",
            "gen_rho: NonNegative = 10.0",
            "gen_rho: NonNegative = 1.0",
            PRESETS,
        ),
        Fault(
            "another strength of PathMNIST",
            "gen_strength=0.2,",
            "gen_strength=0.3,",
            PRESETS,
        ),
        Fault(
            "Cars from scratch",
            '"cars": dict(dataset="cars", data_dir="data", **FINE_TUNED)',
            '"cars": dict(dataset="cars", data_dir="data")',
            PRESETS,
        ),
        Fault(
            "validation images of DTD not merged",
            'dataset="dtd", data_dir="data", merge_val=True',
            'dataset="dtd", data_dir="data"',
            PRESETS,
        ),
        Fault(
            "v_prediction is let in",
            '("--gen-resolution", args.gen_resolution))',
            '("--gen-resolution", args.gen_resolution), ("epsilon", "v_prediction"))',
            MODELS,
        ),
        Fault(
            "guide without weights is let in",
            'kind = "clip" if name.startswith("clip:") else "timm" if pretrained else "network"',
            'kind = "clip" if name.startswith("clip:") else "network"',
            MODELS,
        ),
    ],
}
