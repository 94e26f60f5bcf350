"""What is installed and really works on this machine, and what each command still needs."""

from pmm_edge.doctor.commands import COMMANDS, Readiness
from pmm_edge.doctor.examination import Diagnosis, examine
from pmm_edge.doctor.findings import Finding, Section
from pmm_edge.doctor.markdown import as_markdown

__all__ = ["COMMANDS", "Diagnosis", "Finding", "Readiness", "Section", "as_markdown", "examine"]
