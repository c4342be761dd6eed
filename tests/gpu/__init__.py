"""Graphs, streams and preemption on a GPU."""
