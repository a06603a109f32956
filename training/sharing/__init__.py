"""Several jobs in one batch: each sample with its own adapter row, each job with its own loss and optimiser."""
