"""From captions to ranked images: pipeline, init images, caption continuation, provenance and image files."""
