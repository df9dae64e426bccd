"""The solution of a single map's equation, by equal steps and by error: derivation in README.md beside this file."""
