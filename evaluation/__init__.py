"""How good a model is: bits per byte by domain, tasks, and whether two models differ."""

from .comparison import Scores, bootstrap_interval, compare, holm, paired_p_value
from .continuations import continuation_items
from .harness_export import export_to_harness
from .perplexity import evaluate_domains
from .processes import this_process
from .runner import ModelMeasures, Plan, compare_models, measure_model, plan_evaluation, plan_tokens, report
from .tasks import Task, find_task, read_task, task_names

__all__ = [
    "ModelMeasures",
    "Plan",
    "Scores",
    "Task",
    "bootstrap_interval",
    "compare",
    "compare_models",
    "continuation_items",
    "evaluate_domains",
    "export_to_harness",
    "find_task",
    "holm",
    "measure_model",
    "paired_p_value",
    "plan_evaluation",
    "plan_tokens",
    "read_task",
    "report",
    "task_names",
    "this_process",
]
