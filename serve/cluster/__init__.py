"""Serving from several processes: replicas, the coordinator, re-runs, autoscaling, and the gate in Ray's proxy."""
