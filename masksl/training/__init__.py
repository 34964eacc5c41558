"""Training steps on tensors: no bytes, no messages."""
