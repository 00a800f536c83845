"""Cross-modal attention: its definition (``reference``), its Triton kernels (``triton``) and their configurations (``config``)."""
