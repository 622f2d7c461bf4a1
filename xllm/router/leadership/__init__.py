"""One router leads: the election, and what only the leader does."""
