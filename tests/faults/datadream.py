from faults.fault import Fault

FAULTS = {
    "datadream.py": [
        # [1] select
        Fault(
            "ready-made shots left in validation",
            "train, val = (split and datasets.without(split, shots) for split in (train, val))",
            "pass",
            tests="test_ready_made_shots_are_in_neither_training_nor_validation",
        ),
        Fault(
            "drawn shots left in validation",
            "shots = train.subset(sampler(train, ",
            "shots = data.train.subset(sampler(data.train, ",
            tests="test_drawn_shots_are_not_held_out",
        ),
        Fault(
            "last of the ready-made shots",
            "rows = [found.of_class(c)[:k] for c in",
            "rows = [found.of_class(c)[-k:] for c in",
            tests="test_ready_made_shots_are_the_first_of_each_class_in_natural_order",
        ),
        # [2] finetune
        Fault(
            "next class's prompt in tuning",
            "text_row = torch.tensor([int(shots.labels[i]) for i, _ in batch])",
            "text_row = torch.tensor([(int(shots.labels[i]) + 1) % len(class_names) for i, _ in batch])",
            tests="test_tuning_equals_a_plain_loop_over_stock_parts",
        ),
        Fault(
            "template fixed in tuning",
            "for i, _ in batch]) * args.n_templates + template",
            "for i, _ in batch]) * args.n_templates",
            tests="test_tuning_equals_a_plain_loop_over_stock_parts",
        ),
        Fault(
            "text LoRA without gradients",
            "[0][which.to(team.device)]  # [B, 77, W], with LoRA",
            "[0][which.to(team.device)].detach()",
            tests="test_tuning_equals_a_plain_loop_over_stock_parts",
        ),
        Fault(
            "no clipping",
            "loss = loop.update(lr=lr, clip=1.0)",
            "loss = loop.update(lr=lr)",
            tests="test_tuning_equals_a_plain_loop_over_stock_parts",
        ),
        Fault(
            "constant rate of the LoRA",
            "lr = args.sd_lr * sd_lr_factor(step, args.sd_warmup, total)",
            "lr = args.sd_lr",
            tests="test_tuning_equals_a_plain_loop_over_stock_parts",
        ),
        Fault(
            "latents x 0.1 in tuning",
            "z = pipe.vae.config.scaling_factor * (mean + std * noise)",
            "z = 0.1 * pipe.vae.config.scaling_factor * (mean + std * noise)",
            tests="test_tuning_equals_a_plain_loop_over_stock_parts",
        ),
        Fault(
            "scaling factor forgotten in tuning",
            "z = pipe.vae.config.scaling_factor * (mean + std * noise)",
            "z = mean + std * noise",
            tests="test_tuning_equals_a_plain_loop_over_stock_parts",
        ),
        Fault(
            "mean of the posterior, no draw",
            "pipe.vae.config.scaling_factor * (mean + std * noise)",
            "pipe.vae.config.scaling_factor * mean",
            tests="test_tuning_equals_a_plain_loop_over_stock_parts",
        ),
        Fault(
            "micro-batches not weighted by their share",
            'F.mse_loss(prediction.float(), target, reduction="sum") / eps.numel()',
            "F.mse_loss(prediction.float(), target)",
            tests="test_tuning_equals_a_plain_loop_over_stock_parts",
        ),
        Fault(
            "time step not given to the U-Net",
            "abar_t), t_u, h)",
            "abar_t), 0 * t_u, h)",
            tests="test_tuning_equals_a_plain_loop_over_stock_parts",
        ),
        Fault(
            "no LoRA on the output projection",
            '["to_q", "to_k", "to_v", "to_out.0"]',
            '["to_q", "to_k", "to_v"]',
            tests="test_tuning_equals_a_plain_loop_over_stock_parts",
        ),
        Fault(
            "adapter tuned on another class",
            "(file, shots.of_class(c)) for c, file in",
            "(file, shots.of_class((c + 1) % len(files))) for c, file in",
            tests="test_tuning_equals_a_plain_loop_over_stock_parts",
        ),
        Fault(
            "centre crop instead of a random one",
            "offset or [int(torch.randint(n + 1, ())) for n in free]",
            "offset or [n // 2 for n in free]",
            tests="test_crops_of_photos_that_are_not_square",
        ),
        # [3] generate
        Fault(
            "next class's prompt in drawing",
            "prompts, suffix, n = all_prompts(args, class_names), images",
            "prompts, suffix, n = all_prompts(args, [*class_names[1:], class_names[0]]), images",
            tests="test_drawn_images_equal_those_of_a_stock_pipeline",
        ),
        Fault(
            "template fixed in drawing",
            "h_c = [text[prompts[c][template_of(k, args.n_templates)]] for",
            "h_c = [text[prompts[c][0]] for",
            tests="test_drawn_images_equal_those_of_a_stock_pipeline",
        ),
        Fault(
            "guidance 1",
            "guided(eps_u, eps_c, args.gen_guidance)",
            "guided(eps_u, eps_c, 1.0)",
            tests="test_drawn_images_equal_those_of_a_stock_pipeline",
        ),
        Fault(
            "empty prompt replaced",
            'encode_prompts(pipe, [""])',
            '{"": encode_prompts(pipe, ["a photo"])["a photo"]}',
            tests="test_drawn_images_equal_those_of_a_stock_pipeline",
        ),
        Fault(
            "empty prompt of the first adapter for all",
            'loaded, text = file, encode_prompts(pipe, [""])',
            'loaded, text = file, text if loaded else encode_prompts(pipe, [""])',
            tests="test_drawn_images_equal_those_of_a_stock_pipeline",
        ),
        Fault(
            "latents x 0.1 in drawing",
            "z = z.to(h.device) * scheduler.init_noise_sigma",
            "z = 0.1 * z.to(h.device) * scheduler.init_noise_sigma",
            tests="test_drawn_images_equal_those_of_a_stock_pipeline",
        ),
        Fault(
            "adapter of another class",
            "adapter.use(file)",
            "adapter.use(file and files[-1])",
            tests="test_drawn_images_equal_those_of_a_stock_pipeline",
        ),
        Fault(
            "the baseline's images drawn with the adapter",
            'sets["unadapted"] = [None] * len(class_names)',
            'sets["unadapted"] = lora_file(args, run, class_names)',
            tests="test_drawn_images_equal_those_of_a_stock_pipeline",
        ),
        Fault(
            "classes share their noise",
            "return distributed.seed_of(args.gen_seed, c, k)",
            "return distributed.seed_of(args.gen_seed, 0, k)",
            tests="test_drawn_images_equal_those_of_a_stock_pipeline",
        ),
        # [4] train
        Fault(
            "lambda fixed at 1",
            '{"pooled": args.clf_real_weight, "real": 1.0}',
            '{"pooled": 1.0, "real": 1.0}',
            tests="test_classifier_training_equals_plain_lines",
        ),
        Fault(
            "constant rate of the classifier",
            "lr = clf_lr(step, *schedule)",
            "lr = args.clf_lr",
            tests="test_classifier_training_equals_plain_lines",
        ),
        Fault(
            "augmentation off",
            "view = train_transform(model.size, args.clf_augment)",
            "view = partial(eval_pixels, size=model.size)",
            tests="test_classifier_training_equals_plain_lines",
        ),
        Fault(
            "mixing across groups",
            "for group in (is_real, ~is_real):  # two independent draws",
            "for group in (is_real | True,):",
            tests="test_mixing_stays_in_its_group_and_happens_at_its_rate",
        ),
        Fault(
            "mixing across groups in the stage",
            "mix_groups(x, y, is_real[u], args.clf_mix_prob, g)",
            "mix_groups(x, y, is_real[u] | True, args.clf_mix_prob, g)",
            tests="test_classifier_training_equals_plain_lines",
        ),
        Fault(
            "mixing left out",
            "mix_groups(x, y, is_real[u], args.clf_mix_prob, g)",
            "x, y",
            tests="test_classifier_training_equals_plain_lines",
        ),
        Fault(
            "shots repeated once",
            'repeats = repeat_shots(args.gen_images_per_class, args.shots) if arm in ("real", "pooled") else 0',
            'repeats = int(arm in ("real", "pooled"))',
            tests="test_training_list_length_and_order",
        ),
        Fault(
            "the baseline trained on DataDream's images",
            '{"real": None, "unadapted": "unadapted"}.get(',
            '{"real": None}.get(',
            tests="test_training_list_takes_each_row_from_its_folder",
        ),
        Fault(
            "rows of unequal updates",
            "if args.clf_equal_updates else len(data)",
            "if False else len(data)",
            tests="test_classifier_training_equals_plain_lines",
        ),
        Fault(
            "text tower not trained",
            "p.grad = grad",
            "p.grad = 0 * grad",
            tests="test_classifier_training_equals_plain_lines",
        ),
        Fault(
            "groups counted in each micro-batch",
            "is_real[u], lam, n_real, len(entries) - n_real)",
            "is_real[u], lam)",
            tests="test_micro_batches_and_units_of_classes_change_only_rounding",
        ),
        Fault(
            "no dropout",
            "nn.Dropout(dropout)",
            "nn.Dropout(0.0)",
            tests="test_one_dropout_mask_for_query_and_value",
        ),
        Fault(
            "a mask each for query and value",
            "a_q, a_v = F.linear(self.dropout(x), self.lora_A).chunk(2, dim=-1)",
            "a_q, a_v = (F.linear(self.dropout(x), a) for a in self.lora_A.chunk(2))",
            tests="test_one_dropout_mask_for_query_and_value",
        ),
        Fault(
            "trained in evaluation mode",
            "        model.train()\n",
            "        model.eval()\n",
            tests="test_training_has_dropout_and_evaluation_has_none",
        ),
        Fault(
            "evaluated in training mode",
            "    model.eval()\n",
            "    model.train()\n",
            tests="test_training_has_dropout_and_evaluation_has_none",
        ),
        Fault(
            "epoch chosen on test",
            'row["val"] > best["val"]:  # without validation images: the last epoch\n'
            '            extra["best"] = dict(step=step, val=row.get("val"))',
            'row["test"] > best["test"]:\n'
            '            extra["best"] = dict(step=step, val=row.get("val"), test=row["test"])',
            tests="test_the_epoch_is_chosen_on_validation_and_the_saved_weights_are_its",
        ),
        Fault(
            "validated on the test images",
            'for name, data in (("val", val), ("test", test)) if data}',
            'for name, data in (("val", test), ("test", test)) if data}',
            tests="test_validation_and_test_are_scored_on_their_own_images",
        ),
        Fault(
            "validation accuracy reported as test",
            'test_at[step] = self.score("test")',
            'test_at[step] = self.score("val")',
            tests="test_the_reported_accuracies_are_of_the_test_images",
        ),
        Fault(
            "last weights saved",
            "self.loop.tensors = {name: tensor.detach().clone() for",
            "self.loop.tensors = {name: tensor.detach() for",
            tests="test_the_epoch_is_chosen_on_validation_and_the_saved_weights_are_its",
        ),
        Fault(
            "LoRA not in the saved classifier",
            'state[f"{name}.in_proj_weight"] += module.delta_w().detach()',
            "pass",
            tests="test_the_saved_classifier_answers_like_the_trained_one",
        ),
        Fault(
            "LoRA twice in the saved classifier",
            'state[f"{name}.in_proj_weight"] += module.delta_w().detach()',
            'state[f"{name}.in_proj_weight"] += 2 * module.delta_w().detach()',
            tests="test_the_saved_classifier_answers_like_the_trained_one",
        ),
    ],
}
