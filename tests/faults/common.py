from faults.fault import Fault

CHOSEN = "test_the_epoch_is_chosen_on_validation_and_the_saved_weights_are_its"
CHOSEN_OR_LAST = "test_the_epoch_is_chosen_on_validation_images_else_the_last"
CLAIMS = "tests/test_realfake.py::test_claims_are_judged_by_twice_the_standard_error"

FAULTS = {
    "common/jobs.py": [
        Fault(
            "all teams do the jobs of the first",
            "jobs[j]) for j in deal.together[dist.rank // deal.size]]",
            "jobs[j]) for j in deal.together[0]]",
            "tests/test_common_jobs.py::test_a_process_gets_its_jobs_with_its_team",
        ),
        Fault(
            "a job costs a team what it costs a process",
            "[n * math.ceil(units / size) for n in lengths]",
            "[n * units for n in lengths]",
            "tests/test_common_jobs.py::test_every_job_is_done_once_and_as_busy_as_is_told",
        ),
    ],
    "common/datasets.py": [
        Fault(
            "classes in the reverse order",
            'rows = np.argsort(images.labels, kind="stable").tolist()',
            'rows = np.argsort(-images.labels, kind="stable").tolist()',
            "tests/test_distdiff.py::test_real_images_lie_class_by_class_in_natural_order",
        ),
    ],
    "common/copies.py": [
        Fault(
            "copies that are not nested",
            "{copy * self.counts[c] + place}",
            "{place * 5 + copy}",
            "tests/test_distdiff.py::test_places_of_the_copies_are_unique_and_nested",
        ),
        Fault(
            "the copies of another image are missing",
            "~there[first + copy * n + self.places]",
            "~there[first + copy + self.places]",
            "tests/test_common_copies.py::test_what_is_missing_is_missing",
        ),
    ],
    "common/report.py": [
        Fault("claims upside down", 'a["mean"] - b["mean"]', 'b["mean"] - a["mean"]', CLAIMS),
        Fault("claims judged by one standard error", "max(2 * error, 0.05)", "max(error, 0.05)", CLAIMS),
        Fault(
            "deviation for the standard error",
            'row["std"] ** 2 / len(row["per_seed"])',
            'row["std"] ** 2',
            CLAIMS,
        ),
    ],
    "common/diffusion.py": [
        Fault(
            "bf16 where fp32 is said",
            'if precision == "bf16" else nullcontext()',
            "if precision else nullcontext()",
            "tests/test_gafi.py::test_gan_training_equals_a_plain_loop_over_stock_parts",
        ),
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
    "common/files.py": [
        Fault(
            "safetensors' words for a full disk are not understood",
            "bool(words and int(words[1]) in full)",
            "False",
            tests="tests/test_common_run.py::test_a_full_disk_is_one_line_whoever_writes",
        ),
    ],
    "common/listing.py": [
        Fault(
            "files of the right size are taken as they are",
            "or quick_hash(path) == known",
            "or True",
            tests="tests/test_common_run.py::test_names_and_sizes_of_all_kinds_are_listed",
        ),
        Fault(
            "the end of a large file is not hashed",
            "            data += file.read(END)\n",
            "",
            tests="tests/test_common_run.py::test_names_and_sizes_of_all_kinds_are_listed",
        ),
    ],
    "common/inputs.py": [
        Fault(
            "grids without limit",
            "refuse(many > most,",
            "refuse(False,",
            tests="tests/test_gafi.py::test_bad_flags_are_refused_by_name tests/test_common_inputs.py",
        ),
        Fault(
            "no picture is decoded at the start",
            "            verify(images, _memory(Path(images.root)), bar.update)\n",
            "            pass\n",
            tests="tests/test_common_run.py::test_a_run_begins_with_pictures_that_can_be_read_and_goes_on_with_the_same",
        ),
        Fault(
            "nobody is told of pictures in two splits",
            "lambda: overlap(splits)",
            "lambda: ''",
            tests="tests/test_common_run.py::test_pictures_in_two_splits_are_told_at_every_start_and_stand_in_the_report",
        ),
    ],
    "common/selection.py": [
        Fault(
            "epoch chosen on test",
            'row["val"] > best["val"]:\n            extra["best"] = {"step": step, "val": row.get("val")}',
            'row["test"] > best["test"]:\n'
            '            extra["best"] = {"step": step, "val": row.get("val"), "test": row["test"]}',
            f"tests/test_datadream.py::{CHOSEN} tests/test_distdiff.py::{CHOSEN_OR_LAST}",
        ),
        Fault(
            "first epoch kept",
            'if best is None or "val" not in row or row["val"] > best["val"]:',
            "if best is None:",
            f"tests/test_datadream.py::{CHOSEN} tests/test_distdiff.py::{CHOSEN_OR_LAST}",
        ),
        Fault(
            "validation accuracy reported as test",
            'test_at[step] = self.score("test")',
            'test_at[step] = self.score("val")',
            "tests/test_datadream.py::test_the_reported_accuracies_are_of_the_test_images",
        ),
        Fault(
            "last weights saved",
            'x.detach().to("cpu", copy=True)',
            "x.detach()",
            f"tests/test_datadream.py::{CHOSEN}",
        ),
    ],
    "common/loop.py": [
        Fault(
            "every epoch in the same order",
            "start = epoch * self.length + i * self.batch\n"
            "        stop = min(start + self.batch, (epoch + 1) * self.length)",
            "start = i * self.batch\n        stop = min(start + self.batch, self.length)",
            "tests/test_common_loop.py::test_batches_go_through_an_endless_stream",
        ),
    ],
    "common/run.py": [
        Fault(
            "a run that did nothing is held to its pictures",
            "        run.path(inputs.RECORD).unlink(missing_ok=True)\n",
            "        pass\n",
            tests="tests/test_common_run.py::test_a_run_begins_with_pictures_that_can_be_read_and_goes_on_with_the_same",
        ),
    ],
    "common/cli.py": [
        Fault(
            "other ranks do not wait for rank 0 at the start",
            "{False: 90, True: 15}",
            "{False: 5, True: 15}",
            tests="tests/test_common_distributed.py::test_torchrun_errors_are_told_once",
        ),
    ],
}
