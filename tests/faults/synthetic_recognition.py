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
        Fault(
            "teacher is tuned",
            "                z0 = teacher(rows_syn)",
            "                z0 = head_logits(f, W, b)",
            tests="test_teacher_is_the_untouched_clip_and_only_what_is_asked_for_moves",
        ),
        Fault(
            "BatchNorm always frozen",
            "batch_statistics = not args.freeze_bn",
            "batch_statistics = False",
            tests="test_teacher_is_the_untouched_clip_and_only_what_is_asked_for_moves",
        ),
        # [3] generate
        Fault(
            "range of stage II doubled again",
            'output_type="pt", **text).images.float()',
            'output_type="pt", **text).images.float() * 2 - 1',
            tests="test_upsampler_equals_the_stock_pipeline",
        ),
        Fault(
            "any prediction of the network taken for noise",
            'if kind not in ("epsilon", "v_prediction"):',
            "if False:",
            tests="test_models_that_the_sampler_cannot_use_are_refused_before_the_first_stage",
        ),
        Fault(
            "v taken for noise",
            'if self.predicts == "v_prediction":',
            "if False:",
            tests="test_v_prediction_gives_the_clean_image_of_the_stock_scheduler",
        ),
        Fault(
            "second stage not looked at",
            "if args.upsampler else []",
            "if False else []",
            tests="test_models_that_the_sampler_cannot_use_are_refused_before_the_first_stage",
        ),
        Fault(
            "Real Guidance ignores the image in GLIDE",
            "start = lambda noise, abar: noised_reference(ref, noise, abar)",
            "start = lambda noise, abar: noise",
            tests="test_glide_paints_what_a_plain_loop_over_the_stock_scheduler_does",
        ),
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
            "raw names in prompts",
            'return [" ".join(name.replace("_", " ").split()) for name in names]',
            "return list(names)",
            tests="test_every_preset_says_the_names_that_the_authors_do",
        ),
        Fault(
            "head with another data set's template",
            "kind = KIND.get(args.dataset) or BIRDS.get(args.preset)",
            "kind = KIND.get(args.dataset)",
            tests="test_every_preset_says_the_names_that_the_authors_do",
        ),
    ],
}
