"""The AFMIR model, its parts, and the registry they are made from."""
