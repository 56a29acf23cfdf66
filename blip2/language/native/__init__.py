"""OPT without TensorRT-LLM: the same checkpoint, run by PyTorch."""
