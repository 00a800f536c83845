"""Active sample inference and the free-energy distillation loss."""
