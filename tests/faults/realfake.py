from faults.fault import Fault

TUNING, DRAWING = "test_tuning_equals_a_plain_loop_over_stock_parts", "test_versions_equal_those_of_a_stock_pipeline"
TRAINING = "test_training_equals_a_plain_loop_over_timm"

FAULTS = {
    "realfake.py": [
        # [1] caption, [2] embed, the data
        Fault(
            "test images in tuning",
            "real, n = data.train, len(data.class_names)",
            "real, n = data.test, len(data.class_names)",
            tests="test_what_is_replaced_are_training_images",
        ),
        Fault(
            "embedding normalised",
            'rows = features.read("features")',
            'rows = F.normalize(features.read("features").float(), dim=1).half()',
            tests="test_embeddings_are_those_of_open_clip_not_normalised",
        ),
        Fault(
            "one token for all images",
            "return self.features[rows]",
            "return self.features[self.rows[:1]].expand(len(rows), -1)",
            tests=f"{TUNING} {DRAWING}",
        ),
        Fault(
            "prompt of the next class",
            "make(names[real.labels[i]], ",
            "make(names[(real.labels[i] + 1) % len(names)], ",
            tests=f"{TUNING} {DRAWING}",
        ),
        Fault("token in the wrong slot", "h[:, -1] = g.to(h)", "h[:, -2] = g.to(h)", tests=TUNING),
        # [3] finetune
        Fault(
            "min-SNR weight upside down",
            "return snr.clamp(max=gamma) / snr",
            "return snr / snr.clamp(max=gamma)",
            tests="test_golden_snr",
        ),
        Fault(
            "min-SNR off",
            "w = snr_weight(snr_of(abar_t), args.dm_gamma) if args.dm_gamma else torch.ones_like(abar_t)",
            "w = torch.ones_like(abar_t)",
            tests=TUNING,
        ),
        Fault(
            "matching term of the mean residual",
            "r).sum(0).pow(2).mean()",
            "r).mean(0).pow(2).mean()",
            tests="test_golden_loss",
        ),
        Fault(
            "matching term zero",
            "loop.backward((l_diff + lam * l_dm) / groups)",
            "loop.backward((l_diff + 0 * l_dm) / groups)",
            tests=TUNING,
        ),
        Fault(
            "square inside the sum of the matching term",
            "sums[group] = (w.view(-1, 1, 1, 1) * own[loop.unit][0].detach()).sum(0)",
            "sums[group] = (w.view(-1, 1, 1, 1) * own[loop.unit][0].detach()).pow(2).sum(0)",
            tests=TUNING,
        ),
        Fault(
            "one sum over all matching batches",
            "group = u.start // args.dm_batch",
            "group = 0",
            tests=TUNING,
        ),
        Fault("sampling prompt in tuning", "names, training_prompt)", "names, sampling_prompt)", tests=TUNING),
        Fault(
            "no mirror",
            "v2.functional.horizontal_flip(image) if flip else image",
            "image",
            tests=TUNING,
        ),
        Fault(
            "no crop",
            "crop(image, int(u * (free_y + 1)), int(v * (free_x + 1)), size, size)",
            "crop(image, 0, 0, size, size)",
            tests=TUNING,
        ),
        Fault("no clipping", "loop.update(clip=1.0)", "loop.update()", tests=TUNING),
        Fault("rate of the LoRA x 10", "lr=args.sd_lr, betas", "lr=10 * args.sd_lr, betas", tests=TUNING),
        Fault("no weight decay of the LoRA", "weight_decay=1e-2", "weight_decay=0", tests=TUNING),
        Fault(
            "gradients summed instead of averaged",
            "loop.backward((l_diff + lam * l_dm) / groups)",
            "loop.backward(l_diff + lam * l_dm)",
            tests=TUNING,
        ),
        Fault(
            "latents x 0.1 in tuning",
            "z0 = pipe.vae.config.scaling_factor * (posterior.mean",
            "z0 = 0.1 * pipe.vae.config.scaling_factor * (posterior.mean",
            tests=TUNING,
        ),
        # [4] generate
        Fault("negative prompt empty", "token_ids(pipe, [args.gen_negative])", 'token_ids(pipe, [""])', tests=DRAWING),
        Fault("LoRA scale 1", "else None, args.gen_lora_scale)", "else None, 1.0)", tests=DRAWING),
        Fault("guidance 1", "guided(eps_u, eps_c, w), t", "guided(eps_u, eps_c, 1), t", tests=DRAWING),
        Fault("real latent zeroed", "xi) if posterior else None", "xi) * 0 if posterior else None", tests=DRAWING),
        Fault(
            "strength 1",
            "first = 0 if z0 is None else steps - kept_steps(strength, steps)",
            "first = 0",
            tests=DRAWING,
        ),
        Fault(
            "stock settings of UniPC", 'stored.config, final_sigmas_type="sigma_min")', "stored.config)", tests=DRAWING
        ),
        Fault(
            "seed of the version ignored",
            "return distributed.seed_of(args.gen_seed, version, key)",
            "return distributed.seed_of(args.gen_seed, 0, key)",
            tests=DRAWING,
        ),
        Fault("training prompt in sampling", "names, sampling_prompt)", "names, training_prompt)", tests=DRAWING),
        # [5] train
        Fault(
            "constant rate of the classifier",
            "lr = multistep_lr(step // batches.per_epoch, args",
            "lr = args.net_lr or multistep_lr(step // batches.per_epoch, args",
            tests=TRAINING,
        ),
        Fault("no augmentation", "transforms(args, training=True)", "transforms(args, training=False)", tests=TRAINING),
        Fault(
            "no label smoothing",
            "loop.backward(classifier_loss(logits, y, args.net_smoothing)",
            "loop.backward(classifier_loss(logits, y, 0.0)",
            tests=TRAINING,
        ),
        Fault("BatchNorm statistics not written", "params=params, buffers=running", "params=params", tests=TRAINING),
        # [6] attack
        Fault(
            "ROC mirrored",
            "fpr, tpr, _ = roc_curve(member, score, drop_intermediate=False)",
            "tpr, fpr, _ = roc_curve(member, score, drop_intermediate=False)",
            tests="test_attack_figures_are_counted_threshold_by_threshold",
        ),
        Fault(
            "AUC of the wrong sign",
            "auc=float(roc_auc_score(member, score))",
            "auc=float(roc_auc_score(member, -score))",
            tests="test_golden_lira",
        ),
    ],
}
