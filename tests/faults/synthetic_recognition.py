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
        Fault(
            "CE instead of SCE",
            "return sl * soft_loss(z, z0, T) + (1 - sl) * hard if sl else hard",
            "return hard",
            tests="test_golden_soft_loss",
        ),
        # [3] generate
        Fault(
            "Real Guidance ignores the image",
            "return abar.sqrt() * ref + (1 - abar).sqrt() * noise",
            "return abar.sqrt() * 0 * ref + noise",
            tests="test_golden_real_guidance_start",
        ),
        Fault(
            "r mapped to the steps that are left out",
            "return list(range(r - 1, -1, -(100 // steps)))[::-1]",
            "return list(range(99 - r, -1, -(100 // steps)))[::-1]",
            tests="test_real_guidance_runs_r_steps_and_a_perfect_denoiser_returns_the_reference",
        ),
        Fault(
            "teacher is tuned",
            "lambda i: head_logits(syn[1][i], data.W0, 0.0)",
            "lambda i: head_logits(syn[1][i], W, 0.0)",
            tests="test_a_row_is_trained_as_plain_lines_say",
        ),
        Fault(
            "head with another data set's template",
            '"folder/cub": ((KIND.format("bird"),), "a photo of"),',
            '"folder/cub": (PHOTO, "a photo of"),',
            tests="test_every_preset_says_the_names_that_the_authors_do",
        ),
        Fault(
            "head without temperature",
            "return scale * F.normalize(",
            "return F.normalize(",
            tests="test_golden_zero_shot_head",
        ),
        Fault(
            "filter threshold lost",
            "passing = (confidence > 1 / n_classes).nonzero().flatten()",
            "passing = (confidence > 0).nonzero().flatten()",
            tests="test_golden_filter",
        ),
        Fault(
            "the least confident are kept",
            "return confidence.sort(descending=True",
            "return confidence.sort(descending=False",
            tests="test_golden_filter",
        ),
        Fault(
            "no readmission",
            "return most_confident(confidence, keep).sort().values",
            "return passing",
            tests="test_golden_filter",
        ),
        Fault(
            "Real Filtering the other way round",
            "cos.masked_fill(own, -2).amax(1) <= cos",
            "cos.masked_fill(own, -2).amax(1) > cos",
            tests="test_real_filter_drops_only_what_lies_nearer_to_another_class",
        ),
        Fault(
            "no weight decay on the bias",
            "AdamW(params, lr=course.lr, betas=",
            "AdamW([dict(params=W), dict(params=b, weight_decay=0.0)], lr=course.lr, betas=",
            tests="test_a_row_is_trained_as_plain_lines_say",
        ),
        Fault(
            "rate constant",
            "return head_rate(s, self.starts[i + 1] - self.starts[i], self.lr)",
            "return self.lr",
            tests="test_a_row_is_trained_as_plain_lines_say",
        ),
        Fault(
            "weights of real and synthetic images swapped",
            "loss = loss + weights[0] * F.cross_entropy(head_logits(f, W, b), y)",
            "loss = loss + weights[1] * F.cross_entropy(head_logits(f, W, b), y)",
            tests="test_mix_training_with_one_weight_zero_is_the_other_alone",
        ),
        Fault(
            "phases swapped",
            '{"after": [syn_alone, real_alone], "before": [real_alone, syn_alone]}',
            '{"before": [syn_alone, real_alone], "after": [real_alone, syn_alone]}',
            tests="test_a_row_is_trained_as_plain_lines_say",
        ),
        Fault(
            "one AdamW for both phases",
            "loop.optimizer.state.clear()",
            "pass",
            tests="test_a_row_is_trained_as_plain_lines_say",
        ),
        Fault(
            "MoCo's temperature 1",
            "q @ queue.T], 1) / temperature",
            "q @ queue.T], 1)",
            tests="test_info_nce_is_moco_v2s",
        ),
        Fault(
            "DeiT without mixing",
            "mix=deit, erase=deit",
            "mix=False, erase=deit",
            tests="test_recipes_are_those_of_the_paper",
        ),
        Fault(
            "a preset's rate",
            'recipe="sgd", pre_lr=0.2',
            'recipe="sgd", pre_lr=0.1',
            tests="test_every_preset_has_the_values_of_the_paper",
        ),
        Fault(
            "real only has the synthetic rows too",
            'return rows_real, () if self.real == "alone" else rows_syn',
            "return rows_real, rows_syn",
            tests="test_a_row_is_trained_as_plain_lines_say",
        ),
    ],
    "common/features.py": [
        Fault(
            "BatchNorm always frozen",
            ".train(not freeze_bn)",
            ".train(False)",
            tests="tests/test_synthetic_recognition.py::test_teacher_is_the_untouched_clip_and_only_what_is_asked_for_moves",
        ),
        Fault(
            "features of another CLIP reused",
            "if tensors_metadata(self.file(part)) != self.key:",
            "if False:",
            tests="test_features_of_another_clip_are_refused_and_parts_are_not_made_twice",
        ),
    ],
    "common/pretraining.py": [
        Fault(
            "MoCo's momentum lost",
            "p.mul_(self.momentum).add_(q, alpha=1 - self.momentum)",
            "p.copy_(q)",
            tests="test_moco_queue_takes_the_newest_keys_first_and_keys_follow_the_queries",
        ),
        Fault(
            "MoCo's queue grows at the wrong end",
            "torch.cat([rows, self.queue])[: len(self.queue)]",
            "torch.cat([self.queue, rows])[: len(self.queue)]",
            tests="test_moco_queue_takes_the_newest_keys_first_and_keys_follow_the_queries",
        ),
        Fault(
            "keys in the company of their queries",
            "k = self.embed(self.key, views[1][order])[order.argsort()]",
            "k = self.embed(self.key, views[1])",
            tests="test_moco_queue_takes_the_newest_keys_first_and_keys_follow_the_queries",
        ),
        Fault(
            "each image once",
            "return epoch * n + i // repeats",
            "return position",
            tests="test_repeated_augmentation_keeps_the_length_of_an_epoch",
        ),
        Fault(
            "transfer with the pre-training head",
            "net.reset_classifier(n_classes)\n",
            "net.load_state_dict(load_tensors(weights), strict=False)\n",
            tests="tests/test_synthetic_recognition.py::test_weights_of_another_backbone_are_refused",
        ),
    ],
    "common/painter.py": [
        Fault(
            "range of stage II doubled again",
            'output_type="pt", **text).images.float()',
            'output_type="pt", **text).images.float() * 2 - 1',
            tests="tests/test_synthetic_recognition.py::test_upsampler_equals_the_stock_pipeline",
        ),
        Fault(
            "any prediction of the network taken for noise",
            'if kind not in ("epsilon", "v_prediction"):',
            "if False:",
            tests="tests/test_synthetic_recognition.py::"
            "test_models_that_the_sampler_cannot_use_are_refused_before_the_first_stage",
        ),
        Fault(
            "v taken for noise",
            'if self.predicts == "v_prediction":',
            "if False:",
            tests="tests/test_synthetic_recognition.py::test_v_prediction_gives_the_clean_image_of_the_stock_scheduler",
        ),
        Fault(
            "Real Guidance ignores the image in GLIDE",
            "begin = lambda noise, abar: start(ref, noise, abar)",
            "begin = lambda noise, abar: noise",
            tests="tests/test_synthetic_recognition.py::test_glide_paints_what_a_plain_loop_over_the_stock_scheduler_does",
        ),
    ],
    "common/names.py": [
        Fault(
            "raw names in prompts",
            'return [" ".join(name.replace("_", " ").split()) for name in names]',
            "return list(names)",
            tests="tests/test_synthetic_recognition.py::test_every_preset_says_the_names_that_the_authors_do",
        ),
    ],
}
