"""What a row of a draw is to the kernels: the numbers that a step uploads for it.

One line of int64 a row, so that all that a step has to say goes up in one copy; doubles are there
by their bits.
"""

from __future__ import annotations

ROW_NUMBERS = 8
"""int64 numbers a row: its mode, the seed's bits, choice * 2**32 + position, temperature (double),
top-k (0: all), top-p (double; infinite: all), log of min-p (double; minus infinite: all), 0."""

ABSENT, GREEDY, PLAIN, FILTERED = range(4)
"""Modes. A row of zeros is absent: nothing is read or written for it."""

FLAG_NOT_FINITE = 1
"""The row has a logit that is no number, or its largest is infinite: its token is 0."""
FLAG_NOT_DRAWN = 2
"""The row has filters and the draw was launched without them: its token is 0."""
