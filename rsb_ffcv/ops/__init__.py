"""Operations on single images, the compiled kernels that execute them, and the draws that they
use."""
