"""``amd-fast bench data``: clips per second of every way to read videos, ours and named peers, on the user's own clips."""
