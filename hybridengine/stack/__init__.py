"""The stack: resolve names, check rules, fold the seams, plan the passes, watch the effects."""

from hybridengine.stack.compose import compose, evaluation
from hybridengine.stack.effects import EffectLog
from hybridengine.stack.plan import Phase, Plan, make_plan
from hybridengine.stack.resolve import Resolved, as_method, resolve
from hybridengine.stack.rules import NEEDS, check_stack

__all__ = [
    "NEEDS",
    "EffectLog",
    "Phase",
    "Plan",
    "Resolved",
    "as_method",
    "check_stack",
    "compose",
    "evaluation",
    "make_plan",
    "resolve",
]
