"""One self-contained HTML page from run directories."""

from clusterssl.report.page import write_report
from clusterssl.report.pictures import Gallery, Strip, strip
from clusterssl.report.records import RunRecord, read_run
from clusterssl.report.tables import Table, sparkline

__all__ = ["Gallery", "RunRecord", "Strip", "Table", "read_run", "sparkline", "strip", "write_report"]
