"""One image at a time: operations, the compiled kernels under them, and the draws that feed
them."""
