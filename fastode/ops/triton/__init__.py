"""The staged engine's operators on a GPU, in Triton: see README.md. Importing this needs triton; nothing else does."""
