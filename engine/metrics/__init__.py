"""What is measured on pictures and models: reconstruction, retrieval, attributes, FID."""
