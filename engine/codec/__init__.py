"""Pictures from tokens, and embeddings of both, at the speed of the machine: VQGAN decoders, KoCLIP encoder, ONNX."""
