"""The operators' families: each folder holds its derivation (README.md) and its autograd Function."""
