"""The worker: generates a job's images on one accelerator. The only package of `serve` that imports torch."""
