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
ATTACK = "hybridengine/plugin/attack.py"
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
        "hybridengine/seams/at_sites.py",
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
        "inner(ctx, work.at(work.view.plus(leaves)).scaled(1 - self.weight))",
        "inner(ctx, work.at(work.view.plus(leaves)))",
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
        "hybridengine/seams/at_sites.py",
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
        '"epsilon": self.epsilon}',
        '"epsilon": None}',
        "tests/plugins/test_pgd.py::test_matches_the_paper[0.5-0.4-3-l2]",
        fast=True,
    ),
    Mutation(
        "ascents through the weights' gradients",
        ATTACK,
        "            return height.detach(), ctx.grad(height, list(leaves.values()))",
        "            ctx.accumulate(height)\n"
        "            return height.detach(), [leaf.grad for leaf in leaves.values()]",
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
        "targeted attacks climb",
        ATTACK,
        "terms = {name: (-value, unit)",
        "terms = {name: (value, unit)",
        "tests/plugins/test_attack_options.py::test_targeted_steps_are_those_of_the_formula[pgd-least-likely]",
    ),
    Mutation(
        "random targets are the label",
        ATTACK,
        "(own + 1 + (draws",
        "(own + (draws",
        "tests/plugins/test_attack_options.py::test_targets_are_never_the_label_and_their_own_rows",
    ),
    Mutation(
        "a ramp that ends too early",
        ATTACK,
        "(step - self.start + 1) / self.ramp",
        "(step + 1) / self.ramp",
        "tests/plugins/test_attack_options.py::test_sizes_grow_in_a_line_after_the_start",
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
        'step_size=length, per="token"',
        "step_size=length",
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
        '"kl": self.alpha * self.temperature**2,',
        '"kl": self.alpha,',
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
        "wide = value.dim() == 2 and value.shape[0] <= value.shape[1]",
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
        "an adapter that starts at random",
        "plugins/hybridengine_plugins/adapters/adapter.py",
        "(self.down.bias, self.up.weight, self.up.bias)",
        "(self.down.bias, self.up.bias)",
        "tests/plugins/test_adapter.py::test_starts_at_the_pretrained_function_and_moves_only_what_it_declares"
        "[houlsby-bert]",
    ),
    Mutation(
        "a random pooler is not saved",
        "hybridengine/train/adapters.py",
        "wanted = {*run.may_optimise, *run.missing_parameters}",
        "wanted = {*run.may_optimise}",
        "tests/plugins/test_adapter.py::test_best_holds_what_was_trained_and_predicts_to_the_bit[freeze]",
    ),
    Mutation(
        "a resting layer moves by its last gradient",
        GRADIENTS,
        "            parameter.grad = None  # of an earlier step: the optimizer would apply it again\n",
        "",
        "tests/plugins/test_lisa.py::test_eight_steps_match_the_paper[keep]",
    ),
    Mutation(
        "LISA keeps the state of resting layers",
        "plugins/hybridengine_plugins/optim/lisa.py",
        "ctx.run.optimizer.state.pop(parameter, None)",
        "ctx.run.optimizer.state.get(parameter, None)",
        "tests/plugins/test_lisa.py::test_eight_steps_match_the_paper[drop]",
    ),
    Mutation(
        "layers are dropped in evaluation",
        "plugins/hybridengine_plugins/regularize/layer_drop.py",
        "dropped = layer.training and self._draw()",
        "dropped = self._draw()",
        "tests/plugins/test_layer_drop.py::test_evaluation_uses_every_layer",
    ),
    Mutation(
        "stacked views share their layers",
        "plugins/hybridengine_plugins/regularize/layer_drop.py",
        "stackable=False,",
        "stackable=True,",
        "tests/plugins/test_layer_drop.py::test_two_views_are_never_stacked_into_one_draw",
    ),
    Mutation(
        "a dropped layer of T5 hands on no position bias",
        "plugins/hybridengine_plugins/regularize/layer_drop.py",
        "            more = not isinstance(output, Tensor)\n",
        "            more = False\n",
        "tests/plugins/test_layer_drop.py::test_t5_hands_its_position_bias_on[dropped0]",
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
        "copies of copies",
        "hybridengine/text/augmentation.py",
        '"augmented_from" not in row',
        "row is not None",
        "tests/plugins/test_synonym.py::test_copies_of_several_methods_add_up",
    ),
    Mutation(
        "all copies of a row drawn by one key",
        "hybridengine/text/augmentation.py",
        "ids[i], number % copies)",
        "ids[i])",
        "tests/plugins/test_synonym.py::test_alone_and_keyed",
    ),
    Mutation(
        "stop words replaced by synonyms",
        "plugins/hybridengine_plugins/data/synonym.py",
        "not word.is_stop_word and word.core",
        "word.core",
        "tests/plugins/test_synonym.py::test_replaces_so_many_words_that_are_no_stop_words",
    ),
    Mutation(
        "the old word filled in again",
        "plugins/hybridengine_plugins/data/mask_infill.py",
        "barred[index, self._tokens.get(word.lower(), [])] = True",
        "pass",
        "tests/plugins/test_mask_infill.py::test_only_whole_words_are_written_and_never_the_old_one",
    ),
    Mutation(
        "the label's characters taken for the text's",
        "plugins/hybridengine_plugins/data/mask_infill.py",
        "word.start + len(head), word.end + len(head)",
        "word.start, word.end",
        "tests/plugins/test_mask_infill.py::test_the_label_is_read_before_the_text_and_not_written_into_it",
    ),
    Mutation(
        "both ways drawn by one key",
        "plugins/hybridengine_plugins/data/back_translation.py",
        "[mix(key, way) for key in numbered]",
        "numbered",
        "tests/plugins/test_back_translation.py::test_matches_decoding_by_hand[5]",
    ),
    Mutation(
        "UDA's target learns too",
        "plugins/hybridengine_plugins/data/uda.py",
        """        with torch.no_grad():
            fixed = ctx""",
        """        if True:
            fixed = ctx""",
        "tests/plugins/test_uda.py::test_no_gradient_flows_into_the_prediction_on_the_unlabelled_text",
    ),
    Mutation(
        "UDA divided by the rows that count",
        "plugins/hybridengine_plugins/data/uda.py",
        "self.weight * kl, ",
        "self.weight * kl * part.size / sure.sum().clamp_min(1), ",
        "tests/plugins/test_uda.py::test_invariants[none]",
    ),
    Mutation(
        "rewritten rows of other places",
        "hybridengine/batches.py",
        "{name: (name, p) for name in splits}",
        "{name: (name, p if name == splits[0] else p[::-1]) for name in splits}",
        "tests/core/test_batches.py::test_unlabelled_rows_come_in_turn_and_their_versions_at_the_same_places",
    ),
    Mutation(
        "self-training forgets instead of remembering",
        "plugins/hybridengine_plugins/data/self_training.py",
        "torch.lerp(q.mean(0), mean, self.memory)",
        "torch.lerp(mean, q.mean(0), self.memory)",
        "tests/plugins/test_self_training.py::test_matches_the_papers[0.42-True-True]",
    ),
    Mutation(
        "self-training learns the text it labelled",
        "plugins/hybridengine_plugins/data/self_training.py",
        'batch.parts.get("augmented", part)',
        "part",
        "tests/plugins/test_self_training.py::test_matches_the_papers[None-True-True]",
    ),
    Mutation(
        "predictions of the step before counted again",
        "plugins/hybridengine_plugins/data/self_training.py",
        "        self._seen.clear()\n        terms",
        "        terms",
        "tests/plugins/test_self_training.py::test_matches_the_papers[0.42-True-False]",
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
        "the prompt stands before [CLS], which encoders classify by",
        "plugins/hybridengine_plugins/prompts/prompt_tuning.py",
        'int(first is not None and f["input_ids"][0] == first)',
        "0",
        "tests/plugins/test_prompt_tuning.py::test_attacks_leave_the_vectors_alone_unless_asked",
    ),
    Mutation(
        "a prefix that a causal mask hides",
        "hybridengine/model/prefix.py",
        "functional.pad(attention_mask, (n, 0), value=visible)",
        "functional.pad(attention_mask, (n, 0), value=False)",
        "tests/plugins/test_prefix_tuning.py::test_a_decoder_computes_what_a_cache_of_prefixes_gives",
    ),
    Mutation(
        "inner loops and weight perturbations pass soft prompts by",
        "hybridengine/run.py",
        ' or k.partition("/")[0] in self.model_parts',
        "",
        "tests/plugins/test_prompt_tuning.py::test_weight_perturbations_reach_the_vectors_and_give_them_back",
    ),
    Mutation(
        "label words without regard to the size of classes",
        "plugins/hybridengine_plugins/prompts/verbalizer.py",
        "(other / count)[:, None] * odds - (odds.sum(0) - odds)",
        "odds - (odds.sum(0) - odds)",
        "tests/plugins/test_verbalizer.py::test_the_words_are_those_of_the_paper[2-60-llama]",
    ),
    Mutation(
        "class vectors that start at the sum of a word's tokens",
        "plugins/hybridengine_plugins/prompts/soft_verbalizer.py",
        "rows[list(word)].mean(0) for word",
        "rows[list(word)].sum(0) for word",
        "tests/plugins/test_soft_verbalizer.py::test_several_words_start_at_their_mean",
    ),
    Mutation(
        "class vectors beyond the reach of functional parameters",
        "plugins/hybridengine_plugins/prompts/soft_verbalizer.py",
        'seen.value(f"{self.name}/weight", self._vectors.weight)',
        "self._vectors.weight",
        "tests/plugins/test_soft_verbalizer.py::test_functional_vectors_are_read",
    ),
    Mutation(
        "padded label words take part in a product",
        "plugins/hybridengine_plugins/prompts/knowledgeable_verbalizer.py",
        "self._words.by_class(scores, 0.0)",
        "self._words.by_class(scores, torch.finfo(scores.dtype).min)",
        "tests/plugins/test_knowledgeable_verbalizer.py::test_splits_loss_scale_and_padding_change_nothing",
    ),
    Mutation(
        "a word's relevance without the other classes",
        "plugins/hybridengine_plugins/prompts/knowledgeable_verbalizer.py",
        "(near.sum(1) - own)",
        "near.sum(1)",
        "tests/plugins/test_knowledgeable_verbalizer.py::test_words_are_sifted_as_in_the_paper[0.3-0.98-bert]",
    ),
    Mutation(
        "calibration that multiplies by the prior",
        "plugins/hybridengine_plugins/prompts/calibration.py",
        "_log(prediction.scores) - _log(prior)",
        "_log(prediction.scores) + _log(prior)",
        "tests/plugins/test_calibration.py::test_a_text_without_content_becomes_uniform[bert]",
    ),
    Mutation(
        "a row demonstrates itself",
        "plugins/hybridengine_plugins/prompts/demonstrations.py",
        "(row for row in rows if row[2] != query)",
        "rows",
        "tests/plugins/test_demonstrations.py::test_never_the_query_itself_nor_its_double",
    ),
    Mutation(
        "the same demonstrations at every step",
        "plugins/hybridengine_plugins/prompts/demonstrations.py",
        "KeyedRows(key, [mix(query)])",
        "KeyedRows(key[:2], [mix(query)])",
        "tests/plugins/test_demonstrations.py::test_the_choice_follows_seed_text_and_step_alone",
    ),
    Mutation(
        "hidden words on top of the whole loss",
        "plugins/hybridengine_plugins/prompts/pet.py",
        "((1 - self.mlm_weight) * term, unit)",
        "(term, unit)",
        "tests/plugins/test_pet.py::test_three_steps_match_the_paper[0.3-False]",
    ),
    Mutation(
        "one pattern for all rows of a batch",
        "plugins/hybridengine_plugins/prompts/pet.py",
        "for u in chance]",
        "for u in chance[:1] * len(chance)]",
        "tests/plugins/test_pet.py::test_patterns_are_drawn_by_seed_step_and_row",
    ),
    Mutation(
        "unlabelled rows that count in the mean of labelled ones",
        DISTILL,
        '(factors[name] * value, "all_rows")',
        '(factors[name] * value, "rows")',
        "tests/plugins/test_distill.py::test_unlabelled_rows_are_learned_from",
    ),
    Mutation(
        "hidden states that nobody was asked for",
        "hybridengine/seams/context.py",
        "features = both(features, self._features) if model is None else features",
        "features = both(features, False)",
        "tests/plugins/test_supcon.py::test_weight_zero_is_plain_training",
    ),
    Mutation(
        "cutoff leaves what an attack added",
        "plugins/hybridengine_plugins/regularize/cutoff.py",
        "ctx.embedded(batch, view)",
        "ctx.embedded(batch, view.clean())",
        "tests/plugins/test_cutoff.py::test_what_an_attack_adds_is_cut_as_well",
    ),
    Mutation(
        "mixout without keeping the mean",
        "plugins/hybridengine_plugins/regularize/mixout.py",
        "ahead = (wide(weight) - self.p * pretrained) / (1 - self.p)",
        "ahead = wide(weight)",
        "tests/plugins/test_mixout.py::test_each_weight_is_the_pretrained_one_or_goes_further_and_the_mean_stays",
    ),
    Mutation(
        "an encoder pass for every head",
        "hybridengine/seams/backbone.py",
        "if self._kept is None:",
        "if self.keeps:",
        "tests/plugins/test_multi_sample_dropout.py::test_the_encoder_runs_once_and_the_head_as_often_as_asked",
    ),
    Mutation(
        "padding counts between hidden states",
        "hybridengine/seams/matching.py",
        "real = mask.to(values.dtype)",
        "real = torch.ones_like(values)",
        "tests/core/test_seams_matching.py::test_hidden_states_of_real_tokens_count_by_row",
    ),
    Mutation(
        "an average that teaches with dropout",
        "hybridengine/seams/layered.py",
        "    model.eval()\n",
        "    model.train()\n",
        "tests/plugins/test_distill.py::test_the_average_of_the_student_teaches",
    ),
    Mutation(
        "the mixture misses what enters the first layer",
        "hybridengine/seams/layers.py",
        "joined = join(states)",
        "joined = join([states[1], *states[1:]])",
        "tests/plugins/test_layer_mixing.py::test_three_steps_match_the_paper",
    ),
    Mutation(
        "one dropout mask for all samples",
        "plugins/hybridengine_plugins/regularize/multi_sample_dropout.py",
        'view.fork("sample", k)',
        "view",
        "tests/plugins/test_multi_sample_dropout.py::test_three_steps_match_the_paper[2-0.5]",
    ),
    Mutation(
        "padding of one text mixed into another",
        "plugins/hybridengine_plugins/regularize/mixup.py",
        "(1 - part) * (x * real)[partner]",
        "(1 - part) * x[partner]",
        "tests/plugins/test_mixup.py::test_a_decoder_classifies_the_last_token_of_the_longer_text[gpt2]",
    ),
)
