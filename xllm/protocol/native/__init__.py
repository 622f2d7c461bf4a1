"""Loops in C++ over the token ids of a prompt, each with a twin in Python."""
