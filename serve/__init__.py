"""The network edge: Ray Serve replicas behind an HTTP endpoint. Imports `engine`; nothing imports `serve`."""
