"""What the experts do: routing traces by domain, their statistics, and the report."""

from .architecture import Architecture
from .comparison import comparable
from .health import Finding, examine
from .inspection import Inspection, inspect
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
    "Architecture",
    "Finding",
    "Inspection",
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
    "inspect",
    "load_by_domain",
    "measure_balance",
    "measure_specialisation",
    "mutual_information",
    "normalised_mutual_information",
    "permutation_null",
    "trace_routing",
    "write_files",
]
