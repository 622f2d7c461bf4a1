"""Ranks that compute one model together: how they meet and what they exchange."""
