"""HTTP serving: API servers and workers, on Ray Serve or in one process. Imports `engine`; nothing imports `serve`."""
