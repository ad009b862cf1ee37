"""The only place that knows Redis: keys, scripts, connections, the private server."""
