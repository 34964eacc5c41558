"""A federation on this machine: Flower's SuperLink and SuperNodes, to try a deployment.

`python -m masksl.federation` makes one, runs a job on it and ends it. It is set up as
docs/deployment.md sets one up over several machines: TLS with a CA of its own, nodes
that are registered by their keys, and a SuperLink whose programs need a secret.
"""
