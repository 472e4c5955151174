"""What the experts do: routing traces by domain, their statistics, and the report."""

from .comparison import comparable
from .health import Finding, examine
from .load_history import LoadHistory
from .measurement import Measurement, MeasurementSettings, Measurer, RunInput
from .report import analyse, write_files
from .routing_trace import RoutingTrace, trace_routing
from .run_record import RunRecord
from .specialisation import (
    domain_divergence,
    load_by_domain,
    measure_balance,
    measure_specialisation,
    mutual_information,
    normalised_mutual_information,
    permutation_null,
)

__all__ = [
    "Finding",
    "LoadHistory",
    "Measurement",
    "MeasurementSettings",
    "Measurer",
    "RoutingTrace",
    "RunInput",
    "RunRecord",
    "analyse",
    "comparable",
    "domain_divergence",
    "examine",
    "load_by_domain",
    "measure_balance",
    "measure_specialisation",
    "mutual_information",
    "normalised_mutual_information",
    "permutation_null",
    "trace_routing",
    "write_files",
]
