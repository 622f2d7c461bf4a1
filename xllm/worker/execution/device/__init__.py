"""Steps on a device that computes behind the host's back: launched, replayed, collected."""
