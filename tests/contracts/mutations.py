"""Planted mistakes, each of which a named test must catch. They are the mistakes that published code really makes."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MUTATIONS", "Mutation"]

FGM = "plugins/hybridengine_plugins/adversarial/fgm.py"
FREELB = "plugins/hybridengine_plugins/adversarial/freelb.py"
PGD = "plugins/hybridengine_plugins/adversarial/pgd.py"
SMART = "plugins/hybridengine_plugins/adversarial/smart.py"
FREEAT = "plugins/hybridengine_plugins/adversarial/freeat.py"
LOOK_SAM = "plugins/hybridengine_plugins/adversarial/look_sam.py"
TAVAT = "plugins/hybridengine_plugins/adversarial/tavat.py"
VAT = "plugins/hybridengine_plugins/adversarial/vat.py"
RDROP = "plugins/hybridengine_plugins/regularize/rdrop.py"
DISTILL = "plugins/hybridengine_plugins/regularize/distill.py"
EMA = "plugins/hybridengine_plugins/regularize/ema.py"
BASE = "hybridengine/seams/base.py"
INNER = "hybridengine/seams/inner.py"
UPHILL = "hybridengine/seams/uphill.py"
CONTEXT = "hybridengine/seams/context.py"
GRADIENTS = "hybridengine/seams/gradients.py"
PRECISION = "hybridengine/seams/precision.py"


@dataclass(frozen=True)
class Mutation:
    """One mistake: `old` stands exactly once in `file` and becomes `new`; `node` must then fail.

    Attributes:
        fast: run it with the default tests too, not only with `-m slow`.
    """

    name: str
    file: str
    old: str
    new: str
    node: str
    fast: bool = False


MUTATIONS = (
    Mutation(
        "batch-wide norm",
        CONTEXT,
        "        return dict(kernels.perturb_step(detached, grads, masks, **sizes, norm=norm, per=per))",
        "        one = [{s: x.flatten(0, 1)[None] for s, x in part.items()} for part in (detached, grads, masks)]\n"
        "        moved = kernels.perturb_step(*one, **sizes, norm=norm)\n"
        "        return {s: x.view_as(detached[s]) for s, x in moved.items()}",
        "tests/plugins/test_fgm.py::test_each_sequence_moves_by_epsilon",
    ),
    Mutation(
        "unpinned dropout",
        CONTEXT,
        "dropout_key(device, view.key)",
        "dropout_key(device, None)",
        "tests/core/test_seams_randomness.py::test_equal_keys_draw_equal_masks_and_forks_others",
    ),
    Mutation(
        "other dropout in each ascent step",
        FREELB,
        "share.at(work.view.plus(leaves))",
        "share.at(work.view.plus(leaves).fork(step))",
        "tests/plugins/test_freelb.py::test_steps_share_one_dropout_mask",
    ),
    Mutation(
        "restore by subtraction",
        GRADIENTS,
        "        with kernels.keep(parameters):\n            yield parameters",
        "        saved = [parameter.clone() for parameter in parameters]\n"
        "        try:\n            yield parameters\n        finally:\n"
        "            torch._foreach_sub_(parameters, torch._foreach_sub(parameters, saved))",
        "tests/core/test_seams_gradients.py::test_moved_weights_are_restored_to_the_bit",
    ),
    Mutation(
        "missing 1/K",
        FREELB,
        "share = work.scaled(1 / self.steps)",
        "share = work",
        "tests/plugins/test_freelb.py::test_epsilon_zero_is_plain_training",
    ),
    Mutation(
        "double-counted clean gradient",
        FGM,
        "inner(ctx, at_leaves.scaled(1 - self.weight))",
        "inner(ctx, at_leaves)",
        "tests/plugins/test_fgm.py::test_epsilon_zero_is_plain_training[0.5]",
    ),
    Mutation(
        "first-order MAML",
        INNER,
        "create_graph=not first_order",
        "create_graph=False",
        "tests/plugins/test_maml.py::test_closed_form_on_a_quadratic[1-False-1.0]",
    ),
    Mutation(
        "sum-KL beside a mean",
        RDROP,
        '(self.alpha * kl, "rows")',
        '(self.alpha * kl * batch.size, "rows")',
        "tests/plugins/test_rdrop.py::test_matches_the_paper[1.0]",
    ),
    Mutation(
        "one mask for both passes of R-Drop",
        RDROP,
        'view.fork("rdrop", 1)',
        'view.fork("rdrop", 0)',
        "tests/plugins/test_rdrop.py::test_the_two_masks_differ[False]",
    ),
    Mutation(
        "padding perturbed by the random start",
        FREELB,
        "{site: ctx.mask(work.batch, site) for site in delta}",
        "{site: zero[..., 0] == 0 for site, zero in delta.items()}",
        "tests/plugins/test_freelb.py::test_start_and_path_keep_to_mask_and_ball",
    ),
    Mutation(
        "padding perturbed by the probe",
        CONTEXT,
        'return batch.masks["perturbable"][self.sites.table[site].input]',
        'return torch.ones_like(batch.masks["perturbable"][self.sites.table[site].input])',
        "tests/plugins/test_vat.py::test_matches_the_paper[1.0-1.0-0.3-1]",
    ),
    Mutation(
        "gradient dropped by accumulation",
        BASE,
        "    parts += [ctx.backward(ctx, work) for work in works[-1:]]",
        "    ctx.zero()\n    parts += [ctx.backward(ctx, work) for work in works[-1:]]",
        "tests/core/test_seams_accumulation.py::test_the_order_of_micro_batches_does_not_matter",
        fast=True,
    ),
    Mutation(
        "mean of means",
        BASE,
        "1 / max(totals[batch.task, unit], 1) for unit in batch.counts",
        "1 / max(batch.counts[unit] * len(batches), 1) for unit in batch.counts",
        "tests/core/test_seams_accumulation.py::test_any_uneven_split",
    ),
    Mutation(
        "no projection",
        PGD,
        "epsilon=self.epsilon, norm=self.norm",
        "epsilon=None, norm=self.norm",
        "tests/plugins/test_pgd.py::test_matches_the_paper[0.5-0.4-3-l2]",
        fast=True,
    ),
    Mutation(
        "ascents through the weights' gradients",
        PGD,
        "gradient = ctx.grad(loss, list(leaves.values()))",
        "ctx.accumulate(loss)\n            gradient = [leaf.grad for leaf in leaves.values()]",
        "tests/plugins/test_pgd.py::test_matches_the_paper[1.0-0.3-3-l2]",
    ),
    Mutation(
        "clean predictions not detached",
        VAT,
        "clean.detach()",
        "clean",
        "tests/plugins/test_vat.py::test_matches_the_paper[1.0-1.0-0.3-1]",
    ),
    Mutation(
        "every replay ticks the schedule",
        FREEAT,
        "with ctx.holding_schedule(not last):",
        "with ctx.holding_schedule(False):",
        "tests/plugins/test_freeat.py::test_the_schedule_ticks_once_a_step",
    ),
    Mutation(
        "replays of a clean input",
        FREEAT,
        "deltas = [self._ascend(ctx, work, own) for work, own in zip(works, leaves, strict=True)]",
        "deltas = [ctx.zeros(work.batch) for work in works]",
        "tests/plugins/test_freeat.py::test_matches_the_paper[3-0.1-None-l2]",
    ),
    Mutation(
        "LookSAM keeps all of SAM's gradient",
        LOOK_SAM,
        "rest = orthogonal(near, found.here)",
        "rest = {name: near[name] for name in found.here}",
        "tests/plugins/test_look_sam.py::test_matches_the_paper[2-0.05-0.7]",
    ),
    Mutation(
        "LookSAM magnifies rounding",
        LOOK_SAM,
        "part > rounding * whole",
        "part > 0",
        "tests/plugins/test_look_sam.py::test_rho_zero_is_plain_training_and_rounding_is_not_magnified[torch.float32]",
    ),
    Mutation(
        "a word's perturbations pile up",
        TAVAT,
        "table[words[seen]] = sums[seen] / counts[seen].unsqueeze(-1)",
        "table[words[seen]] += sums[seen]",
        "tests/plugins/test_tavat.py::test_the_table_does_not_grow_with_how_often_a_word_stands",
    ),
    Mutation(
        "tokens of tavat step by the norm of their sequence",
        TAVAT,
        'step_size=self.step_size, per="token"',
        "step_size=self.step_size",
        "tests/plugins/test_tavat.py::test_matches_the_paper[2-0.1-0.4-0.3]",
    ),
    Mutation(
        "one norm for all tokens of a sequence",
        SMART,
        "g.abs().amax(-1, keepdim=True)",
        "g.abs().amax((1, 2), keepdim=True)",
        "tests/plugins/test_smart.py::test_every_token_keeps_to_its_own_box_and_padding_does_not_move",
    ),
    Mutation(
        "the average is the weights",
        SMART,
        "rate=1 - self.decay",
        "rate=1.0",
        "tests/plugins/test_smart.py::test_the_average_is_that_of_the_recursion_and_is_kept_in_run_state",
    ),
    Mutation(
        "labelled delta on unlabelled rows",
        VAT,
        'view.clean().fork("unlabelled")',
        'view.fork("unlabelled")',
        "tests/plugins/test_vat.py::test_an_attack_on_labelled_rows_does_not_reach_unlabelled_ones",
    ),
    Mutation(
        "SAM keeps the ascent's gradient",
        UPHILL,
        "gradient, weights = ctx.take_grads(), ctx.run.perturbed()",
        "weights = ctx.run.perturbed()\n"
        "    gradient = {k: ctx.unscaled(p.grad.clone()) for k, p in weights.items() if p.grad is not None}",
        "tests/plugins/test_sam.py::test_matches_the_paper[0.05]",
    ),
    Mutation(
        "cast cache alive",
        PRECISION,
        "cache_enabled=False",
        "cache_enabled=True",
        "tests/core/test_seams_context.py::test_moved_weights_are_not_read_from_a_cast_cache",
    ),
    Mutation(
        "loss scale left in the gradient",
        GRADIENTS,
        "return value if self.run.loss_scale.value == 1.0 else value / self.run.loss_scale.value",
        "return wide",
        "tests/core/test_seams_gradients.py::test_grad_is_unscaled_at_least_fp32_and_touches_no_grad",
    ),
    Mutation(
        "distillation without T squared",
        DISTILL,
        "self.alpha * self.temperature**2 * kl",
        "self.alpha * kl",
        "tests/plugins/test_distill.py::test_matches_the_paper[0.5-2.0]",
    ),
    Mutation(
        "average without warm-up",
        EMA,
        "rate = 1 - min(self.decay, (1 + step) / (10 + step))",
        "rate = 1 - self.decay",
        "tests/plugins/test_ema.py::test_matches_the_recursion",
    ),
    Mutation(
        "galore turns momentum round by chance",
        "plugins/hybridengine_plugins/optim/galore.py",
        "torch.where((found * before).sum(0) < 0, -found, found)",
        "-found",
        "tests/plugins/test_galore.py::test_updates_follow_the_algorithm[wide-2]",
    ),
    Mutation(
        "galore projects tall matrices from the wrong side",
        "plugins/hybridengine_plugins/optim/galore.py",
        "wide = value.shape[0] <= value.shape[-1]",
        "wide = True",
        "tests/plugins/test_galore.py::test_updates_follow_the_algorithm[tall-1]",
    ),
    Mutation(
        "lion's momentum before its sign",
        "plugins/hybridengine_plugins/optim/lion.py",
        "torch._foreach_lerp(momenta, gradients, 1 - beta1)",
        "torch._foreach_lerp(momenta, gradients, 1 - beta2)",
        "tests/plugins/test_optimizers.py::test_lion_follows_the_paper",
    ),
    Mutation(
        "muon without the size of an AdamW step",
        "plugins/hybridengine_plugins/optim/muon.py",
        " * (0.2 * max(value.shape) ** 0.5)",
        "",
        "tests/plugins/test_optimizers.py::test_muon_is_torchs_own_on_matrices[shape0]",
    ),
    Mutation(
        "schedule-free evaluates the training weights",
        "plugins/hybridengine_plugins/optim/schedule_free.py",
        '1 - 1 / self.defaults["betas"][0]',
        "0.0",
        "tests/plugins/test_optimizers.py::test_evaluation_sees_the_average_and_training_goes_on_from_its_own_weights",
    ),
    Mutation(
        "schedule-free averages evenly through the warm-up",
        "plugins/hybridengine_plugins/optim/schedule_free.py",
        'group["lr"] ** 2 / group["weight_sum"]',
        '1 / group["step"]',
        "tests/plugins/test_optimizers.py::test_schedule_free_follows_the_paper_through_a_warm_up",
    ),
    Mutation(
        "rslora scaled by the rank",
        "plugins/hybridengine_plugins/adapters/lora.py",
        '{"use_rslora": True}',
        '{"use_rslora": False}',
        "tests/plugins/test_low_rank_kin.py::test_three_steps_are_those_of_the_formula[rslora]",
    ),
    Mutation(
        "LoRA+ speeds up A",
        "plugins/hybridengine_plugins/adapters/lora.py",
        'return ".lora_B." in name or',
        'return ".lora_A." in name or',
        "tests/plugins/test_low_rank_kin.py::test_b_gets_its_own_rate",
    ),
    Mutation(
        "adapters drawn from the global stream",
        "hybridengine/model/adapters.py",
        "seeded(torch.default_generator, mix(run.seed, name))",
        "seeded(torch.default_generator, 0)",
        "tests/plugins/test_lora.py::test_the_start_depends_on_the_seed_alone_and_leaves_the_global_stream",
    ),
    Mutation(
        "focal loss of the wrong answers",
        "plugins/hybridengine_plugins/regularize/focal.py",
        "(-torch.expm1(log_p)).clamp_min",
        "(torch.exp(log_p)).clamp_min",
        "tests/plugins/test_focal.py::test_what_is_sure_counts_less_by_the_factor",
    ),
    Mutation(
        "a row is its own partner",
        "plugins/hybridengine_plugins/regularize/supcon.py",
        "(targets[:, None] == targets[None, :]) & ~itself",
        "targets[:, None] == targets[None, :]",
        "tests/plugins/test_supcon.py::test_three_steps_match_the_paper[1.0-0.3-mean]",
    ),
    Mutation(
        "padding counts in a text's state",
        "hybridengine/seams/pooling.py",
        "(states * weights).sum(1) / weights.sum(1).clamp_min(1)",
        "states.mean(1)",
        "tests/plugins/test_supcon.py::test_padding_and_loss_scale",
    ),
    Mutation(
        "L2-SP pulls to zero",
        "plugins/hybridengine_plugins/regularize/l2_sp.py",
        "self.alpha * (wide(weight.detach()) - start[name])",
        "self.alpha * wide(weight.detach())",
        "tests/plugins/test_l2_sp.py::test_three_steps_match_the_definition",
    ),
    Mutation(
        "dropout of adapters overridden",
        "plugins/hybridengine_plugins/regularize/dropout.py",
        "order=-10,  # before adapters, whose dropout is their own",
        "order=200,",
        "tests/plugins/test_dropout.py::test_only_the_modules_named_change_and_adapters_keep_their_own",
    ),
    Mutation(
        "GSAM climbs along the gap",
        "plugins/hybridengine_plugins/adversarial/sam.py",
        "wide(near[name]) - self.alpha * value",
        "wide(near[name]) + self.alpha * value",
        "tests/plugins/test_sam.py::test_gsam_matches_the_paper[0.4]",
    ),
    Mutation(
        "AWP by one norm of all tensors",
        "plugins/hybridengine_plugins/adversarial/sam.py",
        'return {"rule": "awp"}',
        'return {"rule": "sam"}',
        "tests/plugins/test_sam.py::test_awp_matches_the_paper[0.1]",
    ),
    Mutation(
        "AWP attacks the input twice",
        "plugins/hybridengine_plugins/adversarial/sam.py",
        "        with ctx.sharing():\n            return SAM.wrap_gradient(self, inner, ctx, works)",
        "        return SAM.wrap_gradient(self, inner, ctx, works)",
        "tests/plugins/test_sam.py::test_awp_attacks_the_input_once",
    ),
    Mutation(
        "few-shot chooses the same rows of every split",
        "plugins/hybridengine_plugins/data/few_shot.py",
        '"few-shot", split.name, name)',
        '"few-shot", name)',
        "tests/plugins/test_row_choice.py::test_few_shot_choices_nest_and_differ_by_seed_and_split",
    ),
    Mutation(
        "balanced sampling starts over each epoch",
        "plugins/hybridengine_plugins/data/balanced_sampling.py",
        "start, drawn = epoch * count, []",
        "start, drawn = 0, []",
        "tests/plugins/test_row_choice.py::test_balanced_sampling_lets_rows_of_a_class_take_turns",
    ),
    Mutation(
        "curriculum counts micro-batches as steps",
        "plugins/hybridengine_plugins/data/curriculum.py",
        "step = (epoch * batches + index) // train.accumulate",
        "step = epoch * batches + index",
        "tests/plugins/test_row_choice.py::test_curriculum_knows_the_step_where_micro_batches_are_summed",
    ),
    Mutation(
        "hidden states that nobody was asked for",
        "hybridengine/seams/context.py",
        "features = features or (self._features and model is None)",
        "features = features",
        "tests/plugins/test_supcon.py::test_weight_zero_is_plain_training",
    ),
)
