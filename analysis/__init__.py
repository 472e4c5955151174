"""What the experts do: routing traces by domain, their statistics, and the pictures."""

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
    "trace_routing",
    "write_report",
]
