"""One accelerator: jobs in, pictures out. The only room of `serve` with torch."""
