"""Images from image tokens, and embeddings of images and captions, at the machine's speed: VQGAN decoders, KoCLIP, ONNX."""
