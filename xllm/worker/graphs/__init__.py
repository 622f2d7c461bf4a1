"""Adaptive graph mode: which steps run as captured graphs, and the graphs that were captured."""
