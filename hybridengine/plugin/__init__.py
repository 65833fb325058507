"""What a plugin author needs: the hook decorator, traits, parameters; and how plugins are found and called."""

from hybridengine.data.rows import Split
from hybridengine.model.depth import parameter_levels
from hybridengine.plugin.attack import Attack, TargetedAttack
from hybridengine.plugin.catalogue import Catalogue, Listing
from hybridengine.plugin.hookspecs import HookSpecs, hook
from hybridengine.plugin.lengths import check_share, whole_steps
from hybridengine.plugin.optimizer import GroupwiseOptimizer, split_hidden, with_rate
from hybridengine.plugin.stacking import Method, StackView
from hybridengine.plugin.traits import Band, Traits, parameter
from hybridengine.run import ParamGroup, Run

__all__ = [
    "Attack",
    "Band",
    "Catalogue",
    "GroupwiseOptimizer",
    "HookSpecs",
    "Listing",
    "Method",
    "ParamGroup",
    "Run",
    "Split",
    "StackView",
    "TargetedAttack",
    "Traits",
    "check_share",
    "hook",
    "parameter",
    "parameter_levels",
    "split_hidden",
    "whole_steps",
    "with_rate",
]
