"""How good a model is: bits per byte by domain, tasks, and whether two models differ."""

from .candidates import (
    Candidate,
    Reader,
    find_documents,
    find_models,
    find_outputs,
    find_task_rows,
    load_model,
    load_reader,
    measure_candidate,
)
from .comparison import Scores, bootstrap_interval, compare, holm, paired_p_value
from .continuations import continuation_items
from .harness_export import export_to_harness
from .perplexity import evaluate_domains
from .processes import set_num_threads, this_process
from .report_lines import results_lines
from .runner import (
    ModelMeasures,
    Plan,
    compare_models,
    measure_model,
    plan_evaluation,
    plan_tokens,
    report,
    results,
    write_results,
)
from .tasks import Task, find_task, read_task, task_names

__all__ = [
    "Candidate",
    "ModelMeasures",
    "Plan",
    "Reader",
    "Scores",
    "Task",
    "bootstrap_interval",
    "compare",
    "compare_models",
    "continuation_items",
    "evaluate_domains",
    "export_to_harness",
    "find_documents",
    "find_models",
    "find_outputs",
    "find_task",
    "find_task_rows",
    "holm",
    "load_model",
    "load_reader",
    "measure_candidate",
    "measure_model",
    "paired_p_value",
    "plan_evaluation",
    "plan_tokens",
    "read_task",
    "report",
    "results",
    "results_lines",
    "set_num_threads",
    "task_names",
    "this_process",
    "write_results",
]
