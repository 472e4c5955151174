"""What the experts do: routing traces by domain, their statistics, and the pictures."""

from .figures import save_figure
from .load_history import LoadHistory
from .report import analyse, write_report
from .routing_trace import RoutingTrace, trace_routing
from .specialisation import (
    load_by_domain,
    measure_balance,
    measure_specialisation,
    mutual_information,
    normalised_mutual_information,
    permutation_null,
)
from .training_curves import read_metrics, training_figure

__all__ = [
    "LoadHistory",
    "RoutingTrace",
    "analyse",
    "load_by_domain",
    "measure_balance",
    "measure_specialisation",
    "mutual_information",
    "normalised_mutual_information",
    "permutation_null",
    "read_metrics",
    "save_figure",
    "trace_routing",
    "training_figure",
    "write_report",
]
