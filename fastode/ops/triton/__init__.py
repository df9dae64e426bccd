"""The operators on a GPU, and fused convolutions, in Triton: see README.md. Only what imports this needs Triton."""
