"""Nearest neighbours: exact search, FAISS indexes, measures."""
