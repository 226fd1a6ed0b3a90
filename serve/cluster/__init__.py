"""More than one process: what Ray Serve is told, and what it does not do by itself."""
