"""Scheduling: fair queueing between keys and requests, slot allocation, admission by deadline. Plain Python."""
