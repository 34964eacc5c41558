"""What an engine raises of its own."""


class EngineError(RuntimeError):
    """An engine that failed; one line says how."""
