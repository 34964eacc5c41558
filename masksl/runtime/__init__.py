"""What every run needs, whatever its method."""
