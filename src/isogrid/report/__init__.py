"""Tables, figures and the page of a compression: plain dicts in, text and pictures out.

The shape of the dict stands in `isogrid.report.rows`. Figures and the page need ``pip install "isogrid[demo]"``;
matplotlib and jinja2 are imported by the first function that draws with them.
"""

from isogrid.report.blocks import block_text
from isogrid.report.canvas import save_figure
from isogrid.report.csv_files import write_csv
from isogrid.report.figures import error_per_layer, quality_against_size
from isogrid.report.files import read_json, replace_file, write_json
from isogrid.report.machine import describe_machine, today
from isogrid.report.memory import measure_lines, stacked_bars
from isogrid.report.numbers import (
    format_bytes,
    format_count,
    format_duration,
    format_gap,
    format_keep,
    format_milliseconds,
    format_percent,
    format_quality,
)
from isogrid.report.page import write_page, write_report
from isogrid.report.pictures import block_picture, picture_sheet
from isogrid.report.progress import progress
from isogrid.report.rows import best_rows
from isogrid.report.tables import console_table, layer_table, markdown_page, markdown_table, table_columns

__all__ = [
    "best_rows",
    "block_picture",
    "block_text",
    "console_table",
    "describe_machine",
    "error_per_layer",
    "format_bytes",
    "format_count",
    "format_duration",
    "format_gap",
    "format_keep",
    "format_milliseconds",
    "format_percent",
    "format_quality",
    "layer_table",
    "markdown_page",
    "markdown_table",
    "measure_lines",
    "picture_sheet",
    "progress",
    "quality_against_size",
    "read_json",
    "replace_file",
    "save_figure",
    "stacked_bars",
    "table_columns",
    "today",
    "write_csv",
    "write_json",
    "write_page",
    "write_report",
]
