"""Tables and figures from results alone: ``python -m masksl.report``."""
