"""The report of a whole training: figures, what they mean in words, curves and images, as one HTML file and as Markdown."""
