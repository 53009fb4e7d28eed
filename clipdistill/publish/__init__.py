"""Vectors into the databases that services search."""
