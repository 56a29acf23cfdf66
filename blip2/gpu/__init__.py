"""What runs on a GPU: kernels compiled and launched, graphs of them."""
