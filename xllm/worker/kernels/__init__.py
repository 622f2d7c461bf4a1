"""Kernels of our own for CPUs: C++ behind a plain C interface, each with a twin in torch."""
