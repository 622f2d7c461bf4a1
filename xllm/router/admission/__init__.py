"""Who may enter, who waits, and who is sent away: decisions of a router before a request runs."""
