"""One image at a time: FFCV Operations, the compiled kernels under them, and the draws that feed them."""
