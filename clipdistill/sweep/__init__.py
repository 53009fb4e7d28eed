"""Sweeps: one run again and again with some keys changed, by several workers, each of which may be killed."""

from clipdistill.sweep.loop import run_sweep, sweep_lines

__all__ = ["run_sweep", "sweep_lines"]
