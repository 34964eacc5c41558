"""Tables and figures from finished runs: ``python -m masksl.report``."""
