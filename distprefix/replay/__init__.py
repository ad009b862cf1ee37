"""Replaying real workloads on several nodes: traces, node processes, figures."""
