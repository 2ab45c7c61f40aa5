"""Processes, signals, logs, trackers, errors: what any training run needs."""
