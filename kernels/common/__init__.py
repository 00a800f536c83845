"""What the kernels of all ops share: tables of launch configurations, properties of the GPU, how a variant is described."""
