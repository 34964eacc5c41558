"""Named beside `plugin_faults`, has it kill instead of raise."""
