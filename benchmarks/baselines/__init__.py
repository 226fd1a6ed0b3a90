"""Other systems in small, for comparing with: benchmarks import them, the product never does."""
