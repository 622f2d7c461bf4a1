"""The frame of a process: its loop, timers and shutdown; its children; its logs and reports."""
