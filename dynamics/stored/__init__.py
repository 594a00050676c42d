"""What is stored of a run, as one tree: records of its training merged with what its checkpoints say."""

from dynamics.stored.opening import open_run

__all__ = ["open_run"]
