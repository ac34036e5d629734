"""Defects to plant, one at a time, and for each the few tests of which one has to notice it.

A defect is an exact replacement in one file; the old text must occur there exactly once, so a plant that no longer fits its
source is an error and not a silent pass.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plant:
    """One defect. ``tests``: what runs with it, as pytest names it; quick, and green without it."""

    name: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def needs_triton(self) -> bool:
        return self.file.startswith("triton_kernels/")

    def sown(self, text: str) -> str:
        """The source with the defect in it."""
        count = text.count(self.old)
        assert count == 1, f"{self.name}: the text to replace occurs {count} times in {self.file}; adapt tests/defects/plants.py"
        return text.replace(self.old, self.new)


PLANTS = (
    # --- the mathematics -------------------------------------------------------------------------------
    Plant(
        "kappa-times-100",
        "Bounds a hundred times too wide see only large faults.",
        "abft/threshold.py",
        "return base + slope * k / arithmetic.depth",
        "return 100.0 * (base + slope * k / arithmetic.depth)",
        ("tests/test_threshold.py::test_the_expected_floor_is_what_a_deviation_meets",),
    ),
    Plant(
        "kappa-divided-by-100",
        "Bounds a hundred times too narrow take rounding for faults.",
        "abft/threshold.py",
        "return base + slope * k / arithmetic.depth",
        "return 0.01 * (base + slope * k / arithmetic.depth)",
        ("tests/test_functional.py::test_clean_data_is_silent",),
    ),
    Plant(
        "suspect-turned-round",
        "What lies within its bound is suspect, and what lies beyond it is not.",
        "abft/threshold.py",
        "return ~(abs(sums.actual - sums.predicted) <= tau)",
        "return ~(abs(sums.actual - sums.predicted) >= tau)",
        ("tests/test_verification.py",),
    ),
    Plant(
        "infinite-bound-passes",
        "A bound that overflowed explains every residual.",
        "abft/threshold.py",
        "<= tau) | ~(tau < largest)",
        "<= tau)",
        ("tests/test_threshold.py::test_what_cannot_be_judged_is_suspect",),
    ),
    Plant(
        "nan-passes",
        "abs(d) > tau instead of ~(abs(d) <= tau): NaN is no longer suspect.",
        "abft/threshold.py",
        "return ~(abs(sums.actual - sums.predicted) <= tau) |",
        "return (abs(sums.actual - sums.predicted) > tau) |",
        ("tests/test_laws.py::test_what_is_not_finite_is_suspect",),
    ),
    Plant(
        "epsilon-all-ones",
        "The random signs are all plus: equal and opposite errors cancel.",
        "abft/checksum.py",
        "    out = eps.astype(np.float32)\n",
        "    out = np.ones(width, np.float32)\n",
        ("tests/test_checksum.py::test_signs_are_balanced",),
    ),
    Plant(
        "sketch-dropped",
        "The noise that cancelled in a row is taken for none.",
        "abft/checksum.py",
        "noise2 = sketches.unflatten(-1, (-1, SKETCHES)).square().mean(-1)",
        "noise2 = sketches.unflatten(-1, (-1, SKETCHES)).square().mean(-1) * 0.0",
        ("tests/test_functional.py::test_clean_data_is_silent",),
    ),
    Plant(
        "rounding-not-in-the-bound",
        "Results that arrive rounded are judged as if they were exact.",
        "abft/threshold.py",
        "    return tau + rounding * sums.squares[..., None] ** 0.5 if any(c.round) else tau\n",
        "    return tau\n",
        ("tests/test_verification.py",),
    ),
    Plant(
        "vote-returns-the-first",
        "The majority of three results is the first of them.",
        "abft/redundancy.py",
        "return torch.where(xy, x, z)",
        "return x",
        ("tests/test_faults.py::test_replicas_outvote_a_transient_fault",),
    ),
    Plant(
        "two-of-four-sums",
        "Only e and one are judged: half of all equal and opposite pairs pass.",
        "abft/backends/reference.py",
        "return Plan(arithmetic, layout, FORMS[form].kinds, wide)",
        "return Plan(arithmetic, layout, FORMS[form].kinds[:2], wide)",
        ("tests/test_faults.py::test_every_sum_is_judged",),
    ),
    # --- what is checked, remembered and repaired --------------------------------------------------------
    Plant(
        "wgrad-unchecked",
        "Products for weight gradients are counted as checked and are not.",
        "abft/ops/checked.py",
        "    p = reference.plan_for(call)\n    entry = _entry",
        '    p = reference.plan_for(call)\n    if call.role == "wgrad":\n        return y\n    entry = _entry',
        ("tests/test_training.py::test_replayed_steps_leave_no_trace[plain-wgrad]",),
    ),
    Plant(
        "panel-never-invalid",
        "The panel of a weight is believed for ever, whatever becomes of the weight.",
        "abft/panels.py",
        "    if frozen:\n        return (owner.announced,)\n    if owner._gathered is None:",
        "    return (0,)\n    if owner._gathered is None:",
        ("tests/test_panels.py::test_an_edit_that_moves_the_version_is_followed_however_small",),
    ),
    Plant(
        "panel-outlives-optimizer-steps",
        "Fused optimizers, which leave the version of a weight alone, are not followed.",
        "abft/panels.py",
        "    _epoch += 1\n",
        "    _epoch += 0\n",
        ("tests/test_panels.py::test_an_optimizer_trains_as_it_does_unprotected",),
    ),
    Plant(
        "broken-panel-believed",
        "A panel whose own bits changed is not rebuilt.",
        "abft/panels.py",
        "return entry.integrity is None or bool(",
        "return True or bool(",
        ("tests/test_faults.py::test_a_broken_panel_is_mended_and_no_fault_of_the_data",),
    ),
    Plant(
        "hidden-change-not-looked-for",
        "A frozen half-precision weight is not compared bit by bit.",
        "abft/panels.py",
        "    return bits.total(matrix) == entry.total\n",
        "    return True\n",
        ("tests/test_lane.py::test_a_frozen_half_weight_is_compared_bit_by_bit",),
    ),
    Plant(
        "frozen-followed-like-tracked",
        "A frozen panel is rebuilt after any optimizer step and any write that torch can tell.",
        "abft/panels.py",
        "    if frozen:\n        return (owner.announced,)\n",
        "",
        ("tests/test_panels.py::test_what_happens_to_another_model_excuses_no_fault",),
    ),
    Plant(
        "frozen-arbitrated-like-tracked",
        "A dense change of a frozen weight is taken for an edit.",
        "abft/backends/arbitration.py",
        '    if y is None and case.call.policy.weights == "tracked":',
        "    if y is None:",
        ("tests/test_panels.py::test_a_frozen_weight_is_never_silently_followed",),
    ),
    Plant(
        "repair-is-a-no-op",
        "The faulty product is delivered and called repaired.",
        "abft/backends/arbitration.py",
        "    else:\n        _correct(case, left)\n",
        "    else:\n        faulty = case.y\n        _correct(case, left)\n        return faulty\n",
        ("tests/test_policy.py::test_level_correct_repairs",),
    ),
    Plant(
        "next-column-named",
        "A fault is located one column beside its place.",
        "abft/backends/arbitration.py",
        "return None if column is None else start + column",
        "return None if column is None else start + column + 1",
        ("tests/test_faults.py::test_a_single_wrong_element_is_located",),
    ),
    Plant(
        "injection-not-undone",
        "A weight keeps the fault that was injected into it.",
        "abft/injection/injector.py",
        "for weight, place, before in reversed(self._undo):",
        "for weight, place, before in ():",
        ("tests/test_panels.py::test_injected_weight_faults_are_repaired_and_undone",),
    ),
    Plant(
        "checks-counted-twice",
        "The ledger counts every row of a product twice.",
        "abft/ledger.py",
        "_REPEATED if repeated else _CHECKS)] += checks",
        "_REPEATED if repeated else _CHECKS)] += 2 * checks",
        ("tests/test_reporting.py::test_a_check_is_a_row_of_a_product",),
    ),
    Plant(
        "detect-repairs",
        "Level detect changes the result.",
        "abft/backends/arbitration.py",
        "        _observe(case, left)\n",
        "        _correct(case, left)\n",
        ("tests/test_policy.py::test_level_detect_reports_and_leaves_the_result",),
    ),
    Plant(
        "bypass-not-counted",
        "What torch computed unchecked is not told.",
        "abft/ledger.py",
        "_bypassed[reason] = _bypassed.get(reason, 0) + 1",
        "_bypassed[reason] = 0",
        ("tests/test_policy.py::test_level_off_delivers_the_fault_and_counts_the_product",),
    ),
    Plant(
        "masked-repair-not-taken",
        "On a device without kernels the faulty rows are delivered.",
        "abft/backends/masked.py",
        "        y = torch.where(bad.unsqueeze(-1), again, y)\n",
        "",
        ("tests/test_masked.py::test_a_struck_row_is_recomputed_and_recorded",),
    ),
    # --- lanes -------------------------------------------------------------------------------------------
    Plant(
        "quick-infinite-bound-passes",
        "In one group the quick judgement divides any residual away by a bound that overflowed.",
        "abft/backends/quick.py",
        "        tau2 *= 0.0  # NaN where a bound is infinite, which would divide any residual away\n        residual += tau2\n",
        "",
        ("tests/test_quick.py::test_wrong_numbers_whose_squares_alone_overflow_are_not_passed",),
    ),
    Plant(
        "quick-infinite-bound-passes-in-groups",
        "In several groups the quick judgement divides any residual away by a bound that overflowed.",
        "abft/backends/quick.py",
        "        return found if seen.max() < q.largest else math.nan\n",
        "        return found\n",
        ("tests/test_quick.py::test_a_bound_that_overflowed_explains_nothing",),
    ),
    Plant(
        "quick-infinite-bound-passes-when-rounded",
        "The same of results that arrive rounded.",
        "abft/backends/quick.py",
        "    return found if tau.max() < q.largest else math.nan\n",
        "    return found\n",
        ("tests/test_quick.py::test_a_bound_that_overflowed_explains_nothing",),
    ),
    Plant(
        "lane-forgets-the-bias",
        "A lane is taken although its bias has changed.",
        "abft/backends/lane.py",
        " and kept.validity == panels.validity(bias, owner, frozen)",
        "",
        ("tests/test_lane.py::test_a_change_leaves_it",),
    ),
    Plant(
        "lane-forgets-the-policy",
        "A lane is taken under another policy than its own.",
        "abft/backends/lane.py",
        "        or lane.policy.text != policy\n",
        "",
        ("tests/test_lane.py::test_another_policy_leaves_it",),
    ),
    Plant(
        "lane-never-audits-its-panel",
        "Calls that take a lane never compare the panel with its checksum.",
        "abft/backends/lane.py",
        " or entry.uses % PANEL_AUDIT == PANEL_AUDIT - 1",
        "",
        ("tests/test_lane.py::test_the_panel_is_audited_inside_the_lane_too",),
    ),
    # --- training ----------------------------------------------------------------------------------------
    Plant(
        "guard-never-replays",
        "A wrong step is given up at once.",
        "abft/training.py",
        "if wrong and self._attempt <= self.max_replays:",
        "if wrong and self._attempt <= 0:",
        ("tests/test_training.py::test_a_dropped_step_never_happened",),
    ),
    Plant(
        "guard-looks-away",
        "A wrong step is taken.",
        "abft/training.py",
        "wrong = found.observed + found.uncorrected > 0",
        "wrong = False",
        ("tests/test_training.py::test_replayed_steps_leave_no_trace[plain-fprop]",),
    ),
    Plant(
        "guard-leaves-buffers",
        "A replay begins with the buffers of the wrong attempt.",
        "abft/training.py",
        "        self.restore_buffers()\n        for p, grad",
        "        for p, grad",
        ("tests/test_training.py::test_replayed_steps_leave_no_trace[plain-fprop]",),
    ),
    Plant(
        "guard-leaves-random-states",
        "A replay draws other random numbers than the wrong attempt.",
        "abft/training.py",
        "        torch.set_rng_state(self.cpu)\n",
        "",
        ("tests/test_training.py::test_replayed_steps_leave_no_trace[plain-fprop]",),
    ),
    Plant(
        "guard-leaves-gradients",
        "A replay adds to the gradients of the wrong attempt.",
        "abft/training.py",
        "            p.grad = None if grad is None else grad.clone()\n",
        "            pass\n",
        ("tests/test_training.py::test_replayed_steps_leave_no_trace[plain-fprop]",),
    ),
    Plant(
        "mark-waits",
        "A guarded step reads the ledgers when an attempt begins, too.",
        "abft/reporting.py",
        "        now = ledger.on_host()\n        _open(now)",
        "        drain()\n        now = ledger.on_host()\n        _open(now)",
        ("tests/test_marks.py::test_an_attempt_has_one_transfer_per_device",),
    ),
    Plant(
        "maxima-not-folded",
        "What was largest before a mark that nobody holds is lost.",
        "abft/ledger.py",
        "            target.copy_(torch.maximum(target, maxima))\n",
        "            pass\n",
        ("tests/test_marks.py::test_dropped_marks_are_forgotten_and_their_maxima_are_not",),
    ),
    Plant(
        "pending-fault-ignored",
        "A fault between the last attempt and the step reaches the weights.",
        "abft/training.py",
        "    rows -= _replayed - guard._replayed\n",
        "    rows = 0\n",
        ("tests/test_training.py::test_a_fault_after_the_last_attempt_keeps_the_step_back",),
    ),
    Plant(
        "issue-not-said",
        "What a device computed between attempt and step is not read before the step.",
        "abft/ops/checked.py",
        "            ledger.issued()\n",
        "            pass\n",
        ("tests/test_marks.py::test_a_fault_on_a_device_after_the_last_attempt_keeps_the_step_back",),
    ),
    # --- the kernels -------------------------------------------------------------------------------------
    Plant(
        "kernel-repair-not-stored",
        "The repeated tile never reaches Y.",
        "triton_kernels/repair.py",
        "        store_tile(y, out, batch, rows, cols, shape.m, shape.n)",
        "        pass",
        ("tests/kernels/test_kernel_faults.py::test_fragments_and_tiles",),
    ),
    Plant(
        "kernel-last-sum-not-judged",
        "Of the four sums of a full panel the kernels judge three.",
        "triton_kernels/judgement.py",
        "        suspect |= ~explained(own, own_tau)\n",
        "        suspect |= ~explained(own, own_tau) & (kind != 3)\n",
        ("tests/kernels/test_kernel_faults.py::test_every_sum_is_judged_and_judged_again",),
    ),
    Plant(
        "kernel-last-sum-not-judged-again",
        "After the repetition the kernels judge three of the four sums.",
        "triton_kernels/settle.py",
        "ok, judged = ok & own, judged & own_judged",
        "ok, judged = ok & (own | (kind == 3)), judged & own_judged",
        ("tests/kernels/test_kernel_faults.py::test_every_sum_is_judged_and_judged_again",),
    ),
    Plant(
        "kernel-always-recomputed",
        "A fault that returned in the repetition is called repaired.",
        "triton_kernels/settle.py",
        "tl.where(ok, tl.where(changed, S_RECOMPUTED, S_CLEAN), S_UNCORRECTED)",
        "S_RECOMPUTED",
        ("tests/kernels/test_kernel_faults.py::test_a_fault_that_returns_is_uncorrected",),
    ),
    Plant(
        "kernel-infinite-bound-passes",
        "In the kernels a bound that overflowed explains every residual.",
        "triton_kernels/judgement.py",
        "return (tl.abs(residual) <= tau) & (tau < ACC_LARGEST)",
        "return tl.abs(residual) <= tau",
        ("tests/kernels/test_kernel_faults.py::test_every_harmful_accumulator_fault_is_found_and_repaired",),
    ),
    # --- the audit of compiled kernels -------------------------------------------------------------------
    Plant(
        "audit-registers-not-compared",
        "A kernel may take more registers than were audited.",
        "bench/audited.py",
        'COMPARED = ("config", "registers", ',
        'COMPARED = ("config", ',
        ("tests/compile/test_differences.py::test_a_line_reads_like_one",),
    ),
    Plant(
        "audit-every-jump-back-is-a-loop",
        "Waiting behind a kernel's end makes a loop of all that lies between.",
        "bench/sass.py",
        "                if head in above:",
        "                if head <= block:",
        ("tests/compile/test_sass.py::test_waiting_behind_the_end_makes_no_loop_of_what_lies_between",),
    ),
    # --- deferred checks -------------------------------------------------------------------------------
    Plant(
        "deferred-judged-and-lost",
        "A slot stays fresh after it was judged: the next product in it counts it as lost.",
        "triton_kernels/verify_deferred.py",
        "            tl.store(slot + STATE, tl.cast(0, tl.int64))\n",
        "",
        ("tests/kernels/test_kernel_deferred.py::test_a_full_workspace_is_judged_and_used_again",),
    ),
    Plant(
        "deferred-loss-not-told",
        "Evidence that was overwritten before it was judged is forgotten.",
        "triton_kernels/deferred.py",
        "        tl.atomic_add(words + LOST, tl.cast(1, tl.int64))",
        "        pass",
        ("tests/kernels/test_kernel_deferred.py::test_what_a_replay_overwrites_before_it_was_judged_is_counted",),
    ),
    Plant(
        "deferred-scales-forgotten",
        "An fp16 panel's powers of two are not undone.",
        "triton_kernels/deferred.py",
        "        if scales is not None:\n",
        "        if scales is not None and K < 0:\n",
        ("tests/kernels/test_kernel_deferred.py::test_many_products_are_judged_in_one_launch_with_the_counts_of_immediate_checks",),
    ),
    # --- arbitration on the device -----------------------------------------------------------------------
    Plant(
        "budget-ignored",
        "The repair computes as many tiles again as it likes.",
        "triton_kernels/repair.py",
        ">= budget:",
        "< 0:",
        ("tests/kernels/test_arbitration.py::test_beyond_its_budget_the_repair_leaves_rows_uncorrected",),
    ),
    Plant(
        "weight-never-blamed",
        "Arbitration takes every weight for what it was.",
        "triton_kernels/arbitration.py",
        "who = tl.where(changed > 0, verdict, NOBODY)",
        "who = tl.where(changed < 0, verdict, NOBODY)",
        ("tests/kernels/test_arbitration.py::test_detect_names_the_element_and_changes_nothing",),
    ),
    Plant(
        "panel-not-rebuilt",
        "A panel that changed in memory stays as it is.",
        "triton_kernels/arbitration.py",
        "    if (who == PANEL) | (who == STALE):",
        "    if who == STALE:",
        ("tests/kernels/test_arbitration.py::test_the_panel_of_an_activation_is_rebuilt_too",),
    ),
    Plant(
        "fingerprint-without-rows",
        "The second sum of a fingerprint does not tell rows apart.",
        "triton_kernels/fingerprint.py",
        "low_weighted += tl.sum(h * index[:, None], 0)",
        "low_weighted += tl.sum(h, 0)",
        ("tests/kernels/test_arbitration.py::test_fingerprints_are_integer_sums_of_every_group",),
    ),
    Plant(
        "restored-bits-forgotten",
        "A named element is multiplied as it is now.",
        "triton_kernels/tiles.py",
        "(cols[None, :] == col), old, values)",
        "(cols[None, :] == col), values, values)",
        ("tests/kernels/test_arbitration.py::test_a_part_of_one_fragment_is_restored",),
    ),
    Plant(
        "edit-taken-for-a-fault",
        "Of a tracked weight, any change that can be named is undone in the product.",
        "triton_kernels/arbitration.py",
        "located & small, RESTORED",
        "located, RESTORED",
        ("tests/kernels/test_arbitration.py::test_an_unannounced_edit_is_followed",),
    ),
    Plant(
        "fingerprint-not-renewed",
        "After an edit the device remembers the weight before it.",
        "triton_kernels/arbitration.py",
        "            _remember(w, was, group, shape, BN, BK)",
        "            pass",
        ("tests/kernels/test_arbitration.py::test_an_unannounced_edit_is_followed",),
    ),
    Plant(
        "restore-writes-elsewhere",
        "abft.restore writes the remembered bits into the wrong element.",
        "abft/protection.py",
        "integers[row, column] = pattern",
        "integers[row - 1, column] = pattern",
        ("tests/test_panels.py::test_restore_writes_the_remembered_bits_back",),
    ),
)
